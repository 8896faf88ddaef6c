"""``python -m tests.engines.rank``: the ``prism-fast`` command, with a fault where the variable FAULT asks for one.

FAULT is ``RANK WHERE WHAT``: that rank, before the policy's update at ``engine.where``, raises an error (``error``) or
sends itself a signal (``SIGTERM``, ``SIGKILL``).
"""

from __future__ import annotations

import os
import signal

from prism_fast.entry import main
from prism_fast.train.policy_trainer import PolicyTrainer

accumulate = PolicyTrainer.accumulate


def faulty(trainer: PolicyTrainer, batch: object) -> object:
    rank, _, place = os.environ["FAULT"].partition(" ")
    where, _, what = place.rpartition(" ")
    if os.environ.get("RANK", "0") == rank and trainer.engine.where == where:
        if what == "error":
            raise RuntimeError("played")
        os.kill(os.getpid(), getattr(signal, what))
    return accumulate(trainer, batch)


if __name__ == "__main__":
    if "FAULT" in os.environ:
        PolicyTrainer.accumulate = faulty
    main()
