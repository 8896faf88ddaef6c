// CPU twin of the policy-loss kernel: threads share the sequences. A thread processes a sequence in chunks that stay in the
// first-level cache; each step is a plain loop over a chunk, which the compiler vectorises.
#include "policy_loss.h"

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace prism {
namespace {

constexpr int kChunk = 384;
static_assert(kChunk % kLanes == 0, "chunks are whole lanes");

// The tokens of one chunk. Inactive ones, and those that fill up the last lanes, are 0.
template <class T>
struct Chunk {
    T active[kChunk], fresh[kChunk], old[kChunk], advantage[kChunk], weight[kChunk], other[kChunk];
    T loss[kChunk], slope[kChunk], ratio[kChunk], measured[kChunk], low[kChunk], high[kChunk], dual[kChunk];
    T moving[kChunk], value[kChunk], lean[kChunk];  // value and lean: the divergence and its slope
    T moved[kChunk];                                // factor of the ratio's slope
};

template <class T>
PRISM_INLINE void load_active(Chunk<T>& c, const PolicyArguments<T>& a, int64_t at, int n) {
    if (a.mask_kind == MaskKind::none) {
        for (int i = 0; i < n; ++i) c.active[i] = T(1);
    } else if (a.mask_kind == MaskKind::boolean) {
        const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
        for (int i = 0; i < n; ++i) c.active[i] = mask[i] != 0 ? T(1) : T(0);
    } else {
        const T* mask = static_cast<const T*>(a.mask) + at;
        for (int i = 0; i < n; ++i) c.active[i] = mask[i] != T(0) ? T(1) : T(0);
    }
    for (int i = n; i < whole_lanes(n); ++i) c.active[i] = T(0);
}

template <class T>
PRISM_INLINE void load(T* to, const Chunk<T>& c, const T* from, int n) {
    for (int i = 0; i < n; ++i) {
        const T x = from[i];
        to[i] = c.active[i] != T(0) ? x : T(0);
    }
    for (int i = n; i < whole_lanes(n); ++i) to[i] = T(0);
}

template <class T>
PRISM_INLINE void fill(T* to, const Chunk<T>& c, T value, int n) {
    for (int i = 0; i < n; ++i) to[i] = c.active[i] != T(0) ? value : T(0);
}

// logp and old_logp; on-policy they are the same numbers.
template <class T>
PRISM_INLINE void load_pair(Chunk<T>& c, const PolicyArguments<T>& a, int64_t at, int n) {
    load(c.fresh, c, a.logp + at, n);
    load(c.old, c, (a.old_logp == nullptr ? a.logp : a.old_logp) + at, n);
}

template <Family family, bool has_bound = false, class T>
PRISM_INLINE void policy_terms(Chunk<T>& c, const PolicyOptions<T>& options, const SequenceRatio<T>& all, int n) {
    const PolicyOptions<T> o = options;  // local copies: stores to the chunk cannot change them
    if (family == Family::sequence) {  // through memory: gcc does not vectorise a loop whose conditions are constant
        for (int i = 0; i < n; ++i) c.ratio[i] = all.ratio;
        for (int i = 0; i < n; ++i) c.moving[i] = all.moving;
    }
    for (int i = 0; i < n; ++i) {
        const Token<T> token{c.fresh[i], c.old[i], c.advantage[i]};
        const SequenceRatio<T> same{c.ratio[i], c.moving[i]};
        const TokenTerms<T> terms = token_terms<family, has_bound>(token, o, same);
        c.loss[i] = terms.loss;
        c.slope[i] = terms.slope;
        c.ratio[i] = c.active[i] != T(0) ? terms.ratio : T(0);
        c.moving[i] = terms.moving;
        c.measured[i] = terms.measured;
        c.low[i] = terms.low;
        c.high[i] = terms.high;
        c.dual[i] = terms.dual;
    }
}

template <Divergence divergence, class T>
PRISM_INLINE void divergence_terms(Chunk<T>& c, int n) {
    for (int i = 0; i < n; ++i) {
        const KlTerms<T> terms = kl_terms<divergence>(c.fresh[i], c.other[i]);
        c.value[i] = terms.value;
        c.lean[i] = terms.slope;
    }
}

// Estimates and slopes of a chunk whose log-probabilities are loaded.
template <class T>
PRISM_INLINE void diverge(Chunk<T>& c, const PolicyArguments<T>& a, int64_t at, int n) {
    const PolicyOptions<T>& o = a.options;
    const int whole = whole_lanes(n);
    load(c.other, c, a.ref_logp + at, n);
    switch (o.divergence) {
        case Divergence::k1: divergence_terms<Divergence::k1>(c, whole); break;
        case Divergence::k2: divergence_terms<Divergence::k2>(c, whole); break;
        case Divergence::k3: divergence_terms<Divergence::k3>(c, whole); break;
        case Divergence::abs: divergence_terms<Divergence::abs>(c, whole); break;
    }
    if (o.straight_through) {
        for (int i = 0; i < whole; ++i) c.lean[i] = k2_slope(c.fresh[i], c.other[i]);
    }
}

// `mean`: of the estimates of the sequence, used with one ratio per sequence.
template <class T>
PRISM_INLINE void weigh_by_ratio(Chunk<T>& c, bool sequence_ratio, T mean, int n) {
    if (sequence_ratio) {
        for (int i = 0; i < n; ++i) c.moved[i] = mean;
    } else {
        for (int i = 0; i < n; ++i) c.moved[i] = c.value[i];
    }
    for (int i = 0; i < n; ++i) {
        const KlTerms<T> terms = times_ratio(KlTerms<T>{c.value[i], c.lean[i]}, c.ratio[i], c.moving[i], c.moved[i]);
        c.value[i] = terms.value;
        c.lean[i] = terms.slope;
    }
}

// Ratios are not negative and those of inactive tokens are 0. The maximum ignores NaN; the sum of the ratios shows it.
template <class T>
PRISM_INLINE double largest(const T* ratio, int n, double so_far) {
    T lanes[kLanes] = {};
    for (int i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = ratio[i + lane] > lanes[lane] ? ratio[i + lane] : lanes[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) so_far = std::max(so_far, static_cast<double>(lanes[lane]));
    return so_far;
}

// Active tokens of a sequence.
template <class T>
PRISM_INLINE double count_active(const PolicyArguments<T>& a, int64_t sequence) {
    const int64_t begin = a.begin(sequence), end = a.end(sequence);
    int64_t count = 0;
    if (a.mask_kind == MaskKind::none) {
        count = std::max<int64_t>(end - begin, 0);
    } else if (a.mask_kind == MaskKind::boolean) {
        const uint8_t* mask = static_cast<const uint8_t*>(a.mask);
        for (int64_t at = begin; at < end; ++at) count += mask[at] != 0;
    } else {
        const T* mask = static_cast<const T*>(a.mask);
        for (int64_t at = begin; at < end; ++at) count += mask[at] != T(0);
    }
    return static_cast<double>(count);
}

// `inverse`: 1 / denominator.
template <class T>
PRISM_INLINE void one_sequence(const PolicyArguments<T>& a, int64_t sequence, double inverse) {
    const PolicyOptions<T>& o = a.options;
    const int64_t begin = a.begin(sequence), end = a.end(sequence);
    Chunk<T> c;
    double sums[kPartials] = {};
    sums[sum_count] = -INFINITY;
    sums[sum_tokens] = a.workspace[sequence * kPartials + sum_tokens];
    const bool spread = o.family == Family::sequence;
    const bool mean_kl = spread && o.kl_importance && a.ref_logp != nullptr;
    double drift = 0.0, divergence = 0.0;
    for (int64_t at = begin; spread && at < end; at += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at)), whole = whole_lanes(n);
        load_active(c, a, at, n);
        load_pair(c, a, at, n);
        drift += lane_sum(whole, [&](int i) { return static_cast<double>(c.fresh[i]) - static_cast<double>(c.old[i]); });
        if (mean_kl) {
            diverge(c, a, at, n);
            divergence += lane_sum(c.value, whole);
        }
    }
    const T mean = static_cast<T>(divergence / std::max(sums[sum_tokens], 1.0));
    const SequenceRatio<T> all = spread ? sequence_ratio<T>(drift, sums[sum_tokens]) : SequenceRatio<T>{T(1), T(1)};
    const T share = static_cast<T>(sequence_weight(a, sums[sum_tokens]) * inverse);
    for (int64_t at = begin; at < end; at += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at)), whole = whole_lanes(n);
        load_active(c, a, at, n);
        load_pair(c, a, at, n);
        if (a.token_advantage != nullptr) {
            load(c.advantage, c, a.token_advantage + at, n);
        } else {
            fill(c.advantage, c, a.advantage[sequence], whole);
        }
        switch (o.family) {
            case Family::clipped:
                if (o.has_bound) {
                    policy_terms<Family::clipped, true>(c, o, all, whole);
                } else {
                    policy_terms<Family::clipped>(c, o, all, whole);
                }
                break;
            case Family::sequence: policy_terms<Family::sequence>(c, o, all, whole); break;
            case Family::cispo: policy_terms<Family::cispo>(c, o, all, whole); break;
            case Family::sapo: policy_terms<Family::sapo>(c, o, all, whole); break;
        }
        if (a.is_weight != nullptr) {
            load(c.weight, c, a.is_weight + at, n);
            for (int i = 0; i < whole; ++i) c.loss[i] *= c.weight[i];
            for (int i = 0; i < whole; ++i) c.slope[i] *= c.weight[i];
        }
        sums[sum_loss] += lane_sum(c.loss, whole);
        sums[sum_ratio] += lane_sum(c.ratio, whole);
        sums[sum_measured] += lane_sum(c.measured, whole);
        if (o.family != Family::sapo) {
            sums[sum_low] += lane_sum(c.low, whole);
            sums[sum_high] += lane_sum(c.high, whole);
            if (o.has_bound) sums[sum_dual] += lane_sum(c.dual, whole);
        }
        sums[sum_count] = largest(c.ratio, whole, sums[sum_count]);
        if (a.ref_logp != nullptr) {
            diverge(c, a, at, n);
            if (o.kl_importance) weigh_by_ratio(c, spread, mean, whole);
            sums[sum_kl] += lane_sum(c.value, whole);
            if (o.kl_coef != T(0)) {
                for (int i = 0; i < whole; ++i) c.slope[i] += o.kl_coef * c.lean[i];
                for (int i = 0; i < whole; ++i) c.loss[i] += o.kl_coef * c.value[i];
            }
        }
        if (a.entropy != nullptr) {
            load(c.other, c, a.entropy + at, n);
            sums[sum_entropy] += lane_sum(c.other, whole);
            if (o.entropy_coef != T(0)) {
                for (int i = 0; i < whole; ++i) c.loss[i] -= o.entropy_coef * c.other[i];
            }
        }
        if (a.slope != nullptr) {
            for (int i = 0; i < n; ++i) a.slope[at + i] = c.active[i] != T(0) ? shown(c.loss[i], c.slope[i] * share) : T(0);
        }
        if (a.entropy_slope != nullptr) {
            const T each = -o.entropy_coef * share;
            for (int i = 0; i < n; ++i) a.entropy_slope[at + i] = c.active[i] != T(0) ? shown(c.loss[i], each) : T(0);
        }
    }
    if (sums[sum_ratio] != sums[sum_ratio]) sums[sum_count] = NAN;
    std::copy(sums, sums + kPartials, a.workspace + sequence * kPartials);
}

