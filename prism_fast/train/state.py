"""What a stage's loop keeps so that it can go on exactly where it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from prism_fast.data.order import SampleOrder
from prism_fast.engine.protocol import Engine
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.writing import sync
from prism_fast.track.metrics import Metrics
from prism_fast.track.speed import StepTimer
from prism_fast.train.checkpoint import CheckpointError, save_checkpoint
from prism_fast.train.context import Run
from prism_fast.train.rollout_log import RolloutLog
from prism_fast.train.seeds import derive_seed
from prism_fast.train.signals import Stopped

FORMAT = 4  # of a checkpoint's state; another one is refused


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class StageState:
    """Engines, token budgets, sample order and whatever else a stage's next step depends on.

    A stage's loop is ``for step in state.steps(total, shown=...): ...; state.end_step(metrics)``.

    Random numbers need no saving: every draw is seeded by (seed, stage, step).

    A stop is possible anywhere in a step: before an engine was updated, the state is saved as it was when the step
    began; after :meth:`hold`, as it is, with the metrics of the step; in between the step is finished.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        *,
        engines: dict[str, Engine],
        budgets: dict[str, int],
        order: SampleOrder,
        extra: Stateful | None = None,
        with_rollouts: bool = False,
    ):
        """``budgets``: tokens per micro-batch by name, as configured.

        Raises:
            CheckpointError: the checkpoint was saved by another version.
        """
        self.run, self.stage, self.engines, self.order, self.extra = run, stage, engines, order, extra
        self.step = 0
        self.held: Metrics | None = None  # of the step whose update is done and whose evaluation is not
        self.budgets = {name: TokenBudget(tokens, notify=self._tell) for name, tokens in budgets.items()}
        if with_rollouts:  # as the recipe says, or below as the checkpoint does: whatever an earlier stage had to do
            self.budgets["rollout"] = run.rollout_budget
            run.rollout_budget.restore(run.config.rollout.tokens_in_flight)
        saved = run.resume.checkpoint_of(stage)
        kept = 0
        if saved is not None:
            if saved.state.get("format") != FORMAT:
                raise CheckpointError(
                    f"{saved.path} was saved by another version of prism-fast (its format is not "
                    f"{FORMAT}): go on with that version, or start a new run"
                )
            self.step = saved.state["step"]
            if saved.state["held"] is not None:
                self.held = Metrics.joined([saved.state["held"]])
            for name, engine in engines.items():
                engine.load(saved.folder(name))
            for name, budget in self.budgets.items():
                budget.restore(saved.state["budgets"][name])
            order.load_state_dict(saved.state["order"])
            if extra is not None:
                extra.load_state_dict(saved.state["extra"])
            kept = saved.state["rollout_bytes"]
        self._saved_step = self.step
        self.timer = StepTimer(run.device, run.dtype)
        self.log = RolloutLog(run.folder, stage, keep_bytes=kept) if with_rollouts else None
        if self.held is not None:
            self._watch()

    def steps(self, total: int, *, shown: Mapping[str, str], done: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """The numbers of the steps that are left, from 1 to ``total`` or until ``done()``; each ends with `end_step`.

        Begins each step: seeds PyTorch's generators for it (head dropout draws from them). ``shown``: metrics on the
        progress bar, by the name that they have there.
        """
        self._finished = lambda: self.step >= total or done()
        self._shown = shown
        with self.run.progress.bar(self.stage, total, done=self.step) as self._bar:
            while self.held is not None or not self._finished():
                if self.held is None:
                    self._begin_step()
                yield self.step

    def _begin_step(self) -> None:
        self._before, self._updates_before = copy.deepcopy(self._facts()), self._updates()
        self.step += 1
        self.timer.begin()
        torch.manual_seed(derive_seed(self.run.config.seed, self.stage, "torch", self.step))
        self._watch()

    def hold(self, metrics: Metrics) -> None:
        """The step's updates are done, its evaluation follows: a stop during it saves the step with these metrics, and
        the resumed run finds them in ``held`` and begins with that evaluation."""
        self.held = metrics

    def end_step(self, metrics: Metrics, times: Mapping[str, float] | None = None) -> None:
        """Write the step's metrics, show some of them, save if it is time, if this was the last step, or if a stop was
        asked for; then stop.

        Args:
            times: further seconds by name, ``time/...``.

        Raises:
            Stopped: SIGTERM or SIGINT arrived; the step is saved.
            ValueError: a metric is not finite.
        """
        if self.log is not None and (tokens := self.budgets["rollout"].change()) is not None:
            metrics.last("rollout/token_budget", tokens)
        values = metrics.read()
        self.timer.learned(tokens=values.get("perf/tokens", 0), forward_flops=values.get("perf/forward_flops", 0))
        self.run.metrics.write(self.stage, self.step, {**values, **(times or {}), **self.timer.metrics().read()})
        self._bar.advance(**{name: values.get(metric) for name, metric in self._shown.items()})
        self.held = None
        self.run.stop.save = None
        stop, last = self.run.stop.requested, self._finished()
        if last or stop or self.step % self.run.config.checkpoint_every == 0:
            self._save(self._facts())
        if stop and not last:
            raise Stopped(f"{self.stage} step {self.step}")

    def _watch(self) -> None:
        self.run.stop.save = self._save_inside_step
        for engine in self.engines.values():
            engine.where = f"{self.stage} step {self.step}"

    def _save_inside_step(self) -> bool:
        """What a stop inside a step saves; False if the step must be finished first."""
        now = self._facts()
        if self.held is not None:
            self._save(now)
        elif self._updates() != self._updates_before:
            return False
        elif self._saved_step != self._before["step"]:
            self._save(self._before)
        return True

    def _updates(self) -> list[int]:
        return [engine.updates for engine in self.engines.values()]

    def _facts(self) -> dict:
        """Everything that is not the engines' own."""
        return {
            "format": FORMAT,
            "stage": self.stage,
            "step": self.step,
            "budgets": {name: budget.tokens for name, budget in self.budgets.items()},
            "order": self.order.state_dict(),
            "extra": None if self.extra is None else self.extra.state_dict(),
            "held": None if self.held is None else self.held.state(),
            "metrics_bytes": self.run.metrics.size(),
            "rollout_bytes": 0 if self.log is None else self.log.size(),
        }

    def _save(self, facts: dict) -> None:
        for path in (self.run.metrics.path, *([] if self.log is None else [self.log.path])):
            sync(path)  # a checkpoint never speaks of lines that a power cut can take back
        save_checkpoint(
            self.run.folder / "checkpoints",
            f"{self.stage}-{facts['step']:06d}",
            self.engines,
            facts,
            keep=self.run.config.keep_checkpoints,
        )
        self._saved_step = facts["step"]

    def _tell(self, text: str) -> None:
        self.run.console.print(f"{self.stage} step {self.step}: {text}", style="yellow", markup=False, highlight=False)
