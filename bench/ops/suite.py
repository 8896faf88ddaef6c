"""All benchmarked ops. A new area adds a file with ``OPS`` and its line here."""

from __future__ import annotations

from . import attention, experts, heads, losses
from .op import Op

OPS: dict[str, Op] = {op.name: op for area in (heads, losses, experts, attention) for op in area.OPS}
