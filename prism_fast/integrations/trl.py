"""Our ops in TRL's GRPO trainer: `linear_logprob` as its output head, `policy_loss` as its loss.

    from trl import GRPOTrainer
    from prism_fast.integrations.trl import FusedLoss

    class Trainer(FusedLoss, GRPOTrainer):
        pass

``Trainer`` takes what ``GRPOTrainer`` takes. Rollouts, rewards, advantages and the reference model stay TRL's.
"""

from __future__ import annotations

import functools
import math
import types
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from prism_fast import ops
from prism_fast.models.logprob_head import LogProbHead

# The mixin replaces private methods, so it trusts the releases whose methods its tests have seen.
TESTED = "1.16"
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo")


class FusedLoss:
    """Mixin for ``trl.GRPOTrainer``, named before it. ``loss_type`` grpo, dapo, dr_grpo, bnpo, cispo and sapo;
    ``importance_sampling_level="sequence"`` with grpo is GSPO.

    Loss, gradient and metrics are those of ``GRPOTrainer`` (tested in float64), except where ``policy_loss`` clamps:
    log-ratios beyond +-20, GSPO's sequence log-ratio above 10, the KL estimate beyond +-10. The metrics cost one
    synchronisation per micro-batch instead of one each.

    Raises on construction: RuntimeError with another TRL than tested; NotImplementedError for settings without a
    counterpart here, naming them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        installed = Version(version("trl"))
        if installed.release[:2] != Version(TESTED).release:
            raise RuntimeError(f"FusedLoss: written for trl {TESTED}, found {installed}; install 'trl=={TESTED}.*'")
        super().__init__(*args, **kwargs)
        refused = _refused(self)
        if refused:
            raise NotImplementedError(f"FusedLoss: no counterpart for {'; '.join(refused)}; use GRPOTrainer itself")
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        use_linear_logprob(model, temperature=self.temperature)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        attended = inputs["completion_mask"]  # [B, T]
        mask = attended * inputs["tool_mask"] if "tool_mask" in inputs else attended
        rows, length = mask.shape
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1),
            torch.cat((inputs["prompt_mask"], attended), dim=1),
            length,
            compute_entropy=True,
            **{name: inputs.get(name) for name in _MEDIA},
        )
        if inputs["advantages"].dim() != 1:
            raise NotImplementedError("FusedLoss: advantages must be [B], one per completion")
        training = self.model.training
        mode = "train" if training else "eval"
        denominator, norm_length = self._denominator(inputs, mask, training)
        weight = inputs["importance_sampling_ratio"] if self._corrects_rollouts() else None
        old = inputs.get("old_per_token_logps")
        loss, stats = ops.policy_loss(
            logp,
            inputs["advantages"],
            old_logp=old,
            mask=mask,
            denominator=denominator,
            norm_length=norm_length,
            ref_logp=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            kl_coef=self.beta,
            kl_importance=self.args.use_bias_correction_kl,
            is_weight=None if weight is None else weight.expand(rows, length),  # that of a sequence is [B, 1]
            **_options(self),
        )
        self._note(inputs["advantages"], logp.detach(), old, entropy.detach(), mask, stats, mode)
        if self._entropy_bonus_enabled:
            loss = self._with_entropy_bonus(loss, entropy, mask, mode)
        return loss

    def _with_entropy_bonus(self, loss: Tensor, entropy: Tensor, mask: Tensor, mode: str) -> Tensor:
        """TRL's bonus: the mean over the micro-batch's tokens, whatever the loss divides by."""
        training = mode == "train"
        steps = self.current_gradient_accumulation_steps if training else 1.0
        per_window = self.loss_type in ("dapo", "cispo")  # their loss is a share of the window's already
        policy = self.accelerator.gather(loss.detach() * (1.0 if per_window else steps)).nanmean()
        total, count = (entropy * mask).sum(), mask.sum()
        coef = self.entropy_coef
        if self.use_adaptive_entropy and not self._last_world_entropy <= self.args.entropy_target:
            coef = 0.0
        self._metrics[mode]["policy_loss"].append(policy.item())
        if self.use_adaptive_entropy and training:
            self._steer_entropy(torch.stack((total.detach(), count.to(total.dtype))))
        if training and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        return loss - coef * total / count.clamp(min=1.0) / steps

    def _steer_entropy(self, sums: Tensor) -> None:
        """TRL's controller of ``entropy_coef``; ``sums`` [2]: entropy and tokens of a micro-batch."""
        seen = self._entropy_window_stats
        self._entropy_window_stats = sums if seen is None else seen + sums
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
        self._entropy_window_stats, self._last_world_entropy = None, total / max(count, 1.0)
        step = self.args.entropy_coef_delta
        up = self._last_world_entropy <= self.args.entropy_target
        moved = self.entropy_coef + (step if up else -step)
        self.entropy_coef = min(moved, self.args.entropy_coef_max) if up else max(moved, self.args.entropy_coef_min)

    def _denominator(self, inputs: dict[str, Any], mask: Tensor, training: bool) -> tuple[Tensor | float, float | None]:
        """What the aggregation divides by so that a sum over micro-batches is TRL's loss, and dr_grpo's length."""
        steps = float(self.current_gradient_accumulation_steps) if training else 1.0
        if self.loss_type in ("dapo", "cispo"):  # the tokens of the generation batch, per optimiser step and process
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return items * (steps / self.args.steps_per_generation if training else 1.0), None
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) * steps, None
        # Rows without a token count: TRL takes the mean over all rows.
        return mask.shape[0] * steps, float(self.max_completion_length) if self.loss_type == "dr_grpo" else None

    def _corrects_rollouts(self) -> bool:
        return bool(self.use_vllm and self.vllm_importance_sampling_correction)

    def _note(
        self,
        advantage: Tensor,
        logp: Tensor,
        old: Tensor | None,
        entropy: Tensor,
        mask: Tensor,
        stats: ops.PolicyStats,
        mode: str,
    ) -> None:
        """TRL's metrics over all processes, with one synchronisation."""
        drift = torch.zeros_like(logp) if old is None else logp - old
        means = {"entropy": (entropy, mask)}  # name -> (values, which of them count)
        if self.beta != 0.0:
            means["kl"] = (stats.kl.nan_to_num()[None], stats.tokens[None])
        spans = {}
        counted = mask
        if self.importance_sampling_level == "sequence":  # one value per sequence, empty ones too
            drift = (drift * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
            counted = torch.ones_like(drift)
        ratio, gain = drift.exp(), advantage[:, None]
        above = (ratio > (1.0 if self.loss_type != "cispo" else 0.0) + self.epsilon_high) & (gain > 0)
        if self.loss_type == "cispo":
            means["cispo_clip_ratio"] = (above, counted)
        elif self.loss_type != "sapo":
            below = (ratio < 1.0 - self.epsilon_low) & (gain < 0)
            for name, clipped in (("low_mean", below), ("high_mean", above), ("region_mean", below | above)):
                means["clip_ratio/" + name] = (clipped, counted)
            of_rows = [(x * counted).sum(-1) / counted.sum(-1) for x in (below, above)]  # NaN for an empty sequence
            low, high = self.accelerator.gather(torch.stack(of_rows, 1)).unbind(1)
            spans["clip_ratio/low_min"] = torch.where(low.isnan(), torch.inf, low).amin()
            spans["clip_ratio/high_max"] = torch.where(high.isnan(), -torch.inf, high).amax()
        sums = [torch.stack(((x * count).sum(), count.sum())).to(logp.dtype) for x, count in means.values()]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum")
        found = torch.cat((totals[:, 0] / totals[:, 1].clamp(min=1.0), *(x[None] for x in spans.values())))
        for name, value in zip((*means, *spans), found.tolist(), strict=True):
            self._metrics[mode][name].append(value if math.isfinite(value) else math.nan)


_MEDIA = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def _refused(trainer: Any) -> list[str]:
    """Settings that would change loss or gradient in a way that is not offered here."""
    args = trainer.args
    found = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSSES,
        "importance_sampling_level='sequence' with another loss_type than 'grpo'": (
            trainer.importance_sampling_level == "sequence" and trainer.loss_type != "grpo"
        ),
        "delta with importance_sampling_level='sequence', cispo or sapo": args.delta is not None
        and (trainer.importance_sampling_level == "sequence" or trainer.loss_type in ("cispo", "sapo")),
        "top_entropy_quantile < 1": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        "cast_lm_head_to_fp32 (scores and softmax are float32 here in any case)": args.cast_lm_head_to_fp32,
    }
    return [name for name, hit in found.items() if hit]


