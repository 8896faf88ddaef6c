"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter keeps bfloat16 as the 16-bit patterns and then multiplies the patterns as integers, and it cuts off
instead of rounding when it narrows. `install()` replaces the builder's methods that touch such values: they widen to
float32, compute, and round to nearest even. Not covered: reductions over bfloat16 (`tl.sum`) and bfloat16 atomics; our
kernels do neither (they convert to float32 straight after a load).
"""

from __future__ import annotations

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns (uint16)."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) nearest to float32 values, ties to even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


_installed = False


def install() -> None:
    """Patch `triton.runtime.interpreter.InterpreterBuilder`, once per process."""
    global _installed
    if _installed:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    bf16 = tl.bfloat16

    def is_bf16(x) -> bool:
        return x.dtype.scalar == bf16

    def as_float32(x):
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    binary, unary, cast, convert, dot, rsqrt = (
        builder.binary_op,
        builder.unary_op,
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.create_dot,
        builder.create_rsqrt,
    )

    def binary_op(self, left, right, op):
        if not is_bf16(left):
            return binary(self, left, right, op)
        value = op(widen(left.data), widen(right.data))
        return handle(value if value.dtype == bool else narrow(value), bf16)

    def unary_op(self, x, op):
        return handle(narrow(op(widen(x.data))), bf16) if is_bf16(x) else unary(self, x, op)

    def cast_impl(self, x, target):
        source, to = x.dtype.scalar, target.scalar
        if source == bf16 and to != bf16:
            wide = as_float32(x)
            return wide if to == tl.float32 else cast(self, wide, target)
        if to == bf16 and source != bf16:
            return handle(narrow(x.data.astype(np.float32)), bf16)
        return cast(self, x, target)

    def fp_to_fp(self, x, target, rounding):
        source, to = x.dtype.scalar, target.scalar
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if source == bf16 and to == tl.float32:
            return handle(widen(x.data), to)
        if source == tl.float32 and to == bf16 and nearest:
            return handle(narrow(x.data), bf16)
        return convert(self, x, target, rounding)

    def create_dot(self, a, b, d, *rest):
        return dot(self, as_float32(a), as_float32(b), d, *rest)

    def create_fma(self, x, y, z):
        if is_bf16(z):
            return handle(narrow(widen(x.data) * widen(y.data) + widen(z.data)), bf16)
        return handle(x.data * y.data + z.data, z.dtype.scalar)

    def create_rsqrt(self, x):
        return handle(narrow(1 / np.sqrt(widen(x.data))), bf16) if is_bf16(x) else rsqrt(self, x)

    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op, unary_op, cast_impl
    builder.create_fp_to_fp, builder.create_dot = fp_to_fp, create_dot
    builder.create_fma, builder.create_rsqrt = create_fma, create_rsqrt
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", lambda self, x, target: self.cast_impl(x, target))
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: handle(narrow(np.array([value], dtype=np.float32)), bf16)
    _installed = True
