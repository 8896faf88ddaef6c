"""Plain matrix products: the measuring stick for every kernel that hides one."""

from prism_fast.kernels.gemm.persistent import TILES, Tile, matmul, matmul_kernel

__all__ = ["TILES", "Tile", "matmul", "matmul_kernel"]