def _options(trainer: Any) -> dict[str, Any]:
    """Options of ``policy_loss`` that a configuration of TRL means."""
    low, high = trainer.epsilon_low, trainer.epsilon_high
    if trainer.importance_sampling_level == "sequence":
        return {"loss": "gspo", "clip": (low, high)}
    if trainer.loss_type == "cispo":
        # TRL's bound is the ratio itself, and it has no lower one.
        return {"loss": "cispo", "clip": (1.0, high - 1.0), "aggregation": "token_mean"}
    if trainer.loss_type == "sapo":
        return {
            "loss": "sapo",
            "sapo_temperature": (trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg),
        }
    return {"loss": trainer.loss_type, "clip": (low, high), "delta": trainer.args.delta}


def use_linear_logprob(model: PreTrainedModel, *, temperature: float = 1.0) -> None:
    """Make ``model(..., labels=[B, S], fused_lm_head=True)``, TRL's call, answer through `linear_logprob`.

    The output matrix becomes a `LogProbHead` with the same parameters (before the model is sharded or wrapped). Only
    rows whose next label is not -100 are projected. Any other call is the model's own forward.

    Raises NotImplementedError for a model that scales its scores, or whose head carries an adapter.
    """
    config = model.config.get_text_config()
    scales = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    scaled = {name: value for name in scales if (value := getattr(config, name, None)) not in (None, 1.0)}
    if scaled:
        raise NotImplementedError(f"use_linear_logprob: {type(model).__name__} scales its scores by {scaled}")
    softcap = getattr(config, "final_logit_softcapping", None)
    model.set_output_embeddings(LogProbHead.take_over(model.get_output_embeddings()))
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` and the collator look at the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        labels = kwargs.pop("labels")[:, 1:]
        found = self.base_model(*args, **kwargs | {"use_cache": False})
        kept = labels != -100  # [B, S - 1]
        rows = found.last_hidden_state[:, :-1][kept]  # [N, H]
        score = self.get_output_embeddings()(
            rows, labels[kept], temperature=temperature, softcap=softcap, entropy=True, save="auto"
        )

        def spread(value: Tensor) -> Tensor:  # [N] -> [B, S - 1], connected to the model also when N is 0
            return value.new_zeros(kept.shape).masked_scatter(kept, value)

        return FusedCausalLMOutput(log_probs=spread(score.logp), entropy=spread(score.entropy), label_mask=kept)

    model.forward = types.MethodType(forward, model)
