// Sums and maxima over a block, returned to every thread, in an order fixed by the number of threads.
#pragma once

#include <cuda_runtime.h>

#include "numeric.h"

namespace prism {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const { return a + b; }
};

// Maximum, NaN if either is NaN.
struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const { return b > a || b != b ? b : a; }
};

// Minimum, NaN if either is NaN.
struct Lower {
    template <class T>
    __device__ T operator()(T a, T b) const { return b < a || b != b ? b : a; }
};

template <class T, class Op>
__device__ __forceinline__ T warp_all(T value, Op op) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
}

// The one atomic of these kernels: a sum of whole numbers is the same in any order.
__device__ __forceinline__ void count_one(int64_t* counter) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
}

// All threads of the block call this together. `shared` holds at least blockDim.x / 32 elements; blockDim.x is a multiple of 32.
template <class T, class Op>
__device__ __forceinline__ T block_all(T value, T neutral, T* shared, Op op) {
    value = warp_all(value, op);
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    __syncthreads();  // every thread has read the result of an earlier call
    if (lane == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_all(lane < warps ? shared[lane] : neutral, op);
}

}  // namespace prism
