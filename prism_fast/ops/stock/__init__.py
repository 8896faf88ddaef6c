"""Ops composed of PyTorch's own fused kernels."""
