"""What a stage's loop keeps so that it can go on exactly where it was."""

from __future__ import annotations

from typing import Protocol

import torch

from prism_fast.data.order import SampleOrder
from prism_fast.train.checkpoint import save_checkpoint
from prism_fast.train.context import Run
from prism_fast.train.engine import LocalEngine
from prism_fast.train.rollout_log import RolloutLog
from prism_fast.train.seeds import derive_seed
from prism_fast.train.signals import Stopped


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class StageState:
    """Engines, sample order and whatever else a stage's next step depends on.

    Random numbers need no saving: every draw is seeded by (seed, stage, step), see :meth:`begin_step`.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        *,
        engines: dict[str, LocalEngine],
        order: SampleOrder,
        extra: Stateful | None = None,
        with_rollouts: bool = False,
    ):
        self.run, self.stage, self.engines, self.order, self.extra = run, stage, engines, order, extra
        self.step = 0
        saved = run.resume.checkpoint_of(stage)
        kept = 0
        if saved is not None:
            self.step = saved.state["step"]
            for name, engine in engines.items():
                engine.load_state_tensors(saved.tensors(name))
                engine.updates = saved.state["updates"][name]
            order.load_state_dict(saved.state["order"])
            if extra is not None:
                extra.load_state_dict(saved.state["extra"])
            kept = saved.state["rollout_bytes"]
        self.log = RolloutLog(run.folder, stage, keep_bytes=kept) if with_rollouts else None

    def begin_step(self) -> int:
        """Number of the step that begins (from 1); seeds PyTorch's generators for it (head dropout draws from them)."""
        self.step += 1
        torch.manual_seed(derive_seed(self.run.config.seed, self.stage, "torch", self.step))
        return self.step

    def end_step(self, *, last: bool = False) -> None:
        """Save if it is time, if this was the last step, or if a stop was asked for; then stop.

        Raises:
            Stopped: SIGTERM or SIGINT arrived; the step is saved.
        """
        stop = self.run.stop.requested
        if last or stop or self.step % self.run.config.checkpoint_every == 0:
            save_checkpoint(
                self.run.folder / "checkpoints",
                f"{self.stage}-{self.step:06d}",
                {name: engine.state_tensors() for name, engine in self.engines.items()},
                {
                    "stage": self.stage,
                    "step": self.step,
                    "updates": {name: engine.updates for name, engine in self.engines.items()},
                    "order": self.order.state_dict(),
                    "extra": None if self.extra is None else self.extra.state_dict(),
                    "metrics_bytes": self.run.metrics.size(),
                    "rollout_bytes": 0 if self.log is None else self.log.size(),
                },
                keep=self.run.config.keep_checkpoints,
            )
        if stop and not last:
            raise Stopped(f"{self.stage} step {self.step}")
