"""group_advantage against a loop over groups, and the rules of its contract."""

from __future__ import annotations

import math

import pytest
import torch

from prism_fast.ops import available, group_advantage

BACKENDS = available()["group_advantage"]
MODES = ("per_score", "combined", "mean_only", "leave_one_out", "batch")


def by_loop(scores, group, weights, valid, normalize, eps, invalid, singleton, power) -> torch.Tensor:
    """[B] weighted sum of normalised scores, in Python numbers."""
    rows, columns = scores.shape
    x = [[float(v) for v in row] for row in scores.double()]
    usable = [True] * rows
    members = {g: [b for b in range(rows) if int(group[b]) == g] for g in group.tolist()}
    for g in members.values():
        good = [b for b in g if valid[b]]
        for b in g:
            if not valid[b] and invalid == "below_min":
                x[b] = [min((x[c][k] for c in good), default=0.0) - 1.0 for k in range(columns)]
            usable[b] = bool(valid[b]) or invalid != "exclude"
    if normalize == "combined":
        x = [[sum(w * v for w, v in zip(weights, row, strict=True))] for row in x]

    def std(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    whole = [std([x[c][k] for c in range(rows) if usable[c]]) for k in range(len(x[0]))]
    out = []
    for b in range(rows):
        total = 0.0
        for k in range(len(x[0])):
            if not usable[b]:
                continue
            peers = [c for c in members[int(group[b])] if usable[c]]

            def normal(values: list[float], own: float, batch_std: float = whole[k]) -> float:
                mean = sum(values) / len(values)
                if normalize == "mean_only":
                    return own - mean
                if normalize == "leave_one_out":
                    return (own - mean) * len(values) / (len(values) - 1)
                if normalize == "batch":
                    return (own - mean) / (batch_std + eps)
                return (own - mean) / (std(values) + eps)

            values = [x[c][k] for c in peers]
            if len(peers) == 1:
                z = 0.0
                if singleton == "identity":
                    z = x[b][k]
                    if normalize in ("per_score", "combined"):
                        z /= 1.0 + eps
                    if normalize == "batch":
                        z /= whole[k] + eps
            else:
                z = normal(values, x[b][k])
                if power != 1.0:
                    shaped = [math.copysign(abs(normal(values, v)) ** power, normal(values, v)) for v in values]
                    z = normal(shaped, shaped[peers.index(b)])
            total += z if normalize == "combined" else weights[k] * z
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("singleton", ["zero", "identity"])
@pytest.mark.parametrize("invalid", ["below_min", "exclude", "as_is"])
@pytest.mark.parametrize("normalize", MODES)
def test_equals_the_loop(backend, normalize, invalid, singleton, generator):
    rows, columns = 23, 3
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3
    group = torch.randint(0, 9, (rows,), generator=generator) * 2  # gaps, any order, some alone
    group[0], group[1:3] = 21, 20
    valid = torch.rand(rows, generator=generator) > 0.3
    valid[1:3] = False  # a group without a valid response
    weights = [0.5, 0.3, -0.7]
    for power in (1.0, 1.5) if normalize in ("per_score", "combined") else (1.0,):
        found = group_advantage(
            scores,
            group,
            weights=weights,
            valid=valid,
            normalize=normalize,
            invalid=invalid,
            singleton=singleton,
            power=power,
            eps=1e-3,
            backend=backend,
        )
        wanted = by_loop(scores, group, weights, valid, normalize, 1e-3, invalid, singleton, power)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_offset_and_penalty(backend, generator):
    rows = 12
    scores = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    group = torch.arange(rows) % 3
    valid = torch.rand(rows, generator=generator) > 0.4
    gate, offset = (torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(2))
    common = {"weights": [0.2, 0.8], "valid": valid, "backend": backend}
    plain = group_advantage(scores, group, **common)
    full = group_advantage(scores, group, gate=gate, offset=offset, invalid_penalty=1.5, **common)
    torch.testing.assert_close(full, gate * plain + offset - 1.5 * (~valid), rtol=1e-12, atol=1e-12)
    parts = group_advantage(scores, group, gate=gate, per_score=True, **common)
    assert parts.shape == (rows, 2)
    torch.testing.assert_close(parts.sum(1), gate * plain, rtol=1e-12, atol=1e-12)
    alone = [group_advantage(scores[:, k : k + 1], group, weights=[1.0], valid=valid, backend=backend) for k in (0, 1)]
    torch.testing.assert_close(parts, gate[:, None] * torch.stack([0.2 * alone[0], 0.8 * alone[1]], 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", MODES)
def test_equal_scores_give_exactly_zero(backend, normalize):
    # In float32 the mean of 0.9s is not 0.9 for most sizes, and a standard deviation of rounding noise passes eps.
    for size in (*range(2, 40), 64, 100, 333):
        for value in (0.9, 0.1 + 0.2, -1e-7, 1e7 / 3, 0.0):
            scores = torch.full((size + 3, 2), value, dtype=torch.float32)
            scores[size:] = torch.tensor([[1.0], [2.0], [4.0]])
            group = torch.tensor([0] * size + [1] * 3)
            found = group_advantage(scores, group, weights=[1.0, 0.5], normalize=normalize, backend=backend)
            assert torch.equal(found[:size], torch.zeros(size)), (size, value)
            assert (found[size:] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_stay_zero_with_power_eps_zero_and_invalid_rows(backend):
    scores = torch.full((6, 1), 0.9)
    group = torch.zeros(6, dtype=torch.int64)
    common = {"weights": [1.0], "backend": backend}
    assert torch.equal(group_advantage(scores, group, power=1.5, **common), torch.zeros(6))
    assert torch.equal(group_advantage(scores, group, eps=0.0, **common), torch.zeros(6))
    nobody = torch.zeros(6, dtype=torch.bool)
    assert torch.equal(group_advantage(scores, group, valid=nobody, **common), torch.zeros(6))
    penalised = group_advantage(scores, group, valid=nobody, invalid_penalty=1.5, **common)
    assert torch.equal(penalised, torch.full((6,), -1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_and_order_do_not_matter(backend, generator):
    rows = 40
    scores = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    group = torch.randint(0, 7, (rows,), generator=generator)
    valid = torch.rand(rows, generator=generator) > 0.2
    options = {"weights": [0.5, 0.5], "invalid_penalty": 1.0, "backend": backend}
    base = group_advantage(scores, group, valid=valid, **options)
    order = torch.randperm(rows, generator=generator)
    names = torch.randperm(rows, generator=generator)
    moved = group_advantage(scores[order], names[group[order]], valid=valid[order], **options)
    torch.testing.assert_close(moved, base[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(group_advantage(scores, group.int(), valid=valid, **options), base, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_ids_show_as_nan_and_touch_nobody_else(backend):
    scores = torch.tensor([[1.0], [2.0], [3.0], [100.0], [-100.0]])
    group = torch.tensor([0, 0, 0, 5, -1])
    found = group_advantage(scores, group, weights=[1.0], backend=backend)
    torch.testing.assert_close(found[:3], torch.tensor([-1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    assert found[3:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_score_poisons_its_group_only(backend):
    scores = torch.tensor([[1.0], [math.nan], [1.0], [2.0]])
    found = group_advantage(scores, torch.tensor([0, 0, 1, 1]), weights=[1.0], backend=backend)
    assert found[:2].isnan().all() and found[2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_shapes(backend):
    empty = torch.zeros(0, dtype=torch.int64)
    assert group_advantage(torch.zeros(0, 2), empty, weights=[1.0, 1.0], backend=backend).shape == (0,)
    assert group_advantage(torch.zeros(0, 2), empty, weights=[1.0, 1.0], per_score=True, backend=backend).shape == (
        0,
        2,
    )
    one = torch.zeros(1, dtype=torch.int64)
    assert group_advantage(torch.ones(1, 1), one, weights=[1.0], backend=backend).tolist() == [0.0]
    alone = group_advantage(torch.full((1, 1), 3.0), one, weights=[2.0], singleton="identity", eps=0.5, backend=backend)
    assert alone.tolist() == [4.0]


def test_half_precision_is_computed_in_float32(generator):
    scores = torch.randn(16, 2, generator=generator)
    group = torch.arange(16) % 4
    for backend in BACKENDS:
        low = group_advantage(scores.bfloat16(), group, weights=[0.3, 0.7], backend=backend)
        lifted = group_advantage(scores.bfloat16().float(), group, weights=[0.3, 0.7], backend=backend)
        assert low.dtype == torch.float32 and torch.equal(low, lifted)


def test_no_gradient_flows():
    scores = torch.randn(4, 1, requires_grad=True)
    assert not group_advantage(scores, torch.zeros(4, dtype=torch.int64), weights=[1.0]).requires_grad


REFUSALS = {
    "scores must have shape": {"scores": torch.zeros(4, 1, 1)},
    "scores must be float32": {"scores": torch.zeros(4, 1, dtype=torch.int64)},
    r"group must have shape \[4\], got \[3\]": {"group": torch.zeros(3, dtype=torch.int64)},
    "group must be int64, int32, got float32": {"group": torch.zeros(4)},
    "valid must be bool": {"valid": torch.ones(4)},
    "gate must have shape": {"gate": torch.ones(3)},
    "offset must have shape": {"offset": torch.ones(4, 1)},
    r"weights must have shape \[1\]": {"weights": [1.0, 2.0]},
    "normalize='std' is not one of 'per_score'": {"normalize": "std"},
    "invalid='drop' is not one of": {"invalid": "drop"},
    "singleton='one' is not one of": {"singleton": "one"},
    "eps=-1.0 must be finite": {"eps": -1.0},
    "power=0.0 must be finite": {"power": 0.0},
    "power=1.5 shapes z-scores": {"power": 1.5, "normalize": "mean_only"},
    "per_score=True needs one term": {"per_score": True, "normalize": "combined"},
    "offset and invalid_penalty belong to the sum": {"per_score": True, "invalid_penalty": 1.0},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    arguments = {"scores": torch.zeros(4, 1), "group": torch.zeros(4, dtype=torch.int64), "weights": [1.0]}
    with pytest.raises(ValueError, match=f"group_advantage: {message}"):
        group_advantage(**(arguments | REFUSALS[message]))
