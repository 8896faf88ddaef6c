"""The published settings of the alignment step, and how ``semantics=released`` differs from the published code."""

from __future__ import annotations

from typing import Any

TERMS: dict[str, Any] = dict(
    normalize="per_score",
    eps=1e-6,
    invalid="below_min",
    singleton="identity",
    all_invalid="penalty",
    positions="text",
    format_penalty=1.5,
    score_clip=10.0,
    score_reg=0.001,
    clips_before_penalty=True,
    head_dropout=0.1,
    divide_by_micro_batch=True,
    learns_without_pairs=True,
    warmup_shapes_scores=False,  # the published warm-up has neither clamp nor regulariser
    published_grammar=True,
    warmup_balances=False,  # with its gradient checkpointing its load-balancing loss has no gradient
)
"""Fields of ``algorithms.semantics.Semantics``."""

DIFFERS = (
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
"""Differences from the published code, in words; all other arithmetic is meant to be the same."""
