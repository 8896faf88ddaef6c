"""Two forms of an op with gradients, from one implementation: a direct call, and an operator that compilers trace.

The dispatcher adds tens of microseconds to an eager call of an operator, so ordinary tensors take the direct form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class TwoForms:
    """``run`` with gradients for its first ``leading`` arguments; differentiable once, in reverse mode.

    Args:
        name: the operator's name, ``prism_fast::<op>`` or ``prism_fast::<op>_<backend>``.
        backend: the op's backend, for messages.
        run: (*arguments) -> tuple of tensors; annotated, called by position. The first ``results`` tensors have
            gradients.
        fake: the same from shapes alone.
        save: (ctx, arguments, outputs) keeps on ctx the tensors and options that ``gradients`` reads.
        gradients: (ctx, traced, *upstream of the results) -> gradients of the leading arguments, None for one without.
            Some upstream gradients may be None, never all. ``traced``: inside a compiled graph.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., tuple[Tensor, ...]],
        *,
        backend: str,
        fake: Callable[..., tuple[Tensor, ...]],
        leading: int,
        results: int,
        save: Callable[[Any, tuple, tuple[Tensor, ...]], None],
        gradients: Callable[..., Sequence[Tensor | None]],
    ):
        self.op, self.backend = name.split("::")[1].removesuffix(f"_{backend}"), backend
        self.run, self.leading, self.results = run, leading, results
        self.operator = torch.library.custom_op(name, run, mutates_args=())
        self.operator.register_fake(fake)
        rest = (None,) * (len(inspect.signature(run).parameters) - leading)

        def keep(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def backward(ctx, traced: bool, upstream: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
            refuse_graph(self.op, self.backend)
            if all(g is None for g in upstream[:results]):
                return (None,) * leading
            return gradients(ctx, traced, *upstream[:results])

        self.operator.register_autograd(lambda ctx, *g: (*backward(ctx, True, g), *rest), setup_context=keep)

        class Eager(torch.autograd.Function):
            """Arguments and outputs without gradient pass in one list: autograd's bookkeeping costs time per tensor."""

            boxed_grads_call = False  # the default; without it, the engine raises and catches an AttributeError

            @staticmethod
            def forward(ctx, *given):
                *_, passed = given
                arguments = tuple(passed)
                passed[:] = outputs = run(*arguments)
                keep(ctx, arguments, outputs)
                return outputs[:results]

            @staticmethod
            def backward(ctx, *upstream):
                return *backward(ctx, False, upstream), None

        self._eager = Eager.apply

    def __call__(self, *arguments) -> Sequence[Tensor]:
        """All outputs; those beyond the results have no gradient. Raises NotImplementedError as `refuse_duals`."""
        first = arguments[: self.leading]
        if not plain(first[0]):
            outputs = self.operator(*arguments)
            return *outputs[: self.results], *(x.detach() for x in outputs[self.results :])
        refuse_duals(self.op, self.backend, *first)
        if torch.is_grad_enabled():
            for x in first:
                if x is not None and x.requires_grad:
                    passed = list(arguments)
                    found = self._eager(*first, passed)
                    return *found, *passed[self.results :]
        return self.run(*arguments)


def saved_once(ctx, op: str, cure: str) -> tuple[Tensor | None, ...]:
    """``ctx.saved_tensors`` of an op whose backward overwrites them. Raises RuntimeError the second time."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{op}: a second backward, but the first overwrote the tensors that forward had kept; {cure}"
        ) from error


def plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor outside of compilation, so that a call can bypass the dispatcher."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and not torch.compiler.is_compiling()


# Ops whose reference is composed of torch operations and has all of their derivatives.
COMPOSED = (
    "group_advantage",
    "moe_experts",
    "pairwise_loss",
    "plan_experts",
    "policy_loss",
    "route_experts",
    "shared_prefix_attention",
)


def refuse_duals(op: str, backend: str, *tensors: Tensor | None) -> None:
    """Refuse tensors with derivatives that ``backend`` would drop. Raises NotImplementedError."""
    dropped = torch._C._are_functorch_transforms_active()
    for x in tensors:
        dropped = dropped or (x is not None and forward_ad.unpack_dual(x).tangent is not None)
    if dropped:
        raise NotImplementedError(
            f"{op}: backend={backend!r} has gradients in reverse mode alone, not inside torch.func transforms or for "
            f"forward-mode dual tensors; {_cure(op)}"
        )


def refuse_graph(op: str, backend: str) -> None:
    """Refuse ``create_graph=True`` in a backward whose gradients have no gradients: they would be missing silently.

    Raises NotImplementedError.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: backend={backend!r} has no gradient of its gradient, which create_graph=True asks for; {_cure(op)}"
        )


def _cure(op: str) -> str:
    if op in COMPOSED:
        return "pass backend='reference'"
    return "no other backend has; compose it of torch operations there"
