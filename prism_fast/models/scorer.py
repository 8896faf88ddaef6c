"""What a discriminator has beside its backbone: a score head or one per kind of span, and a routing bias for each kind.

They stand in the same safetensors as the backbone. One head for all spans and no bias is what released checkpoints
have; the rest is ours alone, and the folder's ``config.json`` says so under ``prism_fast``: stock transformers reports
the tensors as unexpected and computes without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig

from prism_fast.models.checkpoints import SHARD_INDEX, find_tensor, open_weights, weight_files

HEAD_KEY = "v_head.1.weight"
BIAS_KEY = "routing_bias"
CONFIG_KEY = "prism_fast"
SPAN_KINDS = 2  # captions, reasonings
_NOTE = (
    "the score head of each kind of span and the routers' bias are prism-fast's own: stock transformers loads the "
    "backbone without them, and what it computes are not this discriminator's scores"
)


class SpanSwitches(NamedTuple):
    """What a discriminator has once per kind of span: its score head, a bias of its routers. Off by default."""

    heads: Literal["shared", "per_span"] = "shared"
    routing_bias: Literal["none", "span"] = "none"

    @property
    def on(self) -> list[str]:
        """A phrase for each that is on."""
        heads = ["a score head for captions and one for reasonings"] if self.heads == "per_span" else []
        return heads + (["a routing bias for captions and for reasonings"] if self.routing_bias == "span" else [])

    @property
    def announcement(self) -> list[str]:
        """A line for people who will meet the folders that are written; none where everything is off."""
        left_out = "stock transformers computes without, and there is no value_head.pt"
        return [f"the discriminator has {' and '.join(self.on)}: in its exports, but {left_out}"] if self.on else []

    def config_entry(self) -> dict[str, dict[str, str]]:
        """What ``config.json`` says about it; nothing where the folder is that of a released checkpoint."""
        return {CONFIG_KEY: {**self._asdict(), "note": _NOTE}} if self.on else {}


class Scorer(NamedTuple):
    """``head`` [1, H], or [2, H] with one per kind of span; ``routing_bias`` [layers, 2, E] or None."""

    head: Tensor
    routing_bias: Tensor | None

    @property
    def switches(self) -> SpanSwitches:
        """Those that it is of."""
        return SpanSwitches(
            "shared" if len(self.head) == 1 else "per_span", "none" if self.routing_bias is None else "span"
        )

    def with_switches(self, wanted: SpanSwitches, config: Qwen3VLMoeConfig, where: str | Path) -> Scorer:
        """The same scores with ``wanted`` on: both heads are the shared one, the bias is 0.

        Raises:
            ValueError: what is there belongs to a switch that ``wanted`` has off; ``where`` names it.
        """
        head, bias = self
        for key, more, off in (
            ("heads", len(head) > 1 and wanted.heads == "shared", "two score heads"),
            ("routing_bias", bias is not None and wanted.routing_bias == "none", "a routing bias"),
        ):
            if more:
                value = "per_span" if key == "heads" else "span"
                raise ValueError(
                    f"{where} has {off}, one for each kind of span, and does not score without: "
                    f"set align.discriminator.{key}={value}, or give a discriminator without"
                )
        if wanted.heads == "per_span" and len(head) == 1:
            head = head.repeat(SPAN_KINDS, 1)
        if wanted.routing_bias == "span" and bias is None:
            bias = torch.zeros(bias_shape(config))
        return Scorer(head, bias)


def bias_shape(config: Qwen3VLMoeConfig) -> tuple[int, int, int]:
    """[layers, kinds, E]; a dense layer's part is never used."""
    text = config.text_config
    return (text.num_hidden_layers, SPAN_KINDS, text.num_experts)


def stored_switches(config: Qwen3VLMoeConfig) -> SpanSwitches:
    """What the configuration of a discriminator folder says.

    Raises:
        ValueError: values that are unknown here.
    """
    entry = getattr(config, CONFIG_KEY, {})
    found = SpanSwitches(**{key: entry[key] for key in SpanSwitches._fields if key in entry})
    if found.heads not in ("shared", "per_span") or found.routing_bias not in ("none", "span"):
        raise ValueError(f"config.json: {CONFIG_KEY} has {found}, which this version does not know")
    return found


def read_scorer(folder: Path, config: Qwen3VLMoeConfig) -> Scorer:
    """Head and routing bias of a discriminator folder with this ``config.json``.

    Raises:
        ValueError: there is none, or it has another shape than its configuration says.
    """
    switches, hidden = stored_switches(config), config.text_config.hidden_size
    cure = "Use a discriminator checkpoint or build one from a dense policy with `prism-fast convert upcycle`"
    rows = SPAN_KINDS if switches.heads == "per_span" else 1
    head = _read(folder, HEAD_KEY, (rows, hidden), f"it has no score head. {cure}")
    if switches.routing_bias == "none":
        return Scorer(head, None)
    return Scorer(head, _read(folder, BIAS_KEY, bias_shape(config), "its config.json says that it has a routing bias"))


def _read(folder: Path, key: str, shape: tuple[int, ...], without: str) -> Tensor:
    source = find_tensor(folder, key)
    if source is None:
        searched = weight_files(folder)
        raise ValueError(f"{searched[0] if len(searched) == 1 else folder / SHARD_INDEX} has no {key}: {without}")
    with open_weights(source) as tensors:
        tensor = tensors.get_tensor(key)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} in {source} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def write_side_head(scorer: Scorer, folder: Path) -> None:
    """``value_head.pt`` beside the weights, for TRL-style readers; never read here. Two heads or a routing bias have
    none: such a reader would compute other scores with it, and without it finds no head. One that stood there goes."""
    (folder / "value_head.pt").unlink(missing_ok=True)
    if len(scorer.head) == 1 and scorer.routing_bias is None:
        torch.save({"v_head.summary.weight": scorer.head.cpu()}, folder / "value_head.pt")
