"""The choice of the attention that serves packed rows on a card, and of the FlashAttention that it calls.

Kernels for sequences of different lengths come from one of

- ``torch``: PyTorch's own (FlashAttention 2 in half precision on cards of 8.0 and newer, the memory-efficient kernel
  for float32 and older cards);
- ``flash_attn``: the package flash-attn 2, by the operators that its ``flash_attn_varlen_func`` calls;
- ``fa3``, ``fa4``: FlashAttention 3 (``flash_attn_interface``) and 4 (``flash_attn.cute``), which PyTorch itself puts
  in the place of its own kernels (``torch.nn.attention.activate_flash_attention_impl``).

A choice holds for the whole process, as PyTorch's own switch does, and changes the bits of results. An import switches
nothing: outside of :func:`use_attention` the calls are PyTorch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.attention as switch

Attention = Literal["auto", "torch", "flash_attn", "fa3", "fa4"]
HALF = (torch.bfloat16, torch.float16)
TRITON_WIDTH = 128  # widest head of the Triton kernels


class Card(NamedTuple):
    """``packed``: the backend of ``shared_prefix_attention`` in half precision; ``flash``: the kernels that ``auto``
    tries in this order, taking the first that is installed."""

    packed: str
    flash: tuple[str, ...]


# By major compute capability. Not measured yet; until then these reasons decide:
# - 9.x, 10.x: two library calls and a join. Their backward takes 5 matrix products, ours computes the scores twice and
#   takes 7; and FlashAttention 3 and 4 overlap softmax and products by specialised warps, which Triton does not offer.
# - elsewhere our kernels: one launch forward, two backward, no join, bits that always repeat.
# In float32 the Triton kernels serve packed rows on every card: the library's kernel does not support grouped heads and
# would read the keys once for each member of a group.
CARDS = {9: Card("stock", ("fa3", "torch")), 10: Card("stock", ("fa4", "torch"))}
OTHERS = Card("triton", ("torch",))


class Package(NamedTuple):
    module: str
    operators: tuple[str, str]  # namespace ("": the module), and the names that must exist there
    majors: tuple[int, ...]  # compute capabilities
    cure: str


PACKAGES = {
    "flash_attn": Package(
        "flash_attn.flash_attn_interface",
        ("flash_attn", "_flash_attn_varlen_forward _flash_attn_varlen_backward"),
        (8, 9, 10, 12),
        "pip install --no-build-isolation flash-attn",
    ),
    "fa3": Package(
        "flash_attn_interface",
        ("flash_attn_3", "fwd bwd"),
        (9,),
        "build the folder hopper of the flash-attention repository",
    ),
    "fa4": Package(
        "flash_attn.cute.interface", ("", "_flash_attn_fwd _flash_attn_bwd"), (10,), "pip install flash-attn-4"
    ),
}


class _Force(NamedTuple):
    """``package``: whether calls go to flash-attn's own operators; ``packed``: the backend of packed rows, None for
    the table's."""

    package: bool
    packed: str | None


_force = _Force(False, None)


def in_force() -> str:
    """The attention in use in this process, one of `Attention` without "auto"."""
    if _force.package:
        return "flash_attn"
    active = _active()
    return "torch" if active is None else {"FA3": "fa3", "FA4": "fa4"}.get(active, active)


def _active() -> str | None:
    """The name of the implementation that replaces PyTorch's own kernels, or None."""
    return switch.current_flash_attention_impl() if hasattr(switch, "current_flash_attention_impl") else None


