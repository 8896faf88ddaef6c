"""Two ranks under ZeRO 1, 2 and 3 make the updates of one process. One world runs all cases, tests read its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-engines")

from prism_fast.models.packing import PromptGroup
from prism_fast.train.layouts import plan_batches
from tests.engines import cases
from tests.engines.cases import CASES, HALF, OPTIMIZER, UNSHARDED, WHOLE, Case, model_of, outcome, stepper
from tests.engines.recording import Local, Sharded

pytestmark = [pytest.mark.long, pytest.mark.timeout(1000)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 800  # seconds for the world
EVERYBODY = range(6)
BACKBONE = {"policy": "model", "discriminator": "backbone"}
#: Elements whose gradient is at least this share of their tensor's largest: AdamW's first updates are lr * sign.
FLOOR = 1e-2


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return cases.dump()


@pytest.fixture(scope="module")
def world(data, tmp_path_factory) -> Path:
    """What two ranks found; they are killed when one fails or the time is over."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "one").mkdir()
    saved_by_one(data).save(folder / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks, outputs = [], []
    for rank in range(2):
        outputs.append((folder / f"output.{rank}").open("w"))
        command = [sys.executable, "-m", "tests.engines.world", str(rank), str(folder)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=outputs[-1], stderr=subprocess.STDOUT))
    end = time.monotonic() + LIMIT
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() not in (None, 0) for rank in ranks):
                break
            time.sleep(0.2)
    finally:
        codes = [rank.poll() for rank in ranks]
        for rank, output in zip(ranks, outputs, strict=True):
            rank.kill()
            rank.wait()
            output.close()
    if codes != [0, 0]:
        told = [path.read_text()[-3000:] for path in sorted(folder.glob("failed.*"))]
        told += [path.read_text()[-1000:] for path in sorted(folder.glob("output.*"))]
        pytest.fail(f"ranks ended with {codes} (None: killed after {LIMIT} s)\n" + "\n".join(told))
    return folder


