"""One rank of a world of two, ``python -m tests.engines.world RANK FOLDER``: runs the cases, writes what it found."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from prism_fast.engine.finite import NonFiniteError
from prism_fast.models.token_budget import StepTooLargeError, TokenBudget
from tests.engines import cases
from tests.engines.cases import CASES, HALF, OPTIMIZER, SPLITS, UNSHARDED, Case, Dump, model_of, outcome, stepper
from tests.engines.recording import Averaging, CountsAlone, Sharded

RANKS = 2


def engine_of(case: Case, data: Dump, stage: int, kind: type[Sharded] = Sharded, *, seed: int = 1) -> Sharded:
    return kind(model_of(case, data, seed=seed), OPTIMIZER, stage=stage, options=UNSHARDED)


def compared(case: Case, data: Dump, stage: int, rank: int, kind: type[Sharded] = Sharded) -> dict[str, object]:
    engine = engine_of(case, data, stage, kind)

    def total(loss: float) -> float:
        return engine.world.sum([loss])[0]

    found = outcome(case, engine, data, SPLITS[case.split][rank], engine.gradients, total)
    tensors = {f"gradient.{name}": tensor for name, tensor in found.gradients.items()}
    tensors |= {f"weight.{name}": tensor for name, tensor in found.weights.items()}
    if found.scores is not None:
        tensors["scores"] = found.scores
    return {"losses": found.losses, "norms": found.norms, "tensors": tensors}


def resumed(data: Dump, stage: int, rank: int, folder: Path) -> dict[str, object]:
    """Two updates, saved, one more; and again from the file, into another model with moments of its own."""
    case, mine = Case("policy"), SPLITS["even"][rank]
    saved = folder / f"two-{stage}"
    saved.mkdir(exist_ok=True)
    straight = engine_of(case, data, stage)
    step = stepper(case, straight, data, mine)
    step(), step()
    dist.barrier()
    straight.save(saved)
    dist.barrier()
    step()
    weights = {name: tensor.clone() for name, tensor in straight.named_weights()}
    again = engine_of(case, data, stage, seed=5)
    step = stepper(case, again, data, mine)
    step()
    again.load(saved)
    step()
    differ = [name for name, tensor in again.named_weights() if not torch.equal(tensor, weights[name])]
    continued = engine_of(case, data, stage, seed=6)
    continued.load(folder / "one")  # of the local engine
    stepper(case, continued, data, mine)()
    after = {f"from one.{name}": tensor.clone() for name, tensor in continued.named_weights()}
    return {
        "differ": differ,
        "updates": [straight.updates, again.updates, continued.updates],
        "tensors": {f"weight.{name}": tensor for name, tensor in weights.items()} | after,
    }


def together(data: Dump, stage: int, rank: int) -> dict[str, object]:
    """Joint answers and joint errors."""
    engine = engine_of(Case("policy"), data, stage)
    found: dict[str, object] = {
        "sum": engine.sum([rank + 1, 0.5]),
        "max": engine.max([rank, -rank]),
        "agree": [engine.agree(True), engine.agree(False), engine.agree(rank == 0)],
    }
    before = {name: tensor.clone() for name, tensor in engine.named_weights()}

    def refused(action: Callable[[], object]) -> str:
        try:
            action()
        except (NonFiniteError, StepTooLargeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def poisoned() -> None:
        mine = data._replace(advantage=data.advantage * (1.0 if rank == 0 else torch.nan))
        stepper(Case("policy"), engine, mine, SPLITS["even"][rank])()

    def norm() -> torch.Tensor:
        return engine.module.model.language_model.norm.weight.sum()

    engine.where = "align step 7"
    found["advantage"] = refused(poisoned)
    engine.backward(engine.run(lambda: norm() * (torch.nan if rank == 1 else 1.0)))
    found["loss"] = refused(engine.verify)
    engine.backward(engine.run(lambda: (norm() * 0).sqrt()))
    found["gradient"] = refused(engine.step)
    found["moved"] = [name for name, tensor in engine.named_weights() if not torch.equal(tensor, before[name])]
    if not engine.lockstep and rank == 1:  # one rank drops a step by itself, and nobody waits for it
        engine.backward(engine.run(norm))
        engine.discard()
    found["dropped"] = engine.agree(True)
    budgets = []
    budget = TokenBudget(400, notify=lambda text: budgets.append(text))

    def attempt(tokens: int) -> int:
        if rank == 1 and tokens > 100:
            raise MemoryError("no more")
        return tokens

    found["halved"] = budget.run(attempt, discard=engine.discard, longest=10 + rank, agree=engine.agree)
    found["told"] = len(budgets)

    def hopeless(tokens: int) -> None:
        if rank == 1:
            raise MemoryError("no more")

    small = TokenBudget(90, notify=lambda text: None)
    found["hopeless"] = refused(
        lambda: small.run(hopeless, discard=engine.discard, longest=10 if rank == 0 else 90, agree=engine.agree)
    )
    return found


def gathered(data: Dump, rank: int) -> dict[str, object]:
    """How much of a model is whole while its weights are read one by one under stage 3."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    engine = engine_of(Case("policy"), data, 3)
    parameters = list(engine.module.parameters())

    def whole() -> int:
        return sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)

    most = max(whole() for _ in engine.named_weights())
    return {"outside": whole(), "most": most, "largest": max(p.ds_numel for p in parameters)}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    data = cases.dump()
    jobs: dict[str, Callable[[], dict[str, object]]] = {}
    for stage in (1, 2, 3):
        for case in CASES:
            if stage == 1 and case.split != "no image":
                continue  # its reduction is that of stage 2
            jobs[f"{stage} {case}"] = lambda case=case, stage=stage: compared(case, data, stage, rank)
        for case in HALF:
            jobs[f"{stage} {case}"] = lambda case=case, stage=stage: compared(case, data, stage, rank)
        jobs[f"{stage} resume"] = lambda stage=stage: resumed(data, stage, rank, folder)
    for stage in (2, 3):
        jobs[f"{stage} together"] = lambda stage=stage: together(data, stage, rank)
        jobs[f"{stage} averaging"] = lambda stage=stage: compared(CASES[0], data, stage, rank, Averaging)
        jobs[f"{stage} alone"] = lambda stage=stage: compared(CASES[0], data, stage, rank, CountsAlone)
    jobs["gathered"] = lambda: gathered(data, rank)
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    for name, job in jobs.items():
        if only not in name:
            continue
        begin = time.monotonic()
        try:
            found = job()
        except Exception as error:
            (folder / f"failed.{rank}.txt").write_text(f"{name}\n{traceback.format_exc()}")
            print(f"rank {rank}: {name}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)  # the other rank waits in a collective
        tensors = found.pop("tensors", {})
        if tensors and (rank == 0 or "scores" in tensors):
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.{rank}.safetensors"
            )
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
        print(f"rank {rank}: {name}: {time.monotonic() - begin:.1f} s", flush=True)
        gc.collect()
        dist.barrier()
    dist.barrier()
    os._exit(0)  # DeepSpeed's and gloo's threads need not be waited for


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
