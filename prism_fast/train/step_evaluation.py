"""Evaluation inside a stage: every so many steps, with the best policy kept and an early end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_fast.config import ConfigError
from prism_fast.data.samples import Task
from prism_fast.models.processor import Processor
from prism_fast.rollout.protocol import Rollout
from prism_fast.track.metrics import Metrics
from prism_fast.train.context import Run
from prism_fast.train.evaluate import answer_all
from prism_fast.train.turns import Turns


class StepEvaluation:
    """Of one stage, part of its checkpoints.

    A stop that comes while it answers is obeyed once the step is complete, as the weights have moved already; a kill
    loses the batch in progress.
    """

    def __init__(
        self, run: Run, stage: str, processor: Processor, tasks: Sequence[Task] | None, export: Callable[[], object]
    ) -> None:
        """``tasks``: to be answered (None: ``eval.every`` is 0); ``export``: writes the policy as the best one."""
        self.run, self.stage, self.processor, self.tasks, self.export = run, stage, processor, tasks, export
        self.best: float | None = None
        self.best_step, self.stale = 0, 0

    def measure(self, step: int, generator: Rollout, turns: Turns) -> Metrics:
        """Joint. The metrics of step ``step``, none where no evaluation is due.

        Raises:
            ConfigError: ``eval.metric`` is not a metric of the evaluation.
        """
        config, metrics = self.run.config.eval, Metrics()
        if self.tasks is None or step % config.every:
            return metrics
        with turns.generating(metrics):
            name = f"{self.stage}-{step:06d}"
            _, found, log = answer_all(self.run, generator, self.processor, self.tasks, name=name)
        if config.metric not in found:
            raise ConfigError(f"eval.metric={config.metric} is not measured; there are {', '.join(sorted(found))}")
        better = self.best is None or found[config.metric] > self.best
        if better:
            self.best, self.best_step, self.stale = found[config.metric], step, 0
            if config.keep_best:
                self.export()
        else:
            self.stale += 1
        log.remove()
        for key, value in found.items():
            metrics.last(key, value)
        metrics.last("eval/best", self.best)
        metrics.last("eval/best_step", self.best_step)
        return metrics

    def enough(self) -> bool:
        """Whether ``eval.patience`` evaluations in a row were not better than the best."""
        patience = self.run.config.eval.patience
        return patience is not None and self.stale >= patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_step": self.best_step, "stale": self.stale}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
