"""Errors that name something the user can cure; the command line prints them without a traceback, as it does every
ValueError and OSError."""

from __future__ import annotations

from prism_fast.engine.finite import NonFiniteError
from prism_fast.models.token_budget import StepTooLargeError
from prism_fast.rewards import JudgeError
from prism_fast.track.jsonl import RecordError
from prism_fast.train.checkpoint import CheckpointError
from prism_fast.train.group_sampler import NoUsefulGroupError
from prism_fast.train.rollout_gap import RolloutGapError
from prism_fast.train.self_check import PackingError
from prism_fast.train.warmup import WarmupError

USER_ERRORS: tuple[type[Exception], ...] = (
    NonFiniteError,
    NoUsefulGroupError,
    StepTooLargeError,
    PackingError,
    RolloutGapError,
    WarmupError,
    CheckpointError,
    RecordError,
    JudgeError,
    FloatingPointError,
)
