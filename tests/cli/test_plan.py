"""The plan's numbers against real models, optimizers, caches and steps."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, Qwen3VLConfig

from prism_fast.algorithms.presets import policy_options
from prism_fast.config import ConfigError, OptimizerConfig, load_config
from prism_fast.data.digit_sizes import DigitsSpec
from prism_fast.data.digits import tokenizer_corpus, write_digits
from prism_fast.data.readers import read_tasks
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.packing import PromptGroup
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.token_budget import TokenBudget
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.plan import CARDS, DEFAULT_TOKENS, adamw_bytes, discriminator_tokens, make_plan
from prism_fast.train.layouts import plan_batches, use_layout
from prism_fast.train.scored_group import ScoredGroup
from tests.models.test_sizes import kept_bytes
from tests.support.trainers import discriminate


@pytest.fixture
def config(policy_folder):
    return load_config("digits", [f"model.policy={policy_folder}"])


@pytest.fixture(scope="session")
def prompt(processor):
    """An image and a question."""
    content = [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]
    return processor.encode_prompt([{"role": "user", "content": content}], [Image.new("RGB", (128, 128), "red")])


def part(plan, stage: str, phase: str, name: str) -> int:
    made = next(s for s in plan.stages if s.stage == stage)
    found = next(p for p in made.phases if p.name == phase)
    return next(c.bytes for c in found.components if c.name == name)


def planned(config, prompt, processor):
    images = prompt.input_ids.count(processor.image_token_id)
    assert 10 < images < len(prompt.input_ids)
    return make_plan(config, prompt_tokens=len(prompt.input_ids), image_tokens=images)


def test_parameters_of_the_tiny_models_are_exact(processor):
    vocabulary = len(processor.tokenizer)
    plan = make_plan(load_config("digits", [f"model.tiny.vocab_size={vocabulary}", "model.tiny.num_layers=3"]))
    policy = build_tiny_policy(processor, TinyPolicy(num_layers=3), 1)
    discriminator = build_discriminator(policy, seed=1)
    for size, model in ((plan.policy, policy), (plan.discriminator, discriminator)):
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert size.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
        assert size.tensors == len(list(model.parameters()))
        assert size.master_bytes == 0 and size.gradient_bytes == size.weight_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_bytes_are_those_of_the_engines_optimizer(policy, config, dtype):
    config.model.dtype = dtype
    plan = make_plan(config)
    dense = copy.deepcopy(policy).to(getattr(torch, dtype))
    for size, model in ((plan.policy, dense), (plan.discriminator, build_discriminator(dense, seed=1))):
        engine = LocalEngine(model, OptimizerConfig())
        engine.backward(sum(p.sum() for p in model.parameters()))
        assert all(p.grad is None for p in model.parameters() if p.dtype == torch.bfloat16)
        assert sum(master.grad.nbytes for master in engine.masters.values()) == size.gradient_bytes
        own = {id(p) for p in model.parameters()}
        assert sum(m.nbytes for m in engine.masters.values() if id(m) not in own) == size.master_bytes
        engine.step()
        states = [t for state in engine.optimizer.state.values() for t in state.values()]
        assert sum(t.nbytes for t in states) == adamw_bytes(size)
        if dtype == "bfloat16":
            beside = size.master_bytes + size.gradient_bytes + adamw_bytes(size) - 4 * size.tensors
            assert beside == pytest.approx(16 * size.parameters, rel=1e-3), "the float32 head has no master"
    held = [c for c in plan.stages[-2].phases[0].components if "optimizer" in c.name]
    assert [c.bytes for c in held] == [adamw_bytes(plan.policy), adamw_bytes(plan.discriminator)]


def test_a_folder_with_nothing_but_its_configuration_is_enough(policy, policy_folder, tmp_path):
    shutil.copy(policy_folder / "config.json", tmp_path)
    plan = make_plan(load_config("digits", [f"model.policy={tmp_path}"]))
    assert plan.policy.parameters == sum(p.numel() for p in policy.parameters())


def test_a_discriminator_folder_is_planned_as_it_is(policy, policy_folder, discriminator_folder):
    folders = [f"model.policy={policy_folder}", f"model.discriminator={discriminator_folder}"]
    plan = make_plan(load_config("digits", [*folders, "warmup.upcycle.num_experts=7"]))
    assert plan.discriminator.parameters == sum(p.numel() for p in build_discriminator(policy, seed=1).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_of_a_rollout_is_a_real_cache(policy, config, dtype):
    config.model.dtype = str(dtype).removeprefix("torch.")
    config.align.prompts, config.align.rollout = 2, replace(config.align.rollout, n=3, max_new_tokens=4)
    plan = make_plan(config, prompt_tokens=5)
    model = copy.deepcopy(policy).to(dtype)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model.language_model(input_ids=torch.zeros(6, 9, dtype=torch.int64), past_key_values=cache)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert part(plan, "align", "rollout", "KV cache") == sum(t.numel() * t.element_size() for t in tensors)
    growth = part(plan, "align", "rollout", "KV cache growth")
    assert growth == tensors[0].numel() * tensors[0].element_size()


def test_vllm_has_all_of_its_cache_and_its_own_weights(policy, config):
    config.rollout = replace(config.rollout, engine="vllm", tokens_in_flight=5000)
    plan, text = make_plan(config), policy.config.text_config
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    for stage in ("align", "rlvr"):
        assert part(plan, stage, "rollout", "KV cache") == (5000 + 1024) * token
        assert part(plan, stage, "rollout", "vLLM weights") == sum(p.nbytes for p in policy.parameters())


def test_dynamic_sampling_may_generate_a_multiple_at_once(config):
    one = part(make_plan(config), "rlvr", "rollout", "KV cache")
    config.rlvr.dynamic_sampling = replace(config.rlvr.dynamic_sampling, enabled=True, max_oversampling=2.5)
    assert part(make_plan(config), "rlvr", "rollout", "KV cache") == 2.5 * one


@pytest.mark.parametrize("lengths", [(7, 11), (18,)])
def test_discriminator_tokens_are_those_of_distinct_spans(prompt, lengths):
    n, ids = 5, iter(range(10_000))

    def framed():
        return tuple(tuple(next(ids) for _ in range(length)) for length in lengths)

    groups = [ScoredGroup(prompt, framed(), [framed() for _ in range(n)]) for _ in range(3)]
    for layout in ("shared_prefix", "padded"):
        computed = discriminator_tokens(3, n, len(prompt.input_ids), sum(lengths), spans=len(lengths), layout=layout)
        prompts = [1 if layout == "shared_prefix" else len(group.spans()) for group in groups]
        spans = sum(len(span) for group in groups for span in group.spans())
        assert computed == sum(prompts) * len(prompt.input_ids) + spans


def test_whole_responses_cost_one_prompt_each(config):
    config.layout = "padded"
    align = make_plan(config, prompt_tokens=11).stages[-2]
    config.align.discriminate = "response"
    whole = make_plan(config, prompt_tokens=11).stages[-2]
    responses = config.align.prompts * (config.align.rollout.n + 1)
    assert align.stage == "align"
    assert align.tokens["discriminator"] - whole.tokens["discriminator"] == 11 * responses


def test_tokens_per_step_at_the_limits(config):
    config.align.prompts, config.align.rollout = 3, replace(config.align.rollout, n=5, max_new_tokens=7)
    stage = next(s for s in make_plan(config, prompt_tokens=11).stages if s.stage == "align")
    generated = {"prompts read": 3 * 11, "tokens generated": 3 * 5 * 7}
    assert stage.tokens == generated | {"policy update": 3 * (11 + 5 * 7), "discriminator": 3 * (11 + 6 * 7)}
    config.layout = "padded"
    stage = next(s for s in make_plan(config, prompt_tokens=11).stages if s.stage == "align")
    repeated = {"policy update": 3 * 5 * (11 + 7), "discriminator": 3 * (2 * 6 * 11 + 6 * 7)}
    assert stage.tokens == generated | repeated


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_a_real_policy_micro_batch_keeps_what_is_planned(policy, processor, config, prompt, layout):
    response, n = 60, 3
    config.layout = layout
    config.align.prompts, config.align.rollout = 2, replace(config.align.rollout, n=n, max_new_tokens=response)
    config.align.tokens_per_micro_batch = 2 * n * (len(prompt.input_ids) + response)
    plan = planned(config, prompt, processor)
    model = copy.deepcopy(policy)
    use_layout(layout, model)
    groups = [PromptGroup(p, [[5] * response] * n) for p in (prompt, copy.copy(prompt))]
    step = plan_batches(layout, model.model, groups, config.align.tokens_per_micro_batch, pad_id=processor.pad_id)
    assert len(step.micro_batches) == 1

    def learn() -> Tensor:
        computed = step.forward(step.micro_batches[0])
        hidden, predict = computed.hidden.index_select(0, computed.predict.index), computed.predict
        advantage = torch.ones(len(predict.cu_seqlens) - 1)
        options = policy_options("prism", max_response=response)
        return model.lm_head.policy_loss(hidden, predict.target, advantage, predict.cu_seqlens, options=options)[0]

    kept = kept_bytes(model, learn)
    names = ("policy activations", "vision activations", "gradients formed in the output head")
    assert kept == pytest.approx(sum(part(plan, "align", "policy update", name) for name in names), rel=0.03)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_a_real_discriminator_micro_batch_keeps_what_is_planned(policy, processor, config, prompt, layout):
    n, response = 3, 60
    config.layout = layout
    config.align.prompts, config.align.rollout = 2, replace(config.align.rollout, n=n, max_new_tokens=response)
    # Room for one packed group; a padded one is larger than that and stands alone.
    budget = len(prompt.input_ids) + (n + 1) * response
    config.align.discriminator.tokens_per_micro_batch = budget
    plan = planned(config, prompt, processor)
    model = build_discriminator(policy, seed=1)
    use_layout(layout, model.backbone)
    ids = iter(range(256))

    def pair():
        return (next(ids),) * (response - 1), (next(ids),)

    groups = [ScoredGroup(prompt, pair(), [pair() for _ in range(n)])]
    losses, engine = [], LocalEngine(model, OptimizerConfig())
    engine.packing_checked = True
    engine.backward = lambda loss, **made_of: losses.append(loss)  # kept alive, never gone backward
    limit = TokenBudget(budget, notify=pytest.fail)
    options = {"learn": True, "layout": layout, "pad_id": processor.pad_id}
    kept = kept_bytes(model, lambda: discriminate(engine, groups, limit, **options))
    names = ("discriminator activations", "vision activations")
    computed = sum(part(plan, "align", "discriminator update", name) for name in names)
    assert losses and kept == pytest.approx(computed, rel=0.03)


def test_scores_are_planned_a_wave_at_a_time(config):
    config.model.policy = "tiny"
    config.model.tiny.vocab_size = 1 << 20
    config.rlvr.rollout.max_new_tokens = 255
    for rows, wave in ((1, 255), (2, 256)):  # a CPU takes 256 rows at once where 64 MiB hold fewer
        config.rlvr.tokens_per_micro_batch = rows * 256
        plan = make_plan(config, prompt_tokens=1)
        assert part(plan, "rlvr", "policy update", "scores of the vocabulary, one wave") == wave << 22


@pytest.fixture(scope="session")
def folder_of_4b(tmp_path_factory):
    """The configuration of Qwen3-VL-4B, without weights."""
    folder = tmp_path_factory.mktemp("4b")
    text = {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [5, 11, 17]}
    Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def test_a_card_is_told_whether_the_published_recipe_fits(invoke, invoke_json, folder_of_4b):
    """Under bfloat16 there are 16 bytes beside the 2 of each weight: master 4, moments 8, gradient 4."""
    wanted = ["rlvr_grpo", f"model.policy={folder_of_4b}", "model.dtype=bfloat16"]
    shown = invoke_json("plan", *wanted, "--card", "h200")
    parts = {part["name"]: part["bytes"] for part in shown["stages"][0]["phases"][1]["components"]}
    count = shown["policy"]["parameters"]
    assert count == 4_437_815_808 and parts["policy weights"] == 2 * count
    assert parts["policy masters"] == parts["policy gradients"] == 4 * count
    assert 8 * count < parts["policy optimizer"] < 8 * count + 10_000
    assert shown["device"] == "cuda" and shown["card_bytes"] == CARDS["h200"] == 139 << 30
    for checkpointing, card, fits in (("true", "h200", True), ("false", "h200", False), ("true", "h100", False)):
        told = [*wanted, f"model.gradient_checkpointing={checkpointing}", "--card", card]
        made = invoke_json("plan", *told)
        assert made["fits"] is fits
        assert fits == (max(stage["peak_bytes"] for stage in made["stages"]) <= made["card_bytes"] * 0.95)
        text = " ".join(invoke("plan", *told)[1].split())
        assert f"It {'fits' if fits else 'does not fit'} on {card}, " in text
        assert ("rlvr, policy update: " in text and "Less takes: model.gradient_checkpointing=true" in text) is not fits
        # It helps where a rollout is too large, and no update.
        assert ("a smaller rollout.tokens_in_flight" in text) == ("rlvr, rollout: " in text) == (card == "h100")


def test_a_recipe_for_long_answers_is_not_planned_with_the_tiny_policy(command, folder_of_4b, invoke):
    code, message = command("plan", "rlvr_grpo")
    assert code == 1 and "rlvr.rollout.max_new_tokens=8192 after a prompt of 1 tokens of text or more" in message
    assert "the tiny policy" in message and "model.policy=PATH" in message
    assert invoke("plan", "rlvr_grpo", f"model.policy={folder_of_4b}")[0] == 0
    for images, code in ((1000, 0), (0, 1)):  # images take fewer positions than tokens, texts as many
        line = ["plan", "digits", "--prompt-tokens", 4050, "--image-tokens", images]
        assert command(*line)[0] == code


def test_without_a_card_nothing_is_said_and_an_unknown_one_is_refused(config, invoke_json):
    shown = invoke_json("plan", "digits")
    assert shown["card"] is shown["card_bytes"] is shown["fits"] is None
    with pytest.raises(ConfigError, match=r"--card must be one of a100, h100, h200, b200, got 'h300'"):
        make_plan(config, card="h300")


def test_peaks_and_sums_add_up(config, invoke_json, policy_folder):
    plan = make_plan(config, prompt_tokens=100)
    shown = invoke_json("plan", "digits", f"model.policy={policy_folder}", "--prompt-tokens", 100)
    assert shown == json.loads(plan.as_json())
    assert [s["stage"] for s in shown["stages"]] == ["sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr"]
    for stage in shown["stages"]:
        for phase in stage["phases"]:
            assert phase["bytes"] == sum(c["bytes"] for c in phase["components"]) > 0
        assert stage["peak_bytes"] == max(phase["bytes"] for phase in stage["phases"])
    assert shown["prompt_tokens"] == 100 and shown["image_tokens"] == 50


def test_what_a_stage_does_not_do_is_not_planned(config):
    config.stages = ["rlvr"]
    config.data.source = "files"
    plan = make_plan(config)
    assert plan.discriminator is None
    assert [[phase.name for phase in stage.phases] for stage in plan.stages] == [["rollout", "policy update"]]
    config.stages, config.data.pairs = ["warmup"], "pairs.jsonl"
    assert [phase.name for phase in make_plan(config).stages[0].phases] == ["update"]


def test_tables_state_the_assumptions(invoke):
    code, shown = invoke("plan", "digits")
    assert code == 0
    shown = " ".join(shown.split())  # wrapped at the width of whatever terminal there is
    for text in (
        "1,330,144",
        "peak of the stage",
        "KV cache",
        "tokens per step",
        "with model.gradient_checkpointing",
        "assumed",
    ):
        assert text in shown, text


def test_assumed_lengths_of_the_built_in_dataset_hold(tmp_path):
    spec = DigitsSpec(sft_images=20, sft_val_images=2, align_tasks=24, rlvr_tasks=8, eval_images=2)
    files = write_digits(tmp_path / "digits", spec, seed=3)
    processor = Processor.build(train_tokenizer(tokenizer_corpus(files), 2048))
    tasks = read_tasks(files.align, require_teacher=True)
    prompts = [processor.encode_prompt(task.messages, task.images) for task in (tasks[i] for i in range(len(tasks)))]
    assumed, images = DEFAULT_TOKENS["digits"]
    assert 0.8 * assumed <= max(len(p.input_ids) for p in prompts) <= 1.3 * assumed
    assert max(p.input_ids.count(processor.image_token_id) for p in prompts) <= images


def test_wrong_models_and_lengths_are_named(config, policy_folder, discriminator_folder, tmp_path):
    cases = [
        (["model.policy=nowhere"], {}, r"model.policy: nowhere.config.json does not exist"),
        ([f"model.policy={discriminator_folder}"], {}, "'qwen3_vl_moe' model, but a policy must be 'qwen3_vl'"),
        ([f"model.policy={policy_folder}", f"model.discriminator={policy_folder}"], {}, "must be 'qwen3_vl_moe'"),
        ([], {"prompt_tokens": 0}, "1 <= prompt tokens"),
        ([], {"prompt_tokens": 10, "image_tokens": 11}, "image tokens <= prompt tokens"),
    ]
    (tmp_path / "config.json").write_text("[]")
    cases.append(([f"model.policy={tmp_path}"], {}, "does not name a model_type"))
    for overrides, lengths, message in cases:
        with pytest.raises(ConfigError, match=message):
            make_plan(load_config("digits", overrides), **lengths)
