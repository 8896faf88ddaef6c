"""Padded rows [B, T] with a mask, and rewards as a matrix [P, n], give what packed rows and ids give."""

from __future__ import annotations

import sys

import pytest
import torch

from prism_fast.ops import group_advantage, native, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES, OF_LOSS

BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
LENGTHS = torch.tensor([5, 0, 7, 1])
B, T = len(LENGTHS), 7
MASK = torch.arange(T) < LENGTHS[:, None]
CU_SEQLENS = torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32)
COLUMNS = ("logp", "old_logp", "ref_logp", "entropy", "is_weight")


def padded(generator, dtype=torch.float64) -> dict:
    """Padding holds NaN, which must not matter."""

    def rows() -> torch.Tensor:
        return torch.where(MASK, -torch.rand(B, T, generator=generator, dtype=dtype), torch.nan)

    data = {name: rows() for name in COLUMNS}
    data["logp"].requires_grad_(), data["entropy"].requires_grad_()
    advantage = torch.randn(B, generator=generator, dtype=dtype)
    return data | {"advantage": advantage, "kl_coef": 0.2, "entropy_coef": 0.1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_padded_rows_equal_packed_ones(loss, kind, backend, generator):
    data = padded(generator)
    options = {"loss": loss, "backend": backend, "kl_importance": True}
    options |= {"norm_length": 7.0} if OF_LOSS[loss][0] == "seq_mean_token_sum_norm" else {}
    packed = data | {name: data[name][MASK] for name in COLUMNS} | {"cu_seqlens": CU_SEQLENS}
    found, wanted = policy_loss(**data, mask=MASK.to(kind), **options), policy_loss(**packed, **options)
    sources = (data["logp"], data["entropy"])
    gradients = [torch.autograd.grad(x[0], sources) for x in (found, wanted)]
    for ours, theirs in zip((found[0], *found[1], *gradients[0]), (wanted[0], *wanted[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    assert all(g[~MASK].eq(0).all() for g in gradients[0])
    if loss != "gspo":
        by_token = data | {"advantage": None, "token_advantage": data["advantage"][:, None].expand(B, T)}
        torch.testing.assert_close(policy_loss(**by_token, mask=MASK, **options)[0], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_no_rows_and_no_tokens(shape, backend):
    logp = torch.zeros(shape, requires_grad=True)
    loss, stats = policy_loss(logp, torch.ones(shape[0]), backend=backend)  # no mask: every token counts
    loss.backward()
    assert stats.tokens == logp.numel() and logp.grad.shape == logp.shape
    assert loss.item() == (-1.0 if logp.numel() else 0.0)


def test_padded_rows_are_not_copied(monkeypatch):
    """The kernels read the rows where they are."""
    seen = []
    module = sys.modules[policy_loss.__module__]
    monkeypatch.setattr(module, "reference", lambda logp, *_, **x: seen.extend((logp, x["old_logp"])))
    given = [torch.zeros(2, 3), torch.ones(2, 3)]
    policy_loss(given[0], torch.ones(2), old_logp=given[1], backend="reference")
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in given]


def test_layouts_that_do_not_fit_are_refused():
    logp, advantage = torch.zeros(2, 3), torch.zeros(2)
    for message, arguments in {
        "or .N. with cu_seqlens, which is None": {"logp": torch.zeros(3)},
        "cu_seqlens must be None": {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
        r"mask must have shape \[2, 3\], got \[6\]": {"mask": torch.ones(6)},
        r"old_logp must have shape \[2, 3\]": {"old_logp": torch.zeros(6)},
        r"advantage must have shape \[2\], got \[2, 3\]": {"advantage": torch.zeros(2, 3)},
    }.items():
        with pytest.raises(ValueError, match=f"policy_loss: .*{message}"):
            policy_loss(**({"logp": logp, "advantage": advantage} | arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_of_rewards_is_groups_of_its_rows(backend, generator):
    """Rows of the matrix as TRL orders its rewards; ids as from verl's uid."""
    rewards = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    found = group_advantage(rewards, eps=1e-4, backend=backend)
    torch.testing.assert_close(found, (rewards - mean) / (std + 1e-4))
    flat = group_advantage(rewards.view(-1), torch.arange(12) // 4, eps=1e-4, backend=backend)
    assert torch.equal(flat, found.view(-1))
    scores = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    valid, gate = torch.rand(3, 4, generator=generator) > 0.3, torch.rand(3, 4, generator=generator)
    options = dict(weights=(0.3, 0.7), invalid_penalty=0.5, backend=backend)
    found = group_advantage(scores, valid=valid, gate=gate, offset=gate * 2, **options)
    flat = group_advantage(
        scores.view(12, 2), torch.arange(12) // 4, valid=valid.view(-1), gate=gate.view(-1), offset=gate.view(-1) * 2,
        **options,
    )  # fmt: skip
    assert found.shape == (3, 4) and torch.equal(found.view(-1), flat)
    terms = group_advantage(scores, weights=(0.3, 0.7), per_score=True, backend=backend)
    assert terms.shape == (3, 4, 2)
    for shape in ((0, 4), (3, 0), (2, 1)):
        assert group_advantage(torch.ones(shape), backend=backend).equal(torch.zeros(shape))


def test_matrices_that_do_not_fit_are_refused():
    for message, arguments in {
        r"scores must have shape \[any, any, any\], got \[4\]": {"scores": torch.zeros(4)},
        r"valid must have shape \[3, 4\]": {"valid": torch.ones(12, dtype=torch.bool)},
        r"weights must have shape \[1\], got \[2\]": {"weights": (0.5, 0.5)},  # ids forgotten
        "weights must be a tensor or a sequence of 2 numbers": {"scores": torch.zeros(3, 4, 2)},
    }.items():
        with pytest.raises(ValueError, match=f"group_advantage: {message}"):
            group_advantage(**({"scores": torch.zeros(3, 4)} | arguments))
