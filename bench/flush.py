"""Writes one section's result of gpu_suite.sh as JSON, and prints its lines of the summary."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

from ops.machine import machine
from ops.short import short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", required=True)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--cap", type=float, required=True, help="seconds")
    parser.add_argument("--started", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--data", type=Path, required=True, help="JSON the section may have written itself")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    # `timeout` returns 124 or 137 when it ends the command.
    status = {0: "ok", 124: "cut", 137: "cut"}.get(a.exit_code, "failed")
    result = {
        "section": a.section,
        "status": status,
        "exit_code": a.exit_code,
        "seconds": round(time.time() - a.started, 1),
        "cap_seconds": a.cap,
        "machine": machine(),
        "data": json.loads(a.data.read_text()) if a.data.is_file() else None,
    }
    text = json.dumps(result, indent=1) + "\n"
    a.out.write_text(text)
    if result["machine"]["card"] and result["data"]:  # measured on a card: a file of record
        card = re.sub(r"[^a-z0-9]+", "_", result["machine"]["card"].lower())
        (a.out.parent / f"record-{a.section}-{card}-{result['machine']['date']}.json").write_text(text)
    print(f"{a.section:<9} {status:<7} {result['seconds']:>6} s of {a.cap:.0f} s   {a.out.name}")
    if a.section in ("ops", "attention") and result["data"]:
        print(*(f"  {line}" for line in short(result["data"]["rows"])), sep="\n")


if __name__ == "__main__":
    main()
