"""A group of rollouts and its record in plain JSON, which is enough to train on it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prism_fast.data.grammar import ResponseSplit, split_tokens
from prism_fast.data.samples import Task
from prism_fast.models.processor import Processor, Prompt
from prism_fast.rewards import Reward
from prism_fast.rollout.protocol import Completion


@dataclass(frozen=True, order=True)
class Origin:
    """When a group was sampled: the step, the step's round of generation, the place in that round."""

    step: int
    round: int
    place: int


@dataclass(frozen=True)
class RolloutGroup:
    """The n responses to one prompt, sampled together. ``index``: of the task in the stage's data. ``rewards`` is None
    until the group is graded."""

    index: int
    task: Task
    prompt: Prompt
    completions: Sequence[Completion]
    splits: Sequence[ResponseSplit]
    origin: Origin
    rewards: Sequence[Reward] | None = None


def training_records(group: RolloutGroup) -> list[dict]:
    """One record per rollout of a graded group, for :func:`group_from_records`. JSON keeps every bit of a float."""
    task = group.task
    return [
        {
            "uid": task.uid,
            "index": group.index,
            "prompt_sha256": prompt_digest(group.prompt),
            "sampled": asdict(group.origin),
            "token_ids": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "entropy": completion.entropy,
            "finish": completion.finish_reason,
            "reward": asdict(reward),
        }
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]


def group_from_records(
    records: Sequence[dict], task: Task, prompt: Prompt, processor: Processor, *, published: bool
) -> RolloutGroup:
    """The recorded group, with its recorded rewards. ``published``: of `split_tokens`.

    Raises:
        ValueError: the records belong to another task or another prompt, or lack a field.
    """
    first = records[0]
    if first["uid"] != task.uid:
        raise ValueError(f"recorded is uid {first['uid']!r}, but the task here is {task.uid!r}: other data or seed")
    if first["prompt_sha256"] != prompt_digest(prompt):
        raise ValueError(
            f"uid {task.uid!r}: the prompt has other token ids than when it was recorded: other tokenizer, chat "
            "template or image size"
        )
    try:
        completions = [
            Completion(tuple(r["token_ids"]), tuple(r["logprobs"]), r["entropy"], r["finish"]) for r in records
        ]
        rewards = [Reward(**r["reward"]) for r in records]
        origin, index = Origin(**first["sampled"]), first["index"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"uid {task.uid!r}: the record is not complete ({error!r})") from error
    splits = [split_tokens(c.token_ids, processor.tokenizer, published=published) for c in completions]
    return RolloutGroup(index, task, prompt, completions, splits, origin, rewards)


def prompt_digest(prompt: Prompt) -> str:
    """sha256 of the token ids."""
    return hashlib.sha256(",".join(map(str, prompt.input_ids)).encode()).hexdigest()
