"""Our ops in verl: policy losses in its registry, and `linear_logprob` as the head behind its fused kernels.

    from prism_fast.integrations import verl
    verl.register()

in every process that trains (for verl: a module named in ``actor_rollout_ref.model.external_lib``), then
``actor_rollout_ref.actor.policy_loss.loss_mode=prism_vanilla`` (or ``prism_gspo``, ``prism_cispo``, ``prism_sapo``).
`use_linear_logprob` replaces the head of ``actor_rollout_ref.model.use_fused_kernels=True`` with the implementation
"torch".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_fast import ops

LOSSES = ("vanilla", "gspo", "cispo", "sapo")
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}


def register(prefix: str = "prism_") -> tuple[str, ...]:
    """Put the losses into verl's registry as ``prefix`` + vanilla, gspo, cispo, sapo and return these names.

    With verl's ``loss_agg_mode`` vanilla is GRPO (seq-mean-token-mean), DAPO (token-mean with ``clip_ratio_high``),
    Dr. GRPO (seq-mean-token-sum-norm). A registered loss gives the loss, gradient and metrics of verl's own
    (``compute_policy_loss_<name>``; verl's 1e-8 beside token counts is left out), with one synchronisation for its
    metrics instead of three. GSPO has seq-mean-token-mean alone, CISPO also token-mean, and "token-sum" is not
    offered: ValueError.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    for name in LOSSES:
        register_policy_loss(prefix + name)(partial(policy_loss, name))
    return tuple(prefix + name for name in LOSSES)


def policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss ``name``: [B, T] tensors in, (loss 0-d, metrics) out. ``config``: verl's ActorConfig."""
    if name == "sapo":
        loss_agg_mode = "seq-mean-token-mean"  # as in verl, whatever is asked for
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"prism_{name}: loss_agg_mode={loss_agg_mode!r} is not one of {', '.join(AGGREGATIONS)}")
    clip = tuple(
        config.clip_ratio if side is None else side for side in (config.clip_ratio_low, config.clip_ratio_high)
    )
    options = {
        "vanilla": lambda: {"loss": "grpo", "clip": clip, "dual_clip": config.get("clip_ratio_c", 3.0)},
        "gspo": lambda: {"loss": "gspo_token", "clip": clip},  # advantages come per token
        "cispo": lambda: {"loss": "cispo", "clip": clip},
        "sapo": lambda: {"loss": "sapo", "sapo_temperature": (config.tau_pos, config.tau_neg)},
    }[name]()
    info = config.global_batch_info
    ranks = info.get("dp_size") or 1
    count = info.get("batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size")
    if count is None and ranks > 1:
        raise ValueError(f"prism_{name}: {ranks} data-parallel ranks need verl's global batch information")
    if loss_agg_mode == "seq-mean-token-sum-norm":
        scale = info.get("loss_scale_factor")
        options["norm_length"] = float(response_mask.shape[1] if scale is None else scale)

    loss, stats = ops.policy_loss(
        log_prob,
        None,
        old_logp=old_log_prob,
        token_advantage=advantages,
        mask=response_mask,
        aggregation=AGGREGATIONS[loss_agg_mode],
        denominator=None if count is None else count / ranks,
        is_weight=rollout_is_weights,
        **options,
    )
    clipped = stats.clip_fraction_low + stats.clip_fraction_high
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    values = torch.stack((clipped, stats.approx_kl, stats.dual_clip_fraction)).nan_to_num().tolist()
    return loss, dict(zip(names, values, strict=True))


def use_linear_logprob() -> None:
    """verl's ``FusedLinearForPPO`` computes with `linear_logprob` from now on, in this process.

    hidden_states [..., H], vocab_weights [V, H], input_ids [...], temperature a number; log-probabilities and
    entropies [...] come back in float32 (verl's entropy has the dtype of the hidden states), both differentiable.
    """
    from verl.utils.experimental import torch_functional

    torch_functional.FusedLinearForPPO.forward = _fused_linear


def _fused_linear(
    self: torch.nn.Module, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    found = ops.linear_logprob(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        vocab_weights,
        input_ids.reshape(-1),
        temperature=temperature,
        entropy=True,
    )
    return found.logp.view(input_ids.shape), found.entropy.view(input_ids.shape)
