"""Whatever is put in the place of an argument, the refusal names op, argument and what is allowed."""

from __future__ import annotations

import pytest
import torch

from prism_fast import ops

CU_SEQLENS = torch.tensor([0, 3], dtype=torch.int32)
ROWS = dict(logp=torch.zeros(3), advantage=torch.zeros(1), cu_seqlens=CU_SEQLENS)
WRONG = {"None": None, "a number": 1.5, "a shape": torch.zeros(2, 3, 4), "a list": [0.5, 0.5, 0.5, 0.5], "text": "x"}
CALLS = {
    "policy_loss": dict(
        **ROWS, old_logp=torch.zeros(3), entropy=torch.zeros(3), ref_logp=torch.zeros(3), is_weight=torch.ones(3),
        mask=torch.ones(3), denominator=3.0, loss="grpo", clip=(0.1, 0.1), dual_clip=3.0, sapo_temperature=(1.0, 1.0),
        aggregation="token_mean", entropy_coef=0.1, kl="k3", kl_coef=0.1, kl_importance=True,
    ),
    "group_advantage": dict(
        scores=torch.zeros(4, 2), group=torch.zeros(4, dtype=torch.int64), weights=[0.5, 0.5],
        valid=torch.ones(4, dtype=torch.bool), gate=torch.ones(4), offset=torch.zeros(4),
        normalize="per_score", eps=0.1, invalid="exclude", invalid_penalty=0.5, singleton="zero", power=1.0,
        per_score=False,
    ),
    "pairwise_loss": dict(
        teacher=torch.zeros(2, 2), student=torch.zeros(4, 2), group=torch.zeros(4, dtype=torch.int64),
        valid=torch.ones(4, dtype=torch.bool), clip=1.0, lengths=(torch.ones(2, 2), torch.ones(4, 2)),
        length_penalty=0.1, l2=0.1, spread=0.1, denominator=3.0, l2_denominator=torch.tensor(5),
    ),
    "importance_weights": dict(
        rollout_logp=torch.zeros(3), logp=torch.zeros(3), cu_seqlens=CU_SEQLENS, mode="token_mask", low=0.5, high=2.0
    ),
    "selected_logprob": dict(
        logits=torch.zeros(4, 5), target=torch.zeros(4, dtype=torch.int64), temperature=0.5, entropy=True,
        ignore_index=-1,
    ),
}  # fmt: skip
OPTIONAL = {  # None is a value of these
    "policy_loss": {"old_logp", "is_weight", "mask", "denominator", "clip", "dual_clip", "aggregation"},
    "group_advantage": {"valid", "gate", "offset"},
    "pairwise_loss": {"valid", "clip", "denominator", "l2_denominator"},
}
ALLOWED = ("must", "not one of", "allows", "needs", "exactly one", "has")
RIGHT = {  # (op, argument): wrong values that are right
    ("policy_loss", "denominator"): {"a number"}, ("policy_loss", "dual_clip"): {"a number"},
    ("policy_loss", "entropy_coef"): {"a number"}, ("policy_loss", "kl_coef"): {"a number"},
    ("group_advantage", "eps"): {"a number"}, ("group_advantage", "power"): {"a number"},
    ("group_advantage", "invalid_penalty"): {"a number"}, ("pairwise_loss", "clip"): {"a number"},
    ("pairwise_loss", "length_penalty"): {"a number"}, ("pairwise_loss", "l2"): {"a number"},
    ("pairwise_loss", "spread"): {"a number"}, ("pairwise_loss", "denominator"): {"a number"},
    ("pairwise_loss", "l2_denominator"): {"a number"}, ("importance_weights", "low"): {"a number"},
    ("importance_weights", "high"): {"a number"}, ("selected_logprob", "temperature"): {"a number"},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in CALLS for name in CALLS[op]])
def test_every_argument_is_refused_by_name(op, name, backend):
    call, good = getattr(ops, op), CALLS[op] | {"backend": backend}
    call(**good)
    for kind, value in WRONG.items():
        if kind in RIGHT.get((op, name), ()) or (value is None and name in OPTIONAL.get(op, ())):
            call(**good | {name: value})
            continue
        with pytest.raises((ValueError, NotImplementedError)) as refused:
            call(**good | {name: value})
        text = str(refused.value)
        assert text.startswith(f"{op}: ") and name in text, (kind, text)
        assert any(word in text for word in ALLOWED), (kind, text)


def test_named_cures():
    scores, group = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights must be .* got 1.0; write \(1.0,\)"):
        ops.group_advantage(scores, group, weights=1.0)
    with pytest.raises(ValueError, match=r"weights must be a number, got NoneType|weights must be"):
        ops.group_advantage(scores, group, weights=[None])
    logits, target = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"temperature must be a number > 0 or .*\[\] or \[4\], got \[4, 1\]; resh"):
        ops.selected_logprob(logits, target, temperature=torch.ones(4, 1))
    for value in (1.5, None, True):
        with pytest.raises(ValueError, match="ignore_index must be a whole number"):
            ops.selected_logprob(logits, target, ignore_index=value)
        with pytest.raises(ValueError, match="ignore_index must be a whole number"):
            ops.linear_policy_loss(
                torch.ones(4, 3), torch.ones(5, 3), target, torch.ones(1), CU_SEQLENS, ignore_index=value
            )
    with pytest.raises(ValueError, match=r"must be a tensor, got list; pass torch.tensor"):
        ops.selected_logprob(logits, [0, 0, 0, 0])
