"""Random cases of every public op against independent float64 formulas.

``python -m tests.fuzz --cases 400 --seed 0`` runs them all; ``test_*.py`` run a few of each.
"""

from __future__ import annotations


def every_op() -> dict:
    """Name -> op. Imported late: the command sets what kernels read when they are imported."""
    from . import attention, cross_entropy, experts, groups, heads, policies

    return {op.name: op for part in (heads, cross_entropy, policies, groups, experts, attention) for op in part.OPS}
