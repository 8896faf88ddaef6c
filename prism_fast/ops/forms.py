"""An op with gradients in its two forms, from one piece of code: called directly, or an operator that compilers trace.

The dispatcher of operators costs an eager call tens of microseconds, so ordinary tensors take the direct form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TwoForms:
    """``run`` with gradients for its first ``leading`` arguments; differentiable once.

    Args:
        name: of the operator, ``prism_fast::...``.
        run: (*arguments) -> tuple of tensors, annotated, by position. The first ``results`` tensors carry gradients.
        fake: the same from shapes alone.
        save: (ctx, arguments, outputs), keeps what ``gradients`` needs.
        gradients: (ctx, traced, *upstream of the results) -> gradients of the leading arguments, None where there is
            none. An upstream gradient may be None, not all of them. ``traced``: inside a compiled graph.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., tuple[Tensor, ...]],
        *,
        fake: Callable[..., tuple[Tensor, ...]],
        leading: int,
        results: int,
        save: Callable[[Any, tuple, tuple[Tensor, ...]], None],
        gradients: Callable[..., Sequence[Tensor | None]],
    ):
        self.run, self.leading, self.results = run, leading, results
        self.operator = torch.library.custom_op(name, run, mutates_args=())
        self.operator.register_fake(fake)
        nothing = (None,) * leading
        rest = (None,) * (len(inspect.signature(run).parameters) - leading)

        def keep(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def traced_backward(ctx, *upstream):
            upstream = upstream[:results]
            if all(g is None for g in upstream):
                return *nothing, *rest
            return *gradients(ctx, True, *upstream), *rest

        self.operator.register_autograd(traced_backward, setup_context=keep)

        def eager_backward(ctx, *upstream):
            for g in upstream:
                if g is not None:
                    return *gradients(ctx, False, *upstream), None, None
            return *nothing, None, None

        # It refuses to be differentiated again; its bookkeeping is wasted on the usual backward, which cannot be.
        refusing_backward = once_differentiable(eager_backward)

        class Eager(torch.autograd.Function):
            """What gets no gradient comes in one tuple: each tensor among the arguments costs its bookkeeping."""

            boxed_grads_call = False  # the default; a class without it has the engine raise and drop an AttributeError

            @staticmethod
            def forward(ctx, *given):
                outputs = given[-1]
                ctx.set_materialize_grads(False)
                save(ctx, given[-2], outputs)
                return outputs[0] if results == 1 else outputs[:results]

            @staticmethod
            def backward(ctx, *upstream):
                return (refusing_backward if torch.is_grad_enabled() else eager_backward)(ctx, *upstream)

        # Function.apply without its part in Python, which costs as much again and serves functorch alone.
        self.apply = super(torch.autograd.Function, Eager).apply
        self._guarded = Eager.apply

    def __call__(self, *arguments) -> Sequence[Tensor]:
        """All outputs; those beyond the results are without gradient."""
        first = arguments[: self.leading]
        if not plain(first[0]):
            return self.traced(*arguments)
        if torch.is_grad_enabled():
            for x in first:
                if x is not None and x.requires_grad:
                    with torch.no_grad():
                        outputs = self.run(*arguments)
                    return self.attach(first, arguments, outputs)
        return self.run(*arguments)

    def traced(self, *arguments) -> Sequence[Tensor]:
        """`__call__` as an operator."""
        outputs = self.operator(*arguments)
        return *outputs[: self.results], *(x.detach() for x in outputs[self.results :])

    def attach(self, first: Sequence[Tensor | None], arguments: tuple, outputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """What ``run`` gave for ``arguments``, its results now with gradients for the ``first`` of them."""
        apply = self._guarded if torch._C._are_functorch_transforms_active() else self.apply
        found = apply(*first, arguments, outputs)
        return (found, *outputs[1:]) if self.results == 1 else (*found, *outputs[self.results :])


def plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor outside of compilation: then the dispatcher has nothing to add to a call."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and not torch.compiler.is_compiling()
