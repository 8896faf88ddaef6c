"""An output matrix that gives log-probabilities of labels, so that nobody outside has to touch its weight.

Sharded training (ZeRO-3, FSDP) holds a full weight only while the module that owns it runs, forward and backward. A
fused op that reads ``lm_head.weight`` from outside meets an empty or sharded tensor; called inside the module, it meets
the weight that the module's own hooks have gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prism_fast import ops


class LogProbHead(nn.Linear):
    """``nn.Linear`` whose forward can also take labels.

    ``head(hidden)`` gives scores [..., V] as ever. ``head(hidden, labels, ...)`` gives
    ``LogProb(logp [...], entropy [...] or [0])`` of hidden [..., H] and labels [...]; rows are not shifted. Tokens
    ``banned`` have probability 0, as where they may not be sampled. Options are
    those of ``prism_fast.ops.linear_logprob``; ``temperature`` may have the shape of the labels. Under autocast the
    operands are cast as ``nn.Linear`` casts them; log-probabilities are float32 all the same.
    """

    @classmethod
    def take_over(cls, linear: nn.Linear) -> LogProbHead:
        """A head with the very parameters of ``linear``: what was tied to them stays tied.

        Raises NotImplementedError for a layer with adapters (LoRA and the like) or a parametrised weight: its product
        is not that of its weight, and the adapter would silently get no gradient. Merge the adapter, or leave the
        output matrix out of its targets. Raises ValueError for anything but a linear layer.
        """
        adapters = sorted({n.split(".")[0] for n, _ in linear.named_modules() if n} | _adapter_names(linear))
        if adapters:
            raise NotImplementedError(
                f"LogProbHead: {type(linear).__name__} carries {', '.join(adapters)}; adapters on the output matrix "
                f"are not supported: merge them, or leave this layer out of the adapter's targets"
            )
        if not isinstance(linear, nn.Linear) or type(linear).forward not in (nn.Linear.forward, cls.forward):
            raise ValueError(f"LogProbHead: {type(linear).__name__} does not compute nn.Linear's product")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        head.bias = linear.bias
        return head.train(linear.training)

    @classmethod
    def install(cls, model: nn.Module, name: str = "lm_head") -> LogProbHead:
        """Replace ``model``'s submodule ``name`` by a head with the same parameters and return it. Before sharding.

        Raises AttributeError if there is no such submodule, otherwise as `take_over`.
        """
        head = cls.take_over(model.get_submodule(name))
        model.set_submodule(name, head)
        return head

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        banned: Sequence[int] = (),
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        entropy: bool = False,
        ignore_index: int = -100,
        save: str = "auto",
        weight_grad_out: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor | ops.LogProb:
        if labels is None:
            return super().forward(hidden)
        if isinstance(self.weight, DTensor):
            raise NotImplementedError(
                "LogProbHead: the weight is a DTensor inside forward; shard the head as a module of its own "
                "(fully_shard, ZeRO-3), so that its hooks gather the weight; tensor parallelism is not supported"
            )
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"LogProbHead: labels {list(labels.shape)} must be hidden {list(hidden.shape)} without its last axis"
            )
        if isinstance(temperature, Tensor) and temperature.dim() > 1:
            temperature = temperature.reshape(-1)
        bias = self.bias
        if banned:
            bias = torch.zeros_like(self.weight[:, 0]) if bias is None else bias
            bias = bias.index_fill(0, torch.tensor(banned, device=bias.device), -torch.inf)
        device = hidden.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):  # the op chooses the precision of its own steps
            found = ops.linear_logprob(
                hidden.reshape(-1, hidden.shape[-1]).to(kind or hidden.dtype),
                self.weight.to(kind or self.weight.dtype),
                labels.reshape(-1),
                bias=None if bias is None else bias.to(kind or bias.dtype),
                temperature=temperature,
                softcap=softcap,
                entropy=entropy,
                ignore_index=ignore_index,
                save=save,
                weight_grad_out=weight_grad_out,
                backend=backend,
            )
        spread = found.entropy.view(labels.shape) if entropy else found.entropy
        return ops.LogProb(found.logp.view(labels.shape), spread)


def _adapter_names(module: nn.Module) -> set[str]:
    """Signs of an adapter: parameters beside a linear layer's own, or a wrapped layer."""
    own = {n for n, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    return own | ({"base_layer"} if hasattr(module, "base_layer") else set())
