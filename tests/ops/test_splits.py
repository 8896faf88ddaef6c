"""A step's gradient does not know how its sequences were shared out: over ranks, micro-batches and places in a pack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.algorithms.denominators import loss_denominator
from prism_fast.ops import linear_policy_loss, policy_loss
from prism_fast.ops.reference.aggregation import LOSSES, OF_LOSS

PAIRS = [(loss, aggregation) for loss in LOSSES for aggregation in OF_LOSS[loss]]
H, V = 5, 17


class Step:
    """Sequences of a step with everything that a loss takes, each by itself."""

    def __init__(self, lengths: list[int], seed: int):
        generator = torch.Generator().manual_seed(seed)
        noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.advantage = noise(len(lengths))
        self.columns = [
            {
                "hidden": noise(n, H).requires_grad_(),
                "target": torch.randint(0, V, (n,), generator=generator),
                "old_logp": -noise(n).abs() - 1.0,
                "ref_logp": -noise(n).abs() - 1.0,
                "is_weight": noise(n).abs(),
                "mask": torch.rand(n, generator=generator) > 0.2,
            }
            for n in lengths
        ]
        self.weight = noise(V, H).requires_grad_()

    def pack(self, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """(columns, advantage, cu_seqlens) of some sequences in this order."""
        columns = {name: torch.cat([self.columns[r][name] for r in rows]) for name in self.columns[0]}
        offsets = [0, *torch.tensor([len(self.columns[r]["target"]) for r in rows]).cumsum(0).tolist()]
        return columns, self.advantage[rows], torch.tensor(offsets, dtype=torch.int32)

    def gradient(self, ranks: list[list[list[int]]], loss: str, aggregation: str) -> list[torch.Tensor]:
        """[loss, gradients], added up over micro-batches and ranks; each rank counts its own, as for an all-reduce."""
        options = {"loss": loss, "aggregation": aggregation, "entropy_coef": 0.05, "kl_coef": 0.3}
        options |= {"norm_length": 9.0} if aggregation.endswith("norm") else {}
        denominator = torch.zeros(())
        for rows in ([r for micro in rank for r in micro] for rank in ranks):
            if rows:
                columns, _, cu_seqlens = self.pack(rows)
                lengths = torch.stack([mask.sum() for mask in columns["mask"].tensor_split(cu_seqlens[1:-1].tolist())])
                denominator += loss_denominator(loss, lengths, aggregation=aggregation)
        leaves = [self.weight, *(c["hidden"] for c in self.columns)]
        total, sums = torch.zeros((), dtype=torch.float64), [torch.zeros_like(x) for x in leaves]
        for rows in (micro for rank in ranks for micro in rank if micro):
            columns, advantage, cu_seqlens = self.pack(rows)
            hidden, target = columns.pop("hidden"), columns.pop("target")
            value, _ = linear_policy_loss(
                hidden, self.weight, target, advantage, cu_seqlens, denominator=denominator, **columns, **options
            )
            total = total + value.detach()
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            sums = [a if b is None else a + b for a, b in zip(sums, found, strict=True)]
        return [total, *sums]


@pytest.mark.parametrize(("loss", "aggregation"), PAIRS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_ranks_micro_batches_and_order(loss, aggregation, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), label="lengths")
    step = Step(lengths, data.draw(st.integers(0, 99), label="seed"))
    order = data.draw(st.permutations(range(len(lengths))), label="order")
    places = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=len(order), max_size=len(order))
    )
    ranks: list[list[list[int]]] = [[[], []] for _ in range(3)]
    for row, (rank, micro) in zip(order, places, strict=True):
        ranks[rank][micro].append(row)
    split = step.gradient(ranks, loss, aggregation)
    whole = step.gradient([[list(range(len(lengths)))]], loss, aggregation)
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-13)


@given(lengths=st.lists(st.integers(0, 1), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_gspo_is_grpo_where_every_sequence_is_one_token(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    old = -torch.rand(n, generator=generator, dtype=torch.float64)
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    found = []
    for loss in ("gspo", "grpo"):
        logp = (old + 0.3).requires_grad_()
        value, _ = policy_loss(logp, advantage, offsets, old_logp=old, loss=loss, clip=(0.1, 0.2))
        found.append((value.detach(), *torch.autograd.grad(value, logp)))
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
