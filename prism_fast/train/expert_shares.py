"""Shares of the discriminator's experts by kind of token: prompt, captions, reasonings.

The choices are those of the forward that made the scores. The last layer is left out: it routes scored rows alone. A
shared prompt counts once per span of its group, so that both layouts count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prism_fast.models.transfer import moved
from prism_fast.track.metrics import Metrics

SHOWN = 16  # with more experts than this, single shares are not logged


def span_information(counts: Tensor) -> Tensor:
    """Bits that one choice of an expert tells about the kind of span of its token.

    The mutual information between kind and expert, with all kinds equally likely whatever the length of their texts (of
    two kinds: the Jensen-Shannon divergence of their expert shares). 0: the kinds are routed alike; log2 of the number
    of kinds: they share no expert. Chance alone gives about (E - 1) / (8 ln 2) · (1/n + 1/m) for two kinds of n and m
    choices: 0.01 for 100 each of 4 experts.

    Args:
        counts: [..., kinds, E], choices of each expert; no kind is without choices.

    Returns:
        [...] float64.
    """
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return (_entropy(shares.mean(-2)) - _entropy(shares).mean(-1)).clamp(min=0.0)


def _entropy(shares: Tensor) -> Tensor:
    return -torch.special.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


class ExpertShares:
    """Counts the expert choices of one step, on their device."""

    def __init__(self, spans: Sequence[str], experts: int) -> None:
        """``spans``: names of the scores."""
        self.kinds, self.experts = ("prompt", *spans), experts
        self.counts: Tensor | None = None  # [layers, kinds, E] int64

    def add(self, choices: Sequence[Tensor], columns: Sequence[int], branch: Tensor, weight: Tensor) -> None:
        """Count the choices of one forward.

        Args:
            choices: per layer [X, top_k] int64.
            columns: the index of each branch's score among the spans.
            branch, weight: [X], as in ``layouts.Ends``.
        """
        if not choices:
            return
        kind = moved(torch.tensor([0, *(1 + column for column in columns)]), branch.device)[branch + 1]  # [X]
        chosen = torch.stack(list(choices))  # [layers, X, top_k]
        layers, kinds = len(chosen), len(self.kinds)
        layer = torch.arange(layers, device=kind.device)[:, None, None]
        place = (layer * kinds + kind[:, None]) * self.experts + chosen
        if self.counts is None:
            self.counts = torch.zeros(layers, kinds, self.experts, dtype=torch.int64, device=kind.device)
        # Whole numbers: their sum does not depend on the order in which a device adds them.
        self.counts.view(-1).scatter_add_(0, place.flatten(), weight.long()[:, None].expand_as(chosen).flatten())

    def join(self, total: Callable[[Sequence[float]], list[float]]) -> None:
        """Joint. Add the counts of all ranks. ``total``: sums over the ranks."""
        if self.counts is not None:
            summed = torch.tensor(total(self.counts.flatten().tolist()), dtype=torch.int64)
            self.counts = summed.view(self.counts.shape)

    def add_to(self, metrics: Metrics, prefix: str) -> None:
        """Add ``experts_{kind}_{e}``: the share of expert e in the choices of the kind, mean over layers. With two
        kinds of spans, also add ``expert_span_information`` (mean over layers), its largest value
        ``expert_span_information_top`` with the layer ``expert_span_layer_top`` (from 1), and that layer's shares
        ``experts_top_{kind}_{e}``. A kind without tokens has no metric."""
        for name, value in self._values().items():
            if name == "expert_span_layer_top":
                metrics.last(prefix + name, value)
            else:
                metrics.mean(prefix + name, value)

    def _values(self) -> dict[str, float | int]:
        if self.counts is None:
            return {}
        counts = self.counts.cpu()
        shares = counts.double() / counts.sum(-1, keepdim=True)  # NaN for a kind without tokens
        present = [k for k in range(len(self.kinds)) if bool(counts[0, k].any())]
        values: dict[str, float | int] = {}
        tables = {"experts": shares.mean(0)}
        if len(self.kinds) > 2 and len(present) == len(self.kinds):
            information = span_information(counts[:, 1:])  # [layers]
            top = int(information.argmax())
            values["expert_span_information"] = float(information.mean())
            values["expert_span_information_top"] = float(information[top])
            values["expert_span_layer_top"] = top + 1
            tables["experts_top"] = shares[top]
        if self.experts <= SHOWN:
            for name, table in tables.items():
                values |= {
                    f"{name}_{self.kinds[k]}_{e}": float(table[k, e]) for k in present for e in range(self.experts)
                }
        return values
