"""The table of providers: who took part, and why the others did not."""

from __future__ import annotations

from collections.abc import Sequence

from .op import Row


def providers(rows: Sequence[Row]) -> list[str]:
    """A line per provider: on how many ops it is ok, and the reason of every other status."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.provider, {})[row.op] = row
    width = max(map(len, ("provider", *found)))
    lines = [f"{'provider':<{width}}  ops"]
    for name, by_op in found.items():
        ok = sum(row.status == "ok" for row in by_op.values())
        reasons = {f"{row.status}: {row.note}": None for row in by_op.values() if row.status != "ok"}
        lines.append("; ".join([f"{name:<{width}}  {ok} of {len(by_op)}", *(text[:140] for text in reasons)]))
    return lines
