// CPU twins of the routing kernels: chunks of rows are shared among threads; a second walk hands out the places.
#include "route_experts.h"

#include <algorithm>

#include "parallel.h"

namespace prism {
namespace {

constexpr int kBlock = 1024;  // logits that are exponentiated in one loop; at least one row

template <class S, class T>
PRISM_INLINE void widen_rows(T* x, const S* logits, int64_t row_stride, int rows, int experts) {
    for (int row = 0; row < rows; ++row) {
        for (int e = 0; e < experts; ++e) x[row * experts + e] = widen(logits[row * row_stride + e]);
    }
}

// x - its row's maximum, exponentiated; a row with NaN or +infinity, or without any finite number, becomes NaN.
template <class T>
PRISM_INLINE void exponentials(T* e, T* top, const T* x, int rows, int experts) {
    for (int row = 0; row < rows; ++row) {
        T high = x[row * experts];
        for (int i = 1; i < experts; ++i) high = x[row * experts + i] > high ? x[row * experts + i] : high;
        top[row] = high;
        for (int i = 0; i < experts; ++i) e[row * experts + i] = x[row * experts + i] - high;
    }
    for (int i = 0; i < rows * experts; ++i) e[i] = exponential(e[i]);
}

// The top_k largest, the lower expert first among equals. `bad`: nothing can be compared, the first experts are taken.
template <class T>
PRISM_INLINE void choose(int* best, const T* x, int experts, int top_k, bool bad) {
    T held[kMaxChosen];
    int count = 0;
    for (int e = 0; e < experts; ++e) {
        const T value = bad ? T(0) : x[e];
        if (count == top_k && !(value > held[top_k - 1])) continue;
        int at = count < top_k ? count++ : top_k - 1;
        for (; at > 0 && value > held[at - 1]; --at) {
            held[at] = held[at - 1];
            best[at] = best[at - 1];
        }
        held[at] = value;
        best[at] = e;
    }
}

template <class S, class T>
PRISM_INLINE void route_chunk(const RouteArguments<S>& a, int64_t chunk) {
    const int experts = a.plan.experts, top_k = a.plan.top_k;
    const int step = std::max(1, kBlock / experts);
    const int64_t begin = chunk * kChunk, end = std::min(a.plan.rows, begin + kChunk);
    T x[kBlock], e[kBlock], top[kBlock];
    double load[kMaxExperts] = {}, z = 0.0;
    int32_t count[kMaxExperts] = {};
    for (int64_t first = begin; first < end; first += step) {
        const int rows = static_cast<int>(std::min<int64_t>(step, end - first));
        widen_rows(x, a.logits + first * a.row_stride, a.row_stride, rows, experts);
        exponentials(e, top, x, rows, experts);
        for (int i = 0; i < rows; ++i) {
            const T* ei = e + i * experts;
            T total = T(0);
            for (int k = 0; k < experts; ++k) total += ei[k];
            const bool bad = total != total;
            const T inverse = T(1) / total, log_sum_exp = top[i] + std::log(total);
            z += static_cast<double>(log_sum_exp) * static_cast<double>(log_sum_exp);
            for (int k = 0; k < experts; ++k) load[k] += static_cast<double>(ei[k] * inverse);
            int best[kMaxChosen] = {};
            choose(best, x + i * experts, experts, top_k, bad);
            T sum = T(0);
            for (int j = 0; j < top_k; ++j) sum += ei[best[j]];
            const T scale = a.renormalize ? T(1) / sum : inverse;
            const int64_t at = (first + i) * top_k;
            for (int j = 0; j < top_k; ++j) {
                a.plan.chosen[at + j] = best[j];
                a.weights[at + j] = ei[best[j]] * scale;
                ++count[best[j]];
            }
        }
    }
    std::copy(count, count + experts, &a.plan.count(chunk, 0));
    double* sums = a.sums + chunk * (experts + 1);
    std::copy(load, load + experts, sums);
    sums[experts] = z;
}

template <class S, class T>
PRISM_INLINE void backward_rows(const RouteGradientArguments<S>& a, int64_t begin, int64_t end) {
    const int experts = a.experts, step = std::max(1, kBlock / experts);
    T x[kBlock], e[kBlock], top[kBlock];
    for (int64_t first = begin; first < end; first += step) {
        const int rows = static_cast<int>(std::min<int64_t>(step, end - first));
        if (a.needs_softmax()) {
            widen_rows(x, a.logits + first * a.row_stride, a.row_stride, rows, experts);
            exponentials(e, top, x, rows, experts);
        }
        for (int i = 0; i < rows; ++i) {
            const int64_t row = first + i;
            T* slope = e + i * experts;
            const T mean = a.mean_upstream(row);
            if (a.needs_softmax()) {
                T total = T(0), mean_load = T(0);
                for (int k = 0; k < experts; ++k) total += slope[k];
                const T inverse = T(1) / total;
                for (int k = 0; k < experts; ++k) {
                    slope[k] *= inverse;
                    mean_load += slope[k] * a.load_upstream(k);
                }
                const T z_slope = a.z_grad == nullptr ? T(0) : T(2) * *a.z_grad * (top[i] + std::log(total));
                for (int k = 0; k < experts; ++k) slope[k] = a.through_softmax(slope[k], k, mean_load, z_slope, mean);
            } else {
                std::fill(slope, slope + experts, T(0));
            }
            for (int j = 0; j < a.top_k; ++j) slope[a.chosen[row * a.top_k + j]] += a.through_weight(row, j, mean);
            for (int k = 0; k < experts; ++k) narrow(slope[k], a.gradient[row * experts + k]);
        }
    }
}

// Turns the counts into first places and gives every assignment its own.
void hand_out_places(const PlanArguments& a, int threads) {
    const int64_t chunks = chunks_of(a.rows);
    int32_t place = 0;
    for (int e = 0; e < a.experts; ++e) {
        a.offsets[e] = place;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int32_t here = a.count(chunk, e);
            a.count(chunk, e) = place;
            place += here;
        }
    }
    a.offsets[a.experts] = place;
    parallel_for(chunks, a.rows * a.top_k * 2, threads, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            int32_t* next = &a.count(chunk, 0);
            const int64_t last = std::min(a.rows, (chunk + 1) * kChunk) * a.top_k;
            for (int64_t at = chunk * kChunk * a.top_k; at < last; ++at) a.permutation[next[a.chosen[at]]++] = at;
        }
    });
}

