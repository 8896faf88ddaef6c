"""prism-fast: the PRISM training recipe (SFT, adversarial alignment, RLVR) with fused, testable operations."""

__version__ = "0.1.0"
