"""Liger's kernels in the trunk give what the stock modules give: hidden states and every gradient, no further from
float64 than the stock modules are."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tests.support.triton_device import DEVICE  # noqa: I001  (repairs the interpreter before kernels are imported)
from transformers import Qwen3VLModel

from prism_fast.models import fused_trunk
from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.forward import collate, hidden_states
from prism_fast.models.fused_trunk import fuse, trunk_kernels, use_fused_trunk
from prism_fast.models.packing import PromptGroup, SharedImages, pack
from tests.support.packed import packed_hidden_states
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.shared_prefix import use_shared_prefix
from tests.support import triton_liger
from tests.support.float64 import Float64Islands
from tests.support.small_policy import SMALL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """Calls of each of Liger's functions, counted."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    triton_liger.prepare(monkeypatch)
    counts, functions = Counter(), fused_trunk.liger()

    def counted(name):
        def apply(*arguments):
            counts[name] += 1
            return getattr(functions, name).apply(*arguments)

        return SimpleNamespace(apply=apply)

    monkeypatch.setattr(fused_trunk, "liger", lambda: fused_trunk.Kernels(*map(counted, functions._fields)))
    return counts


@pytest.fixture(scope="module")
def policy(processor):
    """One layer: the interpreter takes a millisecond or two for each row of each head."""
    return build_tiny_policy(processor, replace(SMALL, num_layers=1, num_heads=2, num_kv_heads=1), seed=11).eval()


@pytest.fixture
def groups(make_prompt, make_rows):
    """An image, and branches of several lengths, one of a single token: positions are no running numbers."""
    first, second, third = make_rows([3, 1, 2])
    image, plain = make_prompt((32, 64), text=""), make_prompt(text="")
    image = replace(image, input_ids=image.input_ids[4:11])  # a line break, the image between its marks, two more
    plain = replace(plain, input_ids=plain.input_ids[:3])
    return [PromptGroup(image, [first, second]), PromptGroup(plain, [third])]


def backbone_of(policy, kind):
    model = build_discriminator(policy, seed=5).backbone if kind == "discriminator" else copy.deepcopy(policy).model
    use_shared_prefix(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # norms start at ones, which hides their weights
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def run(model, groups, upstream, *, packed, pad_id):
    """(hidden states of all rows, gradients by parameter), on the CPU."""
    model.zero_grad(set_to_none=True)
    if packed:
        rows = [row.to(model.device) for row in pack(groups, 10_000, model_config=model.config)]
        assert len(rows) == 1
        images = SharedImages(rows)
        hidden = packed_hidden_states(model, rows[0], images)
    else:
        order = [(g, b) for g, group in enumerate(groups) for b in range(len(group.branches))]
        batch = collate(
            [group.prompt for group in groups],
            [g for g, _ in order],
            [groups[g].branches[b] for g, b in order],
            model_config=model.config,
            pad_id=pad_id,
        ).to(model.device)
        hidden = hidden_states(model, batch)[batch.attention_mask]  # [tokens, H]
    hidden.backward(upstream[: hidden.shape[0]].to(hidden))
    if packed:
        images.finish(rows[0], lambda surrogate: surrogate.backward())
    return hidden.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, exact):
    """Norm of the difference, by what it belongs to."""
    errors = {"hidden": (found[0].double() - exact[0]).norm()}
    return errors | {name: (found[1][name].double() - g).norm() for name, g in exact[1].items()}


