"""Plain matrix products: the measuring stick for every kernel that hides one."""

from prism_fast.kernels.gemm.persistent import TILES, Tile, matmul, matmul_kernel
from prism_fast.kernels.gemm.products import add_product, product

__all__ = ["TILES", "Tile", "matmul", "matmul_kernel", "product", "add_product"]
