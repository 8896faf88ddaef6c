"""The policy as a stage began with it, for the KL term of the policy loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from prism_fast.engine.protocol import Engine
from prism_fast.models.lora import has_lora, without_adapters
from prism_fast.models.packing import PromptGroup
from prism_fast.train.batching import Batching
from prism_fast.train.layouts import BatchPlan, MicroBatch


class Reference:
    """Log-probs under the weights that ``policy`` has when this is made.

    A policy with adapters is its own reference, without them: adapters begin at nothing. Any other is copied, which
    takes the memory of its weights a second time. Make it before an engine takes the policy and before a checkpoint is
    loaded.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.copied = not has_lora(policy)
        self.module = copy.deepcopy(policy).requires_grad_(False).eval() if self.copied else policy

    def ban(self, tokens: Sequence[int]) -> None:
        if self.copied:
            self.module.lm_head.ban(tokens)

    def plan(self, batching: Batching, groups: Sequence[PromptGroup], tokens: int, *, lockstep: bool) -> BatchPlan:
        """The same micro-batches as those of the policy."""
        return batching.plan(self.module.model, groups, tokens, lockstep=lockstep)

    @torch.no_grad()
    def logprobs(
        self, engine: Engine, plan: BatchPlan, micro_batch: MicroBatch, *, temperature: float, banned: bool
    ) -> Tensor:
        """Log-probs [N] float32 or wider of the response tokens of a micro-batch of ``plan``, in its order."""

        def compute() -> Tensor:
            forward = plan.forward(micro_batch)
            hidden = forward.hidden.index_select(0, forward.predict.index)
            return self.module.lm_head(hidden, forward.predict.target, temperature=temperature, banned=banned).logp

        with nullcontext() if self.copied else without_adapters(self.module):
            logp = compute() if self.copied else engine.run(compute)
        plan.finish(micro_batch, None)
        return logp
