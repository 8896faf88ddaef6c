// CUDA kernels of the log-probability from logits: one block per row, the row read once in forward and once in backward.
//
// To be limited by memory and not by instructions, the loops over whole vectors test nothing per score, exponentials are powers
// of two of arguments that include the factor 1 / ln 2, and NaN propagates into the sums by itself.
#include "block.cuh"
#include "launch.cuh"
#include "selected_logprob.h"
#include "vector.cuh"

namespace prism {
namespace {

constexpr int kThreads = 512;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x; 0 where that is not a normal number. The hardware's instruction has a relative error of up to 2^-22.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_two(double x) { return x < -1022.0 ? 0.0 : exp2(x); }

// The exponent used for 2^x = 0: x times 2^x would be NaN at minus infinity.
template <class T>
__device__ __forceinline__ T not_below_low(T x) {
    constexpr T low = static_cast<T>(ExpLimits<T>::low * kLog2e);
    return x < low ? low : x;
}

// The accesses to a row: vectors of 16 bytes, and up to kWide - 1 elements before and after them, one per thread.
template <class S>
struct Parts {
    int64_t head, vectors, edge;  // elements before the vectors; vectors; elements outside of them

    __device__ Parts(const S* row, int64_t count) {
        const int off = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
        const int64_t before = off == 0 ? 0 : kWide<S> - off;
        head = before < count ? before : count;
        vectors = (count - head) / kWide<S>;
        edge = count - vectors * kWide<S>;
    }
    __device__ int64_t edge_element(int64_t i) const { return i < head ? i : i + vectors * kWide<S>; }
    // Of the element, if it lies in a vector; another number otherwise.
    __device__ int64_t vector_of(int64_t element) const {
        return element < head ? -1 : (element - head) / kWide<S>;
    }
};

template <class S, int n>
__device__ __forceinline__ void load_vectors(const S* first, int64_t vector, Wide<S> (&to)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) to[j] = reinterpret_cast<const Wide<S>*>(first)[vector + j * kThreads];
}

// Calls f(vector) with a first and a second vector kThreads further on, or one(vector) with a single one.
template <class Two, class One>
__device__ __forceinline__ void for_vectors(int64_t vectors, Two two, One one) {
    int64_t vector = threadIdx.x;
    for (; vector + kThreads < vectors; vector += 2 * kThreads) two(vector);
    if (vector < vectors) one(vector);
}

// Sums over part of a row: top is its maximum, ignoring NaN; total of 2^z and weighted of z 2^z, z = (x - top) scale, are NaN
// if a logit is NaN or plus infinity.
template <class T, bool with_entropy>
struct Sums {
    T scale;  // 1 / (temperature ln 2)
    T top = -static_cast<T>(INFINITY), total = T(0), weighted = T(0);

    __device__ explicit Sums(T scale) : scale(scale) {}

    __device__ __forceinline__ void raise(T higher) {
        if (!(higher > top)) return;
        if (total != T(0)) {
            const T shift = (top - higher) * scale, factor = power_of_two(shift);
            if (with_entropy) weighted = factor * (weighted + not_below_low(shift) * total);
            total *= factor;
        }
        top = higher;
    }
    template <int n>
    __device__ __forceinline__ void add(const T (&x)[n]) {
        T higher = top;
#pragma unroll
        for (int i = 0; i < n; ++i) higher = fmax(higher, x[i]);
        raise(higher);
        const T pivot = top > -static_cast<T>(INFINITY) ? top : T(0);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const T z = (x[i] - pivot) * scale, e = power_of_two(z);
            total += e;
            if (with_entropy) weighted += e * not_below_low(z);
        }
    }
    template <int n, class S>
    __device__ __forceinline__ void add(const S* first, int64_t vector) {
        Wide<S> stored[n];
        load_vectors(first, vector, stored);
        T x[n * kWide<S>];
#pragma unroll
        for (int i = 0; i < n * kWide<S>; ++i) x[i] = widen(stored[i / kWide<S>].at[i % kWide<S>]);
        add(x);
    }
};

template <class S, class T, bool with_entropy>
__global__ void __launch_bounds__(kThreads) forward_kernel(const LogprobArguments<S, T> a) {
    __shared__ double shared[kThreads / kWarp];
    const int64_t row = blockIdx.x;
    if (a.target_of(row) == a.ignore_index) {
        if (threadIdx.x == 0) finish_ignored(a, row);
        return;
    }
    const S* logits = a.logits + row * a.row_stride;
    const Parts<S> parts(logits, a.vocabulary);
    Sums<T, with_entropy> sums(static_cast<T>(kLog2e) / a.temperature_of(row));
    if (threadIdx.x < parts.edge) {
        const T x[1] = {widen(logits[parts.edge_element(threadIdx.x)])};
        sums.add(x);
    }
    const S* body = logits + parts.head;
    for_vectors(
        parts.vectors, [&](int64_t vector) { sums.template add<2>(body, vector); },
        [&](int64_t vector) { sums.template add<1>(body, vector); }
    );
    const T top = static_cast<T>(block_all(static_cast<double>(sums.top), -static_cast<double>(INFINITY), shared, Larger()));
    sums.raise(top);
    const double total = block_all(static_cast<double>(sums.total), 0.0, shared, Add());
    const double weighted = with_entropy ? kLn2 * block_all(static_cast<double>(sums.weighted), 0.0, shared, Add()) : 0.0;
    if (threadIdx.x != 0) return;
    finish_row(a, row, top, total, weighted, total != total);
    if (!a.known(a.target_of(row))) count_one(a.bad);
}