def packed_backend(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """The default backend of ``shared_prefix_attention`` for q [T, Hq, D] and v [T, Hk, Dv]; None off CUDA."""
    if not q.is_cuda:
        return None
    return packed_default(_major(q.device), q.dtype, q.shape[2], v.shape[2])


def packed_default(major: int, dtype: torch.dtype, width: int, value_width: int) -> str:
    """The same, from compute capability ``major``.x, dtype and widths."""
    if _force.packed is not None:
        return _force.packed
    triton_takes = width == value_width <= TRITON_WIDTH
    stock_takes = dtype not in HALF or max(width, value_width) % 8 == 0
    preferred = CARDS.get(major, OTHERS).packed if dtype in HALF else OTHERS.packed
    if preferred == "stock":
        return "triton" if triton_takes and not stock_takes else "stock"
    return "triton" if triton_takes else "stock"


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major


def resolve(choice: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that ``choice`` means for models of this device and dtype; "auto" becomes a name.

    Raises:
        ValueError: a ``choice`` that cannot run here, or is unknown.
    """
    if choice not in get_args(Attention):
        raise ValueError(f"model.attention must be one of {', '.join(get_args(Attention))}, got {choice!r}")
    if choice != "auto":
        if reason := why_not(choice, device, dtype):
            raise ValueError(f"model.attention={choice}: {reason}; use auto or torch")
        return choice
    if device.type != "cuda":
        return "torch"
    names = CARDS.get(_major(device), OTHERS).flash
    return next(name for name in names if why_not(name, device, dtype) is None)


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why ``name`` cannot serve models of this device and dtype; None: it can."""
    if name == "torch":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA, these models on {device.type}"
    if dtype not in HALF:
        return f"it takes bfloat16 and float16, these models are {str(dtype).removeprefix('torch.')}"
    majors = PACKAGES[name].majors
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in majors:
        allowed = ", ".join(f"{major}.x" for major in majors)
        return f"it is for cards of compute capability {allowed}, this one has {capability[0]}.{capability[1]}"
    if name != "flash_attn" and name.upper() not in getattr(switch, "list_flash_attention_impls", list)():
        return f"PyTorch {torch.__version__} cannot put it in the place of its own kernels"
    return missing(name)


@lru_cache(maxsize=8)
def missing(name: str) -> str | None:
    """The reason why the package of ``name`` cannot be called, with the cure; None: it can. Imports the package."""
    package = PACKAGES[name]
    namespace, wanted = package.operators
    try:
        module = importlib.import_module(package.module)
    except Exception as error:  # a build for another torch fails with whatever its loader raises
        text = " ".join(str(error).split())[:200] or "no reason given"
        return f"{package.module} cannot be imported ({type(error).__name__}: {text}): {package.cure}"
    holder = getattr(torch.ops, namespace) if namespace else module
    absent = [operator for operator in wanted.split() if not hasattr(holder, operator)]
    if absent:
        return f"{package.module} has no {' and '.join(absent)}: its version does not fit"
    return None


@contextmanager
def use_attention(choice: Attention, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Use ``choice`` inside the block, in the whole process; yields the name of the attention in use.

    If ``choice`` is a name and not "auto", it serves packed rows too, instead of the table's backend.

    Raises:
        ValueError: as :func:`resolve`.
    """
    global _force
    name = resolve(choice, device, dtype)
    before, active = _force, _active()
    try:
        _activate(name.upper() if name in ("fa3", "fa4") else None)
        _force = _Force(name == "flash_attn", None if choice == "auto" else "stock")
        yield name
    finally:
        _force = before
        _activate(active)


def _activate(wanted: str | None) -> None:
    if _active() == wanted:
        return
    if wanted is None:
        switch.restore_flash_attention_impl()
    else:
        switch.activate_flash_attention_impl(wanted)


SHOWN = {
    "torch": "PyTorch's FlashAttention 2",
    "flash_attn": "the package flash-attn",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
}


def describe(choice: Attention, device: torch.device, dtype: torch.dtype, packed: str | None = None) -> str:
    """``choice`` for models of this device and dtype in words: the kernels, and the backend of packed rows (``packed``:
    an explicit one). Raises as :func:`resolve`."""
    name = resolve(choice, device, dtype)
    if device.type != "cuda":
        return f"{name}: PyTorch's on the {device.type}; packed rows: {packed or 'stock'}"
    if dtype not in HALF:
        shown = "PyTorch's memory-efficient kernel"
    else:
        shown = SHOWN[name]
    if packed is None:
        packed = "stock" if choice != "auto" else packed_default(_major(device), dtype, 128, 128)
    return f"{name}: {shown}; packed rows: {packed}"
