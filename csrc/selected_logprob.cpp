// CPU twins of the log-probability kernels: threads share the rows and read each once, in chunks.
#include "selected_logprob.h"

#include <algorithm>

#include "lanes.h"
#include "parallel.h"

namespace prism {
namespace {

constexpr int kChunk = 512;
static_assert(kChunk % kLanes == 0, "chunks are whole lanes");

template <class S, class T>
PRISM_INLINE void load(T* x, const S* logits, int n, T rest) {
    for (int i = 0; i < n; ++i) x[i] = widen(logits[i]);
    for (int i = n; i < whole_lanes(n); ++i) x[i] = rest;
}

template <class T>
PRISM_INLINE T chunk_top(const T* x, int n) {
    T lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -static_cast<T>(INFINITY);
    for (int i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
    return *std::max_element(lanes, lanes + kLanes);
}

template <class S, class T>
PRISM_INLINE void forward_row(const LogprobArguments<S>& a, int64_t row) {
    if (a.target_of(row) == a.ignore_index) {
        finish_ignored(a, row);
        return;
    }
    const S* logits = a.logits + row * a.row_stride;
    const T temperature = a.temperature_of(row), inverse = T(1) / temperature;
    RowSums<double> sums = RowSums<double>::none();
    T x[kChunk], z[kChunk], e[kChunk];
    for (int64_t at = 0; at < a.vocabulary; at += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, a.vocabulary - at)), whole = whole_lanes(n);
        load(x, logits + at, n, -static_cast<T>(INFINITY));
        sums.bad = sums.bad || lane_sum(whole, [&](int i) { return flag<T>(x[i] != x[i]); }) != 0.0;
        sums.raise(static_cast<double>(chunk_top(x, whole)), static_cast<double>(temperature));
        if (!(sums.top > -INFINITY)) continue;
        const T top = static_cast<T>(sums.top);
        for (int i = 0; i < whole; ++i) {
            const T scaled = (x[i] - top) * inverse;
            z[i] = scaled < ExpLimits<T>::low ? ExpLimits<T>::low : scaled;
            e[i] = exponential(scaled);
        }
        sums.total += lane_sum(e, whole);
        if (a.entropy != nullptr) {
            for (int i = 0; i < whole; ++i) z[i] *= e[i];
            sums.weighted += lane_sum(z, whole);
        }
    }
    finish_row(a, row, static_cast<T>(sums.top), sums.total, sums.weighted, sums.bad);
}

template <bool with_entropy, class T>
PRISM_INLINE void slopes(T* x, int n, const RowSlope<T>& r) {
    const T top = r.top, inverse = T(1) / r.temperature, log_sum = r.log_sum, entropy = r.entropy, g = r.g, h = r.h;
    for (int i = 0; i < n; ++i) x[i] = logit_slope<with_entropy>(x[i], top, inverse, log_sum, entropy, g, h);
}

template <class S, class T>
PRISM_INLINE void backward_row(const LogprobArguments<S>& a, int64_t row) {
    const S* logits = a.logits + row * a.row_stride;
    S* gradient = a.gradient + row * a.vocabulary;
    const RowSlope<T> r = row_slope(a, row);
    if (r.idle) {
        std::fill(gradient, gradient + a.vocabulary, S{});
        return;
    }
    T x[kChunk];
    for (int64_t at = 0; at < a.vocabulary; at += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, a.vocabulary - at));
        load(x, logits + at, n, T(0));
        if (r.h != T(0)) {
            slopes<true>(x, n, r);
        } else {
            slopes<false>(x, n, r);
        }
        if (r.target >= at && r.target < at + n) x[r.target - at] += r.g / r.temperature;
        for (int i = 0; i < n; ++i) narrow(x[i], gradient[at + i]);
    }
}

#define PRISM_ROWS(S, T)                                                                                    \
    PRISM_CLONES void forward(const LogprobArguments<S>& a, int64_t row) { forward_row<S, T>(a, row); }     \
    PRISM_CLONES void backward(const LogprobArguments<S>& a, int64_t row) { backward_row<S, T>(a, row); }
PRISM_ROWS(float, float)
PRISM_ROWS(double, double)
PRISM_ROWS(Bfloat16, float)
PRISM_ROWS(Float16, float)
#undef PRISM_ROWS

}  // namespace

template <class S>
void selected_logprob_cpu(const LogprobArguments<S>& a, int threads) {
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t token = a.target_of(row);
        *a.bad += token != a.ignore_index && !a.known(token);
    }
    parallel_for(a.rows, a.rows * a.vocabulary, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) forward(a, row);
    });
}

template <class S>
void selected_logprob_backward_cpu(const LogprobArguments<S>& a, int threads) {
    parallel_for(a.rows, a.rows * a.vocabulary, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) backward(a, row);
    });
}

#define PRISM_FOR(S)                                                  \
    template void selected_logprob_cpu(const LogprobArguments<S>&, int); \
    template void selected_logprob_backward_cpu(const LogprobArguments<S>&, int);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR

}  // namespace prism
