"""The compiled kernel against the executable specification, on fresh random inputs and at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_fast.ops import native

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

from prism_fast.ops.native.group_advantage import _operator
from prism_fast.ops.native.group_advantage import run as by_position
from prism_fast.ops.reference.group_advantage import group_advantage as reference
from tests.support.poison import poisoned

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEFAULTS = dict(
    valid=None, gate=None, offset=None, normalize="per_score", eps=1e-6, invalid="below_min", invalid_penalty=0.0,
    singleton="zero", power=1.0, per_score=False,
)  # fmt: skip


def run(**x) -> torch.Tensor:
    return by_position(*(x[name] for name in ("scores", "group", "weights", *DEFAULTS)))


def ragged_groups(sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """Group ids of groups of these sizes in random row order, with ids that leave gaps."""
    rows = sum(sizes)
    ids = torch.randperm(rows, generator=generator)[: len(sizes)]
    group = ids.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    return group[torch.randperm(rows, generator=generator)]


def inputs(sizes, columns, dtype, generator, device="cpu") -> dict:
    rows = sum(sizes)
    floats = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    return dict(
        scores=floats(rows, columns),
        group=ragged_groups(sizes, generator).to(device),
        weights=floats(columns),
        valid=(torch.rand(rows, generator=generator) < 0.7).to(device),
        gate=floats(rows),
        offset=floats(rows),
    )


def both(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = DEFAULTS | arguments
    return run(**arguments), reference(**arguments)


def assert_parity(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    rtol, atol = (1e-12, 1e-12) if got.dtype == torch.float64 else (2e-5, 2e-5)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", ["per_score", "combined", "mean_only", "leave_one_out", "batch"])
def test_parity_over_all_options(normalize, dtype, device, generator):
    sizes = [1, 2, 3, 16, 7, 1, 40]
    for invalid, singleton, power, columns in itertools.product(
        ("below_min", "exclude", "as_is"), ("zero", "identity"), (1.0, 1.5), (1, 3)
    ):
        if power != 1.0 and normalize not in ("per_score", "combined"):
            continue
        options = dict(normalize=normalize, invalid=invalid, singleton=singleton, power=power, eps=1e-3)
        x = inputs(sizes, columns, dtype, generator, device)
        assert_parity(*both(x | options | dict(invalid_penalty=1.5)))
        assert_parity(*both(x | options | dict(valid=None, gate=None, offset=None)))
        if normalize != "combined":
            assert_parity(*both(x | options | dict(per_score=True, offset=None)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes,columns", [([], 2), ([1], 1), ([1, 1, 1], 2), ([600], 2), ([2] * 65, 1), ([5], 0), ([513, 512, 511, 33], 3)]
)
def test_shapes(sizes, columns, device, generator):
    for normalize in ("per_score", "batch", "combined"):
        x = inputs(sizes, columns, torch.float64, generator, device)
        assert_parity(*both(x | dict(normalize=normalize, singleton="identity")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e300])
def test_every_element_is_written_and_the_workspace_is_free(device, poison, generator):
    for normalize, per_score in (("per_score", True), ("batch", False), ("combined", False)):
        x = DEFAULTS | inputs([4, 1, 9, 30], 2, torch.float64, generator, device)
        x |= dict(normalize=normalize, per_score=per_score, offset=None)
        wanted = run(**x)
        run(**x | dict(scores=torch.full_like(x["scores"], poison)))  # the twin's own workspace keeps what was in it
        with poisoned(poison):
            assert run(**x).equal(wanted)
        assert wanted.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_scores_give_exactly_zero(device, dtype, eps, generator):
    x = inputs([5, 3, 8], 2, dtype, generator, device)
    x["scores"][:, 0] = 0.9  # its mean over a group is not exactly 0.9
    x["scores"][:, 1] = x["group"].to(dtype) / 7
    for normalize in ("per_score", "combined", "mean_only", "leave_one_out", "batch"):
        if normalize == "batch" and eps == 0.0:
            x["scores"][:, 0] = x["group"].to(dtype) / 3  # a spread of 0 over the whole batch has no scale without eps
        options = dict(normalize=normalize, eps=eps, valid=None, offset=None, power=1.0)
        assert run(**DEFAULTS | x | options).eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_invalid_rows_stand_one_below_the_lowest_valid_one(device):
    """By hand: scores 3, 5 and an invalid 100 become 3, 5, 2 (mean 10/3, variance 7/3); no valid row: 0."""
    scores = torch.tensor([[3.0], [5.0], [100.0], [8.0], [9.0]], dtype=torch.float64, device=device)
    x = dict(
        scores=scores,
        group=torch.tensor([4, 4, 4, 0, 0], device=device),
        weights=torch.tensor([2.0], dtype=torch.float64, device=device),
        valid=torch.tensor([True, True, False, False, False], device=device),
    )
    got = run(**DEFAULTS | x | dict(eps=0.0, invalid_penalty=1.5))
    std = (7 / 3) ** 0.5
    wanted = [2 * (3 - 10 / 3) / std, 2 * (5 - 10 / 3) / std, 2 * (2 - 10 / 3) / std - 1.5, -1.5, -1.5]
    torch.testing.assert_close(got.cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_unknown_groups_and_bad_scores_are_nan_and_stay_among_themselves(device, generator):
    x = DEFAULTS | inputs([6, 6, 6], 2, torch.float64, generator, device) | dict(valid=None)
    clean = run(**x)
    x["scores"] = x["scores"].clone()
    sick = x["group"][0]
    x["scores"][0, 1] = float("nan")
    got, wanted = both(x)
    assert got.isnan().equal(x["group"] == sick) and got.isnan().equal(wanted.isnan())
    assert got[~got.isnan()].equal(clean[~got.isnan()])
    x["group"] = x["group"].clone()
    x["group"][1:4] = torch.tensor([-1, 18, 2**40], device=device)
    got, wanted = both(x)
    assert got[1:4].isnan().all()
    assert_parity(got, wanted)
    assert_parity(*both(x | dict(normalize="batch", valid=x["gate"] > 0, invalid="exclude")))
    alone = inputs([1, 2], 1, torch.float64, generator, device) | dict(valid=None, singleton="identity")
    alone["scores"] = torch.full_like(alone["scores"], float("nan"))
    for normalize in ("per_score", "mean_only"):
        assert run(**DEFAULTS | alone | dict(normalize=normalize)).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_foreign_dtype_inputs(device, generator):
    x = inputs([4, 5, 6], 6, torch.float64, generator, device)
    x |= dict(scores=x["scores"][:, ::2], weights=x["weights"][::2])
    x |= dict(gate=x["gate"].float(), offset=x["offset"].bfloat16(), valid=x["valid"].repeat_interleave(2)[::2])
    assert_parity(*both(x))
    x["scores"] = x["scores"].t().contiguous().t()
    assert_parity(*both(x))


def test_threads_do_not_change_a_bit(generator):
    x = DEFAULTS | inputs([16] * 256 + [1] * 40, 4, torch.float64, generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(**x))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])
    assert_parity(results[0], reference(**x))


def test_order_of_rows_does_not_matter(generator):
    x = DEFAULTS | inputs([16, 9, 1, 5], 2, torch.float64, generator)
    shuffle = torch.randperm(31, generator=generator)
    moved = {k: v[shuffle] if isinstance(v, torch.Tensor) and k != "weights" else v for k, v in x.items()}
    torch.testing.assert_close(run(**moved), run(**x)[shuffle], rtol=1e-12, atol=1e-12)


def test_operator_registration(generator):
    x = DEFAULTS | inputs([3, 4], 2, torch.float32, generator)
    torch.library.opcheck(_operator, (), x, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks(generator):
    x = DEFAULTS | inputs([3, 4, 9], 2, torch.float64, generator)
    for per_score in (False, True):
        options = x | dict(per_score=per_score, offset=None)
        compiled = torch.compile(lambda o=options: run(**o) * 2, fullgraph=True, backend="aot_eager")
        assert compiled().equal(run(**options) * 2)


def test_no_gradient_flows(generator):
    x = DEFAULTS | inputs([3, 4], 2, torch.float64, generator)
    x["scores"].requires_grad_()
    assert not run(**x).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", ["per_score", "combined", "batch"])
def test_graph_capture_and_no_synchronisation(normalize, generator):
    x = DEFAULTS | inputs([16] * 8 + [3, 1], 2, torch.float32, generator, "cuda") | dict(normalize=normalize)
    run(**x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(**x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(**x)
    for _ in range(3):
        x["scores"].copy_(torch.randn(x["scores"].shape, generator=generator))
        x["group"].copy_(ragged_groups([5] * 26 + [2], generator))
        out.fill_(float("nan"))
        graph.replay()
        assert out.equal(run(**x))
        assert_parity(out, reference(**x))


@pytest.mark.gpu
def test_gpu_is_deterministic_and_agrees_with_the_twin(generator):
    for dtype in (torch.float32, torch.float64):
        x = DEFAULTS | inputs([16] * 100 + [700, 1, 1], 3, dtype, generator)
        on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        first = run(**on_gpu)
        assert all(run(**on_gpu).equal(first) for _ in range(5))
        assert_parity(first.cpu(), run(**x))


@pytest.mark.gpu
def test_gpu_uses_the_current_stream(generator):
    x = DEFAULTS | inputs([16] * 64, 2, torch.float64, generator, "cuda")
    wanted = run(**x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x["scores"] * 2
        got = run(**x | dict(scores=late, normalize="mean_only"))
    stream.synchronize()
    assert got.equal(run(**x | dict(scores=x["scores"] * 2, normalize="mean_only"))) and not got.equal(wanted)
