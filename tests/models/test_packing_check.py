from __future__ import annotations

import copy

import pytest
import torch

from prism_fast.models import shared_prefix
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.packing import PromptGroup
from prism_fast.models.packing_check import TOLERANCE, PackingError, check_packing
from prism_fast.models.shared_prefix import use_shared_prefix


@pytest.fixture
def groups(make_prompt, make_rows):
    rows = make_rows([6, 3, 1, 5])
    return [
        PromptGroup(make_prompt((128, 32)), [*rows[:2], None, []]),
        PromptGroup(make_prompt(), rows[2:]),
        PromptGroup(make_prompt((32, 32)), [None]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_rounding_stays_far_below_the_tolerance_and_nothing_is_left_behind(policy, processor, groups, dtype, sparse):
    backbone = build_discriminator(policy, seed=3).backbone if sparse else copy.deepcopy(policy).model
    backbone.to(dtype)
    use_shared_prefix(backbone)
    for budget in (1000, 40):
        found = check_packing(backbone, groups, budget=budget, pad_id=processor.pad_id)
        assert all(0 < error < TOLERANCE[dtype] / 2 for error in found), found
    assert not [name for name, p in backbone.named_parameters() if p.grad is not None]


def test_a_frozen_model_and_nothing_to_compare(policy, processor, groups):
    backbone = copy.deepcopy(policy).model.requires_grad_(False)
    use_shared_prefix(backbone)
    found = check_packing(backbone, groups, budget=1000, pad_id=processor.pad_id)
    assert found.hidden < 1e-5 and found.gradient != found.gradient
    check_packing(backbone, groups[2:], budget=1000, pad_id=processor.pad_id)


def test_branches_that_see_each_other_are_noticed(policy, processor, groups, monkeypatch):
    backbone = copy.deepcopy(policy).model
    use_shared_prefix(backbone)
    right = shared_prefix.ops.shared_prefix_attention

    def one_sequence(q, k, v, layout, *, scale):
        cu = torch.stack((layout.cu_branch[0], layout.cu_branch[-1]))
        return right(q, k, v, layout._replace(cu_branch=cu, branch_prefix=layout.branch_prefix[:1]), scale=scale)

    monkeypatch.setattr(shared_prefix.ops, "shared_prefix_attention", one_sequence)
    with pytest.raises(PackingError, match=r"relative difference of the hidden .* allowed 1e-04 for torch.float32"):
        check_packing(backbone, groups, budget=1000, pad_id=processor.pad_id)


def test_a_wrong_gradient_is_noticed(policy, processor, groups, monkeypatch):
    backbone = copy.deepcopy(policy).model
    use_shared_prefix(backbone)
    right = shared_prefix.ops.shared_prefix_attention

    def forgets_keys(q, k, v, layout, *, scale):
        return right(q, k.detach(), v, layout, scale=scale)

    monkeypatch.setattr(shared_prefix.ops, "shared_prefix_attention", forgets_keys)
    with pytest.raises(PackingError, match="of the gradient"):
        check_packing(backbone, groups, budget=1000, pad_id=processor.pad_id)
