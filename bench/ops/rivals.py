"""Implementations of other packages. Each function imports its package when called, and raises `Absent` without it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .op import Absent, Inputs, Unsupported


def package(name: str, distribution: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(f"{distribution or name}: {error}") from None


def cuda_only(x: Inputs, key: str) -> None:
    if x[key].device.type != "cuda":
        raise Unsupported("a Triton kernel: needs CUDA tensors")


def verl_linear_cross_entropy() -> Any:
    """verl's kernel from its two files, because an import of verl itself needs Ray and more."""
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise Absent("verl: no module named 'verl'")
        root = Path(next(iter(spec.submodule_search_locations)))
        for name in ("verl", "verl.utils", "verl.utils.kernel"):
            module = types.ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = module
    return package("verl.utils.kernel.linear_cross_entropy", "verl").linear_cross_entropy


def verl_triton(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    function = verl_linear_cross_entropy()
    cuda_only(x, "hidden")
    found = function(x["hidden"], x["weight"], x["target"], 1.0, "none")
    return found if entropy else found[:1]


def trl_chunked(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    """TRL's head with tiles of 32,768 columns, as its trainers use it."""
    function = package("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
    outputs = ("entropy",) if entropy else ()
    found = function.apply(x["hidden"], x["weight"], None, x["target"], 1.0, 32768, None, 1.0, outputs)
    return found[:2] if entropy else found[:1]


def liger_scaled(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = package(name, "liger-kernel").LigerFusedLinearScaledCrossEntropyFunction
    found = function.apply(x["hidden"], x["weight"], x["target"], 1.0, -100, 1, entropy)
    return (-found[0], found[1]) if entropy else (-(found[0] if isinstance(found, tuple) else found),)


def cut_cross_entropy(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
    function = package("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    if entropy:
        raise Unsupported("no entropy")
    cuda_only(x, "hidden")
    return (-function(x["hidden"], x["weight"], x["target"], reduction="none"),)


def liger_cross_entropy(x: Inputs) -> tuple[Tensor, ...]:
    module = package("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    cuda_only(x, "hidden")
    return (module.LigerFusedLinearCrossEntropyLoss()(x["weight"], x["hidden"], x["target"]),)


def liger_grpo(x: Inputs) -> tuple[Tensor, ...]:
    """Liger's chunked loss; sequences of one length, so that its padded layout is a view."""
    module = package("liger_kernel.chunked_loss", "liger-kernel")
    rows = x["advantage"].shape[0]
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", compiled=x["hidden"].device.type == "cuda"
    )
    found = loss(
        x["hidden"].view(rows, -1, x["hidden"].shape[-1]),
        x["weight"],
        x["target"].view(rows, -1),
        torch.ones_like(x["target"]).view(rows, -1),
        x["advantage"],
        old_per_token_logps=x["old_logp"].view(rows, -1),
    )
    return (found[0] if isinstance(found, tuple) else found,)


def trl_selected(x: Inputs) -> tuple[Tensor, ...]:
    module = package("trl.kernels", "trl")
    cuda_only(x, "logits")
    logp, _ = module.selective_log_softmax_and_entropy(x["logits"][None], x["target"][None])
    return (logp[0],)