// The slopes of logit_slope, with all terms that are the same for a whole row in two factors.
template <class T, bool with_entropy>
struct Slopes {
    T top, scale, log_sum, slope, entropy_slope;

    __device__ explicit Slopes(const RowSlope<T>& r)
        : top(r.top), scale(static_cast<T>(kLog2e) / r.temperature), log_sum(r.log_sum * static_cast<T>(kLog2e)),
          slope(-(with_entropy ? r.g + r.h * r.entropy : r.g) / r.temperature),
          entropy_slope(-r.h * static_cast<T>(kLn2) / r.temperature) {}

    __device__ __forceinline__ T of(T x) const {
        const T log_p = (x - top) * scale - log_sum, p = power_of_two(log_p);
        return with_entropy ? p * (slope + entropy_slope * not_below_low(log_p)) : p * slope;
    }
};

template <class S, class T, bool with_entropy>
__device__ void row_gradient(const LogprobArguments<S, T>& a, const RowSlope<T>& r, const S* logits, S* gradient) {
    const Parts<S> parts(logits, a.vocabulary);
    const Slopes<T, with_entropy> slopes(r);
    const T of_target = r.g / r.temperature;
    auto one = [&](int64_t i) {
        const T slope = slopes.of(widen(logits[i]));
        narrow(i == r.target ? slope + of_target : slope, gradient[i]);
    };
    if (Parts<S>(gradient, a.vocabulary).head != parts.head) {  // only one of the two can be accessed in vectors
        for (int64_t i = threadIdx.x; i < a.vocabulary; i += kThreads) one(i);
        return;
    }
    if (threadIdx.x < parts.edge) one(parts.edge_element(threadIdx.x));
    const S* body = logits + parts.head;
    Wide<S>* out = reinterpret_cast<Wide<S>*>(gradient + parts.head);
    const int64_t vector_of_target = parts.vector_of(r.target);
    auto write = [&](int64_t vector, const Wide<S>& stored) {
        T slope[kWide<S>];
#pragma unroll
        for (int i = 0; i < kWide<S>; ++i) slope[i] = slopes.of(widen(stored.at[i]));
        if (vector == vector_of_target) {
            const int at = static_cast<int>((r.target - parts.head) % kWide<S>);
#pragma unroll
            for (int i = 0; i < kWide<S>; ++i) slope[i] += i == at ? of_target : T(0);
        }
        Wide<S> value;
#pragma unroll
        for (int i = 0; i < kWide<S>; ++i) narrow(slope[i], value.at[i]);
        out[vector] = value;
    };
    for_vectors(
        parts.vectors,
        [&](int64_t vector) {
            Wide<S> stored[2];
            load_vectors(body, vector, stored);
            write(vector, stored[0]);
            write(vector + kThreads, stored[1]);
        },
        [&](int64_t vector) {
            Wide<S> stored[1];
            load_vectors(body, vector, stored);
            write(vector, stored[0]);
        }
    );
}

template <class S>
__device__ void row_of_zeros(S* row, int64_t count) {
    const Parts<S> parts(row, count);
    const S nothing{};
    if (threadIdx.x < parts.edge) row[parts.edge_element(threadIdx.x)] = nothing;
    const Wide<S> nothings{};
    for (int64_t vector = threadIdx.x; vector < parts.vectors; vector += kThreads) {
        reinterpret_cast<Wide<S>*>(row + parts.head)[vector] = nothings;
    }
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const LogprobArguments<S, T> a) {
    const int64_t row = blockIdx.x;
    const S* logits = a.logits + row * a.row_stride;
    S* gradient = a.gradient + row * a.vocabulary;
    const RowSlope<T> r = row_slope(a, row);
    if (r.idle) {
        row_of_zeros(gradient, a.vocabulary);
    } else if (r.h != T(0)) {
        row_gradient<S, T, true>(a, r, logits, gradient);
    } else {
        row_gradient<S, T, false>(a, r, logits, gradient);
    }
}

}  // namespace

template <class S>
int selected_logprob_cuda(const LogprobArguments<S>& a, void* stream) {
    using T = typename ComputedIn<S>::type;
    if (a.rows == 0) return cudaSuccess;
    auto* kernel = a.entropy == nullptr ? forward_kernel<S, T, false> : forward_kernel<S, T, true>;
    return launch(kernel, static_cast<unsigned>(a.rows), kThreads, stream, a);
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
