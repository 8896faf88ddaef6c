"""Results of the ops: named tuples of tensors without state. Every scalar stays on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogProb(NamedTuple):
    """Result of ``linear_logprob`` and ``selected_logprob``."""

    logp: Tensor  # [N] natural logarithm of the target's probability; 0 on ignored rows
    entropy: Tensor  # [N] in nats, 0 on ignored rows; [0] when it was not asked for


class PolicyStats(NamedTuple):
    """Metrics of ``policy_loss``: 0-d tensors without gradient, over the active tokens of this call.

    To merge fractions and means over calls, weight them with ``tokens``. A mean over no token is NaN.
    """

    tokens: Tensor  # active tokens
    sequences: Tensor  # sequences with at least one active token
    policy_loss: Tensor  # the loss without the KL and entropy terms
    clip_fraction_low: Tensor  # share of tokens whose ratio was held at the lower bound (A < 0)
    clip_fraction_high: Tensor  # share of tokens whose ratio was held at the upper bound (A > 0)
    dual_clip_fraction: Tensor  # share of tokens held by dual_clip or delta (A < 0)
    ratio_mean: Tensor
    ratio_max: Tensor
    approx_kl: Tensor  # mean of old_logp - logp, nats
    kl: Tensor  # mean of the chosen estimator against ref_logp, nats; NaN without ref_logp
    entropy: Tensor  # mean entropy, nats; NaN without entropy


class ImportanceWeights(NamedTuple):
    """Result of ``importance_weights``."""

    weight: Tensor  # [N] factors for policy_loss(is_weight=...)
    effective_sample_size: Tensor  # 0-d, (sum w)^2 / sum w^2, in tokens or in sequences as the mode says
    masked_fraction: Tensor  # 0-d, share of tokens or sequences whose weight became 0
    clipped_fraction: Tensor  # 0-d, share of tokens or sequences whose weight was moved to a bound


class PairwiseStats(NamedTuple):
    """Metrics of ``pairwise_loss``, one entry per score: [K] tensors without gradient, counts of this call."""

    pairs: Tensor  # valid pairs
    ties: Tensor  # valid pairs with exactly equal scores; no accuracy is claimed for them
    correct: Tensor  # valid pairs in which the teacher is strictly ahead, before the clamp
    margin: Tensor  # mean teacher - student over valid pairs; NaN if there is none
    accuracy: Tensor  # correct / (pairs - ties); NaN if there is nothing to decide
    teacher: Tensor  # mean teacher score over valid pairs; NaN if there is none
    student: Tensor  # mean student score over valid pairs; NaN if there is none
    loss: Tensor  # Bradley-Terry part of the loss


class Routing(NamedTuple):
    """The experts of each token. M = T * top_k assignments, sorted by expert, then by token."""

    weights: Tensor  # [T, top_k] mixing weights
    experts: Tensor  # [T, top_k] int64 expert of each assignment
    permutation: Tensor  # [M] int64: sorted slot -> flat assignment t * top_k + j
    tokens: Tensor  # [M] int32: sorted slot -> token t
    slots: Tensor  # [T, top_k] int32: assignment -> its sorted slot, the inverse of the permutation
    offsets: Tensor  # [E + 1] int32: expert e owns sorted slots offsets[e]:offsets[e + 1]
    load: Tensor  # [E] sum over tokens of the router's full softmax (differentiable); [0] from plan_experts
    z_stat: Tensor  # 0-d sum over tokens of logsumexp(logits)^2 (differentiable); [0] from plan_experts


class PreparedPrefix(NamedTuple):
    """Result of ``prepare_prefix_layout``: the work of a backend that depends on the layout alone."""

    row: tuple[object, ...]  # the shapes, dtype and device that it serves
    lists: Tensor  # [n] int32, the tiles of the row and the tiles that they see


class PrefixLayout(NamedTuple):
    """Visibility of packed tokens in ``shared_prefix_attention``. All tensors int32, on the tokens' device.

    S consecutive segments divide the token axis; prefixes and branches are both segments. Every token sees the tokens
    up to itself in its own segment, and the whole prefix that its segment names.
    """

    cu_branch: Tensor  # [S + 1] offsets of the segments; tokens past the last offset are padding
    prefix_start: Tensor  # [P] first token of each prefix
    prefix_len: Tensor  # [P] tokens of each prefix
    branch_prefix: Tensor  # [S] the prefix a segment sees, or -1 (the prefixes themselves, plain sequences)
    max_prefix: int  # upper bound of prefix_len
    max_branch: int  # upper bound of the segments' lengths
    max_queries: int | None = None  # upper bound of the tokens that see one prefix; None: the row's length
    prepared: PreparedPrefix | None = None  # by ``prepare_prefix_layout``; None: every call computes it anew
