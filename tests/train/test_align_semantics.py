"""What is scored (spans or whole responses) and by which equations (``released``, ``paper``, ``prism_fast``)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.presets import PRESETS
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import ConfigError, load_config
from prism_fast.data.samples import Pair
from prism_fast.report.html import write_report
from prism_fast.report.rundir import read_rollouts
from prism_fast.rewards import Reward
from prism_fast.track.metrics import reproducible
from prism_fast.train.align import step_advantage
from prism_fast.train.context import losses_in_force
from prism_fast.train.discriminator_trainer import DiscriminatorLoss, discriminator_loss_of
from prism_fast.train.warmup import group_pairs

CAPTION, REASONING = [1.0, 3.0, 14.0, 0.0, 2.0], [5.0, -2.0, 0.5, 0.0, 7.0]
VALID = [True, True, True, False, True]  # the last one has no rival


def rollouts():
    return SimpleNamespace(
        tasks=range(2),
        group=torch.tensor([0, 0, 0, 0, 1]),
        splits=[SimpleNamespace(valid=v) for v in VALID],
        rewards=[Reward(float(v), float(v), float(v), "rule") for v in VALID],
    )


def advantage(*overrides: str, columns=(CAPTION, REASONING)) -> torch.Tensor:
    return step_advantage(load_config("digits", overrides), rollouts(), torch.tensor(columns).T)[0]


def standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std()


def test_on_paper_the_weighted_sum_is_normalised_without_clamp_and_penalty():
    combined = 0.3 * torch.tensor(CAPTION[:3]) + 0.7 * torch.tensor(REASONING[:3])
    found = advantage("semantics=paper", "align.weights=[0.3,0.7]")
    torch.testing.assert_close(found[:3], standardised(combined))
    assert found[3:].tolist() == [0.0, 0.0], "the equations know no invalid response, and a single one has no deviation"


def test_by_default_each_score_is_clamped_and_normalised_by_itself():
    caption, reasoning = torch.tensor([1.0, 3.0, 10.0]), torch.tensor(REASONING[:3])
    found = advantage("align.weights=[0.3,0.7]")
    wanted = 0.3 * standardised(caption) + 0.7 * standardised(reasoning)
    torch.testing.assert_close(found[:3], wanted, rtol=1e-5, atol=1e-5)
    assert found[3:].tolist() == [-1.5, 0.0]


def test_as_released_an_invalid_response_takes_part_and_a_single_one_keeps_its_score():
    caption, reasoning = torch.tensor([1.0, 3.0, 10.0, 0.0]), torch.tensor([*REASONING[:3], -3.0])
    found = advantage("semantics=released", "align.weights=[0.3,0.7]")
    wanted = 0.3 * standardised(caption) + 0.7 * standardised(reasoning) - torch.tensor([0.0, 0.0, 0.0, 1.5])
    torch.testing.assert_close(found[:4], wanted, rtol=1e-5, atol=1e-5)
    assert found[4] == pytest.approx(0.3 * 2.0 + 0.7 * 7.0, rel=1e-5)


def test_a_whole_response_has_one_score_and_its_advantage():
    found = advantage("align.discriminate=response", columns=(REASONING,))
    torch.testing.assert_close(found[:3], standardised(torch.tensor(REASONING[:3])), rtol=1e-5, atol=1e-5)
    assert found[3:].tolist() == [-1.5, 0.0]


@pytest.mark.parametrize("semantics", ["paper", "prism_fast"])
def test_equal_scores_teach_nothing(semantics):
    found = advantage(f"semantics={semantics}", columns=([0.9] * 5, [0.7] * 5))
    assert found[[0, 1, 2, 4]].tolist() == [0.0] * 4


def test_the_recipe_may_give_what_the_semantics_leaves_open():
    assert discriminator_loss_of(load_config("digits")) == DiscriminatorLoss("prism_fast", 10.0, 0.001)
    paper = load_config("digits", ["semantics=paper"])
    assert discriminator_loss_of(paper) == DiscriminatorLoss("paper", None, 0.0)
    key = "align.discriminator"
    given = [f"{key}.score_clip=4", f"{key}.score_reg=0.5", f"{key}.length_penalty=0.1", "align.format_penalty=0.25"]
    for semantics in SEMANTICS:
        found = discriminator_loss_of(load_config("digits", [f"semantics={semantics}", *given]))
        assert found == DiscriminatorLoss(semantics, 4.0, 0.5, length_penalty=0.1)
    assert discriminator_loss_of(load_config("digits", [f"{key}.spread=0.2"])).spread == 0.2
    assert advantage("semantics=paper", *given)[3] == -0.25


def test_the_printed_loss_is_the_plain_one(generator):
    teacher, student = (8 * torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (2, 6))
    teacher[0, 0], group = 30.0, torch.tensor([0, 0, 0, 1, 1, 1])
    valid = torch.tensor([True, True, False, True, True, True])
    found = {}
    for semantics in SEMANTICS:
        options = discriminator_loss_of(load_config("digits", [f"semantics={semantics}"]))
        terms = {"semantics": semantics, "score_clip": options.score_clip, "score_reg": options.score_reg}
        found[semantics] = float(discriminator_loss(teacher, student, group, valid, **terms)[0])

    def bradley_terry(clip: float) -> torch.Tensor:
        t, s = teacher.clamp(-clip, clip), student.clamp(-clip, clip)
        return -logsigmoid(t[group] - s)[valid].mean(0).sum()

    assert found["paper"] == pytest.approx(float(bradley_terry(1e9)), rel=1e-12)
    t, s = teacher.clamp(-10, 10), student.clamp(-10, 10)
    ours = 0.001 * torch.cat((t, s)).square().mean()
    published = 0.001 * torch.cat((t[group], s)).square().mean()  # the teacher's squares once per student
    assert found["prism_fast"] == pytest.approx(float(bradley_terry(10) + ours), rel=1e-12)
    assert found["released"] == pytest.approx(float(bradley_terry(10) + published), rel=1e-12)
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["semantics=released", "align.discriminate=response"], "'spans' with semantics=released"),
        (["semantics=paper", "align.advantage=rlvr"], "'default' with semantics=paper"),
        (["align.discriminate=response", "align.weights=[0.3,0.7]"], "align.weights must be left out: one score"),
        (["align.discriminate=whole"], "align.discriminate"),
        (["align.discriminator.score_clip=0"], "score_clip must be positive"),
        (["align.discriminator.score_reg=-1"], "score_reg must be 0 or more"),
        (["semantics=released", "align.discriminator.spread=0.1"], "spread must be 0 with semantics=released"),
        (["align.discriminator.length_penalty=-1"], "length_penalty must be 0 or more"),
        (["semantics=papr"], "semantics"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", overrides)


def test_pairs_without_the_asked_texts_are_named():
    encoder = SimpleNamespace(encode_prompt=lambda messages, images: SimpleNamespace(input_ids=(), pixel_values=None))
    with pytest.raises(ValueError, match="'p1' has no teacher_response: align.discriminate=response scores whole"):
        group_pairs([Pair("p1", [], [], "a", "b", "c", "d")], encoder, "prism_fast", ("response",))


def metrics(folder, stage: str) -> list[dict]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def warm(finished) -> list[str]:
    """Overrides that begin with what a finished run has exported."""
    export = finished / "export"
    return [
        f"model.policy={export / 'sft'}",
        f"model.discriminator={export / 'discriminator-warmup'}",
        "data.eval=null",
    ]


def test_whole_responses_from_warm_up_to_report(finished, run_again, tmp_path):
    first, _ = warm(finished)[:2]
    folder = run_again(
        tmp_path / "run", first, "data.eval=null", "stages=[warmup,align]", "align.discriminate=response"
    )
    pairs = [json.loads(line) for line in (folder / "data" / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["student_response"].strip().startswith("<caption>") for pair in pairs)
    heldout = [line for line in metrics(folder, "warmup") if "warmup/heldout_margin_response" in line]
    assert heldout, "the held-out margin is that of whole responses"
    steps = metrics(folder, "align")
    valid = [line for line in steps if "score/response" in line]
    assert valid and all(
        {"disc/margin_response", "disc/acc_response", "disc/pairs_response"} <= set(line) for line in valid
    )
    assert all("disc/ties_response" in line and "disc/tokens" in line for line in steps)
    assert not [key for line in [*steps, *heldout] for key in line if key.endswith(("_caption", "_reasoning"))]
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Held-out margin of the discriminator at the end of its warm-up: response" in page
    assert "disc/margin_caption" not in page
    records = [r for r in read_rollouts(folder / "rollouts" / "align.jsonl.zst", []) if r["valid"]]
    assert records and all(set(r["scores"]) == set(r["teacher_scores"]) == {"response"} for r in records)


@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_the_stage_runs_under_other_semantics(finished, run_again, tmp_path, semantics):
    folder = run_again(tmp_path / "run", *warm(finished), "stages=[align]", f"semantics={semantics}", "align.steps=1")
    (step,) = metrics(folder, "align")
    assert step["disc/grad_norm"] > 0 and "disc/margin_caption" in step


def test_the_published_warm_up_has_no_clamp_no_regulariser_and_no_balance(finished, run_again, tmp_path):
    released, given = ["semantics=released"], ["align.discriminator.score_clip=3", "align.discriminator.score_reg=0.5"]
    for overrides, expected in ((released, (None, 0.0)), ([*released, *given], (3.0, 0.5)), ([], (10.0, 0.001))):
        options = discriminator_loss_of(load_config("digits", overrides), warmup=True)
        assert (options.score_clip, options.score_reg) == expected
        assert (options.aux_coef == 0.0) == ("semantics=released" in overrides)
    shared = [warm(finished)[0], "data.eval=null", "stages=[warmup]", *released]
    lines = []
    for coef in (0.0, 50.0):
        folder = run_again(tmp_path / str(coef), *shared, f"warmup.aux_coef={coef}")
        lines.append([reproducible(line) for line in metrics(folder, "warmup")])
    assert lines[0] == lines[1] and "warmup/loss" in lines[0][-1]


@pytest.mark.parametrize("mode", ["spans", "response"])
def test_a_step_without_a_valid_rollout_leaves_the_discriminator_as_it_is(finished, run_again, tmp_path, mode):
    cut = ["align.rollout.max_new_tokens=3", "align.steps=1", f"align.discriminate={mode}"]
    folder = run_again(tmp_path / "run", *warm(finished), "stages=[align]", *cut)
    (step,) = metrics(folder, "align")
    assert step["reward/format"] == 0.0 and step["policy/rows"] == 0
    assert not {"disc/loss", "disc/grad_norm", "policy/grad_norm"} & set(step), "nothing was learnt, nothing is shown"
    assert not [key for key in step if key.startswith(("disc/margin", "disc/acc", "disc/pairs", "score/"))]
    before, after = (
        load_file(f / "model.safetensors")
        for f in (finished / "export" / "discriminator-warmup", folder / "export" / "discriminator")
    )
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_further_updates_of_the_discriminator_follow_the_one_that_gave_the_rewards(finished, run_again, tmp_path):
    """The first of a step's updates is the pass that gave the rewards; the policy sees the rest in the next step."""
    lines = {}
    for updates in (1, 3):
        more = ["stages=[align]", "align.steps=2", f"align.discriminator.updates={updates}"]
        folder = run_again(tmp_path / str(updates), *warm(finished), *more)
        lines[updates] = [reproducible(line) for line in metrics(folder, "align")]
    (first, second), (same, other) = lines[1], lines[3]
    for key in ("disc/tokens", "passes/discriminator_learned", "passes/discriminator_images"):
        assert same.pop(key) == 3 * first.pop(key)
    assert same == first and first["passes/discriminator_without_gradient"] == 0
    assert second["policy/tokens"] > 0 and other["score/caption"] != second["score/caption"]


