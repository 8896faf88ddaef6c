"""linear_policy_loss is the composition of its two parts, gradients and statistics included."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import linear_logprob, linear_policy_loss, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_composition(loss, with_entropy, generator):
    lengths = [4, 0, 3, 5]
    n, width, vocabulary = sum(lengths), 6, 19
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (noise(*s).requires_grad_() for s in ((n, width), (vocabulary, width), (vocabulary,)))
    target = torch.randint(0, vocabulary, (n,), generator=generator)
    target[2] = -100
    mask = torch.rand(n, generator=generator) > 0.2
    advantage, old_logp, ref_logp = noise(4), noise(n), noise(n)
    options = {
        "loss": loss,
        "ref_logp": ref_logp,
        "old_logp": old_logp,
        "kl_coef": 0.1,
        "entropy_coef": 0.05 if with_entropy else 0.0,
        "norm_length": 10.0 if loss == "dr_grpo" else None,
    }
    found, stats = linear_policy_loss(
        hidden,
        weight,
        target,
        advantage,
        cu_seqlens,
        bias=bias,
        temperature=0.7,
        softcap=5.0,
        mask=mask,
        **options,
    )
    parts = linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, softcap=5.0, entropy=True)
    wanted, wanted_stats = policy_loss(
        parts.logp,
        advantage,
        cu_seqlens,
        entropy=parts.entropy if with_entropy else None,
        mask=mask & (target >= 0),
        **options,
    )
    assert torch.equal(found, wanted)
    torch.testing.assert_close(torch.stack(stats), torch.stack(wanted_stats), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        torch.autograd.grad(found, (hidden, weight, bias)),
        torch.autograd.grad(wanted, (hidden, weight, bias)),
        rtol=1e-12,
        atol=1e-15,
    )


def test_weight_grad_out_entropy_report_and_no_kept_scores(generator):
    hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, requires_grad=True)
    target = torch.randint(0, 11, (5,), generator=generator)
    cu_seqlens, advantage = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1.0, -1.0])
    bank = torch.zeros(11, 4)
    loss, stats = linear_policy_loss(
        hidden, weight, target, advantage, cu_seqlens, weight_grad_out=bank, entropy=True, loss="gspo"
    )
    assert stats.entropy > 0
    loss.backward(retain_graph=True)
    assert weight.grad is None and bank.abs().sum() > 0
    loss.backward()  # nothing was kept that a first backward could use up


def test_refusals_of_its_parts_come_through():
    arguments = (torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(1))
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="loss='dapo' with aggregation"):
        linear_policy_loss(*arguments, cu_seqlens, loss="dapo", aggregation="seq_mean_token_mean")
    with pytest.raises(ValueError, match=r"mask must have shape \[3\]"):
        linear_policy_loss(*arguments, cu_seqlens, mask=torch.ones(4))
    with pytest.raises(ValueError, match="linear_policy_loss: backend='native', but this op has only 'reference'"):
        linear_policy_loss(*arguments, cu_seqlens, backend="native")
