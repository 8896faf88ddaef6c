"""The pairwise loss by the compiled kernels: loss, gradients and statistics in one launch, one more in backward.

Semantics and validation: ``prism_fast.ops.pairwise_loss``; arithmetic: ``csrc/pairwise_loss.h``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast.ops import native

from ..forms import TwoForms
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
    """The public op has already validated the arguments.

    Differentiable once, in ``teacher`` and ``student``. Does not synchronise, and can be captured in a CUDA graph.
    Raises RuntimeError if the kernels are missing, NotImplementedError for length penalties on more scores than the
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
    count, number = calls.split(denominator)
    l2_count, l2_number = calls.split(l2_denominator)
    wanted = torch.is_grad_enabled() and (teacher.requires_grad or student.requires_grad)
    value, integers, values, _ = _forms(
        teacher, student, group.long(), valid, teacher_length, student_length, count, l2_count,
        [float(b) for b in length_penalty] if lengths is not None else [], clip is not None,
        0.0 if clip is None else float(clip), float(l2), float(spread), denominator is not None, number,
        l2_denominator is not None, l2_number, wanted,
    )  # fmt: skip
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
    out = value, integers, values, gradients = _allocate(teacher, student, wanted)
    module, kind = native.module(), student.dtype
    columns = (
        teacher.contiguous(), student.contiguous(), calls.column(group, torch.int64), calls.column(valid, torch.bool),
        calls.column(teacher_length, kind), calls.column(student_length, kind), value, integers, values,
    )  # fmt: skip
    gradient = gradients.data_ptr() if wanted else 0
    student_gradient = gradient + teacher.numel() * teacher.element_size() if wanted else 0
    denominator, count = calls.scalar(denominator, denominator_number, kind)
    l2_denominator, l2_count = calls.scalar(l2_denominator, l2_denominator_number, kind)
    kernel = module.pairwise_loss_float64 if kind == torch.float64 else module.pairwise_loss_float32
    workspace = torch.empty(student.numel(), dtype=torch.float64, device=student.device)
    with calls.on_device("pairwise_loss", student):
        kernel(
            [*map(calls.address, columns), gradient, student_gradient, workspace.data_ptr()],
            teacher.shape[0], *student.shape, has_clip, clip, l2, spread, has_denominator, count, has_l2_denominator,
            l2_count, penalty, calls.stream_of(student),
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


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.shapes = inputs[0].shape, inputs[1].shape


def _gradients(ctx, traced: bool, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    (kept,) = ctx.saved_tensors
    # Copied, because the two gradients are views of one kept tensor: accumulating into one would change it.
    found = calls.scaled(kept, upstream, traced, copy=True).split([s[0] * s[1] for s in ctx.shapes])
    return tuple(x.view(s) if n else None for x, s, n in zip(found, ctx.shapes, ctx.needs_input_grad[:2], strict=True))


_forms = TwoForms(
    "prism_fast::pairwise_loss",
    _run,
    backend="native",
    fake=lambda teacher, student, *arguments: _allocate(teacher, student, arguments[-1]),
    leading=2,
    results=1,
    save=_save,
    gradients=_gradients,
)
