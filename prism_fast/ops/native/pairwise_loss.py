"""The pairwise loss by the compiled kernels: loss, gradients and statistics in one launch, one more in backward.

Semantics and validation stand in ``prism_fast.ops.pairwise_loss``; the arithmetic in ``csrc/pairwise_loss.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_fast.ops import native

from ..results import PairwiseStats
from . import calls

COUNTS, VALUES = 3, 5  # integer and floating statistics


def run(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    *,
    valid: Tensor | None,
    clip: float | None,
    lengths: tuple[Tensor, Tensor] | None,
    length_penalty: Sequence[float],
    l2: float,
    spread: float,
    denominator: Tensor | float | None,
    l2_denominator: Tensor | float | None,
) -> tuple[Tensor, PairwiseStats]:
    """Arguments are already validated by the public op.

    Differentiable once, in ``teacher`` and ``student``. Does not synchronise, and can be captured in a CUDA graph.
    Raises RuntimeError where the kernels are missing, NotImplementedError for length penalties on more scores than the
    kernels hold.
    """
    kind = torch.float64 if student.dtype == torch.float64 else torch.float32
    teacher, student = teacher.to(kind), student.to(kind)
    most = native.module().pairwise_penalties
    if lengths is not None and len(length_penalty) > most:
        raise NotImplementedError(
            f"pairwise_loss: backend='native' takes length_penalty for at most {most} scores, got "
            f"{len(length_penalty)}; pass backend='reference'"
        )
    teacher_length, student_length = (None, None) if lengths is None else lengths
    counts = (denominator, l2_denominator)
    tensors = [x if isinstance(x, Tensor) else None for x in counts]
    numbers = [0.0 if x is None or isinstance(x, Tensor) else float(x) for x in counts]
    wanted = torch.is_grad_enabled() and (teacher.requires_grad or student.requires_grad)
    constants = (
        group.long(), valid, teacher_length, student_length, *tensors,
        [float(b) for b in length_penalty] if lengths is not None else [], clip is not None,
        0.0 if clip is None else float(clip), float(l2), float(spread), denominator is not None, numbers[0],
        l2_denominator is not None, numbers[1], wanted,
    )  # fmt: skip
    if not calls.plain(teacher):
        value, integers, values, _ = _operator(teacher, student, *constants)
        values = values.detach()
    elif wanted:
        value, integers, values = _Eager.apply(teacher, student, constants)
    else:
        value, integers, values, _ = _run(teacher, student, *constants)
    margin, accuracy, of_teacher, of_student, loss = values.unbind(0)
    return value, PairwiseStats(*integers.unbind(0), margin, accuracy, of_teacher, of_student, loss)


def _run(
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    valid: Tensor | None,
    teacher_length: Tensor | None,
    student_length: Tensor | None,
    denominator: Tensor | None,
    l2_denominator: Tensor | None,
    penalty: list[float],
    has_clip: bool,
    clip: float,
    l2: float,
    spread: float,
    has_denominator: bool,
    denominator_number: float,
    has_l2_denominator: bool,
    l2_denominator_number: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], integers [3, K], values [5, K], gradients [(G + B) · K] of teacher and student, or [0])."""
    out = _allocate(teacher, student, wanted)
    workspace = torch.empty(student.numel(), dtype=torch.float64, device=student.device)
    with calls.on_device("pairwise_loss", student) if student.is_cuda else nullcontext():
        into(
            out, workspace, teacher, student, group, valid, teacher_length, student_length, denominator, l2_denominator,
            penalty, has_clip, clip, l2, spread, has_denominator, denominator_number, has_l2_denominator,
            l2_denominator_number, wanted,
        )  # fmt: skip
    return out


