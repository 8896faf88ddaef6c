#include "expert_rows.h"

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "lanes.h"
#include "parallel.h"

namespace prism {
namespace {

constexpr int kColumns = 512;  // columns per partial sum in T; partial sums are added in double
static_assert(kColumns % kLanes == 0, "blocks are whole lanes");

// Logistic function of x and of -x, both exact to rounding for any x, because the exponential takes -|x|.
template <class T>
struct Logistic {
    T of, of_negative;
    PRISM_INLINE explicit Logistic(T x) {
        const T e = exponential(x < T(0) ? x : -x), near = T(1) / (T(1) + e), far = e * near;
        of = x < T(0) ? far : near;
        of_negative = x < T(0) ? near : far;
    }
};

template <class S, class T>
PRISM_INLINE void swiglu_rows(const SwigluArguments<S>& a, int64_t begin, int64_t end) {
    const int64_t inner = a.inner;
    for (int64_t row = begin; row < end; ++row) {
        const S* __restrict gate = a.pre + row * a.row_stride;
        const S* __restrict up = gate + inner;
        S* __restrict act = a.act + row * inner;
        for (int64_t i = 0; i < inner; ++i) {
            const T x = widen(gate[i]);
            narrow(x * Logistic<T>(x).of * widen(up[i]), act[i]);
        }
    }
}

template <bool with_pre, class S, class T>
PRISM_INLINE void gradient_rows(const SwigluGradientArguments<S>& a, int64_t begin, int64_t end) {
    const int64_t inner = a.inner;
    T term[kColumns];
    for (int64_t row = begin; row < end; ++row) {
        const T weight = a.weights[a.assignment[row]];
        double total = 0.0;
        for (int64_t first = 0; first < inner; first += kColumns) {
            const int n = static_cast<int>(std::min<int64_t>(kColumns, inner - first));
            const S* __restrict gate = a.pre + row * a.row_stride + first;
            const S* __restrict up = gate + inner;
            S* __restrict both = a.d_act + row * inner + first;
            S* __restrict d_gate = with_pre ? a.d_pre + row * 2 * inner + first : nullptr;
            S* __restrict d_up = with_pre ? d_gate + inner : nullptr;
            for (int i = 0; i < n; ++i) {
                const T x = widen(gate[i]), u = widen(up[i]), g = widen(both[i]);
                const Logistic<T> logistic(x);
                const T silu = x * logistic.of, act = silu * u, slope = logistic.of * (T(1) + x * logistic.of_negative);
                term[i] = g * act;
                if constexpr (with_pre) {
                    const T share = weight * g;
                    narrow(share * u * slope, d_gate[i]);
                    narrow(share * silu, d_up[i]);
                }
                narrow(weight * act, both[i]);
            }
            for (int i = n; i < whole_lanes(n); ++i) term[i] = T(0);
            total += lane_sum(term, whole_lanes(n));
        }
        if (a.d_weights != nullptr) a.d_weights[a.assignment[row]] = static_cast<T>(total);
    }
}

template <class S, class T>
PRISM_INLINE void sum_rows(const AddRowsArguments<S>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T weight = a.weights == nullptr ? T(1) : a.weights[a.assignment[row]];
        const S* __restrict from = a.from + row * a.width;
        T* __restrict to = a.to + a.token(row) * a.width;
        for (int64_t i = 0; i < a.width; ++i) to[i] += weight * widen(from[i]);
    }
}

// Loops compiled twice need a name without template parameters.
#define PRISM_FOR(S, T)                                                                                               \
    PRISM_CLONES void rows_of(const SwigluArguments<S>& a, int64_t begin, int64_t end) {                             \
        swiglu_rows<S, T>(a, begin, end);                                                                            \
    }                                                                                                                \
    PRISM_CLONES void rows_of(const SwigluGradientArguments<S>& a, int64_t begin, int64_t end) {                     \
        if (a.d_pre != nullptr) {                                                                                    \
            gradient_rows<true, S, T>(a, begin, end);                                                                \
        } else {                                                                                                     \
            gradient_rows<false, S, T>(a, begin, end);                                                               \
        }                                                                                                            \
    }                                                                                                                \
    PRISM_CLONES void rows_of(const AddRowsArguments<S>& a, int64_t begin, int64_t end) { sum_rows<S, T>(a, begin, end); }
PRISM_FOR(float, float)
PRISM_FOR(double, double)
PRISM_FOR(Bfloat16, float)
PRISM_FOR(Float16, float)
#undef PRISM_FOR

}  // namespace

template <class S>
void swiglu(const SwigluArguments<S>& a, int threads) {
    parallel_for(a.rows, a.rows * a.inner, threads, [&](int64_t begin, int64_t end) { rows_of(a, begin, end); });
}

template <class S>
void swiglu_backward(const SwigluGradientArguments<S>& a, int threads) {
    parallel_for(a.rows, a.rows * a.inner * 2, threads, [&](int64_t begin, int64_t end) { rows_of(a, begin, end); });
}

template <class S>
void add_rows(const AddRowsArguments<S>& a, int threads) {
    // Another router may have chosen one expert twice for a token: rows of one token stay on one thread.
    const auto border = [&](int64_t row) {
        while (row > 0 && row < a.rows && a.token(row) == a.token(row - 1)) ++row;
        return row;
    };
    parallel_for(a.rows, a.rows * a.width / 4, threads, [&](int64_t begin, int64_t end) {
        rows_of(a, border(begin), border(end));
    });
}

#define PRISM_FOR(S)                                                       \
    template void swiglu(const SwigluArguments<S>&, int);                  \
    template void swiglu_backward(const SwigluGradientArguments<S>&, int); \
    template void add_rows(const AddRowsArguments<S>&, int);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR

void prefer_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const auto start = reinterpret_cast<uintptr_t>(address);
    const uintptr_t begin = (start + page - 1) / page * page, end = (start + static_cast<uintptr_t>(bytes)) / page * page;
    // Only advice: without it the system gives small pages, and the results are the same.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace prism
