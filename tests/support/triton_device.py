"""Where Triton tests run: on the GPU if there is one, otherwise in the interpreter with correct bfloat16."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    import triton

    from tests.support import triton_bf16

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported; tests/conftest.py does that")
    triton_bf16.install()
