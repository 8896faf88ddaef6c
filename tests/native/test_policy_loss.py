"""The compiled policy loss against the executable specification, on fresh random inputs and at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_fast.ops import PolicyLossOptions, native, policy_loss
from prism_fast.ops.policy_options import CLIP_OF_LOSS, KL, NAMES
from prism_fast.ops.reference.aggregation import OF_LOSS
from prism_fast.ops.reference.policy_loss import policy_loss as reference

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native import calls
from prism_fast.ops.native.policy_loss import _forms, packed, run
from tests.support.poison import poisoned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAIRS = [(loss, aggregation) for loss in OF_LOSS for aggregation in OF_LOSS[loss]]
LENGTHS = (5, 0, 1, 700, 3, 257, 16)
PADDING = 3
OPTIONS = dict(
    old_logp=None, token_advantage=None, loss="grpo", clip=(0.2, 0.28), delta=None, dual_clip=None,
    sapo_temperature=(1.0, 1.05), aggregation="token_mean", denominator=None, norm_length=None, entropy=None,
    entropy_coef=0.0, ref_logp=None, kl="k3", kl_coef=0.0, is_weight=None, mask=None,
)  # fmt: skip


def batch(generator, lengths=LENGTHS, dtype=torch.float64, device="cpu", padding=PADDING) -> dict:
    """Everything that may be passed; some log-ratios lie on and beyond their clamps, some ratios on the clip bounds."""
    n, b = sum(lengths) + padding, len(lengths)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    old = -noise(n).abs()
    logp = old + 0.4 * noise(n)
    if n > 40:
        logp[10:14] = old[10:14] + torch.tensor([25.0, -25.0, 20.0, -20.0]).to(logp)
        old[14:16], logp[14:16] = 0.0, torch.tensor([0.8, 1.28], dtype=torch.float64).log().to(logp)
    advantage = noise(b)
    if b > 1:
        advantage[0] = 0.0
    return dict(
        logp=logp.requires_grad_(),
        entropy=noise(n).abs().requires_grad_(),
        advantage=advantage,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        old_logp=old,
        ref_logp=old + 0.5 * noise(n),
        is_weight=noise(n).abs(),
        mask=torch.rand(n, generator=generator).to(device) > 0.3,
        entropy_coef=0.05,
        kl_coef=0.3,
    )


def call(function, x: dict) -> tuple:
    """``function`` of tensors, and of an options object made of the rest of ``x``."""
    options = PolicyLossOptions(**{name: value for name, value in x.items() if name in NAMES})
    tensors = {name: value for name, value in x.items() if name not in NAMES}
    leading = [tensors.pop(name) for name in ("logp", "advantage", "cu_seqlens")]
    return function(*leading, options=options, **tensors)


def evaluate(function, data: dict, **options) -> list[torch.Tensor]:
    """Loss, statistics, gradient of logp and of the entropy, under an upstream gradient of 1.7."""
    x = OPTIONS | data | options
    sources = [x["logp"], x["entropy"]]
    loss, stats = call(function, x)
    sources = [s for s in sources if s is not None and s.requires_grad]
    grads = torch.autograd.grad(loss * 1.7, sources, allow_unused=True)
    return [loss.detach(), *stats, *grads]


def assert_parity(found: list, wanted: list) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            exact = theirs.dtype == torch.float64
            rtol, atol = (1e-12, 1e-13) if exact else (3e-5, 1e-5)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def both(data: dict, **options) -> None:
    assert_parity(evaluate(run, data, **options), evaluate(reference, data, **options))


def own(loss: str, aggregation: str) -> dict:
    norm = 40.0 if aggregation == "seq_mean_token_sum_norm" else None
    return dict(loss=loss, aggregation=aggregation, clip=CLIP_OF_LOSS.get(loss), norm_length=norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
def test_parity_over_all_options(loss, aggregation, dtype, device, generator):
    data = batch(generator, dtype=dtype, device=device)
    bounds = ({}, {"dual_clip": 1.5}, {"delta": 2.0}) if loss in ("grpo", "dapo", "dr_grpo", "bnpo") else ({},)
    count = torch.tensor(9, device=device)
    for kl in KL:
        both(data, **own(loss, aggregation), kl=kl, kl_importance=True)
    for bound, on_policy, kl in itertools.product(bounds, (False, True), KL):
        options = own(loss, aggregation) | bound | {"kl": kl} | ({"old_logp": None} if on_policy else {})
        both(data, **options)
        both(data, **options, denominator=7.0) if kl == "k1" else both(data, **(options | {"denominator": count}))
    if loss != "gspo":
        both(data | {"advantage": None, "token_advantage": data["is_weight"] - 0.5}, **own(loss, aggregation))
    for missing in (
        {"mask": None}, {"mask": data["mask"].to(dtype)}, {"is_weight": None}, {"ref_logp": None, "kl_coef": 0.0},
        {"kl_coef": 0.0}, {"entropy_coef": 0.0}, {"entropy": None, "entropy_coef": 0.0},
    ):  # fmt: skip
        both(data | missing, **own(loss, aggregation))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 0, 3), (1,) * 70, (2000,), (4, 4, 4), (256,), (257, 511)])
@pytest.mark.parametrize("padding", [0, 5])
def test_shapes(lengths, padding, device, generator):
    some = (PAIRS[0], PAIRS[5], PAIRS[-1])
    for dtype, (loss, aggregation) in itertools.product((torch.float64, torch.float32), some):
        data = batch(generator, lengths, dtype, device, padding)
        both(data, **own(loss, aggregation))
        both(data | {"mask": torch.zeros_like(data["mask"])}, **own(loss, aggregation))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["logp", "old_logp", "advantage", "ref_logp", "entropy", "is_weight"])
def test_bad_values_come_out_as_in_the_specification(name, device, generator):
    for loss in ("grpo", "gspo", "cispo", "sapo"):
        data = batch(generator, device=device) | {"mask": None}
        value = data[name].detach().clone()
        value[3] = float("nan")
        data[name] = value.requires_grad_(data[name].requires_grad)
        found, wanted = (evaluate(f, data, **own(loss, OF_LOSS[loss][0])) for f in (run, reference))
        assert found[0].isnan()
        assert_parity(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_exactly_on_the_dual_bound_keeps_half_its_gradient(device):
    """As automatic differentiation of a minimum of equal numbers has it."""
    logp = torch.tensor([0.5], dtype=torch.float64, device=device, requires_grad=True)
    x = OPTIONS | dict(
        logp=logp, advantage=-torch.ones(1, device=device), old_logp=torch.zeros(1, dtype=torch.float64, device=device),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
    )  # fmt: skip
    for function in (run, reference):
        ratio = call(function, x)[1].ratio_max.item()
        slopes = [
            torch.autograd.grad(call(function, x | {"dual_clip": bound})[0], logp)[0].item()
            for bound in (ratio * 0.99, ratio, ratio * 1.01)
        ]
        assert slopes == [0.0, ratio / 2, ratio]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e300])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_every_element_is_written_and_the_workspace_is_free(loss, poison, device, generator):
    data, options = batch(generator, device=device), own(loss, OF_LOSS[loss][0])
    wanted = evaluate(run, data, **options)
    sick = {name: torch.full_like(data[name], poison) for name in ("old_logp", "ref_logp", "is_weight")}
    evaluate(run, data | sick, **options)  # the twin's own workspace keeps what was in it
    with poisoned(poison):
        found = evaluate(run, data, **options)
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unaligned_strided_and_foreign_inputs(dtype, device, generator):
    data = batch(generator, dtype=dtype, device=device)
    for shift in (1, 2, 3):
        moved = dict(data)
        for name in ("logp", "old_logp", "ref_logp", "entropy", "is_weight", "mask"):
            whole = torch.cat((data[name].detach()[:shift], data[name].detach()))
            moved[name] = whole[shift:].requires_grad_(data[name].requires_grad)
        assert_parity(evaluate(run, moved), evaluate(run, data))
    spread = data | {name: data[name].detach().repeat_interleave(2)[::2] for name in ("old_logp", "mask", "is_weight")}
    assert_parity(evaluate(run, spread), evaluate(run, data))
    both(data | {"advantage": data["advantage"].bfloat16(), "is_weight": data["is_weight"].half()})
    half = data["logp"].detach().bfloat16().requires_grad_()
    loss, _ = policy_loss(half, data["advantage"], data["cu_seqlens"], backend="native")
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_threads_do_not_change_a_bit(generator):
    data = batch(generator, (300,) * 40 + (7,) * 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(run, data))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(other, results[0], strict=True))


def test_gradients_wanted_and_unwanted(generator):
    data = batch(generator)
    x = OPTIONS | data
    with torch.no_grad():
        quiet, _ = call(run, x)
    loss, stats = call(run, x)
    assert not quiet.requires_grad and torch.equal(quiet, loss) and not any(s.requires_grad for s in stats)
    first = torch.autograd.grad(loss, (data["logp"], data["entropy"]), retain_graph=True)
    again = torch.autograd.grad(loss, (data["logp"], data["entropy"]))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    loss, _ = call(run, x | {"logp": data["logp"].detach()})
    assert torch.autograd.grad(loss, data["entropy"])[0].equal(first[1])
    loss, _ = call(run, x)
    with pytest.raises(NotImplementedError, match="no gradient of its gradient"):  # no silent zeros
        torch.autograd.grad(loss, data["logp"], create_graph=True)


def flat(data: dict, wanted: int = 2) -> tuple:
    return (
        data["logp"], data["entropy"], data["advantage"], data["cu_seqlens"], data["old_logp"], None, data["ref_logp"],
        data["is_weight"], data["mask"], None, None, False, 0.0,
        packed(PolicyLossOptions(clip=(0.2, 0.28), dual_clip=3.0, kl_coef=0.3, entropy_coef=0.05)), wanted,
    )  # fmt: skip


def test_operator_registration(generator):
    data = batch(generator, (3, 0, 4))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forms.operator, flat(data), test_utils=tests)
    x = torch.randn(2, 5, generator=generator)
    torch.library.opcheck(calls._scale_operator, (x, torch.tensor(2.0), torch.tensor([5.0, 3.0]), 1))
    assert calls.scaled(x, torch.tensor(2.0), False, torch.tensor([5.0, 3.0]), 1).equal(x * 6)
    assert calls.scaled(x, torch.tensor(2.0), False, torch.tensor([5.0, 0.5]), 1) is x
    assert calls.scaled(x, torch.tensor(1.0), False, copy=True) is not x


def test_compiles_once_for_all_lengths(generator):
    def step(logp, advantage, cu_seqlens, old_logp, denominator):
        return policy_loss(
            logp, advantage, cu_seqlens, old_logp=old_logp, denominator=denominator, dual_clip=3.0, backend="native"
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(lengths, count):
        data = batch(generator, lengths)
        inputs = (data["logp"], data["advantage"], data["cu_seqlens"], data["old_logp"], torch.tensor(count))
        results = [f(*inputs) for f in (compiled, step)]
        slopes = [torch.autograd.grad(loss, data["logp"])[0] for loss, _ in results]
        assert_parity([results[0][0].detach(), slopes[0]], [results[1][0].detach(), slopes[1]])
        assert_parity(list(results[0][1]), list(results[1][1]))

    check((30, 5), 2.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check((7, 4, 60, 2), 9.0)
        check((100,) * 9, 4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo", "sapo"])
def test_graph_capture_and_no_synchronisation(loss, generator):
    """Forward and backward, replayed on other values and other offsets of the same number."""
    shapes = [(16, 100, 0, 9), (40, 40, 40, 5), (1, 1, 1, 122)]
    static = batch(generator, shapes[0], torch.float32, "cuda")
    options = own(loss, OF_LOSS[loss][0])
    evaluate(run, static, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(run, static, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = evaluate(run, static, **options)
    for lengths in shapes:
        fresh = batch(generator, lengths, torch.float32, "cuda")
        with torch.no_grad():
            for name, value in static.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(fresh[name])
        for x in out:
            x.fill_(float("nan"))
        graph.replay()
        now = evaluate(run, fresh, **options)
        assert all(a.equal(b) for a, b in zip(out, now, strict=True))


@pytest.mark.gpu
def test_gpu_is_deterministic_and_agrees_with_the_twin(generator):
    for dtype in (torch.float32, torch.float64):
        data = batch(generator, (500,) * 300 + (3, 9000), dtype)
        on_gpu = {
            name: x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for name, x in data.items()
        }
        first = evaluate(run, on_gpu)
        for _ in range(5):
            assert all(a.equal(b) for a, b in zip(evaluate(run, on_gpu), first, strict=True))
        assert_parity([x.cpu() for x in first], evaluate(run, data))
