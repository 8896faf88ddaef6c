"""Group-relative advantages of responses that answer the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .reference.group_advantage import group_advantage as reference

OP = "group_advantage"
BACKENDS = ("reference", "native")
NORMALIZE = ("per_score", "combined", "mean_only", "leave_one_out", "batch")
INVALID = ("below_min", "exclude", "as_is")
SINGLETON = ("zero", "identity")


def group_advantage(
    scores: Tensor,
    group: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    valid: Tensor | None = None,
    gate: Tensor | None = None,
    offset: Tensor | None = None,
    normalize: str = "per_score",
    eps: float = 1e-6,
    invalid: str = "below_min",
    invalid_penalty: float = 0.0,
    singleton: str = "zero",
    power: float = 1.0,
    per_score: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``A = gate * sum_k weights_k * GN(scores_k) + offset - invalid_penalty * (not valid)``, no gradient.

    Responses come in any order with the ids of their prompts, or as a matrix with a row for each prompt::

        advantage = group_advantage(reward, group)  # [B], ids [B] (verl's uid as numbers) -> [B]
        advantage = group_advantage(reward.view(-1, num_generations))  # [P, n], TRL's order -> [P, n]
        advantage = group_advantage(scores, group, weights=(0.5, 0.5))  # [B, 2], ids [B] -> [B]

    Args:
        scores: [B, K] floating, B responses with K scores each, or [B] with one. Without ``group`` [P, n, K] or [P, n],
            and every [B] here is [P, n] then. Half precision is computed in float32.
        group: [B] int64 or int32, the prompt of each response, ids in [0, B) in any order. A group never spans calls.
            Rows with an id outside [0, B) come out as NaN. None: a matrix.
        weights: [K] floats or tensor; None is 1 for a single score.
        valid: [B] bool, responses that obey the format; None = all.
        gate, offset: [B] floating, on the scores' device.
        normalize: GN within a group.
            ``per_score``: (x - mean) / (std + eps) with the unbiased standard deviation, each score by itself.
            ``combined``: the same on the weighted sum of the scores.
            ``mean_only``: x - mean (Dr. GRPO, arXiv 2503.20783).
            ``leave_one_out``: x - mean of the group's others (RLOO, arXiv 2402.14740).
            ``batch``: (x - group mean) / (unbiased std over the whole call + eps) (arXiv 2508.08221).
            A group of exactly equal scores gives exactly 0.
        eps: added to the standard deviation, >= 0.
        invalid: the score of a response with ``valid = False``. ``below_min``: the group's smallest valid score - 1, or
            -1 if the group has no valid response. ``exclude``: the group's statistics ignore it, and its GN is 0.
            ``as_is``: its own score.
        invalid_penalty: subtracted from the advantage of invalid responses.
        singleton: GN in a group with one counted response. ``zero``: 0. ``identity``: as if its mean were 0 and its
            standard deviation 1, as published.
        power: z -> sign(z) |z|^power, normalised again within the group (GRGC's PGM, arXiv 2609.39757); only with
            ``per_score`` and ``combined``.
        per_score: return the gated and weighted terms [B, K] before their sum (for per-span credit).
        backend: None, "reference" or "native".

    Returns:
        [B], or [B, K] with ``per_score`` ([P, n] and [P, n, K] of a matrix); float64 for float64 scores, else float32.

    Raises:
        ValueError: wrong shape, dtype, device or option; ``per_score`` with ``combined``, ``offset`` or
            ``invalid_penalty``, which are defined for the sum alone.
        RuntimeError: the backend is missing on this machine.

    Cost: "native" on CUDA is one launch (three with ``batch``) in which every group scans all ids: B^2 / 32 loads, for
    some thousand responses.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); the six alignment advantages of PRISM (arXiv 2604.28123,
    ``compute_grpo_multi_reward_advantage``) are one or two such calls, see ``prism_fast.algorithms.advantages``.
    """
    _check_options(normalize, eps, invalid, invalid_penalty, singleton, power, per_score, offset is not None)
    shape = None
    if isinstance(scores, Tensor) and scores.dim() == (2 if group is None else 1):
        if isinstance(group, Tensor) and group.shape != scores.shape:
            raise ValueError(
                f"{OP}: scores {list(scores.shape)} must be as many as the ids in group {list(group.shape)}, or [B, K]"
            )
        scores, weights = scores[..., None], scores.new_ones(1) if weights is None else weights
    if group is None:
        checks.tensor(OP, "scores", scores, shape=(None, None, None))
        shape = tuple(scores.shape[:2])
        for name, value in (("valid", valid), ("gate", gate), ("offset", offset)):
            if value is not None:
                checks.tensor(OP, name, value, shape=shape, dtypes=(torch.bool, *checks.FLOATS), like=scores)
        scores = scores.reshape(shape[0] * shape[1], scores.shape[2])
        group = torch.arange(shape[0], device=scores.device)[:, None].expand(shape).reshape(-1)
        valid, gate, offset = (None if x is None else x.reshape(-1) for x in (valid, gate, offset))
    checks.tensor(OP, "scores", scores, shape=(None, None))
    rows, columns = scores.shape
    checks.tensor(OP, "group", group, shape=(rows,), dtypes=checks.INTEGERS, like=scores)
    if valid is not None:
        checks.tensor(OP, "valid", valid, shape=(rows,), dtypes=(torch.bool,), like=scores)
    checks.rows(OP, scores, rows, gate=gate, offset=offset)
    weights = _weights(weights, columns, scores)
    kernel = reference
    if choose(OP, BACKENDS, backend, scores) == "native":
        from prism_fast.ops.native.group_advantage import run as kernel
    options = (normalize, eps, invalid, invalid_penalty, singleton, power, per_score)
    found = kernel(scores, group, weights, valid, gate, offset, *options)
    return found if shape is None else found.reshape(*shape, *found.shape[1:])


def _check_options(
    normalize: str,
    eps: float,
    invalid: str,
    invalid_penalty: float,
    singleton: str,
    power: float,
    per_score: bool,
    has_offset: bool,
) -> None:
    """Refuse values and combinations that do not exist. Raises ValueError."""
    checks.choice(OP, "normalize", normalize, NORMALIZE)
    checks.choice(OP, "invalid", invalid, INVALID)
    checks.choice(OP, "singleton", singleton, SINGLETON)
    checks.number(OP, "eps", eps, low=0.0)
    checks.number(OP, "invalid_penalty", invalid_penalty)
    checks.number(OP, "power", power, low=0.0, strict=True)
    checks.flag(OP, "per_score", per_score)
    if power != 1.0 and normalize not in ("per_score", "combined"):
        raise ValueError(f"{OP}: power={power} shapes z-scores; normalize={normalize!r} gives none: use 'per_score'")
    if per_score and normalize == "combined":
        raise ValueError(f"{OP}: per_score=True needs one term per score; normalize='combined' has only their sum")
    if per_score and (has_offset or invalid_penalty != 0.0):
        raise ValueError(f"{OP}: offset and invalid_penalty belong to the sum; add them after per_score=True")


def _weights(weights: Tensor | Sequence[float], columns: int, scores: Tensor) -> Tensor:
    """[K] tensor on the scores' device. A CUDA graph needs a tensor: a list is copied from the host in each call."""
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(
                f"{OP}: weights must be a tensor or a sequence of {columns} numbers, one per score, got {weights!r}; "
                "write (1.0,) for a single score"
            )
        for value in weights:
            checks.number(OP, "weights", value)
        kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = torch.tensor(list(weights), dtype=kind, device=scores.device)
    checks.tensor(OP, "weights", weights, shape=(columns,), like=scores)
    return weights
