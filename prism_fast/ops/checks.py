"""Argument checks shared by the public ops.

They check only what the host knows: dtypes, shapes, devices and options. Looking at values would synchronise a GPU.
Every message names the op, the argument, its value and the allowed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, *FLOATS, *INTEGERS)
NUMBERS = (int, float)


def choice(op: str, name: str, value: object, allowed: Sequence[str], *, shown: Sequence[str] | None = None) -> None:
    """Refuse a ``value`` outside ``allowed``, of which the message lists ``shown`` alone. Raises ValueError."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name}={value!r} is not one of {', '.join(map(repr, shown or allowed))}")


def tensor(
    op: str,
    name: str,
    value: object,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
) -> None:
    """Refuse a non-tensor, a wrong rank or size (``None`` = any size), dtype or device. Raises ValueError."""
    if not isinstance(value, Tensor):
        cure = "" if value is None else "; pass torch.tensor(...)"
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}{cure}")
    sizes = value.shape
    if sizes == shape and value.dtype in dtypes and (like is None or value.device == like.device):
        return  # the usual case first: these checks run on every call
    right = len(sizes) == len(shape)
    if right:
        for have, want in zip(sizes, shape, strict=True):
            if want is not None and have != want:
                right = False
    if not right:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(sizes)}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other tensors are on {like.device}; move it there")


def rows(op: str, like: Tensor, count: int, **values: Tensor | None) -> None:
    """`tensor` for floating tensors [count], None allowed. Raises ValueError."""
    shape, device = (count,), like.device
    for name, value in values.items():
        if value is not None and not (
            isinstance(value, Tensor) and value.shape == shape and value.dtype in FLOATS and value.device == device
        ):
            tensor(op, name, value, shape=shape, like=like)


def memory(op: str, like: Tensor) -> None:
    """Refuse tensors on the device meta. Raises NotImplementedError."""
    if like.is_meta:
        raise NotImplementedError(
            f"{op}: tensors on the device meta; use FakeTensorMode to learn shapes without memory"
        )


def number(
    op: str, name: str, value: object, *, low: float = -math.inf, high: float = math.inf, strict: bool = False
) -> None:
    """Refuse anything but a finite Python number in [low, high] ((low, high] with ``strict``). Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise ValueError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Comparisons, not math.isfinite: a compiler that traces the number as a symbol can follow them.
    if not -math.inf < value < math.inf or value < low or value > high or (strict and value == low):
        raise ValueError(f"{op}: {name}={value} must be finite and in {'(' if strict else '['}{low}, {high}]")


def flag(op: str, name: str, value: object) -> None:
    """Refuse anything but True and False. Raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {value!r}")


def whole(op: str, name: str, value: object) -> None:
    """Refuse anything but a whole Python number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{op}: {name} must be a whole number, got {value!r}")


def scalar(op: str, name: str, value: object, like: Tensor | None) -> None:
    """Refuse anything but a positive Python number or a 0-d tensor on the device of ``like``. Raises ValueError."""
    if isinstance(value, Tensor):
        tensor(op, name, value, shape=(), dtypes=(*FLOATS, *INTEGERS), like=like)
    else:
        number(op, name, value, low=0.0, strict=True)


def offsets(op: str, value: object, like: Tensor) -> None:
    """Refuse ``cu_seqlens`` that are not int32 ``[B+1]`` with B >= 0. Raises ValueError."""
    tensor(op, "cu_seqlens", value, shape=(None,), dtypes=(torch.int32,), like=like)
    if value.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must hold B + 1 offsets and starts with 0; it is empty")


def temperature(op: str, value: object, rows: int, like: Tensor) -> None:
    """Refuse anything but a positive number or a tensor [] or [rows]. Raises ValueError."""
    if isinstance(value, Tensor) and value.dim() > 1:
        raise ValueError(
            f"{op}: temperature must be a number > 0 or a tensor of shape [] or [{rows}], got {list(value.shape)}; "
            "reshape(-1) makes one per row of it"
        )
    if isinstance(value, Tensor) and value.dim() == 1:
        tensor(op, "temperature", value, shape=(rows,), like=like)
    else:
        scalar(op, "temperature", value, like)


def mask(op: str, value: object, rows: int, like: Tensor) -> None:
    """Refuse anything but a bool, floating or integer tensor [rows]. Raises ValueError."""
    tensor(op, "mask", value, shape=(rows,), dtypes=MASKS, like=like)
