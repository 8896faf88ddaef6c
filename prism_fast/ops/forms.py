"""An op with gradients in its two forms, from one piece of code: called directly, or an operator that compilers trace.

The dispatcher of operators costs an eager call tens of microseconds, so ordinary tensors take the direct form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


class TwoForms:
    """``run`` with gradients for its first ``leading`` arguments; differentiable once, in reverse mode.

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
        self.name, self.run, self.leading, self.results = name.split("::")[1], run, leading, results
        self.operator = torch.library.custom_op(name, run, mutates_args=())
        self.operator.register_fake(fake)
        rest = (None,) * (len(inspect.signature(run).parameters) - leading)

        def keep(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def backward(ctx, traced: bool, upstream: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
            if all(g is None for g in upstream[:results]):
                return (None,) * leading
            return gradients(ctx, traced, *upstream[:results])

        self.operator.register_autograd(lambda ctx, *g: (*backward(ctx, True, g), *rest), setup_context=keep)

        def eager_backward(ctx, *upstream):
            return *backward(ctx, False, upstream), None

        # It refuses to be differentiated again; its bookkeeping is wasted on the usual backward, which cannot be.
        refusing_backward = once_differentiable(eager_backward)

        class Eager(torch.autograd.Function):
            """What gets no gradient comes and leaves in one list: each tensor beside it costs its bookkeeping."""

            boxed_grads_call = False  # the default; a class without it has the engine raise and drop an AttributeError

            @staticmethod
            def forward(ctx, *given):
                *_, passed = given
                arguments = tuple(passed)
                passed[:] = outputs = run(*arguments)
                keep(ctx, arguments, outputs)
                return outputs[:results]

            @staticmethod
            def backward(ctx, *upstream):
                return (refusing_backward if torch.is_grad_enabled() else eager_backward)(ctx, *upstream)

        self._eager = Eager.apply

    def __call__(self, *arguments) -> Sequence[Tensor]:
        """All outputs; those beyond the results are without gradient. Raises NotImplementedError as `refuse_duals`."""
        first = arguments[: self.leading]
        if not plain(first[0]):
            outputs = self.operator(*arguments)
            return *outputs[: self.results], *(x.detach() for x in outputs[self.results :])
        refuse_duals(self.name, *first)
        if torch.is_grad_enabled():
            for x in first:
                if x is not None and x.requires_grad:
                    passed = list(arguments)
                    found = self._eager(*first, passed)
                    return *found, *passed[self.results :]
        return self.run(*arguments)


def saved_once(ctx, op: str, cure: str) -> tuple[Tensor | None, ...]:
    """``ctx.saved_tensors`` of an op whose backward uses them up. Raises RuntimeError the second time."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{op}: a second backward, but the first wrote over what forward had kept; {cure}"
        ) from error


def plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor outside of compilation: then the dispatcher has nothing to add to a call."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and not torch.compiler.is_compiling()


def refuse_duals(op: str, *tensors: Tensor | None) -> None:
    """Refuse what carries derivatives that kernels would drop. Raises NotImplementedError."""
    dropped = torch._C._are_functorch_transforms_active()
    for x in tensors:
        dropped = dropped or (x is not None and forward_ad.unpack_dual(x).tangent is not None)
    if dropped:
        raise NotImplementedError(
            f"{op}: its kernels have gradients in reverse mode alone, not inside torch.func transforms or for "
            "forward-mode dual tensors; compose it of torch operations there, as backend='reference' of policy_loss, "
            "pairwise_loss, group_advantage and selected_logprob does"
        )