def _allocate(teacher: Tensor, student: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = student.shape[1]
    return (
        student.new_empty(()),
        student.new_empty((COUNTS, columns), dtype=torch.int64),
        student.new_empty((VALUES, columns)),
        student.new_empty((teacher.shape[0] + student.shape[0]) * columns if wanted else 0),
    )


def into(
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    workspace: Tensor,
    teacher: Tensor,
    student: Tensor,
    group: Tensor,
    valid: Tensor | None,
    teacher_length: Tensor | None,
    student_length: Tensor | None,
    denominator: Tensor | None,
    l2_denominator: Tensor | None,
    penalty: list[float],
    has_clip: bool,
    clip: float,
    l2: float,
    spread: float,
    has_denominator: bool,
    denominator_number: float,
    has_l2_denominator: bool,
    l2_denominator_number: float,
    wanted: bool,
) -> None:
    """Write into ``out``; ``workspace`` is float64 ``[B · K]``, its contents do not matter."""
    module, kind = native.module(), student.dtype
    kernel = module.pairwise_loss_float64 if kind == torch.float64 else module.pairwise_loss_float32
    teacher, student, group = teacher.contiguous(), student.contiguous(), group.contiguous()
    valid = None if valid is None else valid.contiguous()
    teacher_length, student_length = calls.column(teacher_length, kind), calls.column(student_length, kind)
    denominator, *count = calls.number(denominator, denominator_number, kind)
    l2_denominator, *l2_count = calls.number(l2_denominator, l2_denominator_number, kind)
    value, integers, values, gradients = out
    kernel(
        teacher=teacher.data_ptr(),
        student=student.data_ptr(),
        group=group.data_ptr(),
        valid=calls.address(valid),
        teacher_length=calls.address(teacher_length),
        student_length=calls.address(student_length),
        loss=value.data_ptr(),
        counts=integers.data_ptr(),
        stats=values.data_ptr(),
        teacher_gradient=gradients.data_ptr() if wanted else 0,
        student_gradient=gradients.data_ptr() + teacher.numel() * teacher.element_size() if wanted else 0,
        workspace=workspace.data_ptr(),
        groups=teacher.shape[0],
        rows=student.shape[0],
        columns=student.shape[1],
        has_clip=has_clip,
        clip=clip,
        l2=l2,
        spread=spread,
        has_denominator=has_denominator,
        has_l2_denominator=has_l2_denominator,
        penalty=penalty,
        stream=calls.stream_of(student),
        **dict(zip(("denominator", "denominator_kind", "denominator_number"), count, strict=True)),
        **dict(zip(("l2_denominator", "l2_denominator_kind", "l2_denominator_number"), l2_count, strict=True)),
    )


def _gradients(
    gradients: Tensor, shapes: tuple[torch.Size, torch.Size], upstream: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    of_teacher, of_student = calls.scaled(gradients, upstream).split([s[0] * s[1] for s in shapes])
    return (
        of_teacher.view(shapes[0]) if needed[0] else None,
        of_student.view(shapes[1]) if needed[1] else None,
    )


class _Eager(torch.autograd.Function):
    """The op without the dispatcher. What gets no gradient comes in one tuple: each argument costs its bookkeeping."""

    @staticmethod
    def forward(ctx, teacher, student, constants):
        value, integers, values, gradients = _run(teacher, student, *constants)
        ctx.save_for_backward(gradients)
        ctx.shapes = teacher.shape, student.shape
        ctx.mark_non_differentiable(integers, values)
        ctx.set_materialize_grads(False)
        return value, integers, values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, None, None
        return *_gradients(*ctx.saved_tensors, ctx.shapes, upstream, ctx.needs_input_grad), None


_operator = torch.library.custom_op("prism_fast::pairwise_loss", _run, mutates_args=())


@_operator.register_fake
def _(teacher: Tensor, student: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(teacher, student, arguments[-1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.shapes = inputs[0].shape, inputs[1].shape
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    gradients = (None, None)
    if upstream is not None:
        gradients = _gradients(*ctx.saved_tensors, ctx.shapes, upstream, ctx.needs_input_grad)
    return *gradients, *(None,) * 16


_operator.register_autograd(_backward, setup_context=_keep)
