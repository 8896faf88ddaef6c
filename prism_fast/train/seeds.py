"""Every random draw derives its own seed from the run's, so it does not depend on earlier draws."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose ``names``, e.g. ``derive_seed(1, "align", "rollout", 12)``."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
