"""Published settings of the policy loss."""

from __future__ import annotations

from typing import Any

from prism_fast.ops import PolicyLossOptions

# Alignment, GRPO, DAPO and GSPO: as in the shell scripts published with PRISM (verl's "vanilla" loss is our grpo form
# with token_mean); all their steps are on-policy, so no clip range acts. CISPO: bounds of ScaleRL. SAPO: its paper's
# temperatures.
_PRISM = {"loss": "grpo", "clip": (0.2, 0.2), "dual_clip": 3.0, "aggregation": "token_mean"}
PRESETS: dict[str, dict[str, Any]] = {
    "prism": _PRISM,
    "grpo": _PRISM,
    "dapo": {"loss": "dapo", "clip": (0.2, 0.28), "dual_clip": 10.0},
    "gspo": {"loss": "gspo", "clip": (3e-4, 4e-4)},
    "dr_grpo": {"loss": "dr_grpo", "clip": (0.2, 0.2)},
    "bnpo": {"loss": "bnpo", "clip": (0.2, 0.2)},
    "cispo": {"loss": "cispo", "clip": (1.0, 4.0)},
    "sapo": {"loss": "sapo", "sapo_temperature": (1.0, 1.05)},
}


def policy_options(preset: str, *, max_response: int, **changes: Any) -> PolicyLossOptions:
    """The options of a preset. Dr. GRPO divides by a constant length: ``max_response``, the longest response, tokens.
    ``changes``: options in place of the preset's, where they are not None.

    Raises:
        ValueError: there is no preset of that name, or it has no such option.
    """
    if preset not in PRESETS:
        raise ValueError(f"no loss preset {preset!r}; there are {', '.join(PRESETS)}")
    norm_length = float(max_response) if preset == "dr_grpo" else None
    changed = {name: value for name, value in changes.items() if value is not None}
    return PolicyLossOptions(**{**PRESETS[preset], "norm_length": norm_length, **changed})


def shown_terms(preset: str, *, max_response: int, **changes: Any) -> str:
    """The terms of a preset as they act, defaults of its loss filled in, for people. Arguments and errors as
    `policy_options`."""
    options = policy_options(preset, max_response=max_response, **changes)
    terms = {
        "clip": None if options.loss == "sapo" else "{:g}/{:g}".format(*options.clips),
        "temperatures": "{:g}/{:g}".format(*options.sapo_temperature) if options.loss == "sapo" else None,
        "dual clip": options.bound,
        "aggregation": options.aggregates,
        "length": options.norm_length,
        "KL": f"{options.kl_coef:g} {options.kl}" if options.kl_coef else None,
        "entropy": options.entropy_coef or None,
    }
    shown = ", ".join(f"{name} {value}" for name, value in terms.items() if value is not None)
    return f"preset {preset}: {options.loss}, {shown}"


def reward_normalization(preset: str) -> str:
    """``normalize`` of ``outcome_advantage`` that a preset's paper prescribes.

    All divide the difference from the group's mean by the group's deviation (GRPO, arXiv 2402.03300; DAPO 2503.14476
    eq. 9; GSPO 2507.18071 eq. 6; CISPO 2506.13585; SAPO 2511.20347), except Dr. GRPO (2503.20783): the division gives
    more weight to prompts that are almost always or almost never solved.
    """
    return "mean_only" if preset == "dr_grpo" else "per_score"
