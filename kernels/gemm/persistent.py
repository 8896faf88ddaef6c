"""Persistent matrix product with bulk tensor copies (TMA), for Hopper and newer.

One program per multiprocessor walks over the output tiles, so the load pipeline of the next tile starts while the last
one is written (``flatten``). Operands are read through tensor descriptors in the layout they have: no copy is made
for a transposed operand, and ragged borders need no masks because the descriptor fills with zeros outside the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from prism_fast.kernels.launch import card, scratch, tile_position


class Tile(NamedTuple):
    """Output tile ``m × n``, depth ``k`` per step, tile rows per raster group, pipeline stages, warps."""

    m: int
    n: int
    k: int
    group: int
    stages: int
    warps: int


# By major compute capability. On Blackwell a whole fp32 tile passes through shared memory on its way out, which leaves
# room for two stages only.
TILES = {
    9: Tile(m=128, n=256, k=64, group=8, stages=3, warps=8),
    10: Tile(m=128, n=256, k=64, group=8, stages=2, warps=8),
}


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_c,
    A_TRANSPOSED: tl.constexpr,  # A is stored [K, M] instead of [M, K]
    B_TRANSPOSED: tl.constexpr,  # B is stored [N, K] instead of [K, N]
    ACCUMULATE: tl.constexpr,  # add to C instead of overwriting it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    if A_TRANSPOSED:
        a = tl.make_tensor_descriptor(a_ptr, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
    else:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
    if B_TRANSPOSED:
        b = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
    else:
        b = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
    # Half a tile per store: a whole fp32 tile in shared memory would leave no room for the load stages.
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [stride_c, 1], [BLOCK_M, BLOCK_N // 2])

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        row, column = tile_position(tile, tiles_m, tiles_n, GROUP)
        m = row * BLOCK_M
        n = column * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            x = a.load([k, m]).T if A_TRANSPOSED else a.load([m, k])
            y = b.load([n, k]).T if B_TRANSPOSED else b.load([k, n])
            accumulator = tl.dot(x, y, accumulator)
        halves = tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if ACCUMULATE:
            left += c.load([m, n]).to(tl.float32)
            right += c.load([m, n + BLOCK_N // 2]).to(tl.float32)
        c.store([m, n], left.to(c.dtype))
        c.store([m, n + BLOCK_N // 2], right.to(c.dtype))


def _row_major(x: torch.Tensor, name: str) -> tuple[bool, int]:
    """(stored transposed, row stride) of a matrix that a descriptor can address; ValueError otherwise."""
    rows, columns = x.stride()
    transposed = rows == 1 and columns != 1
    if not transposed and columns != 1:
        raise ValueError(f"{name}: strides {x.stride()} have no unit stride; call .contiguous()")
    stride = columns if transposed else rows
    if stride * x.element_size() % 16 or x.data_ptr() % 16:
        raise ValueError(f"{name}: rows of {stride} {x.dtype} elements do not start at multiples of 16 bytes; pad them")
    return transposed, stride


def addressable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address the matrix as it lies in memory."""
    rows, columns = x.stride()
    return 1 in (rows, columns) and max(rows, columns) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``a [M,K] @ b [K,N]`` with bf16 (or fp16) operands, fp32 accumulation and an output in their dtype or fp32.

    Either operand may be a transposed view. ``out`` (``[M,N]``, row-major) receives the result if given, or, with
    ``accumulate``, has it added to what it holds. ``tile`` defaults to `TILES` of the card. Raises ValueError for
    shapes, dtypes or alignments that a tensor descriptor cannot address and NotImplementedError on cards without bulk
    tensor copies.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: a {tuple(a.shape)} and b {tuple(b.shape)} are not [M,K] and [K,N]")
    if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"matmul: operands {a.dtype} and {b.dtype} must both be bfloat16 or both float16")
    (m, k), n = a.shape, b.shape[1]
    if accumulate and out is None:
        raise ValueError("matmul: accumulate=True needs out, the matrix to add to")
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype or a.dtype, device=a.device)
    if tuple(out.shape) != (m, n) or out.dtype not in (a.dtype, torch.float32) or (out_dtype or out.dtype) != out.dtype:
        raise ValueError(f"matmul: out {tuple(out.shape)} {out.dtype} must be {(m, n)} in {a.dtype} or float32")
    if 0 in (m, n, k):
        return out if accumulate else out.zero_()
    a_transposed, stride_a = _row_major(a, "a")
    b_transposed, stride_b = _row_major(b, "b")
    c_transposed, stride_c = _row_major(out, "out")
    if c_transposed:
        raise ValueError("out: a transposed output is not supported; swap and transpose the operands instead")
    programs, capability = card(a.device)
    major = capability // 10
    if tile is None and major not in TILES:
        raise NotImplementedError(f"matmul: no tile for compute capability {major}.x; pass one, or use {sorted(TILES)}")
    tile = tile or TILES[major]
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    triton.set_allocator(scratch)  # descriptors made in the kernel live in a few bytes of global memory
    matmul_kernel[(min(programs, tiles),)](
        a, b, out, m, n, k, stride_a, stride_b, stride_c,
        A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, ACCUMULATE=accumulate,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, PROGRAMS=min(programs, tiles),
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
