"""linear_logprob by the Triton kernels: accuracy relative to eager PyTorch, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob
from tests.kernels.logprob_cases import DTYPES, check, inputs, small_tiles, upstream  # noqa: F401
from tests.support.triton_device import DEVICE


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_contract(dtype, save, generator):
    *operands, target = inputs(generator, dtype=dtype)
    g, h = upstream(generator, 70)
    check(operands, target, g, h, save=save)
    check(operands, target, g, h, save=save, entropy=False)


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_softcap_and_temperature_per_row(dtype, save, generator):
    *operands, target = inputs(generator, n=65, vocabulary=67, width=32, dtype=dtype, bias=True)
    target[5] = -100
    g, h = upstream(generator, 65)
    temperature = torch.rand(65, generator=generator).to(DEVICE) + 0.5
    check(operands, target, g, h, save=save, temperature=temperature, softcap=3.0)
    check(operands, target, g, h, save=save, temperature=0.7)


@pytest.mark.parametrize("save", ["logits", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_tokens_have_probability_zero(dtype, save, generator):
    """As the trainer bans tokens: a bias of -inf, here on whole tiles too, the first and the last among them."""
    vocabulary = 300
    banned = torch.cat([torch.arange(0, 130), torch.tensor([150]), torch.arange(170, 300)])
    hidden, weight, _, target = inputs(generator, n=33, vocabulary=vocabulary, width=32, dtype=dtype, bias=True)
    bias = torch.zeros(vocabulary).index_fill(0, banned, -torch.inf).to(DEVICE, dtype).requires_grad_()
    target = 151 + target % 19
    g, _ = upstream(generator, 33)
    check((hidden, weight, bias), target, g, g, save=save, entropy=False)
    found = linear_logprob(hidden, weight, target, bias=bias, save=save, backend="triton")
    for grad in torch.autograd.grad(found.logp.sum(), (weight, bias)):
        assert not grad[banned.to(DEVICE)].any(), "what is banned gets no gradient"


@pytest.mark.parametrize("n,vocabulary", [(1, 1), (1, 150), (3, 17), (64, 64), (65, 129)])
def test_ragged_and_tiny_shapes(n, vocabulary, generator):
    *operands, target = inputs(generator, n=n, vocabulary=vocabulary, width=16)
    check(operands, target, *upstream(generator, n), temperature=torch.tensor(1.3, device=DEVICE))


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_no_rows(save):
    hidden = torch.zeros((0, 16), device=DEVICE, requires_grad=True)
    weight = torch.randn((40, 16), device=DEVICE, requires_grad=True)
    found = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), entropy=True, save=save,
                           backend="triton")  # fmt: skip
    assert found.logp.shape == found.entropy.shape == (0,)
    (found.logp.sum() + found.entropy.sum()).backward()
    assert hidden.grad.shape == (0, 16) and torch.equal(weight.grad, torch.zeros_like(weight))


def scored(logits, dtype=torch.float32):
    """hidden [N, V'] = logits, weight = identity: the op sees exactly these logits."""
    n, vocabulary = logits.shape
    width = -(-vocabulary // 16) * 16
    hidden = torch.zeros((n, width), dtype=dtype, device=DEVICE)
    hidden[:, :vocabulary] = logits
    return hidden.requires_grad_(), torch.eye(vocabulary, width, dtype=dtype, device=DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large", "equal", "one_hot", "sure", "very_negative", "wide"])
def test_adversarial_logits(kind, dtype, generator):
    n, vocabulary = 9, 130
    logits = {
        "large": torch.where(torch.rand(n, vocabulary, generator=generator) < 0.5, 1e4, -1e4),
        "equal": torch.full((n, vocabulary), 123.0),
        "one_hot": torch.zeros(n, vocabulary).scatter_(1, torch.arange(n)[:, None] * 14, 50.0),
        "sure": torch.zeros(n, vocabulary).scatter_(
            1, torch.arange(n)[:, None] * 14, torch.linspace(20, 11, n)[:, None]
        ),
        "very_negative": -3e4 + torch.randn(n, vocabulary, generator=generator) * 64,
        "wide": torch.randn(n, vocabulary, generator=generator) * 300,
    }[kind].to(dtype)
    operands = (*scored(logits.to(DEVICE)), None)
    operands = tuple(None if x is None else x.detach().to(dtype).requires_grad_() for x in operands)
    target = torch.randint(0, vocabulary, (n,), generator=generator).to(DEVICE)
    target[:4] = logits[:4].float().argmax(1).to(DEVICE)
    check(operands, target, *upstream(generator, n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_sum_to_one(dtype, generator):
    vocabulary = 320
    hidden = (torch.randn(1, 32, generator=generator) * 3).to(dtype).to(DEVICE).expand(vocabulary, 32).contiguous()
    weight = torch.randn(vocabulary, 32, generator=generator).to(dtype).to(DEVICE)
    found = linear_logprob(hidden, weight, torch.arange(vocabulary, device=DEVICE), backend="triton")
    assert abs(found.logp.double().exp().sum().item() - 1.0) < 1e-6