def read(world: Path, name: str) -> list[dict]:
    """What each rank found."""
    return [json.loads((world / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def tensors(world: Path, name: str, kind: str) -> dict[str, Tensor]:
    stored = load_file(world / f"{name}.0.safetensors")
    return {key.removeprefix(f"{kind}."): t for key, t in stored.items() if key.startswith(f"{kind}.")}


@lru_cache(maxsize=4)
def alone(case: Case):
    """One process, whatever the cut; the same for every stage."""
    data = cases.dump()
    engine = Local(model_of(case, data), OPTIMIZER)
    return outcome(case, engine, data, EVERYBODY, engine.gradients)


def wanted(case: Case):
    # Cut and checkpointing change nothing in one process; other tests prove that.
    return alone(replace(case, tokens=WHOLE, checkpointing=False))


def compare(world: Path, name: str, case: Case) -> dict[str, float]:
    one, found = wanted(case), read(world, name)
    for rank in found:
        assert rank["losses"] == pytest.approx(one.losses, rel=1e-6, abs=1e-7)
        assert rank["norms"] == pytest.approx(one.norms, rel=1e-5)
    gradients, weights = tensors(world, name, "gradient"), tensors(world, name, "weight")
    assert set(gradients) == set(one.gradients) and len(gradients) > 30
    whole = torch.stack([g.double().norm() for g in one.gradients.values()]).norm()
    worst = 0.0
    for key, gradient in one.gradients.items():
        error, norm = (gradients[key] - gradient).double().norm(), gradient.double().norm()
        assert error <= max(1e-5 * norm, 1e-7 * whole), f"gradient of {key}: {error / norm:.1e}, {error / whole:.1e}"
        worst = max(worst, float(error / max(norm, 1e-2 * whole)))
    moved, checked = 0.0, 0
    for key, weight in one.weights.items():
        gradient = one.gradients.get(key)
        if gradient is None:
            assert torch.equal(weights[key], weight), f"{key} had no gradient"
            continue
        clear = gradient.abs() > max(FLOOR * float(gradient.abs().max()), 1e-7 * float(whole))
        checked += int(clear.sum())
        off = (weights[key] - weight)[clear].abs().amax() if clear.any() else torch.zeros(())
        moved = max(moved, float(off) / OPTIMIZER.lr)
    assert checked > 10_000
    assert moved < 1e-3, f"weights are off by {moved:.1e} learning rates"
    return {"gradient": worst, "weights": moved}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_updates_are_those_of_one_process(world, stage, case, record_property):
    if stage == 1 and case.split != "no image":
        pytest.skip("stage 1 reduces as stage 2 does: one split is enough")
    for key, value in compare(world, f"{stage} {case}", case).items():
        record_property(key, value)


def test_the_cases_are_as_awkward_as_they_say(data):
    """Ranks make different numbers of passes; groups are cut, on one rank or both, so that rows share an image."""

    def rows(case: Case, rank: int) -> list[int]:
        """Of each set of rows that belong together, how many there are."""
        groups = [PromptGroup(data.prompts[p], [span for s in data.spans[p] for span in s]) for p in mine(case, rank)]
        if case.model != "discriminator":
            groups = [PromptGroup(data.prompts[p], [c.token_ids for c in data.responses[p]]) for p in mine(case, rank)]
        plan = plan_batches(
            case.layout,
            model_of(case, data).get_submodule(BACKBONE[case.model]),
            groups,
            case.tokens,
            pad_id=data.processor.pad_id,
            whole_groups=case.model == "discriminator",
        )
        return [len(bound) for bound in plan.bound()]

    def mine(case: Case, rank: int) -> tuple[int, ...]:
        return cases.SPLITS[case.split][rank]

    for case in CASES:
        if case.model == "sft":
            continue
        here, there = rows(case, 0), rows(case, 1)
        if case.tokens == cases.CUT:
            assert max(here + there) > 1, case
        if case.split == "uneven":
            assert sum(here) != sum(there), case
    assert [data.prompts[p].pixel_values for p in cases.SPLITS["no image"][1]] == [None]


@pytest.mark.parametrize("case", [case for case in CASES if case.model == "discriminator"], ids=str)
@pytest.mark.parametrize("stage", [2, 3])
def test_every_rank_gets_the_scores_of_its_own_groups(world, stage, case):
    teacher, student = [], []
    for rank, mine in enumerate(cases.SPLITS[case.split]):
        scores = load_file(world / f"{stage} {case}.{rank}.safetensors")["scores"]
        teacher.append(scores[: 2 * len(mine)])
        student.append(scores[2 * len(mine) :])
    torch.testing.assert_close(torch.cat(teacher + student), wanted(case).scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", HALF, ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_learns_through_float32(world, stage, case):
    """Forward and backward round to 8 bits, in another order where rows are cut otherwise."""
    one, name = alone(case), f"{stage} {case}"
    assert read(world, name)[0]["losses"] == pytest.approx(one.losses, rel=2e-2, abs=2e-2)
    gradients = tensors(world, name, "gradient")
    assert set(gradients) == set(one.gradients)
    whole = torch.stack([g.double().norm() for g in one.gradients.values()]).norm()
    off = torch.stack([(gradients[key] - g).double().norm() for key, g in one.gradients.items()]).norm()
    assert off < 3e-2 * whole
    for key, weight in tensors(world, name, "weight").items():
        assert weight.dtype == (torch.float32 if key.startswith("v_head") else torch.bfloat16)
    if case.model == "discriminator":
        head = tensors(world, name, "weight")["v_head.1.weight"]
        assert not torch.equal(head, head.bfloat16().float())
        assert torch.allclose(head, one.weights["v_head.1.weight"], atol=0.3 * OPTIMIZER.lr)
    assert {t.dtype for t in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fault", ["averaging", "alone"])
def test_a_broken_engine_is_caught(world, stage, fault):
    with pytest.raises(AssertionError):
        compare(world, f"{stage} {fault}", CASES[0])


# Checkpoints.


def saved_by_one(data) -> Local:
    """Two updates of one process."""
    engine = Local(model_of(Case("policy"), data), OPTIMIZER)
    step = stepper(Case("policy"), engine, data, EVERYBODY)
    step(), step()
    return engine


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_resume_to_the_bit(world, stage):
    for found in read(world, f"{stage} resume"):
        assert found["differ"] == [] and found["updates"] == [3, 3, 3]
    files = sorted(path.name for path in (world / f"two-{stage}").iterdir())
    assert files == ["engine-00001-of-00002.safetensors", "engine-00002-of-00002.safetensors"]
    sizes = [path.stat().st_size for path in (world / f"two-{stage}").iterdir()]
    assert min(sizes) > 0.5 * max(sizes), "ranks write equal shares"


def continued(engine, data) -> dict[str, Tensor]:
    stepper(Case("policy"), engine, data, EVERYBODY)()
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        clear = gradients[name].abs() > FLOOR * gradients[name].abs().max() if name in gradients else slice(0)
        off = (tensor - other[name])[clear].abs()
        assert not off.numel() or off.max() < 1e-2 * OPTIMIZER.lr, f"{name}: {off.max():.1e}"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", [Local, Sharded])
def test_one_process_goes_on_from_two_ranks(world, data, stage, kind, one_rank):
    model = model_of(Case("policy"), data, seed=9)
    engine = Local(model, OPTIMIZER) if kind is Local else Sharded(model, OPTIMIZER, stage=stage, options=UNSHARDED)
    engine.load(world / f"two-{stage}")
    assert engine.updates == 2
    first = alone(Case("policy")).gradients
    assert_near(continued(engine, data), tensors(world, f"{stage} resume", "weight"), first)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_go_on_from_one_process(world, data, stage):
    one = Local(model_of(Case("policy"), data, seed=9), OPTIMIZER)
    one.load(world / "one")
    found = tensors(world, f"{stage} resume", "from one")
    assert_near(continued(one, data), found, alone(Case("policy")).gradients)


# What ranks decide together.


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_answer_and_refuse_together(world, stage):
    for found in read(world, f"{stage} together"):
        assert found["sum"] == [3.0, 1.0] and found["max"] == [1.0, 0.0]
        assert found["agree"] == [True, False, False]
        assert found["advantage"].startswith("NonFiniteError") and "advantage" in found["advantage"]
        assert found["loss"].startswith(
            "NonFiniteError: rank 1 of 2: align step 7, micro-batch 1 of 1: not finite: loss"
        )
        assert "gradient norm is nan" in found["gradient"] and "norm.weight" in found["gradient"]
        assert found["moved"] == [] and found["dropped"] is True
        assert found["halved"] == 100 and found["told"] == 2
        assert found["hopeless"].startswith("StepTooLargeError")


def test_weights_are_gathered_layer_by_layer(world):
    for found in read(world, "gathered"):
        assert found["outside"] == 0
        assert found["largest"] <= found["most"] < 1.1 * found["largest"]  # a weight alone is larger than a layer