def compare(stock, groups, generator, liger, *, checkpointing=False, **options):
    """Hidden states and every gradient of the fused model within twice the stock model's own error."""
    unit, config = torch.finfo(stock.dtype).eps, stock.config.text_config
    fused, exact = copy.deepcopy(stock).to(DEVICE), copy.deepcopy(stock).double()
    fuse(fused)
    fuse(fused)  # idempotent
    tokens = sum(len(g.prompt.input_ids) + len(b) for g in groups for b in g.branches)
    upstream = torch.randn(tokens, config.hidden_size, generator=generator)
    with Float64Islands():
        wanted = run(exact, groups, upstream, **options)
    theirs = run(stock.to(DEVICE), groups, upstream, **options)
    assert not liger
    if checkpointing:
        use_gradient_checkpointing(fused.train())
    ours = run(fused, groups, upstream, **options)
    # Per layer four norms, one rotation, one SwiGLU unless experts take its place; again in a checkpointed backward.
    calls = config.num_hidden_layers * (2 if checkpointing else 1)
    dense = isinstance(stock, Qwen3VLModel)
    assert liger == Counter(rms_norm=4 * calls + 1, rope=calls, swiglu=calls * dense)
    assert ours[1].keys() == theirs[1].keys() == wanted[1].keys() and len(ours[1]) > 40
    allowed, met = distance(theirs, wanted), distance(ours, wanted)
    for name, error in met.items():
        size = (wanted[0] if name == "hidden" else wanted[1][name]).norm()
        assert size > 0 and error <= 2 * allowed[name] + 4 * unit * size, (name, error, allowed[name], size)


@pytest.mark.parametrize(
    ("kind", "dtype", "packed", "checkpointing"),
    [
        ("policy", torch.float32, True, True),
        ("policy", torch.bfloat16, True, False),
        ("policy", torch.float32, False, False),
        ("discriminator", torch.float32, True, False),
    ],
    ids=["policy, checkpointed", "policy, bfloat16", "policy, padded", "discriminator"],
)
def test_hidden_states_and_every_gradient(
    policy, processor, groups, generator, liger, kind, dtype, packed, checkpointing
):
    stock = backbone_of(policy, kind).to(dtype)
    compare(stock, groups, generator, liger, packed=packed, pad_id=processor.pad_id, checkpointing=checkpointing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_wide_heads_on_a_card(processor, make_prompt, make_rows, generator, liger, dtype):
    """Liger has other norm kernels from 32,768 rows on, which q and k of real runs always have."""
    heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "mrope_section": (24, 20, 20)}
    policy = build_tiny_policy(processor, replace(SMALL, hidden_size=256, intermediate_size=640, **heads), seed=3)
    groups = [PromptGroup(make_prompt((64, 64)), make_rows([1200, 900, 1100]))]
    stock = backbone_of(policy, "policy").to(dtype)
    compare(stock, groups, generator, liger, packed=False, pad_id=processor.pad_id)


def test_what_is_put_in_stays_with_the_module_and_leaves_names_and_classes_alone(policy, liger):
    stock = copy.deepcopy(policy)
    fused = copy.deepcopy(policy)
    fuse(fused)
    again = copy.deepcopy(fused)
    assert again.state_dict().keys() == stock.state_dict().keys()
    for (name, a), b, c in zip(stock.named_modules(), fused.modules(), again.modules(), strict=True):
        assert type(a) is type(b) is type(c) and "forward" not in vars(a)
        changed = name.startswith("model.language_model") and name.endswith(("norm", "self_attn", ".mlp"))
        assert ("forward" in vars(b)) == ("forward" in vars(c)) == changed, name
        if changed:
            assert b.forward.__self__ is b and c.forward.__self__ is c  # a copy computes with its own weights


def test_a_second_backward_is_refused(policy, liger):
    model = copy.deepcopy(policy).to(DEVICE)
    fuse(model)
    mlp = model.model.language_model.layers[0].mlp
    out = mlp(torch.randn(2, SMALL.hidden_size, device=DEVICE, requires_grad=True)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.backward()


def test_the_last_norm_does_not_write_over_the_callers_gradient(policy, liger):
    model = copy.deepcopy(policy).to(DEVICE)
    fuse(model)
    x, g = torch.randn(2, 3, SMALL.hidden_size, device=DEVICE)
    kept = g.clone()
    model.model.language_model.norm(x.requires_grad_()).backward(g)
    assert torch.equal(g, kept) and not torch.equal(x.grad, kept)


def test_other_dtypes_activations_and_autocast_are_refused(policy, liger):
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=f"found \\['{dtype}'"):
            fuse(copy.deepcopy(policy).to(dtype))
    mixed = copy.deepcopy(policy)
    mixed.model.language_model.norm.bfloat16()
    with pytest.raises(ValueError, match="all float32 or all bfloat16"):
        fuse(mixed)
    other = copy.deepcopy(policy)
    other.config.text_config.hidden_act = "gelu"
    with pytest.raises(NotImplementedError, match="'gelu'"):
        fuse(other)
    with pytest.raises(ValueError, match="Linear holds no language model"):
        fuse(torch.nn.Linear(1, 1))
    fused = copy.deepcopy(policy)
    fuse(fused)
    with pytest.raises(NotImplementedError, match="autocast"):
        fused.model.language_model.norm(torch.zeros(1, SMALL.hidden_size, dtype=torch.bfloat16))


