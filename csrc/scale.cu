#include "launch.cuh"
#include "scale.h"
#include "vector.cuh"

namespace prism {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleArguments<T> a, bool wide) {
    const T factor = scale_factor(a);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kWide<T>;
    for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWide<T>; at < a.count; at += stride) {
        const bool whole = wide && at + kWide<T> <= a.count;
        Wide<T> x = load_wide(a.x, at, 0, a.count, whole, T(0));
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) x.at[i] *= factor;
        store_wide(a.out, at, 0, a.count, whole, x);
    }
}

}  // namespace

template <class T>
int scale_cuda(const ScaleArguments<T>& a, void* stream) {
    if (a.count == 0) return cudaSuccess;
    constexpr int64_t per_block = kThreads * kWide<T>;
    const int64_t blocks = (a.count + per_block - 1) / per_block;
    const bool wide = aligned(a.x) && aligned(a.out);
    return launch(scale_kernel<T>, static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads, stream, a, wide);
}

template int scale_cuda<float>(const ScaleArguments<float>&, void*);
template int scale_cuda<double>(const ScaleArguments<double>&, void*);

}  // namespace prism
