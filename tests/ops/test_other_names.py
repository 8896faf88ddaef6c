"""Names of losses in other codes are refused with what to write here, and what is written there is true."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops import PolicyLossOptions, group_advantage, policy_loss
from prism_fast.ops.policy_options import ELSEWHERE

CU_SEQLENS = torch.tensor([0, 3, 7, 9, 12], dtype=torch.int32)
OWNER = torch.tensor([0] * 3 + [1] * 4 + [2] * 2 + [3] * 3)
GROUP = torch.tensor([0, 0, 0, 0])


@pytest.fixture
def data(generator):
    logp = -torch.rand(12, generator=generator, dtype=torch.float64) - 0.1
    old = logp + 0.3 * torch.randn(12, generator=generator, dtype=torch.float64)
    reward = torch.randn(4, generator=generator, dtype=torch.float64)
    return logp.requires_grad_(), old, reward


def same_gradient(ours: torch.Tensor, theirs: torch.Tensor, logp: torch.Tensor) -> None:
    found, wanted = (torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs))
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_ppo_and_vanilla(data):
    """Clipped surrogate with an advantage of each token, averaged over all (PPO, arXiv 1707.06347 eq. 7)."""
    logp, old, reward = data
    advantage = reward[OWNER] + torch.linspace(-1, 1, 12, dtype=torch.float64)
    ratio = (logp - old).exp()
    theirs = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    ours, _ = policy_loss(logp, None, CU_SEQLENS, old_logp=old, token_advantage=advantage, aggregation="token_mean")
    torch.testing.assert_close(ours, theirs)
    same_gradient(ours, theirs, logp)


def test_reinforce_and_gpg(data):
    logp, _, reward = data
    ours, _ = policy_loss(logp, reward, CU_SEQLENS, aggregation="token_mean")
    same_gradient(ours, -(reward[OWNER] * logp).mean(), logp)


def test_rloo(data):
    """The baseline is the mean of the other rewards (arXiv 2402.14740)."""
    logp, _, reward = data
    others = (reward.sum() - reward) / 3
    advantage = group_advantage(reward[:, None], GROUP, weights=(1.0,), normalize="leave_one_out")
    torch.testing.assert_close(advantage, reward - others)
    ours, _ = policy_loss(logp, advantage, CU_SEQLENS, aggregation="seq_mean_token_sum")
    theirs = -sum((reward - others)[b] * logp[OWNER == b].sum() for b in range(4)) / 4
    same_gradient(ours, theirs, logp)


def test_reinforce_plus_plus(data):
    """The group's mean is taken off, the batch's deviation divides (REINFORCE++-baseline, arXiv 2501.03262)."""
    logp, old, reward = data
    group = torch.tensor([0, 0, 1, 1])
    centered = reward - torch.stack((reward[:2].mean(), reward[2:].mean()))[group]
    advantage = group_advantage(reward[:, None], group, weights=(1.0,), normalize="batch", eps=0.0)
    torch.testing.assert_close(advantage, centered / reward.std())
    ratio, a = (logp - old).exp(), advantage[OWNER]
    theirs = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    same_gradient(policy_loss(logp, advantage, CU_SEQLENS, old_logp=old, aggregation="token_mean")[0], theirs, logp)


def test_geometric_mean_where_nothing_is_clipped(data):
    """GMPO, arXiv 2507.20673: exp of the mean of clipped log-ratios."""
    logp, old, reward = data
    means = torch.stack([(logp - old)[OWNER == b].clamp(-0.4 * 9, 0.4 * 9).mean() for b in range(4)])
    ours, _ = policy_loss(logp, reward, CU_SEQLENS, old_logp=old, loss="gspo", clip=(0.99, 99.0))
    same_gradient(ours, -(means.exp() * reward).mean(), logp)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_name_says_what_to_write(name):
    with pytest.raises(NotImplementedError, match="policy_loss: loss=.*is not offered: .*use loss='(grpo|gspo)'"):
        PolicyLossOptions(loss=name)
