"""Drawing tokens with random numbers that depend on the response, not on the batch it is generated in.

A uniform number is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of a key
and the token's position; the key is made of the prompt's seed and the response's number. All of it is integer
arithmetic, so CPU and CUDA agree to the bit. A token is drawn by inverting the cumulative distribution, with
probabilities rounded down to multiples of 2**-52: a sum of integers does not depend on its order, as that of CUDA's
floating-point ``cumsum`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def response_key(seed: int, number: int) -> int:
    """The key of the ``number``-th response (from 0) to a prompt with ``seed``, as a signed 64-bit integer."""
    if not 0 <= seed <= _MASK:
        raise ValueError(f"a seed must be 0 or more and below 2**64, got {seed}")
    return _signed(_mix(_mix(seed + _STEP) + (number + 1) * _STEP))


def uniform(keys: Tensor, position: int) -> Tensor:
    """[B] float64 in [0, 1), multiples of 2**-53: the number of each of ``keys`` [B] int64 at a token position."""
    z = keys + _signed(((position + 1) * _STEP) & _MASK)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)  # int64 products wrap around
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def draw(probs: Tensor, at: Tensor) -> Tensor:
    """One token per row of ``probs`` [B, V] float32, [B] int64: the one whose interval of the cumulative distribution
    holds ``at`` [B] float64 in [0, 1). A token of probability 0 is never drawn. A row with NaN gives an arbitrary one.
    """
    cumulative = (probs * 2.0**52).long().cumsum(dim=-1)  # exact: a float32 has 24 bits
    whole = cumulative[:, -1]
    target = torch.minimum((at * whole.double()).long(), whole - 1)
    token = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return token.clamp_(max=probs.shape[1] - 1)  # only NaN leads past the last token


def truncated(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """``scores`` [B, V] with -inf for tokens that are left out; see `protocol.Sampling`. Equal scores at the border of
    ``top_k`` all stay, at that of ``top_p`` the lower ids; the likeliest token always stays."""
    if 0 < top_k < scores.shape[1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]  # [B, 1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = (ordered.softmax(dim=-1) * 2.0**52).long()  # whole numbers: their sums are exact
        before = mass.cumsum(dim=-1) - mass
        beyond = before.double() >= top_p * mass.sum(dim=-1, keepdim=True).double()
        scores = scores.masked_fill(beyond.gather(1, order.argsort(dim=-1)), -torch.inf)
    return scores


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own fills with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
