"""Our step: the trainer's own functions on packed rows."""

from __future__ import annotations

from prism_fast.algorithms.presets import policy_options
from prism_fast.rollout.protocol import Completion
from prism_fast.train.discriminator_update import SpanGroup, discriminate
from prism_fast.train.layouts import prepare
from prism_fast.train.microbatch import TokenBudget
from prism_fast.train.policy_update import PolicyBatch, update_policy

from .column import Column, Outcome
from .published import CLIP, L2
from .work import Models, Work


class Ours(Column):
    """A whole group is one row: the budget is what it needs."""

    def __init__(self, name: str, models: Models, work: Work) -> None:
        super().__init__(name, models, work)
        for model in (self.policy, self.discriminator.backbone):
            prepare("shared_prefix", model)
        for engine in self.engines().values():
            engine.packing_checked = True  # the comparison of the columns is this check, and it is not to be counted
        shape = work.shape
        tokens = shape.prompt + shape.rollouts * shape.response + shape.teacher
        self.budget = TokenBudget(tokens, notify=print)
        framed = [work.spans(response) for response in work.responses]
        self.groups = [SpanGroup(work.prompt, work.spans(work.teacher), framed)]
        completions = [
            Completion(ids, logprobs, 0.0, "stop")
            for ids, logprobs in zip(work.responses, work.logprobs or [], strict=True)
        ]
        self.batch = PolicyBatch([work.prompt], [0] * shape.rollouts, completions, work.advantage)
        self.options = policy_options("prism", max_response=shape.response)

    def score(self) -> None:
        """The forward of the update gives the scores."""

    def update_discriminator(self) -> None:
        self.discriminator.train()
        self.scores, self.loss = discriminate(
            self.critic_engine,
            self.groups,
            self.budget,
            learn=True,
            layout="shared_prefix",
            pad_id=self.work.widths.pad_id,
            device=self.device,
            semantics="prism_fast",
            score_clip=CLIP,
            score_reg=L2,
        )
        self.critic_engine.step()

    def update_policy(self) -> None:
        self.numbers = update_policy(
            self.policy_engine,
            self.batch,
            self.options,
            temperature=1.0,
            pad_id=self.work.widths.pad_id,
            budget=self.budget,
            device=self.device,
            layout="shared_prefix",
        )

    def outcome(self) -> Outcome:
        return Outcome(
            self.scores.student,
            self.scores.teacher[0],
            float(self.loss),
            self.numbers["policy/loss"],
            self.numbers["rollout/logprob_gap_max"],
        )
