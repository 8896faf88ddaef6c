"""What the recipe's key ``semantics`` means, term by term, and where ``released`` is not what was published.

``prism_fast`` is the default. ``released`` is what the published code does, ``paper`` what PRISM's equations say
(arXiv 2604.28123, eq. 1-4): they have no score clamp, no penalty on the scores' squares, no format penalty, and
normalise the weighted sum of the two scores where the code normalises each score by itself.

The frames of the scored spans are in ``data.framing``, the loss of a micro-batch in ``alignment_loss``, the head's
dropout in ``models.discriminator``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Semantics:
    """``normalize``, ``eps``, ``invalid``, ``singleton``: of ``group_advantage``.

    ``all_invalid``: advantage of a group without a valid response; ``penalty`` leaves the format penalty as it is.
    ``positions``: of the discriminator's tokens in alignment, see ``models.forward.collate``.
    ``format_penalty``, ``score_clip``, ``score_reg``: what the recipe's keys of these names stand for when not given.
    """

    normalize: Literal["per_score", "combined"]
    eps: float
    invalid: Literal["below_min", "exclude"]
    singleton: Literal["identity", "zero"]
    all_invalid: Literal["penalty", "zero"]
    positions: Literal["mrope", "text"]
    format_penalty: float
    score_clip: float | None
    score_reg: float


SEMANTICS: dict[str, Semantics] = {
    "released": Semantics("per_score", 1e-6, "below_min", "identity", "penalty", "text", 1.5, 10.0, 0.001),
    "paper": Semantics("combined", 0.0, "exclude", "zero", "zero", "mrope", 0.0, None, 0.0),
    "prism_fast": Semantics("per_score", 1e-6, "exclude", "zero", "zero", "mrope", 1.5, 10.0, 0.001),
}

RELEASED_DIFFERS = (
    "everything is drawn from one seed; images are resized once, prompts are never cut, bad samples never replaced",
    "micro-batches are cut by this program, for one process; the published losses depend on that cut",
    "scores and losses are float32 where the published ones are bfloat16",
    "warm-up: the losses of captions and reasonings add up instead of being averaged (only gradient clipping "
    "sees it); every score is read at its row's own last token",
    "alignment: invalid responses are not computed, so their scores enter the penalty on squares as 0",
    "align.advantage=gated_align: wrong answers are gated; the published code never grades answers in that mode",
    "dynamic sampling: a group is useful if its rewards differ, surplus is kept, a lack of useful groups ends nothing",
    "optimizers: norms and biases are not decayed, the first update of a learning-rate warm-up is not 0",
    "metrics are counts and true means",
)
"""What ``released`` leaves out of the published code, for people; everything else is meant to be its arithmetic."""
