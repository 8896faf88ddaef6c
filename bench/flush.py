"""Writes one section's result of gpu_suite.sh as JSON and prints its line of the summary."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch


def machine() -> dict:
    """What the numbers belong to: card, versions, commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    found = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": done.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        import triton
    except ImportError:
        return found | {"triton": None}
    return found | {"triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", required=True)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--cap", type=float, required=True, help="seconds")
    parser.add_argument("--started", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--data", type=Path, required=True, help="JSON the section may have written itself")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    # 124 and 137 are what `timeout` returns when it ends the command, gently or not.
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
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{a.section:<8} {status:<7} {result['seconds']:>6} s of {a.cap:.0f} s   {a.out.name}")


if __name__ == "__main__":
    main()
