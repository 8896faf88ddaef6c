"""Numbers that an op cannot refuse: NaN of active tokens, and offsets that cut no sequences.

They come out as NaN, in the gradient as well, so that whoever watches the gradient's norm alone stops.
"""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops
from prism_fast.ops import native, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES, OF_LOSS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
CU_SEQLENS = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
N = 11  # two tokens of padding


def data(generator, device: str) -> dict:
    def noise(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    return dict(
        logp=(-noise(N).abs()).requires_grad_(), advantage=noise(3), cu_seqlens=CU_SEQLENS.to(device),
        old_logp=-noise(N).abs(), ref_logp=-noise(N).abs(), entropy=noise(N).abs().requires_grad_(),
        is_weight=noise(N).abs(), mask=torch.tensor([True] * 7 + [False] * 4, device=device),
        kl_coef=0.1, entropy_coef=0.2,
    )  # fmt: skip


def with_nan(x: dict, name: str, at: int) -> dict:
    value = x[name].detach().clone()
    value[at] = torch.nan
    return x | {name: value.requires_grad_(x[name].requires_grad)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["logp", "old_logp", "ref_logp", "entropy", "is_weight", "advantage"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_of_an_active_token_is_nan_in_its_gradient(loss, name, backend, device, generator):
    options = {"loss": loss, "backend": backend}
    options |= {"norm_length": 7.0} if OF_LOSS[loss][0] == "seq_mean_token_sum_norm" else {}
    spread = name in ("logp", "old_logp") and loss.startswith("gspo")  # the ratio is the sequence's
    for kl in ("k1", "k2", "k3", "abs", "k1+", "k3+"):
        x = with_nan(data(generator, device), name, 1 if name != "advantage" else 0)
        value, stats = policy_loss(**x, **options, kl=kl)
        found = torch.autograd.grad(value, (x["logp"], x["entropy"]))
        sick = torch.zeros(N, dtype=torch.bool, device=device)
        sick[slice(0, 4) if spread or name == "advantage" else slice(1, 2)] = True
        assert value.isnan() and stats.tokens == 7
        assert found[0].isnan().equal(sick) and found[1].isnan().equal(sick), kl
        assert all(g[7:].eq(0).all() for g in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_of_what_does_not_count_stays_without_effect(loss, backend, generator):
    """Inactive tokens, terms without a coefficient."""
    options = {"loss": loss, "backend": backend}
    options |= {"norm_length": 7.0} if OF_LOSS[loss][0] == "seq_mean_token_sum_norm" else {}
    x = data(generator, "cpu")
    wanted = torch.autograd.grad(policy_loss(**x, **options)[0], (x["logp"], x["entropy"]))
    sick = x
    for name in ("logp", "old_logp", "ref_logp", "entropy", "is_weight"):
        sick = with_nan(with_nan(sick, name, 7), name, 10)
    found = torch.autograd.grad(policy_loss(**sick, **options)[0], (sick["logp"], sick["entropy"]))
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    x = with_nan(with_nan(x, "ref_logp", 1), "entropy", 1) | {"kl_coef": 0.0, "entropy_coef": 0.0}
    value, stats = policy_loss(**x, **options)
    assert value.isfinite() and stats.kl.isnan() and torch.autograd.grad(value, x["logp"])[0].isfinite().all()


def test_a_target_outside_the_vocabulary_reaches_the_gradients_of_the_head(generator):
    for loss in ("grpo", "gspo", "sapo", "cispo"):
        hidden, weight = (torch.randn(n, 5, generator=generator).requires_grad_() for n in (9, 7))
        target = torch.tensor([0, 9, 2, 3, 4, 5, 6, 0, 1])
        value, _ = ops.linear_policy_loss(hidden, weight, target, torch.ones(3), CU_SEQLENS, loss=loss)
        value.backward()
        assert value.isnan() and hidden.grad[1].isnan().any() and not weight.grad.isfinite().all(), loss


BAD = {
    "the first is not 0": [1, 2], "negative": [-1, 8], "past the tokens": [0, 40], "descending": [0, 2, 1],
    "descending to the end": [0, 9, 4, N], "no sequence, but an offset": [3],
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_offsets_are_nan_everywhere_and_counted(name, backend, device, generator):
    x = data(generator, device)
    x["cu_seqlens"] = torch.tensor(BAD[name], dtype=torch.int32, device=device)
    x["advantage"] = torch.ones(len(BAD[name]) - 1, dtype=torch.float64, device=device)
    ops.bad_values(device)
    value, stats = policy_loss(**x, backend=backend)
    assert ops.bad_values(device) == 1
    assert value.isnan() and torch.stack(stats).isnan().all()
    for gradient in torch.autograd.grad(value, (x["logp"], x["entropy"])):
        assert gradient.isnan().all()
    with torch.no_grad():
        assert policy_loss(**x, backend=backend)[0].isnan() and ops.bad_values(device) == 1
    weights = ops.importance_weights(
        x["old_logp"], x["logp"], x["cu_seqlens"], mode="token_truncate", low=0.5, high=2.0
    )
    assert weights.weight.isnan().all() and weights.effective_sample_size.isnan() and ops.bad_values(device) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [[0, 5], [0, 0, 0], [0], [0, N], [0, 4, 4, 9]])
def test_padding_and_empty_sequences_are_no_bad_offsets(offsets, backend, generator):
    x = data(generator, "cpu") | {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
    x["advantage"] = torch.ones(len(offsets) - 1, dtype=torch.float64)
    ops.bad_values()
    value, stats = policy_loss(**x, backend=backend)
    assert value.isfinite() and ops.bad_values() == 0 and stats.tokens == min(7, offsets[-1])
    assert torch.autograd.grad(value, x["logp"])[0].isfinite().all()


def test_bad_offsets_in_a_compiled_graph_are_counted(generator):
    torch.compiler.reset()
    logp = -torch.rand(5, generator=generator)
    for backend in ("reference", None):
        call = torch.compile(
            lambda cu, backend=backend: policy_loss(logp, torch.ones(1), cu, backend=backend)[0],
            fullgraph=True,
            backend="aot_eager",
        )
        assert call(torch.tensor([0, 5], dtype=torch.int32)).isfinite()
        ops.bad_values()
        assert call(torch.tensor([1, 5], dtype=torch.int32)).isnan() and ops.bad_values() == 1
