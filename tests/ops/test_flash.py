"""Which attention a card gets, what is refused by name, and that a choice ends with its block."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from prism_fast.ops import PrefixLayout, backend, flash, shared_prefix_attention
from prism_fast.ops.stock import varlen

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16


@pytest.fixture
def card(monkeypatch):
    """Pretend a card of a compute capability, and installed packages."""
    flash.missing.cache_clear()

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        properties = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for name, package in flash.PACKAGES.items():
            parts = package.module.split(".")
            for end in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), None)
            if name in installed:
                for end in range(1, len(parts) + 1):
                    monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
                namespace, wanted = package.operators
                operators = {operator: print for operator in wanted.split()}
                if namespace:
                    monkeypatch.setattr(torch.ops, namespace, SimpleNamespace(**operators), raising=False)
                else:
                    vars(sys.modules[package.module]).update(operators)

    yield pretend
    flash.missing.cache_clear()


@pytest.mark.parametrize(
    ("capability", "installed", "name"),
    [
        ((8, 0), (), "torch"),
        ((8, 0), ("flash_attn",), "torch"),  # not taken unasked: the same kernels as PyTorch's
        ((9, 0), (), "torch"),
        ((9, 0), ("fa3",), "fa3"),
        ((10, 0), ("fa4",), "fa4"),
        ((10, 3), ("fa3",), "torch"),
        ((12, 0), ("fa4",), "torch"),
    ],
)
def test_auto_is_what_the_table_says_and_is_installed(card, capability, installed, name):
    card(capability, *installed)
    assert flash.resolve("auto", CUDA, HALF) == name
    assert flash.resolve("auto", CUDA, torch.float32) == flash.resolve("auto", CPU, HALF) == "torch"


def test_what_cannot_run_here_is_refused_by_name(card):
    card((9, 0))
    for choice, device, dtype, why in (
        ("fa3", CPU, HALF, "model.attention=fa3: it runs on CUDA, these models on cpu; use auto or torch"),
        ("flash_attn", CUDA, torch.float32, "takes bfloat16 and float16, these models are float32"),
        ("fa4", CUDA, HALF, r"for cards of compute capability 10.x, this one has 9.0"),
        ("fa3", CUDA, HALF, "flash_attn_interface cannot be imported .*hopper"),
        ("flash_attn", CUDA, HALF, r"flash_attn.flash_attn_interface cannot be imported .*pip install"),
        ("flashinfer", CUDA, HALF, "must be one of auto, torch, flash_attn, fa3, fa4, got 'flashinfer'"),
    ):
        with pytest.raises(ValueError, match=why):
            flash.resolve(choice, device, dtype)
    card((7, 5), "flash_attn")
    with pytest.raises(ValueError, match="8.x, 9.x, 10.x, 12.x, this one has 7.5"):
        flash.resolve("flash_attn", CUDA, HALF)
    assert flash.resolve("torch", CUDA, HALF) == "torch"


def test_a_package_of_another_version_is_refused(card, monkeypatch):
    card((9, 0), "flash_attn")
    monkeypatch.setattr(torch.ops, "flash_attn", SimpleNamespace(_flash_attn_varlen_forward=print), raising=False)
    with pytest.raises(ValueError, match="has no _flash_attn_varlen_backward: its version does not fit"):
        flash.resolve("flash_attn", CUDA, HALF)


@pytest.mark.parametrize(
    ("choice", "capability", "active"), [("fa3", (9, 0), "FA3"), ("fa4", (10, 0), "FA4"), ("flash_attn", (9, 0), None)]
)
def test_a_choice_holds_in_its_block(card, choice, capability, active):
    card(capability, choice)
    with pytest.raises(KeyError), flash.use_attention(choice, CUDA, HALF) as name:
        assert name == choice == flash.in_force() and current_flash_attention_impl() == active
        with flash.use_attention("torch", CUDA, HALF):
            assert flash.in_force() == "torch" and current_flash_attention_impl() is None
        assert flash.in_force() == choice
        raise KeyError
    assert flash.in_force() == "torch" and current_flash_attention_impl() is None


def test_the_kernels_follow_the_choice(card):
    card((9, 0), "flash_attn")
    tensor = SimpleNamespace(dtype=HALF, shape=(4, 2, 64), device="cuda")
    assert varlen.kernel_for(tensor, "", "").forward is varlen.flash_forward
    with flash.use_attention("flash_attn", CUDA, HALF):
        assert varlen.kernel_for(tensor, "", "").backward is varlen.package_backward
        wide = SimpleNamespace(dtype=torch.float32, shape=(4, 2, 64), device="cuda")
        assert varlen.kernel_for(wide, "", "").forward is varlen.efficient_forward


@pytest.mark.parametrize(
    ("major", "dtype", "widths", "wanted"),
    [
        (9, HALF, (128, 128), "stock"),
        (10, torch.float16, (128, 128), "stock"),
        (9, torch.float32, (128, 128), "triton"),
        (9, HALF, (100, 100), "triton"),  # no multiple of 8
        (9, HALF, (300, 300), "stock"),  # neither takes it: the preferred one says so
        (8, HALF, (128, 128), "triton"),
        (8, HALF, (256, 256), "stock"),
        (8, HALF, (128, 64), "stock"),
        (12, torch.float32, (64, 64), "triton"),
    ],
)
def test_packed_rows_by_card(major, dtype, widths, wanted):
    assert flash.packed_default(major, dtype, *widths) == wanted


def test_a_whole_graph_follows_the_choice(card):
    card((8, 0))

    def shown(x):
        return x + (1 if flash.packed_default(8, HALF, x.shape[1], 64) == "stock" else 2)

    graph = torch.compile(shown, fullgraph=True, backend="eager")
    assert int(graph(torch.zeros(1, 64))[0, 0]) == 2
    with flash.use_attention("torch", CUDA, HALF):
        assert int(graph(torch.zeros(1, 64))[0, 0]) == 1


def test_the_op_asks_the_table_and_a_choice_by_name_serves_packed_rows(card, monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    card((8, 0))
    on_card = SimpleNamespace(is_cuda=True, device=CUDA, dtype=HALF, shape=(4, 2, 64))
    assert flash.packed_backend(on_card, on_card) == "triton"
    with flash.use_attention("torch", CUDA, HALF):
        assert flash.packed_backend(on_card, on_card) == "stock"
    with flash.use_attention("auto", CUDA, HALF):
        assert flash.packed_backend(on_card, on_card) == "triton"
    assert flash.packed_backend(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)) is None
    asked = []
    monkeypatch.setattr(sys.modules[shared_prefix_attention.__module__], "packed_backend", lambda q, v: asked.append(q))
    q = torch.zeros(0, 1, 8)
    layout = [torch.zeros(n, dtype=torch.int32) for n in (1, 0, 0, 0)]
    shared_prefix_attention(q, q, q, PrefixLayout(*layout, 0, 0))
    assert len(asked) == 1


def test_the_recipe_knows_the_same_names(card):
    from prism_fast.config import Config, ConfigError, ModelConfig, load_config
    from prism_fast.train.context import attention_in_force, environment

    names = get_args(get_type_hints(ModelConfig)["attention"])
    assert names == get_args(flash.Attention) and Config().model.attention == "auto"
    facts = environment(load_config("digits", ["device=cpu"]), CPU)
    assert facts["attention"] == "torch: PyTorch's on the cpu; packed rows: stock"
    card((9, 0), "flash_attn")
    half = ["model.dtype=bfloat16", "model.attention=flash_attn"]
    found = attention_in_force(load_config("digits", half), CUDA)
    assert found == "flash_attn: the package flash-attn; packed rows: stock"
    with pytest.raises(ConfigError, match="model.attention=fa3: flash_attn_interface cannot be imported"):
        attention_in_force(load_config("digits", [half[0], "model.attention=fa3"]), CUDA)


def test_words(card):
    card((9, 0), "fa3")
    assert flash.describe("auto", CUDA, HALF) == "fa3: FlashAttention 3; packed rows: stock"
    wide = flash.describe("auto", CUDA, torch.float32)
    assert wide == "torch: PyTorch's memory-efficient kernel; packed rows: triton"
    assert flash.describe("torch", CUDA, HALF, "triton") == "torch: PyTorch's FlashAttention 2; packed rows: triton"
    assert flash.describe("auto", CPU, torch.float32) == "torch: PyTorch's on the cpu; packed rows: stock"
