"""Published settings of the policy loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prism_fast.ops.policy_loss import resolve_options


@dataclass(frozen=True)
class PolicyLossOptions:
    """The options of ``policy_loss`` that do not change during a run; meanings there.

    Raises ValueError or NotImplementedError on construction for combinations that ``policy_loss`` refuses.
    """

    loss: str = "grpo"
    clip: tuple[float, float] | None = None
    delta: float | None = None
    dual_clip: float | None = None
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    aggregation: str | None = None
    norm_length: float | None = None
    entropy_coef: float = 0.0
    kl: str = "k3"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        resolve_options(
            loss=self.loss,
            clip=self.clip,
            delta=self.delta,
            dual_clip=self.dual_clip,
            sapo_temperature=self.sapo_temperature,
            aggregation=self.aggregation,
            has_norm_length=self.norm_length is not None,
            kl=self.kl,
        )

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``policy_loss``."""
        return asdict(self)


# Alignment, GRPO, DAPO and GSPO: the shell scripts published with PRISM (verl's "vanilla" loss is our grpo form with
# token_mean). In them every step is on-policy, so that no clip range acts. Dr. GRPO: norm_length is the longest
# response its authors sample; CISPO: bounds of ScaleRL; SAPO: temperatures of its paper.
PRESETS: dict[str, PolicyLossOptions] = {
    "prism": PolicyLossOptions(loss="grpo", clip=(0.2, 0.2), dual_clip=3.0, aggregation="token_mean"),
    "grpo": PolicyLossOptions(loss="grpo", clip=(0.2, 0.2), dual_clip=3.0, aggregation="token_mean"),
    "dapo": PolicyLossOptions(loss="dapo", clip=(0.2, 0.28), dual_clip=10.0),
    "gspo": PolicyLossOptions(loss="gspo", clip=(3e-4, 4e-4)),
    "dr_grpo": PolicyLossOptions(loss="dr_grpo", clip=(0.2, 0.2), norm_length=3000.0),
    "bnpo": PolicyLossOptions(loss="bnpo", clip=(0.2, 0.2)),
    "cispo": PolicyLossOptions(loss="cispo", clip=(1.0, 4.0)),
    "sapo": PolicyLossOptions(loss="sapo", sapo_temperature=(1.0, 1.05)),
}
