"""A long alignment stage needs no more memory at its end than after its first steps."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from prism_fast.ops.stock.pieces import batches
from prism_fast.track.tracker import Tracker


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live() -> tuple[int, int]:
    """Tensors and objects of any kind that the garbage collector knows after a collection.

    The cuts of the newest rows that attention remembers are as many as the rows happen to need; they do not count.
    """
    batches.cache_clear()
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(o), torch.Tensor) for o in objects), len(objects)


@pytest.fixture
def observe(finished, run_again, tmp_path, monkeypatch) -> Callable[..., list]:
    """Align for so many small steps and look at something after each, or after those of ``at``."""

    def run(steps: int, look: Callable[[], object], *overrides: str, at: Collection[int] | None = None) -> list:
        seen, learnt = [], []
        write = Tracker.write

        def writing(self, stage, step, values) -> None:
            write(self, stage, step, values)
            if stage == "align":
                learnt.append(values["disc/grad_norm"] is not None)
                if at is None or step in at:
                    seen.append(look())

        monkeypatch.setattr(Tracker, "write", writing)
        export = finished / "export"
        models = f"model.policy={export / 'sft'}", f"model.discriminator={export / 'discriminator-warmup'}"
        small = "align.prompts=1", "align.rollout.n=2", "data.eval=null", "stages=[align]", f"align.steps={steps}"
        run_again(tmp_path / "run", *models, *small, *overrides)
        assert len(learnt) == steps and sum(learnt) > steps / 2, "the discriminator must have learnt in most steps"
        return seen

    return run


def test_no_tensor_and_no_object_is_left_behind(observe):
    seen = observe(12, live, at=(4, 8, 12))
    # What earlier tests of the process have left may go meanwhile, at once; a step that leaves something leaves it
    # between each two looks.
    assert min(later - tensors for (tensors, _), (later, _) in pairwise(seen)) <= 0
    assert min(more - objects for (_, objects), (_, more) in pairwise(seen)) < 20


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_resident_memory_stays_flat_over_500_steps(observe):
    seen = observe(500, resident_bytes, "dump_rollouts_every=10", "checkpoint_every=50")
    settled, end = max(seen[50:100]), max(seen[450:])
    print(f"resident: step 1 {seen[0] >> 20} MiB, steps 51-100 {settled >> 20} MiB, steps 451-500 {end >> 20} MiB")
    assert end < 1.02 * settled
