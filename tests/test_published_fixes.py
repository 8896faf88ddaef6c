"""Every known fault of the published implementation: what it does, and what the default semantics does instead.

One test per fault, numbered as in FAULTS; POINTERS names the tests elsewhere that show more, or all, of one.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from torch.utils.data import RandomSampler
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from prism_fast.algorithms.alignment_loss import discriminator_loss
from prism_fast.algorithms.presets import policy_options
from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import ConfigError, OptimizerConfig, load_config
from prism_fast.data.framing import frame_student, frame_teacher
from prism_fast.data.grammar import split_tokens
from prism_fast.data.order import SampleOrder
from prism_fast.data.problems import DataError
from prism_fast.data.readers import read_pairs, read_tasks
from prism_fast.data.samples import Task
from prism_fast.data.writers import write_tasks
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import (
    HEAD_KEY,
    build_discriminator,
    save_discriminator,
)
from prism_fast.models.forward import collate
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.ops import group_advantage, policy_loss
from prism_fast.released.losses import FALLBACK
from prism_fast.rewards import AnswerChecker, Judged
from prism_fast.rollout.protocol import Completion
from prism_fast.train.policy_trainer import PolicyBatch
from prism_fast.train.scored_group import ScoredGroup
from tests.ops.golden import group_ids, load
from tests.support.small_policy import SMALL
from tests.support.trainers import score_and_learn, update_policy

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
FAULTS = {
    1: "teacher cut at 512 tokens",
    2: "last token tells teacher from student",
    3: "plain positions for image tokens",
    4: "teacher's end found by searching for end tokens",
    5: "dropout in the score head",
    6: "scores in bfloat16",
    7: "losses normalised per micro-batch",
    8: "loss on teacher scores alone where no response is valid",
    9: "placeholder accuracy, losses scaled and then averaged",
    10: "invalid responses are computed and regularised",
    11: "invalid responses score one raw unit below the worst valid one",
    12: "a group without a valid response is pushed down",
    13: "old log-probs computed and then ignored",
    14: "clip ranges without effect",
    15: "whole-response mode and vectorised GRPO crash",
    16: "warm-up: wrong token, dead balance loss, dummy data, neighbours for bad images",
    17: "a missing score head is drawn at random",
    18: "the first answer anywhere is graded",
    19: "exceptions in rewards and filters are swallowed",
    20: "no seeds",
    21: "dynamic sampling ends the run and throws surplus away",
    22: "first update of a warm-up has learning rate 0",
    23: "the sample's extra information is written to",
    24: "the discriminator's export loses its head",
    25: "images resized twice",
    26: "a loss divided by the width of the padding",
}
POINTERS = {
    7: ["train/test_micro_batches.py::test_discriminator", "train/test_micro_batches.py::test_policy"],
    9: ["released/test_losses.py::test_released_vectors"],
    11: ["train/test_align_parts.py::test_an_invalid_response_does_not_squeeze_the_valid_ones"],
    12: ["train/test_align_parts.py::test_a_group_without_a_valid_response_has_nothing_to_compare"],
    14: ["train/test_rlvr_stale.py::test_stale_rows_follow_the_clipped_objective_and_fresh_ones_have_ratio_one"],
    15: ["train/test_align_semantics.py::test_whole_responses_from_warm_up_to_report"],
    16: [
        "models/test_discriminator_vectors.py::test_published_index_is_wrong_exactly_when_the_first_row_is_the_longest",
        "models/test_discriminator_vectors.py::test_warm_up_forward_with_the_published_choice_of_token",
    ],
    17: ["models/test_discriminator.py::test_a_missing_head_is_an_error_where_the_published_loader_draws_one"],
    18: [
        "rewards/test_differences.py::test_published_grades_the_first_of_several_answers_ours_none",
        "data/test_grammar.py::test_answer_is_read_from_the_third_section_only",
    ],
    19: [
        "rewards/test_differences.py::test_published_swallows_errors_ours_counts",
        "rewards/test_checker.py::test_a_timeout_is_a_reward_and_the_next_answer_is_checked",
        "rewards/test_judge.py::test_a_question_without_a_verdict_is_counted_and_not_remembered",
    ],
    20: [
        "data/test_order.py::test_epochs_and_seeds_differ_and_steps_do_not_matter",
        "models/test_discriminator.py::test_the_seed_decides_the_head",
        "models/test_upcycle.py::test_the_seed_alone_decides",
        "models/test_policy.py::test_the_seed_alone_decides_the_weights_and_global_random_state_is_untouched",
        "train/test_pipeline.py::test_one_seed_one_result_to_the_bit",
    ],
    21: [
        "train/test_rlvr_sampler.py::test_the_published_bound_ends_the_run_ours_trains_on_what_was_found",
        "train/test_rlvr_sampler.py::test_the_published_surplus_is_lost_ours_is_the_next_steps",
    ],
    24: ["models/test_discriminator.py::test_round_trip_keeps_every_bit"],
    26: ["ops/test_policy_loss_vectors.py::test_aggregation_vectors"],
}
ELSEWHERE = {11, 12, 17, 18, 19, 21}  # shown whole by the tests pointed to
SIZE = replace(SMALL, vision_depth=1)
RESPONSE = "<caption>\n- digits: 1 2\n</caption>\n<think>\n1+2=3\n</think>\n<answer>\n3\n</answer>"


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_its_test():
    for pointers in POINTERS.values():
        for path, name in (pointer.split("::") for pointer in pointers):
            assert name in functions(TESTS / path), f"{path} has no {name}"
    here = functions(Path(__file__))
    shown = {int(name.split("_")[1]) for name in here if name.split("_")[1:2] and name.split("_")[1].isdigit()}
    assert shown | ELSEWHERE == set(FAULTS) and not shown & ELSEWHERE and set(POINTERS) >= ELSEWHERE


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.build(train_tokenizer([RESPONSE] * 20, 400))


@pytest.fixture(scope="module")
def policy(processor):
    return build_tiny_policy(processor, SIZE, seed=1)


@pytest.fixture
def discriminator(policy):
    return build_discriminator(policy, seed=2, head_std=0.2)


@pytest.fixture(scope="module")
def prompt(processor):
    pixels = np.random.default_rng(4).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "sum?"}]
    return processor.encode_prompt([{"role": "user", "content": content}], [Image.fromarray(pixels)])


def step(discriminator, processor, groups, *, semantics="prism_fast", budget=10**6, aux_coef=0.0, score_reg=0.001):
    """Loss, scores and gradients of one discriminator step."""
    options = {"semantics": semantics, "score_reg": score_reg, "aux_coef": aux_coef, "pad_id": processor.pad_id}
    scores = score_and_learn(discriminator, groups, tokens=budget, layout="padded", **options)
    return scores.loss, scores, {n: p.grad.clone() for n, p in discriminator.named_parameters() if p.grad is not None}


def test_1_long_teacher_texts(processor):
    text = "<think>" + "1+2=3\n" * 600 + "</think><answer>7</answer>"
    published, ours = (frame_teacher("reasoning", text, processor, s) for s in ("released", "prism_fast"))
    assert len(published) == 512 and "<answer>" not in processor.decode(published)
    assert processor.decode(ours) == text and ours[-1] == processor.eos_id


def test_2_equal_texts_are_equal_rows(processor):
    ids = (*processor.encode_text(RESPONSE), processor.eos_id)
    split = split_tokens(ids, processor.tokenizer)
    for span, text in (("caption", split.caption), ("reasoning", split.reasoning)):
        teacher, student = {}, {}
        for semantics in ("released", "prism_fast"):
            teacher[semantics] = frame_teacher(span, text, processor, semantics)
            student[semantics] = frame_student(span, split, ids, processor, semantics)
        assert teacher["released"][-1] != student["released"][-1], "the token at which the score is read gives it away"
        assert teacher["prism_fast"] == student["prism_fast"]


def test_3_positions_of_image_tokens(policy, processor, prompt):
    at_image = torch.tensor(prompt.input_ids) == policy.config.image_token_id
    found = {}
    for semantics in ("released", "prism_fast"):
        positions = SEMANTICS[semantics].positions
        batch = collate([prompt], [0], [(5,)], model_config=policy.config, pad_id=processor.pad_id, positions=positions)
        found[semantics] = batch.position_ids[:, 0, :-1][:, at_image]  # [3, image tokens]
    assert torch.equal(found["released"], found["released"][:1].expand(3, -1)) and len(found["released"].unique()) == 6
    assert [len(axis.unique()) for axis in found["prism_fast"]] == [1, 2, 3], "64x96 pixels are 2 x 3 merged patches"


def test_4_the_end_of_the_teachers_text(processor):
    text = processor.encode_plain("<caption>short</caption>")
    padded = [*text, *[processor.pad_id] * (512 - len(text))]

    def published_length(ends: set[int]) -> int:
        """Up to and with the first end token, all where there is none."""
        return next((place + 1 for place, token in enumerate(padded) if token in ends), len(padded))

    assert published_length({processor.eos_id, processor.pad_id}) == len(text) + 1, "read at the first pad"
    assert published_length({processor.eos_id}) == 512, "pad not among the end tokens: read at the last pad"
    assert frame_teacher("caption", "<caption>short</caption>", processor, "prism_fast") == (*text, processor.eos_id)


def test_5_head_dropout(policy, processor, prompt):
    groups = [ScoredGroup(prompt, ((5, 6), (7,)), [((8,), (9, 10))])]
    gradient = {}
    published = SEMANTICS["released"].head_dropout
    for rate in (published, 0.0):
        model = build_discriminator(policy, seed=2, head_dropout=rate).train()
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            runs.append(step(model, processor, groups)[2]["v_head.1.weight"])
        gradient[rate] = runs
    assert published == 0.1 and not torch.equal(*gradient[0.1])
    assert torch.equal(*gradient[0.0])


def test_6_scores_in_half_precision(discriminator):
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight = discriminator.v_head[1].weight.detach()
    hidden = torch.cat((hidden, hidden + 1e-2 * weight.sign())).bfloat16()  # another state, a slightly higher score
    assert not torch.equal(*hidden)
    scale = 3.0 / discriminator.score_hidden(hidden)[0].abs().item()
    with torch.no_grad():
        discriminator.v_head[1].weight.mul_(scale)
        ours = discriminator.score_hidden(hidden)
        discriminator.head_in_float32 = False
        published = discriminator.v_head.bfloat16()[1](hidden).squeeze(-1)
    assert ours.dtype == torch.float32 and ours[0] != ours[1]
    assert published.dtype == torch.bfloat16 and all(float(64 * score).is_integer() for score in published)
    assert torch.equal(torch.tensor(3.0 + 1 / 128).bfloat16(), torch.tensor(3.0).bfloat16()), "a tie that is none"


def test_7_the_cut_into_micro_batches(discriminator, processor, prompt, generator):
    groups = [
        ScoredGroup(prompt, ((5, 6), (7,)), [((8,), (9, 10)), None]),
        ScoredGroup(prompt, ((11,), (12,)), [((13,), (14,)), ((15,), (16,))]),
    ]
    loss = {
        semantics: [
            step(discriminator, processor, groups, semantics=semantics, budget=budget)[0] for budget in (10**6, 1)
        ]
        for semantics in ("released", "prism_fast")
    }
    assert abs(loss["released"][0] - loss["released"][1]) > 1e-3
    assert loss["prism_fast"][0] == pytest.approx(loss["prism_fast"][1], rel=1e-5)
    # The policy: published, each micro-batch's token mean is weighted by its share of the sequences.
    logp, advantage = torch.randn(10, generator=generator), torch.tensor([1.0, -1.0])
    cuts = [(logp[:1], advantage[:1], torch.tensor([0, 1])), (logp[1:], advantage[1:], torch.tensor([0, 9]))]
    published = sum(float(policy_loss(x, a, c.int(), aggregation="token_mean")[0]) / 2 for x, a, c in cuts)
    count = torch.tensor(10.0)
    ours = sum(float(policy_loss(x, a, c.int(), aggregation="token_mean", denominator=count)[0]) for x, a, c in cuts)
    whole = float(policy_loss(logp, advantage, torch.tensor([0, 1, 10]).int(), aggregation="token_mean")[0])
    assert published == pytest.approx(0.0) and ours == pytest.approx(whole) == pytest.approx(0.8)


def test_8_no_valid_response(generator):
    teacher = torch.randn(2, 2, generator=generator, requires_grad=True)
    student, group, valid = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.bool)
    gradient = {}
    for semantics in ("released", "prism_fast"):
        loss, _ = discriminator_loss(teacher, student, group, valid, semantics=semantics, score_reg=0.0)
        gradient[semantics] = torch.autograd.grad(loss, teacher)[0]
    assert FALLBACK == 0.01 and (gradient["released"] < 0).all(), "descent raises the teacher's scores for nothing"
    assert not gradient["prism_fast"].any()


def test_9_metrics_are_counts_and_true_means(discriminator, processor, prompt):
    cases = {case["name"]: case for case in load("discriminator_loss")["mm_gad_cases"]}
    assert cases["dynamic_batches_all_invalid"]["metrics_per_micro_batch"]["critic/d_acc"] == [0.92]
    logged = cases["dynamic_batches"]["metrics_per_micro_batch"]["critic/d_loss"]
    assert len(logged) == 3 and np.mean(logged) == pytest.approx(sum(logged) / 3), "of parts that add up to the loss"
    groups = [ScoredGroup(prompt, ((5, 6), (7,)), [None, None])]
    _, scores, _ = step(discriminator, processor, groups)
    assert not [n for n in scores.metrics if n.startswith(("disc/margin_", "disc/acc_"))], "no pair, no accuracy"
    groups = [ScoredGroup(prompt, ((i,), (i + 1,)), [((i + 20,), (i + 30,))]) for i in range(3)]
    whole, cut = (step(discriminator, processor, groups, budget=budget)[0] for budget in (10**6, 1))
    assert whole == pytest.approx(cut, rel=1e-5)


def test_10_invalid_responses_cost_nothing(discriminator, processor, prompt, generator):
    framed = ((8,), (9, 10))
    one, many = (ScoredGroup(prompt, ((5, 6), (7,)), [framed, *[None] * n]) for n in (0, 7))
    assert one.spans() == many.spans()
    (loss, _, gradient), (other, _, same) = (
        step(discriminator, processor, [group], score_reg=0.5) for group in (one, many)
    )
    assert loss == other and all(torch.equal(gradient[name], same[name]) for name in gradient)
    teacher, student = torch.zeros(1, 2), torch.zeros(2, 2)
    student[1] = 3.0  # published: the invalid response has scores, and their squares are in the loss
    group, valid = torch.zeros(2, dtype=torch.int64), torch.tensor([True, False])
    options = {"semantics": "released", "score_reg": 0.5}
    with_it, _ = discriminator_loss(teacher, student, group, valid, **options)
    assert with_it > discriminator_loss(teacher, student[:1], group[:1], valid[:1], **options)[0] + 1


def rolled(processor, prompt, policy):
    completions = [Completion((5, 6, 7), (-6.0,) * 3, 1.0, "stop"), Completion((8, 9), (-6.0,) * 2, 1.0, "stop")]
    return PolicyBatch([prompt], [0, 0], completions, torch.tensor([1.0, -0.5]))


def test_13_one_forward_without_old_log_probs(policy, processor, prompt, generator):
    logp = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    arguments = (logp, torch.tensor([1.0, -0.5]), torch.tensor([0, 3, 5], dtype=torch.int32))
    published = torch.autograd.grad(policy_loss(*arguments, old_logp=logp.detach())[0], logp)[0]
    torch.testing.assert_close(torch.autograd.grad(policy_loss(*arguments)[0], logp)[0], published, rtol=1e-12, atol=0)
    forwards = []
    counting = policy.model.language_model.register_forward_hook(lambda *args: forwards.append(args))
    numbers = update_policy(
        LocalEngine(policy, OptimizerConfig(lr=1e-9)),
        rolled(processor, prompt, policy),
        policy_options("prism", max_response=8),
        temperature=1.0,
        pad_id=processor.pad_id,
        budget=TokenBudget(10**6, notify=pytest.fail),
        layout="padded",
    )
    counting.remove()
    assert len(forwards) == 1
    assert numbers["rollout/logprob_gap_mean"] > 0, "what the old log-probs could have shown is measured for nothing"


def test_14_clip_ranges(generator):
    logp = torch.randn(6, generator=generator, requires_grad=True)
    arguments = (logp, torch.tensor([2.0, -2.0]), torch.tensor([0, 3, 6], dtype=torch.int32))
    narrow, wide = {"clip": (1e-6, 1e-6), "dual_clip": 1.5}, {"clip": (0.5, 0.9), "dual_clip": 50.0}
    on_policy = [torch.autograd.grad(policy_loss(*arguments, **o)[0], logp)[0] for o in (narrow, wide)]
    assert torch.equal(*on_policy), "one mini-batch per step, as in every published script"
    old = logp.detach() - 0.4 * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    stale = [torch.autograd.grad(policy_loss(*arguments, old_logp=old, **o)[0], logp)[0] for o in (narrow, wide)]
    assert not torch.equal(*stale), "rows of earlier weights are clipped"


def test_15_modes_that_crash(generator):
    with pytest.raises(ConfigError, match="no whole-response mode"):  # KeyError 'teacher_response' in its first update
        load_config("digits", ["semantics=released", "align.discriminate=response"])
    assert load_config("digits", ["align.discriminate=response"]).align.discriminate == "response"
    crashed = [case for case in load("grpo")["cases"] if case["estimator"] == "grpo_vectorized"]
    refused = [case for case in crashed if case["advantages"] == "raises TypeError"]
    assert refused, "prompts named by strings, as its own trainer names them"
    for case in refused:
        reward = torch.tensor(case["token_level_rewards"]).sum(1, keepdim=True)
        assert group_advantage(reward, group_ids(case["index"]), weights=[1.0]).isfinite().all()
    # Straight-through KL: the value of one form with the gradient of k2.
    assert {case["raises"] for case in load("kl")["cases"] if case["kl_penalty"].endswith("+")} == {
        "NotImplementedError"
    }
    logp = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, generator=generator, dtype=torch.float64)

    def divergence(kl: str) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"ref_logp": other, "kl": kl, "kl_coef": 0.5}
        loss, _ = policy_loss(logp, torch.zeros(1), torch.tensor([0, 6]).int(), **options)
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    for kl in ("k1", "k3"):
        (value, own), (through, gradient) = divergence(kl), divergence(kl + "+")
        torch.testing.assert_close(through, value)
        torch.testing.assert_close(gradient, divergence("k2")[1])
        assert not torch.allclose(own, gradient)


def test_16_warm_up(discriminator, processor, prompt, tmp_path):
    found = []

    def layer(x):
        found.append(x @ torch.ones(3, 3))  # router logits, as the published model collects them
        return found[-1].sum(-1)

    checkpoint(layer, torch.ones(2, 3, requires_grad=True), use_reentrant=True)
    assert not found[0].requires_grad, "with its gradient checkpointing the balance loss has no gradient"
    groups = [ScoredGroup(prompt, ((5, 6), (7,)), [((8,), (9, 10))])]
    _, _, plain = step(discriminator, processor, groups)
    _, _, balanced = step(discriminator, processor, groups, aux_coef=1.0)
    name = "backbone.language_model.layers.0.mlp.gate.weight"
    assert (balanced[name] - plain[name]).norm() > 1e-3 * plain[name].norm()
    with pytest.raises(DataError, match="does not exist"):  # published: 100 made-up text pairs
        read_pairs(tmp_path / "missing.jsonl")
    (tmp_path / "broken.png").write_bytes(b"no image")
    texts = dict.fromkeys(("teacher_caption", "student_caption", "teacher_cot", "student_cot"), "a")
    line = json.dumps({"prompt": "<image>", "image": "broken.png", **texts})
    (tmp_path / "pairs.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match="line 1"):  # published: line 2 in its place
        read_pairs(tmp_path / "pairs.jsonl")[0]


def test_20_one_seed(policy):
    """Published: order of data, noise of the experts, routers and head come from whatever state generators are in."""
    weight = policy.model.language_model.layers[0].mlp.down_proj.weight
    published, ours = [], []
    for state in (1, 2):  # two processes, say
        torch.manual_seed(state)
        np.random.seed(state)
        noisy = weight + 0.01 * torch.randn_like(weight)
        published.append((list(RandomSampler(range(50))), noisy))
        model = build_discriminator(policy, seed=2)
        ours.append((SampleOrder(50, seed=2).next_indices(50), {n: p.detach() for n, p in model.named_parameters()}))
    assert published[0][0] != published[1][0] and not torch.equal(published[0][1], published[1][1])
    assert ours[0][0] == ours[1][0]
    assert all(torch.equal(ours[0][1][name], ours[1][1][name]) for name in ours[0][1])


def test_22_first_update_of_a_warm_up():
    engine = LocalEngine(torch.nn.Linear(2, 1), OptimizerConfig(lr=0.1, warmup_steps=10))
    published = 0.1 * engine.updates / 10
    assert published == 0.0 and engine.lr() == pytest.approx(0.1 / 10)


def test_23_extra_information_is_left_alone(tmp_path):
    task = Task(
        "t", [{"role": "user", "content": "q"}], [], "mm_gad", "4", ("IV",), "q", extra={"index": 3, "deep": "x"}
    )
    write_tasks(tmp_path / "a.parquet", [task])
    (read,) = read_tasks(tmp_path / "a.parquet", require_teacher=False)
    before = dict(read.extra)
    assert before == {"index": 3, "deep": "x"}, "nothing injected: published, num_turns and equivalent_answers"
    with AnswerChecker() as checker:
        checker.score([Judged(RESPONSE, read.ground_truth, read.data_source, read.equivalent_answers)])
    assert read.extra == before and read == task


def test_24_the_export_keeps_the_head(discriminator, processor, tmp_path):
    save_discriminator(discriminator, processor, tmp_path / "ours")
    published = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "ours")  # what its export loads
    published.save_pretrained(tmp_path / "published")
    keys = {}
    for name in ("ours", "published"):
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            keys[name] = set(file.keys())
    assert HEAD_KEY in keys["ours"] and HEAD_KEY not in keys["published"]


def test_25_one_resize(processor):
    limits = {"min_pixels": 32 * 32, "max_pixels": 512 * 512}
    size = (250, 330)  # height, width
    first = smart_resize(*size, factor=2 * 14, **limits)
    published = smart_resize(*first, factor=2 * 16, **limits)
    wanted = smart_resize(*size, factor=2 * 16, **limits)
    assert first == (252, 336) and published != size
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8))
    content = [{"type": "image"}]
    ours = processor.encode_prompt([{"role": "user", "content": content}], [image])
    once = processor.encode_prompt([{"role": "user", "content": content}], [image.resize(wanted[::-1], Image.BICUBIC)])
    twice = image.resize(first[::-1], Image.BICUBIC)
    twice = processor.encode_prompt([{"role": "user", "content": content}], [twice])
    assert (16 * ours.image_grid_thw[0, 1:]).tolist() == list(wanted)
    torch.testing.assert_close(ours.pixel_values, once.pixel_values)
    assert twice.pixel_values.shape != ours.pixel_values.shape or not torch.equal(twice.pixel_values, ours.pixel_values)


def test_26_constant_length(generator):
    logp, advantage = torch.randn(5, generator=generator), torch.tensor([1.0, -2.0])
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    options = policy_options("dr_grpo", max_response=40)
    assert options.norm_length == 40.0, "the longest response of the run, whatever a step's padding"
    widths = [replace(options, norm_length=w) for w in (3.0, 6.0)]
    published = [float(policy_loss(logp, advantage, borders, options=padded)[0]) for padded in widths]
    assert published[0] == pytest.approx(2 * published[1]), "wider padding, smaller loss"
    assert float(policy_loss(logp, advantage, borders, options=options)[0]) == pytest.approx(published[0] * 3 / 40)
