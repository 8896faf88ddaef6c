"""The step benchmark: what passes through the models is counted exactly, a column that computes something else is
named wrong, the file has its columns."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeModel
from typer.testing import CliRunner

from prism_fast.bench.command import app
from prism_fast.bench.step import measure as measuring
from prism_fast.bench.step.counting import packed_pairs
from prism_fast.bench.step.measure import KERNELS, OURS, STATUSES, STOCK, TOLERANCE, Row, measure
from prism_fast.bench.step.ours import Ours
from prism_fast.bench.step.published import BUDGET, Published
from prism_fast.bench.step.work import Shape, draw, draw_weights, widths
from prism_fast.models.packing import PromptGroup, pack
from prism_fast.models.upcycle import sparse_config

SHAPE = Shape(prompt=21, response=10, teacher=13, rollouts=3)


def measured(rounds: int = 0) -> dict[str, Row]:
    sizes = widths(None)
    rows = measure(
        SHAPE, sizes, draw_weights(sizes, "cpu"), device="cpu", dtype=torch.float32, checkpointing=False, rounds=rounds
    )
    return {row.column: row for row in rows}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "WARM_UP", 0)
        return measured(rounds=2)


def test_our_step_computes_every_distinct_token_once(rows):
    p, r, t, n = SHAPE.prompt, SHAPE.response, SHAPE.teacher, SHAPE.rollouts
    counts = rows[OURS].counts
    assert not any(counts["score"].values())  # the update's forward gives the scores
    work = draw(SHAPE, widths(None))
    spans = {span for tokens in (*work.responses, work.teacher) for span in work.spans(tokens)}
    assert len(spans) == 2 * n + 2
    assert counts["discriminator"]["tokens"] == p + sum(map(len, spans)) == p + n * r + t
    assert counts["policy"]["tokens"] == p + n * r
    for phase in (counts["discriminator"], counts["policy"]):
        assert phase["forwards"] == phase["images"] == 1
        # No pass without a backward: no scoring, no old log-probs, no reference.
        assert phase["tokens_no_grad"] == phase["forwards_no_grad"] == phase["images_no_grad"] == 0


@pytest.mark.parametrize("column", [STOCK, KERNELS])
def test_published_schedule_computes_what_its_formula_says(rows, column):
    p, r, t, n = SHAPE.prompt, SHAPE.response, SHAPE.teacher, SHAPE.rollouts
    score, update, policy = (rows[column].counts[phase] for phase in ("score", "discriminator", "policy"))
    assert score["tokens_no_grad"] == n * (2 * p + r) and score["forwards_no_grad"] == score["images_no_grad"] == 2 * n
    assert update["tokens"] == n * (4 * p + r + t) and update["images"] == 4 * n and update["forwards"] == 4
    assert policy["tokens"] == policy["tokens_no_grad"] == n * (p + r)
    assert policy["images"] == policy["images_no_grad"] == n
    assert score["tokens"] == update["tokens_no_grad"] == 0


def test_flop_of_a_step_by_hand(rows):
    """Matrices and pairs of the text layers and the output matrix; what is left is the vision tower, once per image."""
    p, r, n = SHAPE.prompt, SHAPE.response, SHAPE.rollouts
    text = widths(None).policy.text_config
    layer = 128 * 32 * (2 * 4 + 2 * 2) + 3 * 128 * 320
    pairs = {STOCK: n * (p + r) * (p + r + 1) // 2, OURS: p * (p + 1) // 2 + n * (r * p + r * (r + 1) // 2)}
    tokens = {STOCK: n * (p + r), OURS: p + n * r}
    head = {STOCK: n * (p + r), OURS: n * r}  # as published every row meets the output matrix, response or not
    vision = {}
    for name, passes, images in ((STOCK, 4, 4 * n), (OURS, 3, 3)):
        trunk = text.num_hidden_layers * (2 * layer * tokens[name] + 4 * 4 * 32 * pairs[name])
        rest = rows[name].counts["policy"]["flop"] - passes * (trunk + 2 * 128 * text.vocab_size * head[name])
        vision[name] = rest / images
    assert vision[STOCK] == vision[OURS] > 0


def test_pairs_of_a_packed_row():
    sizes = widths(None)
    prompt = draw(SHAPE, sizes).prompt
    row = pack([PromptGroup(prompt, [[1, 2, 3], [], [4]])], 100, model_config=sizes.policy)[0]
    assert packed_pairs(row.layout) == 21 * 22 // 2 + (3 * 21 + 6) + (21 + 1)


def test_columns_agree_and_are_timed(rows):
    assert list(rows) == [STOCK, KERNELS, OURS]
    for row in rows.values():
        assert row.status == "ok" and row.runs == 2 and all(e <= TOLERANCE / 10 for e in row.errors.values()), row
        assert set(row.errors) == {"scores", "discriminator_loss", "policy_loss", "logp", "d_discriminator", "d_policy"}
        assert row.peak_mib is not None and row.peak_mib >= 0
        assert 0 < row.ms_p20["step"] <= row.ms_p50["step"] <= row.ms_p80["step"]
        # Every timed step updates the weights. On-policy, the policy's loss is the mean advantage, whatever they are.
        first, second = row.losses["discriminator_loss"]
        assert first > second and row.losses["policy_loss"][0] == pytest.approx(row.losses["policy_loss"][1], abs=1e-6)
    assert rows[STOCK].of_stock == rows[KERNELS].of_kernels == 1 and rows[OURS].of_stock > 0
    assert max(rows[OURS].errors.values()) > 0  # two computations, not one compared with itself


def spoiled_advantage(monkeypatch):
    made = Ours.__init__

    def spoil(self, name, models, work):
        made(self, name, models, work)
        self.batch = replace(self.batch, advantage=self.batch.advantage + torch.tensor([0.02, 0.0, 0.0]))

    monkeypatch.setattr(Ours, "__init__", spoil)


def spoiled_spans(monkeypatch):
    """The reasoning of one rollout lacks its last token."""
    made = Ours.__init__

    def spoil(self, name, models, work):
        made(self, name, models, work)
        caption, reasoning = self.groups[0].students[1]
        self.groups[0].students[1] = (caption, reasoning[:-1])

    monkeypatch.setattr(Ours, "__init__", spoil)


def spoiled_loss(monkeypatch):
    """The teacher's squares once per rollout, in one of the published columns."""
    pairs = Published._pairs
    monkeypatch.setattr(
        Published, "_pairs", lambda self, t, s: pairs(self, t, s) + (0.0 if self.stock else 0.01 * t.square().sum())
    )


