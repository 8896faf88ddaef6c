// CPU twins of the routing kernels: threads share chunks of rows; a second pass assigns the places.
#include "route_experts.h"

#include <algorithm>
#include <memory>

#include "lanes.h"
#include "parallel.h"

namespace prism {
namespace {

// Rows computed at once, one per lane: loops over lanes vectorise for any number of experts.
constexpr int kRows = 32;
static_assert(kChunk % kRows == 0, "chunks are whole blocks");

constexpr int kPartialSums = 8;

// Counters that neighbouring rows use in turn, because an addition to a counter waits for the previous one.
constexpr int kChains = 4;

template <class T>
struct LogSeries;
template <>
struct LogSeries<float> {
    using Bits = int32_t;
    static constexpr int mantissa = 23, terms = 5;
};
template <>
struct LogSeries<double> {
    using Bits = int64_t;
    static constexpr int mantissa = 52, terms = 12;
};

// ln x for 1 <= x < 2^100, NaN for NaN: x = m 2^n with sqrt(1/2) <= m < sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)).
template <class T>
PRISM_INLINE T log_of_sum(T x) {
    using Series = LogSeries<T>;
    using Bits = typename Series::Bits;
    const Bits half = bits_as<Bits>(T(0.70710678118654752)), one = bits_as<Bits>(T(1));
    const Bits above = bits_as<Bits>(x) - half, n = above >> Series::mantissa;
    const T m = bits_as<T>(bits_as<Bits>(x) - (n << Series::mantissa));
    // n is at most 100: its float has it in the highest bits of the mantissa after the addition of 1.5 * 2^mantissa.
    const Bits magic = one + (Bits(Series::mantissa) << Series::mantissa) + (Bits(1) << (Series::mantissa - 1));
    const T exponent = bits_as<T>(magic + n) - bits_as<T>(magic);
    const T s = (m - T(1)) / (m + T(1)), square = s * s;
    T p = T(0);
    for (int i = Series::terms; i > 0; --i) p = p * square + T(2) / T(2 * i + 1);
    return exponent * T(0.69314718055994531) + (T(2) * s + s * square * p) + (x - x);
}

// Sum over the partial sums of each row.
template <class T>
PRISM_INLINE void fold(T (&sum)[kPartialSums][kRows], T (&total)[kRows]) {
    for (int half = kPartialSums / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            for (int r = 0; r < kRows; ++r) sum[i][r] += sum[i + half][r];
        }
    }
    for (int r = 0; r < kRows; ++r) total[r] = sum[0][r];
}

// A block of rows, transposed: value of expert e in row r at [e][r]. Rows past the last hold zeros.
template <class T>
struct Block {
    T x[kMaxExperts][kRows], e[kMaxExperts][kRows];  // logits; exponentials of logit - top
    T top[kRows], total[kRows];                      // largest logit; sum of e, NaN where there is no softmax

    template <class S>
    PRISM_INLINE void load(const S* logits, int64_t row_stride, int rows, int experts) {
        for (int k = 0; k < experts; ++k) {
            for (int r = 0; r < rows; ++r) x[k][r] = widen(logits[r * row_stride + k]);
            for (int r = rows; r < kRows; ++r) x[k][r] = T(0);
        }
        for (int r = 0; r < kRows; ++r) top[r] = x[0][r];
        for (int k = 1; k < experts; ++k) {
            for (int r = 0; r < kRows; ++r) top[r] = x[k][r] > top[r] ? x[k][r] : top[r];
        }
        // Several partial sums lose fewer bits than one.
        T sum[kPartialSums][kRows] = {};
        for (int k = 0; k < experts; ++k) {
            for (int r = 0; r < kRows; ++r) e[k][r] = exponential(x[k][r] - top[r]);
            for (int r = 0; r < kRows; ++r) sum[k % kPartialSums][r] += e[k][r];
        }
        fold(sum, total);
    }
    PRISM_INLINE T log_sum_exp(int r) const { return top[r] + log_of_sum(total[r]); }
};

// The top_k largest of each row in descending order, the lower expert first among equals: every logit goes down the list so far
// and changes places with each smaller one. Rows with a NaN softmax take the first experts.
template <class T>
struct Choices {
    using Bits = typename LogSeries<T>::Bits;
    T value[kMaxChosen][kRows];
    Bits expert[kMaxChosen][kRows];

