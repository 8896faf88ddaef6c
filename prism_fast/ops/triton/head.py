"""A language-model head applied to rows: scores forward, gradients backward, by the Triton kernels.

`linear_logprob` keeps the scores of all rows or computes them twice; `linear_policy_loss` goes through waves of rows.
Both are composed of these steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import products
from ..reference import softmax_rows

if TYPE_CHECKING:
    from prism_fast.kernels.logprob import Scores

# Rows per launch where no scores are kept. A row needs a few hundred statistics, some per tile of the vocabulary.
STATISTICS_ROWS = 8192
WIDTH_UNIT = 16


class Rows:
    """Operands of a head and the gradients collected so far.

    hidden [N, H], weight [V, H] (rounded to the dtype of hidden), bias [V] or None, target [N] (a value outside [0, V)
    is no column), temperature [N] or [1] float32.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
        entropy: bool,
    ):
        if hidden.dtype == torch.float64:
            raise NotImplementedError("linear_logprob: backend='triton' has no float64; pass backend='reference'")
        if hidden.shape[1] == 0 or hidden.shape[1] % WIDTH_UNIT:
            raise ValueError(
                f"linear_logprob: backend='triton' needs a hidden size divisible by {WIDTH_UNIT}, got "
                f"{hidden.shape[1]}; pad hidden and weight with zeros, or pass backend='reference'"
            )
        self.hidden, self.weight = _aligned(hidden), _aligned(weight.to(hidden.dtype))
        self.bias = None if bias is None else bias.contiguous()
        self.target, self.temperature = target.contiguous(), temperature
        self.softcap, self.entropy = softcap, entropy
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def forward(self, block: slice, keep: bool) -> Scores:
        """Statistics of the rows ``block``; with ``keep`` also the exponentials of their scores."""
        from prism_fast.kernels import launch, logprob

        with launch.on_device(self.hidden):
            return logprob.scores(
                self.hidden[block],
                self.weight,
                self.target[block],
                self._temperature(block),
                bias=self.bias,
                softcap=self.softcap,
                entropy=self.entropy,
                keep=keep,
            )

    def prepare(self, wants: tuple[bool, bool, bool], weight_grad: Tensor | None) -> None:
        """Set up the gradients of hidden, weight and bias that `backward` fills; ``weight_grad`` is added to."""
        self.wants = wants
        self.hidden_grad = torch.empty_like(self.hidden) if wants[0] else None
        self.bias_grad = self.weight.new_zeros(self.weight.shape[0], dtype=torch.float32) if wants[2] else None
        self.weight_grad = weight_grad if wants[1] else None

    def log_sum_exp(self, block: slice, found: Scores) -> Tensor:
        """[n] of the capped scores divided by the temperature."""
        return found.row_max * ((self.softcap or 1.0) / self._temperature(block)) + found.log_sum

    def backward(
        self,
        block: slice,
        found: Scores,
        g: Tensor,
        h: Tensor | None = None,
        apart: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add the gradients of the rows ``block``; overwrites ``found.kept``.

        ``g``, ``h`` [n] float32: upstream gradients of log-probability and entropy (None: no entropy). ``apart``:
        (q, s), the coefficients of the probabilities and of every column, as in the kernel.
        """
        from prism_fast.kernels import launch, logprob

        # Without autocast, which would round float32 results of products.
        with launch.on_device(self.hidden), torch.autocast(self.hidden.device.type, enabled=False):
            dz = logprob.gradient_(
                found, self.target[block], self._temperature(block), g, h, self.weight.shape[0], softcap=self.softcap,
                apart=apart,
            )  # [n, V]  # fmt: skip
            if self.wants[0]:
                self.hidden_grad[block] = products.product(dz, self.weight, self.hidden.dtype)
            if self.wants[1]:
                # A row without upstream gradient must add nothing, even where its hidden state is not finite.
                active = softmax_rows.active(g, h, apart)
                x = torch.where(active[:, None], self.hidden[block], 0.0)
                if self.weight_grad is None:  # a single wave is rounded once; several are added up in float32
                    kind = self.dtypes[1] if len(x) == len(self.hidden) else torch.float32
                    self.weight_grad = products.product(dz.t(), x, kind)
                else:
                    products.add_product(self.weight_grad, dz.t(), x)
            if self.wants[2]:
                self.bias_grad += dz.sum(0, dtype=torch.float32)

    def gradients(self, with_weight: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight (None without ``with_weight``) and bias, in their dtypes; None if not wanted."""
        if self.wants[1] and self.weight_grad is None:  # there were no rows
            self.weight_grad = torch.zeros_like(self.weight, dtype=self.dtypes[1])
        found = (self.hidden_grad, self.weight_grad if with_weight else None, self.bias_grad)
        return tuple(None if x is None else x.to(kind) for x, kind in zip(found, self.dtypes, strict=True))

    def _temperature(self, block: slice) -> Tensor:
        return self.temperature if self.temperature.shape[0] == 1 else self.temperature[block]


def temperature_rows(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """[N] or [1] float32 temperature."""
    if isinstance(temperature, Tensor):
        return temperature.detach().to(torch.float32).reshape(-1).contiguous()
    return torch.full((1,), temperature, dtype=torch.float32, device=hidden.device)


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows are contiguous and start at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
