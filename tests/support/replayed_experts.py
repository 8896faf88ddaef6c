"""Forces the experts that one forward chose upon another one: a flip of a near-tie is a discontinuity, and no error of
what is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from prism_fast.models import experts
from prism_fast.ops import Routing, plan_experts


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """``[T, top_k]`` of every call of a router within, in order."""
    found: list[Tensor] = []
    right = experts.route_experts

    def route(logits: Tensor, top_k: int) -> Routing:
        routing = right(logits, top_k)
        found.append(routing.experts.detach().clone())
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "route_experts", route)
        yield found


@contextmanager
def replayed(choices: Sequence[Tensor]) -> Iterator[None]:
    """The routers of one forward within take ``choices``, ``[T, top_k]`` each, in their order; the weights are the
    softmax of their own logits at these experts, renormalised as ``route_experts`` does."""
    left = iter(choices)

    def route(logits: Tensor, top_k: int) -> Routing:
        chosen = next(left)
        assert chosen.shape == (len(logits), top_k)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = logits.softmax(-1, dtype=wide).gather(-1, chosen.long())
        return plan_experts(chosen, weights / weights.sum(-1, keepdim=True), logits.shape[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "route_experts", route)
        yield
    assert next(left, None) is None, "the forward had fewer sparse layers than the recorded one"


def by_token(choices: Sequence[Tensor], source: Tensor) -> list[Tensor]:
    """The choices for tokens that are ``source`` [T'] of the recorded ones (-1: padding, which takes the first)."""
    return [chosen[source.clamp(min=0)] for chosen in choices]