    PRISM_INLINE void choose(const Block<T>& block, int experts, int top_k) {
        for (int j = 0; j < top_k; ++j) {
            for (int r = 0; r < kRows; ++r) value[j][r] = T(0), expert[j][r] = -1;
        }
        for (int k = 0; k < experts; ++k) {
            T moving[kRows];
            Bits from[kRows];
            for (int r = 0; r < kRows; ++r) {
                moving[r] = block.total[r] == block.total[r] ? block.x[k][r] : T(0);
                from[r] = k;
            }
            for (int j = 0; j < top_k; ++j) {
                for (int r = 0; r < kRows; ++r) {
                    const T held = value[j][r], comer = moving[r];
                    const Bits holder = expert[j][r], visitor = from[r];
                    const bool ahead = (comer > held) | ((comer == held) & (visitor < holder)) | (holder < 0);
                    // Exchanged by their bits: compilers turn a selection into masked stores, which are slow.
                    const Bits swap = -static_cast<Bits>(ahead);
                    const Bits values = (bits_as<Bits>(held) ^ bits_as<Bits>(comer)) & swap;
                    const Bits names = (holder ^ visitor) & swap;
                    value[j][r] = bits_as<T>(bits_as<Bits>(held) ^ values);
                    moving[r] = bits_as<T>(bits_as<Bits>(comer) ^ values);
                    expert[j][r] = holder ^ names;
                    from[r] = visitor ^ names;
                }
            }
        }
    }
};

template <class S, class T>
PRISM_INLINE void route_chunk(const RouteArguments<S>& a, int64_t chunk, Block<T>& block) {
    const int experts = a.plan.experts, top_k = a.plan.top_k;
    const int64_t begin = chunk * kChunk, end = std::min(a.plan.rows, begin + kChunk);
    Choices<T> choices;
    T load[kMaxExperts][kRows], z[kRows] = {};  // each lane adds up a few rows
    std::fill(&load[0][0], &load[experts][0], T(0));
    int32_t count[kChains][kMaxExperts] = {};
    for (int64_t first = begin; first < end; first += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, end - first));
        block.load(a.logits + first * a.row_stride, a.row_stride, rows, experts);
        choices.choose(block, experts, top_k);
        T inverse[kRows], there[kRows], whole[kRows];
        double sum[kRows] = {};  // in double: its error is in all weights, and twice in their gradient
        for (int r = 0; r < kRows; ++r) {
            inverse[r] = T(1) / block.total[r];
            there[r] = flag<T>(r < rows);
            const T log_sum_exp = block.log_sum_exp(r);
            z[r] += there[r] * log_sum_exp * log_sum_exp;
        }
        for (int k = 0; k < experts; ++k) {
            for (int r = 0; r < kRows; ++r) load[k][r] += block.e[k][r] * (inverse[r] * there[r]);
        }
        T weight[kMaxChosen][kRows];
        for (int j = 0; j < top_k; ++j) {
            for (int r = 0; r < kRows; ++r) {
                const T found = exponential(choices.value[j][r] - block.top[r]);
                weight[j][r] = block.total[r] == block.total[r] ? found : block.total[r];
                sum[r] += static_cast<double>(weight[j][r]);
            }
        }
        for (int r = 0; r < kRows; ++r) whole[r] = a.renormalize ? static_cast<T>(sum[r]) : block.total[r];
        for (int j = 0; j < top_k; ++j) {
            for (int r = 0; r < kRows; ++r) weight[j][r] /= whole[r];
            int64_t* const chosen = a.plan.chosen + first * top_k + j;
            T* const weights = a.weights + first * top_k + j;
            for (int r = 0; r < rows; ++r) {
                const auto expert = choices.expert[j][r];
                chosen[r * top_k] = expert;
                weights[r * top_k] = weight[j][r];
                ++count[r % kChains][expert];
            }
        }
    }
    for (int e = 0; e < experts; ++e) {
        int32_t all = 0;
        for (int chain = 0; chain < kChains; ++chain) all += count[chain][e];
        a.plan.count(chunk, e) = all;
    }
    double* sums = a.sums + chunk * (experts + 1);
    for (int k = 0; k < experts; ++k) sums[k] = lane_sum(load[k], kRows);
    sums[experts] = lane_sum(z, kRows);
}

