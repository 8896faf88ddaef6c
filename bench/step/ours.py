"""Our step: the trainers on packed rows."""

from __future__ import annotations

from prism_fast.algorithms.presets import policy_options
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.discriminator_trainer import DiscriminatorLoss, DiscriminatorTrainer
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer
from prism_fast.train.scored_group import ScoredGroup

from .column import Column, Outcome
from .published import CLIP, L2
from .work import Models, Work


class Ours(Column):
    """A whole group is one row, and the token budget is its length."""

    def __init__(self, name: str, models: Models, work: Work) -> None:
        super().__init__(name, models, work)
        for model in (self.policy, self.discriminator.backbone):
            use_layout("shared_prefix", model)
        for engine in self.engines().values():
            engine.packing_checked = True  # the comparison of the columns checks it, without forwards to be counted
        shape = work.shape
        tokens = shape.prompt + shape.rollouts * shape.response + shape.teacher
        budget = TokenBudget(tokens, notify=print)
        framed = [work.spans(response) for response in work.responses]
        self.groups = [ScoredGroup(work.prompt, work.spans(work.teacher), framed)]
        completions = [
            Completion(ids, logprobs, 0.0, "stop")
            for ids, logprobs in zip(work.responses, work.logprobs or [], strict=True)
        ]
        self.batch = PolicyBatch([work.prompt], [0] * shape.rollouts, completions, work.advantage)
        self.discriminator_trainer = DiscriminatorTrainer(
            self.discriminator_engine,
            Batching("shared_prefix", budget, work.widths.pad_id, whole_groups=True),
            DiscriminatorLoss(score_clip=CLIP, score_reg=L2),
            spans=("caption", "reasoning"),
            prefix="disc/",
        )
        self.policy_trainer = PolicyTrainer(
            self.policy_engine,
            Batching("shared_prefix", budget, work.widths.pad_id),
            policy_options("prism", max_response=shape.response),
            temperature=1.0,
        )

    def score(self) -> None:
        """Nothing: the forward of the update computes the scores."""

    def update_discriminator(self) -> None:
        self.scores = self.discriminator_trainer.score_and_accumulate(self.groups)
        self.discriminator_trainer.step()

    def update_policy(self) -> None:
        self.metrics = self.policy_trainer.accumulate(self.batch) | self.policy_trainer.step()

    def outcome(self) -> Outcome:
        discriminator, policy = self.scores.metrics.read(), self.metrics.read()
        return Outcome(
            self.scores.student,
            self.scores.teacher[0],
            discriminator["disc/loss"],
            policy["policy/loss"],
            policy["rollout/logprob_gap_max"],
        )
