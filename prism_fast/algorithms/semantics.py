"""The settings behind the recipe's key ``semantics``.

``prism_fast`` is the default. ``released`` follows the published code, ``paper`` the equations of PRISM (arXiv
2604.28123, eq. 1-4): they have no score clamp, no penalty on the scores' squares and no format penalty, and normalise
the weighted sum of the two scores where the code normalises each score by itself.

The frames of the scored spans are in ``data.framing``, the loss of a micro-batch in ``alignment_loss``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prism_fast.released.terms import DIFFERS, TERMS


@dataclass(frozen=True)
class Semantics:
    """``normalize``, ``eps``, ``invalid``, ``singleton``: of ``group_advantage``.

    ``all_invalid``: advantage of a group without a valid response; ``penalty`` leaves the format penalty as it is.
    ``positions``: of the discriminator's tokens in alignment, see ``models.forward.collate``.
    ``format_penalty``, ``score_clip``, ``score_reg``: defaults of the recipe's keys of these names.
    ``clips_before_penalty``: the score clamp acts before the length penalty too, not after it alone.
    ``head_dropout``: of the discriminator's score head while it learns.
    ``divide_by_micro_batch``: each micro-batch's loss is divided by its own counts, so that it depends on the cut.
    ``learns_without_pairs``: the discriminator is updated where no response of a step is valid.
    ``warmup_shapes_scores``, ``warmup_balances``: ``score_clip`` and ``score_reg``, and the load-balancing loss, act in
    the discriminator's warm-up.
    ``published_grammar``: a response may repeat sections and leave them empty.
    ``differs``: differences from its source, in words; a run prints them.
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
    clips_before_penalty: bool = False
    head_dropout: float = 0.0
    divide_by_micro_batch: bool = False
    learns_without_pairs: bool = False
    warmup_shapes_scores: bool = True
    warmup_balances: bool = True
    published_grammar: bool = False
    differs: tuple[str, ...] = ()


SEMANTICS: dict[str, Semantics] = {
    "released": Semantics(**TERMS, differs=DIFFERS),
    "paper": Semantics("combined", 0.0, "exclude", "zero", "zero", "mrope", 0.0, None, 0.0),
    "prism_fast": Semantics("per_score", 1e-6, "exclude", "zero", "zero", "mrope", 1.5, 10.0, 0.001),
}
