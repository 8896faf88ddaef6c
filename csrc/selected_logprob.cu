// CUDA kernels of the log-probability from logits: one block per row, the row read once in forward and once in backward.
#include "block.cuh"
#include "launch.cuh"
#include "selected_logprob.h"
#include "vector.cuh"

namespace prism {
namespace {

constexpr int kThreads = 512;

// Elements before the first aligned access of a row: the accesses start that much before its first element.
template <class S>
__device__ __forceinline__ int lead(const S* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const LogprobArguments<S, T> a) {
    __shared__ double shared[kThreads / kWarp];
    const int64_t row = blockIdx.x;
    if (a.target_of(row) == a.ignore_index) {
        if (threadIdx.x == 0) finish_ignored(a, row);
        return;
    }
    const S* logits = a.logits + row * a.row_stride;
    const T heat = a.heat_of(row), inverse = T(1) / heat;
    RowSums<T> sums = RowSums<T>::none();
    const bool entropy = a.entropy != nullptr;
    const S nothing{};
    for (int64_t first = -lead(logits) + static_cast<int64_t>(threadIdx.x) * kWide<S>; first < a.vocabulary;
         first += kThreads * kWide<S>) {
        const bool whole = first >= 0 && first + kWide<S> <= a.vocabulary;
        const Wide<S> stored = load_wide(logits, first, 0, a.vocabulary, whole, nothing);
        T x[kWide<S>];
        T top = sums.top;
#pragma unroll
        for (int i = 0; i < kWide<S>; ++i) {
            const bool inside = first + i >= 0 && first + i < a.vocabulary;
            x[i] = inside ? widen(stored.at[i]) : -static_cast<T>(INFINITY);
            sums.bad |= x[i] != x[i];
            top = x[i] > top ? x[i] : top;
        }
        sums.raise(top, heat);
        if (!(top > -static_cast<T>(INFINITY))) continue;
#pragma unroll
        for (int i = 0; i < kWide<S>; ++i) {
            const T z = (x[i] - top) * inverse, e = exponential(z);
            sums.total += e;
            if (entropy) sums.weighted += e * (z < ExpLimits<T>::low ? ExpLimits<T>::low : z);
        }
    }
    const T top = static_cast<T>(block_all(static_cast<double>(sums.top), -static_cast<double>(INFINITY), shared, Larger()));
    sums.raise(top, heat);
    const double total = block_all(static_cast<double>(sums.total), 0.0, shared, Add());
    const double weighted = entropy ? block_all(static_cast<double>(sums.weighted), 0.0, shared, Add()) : 0.0;
    const bool bad = __syncthreads_or(sums.bad);
    if (threadIdx.x != 0) return;
    finish_row(a, row, top, total, weighted, bad);
    if (!a.known(a.target_of(row))) count_one(a.bad);
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const LogprobArguments<S, T> a) {
    const int64_t row = blockIdx.x;
    const S* logits = a.logits + row * a.row_stride;
    S* gradient = a.gradient + row * a.vocabulary;
    const RowSlope<T> r = row_slope(a, row);
    const T inverse = T(1) / r.heat;
    const bool alike = lead(logits) == lead(gradient);  // otherwise only one of the two can be accessed wide
    const S nothing{};
    const int64_t begin = -(r.idle ? lead(gradient) : lead(logits));
    for (int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kWide<S>; first < a.vocabulary;
         first += kThreads * kWide<S>) {
        const bool whole = first >= 0 && first + kWide<S> <= a.vocabulary;
        Wide<S> value;
        if (r.idle) {
#pragma unroll
            for (int i = 0; i < kWide<S>; ++i) value.at[i] = nothing;
            store_wide(gradient, first, 0, a.vocabulary, whole, value);
            continue;
        }
        value = load_wide(logits, first, 0, a.vocabulary, whole, nothing);
#pragma unroll
        for (int i = 0; i < kWide<S>; ++i) {
            const T x = widen(value.at[i]);
            T slope = r.h != T(0) ? logit_slope<true>(x, r.top, inverse, r.log_sum, r.entropy, r.g, r.h)
                                  : logit_slope<false>(x, r.top, inverse, r.log_sum, r.entropy, r.g, r.h);
            if (first + i == r.target) slope += r.g / r.heat;
            narrow(slope, value.at[i]);
        }
        store_wide(gradient, first, 0, a.vocabulary, whole && alike, value);
    }
}

}  // namespace

template <class S>
int selected_logprob_cuda(const LogprobArguments<S>& a, void* stream) {
    using T = typename ComputedIn<S>::type;
    if (a.rows == 0) return cudaSuccess;
    return launch(forward_kernel<S, T>, static_cast<unsigned>(a.rows), kThreads, stream, a);
}

template <class S>
int selected_logprob_backward_cuda(const LogprobArguments<S>& a, void* stream) {
    using T = typename ComputedIn<S>::type;
    if (a.rows == 0) return cudaSuccess;
    return launch(backward_kernel<S, T>, static_cast<unsigned>(a.rows), kThreads, stream, a);
}

#define PRISM_FOR(S)                                                     \
    template int selected_logprob_cuda(const LogprobArguments<S>&, void*); \
    template int selected_logprob_backward_cuda(const LogprobArguments<S>&, void*);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR

}  // namespace prism