@pytest.mark.parametrize(
    ("spoil", "column", "what"),
    [
        (spoiled_advantage, OURS, "policy"),
        (spoiled_spans, OURS, "discriminator"),
        (spoiled_loss, KERNELS, "discriminator"),
    ],
)
def test_a_column_that_computes_something_else_is_wrong(monkeypatch, spoil, column, what):
    monkeypatch.setattr(measuring, "WARM_UP", 0)
    monkeypatch.setattr(measuring, "peak", lambda *_: None)
    spoil(monkeypatch)
    found = measured()
    assert {name: row.status for name, row in found.items()} == {
        name: "wrong" if name == column else "ok" for name in (STOCK, KERNELS, OURS)
    }
    assert found[column].errors[f"d_{what}"] > TOLERANCE and found[column].note and not found[column].ms_p50


def test_a_missing_gradient_and_nan_are_wrong():
    exact = {"d_discriminator.a": torch.ones(2), "d_policy.a": torch.ones(2), "d_policy.b": torch.ones(2)}
    right = {name: value.clone() for name, value in exact.items()}
    assert measuring.worst(right, exact) == {"d_discriminator": 0.0, "d_policy": 0.0}
    assert measuring.worst({k: v for k, v in right.items() if k != "d_policy.b"}, exact)["d_policy"] == math.inf
    assert math.isnan(measuring.worst(right | {"d_policy.b": torch.full((2,), math.nan)}, exact)["d_policy"])


