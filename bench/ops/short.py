"""A summary of a result in a few lines, from the rows of its file alone."""

from __future__ import annotations


def short(rows: list[dict]) -> list[str]:
    """Per op and shape: our fastest forward and backward together, the fastest other, providers that did not run."""
    lines = []
    for key in dict.fromkeys((row["op"], row["shape"], row["dtype"]) for row in rows):
        full = [row for row in rows if (row["op"], row["shape"], row["dtype"]) == key and row["mode"] == "full"]
        ok = sorted((row for row in full if row["status"] == "ok"), key=lambda row: row["ms_p50"])
        ours = next((row for row in ok if row["provider"].startswith("prism_fast")), None)
        other = next((row for row in ok if not row["provider"].startswith("prism_fast")), None)
        text = f"{' '.join(key):<66}"
        text += f" {_line(ours)}" if ours else "  none of ours"
        if ours and other:
            text += f"   {other['ms_p50'] / ours['ms_p50']:5.2f} x {_line(other)}"
        missing = [f"{row['provider']} {row['status']}" for row in full if row["status"] != "ok"]
        lines.append(text + (f"   ({', '.join(missing)})" if missing else ""))
    return lines + of_plain_attention(rows)


def of_plain_attention(rows: list[dict]) -> list[str]:
    """TFLOP/s of our shared-prefix attentions in percent of the best plain attention over as much work."""
    lines = []
    prefixed = [row for row in rows if row["op"] == "shared_prefix_attention" and row["status"] == "ok"]
    for name, shape, dtype in dict.fromkeys((row["provider"], row["shape"], row["dtype"]) for row in prefixed):
        shares = []
        for mode in ("forward", "backward"):
            (ours,) = (
                row["rate"]
                for row in prefixed
                if (row["provider"], row["shape"], row["dtype"], row["mode"]) == (name, shape, dtype, mode)
            )
            others = [
                (row["rate"], row["provider"])
                for row in rows
                if row["op"] == "shared_prefix_attention (plain varlen)"
                and (row["status"], row["shape"], row["dtype"], row["mode"]) == ("ok", shape, dtype, mode)
                and not row["provider"].startswith("prism_fast")
            ]
            if others:
                best, rival = max(others)
                shares.append(f"{mode} {100 * ours / best:.0f} % of {rival}")
        if shares and name.startswith("prism_fast"):
            lines.append(f"{name}, {shape}, {dtype}, at equal work: {', '.join(shares)} (goal: 70 %)")
    return lines


def _line(row: dict) -> str:
    peak = f" {row['peak_mib']:.0f} MiB" if row["peak_mib"] is not None else ""
    return f"{row['provider']} {row['ms_p50']:.3f} ms{peak}"
