"""The accuracy contract where scores are hostile, for the head and for existing logits, on whatever computes them here.

The kernels have the same cases in tests/kernels/test_linear_logprob.py and tests/native/test_selected_logprob.py.
"""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import linear_logprob, selected_logprob

N, V = 12, 257
KINDS = ("large", "equal", "one_hot", "sure", "very negative", "large norms")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_of(kind: str, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(N, V, generator=generator, dtype=torch.float64)
    return {
        "large": torch.where(noise < 0, -1e4, 1e4),
        "equal": torch.full((N, V), 7.25, dtype=torch.float64),
        "one_hot": torch.zeros(N, V, dtype=torch.float64).scatter_(1, torch.arange(N)[:, None] * 20, 60.0),
        # Probabilities of 1 - 5e-7 and so on down to 1 - 0.003: what is left of 1 - p is most of the gradient.
        "sure": torch.zeros(N, V, dtype=torch.float64).scatter_(
            1, torch.arange(N)[:, None] * 20, torch.linspace(20, 11, N, dtype=torch.float64)[:, None]
        ),
        "very negative": noise - 1e4,
        "large norms": noise * 400,
    }[kind]


def operands(kind: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden, weight whose product is exactly the logits rounded to ``dtype``, or states of large norm."""
    if kind == "large norms":
        hidden, weight = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (N, V))
        hidden, weight = 50 * hidden, weight
    else:
        hidden, weight = logits_of(kind, generator), torch.eye(V, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def check(found, usual, exact, kept, dtype, c) -> None:
    """Maximum error over the kept rows: at most c times eager PyTorch's plus 4 units in the last place."""
    for ours, theirs, truth in zip(found, usual, exact, strict=True):
        size = truth[kept].abs().max()
        error, allowed = ((y.double() - truth)[kept].abs().max() for y in (ours, theirs))
        assert error <= c * allowed + 4 * torch.finfo(dtype).eps * size.clamp(min=1.0), (error, allowed, size)


def eager(logits, target):
    full = torch.log_softmax(logits, -1)
    return full.gather(1, target.clamp(min=0)[:, None])[:, 0], -(full.exp() * full).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_head(save, kind, dtype, generator):
    hidden, weight = operands(kind, dtype, generator)
    target = torch.randint(0, V, (N,), generator=generator)
    target[:3] = (hidden @ weight.t()).detach()[:3].argmax(1)
    target[5] = -100
    kept = target >= 0
    g, h = (torch.randn(N, generator=generator) for _ in range(2))
    g[7] = h[7] = 0.0
    found = linear_logprob(hidden, weight, target, entropy=True, save=save)
    assert (found.logp <= 0).all() and (found.entropy >= -1e-5).all()
    gradients = torch.autograd.grad((found.logp * g + found.entropy * h).sum(), (hidden, weight))
    assert not gradients[0][[5, 7]].any() and all(x.isfinite().all() for x in gradients)

    def by_autograd(x, w):
        values = eager(x @ w.t(), target)
        total = (values[0] * g.to(x.dtype))[kept].sum() + (values[1] * h.to(x.dtype))[kept].sum()
        return values, torch.autograd.grad(total, (x, w))

    exact, slopes = by_autograd(*(x.detach().double().requires_grad_() for x in (hidden, weight)))
    usual, usual_slopes = by_autograd(hidden, weight)
    check(found, usual, exact, kept, torch.float32, 2.0 if dtype == torch.float32 else 1.0)
    check(gradients[:1], [x.nan_to_num(0.0) for x in usual_slopes[:1]], slopes[:1], kept, dtype, 2.0)
    everything = torch.ones(V, dtype=torch.bool)
    check(gradients[1:], [x.nan_to_num(0.0) for x in usual_slopes[1:]], slopes[1:], everything, dtype, 2.0)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one(kind, backend, generator):
    """Every token of the vocabulary as a target of one and the same row; V = 4096 for the widest."""
    row = logits_of(kind, generator).float()[0]
    if kind == "large norms":
        row = 20 * torch.randn(4096, generator=generator)
    tokens = torch.arange(len(row))
    rows = row.expand(len(row), -1)
    for logp in (
        selected_logprob(rows, tokens, backend=backend).logp,
        linear_logprob(torch.ones(len(row), 1), row[:, None].contiguous(), tokens).logp,
    ):
        assert (logp <= 0).all() and abs(logp.double().exp().sum().item() - 1.0) < 1e-6


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_soft_cap_where_the_targets_exponential_underflows(save, dtype, entropy, generator):
    """Scores at both ends of the cap, so far apart that exp(z - max) is 0, and a slope there that is not."""
    hidden = torch.randn(N, 16, generator=generator, dtype=torch.float64)
    hidden[:, 0] = torch.linspace(5, 12, N, dtype=torch.float64)
    weight = torch.randn(V, 16, generator=generator, dtype=torch.float64) * 0.1
    weight[:, 0] = torch.where(torch.arange(V) % 3 == 0, 8.0, -8.0)
    target, temperature = torch.arange(N), torch.linspace(0.02, 0.6, N, dtype=torch.float64)
    g, h = torch.randn(2, N, generator=generator, dtype=torch.float64)

    def by_autograd(x, w):
        values = eager(30 * torch.tanh(x @ w.t() / 30) / temperature.to(x.dtype)[:, None], target)
        return torch.autograd.grad((values[0] * g + entropy * values[1] * h).sum(), (x, w))

    operands = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    found = linear_logprob(*operands, target, softcap=30.0, temperature=temperature, entropy=entropy, save=save)
    total = (found.logp * g).sum() + ((found.entropy * h).sum() if entropy else 0.0)
    ours = torch.autograd.grad(total, operands)
    exact = by_autograd(*(x.detach().double().requires_grad_() for x in operands))
    usual = by_autograd(*operands)
    assert found.logp.min() < -700
    for a, b, truth in zip(ours, usual, exact, strict=True):
        for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            allowed = 2 * size(b.double() - truth) + (1e-11 if dtype == torch.float64 else 5e-7) * size(truth)
            assert size(a.double() - truth) <= allowed, (size(a.double() - truth), allowed)


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_a_banned_token_stays_banned_under_a_soft_cap(save, generator):
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64).requires_grad_() for n in (N, V))
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    banned = torch.arange(V) % 5 == 0
    bias[banned] = -torch.inf
    bias.requires_grad_()
    target = torch.arange(N) * 5 + 1
    found = linear_logprob(hidden, weight, target, bias=bias, softcap=3.0, entropy=True, save=save)
    z = 3.0 * torch.tanh((hidden @ weight[~banned].t() + bias[~banned]) / 3.0)
    wanted = eager(z, (~banned).cumsum(0)[target] - 1)
    torch.testing.assert_close(tuple(found), wanted)
    leaves = (hidden, weight, bias)
    ours, theirs = (torch.autograd.grad((x[0] - x[1]).sum(), leaves) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert not ours[1][banned].any() and not ours[2][banned].any()
