"""policy_loss: every loss against its formula, invariances, masking, degenerate batches and refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.ops import policy_loss
from prism_fast.ops.reference.aggregation import LOSSES, OF_LOSS

NORM = {"seq_mean_token_sum_norm": {"norm_length": 40.0}}
PAIRS = [(loss, aggregation) for loss in LOSSES for aggregation in OF_LOSS[loss]]


def batch(generator, lengths=(5, 0, 1, 7, 3, 4), spread=0.3, dtype=torch.float64):
    """Tensors of a packed batch; the fifth sequence is fully masked."""
    n, b = sum(lengths), len(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    old = -noise(n).abs() - 0.1
    mask = torch.rand(n, generator=generator) > 0.25
    if b > 4:
        mask[int(cu_seqlens[4]) : int(cu_seqlens[5])] = False
    return {
        "logp": (old + spread * noise(n)).requires_grad_(),
        "advantage": noise(b),
        "cu_seqlens": cu_seqlens,
        "old_logp": old,
        "ref_logp": old + spread * noise(n),
        "kl_coef": 0.3,
        "entropy": noise(n).abs().requires_grad_(),
        "entropy_coef": 0.05,
        "is_weight": noise(n).abs(),
        "mask": mask,
    }


def by_loop(data: dict, loss: str, aggregation: str, clip, tau=(1.0, 1.05), norm_length=None) -> float:
    """The loss in Python numbers."""
    offsets = data["cu_seqlens"].tolist()
    terms = []
    for b in range(len(offsets) - 1):
        tokens = [t for t in range(offsets[b], offsets[b + 1]) if data["mask"][t]]
        drift = [(data["logp"][t] - data["old_logp"][t]).item() for t in tokens]
        values = []
        for t, d in zip(tokens, drift, strict=True):
            a = float(data["advantage"][b])
            r = math.exp(sum(drift) / len(drift)) if loss.startswith("gspo") else math.exp(d)
            if loss == "sapo":
                s = tau[0] if a > 0 else tau[1]
                value = -a / (1 + math.exp(-s * (r - 1))) * 4 / s
            elif loss == "cispo":
                value = -a * min(max(r, 1 - clip[0]), 1 + clip[1]) * data["logp"][t].item()
            else:
                value = max(-a * r, -a * min(max(r, 1 - clip[0]), 1 + clip[1]))
            k = (data["ref_logp"][t] - data["logp"][t]).item()
            value = value * float(data["is_weight"][t]) + 0.3 * (math.exp(k) - k - 1)
            values.append(value - 0.05 * data["entropy"][t].item())
        if values:
            terms.append(values)
    if aggregation == "token_mean":
        return sum(map(sum, terms)) / sum(map(len, terms))
    if aggregation == "seq_mean_token_mean":
        return sum(sum(v) / len(v) for v in terms) / len(terms)
    return sum(map(sum, terms)) / len(terms) / (norm_length or 1.0)


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
def test_value_equals_the_loop(loss, aggregation, generator):
    data = batch(generator)
    clip = None if loss == "sapo" else (0.15, 0.1)
    found, stats = policy_loss(**data, loss=loss, aggregation=aggregation, clip=clip, **NORM.get(aggregation, {}))
    wanted = by_loop(data, loss, aggregation, clip, norm_length=NORM.get(aggregation, {}).get("norm_length"))
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    active = data["mask"]
    assert stats.tokens == active.sum() and stats.entropy == pytest.approx(data["entropy"][active].mean().item())
    assert stats.kl > 0 and stats.ratio_max >= stats.ratio_mean


@pytest.mark.parametrize("kl", ["k1", "k3", "abs"])
def test_straight_through_kl_has_the_value_of_its_form_and_the_gradient_of_k2(kl, generator):
    """Also where a clamp of k3 acts: its own gradient is 0 there."""
    data = batch(generator, spread=0.5)
    logp = data["logp"]
    far = torch.tensor([2.9, -2.9, 9.0, -30.0, 30.0], dtype=torch.float64)
    data["ref_logp"][:5] = logp.detach()[:5] + far
    data["mask"][:5] = True

    def evaluate(name: str, **options) -> tuple:
        loss, stats = policy_loss(**(data | options), kl=name)
        return loss.detach(), stats.kl, torch.autograd.grad(loss, logp)[0]

    for options in ({}, {"aggregation": "token_mean", "denominator": 7.0}, {"kl_coef": 0.0}):
        value, mean, own = evaluate(kl, **options)
        through, mean_through, gradient = evaluate(kl + "+", **options)
        torch.testing.assert_close(through, value, rtol=1e-13, atol=0)
        torch.testing.assert_close(mean_through, mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, evaluate("k2", **options)[2], rtol=1e-13, atol=1e-15)
        assert torch.equal(gradient, own) == ("kl_coef" in options)


def test_names_of_other_codes_for_kl_are_refused_with_ours():
    arguments = (torch.zeros(2), torch.zeros(1), torch.tensor([0, 2]).int())
    for name, ours in {"mse": "k2", "mse+": "k2", "kl+": r"k1\+", "low_var_kl": "k3", "low_var_kl+": r"k3\+"}.items():
        with pytest.raises(ValueError, match=f"is called '{ours}' here"):
            policy_loss(*arguments, kl=name)
    with pytest.raises(ValueError, match=r"kl='k2\+' is kl='k2'"):
        policy_loss(*arguments, kl="k2+")
    for name in ("full+", "k4+", "+"):
        with pytest.raises(ValueError, match="is not one of 'k1'"):
            policy_loss(*arguments, kl=name)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs", "k3+"])
def test_kl_times_the_ratio(kl, loss, backend, generator):
    """Value and gradient of the product; gspo's ratio is the sequence's, which each of its tokens moves."""
    data = batch(generator) | {"kl_coef": 1.0, "entropy_coef": 0.0, "is_weight": None}
    data["advantage"] = torch.zeros(6, dtype=torch.float64)
    logp, old, ref, mask = data["logp"], data["old_logp"], data["ref_logp"], data["mask"]
    options = {"loss": loss, "kl": kl, "kl_importance": True, **NORM.get(OF_LOSS[loss][0], {})}
    found, stats = policy_loss(**data, **options, denominator=1.0, backend=backend)
    d = logp - ref
    value = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1, "abs": d.abs()}[kl.removesuffix("+")]
    if kl.endswith("+"):
        value = value.detach() + d.square() / 2 - (d.square() / 2).detach()
    wanted, terms, offsets = 0.0, [], data["cu_seqlens"].tolist()
    for start, end in pairwise(offsets):
        rows = torch.arange(start, end)[mask[start:end]]
        if not len(rows):
            continue
        ratio = (logp - old)[rows]
        ratio = ratio.mean().exp() if loss.startswith("gspo") else ratio.exp()
        terms.append(value[rows] * ratio)
        count = {"token_mean": 1.0, "seq_mean_token_sum_norm": 40.0}.get(OF_LOSS[loss][0], len(rows))
        wanted = wanted + terms[-1].sum() / count
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.kl, torch.cat(terms).mean().detach(), rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", None])
def test_on_policy_the_corrected_k3_has_the_gradient_of_k2(backend, generator):
    data = batch(generator) | {"old_logp": None, "backend": backend}
    plain, corrected, square = (
        policy_loss(**data, kl=kl, kl_importance=importance)
        for kl, importance in (("k3", False), ("k3", True), ("k2", False))
    )
    torch.testing.assert_close(corrected[0], plain[0], rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(x[0], data["logp"])[0] for x in (corrected, square)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
def test_gradcheck(loss, aggregation, generator):
    data = batch(generator, lengths=(3, 1, 0, 4), spread=0.2)
    if loss.startswith(("gspo", "cispo")):
        data["old_logp"] = None  # their gradient is by definition not that of their value
    logp, entropy = data.pop("logp"), data.pop("entropy")

    def run(logp, entropy):
        return policy_loss(
            logp, entropy=entropy, loss=loss, aggregation=aggregation, **NORM.get(aggregation, {}), **data
        )[0]

    if loss.startswith(("gspo", "cispo")):
        found = torch.autograd.grad(run(logp, entropy), (logp, entropy))
        wanted = torch.autograd.grad(
            policy_loss(
                logp, entropy=entropy, loss="grpo", aggregation=aggregation, **NORM.get(aggregation, {}), **data
            )[0],
            (logp, entropy),
        )
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # on-policy they are all one gradient
    else:
        assert torch.autograd.gradcheck(run, (logp, entropy))


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
def test_micro_batches_with_the_global_denominator_add_up(loss, aggregation, generator):
    data = batch(generator, lengths=(5, 0, 1, 7, 3, 4, 2))
    options = {"loss": loss, "aggregation": aggregation, **NORM.get(aggregation, {})}
    whole, _ = policy_loss(**data, **options)
    wanted = torch.autograd.grad(whole, (data["logp"], data["entropy"]))
    offsets = data["cu_seqlens"].tolist()
    lengths = torch.tensor([int(data["mask"][a:b].sum()) for a, b in pairwise(offsets)])
    denominator = loss_denominator(loss, lengths, aggregation=aggregation)
    order = torch.randperm(7, generator=generator).tolist()
    total = 0.0
    for rows in (order[:2], order[2:3], order[3:]):  # any cut, any order, packed anew
        index = torch.cat([torch.arange(offsets[b], offsets[b + 1]) for b in rows])
        sizes = [0] + [offsets[b + 1] - offsets[b] for b in rows]
        part = {
            name: value[index]
            for name, value in data.items()
            if name in ("logp", "old_logp", "ref_logp", "entropy", "is_weight", "mask")
        }
        loss_part, _ = policy_loss(
            advantage=data["advantage"][rows],
            cu_seqlens=torch.tensor(sizes).cumsum(0).int(),
            denominator=denominator,
            kl_coef=0.3,
            entropy_coef=0.05,
            **part,
            **options,
        )
        loss_part.backward()
        total += loss_part.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close((data["logp"].grad, data["entropy"].grad), wanted, rtol=1e-12, atol=1e-14)


def test_gspo_is_grpo_for_sequences_of_one_token(generator):
    data = batch(generator, lengths=(1,) * 9)
    losses = [policy_loss(**data, loss=loss, clip=(0.1, 0.1))[0] for loss in ("gspo", "gspo_token", "grpo")]
    gradients = [torch.autograd.grad(loss, data["logp"])[0] for loss in losses]
    for loss, gradient in zip(losses[:2], gradients[:2], strict=True):
        torch.testing.assert_close(loss, losses[2], rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, gradients[2], rtol=1e-13, atol=1e-15)


def test_gspo_gradient_is_the_gradient_of_its_sequence_ratio(generator):
    data = batch(generator, lengths=(4, 2, 6))
    data |= {"is_weight": None, "mask": None, "kl_coef": 0.0, "entropy_coef": 0.0}
    found = torch.autograd.grad(policy_loss(**data, loss="gspo", clip=(0.2, 0.2))[0], data["logp"])[0]
    offsets, total = data["cu_seqlens"].tolist(), 0.0
    for b, a in enumerate(data["advantage"]):
        s = (data["logp"] - data["old_logp"])[offsets[b] : offsets[b + 1]].mean().exp()
        total = total + torch.maximum(-a * s, -a * s.clamp(0.8, 1.2)) / 3
    torch.testing.assert_close(found, torch.autograd.grad(total, data["logp"])[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_inactive_tokens_may_hold_anything(loss, generator):
    options = {"loss": loss, **NORM.get(OF_LOSS[loss][0], {})}
    data = batch(generator)
    clean_loss, clean_stats = policy_loss(**data, **options)
    wanted = torch.autograd.grad(clean_loss, data["logp"])[0]
    assert torch.equal(wanted[~data["mask"]], torch.zeros(int((~data["mask"]).sum()), dtype=torch.float64))
    for name in ("logp", "old_logp", "ref_logp", "entropy", "is_weight"):
        poisoned = data[name].detach().clone()
        poisoned[~data["mask"]] = math.nan if name != "logp" else math.inf
        data[name] = poisoned.requires_grad_() if name in ("logp", "entropy") else poisoned
    dirty_loss, dirty_stats = policy_loss(**data, **options)
    dirty_loss.backward()
    assert torch.equal(dirty_loss, clean_loss)
    assert torch.equal(data["logp"].grad, wanted)
    assert torch.equal(data["entropy"].grad[~data["mask"]], torch.zeros_like(wanted[~data["mask"]]))
    assert torch.equal(torch.stack(dirty_stats), torch.stack(clean_stats))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (3, 2)])
def test_nothing_active_gives_zero_not_nan(loss, lengths, generator):
    data = batch(generator, lengths=lengths)
    data["mask"] = torch.zeros(sum(lengths), dtype=torch.bool)
    for denominator in (None, 0.0, torch.tensor(7)):
        found, stats = policy_loss(**data, loss=loss, denominator=denominator, **NORM.get(OF_LOSS[loss][0], {}))
        found.backward()
        assert found.item() == 0.0 and stats.tokens == 0 and stats.sequences == 0
        assert torch.equal(data["logp"].grad, torch.zeros_like(data["logp"]))
        assert stats.ratio_mean.isnan() and stats.ratio_max.isnan()


def test_tokens_past_the_last_offset_are_padding(generator):
    data = batch(generator, lengths=(3, 4))
    data |= {"mask": None, "ref_logp": None, "kl_coef": 0.0, "entropy": None, "entropy_coef": 0.0, "is_weight": None}
    wanted, stats = policy_loss(**data)
    longer = {name: torch.cat((data[name].detach(), torch.full((5,), math.nan))) for name in ("logp", "old_logp")}
    longer["logp"].requires_grad_()
    found, padded_stats = policy_loss(**(data | longer))
    found.backward()
    assert torch.equal(found, wanted) and padded_stats.tokens == stats.tokens == 7
    assert torch.equal(longer["logp"].grad[7:], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_ratio_is_one_by_construction(loss, generator):
    data = batch(generator)
    options = {"loss": loss, **NORM.get(OF_LOSS[loss][0], {})}
    data["old_logp"] = None
    found, stats = policy_loss(**data, **options)
    gradient = torch.autograd.grad(found, data["logp"])[0]
    data["old_logp"] = data["logp"].detach()
    same, _ = policy_loss(**data, **options)
    torch.testing.assert_close(same, found, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(same, data["logp"])[0], gradient, rtol=0, atol=0)
    assert stats.ratio_mean == 1 and stats.ratio_max == 1 and stats.approx_kl == 0
    assert stats.clip_fraction_low == stats.clip_fraction_high == stats.dual_clip_fraction == 0


def test_clip_sides_and_dual_bound():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5, 5.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)

    def run(sign: float, **options):
        logp = ratio.log().requires_grad_()
        loss, stats = policy_loss(
            logp,
            torch.tensor([sign]),
            cu_seqlens,
            old_logp=torch.zeros(5, dtype=torch.float64),
            clip=(0.2, 0.3),
            aggregation="token_mean",
            denominator=1.0,
            **options,
        )
        loss.backward()
        return loss.item(), logp.grad.tolist(), stats

    value, gradient, stats = run(1.0)  # upper side only
    assert value == pytest.approx(-(0.5 + 0.9 + 1.1 + 1.3 + 1.3))
    assert gradient == pytest.approx([-0.5, -0.9, -1.1, 0.0, 0.0])
    assert (stats.clip_fraction_low, stats.clip_fraction_high) == (0.0, 0.4)
    value, gradient, stats = run(-1.0)  # lower side only
    assert value == pytest.approx(0.8 + 0.9 + 1.1 + 1.5 + 5.0)
    assert gradient == pytest.approx([0.0, 0.9, 1.1, 1.5, 5.0])
    assert (stats.clip_fraction_low, stats.clip_fraction_high) == (0.2, 0.0)
    for bound in ({"dual_clip": 3.0}, {"delta": 3.0}):
        value, gradient, stats = run(-1.0, **bound)
        assert value == pytest.approx(0.8 + 0.9 + 1.1 + 1.5 + 3.0)
        assert gradient == pytest.approx([0.0, 0.9, 1.1, 1.5, 0.0])
        assert stats.dual_clip_fraction == 0.2
        assert run(1.0, **bound)[0] == run(1.0)[0]


def test_log_ratio_clamps():
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    for loss, start, limit in (("grpo", 30.0, 20.0), ("gspo", 12.0, 10.0)):
        logp = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        old = torch.zeros(1, dtype=torch.float64)
        found, _ = policy_loss(logp, torch.tensor([-1.0]), cu_seqlens, old_logp=old, loss=loss)
        found.backward()
        assert found.item() == pytest.approx(math.exp(limit)) and logp.grad.item() == 0.0


def test_token_advantage_replaces_the_sequence_advantage(generator):
    data = batch(generator)
    wanted, _ = policy_loss(**data)
    lengths = data["cu_seqlens"].diff().long()
    data["token_advantage"] = data["advantage"].repeat_interleave(lengths)
    data["advantage"] = None
    torch.testing.assert_close(policy_loss(**data)[0], wanted, rtol=0, atol=0)
    torch.testing.assert_close(
        policy_loss(**data, loss="gspo_token")[0],
        policy_loss(**(data | {"advantage": torch.zeros(6), "token_advantage": None}), loss="gspo")[0]
        + policy_loss(**(data | {"kl_coef": 0.0, "entropy_coef": 0.0}), loss="gspo_token")[0],
    )


def test_float_mask_equals_bool_mask_and_half_precision_is_lifted(generator):
    data = batch(generator, dtype=torch.float32)
    found, _ = policy_loss(**data)
    assert torch.equal(policy_loss(**(data | {"mask": data["mask"].float()}))[0], found)
    half = data["logp"].detach().bfloat16().requires_grad_()
    low, _ = policy_loss(**(data | {"logp": half}))
    assert low.dtype == torch.float32
    exact = policy_loss(**(data | {"logp": half.detach().float()}))[0]
    assert torch.equal(low, exact)


def test_advantage_and_weights_are_constants(generator):
    data = batch(generator)
    for name in ("advantage", "old_logp", "ref_logp", "is_weight"):
        data[name].requires_grad_()
    loss, stats = policy_loss(**data)
    loss.backward()
    assert all(data[name].grad is None for name in ("advantage", "old_logp", "ref_logp", "is_weight"))
    assert not any(value.requires_grad for value in stats)


REFUSALS = {
    "loss='pg' is not one of 'grpo'": {"loss": "pg"},
    "loss='dapo' with aggregation='seq_mean_token_mean'": {"loss": "dapo", "aggregation": "seq_mean_token_mean"},
    "loss='grpo' with aggregation='token-mean'; it allows": {"aggregation": "token-mean"},
    "aggregation='seq_mean_token_sum_norm' needs norm_length": {"loss": "dr_grpo"},
    "aggregation='seq_mean_token_mean' does not use norm_length": {"norm_length": 3.0},
    "loss='sapo' has no clip range": {"loss": "sapo", "clip": (0.2, 0.2)},
    "clip must be a pair": {"clip": 0.2},
    "clip=-0.1 must be": {"clip": (-0.1, 0.2)},
    "sapo_temperature=0.0": {"loss": "sapo", "sapo_temperature": (0.0, 1.0)},
    "delta and dual_clip are one bound": {"delta": 3.0, "dual_clip": 3.0},
    "loss='gspo' has no dual_clip": {"loss": "gspo", "dual_clip": 3.0},
    r"delta=1.1 must be finite and in \(1.2": {"delta": 1.1},
    "exactly one of advantage": {"token_advantage": torch.zeros(3)},
    "loss='gspo' has one advantage per sequence": {
        "loss": "gspo",
        "advantage": None,
        "token_advantage": torch.zeros(3),
    },
    r"advantage must have shape \[1\]": {"advantage": torch.zeros(3)},
    "cu_seqlens must be int32": {"cu_seqlens": torch.tensor([0, 3])},
    "cu_seqlens must hold": {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
    r"old_logp must have shape \[3\]": {"old_logp": torch.zeros(2)},
    r"mask must have shape \[3\]": {"mask": torch.ones(2)},
    "denominator=-1.0": {"denominator": -1.0},
    r"denominator must have shape \[\]": {"denominator": torch.ones(1)},
    "entropy_coef=0.1 needs entropy": {"entropy_coef": 0.1},
    "kl_coef=0.1 needs ref_logp": {"kl_coef": 0.1},
    "kl='js' is not one of": {"kl": "js"},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    arguments = {
        "logp": torch.zeros(3),
        "advantage": torch.zeros(1),
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=f"policy_loss: .*{message}"):
        policy_loss(**(arguments | REFUSALS[message]))