def test_real_widths_are_those_of_the_published_models():
    """Layers of Qwen3-VL-4B and of 2B with four experts, by their parameters."""
    sizes = widths(2)
    with torch.device("meta"):
        policy = Qwen3VLForConditionalGeneration._from_config(sizes.policy)
        backbone = Qwen3VLMoeModel._from_config(sparse_config(sizes.dense, 4, 2))
    layer, sparse = (sum(p.numel() for p in m.language_model.layers[0].parameters()) for m in (policy.model, backbone))
    assert layer == 2560 * 128 * (2 * 32 + 2 * 8) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert sparse == 2048 * 128 * (2 * 16 + 2 * 8) + 4 * 3 * 2048 * 6144 + 4 * 2048 + 2 * 2048 + 2 * 128
    assert policy.lm_head.weight.shape == (151_936, 2560) and len(policy.model.visual.blocks) == 1
    assert draw(Shape(1024, 8, 8, 2), sizes).prompt.input_ids.count(sizes.policy.image_token_id) == 22**2


def test_long_groups_are_cut_as_published():
    shape = Shape(prompt=3000, response=1000, teacher=8, rollouts=5)
    assert BUDGET // (shape.prompt + shape.response) == 2  # five rollouts: three micro-batches


def test_file_table_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UP", 0)
    monkeypatch.setattr(measuring, "peak", lambda *_: None)
    out = tmp_path / "step.json"
    sizes = ["--prompt", "12", "--response", "4", "--teacher", "6", "--rollouts", "2"]
    arguments = ["step", "--device", "cpu", *sizes, "--rounds", "1", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert {f.name for f in fields(Row)} == set(result["rows"][0]) and len(result["rows"]) == 3
    assert {"card", "torch", "commit", "date", "threads"} <= set(result["machine"])
    assert result["tolerance"] == TOLERANCE and result["dtype"] == "float32" and result["depth"] is None
    assert all(row["status"] in STATUSES for row in result["rows"])
    assert all(name in done.output for name in (STOCK, KERNELS, OURS))
    spoiled_spans(monkeypatch)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and f"wrong: {OURS}, prompt 12" in done.output
    assert [row["status"] for row in json.loads(out.read_text())["rows"]] == ["ok", "ok", "wrong"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "4"],
        ["--rollouts", "1"],
        ["--prompt", "8", "--prompt", "9"],
        ["--rounds", "0"],
        ["--device", "tpu"],
    ],
)
def test_wrong_arguments_are_refused(arguments):
    done = CliRunner().invoke(app, ["step", *arguments])
    assert done.exit_code == 2


def test_gradient_checkpointing_costs_a_forward_more_and_changes_nothing(rows):
    sizes = widths(None)
    found = {
        row.column: row
        for row in measure(
            SHAPE, sizes, draw_weights(sizes, "cpu"), device="cpu", dtype=torch.float32, checkpointing=True, rounds=0
        )
    }
    for name, row in found.items():
        assert row.status == "ok", row.note
        for phase, count in row.counts.items():
            plain = dict(rows[name].counts[phase])
            more = count.pop("flop") / max(plain.pop("flop"), 1.0)
            assert count == plain
            if phase == "discriminator":  # all of it has a backward and no output matrix
                assert more == pytest.approx(4 / 3)


@pytest.mark.gpu
def test_real_widths_on_a_card():
    shape = Shape(prompt=64, response=16, teacher=16, rollouts=4)
    sizes = widths(1)
    rows = measure(
        shape, sizes, draw_weights(sizes, "cuda"), device="cuda", dtype=torch.bfloat16, checkpointing=True, rounds=1
    )
    assert [row.status for row in rows] == ["ok"] * 3, rows
