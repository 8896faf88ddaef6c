"""Log-probability from logits by the compiled kernels: the logits are read once in forward and once in backward.

Semantics and validation: ``prism_fast.ops.selected_logprob``; arithmetic: ``csrc/selected_logprob.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_fast.ops import native

from ..bad_values import counter
from ..forms import TwoForms
from ..results import LogProb
from . import calls

KERNEL = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def run(logits: Tensor, target: Tensor, *, temperature: float | Tensor, entropy: bool, ignore_index: int) -> LogProb:
    """The public op has already validated the arguments.

    Differentiable once, in ``logits``. Keeps the logits and two or three numbers per row for backward. Does not
    synchronise, and can be captured in a CUDA graph. Raises RuntimeError if the kernels are missing.
    """
    if isinstance(temperature, Tensor):
        by_row, of_all = temperature.detach(), 1.0
    else:
        by_row, of_all = None, float(temperature)
    return LogProb(*_forms(logits, target, by_row, of_all, entropy, ignore_index)[:2])


def _run(
    logits: Tensor, target: Tensor, temperature: Tensor | None, one_temperature: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or [0], row maximum [N], log-sum [N]), in the type of the computation."""
    out = _allocate(logits, entropy)
    _call(out, None, logits, target, temperature, one_temperature, ignore_index)
    return out


def _kind(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _allocate(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return tuple(logits.new_empty(n, dtype=_kind(logits)) for n in (rows, rows if entropy else 0, rows, rows))


def _gradient(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    one_temperature: float,
    ignore_index: int,
    entropy: Tensor,
    top: Tensor,
    log_sum: Tensor,
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
) -> Tensor:
    """Gradient with respect to the logits, in their dtype."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if entropy.shape[0] != logits.shape[0]:
        entropy_grad = None
    kept, upstream = (None, entropy, top, log_sum), (gradient, logp_grad, entropy_grad)
    _call(kept, upstream, logits, target, temperature, one_temperature, ignore_index)
    return gradient


def _call(
    rows: tuple[Tensor | None, Tensor, Tensor, Tensor],
    backward: tuple[Tensor, Tensor | None, Tensor | None] | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    one_temperature: float,
    ignore_index: int,
) -> None:
    """Write ``rows`` (logp, entropy, row maximum, log-sum), or with ``backward`` read them and write its first tensor.

    ``backward``: (gradient [N, V] dense in the logits' dtype, upstream gradient of logp or None, likewise of the
    entropy).
    """
    kind, module = _kind(logits), native.module()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    target = target.contiguous()
    if temperature is not None:
        temperature = temperature.to(kind)
    logp, entropy, top, log_sum = rows
    gradient, logp_grad, entropy_grad = (None, None, None) if backward is None else backward
    with calls.on_device("selected_logprob", logits):
        getattr(module, f"selected_logprob_{KERNEL[logits.dtype]}")(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            target=target.data_ptr(),
            target_is_64=target.dtype == torch.int64,
            temperature=calls.address(temperature),
            temperature_stride=_stride(temperature),
            one_temperature=one_temperature,
            ignore_index=ignore_index,
            rows=logits.shape[0],
            vocabulary=logits.shape[1],
            logp=calls.address(logp),
            entropy=entropy.data_ptr(),
            top=top.data_ptr(),
            log_sum=log_sum.data_ptr(),
            logp_grad=calls.address(logp_grad),
            logp_grad_stride=_stride(logp_grad),
            entropy_grad=calls.address(entropy_grad),
            entropy_grad_stride=_stride(entropy_grad),
            gradient=calls.address(gradient),
            bad=counter(logits.device).data_ptr(),
            backward=backward is not None,
            threads=torch.get_num_threads(),
            stream=calls.stream_of(logits),
        )


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.dim() == 0 else x.stride(0)


def _save(ctx, inputs, output) -> None:
    logits, target, temperature, one_temperature, _, ignore_index = inputs
    _, entropies, top, log_sum = output
    ctx.save_for_backward(logits, target, temperature, entropies, top, log_sum)
    ctx.one_temperature, ctx.ignore_index = one_temperature, ignore_index


def _gradients(ctx, traced: bool, logp_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor]:
    logits, target, temperature, *kept = ctx.saved_tensors
    gradient = _gradient_operator if traced else _gradient
    options = (ctx.one_temperature, ctx.ignore_index)
    return (gradient(logits, target, temperature, *options, *kept, logp_grad, entropy_grad),)


_gradient_operator = torch.library.custom_op("prism_fast::selected_logprob_gradient", _gradient, mutates_args=())


@_gradient_operator.register_fake
def _(logits: Tensor, *arguments) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forms = TwoForms(
    "prism_fast::selected_logprob",
    _run,
    backend="native",
    fake=lambda logits, target, temperature, one_temperature, entropy, ignore_index: _allocate(logits, entropy),
    leading=1,
    results=2,
    save=_save,
    gradients=_gradients,
)