#define PRISM_PASSES(T)                                                                                                    \
    PRISM_CLONES double count_pass(const PolicyArguments<T>& a, int64_t sequence) { return count_active(a, sequence); }     \
    PRISM_CLONES void sequence_pass(const PolicyArguments<T>& a, int64_t s, double inverse) { one_sequence(a, s, inverse); }
PRISM_PASSES(float)
PRISM_PASSES(double)
#undef PRISM_PASSES

}  // namespace

template <class T>
void policy_loss_cpu(PolicyArguments<T> a, int threads) {
    thread_local std::vector<double> own;  // kept between calls, because fresh memory costs page faults
    if (a.workspace == nullptr) {
        own.resize(std::max<size_t>(own.size(), a.sequences * kPartials));
        a.workspace = own.data();
    }
    double tokens = 0.0, sequences = 0.0;
    bool ordered = a.ordered();
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
        const double count = a.workspace[sequence * kPartials + sum_tokens] = count_pass(a, sequence);
        tokens += count;
        sequences += count > 0.0 ? 1.0 : 0.0;
        ordered = ordered && a.ordered(sequence);
    }
    const double inverse = inverse_denominator(a, tokens, sequences, ordered);
    *a.bad += !ordered;
    // One thread finishes some thousand tokens before a second one has started.
    parallel_for(a.sequences, a.tokens * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t sequence = begin; sequence < end; ++sequence) sequence_pass(a, sequence, inverse);
    });
    const int64_t padding = a.sequences == 0 ? 0 : a.end(a.sequences - 1);
    for (T* slope : {a.slope, a.entropy_slope}) {
        if (slope == nullptr) continue;
        std::fill(slope + padding, slope + a.tokens, T(0));
        if (!ordered) std::fill(slope, slope + a.tokens, static_cast<T>(NAN));
    }
    Totals totals{};
    totals.largest = -INFINITY;
    totals.ordered = ordered;
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) add_sequence(totals, a, sequence);
    write_results(totals, a);
    a.stats[stat_slope_factor] = T(1);
}

template void policy_loss_cpu<float>(PolicyArguments<float>, int);
template void policy_loss_cpu<double>(PolicyArguments<double>, int);

}  // namespace prism