def test_an_attention_of_another_make_is_refused(policy, monkeypatch, liger):
    monkeypatch.setattr(fused_trunk, "ROTARY", "rotate")
    fused_trunk._attention.cache_clear()
    with pytest.raises(NotImplementedError, match="Qwen3VLTextAttention of this transformers does not call rotate"):
        fuse(copy.deepcopy(policy))


def installed(monkeypatch, there):
    def found():
        if not there:
            raise ImportError("No module named 'liger_kernel'")

    monkeypatch.setattr(fused_trunk, "liger", found)
    monkeypatch.setattr(fused_trunk.metadata, "version", lambda name: {"liger-kernel": "0.8.5"}[name])


def test_which_kernels_a_choice_means(monkeypatch):
    installed(monkeypatch, True)
    assert trunk_kernels("auto", CUDA, torch.bfloat16) == trunk_kernels("liger", CUDA, torch.float32) == "liger 0.8.5"
    assert trunk_kernels("off", CUDA, torch.bfloat16) == "stock (model.fused_trunk=off)"
    assert trunk_kernels("auto", CPU, torch.bfloat16).startswith("stock (Liger's kernels run on CUDA")
    assert trunk_kernels("auto", CUDA, torch.float64).endswith("these models are float64)")
    with pytest.raises(ValueError, match="one of auto, off, liger, got 'on'"):
        trunk_kernels("on", CUDA, torch.bfloat16)
    installed(monkeypatch, False)
    assert "cannot be imported (No module named 'liger_kernel')" in trunk_kernels("auto", CUDA, torch.bfloat16)
    for device in (CPU, CUDA):
        with pytest.raises(ValueError, match="model.fused_trunk=liger: .*; use auto or off"):
            trunk_kernels("liger", device, torch.bfloat16)


def test_it_is_used_where_the_choice_says_so(policy, monkeypatch):
    model = copy.deepcopy(policy)
    for choice in ("auto", "off"):
        assert use_fused_trunk(model, choice).startswith("stock")
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(fused_trunk, "_why_not", lambda device, dtype: None)
    installed(monkeypatch, True)
    assert use_fused_trunk(model) == "liger 0.8.5"
    assert "forward" in vars(model.model.language_model.norm)


def test_a_run_uses_it_says_so_and_refuses_what_cannot_run(policy, monkeypatch):
    # Here and not above: a machine that runs the GPU tests may lack what a whole run needs.
    from prism_fast.config import Config, ConfigError, ModelConfig
    from prism_fast.train import pipeline
    from prism_fast.train.context import environment

    assert environment(Config(), CPU)["norms, rotary and SwiGLU"].startswith("stock (Liger's kernels run on CUDA")
    config = Config(model=ModelConfig(fused_trunk="liger"))
    with pytest.raises(
        ConfigError, match=r"model\.fused_trunk=liger: Liger's kernels run on CUDA, these models on cpu"
    ):
        environment(config, CPU)
    monkeypatch.setattr(fused_trunk, "_why_not", lambda device, dtype: None)
    installed(monkeypatch, True)
    model = pipeline._learner(SimpleNamespace(config=config), build_discriminator(policy, seed=5))
    assert "forward" in vars(model.backbone.language_model.norm)
