"""The accuracy contract: error against float64 relative to the error of eager PyTorch in the same dtype.

How large "the error of eager PyTorch" is, is a matter of luck where few numbers are compared: one rounding may happen
to fall away. So the plain formula runs in its dtype once as it is and a few times with each operator's result moved by
at most one unit in the last place at random (Monte Carlo arithmetic, Parker 1997), as another build of PyTorch might
have rounded it: the largest of these errors counts. Sums and products have their operands moved instead, in the dtype
they are summed in, because their rounding happens on the way. The same runs say how far the float64 formula itself can
be trusted, which a float64 backend is measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

RUNS = 3
# Units in the last place. Float64 is the specification's own dtype and has no wider one to sum in: there the contract
# guards against steps in float32 or by approximations, millions of units, not against the order of a sum.
UNITS = {torch.float64: 64}
ENDLESS = 1e20
# Operators that move or choose numbers and compute none.
EXACT = frozenset(
    """
    _to_copy abs alias amax amin argsort as_strided cat clone copy copy_ detach diag embedding empty empty_like eq
    expand fill fill_ flip full full_like gather ge gt index index_copy index_fill index_put index_put_ index_select
    isfinite isinf isnan le lift_fresh lt masked_fill masked_fill_ masked_select max maximum min minimum ne neg
    new_empty new_full new_ones new_zeros ones ones_like permute relu repeat scalar_tensor scatter select
    select_backward select_scatter sgn sign slice slice_backward slice_scatter sort split squeeze stack t threshold
    topk transpose tril triu unbind unsqueeze view where zero_ zeros zeros_like clamp clamp_min clamp_max
    _reshape_alias _unsafe_view constant_pad_nd nonzero arange unfold bitwise_and bitwise_not logical_and
""".split()
)
SUMS = frozenset(
    """
    addmm addmv addbmm baddbmm bmm cumsum dot index_add linalg_vector_norm logsumexp matmul mean mm mv scatter_add
    std std_mean sum var var_mean einsum index_add_ scatter_add_
""".split()
)


class Rounding(TorchDispatchMode):
    """Every result of arithmetic is moved by at most one unit in the last place."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in EXACT or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return func(*args, **kwargs)
        if name not in SUMS:
            return tree_map(self._moved, func(*args, **kwargs))
        kinds = {x.dtype for x in args if isinstance(x, Tensor)} & {torch.bfloat16, torch.float16}
        if func._schema.is_mutable or not kinds:
            return func(*tree_map(self._moved, args), **kwargs)
        found = func(*tree_map(lambda x: self._moved(_wide(x)), args), **kwargs)
        (kind,) = kinds if len(kinds) == 1 else (torch.float32,)
        return tree_map(lambda x: x.to(kind) if isinstance(x, Tensor) else x, found)

    def _moved(self, x):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            return x
        u = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2.0 - 1.0
        if x.dtype == torch.float64:
            return x * (1.0 + u * torch.finfo(x.dtype).eps)
        # Half a unit before another rounding to nearest: at most one unit in all.
        return (x.double() * (1.0 + 0.5 * u * torch.finfo(x.dtype).eps)).to(x.dtype)


def _wide(x):
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits (any NaN is any other)."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(7.77), b.nan_to_num(7.77))
        and (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()))
    )


def complaint(
    ours: Tensor,
    truth: Tensor,
    eagers: list[Tensor],
    c: float,
    terms: Tensor | None = None,
    computed: torch.dtype | None = None,
) -> str | None:
    """What is wrong with ``ours``, or None. ``terms``: of which ``truth`` is what is left after they cancel.
    ``computed``: the dtype of the computation, where the result is collected in a wider one."""
    if ours.shape != truth.shape:
        return f"shape {list(ours.shape)}, expected {list(truth.shape)}"
    if not ours.dtype.is_floating_point:
        return None if torch.equal(ours.long(), truth.long()) else f"got {_show(ours)}, expected {_show(truth)}"
    kind = torch.finfo(ours.dtype)
    found, exact = ours.double(), truth.double()
    if not torch.equal(found.isnan(), exact.isnan()):
        return f"NaN in other places: got {_show(ours)}, expected {_show(truth)}"
    # The logarithm of a probability that is 0 may come as a finite number below all that occur, which meets a later
    # factor of 0 better.
    endless = exact.abs() > kind.max * (1.0 - kind.eps)
    if not bool((found[endless].abs() >= min(ENDLESS, 0.99 * kind.max)).all()) or not torch.equal(
        found[endless].sign(), exact[endless].sign()
    ):
        return f"infinite in other places: got {_show(ours)}, expected {_show(truth)}"
    usable = ~endless & ~exact.isnan()
    error, size = (found - exact)[usable], exact[usable]
    if not bool(error.isfinite().all()):
        return f"not finite where it should be: got {_show(ours)}, expected {_show(truth)}"
    for name, measure in (("norm", _norm), ("maximum", _maximum)):
        usual = 0.0
        for eager in eagers:
            # Where eager PyTorch overflows it has no error to compare with.
            theirs = (eager.double() - exact)[usable]
            usual = max(usual, measure(torch.where(theirs.isfinite(), theirs, 0.0)))
        scale = max(measure(size), 0.0 if terms is None else measure(terms.double().nan_to_num(0.0, 0.0, 0.0)))
        units = max(UNITS.get(k, 4) * torch.finfo(k).eps for k in (ours.dtype, computed or ours.dtype))
        floor = units * scale + 4 * _least(ours.dtype) * math.sqrt(max(1, size.numel()))
        if measure(error) > c * usual + floor:
            return (
                f"error ({name}) {measure(error):.3e}, allowed {c:g} * {usual:.3e} + {floor:.3e}: "
                f"{measure(error) / (c * usual + floor):.3g} times too much; got {_show(ours)}, "
                f"expected {_show(truth)}"
            )
    return None


def _least(dtype: torch.dtype) -> float:
    """An error that does not count. The spacing of the smallest numbers of the dtype; and what is left of probabilities
    below the smallest normal number, which hardware may take for 0, times factors up to a thousand."""
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    return max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1024.0 * computed.smallest_normal)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _maximum(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _show(x: Tensor) -> str:
    flat = [round(v, 9) if isinstance(v, float) else v for v in x.flatten()[:6].tolist()]
    return f"{flat}{'...' if x.numel() > 6 else ''}"