template <class S, class T>
PRISM_INLINE void backward_rows(const RouteGradientArguments<S>& a, int64_t first, int rows, Block<T>& block) {
    const int experts = a.experts;
    T(&slope)[kMaxExperts][kRows] = block.e;
    T mean[kRows] = {}, mean_load[kRows] = {}, z_slope[kRows] = {};
    for (int r = 0; r < rows; ++r) mean[r] = a.mean_upstream(first + r);
    if (a.needs_softmax()) {
        block.load(a.logits + first * a.row_stride, a.row_stride, rows, experts);
        const T z_grad = a.z_grad == nullptr ? T(0) : T(2) * *a.z_grad;
        T inverse[kRows], partial[kPartialSums][kRows] = {};
        for (int r = 0; r < kRows; ++r) {
            inverse[r] = T(1) / block.total[r];
            z_slope[r] = z_grad * block.log_sum_exp(r);
        }
        for (int k = 0; k < experts; ++k) {
            const T upstream = a.load_upstream(k);
            for (int r = 0; r < kRows; ++r) {
                slope[k][r] *= inverse[r];
                partial[k % kPartialSums][r] += slope[k][r] * upstream;
            }
        }
        fold(partial, mean_load);
        for (int k = 0; k < experts; ++k) {
            const T upstream = a.load_upstream(k);
            for (int r = 0; r < kRows; ++r) {
                slope[k][r] = a.through_softmax(slope[k][r], upstream, mean_load[r], z_slope[r], mean[r]);
            }
        }
    } else {
        for (int r = 0; r < rows; ++r) {
            const T untouched = a.untouched(first + r);
            for (int k = 0; k < experts; ++k) slope[k][r] = untouched;
        }
    }
    for (int r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        for (int j = 0; j < a.top_k; ++j) {
            const int64_t k = a.chosen[row * a.top_k + j];
            if (a.renormalize) {
                slope[k][r] += a.through_weight(row, j);
            } else {  // computed anew: near a weight of 1, a difference of two nearly equal gradients would lose its bits
                const T apart = mean[r] - a.upstream(row, j);
                slope[k][r] = a.through_softmax(a.weights[row * a.top_k + j], a.load_upstream(k), mean_load[r], z_slope[r], apart);
            }
        }
        for (int k = 0; k < experts; ++k) narrow(slope[k][r], a.gradient[row * experts + k]);
    }
}

// Turns the counts into first places and gives every assignment its place.
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
        int32_t* const next = a.counts;
        const int experts = a.experts, top_k = a.top_k;
        const auto hand_out = [=](int64_t chunk, int64_t row) {
            for (int j = 0; j < top_k; ++j) a.place(next[chunk * experts + a.chosen[row * top_k + j]]++, row, j);
        };
        int64_t chunk = begin;
        for (; chunk + kChains <= end && (chunk + kChains) * kChunk <= a.rows; chunk += kChains) {
            for (int64_t i = 0; i < kChunk; ++i) {
                for (int64_t chain = chunk; chain < chunk + kChains; ++chain) hand_out(chain, chain * kChunk + i);
            }
        }
        for (; chunk < end; ++chunk) {
            const int64_t last = std::min(a.rows, (chunk + 1) * kChunk);
            for (int64_t row = chunk * kChunk; row < last; ++row) hand_out(chunk, row);
        }
    });
}

// Uninitialised memory.
template <class T>
std::unique_ptr<T[]> room(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]);
}

// Loops compiled twice need a name without template parameters.
#define PRISM_FOR(S, T)                                                                                              \
    PRISM_CLONES void chunk_of(const RouteArguments<S>& a, int64_t chunk, Block<T>& block) {                        \
        route_chunk<S, T>(a, chunk, block);                                                                         \
    }                                                                                                               \
    PRISM_CLONES void rows_of(const RouteGradientArguments<S>& a, int64_t first, int rows, Block<T>& block) {       \
        backward_rows<S, T>(a, first, rows, block);                                                                 \
    }
PRISM_FOR(float, float)
PRISM_FOR(double, double)
PRISM_FOR(Bfloat16, float)
PRISM_FOR(Float16, float)
#undef PRISM_FOR

}  // namespace

template <class S>
void route_experts_cpu(RouteArguments<S> a, int threads) {
    using T = typename ComputedIn<S>::type;
    const int experts = a.plan.experts;
    const int64_t chunks = chunks_of(a.plan.rows);
    const auto counts = room<int32_t>(chunks * experts);
    const auto sums = room<double>(chunks * (experts + 1));
    a.plan.counts = counts.get();
    a.sums = sums.get();
    parallel_for(chunks, a.plan.rows * (experts + a.plan.top_k) * 2, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Block<T>> block(new Block<T>);  // its contents do not matter
        for (int64_t chunk = begin; chunk < end; ++chunk) chunk_of(a, chunk, *block);
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
void plan_experts_cpu(GivenArguments<T> a, int threads) {
    PlanArguments& plan = a.plan;
    const auto counts = room<int32_t>(chunks_of(plan.rows) * plan.experts);
    plan.counts = counts.get();
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
    using T = typename ComputedIn<S>::type;
    const int64_t blocks = (a.rows + kRows - 1) / kRows;
    parallel_for(blocks, a.rows * (a.experts + a.top_k) * 2, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Block<T>> block(new Block<T>);  // its contents do not matter
        for (int64_t at = begin; at < end; ++at) {
            const int64_t first = at * kRows;
            rows_of(a, first, static_cast<int>(std::min<int64_t>(kRows, a.rows - first)), *block);
        }
    });
}

#define PRISM_FOR(S)                                                  \
    template void route_experts_cpu(RouteArguments<S>, int);         \
    template void route_experts_backward_cpu(const RouteGradientArguments<S>&, int);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR
template void plan_experts_cpu(GivenArguments<float>, int);
template void plan_experts_cpu(GivenArguments<double>, int);

}  // namespace prism