// Loops compiled twice need a name without template parameters.
#define PRISM_FOR(S, T)                                                                                                \
    PRISM_CLONES void chunk_of(const RouteArguments<S>& a, int64_t chunk) { route_chunk<S, T>(a, chunk); }            \
    PRISM_CLONES void rows_of(const RouteGradientArguments<S>& a, int64_t begin, int64_t end) {                       \
        backward_rows<S, T>(a, begin, end);                                                                           \
    }
PRISM_FOR(float, float)
PRISM_FOR(double, double)
PRISM_FOR(Bfloat16, float)
PRISM_FOR(Float16, float)
#undef PRISM_FOR

}  // namespace

template <class S>
void route_experts_cpu(const RouteArguments<S>& a, int threads) {
    using T = typename ComputedIn<S>::type;
    const int experts = a.plan.experts;
    const int64_t chunks = chunks_of(a.plan.rows);
    parallel_for(chunks, a.plan.rows * (experts + a.plan.top_k) * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) chunk_of(a, chunk);
    });
    double total[kMaxExperts + 1] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int e = 0; e <= experts; ++e) total[e] += a.sums[chunk * (experts + 1) + e];
    }
    for (int e = 0; e < experts; ++e) a.load[e] = static_cast<T>(total[e]);
    *a.z_stat = static_cast<T>(total[experts]);
    hand_out_places(a.plan, threads);
}

template <class T>
void plan_experts_cpu(const GivenArguments<T>& a, int threads) {
    const PlanArguments& plan = a.plan;
    parallel_for(chunks_of(plan.rows), plan.rows * plan.top_k * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            int32_t* count = &plan.count(chunk, 0);
            std::fill(count, count + plan.experts, 0);
            const int64_t last = std::min(plan.rows, (chunk + 1) * kChunk) * plan.top_k;
            for (int64_t at = chunk * kChunk * plan.top_k; at < last; ++at) {
                const bool known = a.index[at] >= 0 && a.index[at] < plan.experts;
                plan.chosen[at] = known ? a.index[at] : 0;
                a.weights[at] = known ? a.given[at] : static_cast<T>(NAN);
                ++count[plan.chosen[at]];
            }
        }
    });
    hand_out_places(plan, threads);
}

template <class S>
void route_experts_backward_cpu(const RouteGradientArguments<S>& a, int threads) {
    parallel_for(a.rows, a.rows * (a.experts + a.top_k) * 8, threads, [&](int64_t begin, int64_t end) {
        rows_of(a, begin, end);
    });
}

#define PRISM_FOR(S)                                                  \
    template void route_experts_cpu(const RouteArguments<S>&, int); \
    template void route_experts_backward_cpu(const RouteGradientArguments<S>&, int);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR
template void plan_experts_cpu(const GivenArguments<float>&, int);
template void plan_experts_cpu(const GivenArguments<double>&, int);

}  // namespace prism
