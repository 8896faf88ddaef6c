"""A training step's rollouts: sampled, split, rewarded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.config import SamplingConfig
from prism_fast.data.grammar import ResponseSplit, split_tokens
from prism_fast.data.samples import Task
from prism_fast.models.processor import EncodedPrompt, Processor
from prism_fast.rewards import Judged, Reward
from prism_fast.rollout.hf import HFRollout
from prism_fast.rollout.protocol import Completion, Sampling
from prism_fast.train.context import Run
from prism_fast.train.rollout_log import RolloutLog
from prism_fast.train.seeds import derive_seed


@dataclass(frozen=True)
class StepRollouts:
    """B = prompts x n rollouts, those of one prompt side by side."""

    tasks: Sequence[Task]
    prompts: Sequence[EncodedPrompt]
    group: Tensor  # [B] int64, index into tasks
    completions: Sequence[Completion]
    splits: Sequence[ResponseSplit]
    rewards: Sequence[Reward]
    time: dict[str, float]

    def of_group(self, g: int) -> list[tuple[ResponseSplit, Completion]]:
        n = len(self.completions) // len(self.tasks)
        return list(zip(self.splits[g * n : (g + 1) * n], self.completions[g * n : (g + 1) * n], strict=True))

    def reward_metrics(self) -> dict[str, float]:
        count = len(self.rewards)
        return {
            "reward/mean": sum(r.score for r in self.rewards) / count,
            "reward/acc": sum(r.accuracy for r in self.rewards) / count,
            "reward/format": sum(r.format for r in self.rewards) / count,
            "reward/timeouts": sum(r.decided_by == "timeout" for r in self.rewards),
        }


def roll_out(
    run: Run, policy, processor: Processor, tasks: Sequence[Task], config: SamplingConfig, *, stage: str, step: int
) -> StepRollouts:
    """Sample ``config.n`` responses for each task and reward them."""
    started = time.perf_counter()
    prompts = [processor.encode_prompt(task.messages, task.images) for task in tasks]
    sampling = Sampling(config.n, config.temperature, config.max_new_tokens)
    seed = derive_seed(run.config.seed, stage, "rollout", step)
    groups = HFRollout(policy, processor).generate(
        prompts, sampling, seed=seed, on_token=lambda growing: run.stop.poll(f"{stage} step {step}, while generating")
    )
    generated = time.perf_counter()
    completions = [completion for group in groups for completion in group]
    group = torch.arange(len(tasks)).repeat_interleave(config.n)
    splits = [split_tokens(completion.token_ids, processor.tokenizer) for completion in completions]
    judged = [
        Judged(split.text, task.ground_truth, task.data_source, task.equivalent_answers)
        for split, task in zip(splits, (tasks[g] for g in group.tolist()), strict=True)
    ]
    rewards = run.checker.score(judged)
    return StepRollouts(
        tasks,
        prompts,
        group,
        completions,
        splits,
        rewards,
        {"time/generate": generated - started, "time/reward": time.perf_counter() - generated},
    )


def rollout_record(
    rollouts: StepRollouts,
    b: int,
    log: RolloutLog,
    *,
    advantage: float,
    scores: dict[str, float],
    teacher_scores: dict[str, float] | None,
) -> dict:
    """The dump of one rollout."""
    g = int(rollouts.group[b])
    task, completion, split, reward = (
        rollouts.tasks[g],
        rollouts.completions[b],
        rollouts.splits[b],
        rollouts.rewards[b],
    )
    teacher = {"caption": task.teacher_caption, "reasoning": task.teacher_cot} if task.teacher_caption else None
    return {
        "uid": task.uid,
        "group": g,
        "question": task.question,
        "kind": task.kind,
        "images": [log.image(image) for image in task.images],
        "text": split.text,
        "valid": split.valid,
        "spans": {name: list(span) for name, span in split.char_spans.items()},
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
        "scores": scores,
        "reward": {
            "score": reward.score,
            "accuracy": reward.accuracy,
            "format": reward.format,
            "decided_by": reward.decided_by,
        },
        "advantage": advantage,
        "ground_truth": task.ground_truth,
        "teacher": teacher,
        "teacher_scores": teacher_scores,
    }