def test_the_losses_in_force_are_resolved_from_flags_and_semantics():
    """What environment.json and the report's head say: followed from a flag to the terms that act."""
    config = load_config("digits", ["rlvr.loss=dr_grpo", "align.discriminator.length_penalty=0.25"])
    assert losses_in_force(config) == {
        "align.loss": "preset prism: grpo, clip 0.2/0.2, dual clip 3.0, aggregation token_mean",
        "align.discriminator": "semantics prism_fast, score clip 10.0, score reg 0.001, length penalty 0.25, "
        "spread 0.0, aux coef 0.0",
        "rlvr.loss": "preset dr_grpo: dr_grpo, clip 0.2/0.2, aggregation seq_mean_token_sum_norm, length 96.0, rewards "
        "normalised mean_only",
    }
    assert losses_in_force(load_config("digits", ["stages=[sft]"])) == {}
    for preset in PRESETS:
        config = load_config("digits", ["stages=[rlvr]", f"rlvr.loss={preset}"])
        assert losses_in_force(config)["rlvr.loss"].startswith(f"preset {preset}: {PRESETS[preset]['loss']}, ")
    sapo = losses_in_force(load_config("digits", ["rlvr.loss=sapo", "semantics=paper"]))
    assert "temperatures 1/1.05" in sapo["rlvr.loss"] and "score clip None" in sapo["align.discriminator"]
