"""The state of a stage's loop: saved in checkpoints, so that a resumed run continues exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from prism_fast.config import dump_config
from prism_fast.data.order import MixedOrder, SampleOrder
from prism_fast.engine.protocol import Engine
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.writing import sync
from prism_fast.track.metrics import Metrics
from prism_fast.track.speed import StepTimer
from prism_fast.train.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from prism_fast.train.context import Run
from prism_fast.train.profiling import StepProfile
from prism_fast.train.record import refuse_changes
from prism_fast.train.rollout_gap import RolloutGap
from prism_fast.train.rollout_log import RolloutLog
from prism_fast.train.seeds import derive_seed
from prism_fast.train.signals import Stopped

FORMAT = 9  # of a checkpoint's state; another one is refused


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class StageState:
    """Engines, token budgets, sample order and whatever else a stage's next step depends on.

    A stage's loop is ``for step in state.steps(total, shown=...): ...; state.end_step(metrics)``.

    States of random generators are not saved: every draw is seeded by (seed, stage, step).

    A stop may come anywhere in a step. Before the first update, the state at the beginning of the step is saved; after
    :meth:`hold`, the current one with the step's metrics; in between the step is finished first.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        *,
        engines: dict[str, Engine],
        budgets: dict[str, int],
        order: SampleOrder | MixedOrder,
        extra: Stateful | None = None,
        evaluation: Stateful | None = None,
        with_rollouts: bool = False,
    ):
        """``budgets``: tokens per micro-batch by name, as configured.

        Raises:
            CheckpointError: the checkpoint was saved by another version, with another recipe, or of other data.
        """
        self.run, self.stage, self.engines, self.order, self.extra = run, stage, engines, order, extra
        self.evaluation = evaluation
        self.step = 0
        self.held: Metrics | None = None  # of a step that is updated but not evaluated yet
        self.budgets = {name: TokenBudget(tokens, notify=self._tell) for name, tokens in budgets.items()}
        if with_rollouts:  # the recipe's budget, or below the checkpoint's; not one that an earlier stage halved
            self.budgets["rollout"] = run.rollout_budget
            run.rollout_budget.restore(run.config.rollout.tokens_in_flight)
        self._config, self._world = dump_config(run.config), run.world
        saved = run.resume.checkpoint_of(stage)
        rollout_bytes = 0
        if saved is not None:
            if saved.state.get("format") != FORMAT:
                raise CheckpointError(
                    f"{saved.path} was saved by another version of prism-fast (its format is not "
                    f"{FORMAT}): go on with that version, or start a new run"
                )
            refuse_changes(run.folder, saved.state["config"], self._config, saved.path.name, convert=run.resume.convert)
            self._refuse_other_data(saved)
            self.step = saved.state["step"]
            if saved.state["held"] is not None:  # of all ranks
                self.held = Metrics.joined([saved.state["held"]] if run.world.first else [])
            for name, engine in engines.items():
                engine.load(saved.folder(name))
            for name, budget in self.budgets.items():
                budget.restore(saved.state["budgets"][name])
            order.load_state_dict(saved.state["order"])
            if extra is not None:
                extra.load_state_dict(saved.state["extra"])
            if evaluation is not None:
                evaluation.load_state_dict(saved.state["evaluation"])
            rollout_bytes = saved.state["rollout_bytes"]
        self._saved_step = self.step
        self._profile = StepProfile(run.folder, stage, run.config.profile if run.world.first else 0, run.device)
        self.timer = StepTimer(run.device, run.dtype)
        self.log = RolloutLog(run.folder, stage, run.world, keep_bytes=rollout_bytes) if with_rollouts else None
        if self.held is not None:
            self._watch()

    def _refuse_other_data(self, saved: Checkpoint) -> None:
        """Raise CheckpointError if data that the stage reads holds other rows than before, or another order of them."""
        before, now = saved.state["data"], self.run.fingerprints
        changed = [f"data.{name}" for name in now if name in before and before[name] != now[name]]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)}: the rows, or their order, are not those of {saved.path.name}. The steps before "
                "and after would be of two data sets: put the old files back, or start a new run from an export "
                "(model.policy=PATH)"
            )

    def steps(self, total: int, *, shown: Mapping[str, str], done: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Yield the remaining steps, counted from 1 up to ``total`` or until ``done()``; each ends with `end_step`.

        Seeds PyTorch's generators before each step (head dropout draws from them). ``shown``: names of metrics by their
        label on the progress bar.
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
        self._profile.begin()
        self.timer.begin()
        own = (self._world.rank,) if self._world.rank else ()  # one rank draws as rank 0 of several
        torch.manual_seed(derive_seed(self.run.config.seed, self.stage, "torch", self.step, *own))
        self._watch()

    def rollout_gap(self) -> RolloutGap:
        """Of a stage that trains on rollouts."""
        run = self.run
        return RolloutGap(run.config.rollout, run.dtype, tell=self._tell, alarm=run.config.replay is None)

    def hold(self, metrics: Metrics) -> None:
        """Call between the step's updates and its evaluation. A stop during the evaluation saves these metrics; the
        resumed run finds them in ``held`` and begins with the evaluation."""
        self.held = metrics

    def end_step(self, metrics: Metrics, times: Mapping[str, float] | None = None) -> None:
        """Joint. Write the step's metrics and show some of them. Save a checkpoint when one is due, after the last
        step, and when a stop was asked for.

        Args:
            times: more metrics in seconds, by name (``time/...``).

        Raises:
            Stopped: SIGTERM or SIGINT arrived; the step is saved.
            ValueError: a metric is not finite.
        """
        self._join_rollout_budget()
        if self.log is not None and (tokens := self.budgets["rollout"].change()) is not None:
            metrics.last("rollout/token_budget", tokens)
        own = metrics.only("perf/").read()
        self.timer.learned(tokens=own.get("perf/tokens", 0), forward_flops=own.get("perf/forward_flops", 0))
        measured = Metrics()
        for name, seconds in (times or {}).items():
            measured.max(name, seconds)
        values = (metrics | measured | self.timer.metrics()).read(self._world.gather)
        self.run.metrics.write(self.stage, self.step, values)
        self._bar.advance(**{name: values.get(metric) for name, metric in self._shown.items()})
        self.held = None
        self.run.stop.save = None
        stop, last = self.run.stop.agreed(), self._finished()
        self._profile.end(self.step, last=last or stop)
        if last or stop or self.step % self.run.config.checkpoint_every == 0:
            self._save(self._facts())
        if stop and not last:
            raise Stopped(f"{self.stage} step {self.step}")

    def _join_rollout_budget(self) -> None:
        """The smallest budget of the ranks, each of which halves its own while it generates."""
        if self.log is not None:
            budget = self.budgets["rollout"]
            (smallest,) = self._world.max([-budget.tokens])
            budget.tokens = -int(smallest)

    def _watch(self) -> None:
        self.run.stop.save = self._save_inside_step
        self._world.phase = f"{self.stage} step {self.step}"
        for engine in self.engines.values():
            engine.where = f"{self.stage} step {self.step}"

    def _save_inside_step(self) -> bool:
        """Joint. Save for a stop inside a step; False if the step must be finished first."""
        if self.held is not None:
            states = self._world.gather(self.held.state())
            self._save(self._facts() | {"held": Metrics.joined(states).state()})
        elif self._updates() != self._updates_before:
            return False
        elif self._saved_step != self._before["step"]:
            self._save(self._before)
        return True

    def _updates(self) -> list[int]:
        return [engine.updates for engine in self.engines.values()]

    def _facts(self) -> dict:
        """The state without that of the engines."""
        return {
            "format": FORMAT,
            "config": self._config,
            "data": dict(self.run.fingerprints),
            "ranks": self._world.size,
            "stage": self.stage,
            "step": self.step,
            "budgets": {name: budget.tokens for name, budget in self.budgets.items()},
            "order": self.order.state_dict(),
            "extra": None if self.extra is None else self.extra.state_dict(),
            "evaluation": None if self.evaluation is None else self.evaluation.state_dict(),
            "held": None,
            "metrics_bytes": self.run.metrics.size(),
            "rollout_bytes": 0 if self.log is None else self.log.size(),
        }

    def _save(self, facts: dict) -> None:
        self._world.on_first(self._sync)
        save_checkpoint(
            self.run.folder / "checkpoints",
            f"{self.stage}-{facts['step']:06d}",
            self.engines,
            facts,
            keep=self.run.config.keep_checkpoints,
            world=self._world,
        )
        self._saved_step = facts["step"]

    def _sync(self) -> None:
        for path in (self.run.metrics.path, *([] if self.log is None else [self.log.path])):
            sync(path)  # a checkpoint must not count lines that a power cut can undo

    def _tell(self, text: str) -> None:
        self.run.console.print(f"{self.stage} step {self.step}: {text}", style="yellow", markup=False, highlight=False)
