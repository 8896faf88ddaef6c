"""An output matrix that gives log-probabilities of labels, so that nobody outside has to touch its weight.

Sharded training (ZeRO-3, FSDP) holds a full weight only while the module that owns it runs, forward and backward. A
fused op that reads ``lm_head.weight`` from outside meets an empty or sharded tensor; called inside the module, it meets
the weight that the module's own hooks have gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prism_fast import ops


class LogProbHead(nn.Linear):
    """``nn.Linear`` whose forward can also take labels.

    ``head(hidden)`` gives scores [..., V] as ever. ``head(hidden, labels, ...)`` gives
    ``LogProb(logp [...], entropy [...] or [0])`` of hidden [..., H] and labels [...]; rows are not shifted.
    `policy_loss` and `cross_entropy` give a loss over them, computed in the same forward, so that hooks around it fire.
    ``banned=True``: the tokens of `ban` have probability 0, as in sampling that excludes them. Other options are those
    of the op, by default ``prism_fast.ops.linear_logprob``; ``temperature`` may have the shape of the labels. Under
    autocast hidden is cast and products are in its dtype; statistics and the weight's gradient stay float32.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("ban_row", None, persistent=False)  # [V] 0 or -inf, dtype of the weight

    def ban(self, tokens: Sequence[int]) -> None:
        """Set the tokens that ``banned=True`` excludes; replaces earlier ones.

        They move with the module but are not in its state dict. Raises ValueError for a token outside the matrix and
        for a module without memory (device "meta").
        """
        if wrong := [token for token in tokens if not 0 <= token < self.out_features]:
            raise ValueError(
                f"LogProbHead.ban: tokens {wrong[:5]} lie outside the {self.out_features} rows of the matrix"
            )
        if self.weight.is_meta:
            raise ValueError("LogProbHead.ban: the module is on the device meta; call ban() once its weight has memory")
        row = torch.zeros(self.out_features, dtype=self.weight.dtype)
        row[list(tokens)] = -torch.inf
        self.ban_row = row.to(self.weight.device)

    @classmethod
    def take_over(cls, linear: nn.Linear) -> LogProbHead:
        """A head with the same parameter objects as ``linear``, so that tied parameters stay tied.

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
        banned: bool = False,
        temperature: float | Tensor | None = None,
        op: Callable = ops.linear_logprob,
        **options,
    ) -> Tensor | ops.LogProb | tuple:
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
        if temperature is not None:
            options["temperature"] = temperature
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):  # the op chooses the precision of its own steps
            result = op(
                hidden.reshape(-1, hidden.shape[-1]),
                self.weight,
                labels.reshape(-1),
                bias=self._bias(banned),
                **options,
            )
        if not isinstance(result, ops.LogProb):
            return result
        entropy = result.entropy.view(labels.shape) if result.entropy.shape == result.logp.shape else result.entropy
        return ops.LogProb(result.logp.view(labels.shape), entropy)

    def policy_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        advantage: Tensor | None,
        cu_seqlens: Tensor,
        *,
        options: ops.PolicyLossOptions,
        banned: bool = False,
        temperature: float | Tensor = 1.0,
        **tensors,
    ) -> tuple[Tensor, ops.PolicyStats, Tensor]:
        """``prism_fast.ops.linear_policy_loss`` with this matrix: three passes over it, memory of one wave of rows.

        Args:
            hidden [N, H], labels [N], advantage [B], cu_seqlens [B+1]: as there.
            options: ``PolicyLossOptions``, what ``policy_loss`` takes beside tensors.
            banned, temperature: as in a call of the head.
            tensors: the other arguments of ``linear_policy_loss``: ``old_logp``, ``denominator``, ``mask``,
                ``borders``, ``softcap``, ``weight_grad_out`` and so on.

        Returns:
            (loss 0-d, PolicyStats, logp [N] of the labels, float32, without gradient).

        Raises:
            ValueError, NotImplementedError: as the op, and as a call of the head.
        """
        logp = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        loss, stats = self(
            hidden,
            labels,
            banned=banned,
            temperature=temperature,
            op=ops.linear_policy_loss,
            advantage=advantage,
            cu_seqlens=cu_seqlens,
            logp_out=logp,
            options=options,
            **tensors,
        )
        return loss, stats, logp

    def cross_entropy(self, hidden: Tensor, labels: Tensor, *, banned: bool = False, **options) -> Tensor:
        """``prism_fast.ops.linear_cross_entropy`` with this matrix, 0-d: hidden [..., H] and labels [...], not shifted.

        ``options`` are those of the op; it has no temperature. Raises as the op, and as a call of the head.
        """
        return self(hidden, labels, banned=banned, op=ops.linear_cross_entropy, **options)

    def _bias(self, banned: bool) -> Tensor | None:
        """[V] or None."""
        if not banned:
            return self.bias
        if self.ban_row is None:
            raise ValueError("LogProbHead: banned=True, but no tokens are banned; name them with ban()")
        return self.ban_row if self.bias is None else self.bias + self.ban_row


def _adapter_names(module: nn.Module) -> set[str]:
    """Signs of an adapter: parameters beside a linear layer's own, or a wrapped layer."""
    own = {n for n, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    return own | ({"base_layer"} if hasattr(module, "base_layer") else set())
