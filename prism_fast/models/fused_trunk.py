"""Liger's Triton kernels in the dense trunk of a Qwen3-VL(-MoE) language model: RMS norms, rotary embedding, SwiGLU.

The modules of one model get another ``forward``; classes of transformers and parameter names do not change, nor do the
vision tower and the experts. Liger's functions compute the same as the modules, with sums in float32: a row is
normalised, rounded, then multiplied by the weight; q and k are rotated in place by the cosines and sines ``[B, L, D]``
of the model's own rotary module, M-RoPE's interleaved axes included; silu(gate) is formed in float32, then multiplied
by up.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import metadata
from types import FunctionType, MethodType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextMLP,
    Qwen3VLTextModel,
    Qwen3VLTextRMSNorm,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextAttention,
    Qwen3VLMoeTextMLP,
    Qwen3VLMoeTextModel,
    Qwen3VLMoeTextRMSNorm,
)

FusedTrunk = Literal["auto", "off", "liger"]
DTYPES = (torch.float32, torch.bfloat16)
ROTARY = "apply_rotary_pos_emb"  # the function that the stock attention calls


class Kernels(NamedTuple):
    """Liger's autograd functions: ``rms_norm(x, weight, eps, offset, casting, in_place)``, ``rope(q, k, cos, sin)``,
    ``swiglu(gate, up)``."""

    rms_norm: type[torch.autograd.Function]
    rope: type[torch.autograd.Function]
    swiglu: type[torch.autograd.Function]


@lru_cache(maxsize=1)
def liger() -> Kernels:
    """Imported once, at the first use. Raises ImportError where liger-kernel is missing or does not fit Triton."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    class SwiGLU(LigerSiLUMulFunction):
        """Its backward writes the gradients over gate and up, unseen by autograd: once is enough."""

        @staticmethod
        def backward(ctx, d_out: Tensor):
            if getattr(ctx, "spent", False):
                raise RuntimeError(
                    "fused trunk: a second backward through the same graph; SwiGLU has overwritten what it kept. "
                    "Set model.fused_trunk=off"
                )
            ctx.spent = True
            return LigerSiLUMulFunction.backward(ctx, d_out)

    return Kernels(LigerRMSNormFunction, LigerRopeFunction, SwiGLU)


def trunk_kernels(choice: FusedTrunk, device: torch.device, dtype: torch.dtype) -> str:
    """The kernels that ``choice`` selects for this device and dtype: ``"liger <version>"`` or ``"stock (<why>)"``.

    Raises:
        ValueError: ``liger`` cannot run here, or ``choice`` is not auto, off or liger.
    """
    if choice not in get_args(FusedTrunk):
        raise ValueError(f"model.fused_trunk must be one of {', '.join(get_args(FusedTrunk))}, got {choice!r}")
    if choice == "off":
        return "stock (model.fused_trunk=off)"
    why = _why_not(device, dtype)
    if why is None:
        return f"liger {metadata.version('liger-kernel')}"
    if choice == "liger":
        raise ValueError(f"model.fused_trunk=liger: {why}; use auto or off")
    return f"stock ({why})"


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"Liger's kernels run on CUDA, these models on {device.type}"
    if dtype not in DTYPES:
        return f"float32 and bfloat16 only, these models are {str(dtype).removeprefix('torch.')}"
    try:
        liger()
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error}): pip install --no-deps liger-kernel"
    return None


def use_fused_trunk(model: nn.Module, choice: FusedTrunk = "auto") -> str:
    """Put the kernels of ``choice`` into the language model inside ``model`` (policy, backbone or discriminator), in
    place (idempotent). Call it once the model has its device and dtype. Returns and raises as :func:`trunk_kernels`."""
    weight = _trunk(model).embed_tokens.weight
    chosen = trunk_kernels(choice, weight.device, weight.dtype)
    if chosen.startswith("liger"):
        fuse(model)
    return chosen


def _trunk(model: nn.Module) -> nn.Module:
    language_model = next((m for m in model.modules() if isinstance(m, (Qwen3VLTextModel, Qwen3VLMoeTextModel))), None)
    if language_model is None:
        raise ValueError(f"fused trunk: {type(model).__name__} holds no language model of Qwen3-VL or Qwen3-VL-MoE")
    return language_model


def fuse(model: nn.Module) -> None:
    """Put Liger's kernels in, on any device (tests run them in Triton's interpreter).

    Raises:
        ValueError: no language model inside, or its parameters are neither all float32 nor all bfloat16.
        NotImplementedError: an activation other than SiLU, or an attention that does not call the rotary function by
            its known name.
    """
    trunk = _trunk(model)
    kinds = {p.dtype for p in trunk.parameters()}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        raise ValueError(
            f"fused trunk: parameters must be all float32 or all bfloat16, found {sorted(map(str, kinds))}"
        )
    for module in trunk.modules():
        if isinstance(module, (Qwen3VLTextRMSNorm, Qwen3VLMoeTextRMSNorm)):
            # A norm's backward may overwrite its output's gradient if nobody else holds it. Inside a layer the output
            # feeds matrix products only; the last norm's goes to callers, who may hold its gradient.
            module.forward = MethodType(partial(_rms_norm, in_place=module is not trunk.norm), module)
        elif isinstance(module, (Qwen3VLTextAttention, Qwen3VLMoeTextAttention)):
            module.forward = MethodType(_attention(type(module)), module)
        elif isinstance(module, (Qwen3VLTextMLP, Qwen3VLMoeTextMLP)):
            if module.config.hidden_act != "silu":
                raise NotImplementedError(f"fused trunk: computes SiLU, this model has {module.config.hidden_act!r}")
            module.forward = MethodType(_swiglu, module)


def _rms_norm(self: nn.Module, hidden_states: Tensor, *, in_place: bool) -> Tensor:
    """``[..., D]`` to ``[..., D]``: float32 up to the normalised row, which is rounded, then multiplied (Liger calls it
    "llama")."""
    if hidden_states.dtype != self.weight.dtype:
        raise NotImplementedError(
            f"fused trunk: hidden states are {hidden_states.dtype}, the norm's weight {self.weight.dtype}: autocast is "
            "not supported; set model.fused_trunk=off"
        )
    return liger().rms_norm.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", in_place)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[B, Hq, L, D]`` and k ``[B, Hk, L, D]``, views of ``[B, L, heads, D]`` and overwritten; cos, sin
    ``[B, L, D]``, both halves equal."""
    return liger().rope.apply(q, k, cos, sin)


@lru_cache(maxsize=4)
def _attention(kind: type[nn.Module]) -> FunctionType:
    """The stock class's own forward with our rotary function in place of transformers'."""
    stock = kind.forward
    if ROTARY not in stock.__code__.co_names:
        raise NotImplementedError(
            f"fused trunk: {kind.__name__} of this transformers does not call {ROTARY}; set model.fused_trunk=off"
        )
    names = {**stock.__globals__, ROTARY: _rotary}
    fused = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    fused.__kwdefaults__ = stock.__kwdefaults__
    return fused


def _swiglu(self: nn.Module, x: Tensor) -> Tensor:
    """``[..., H]`` to ``[..., H]``."""
    return self.down_proj(liger().swiglu.apply(self.gate_proj(x), self.up_proj(x)))
