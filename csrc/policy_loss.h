// Clipped policy-gradient losses on packed sequences: the arithmetic, once, for the CPU twin and the CUDA kernel.
//
// Meaning: prism_fast/ops/policy_loss.py; executable specification: prism_fast/ops/reference/policy_loss.py.
//
// The forward pass writes the loss, the statistics and, per token, the *slope*: the derivative of the loss with respect to
// logp (and entropy), on a GPU times the denominator. Backward divides by it there, together with the multiplication by the
// upstream gradient (scale.h), so that no token waits for a count over the whole batch. The CPU twin counts first, which takes
// it almost no time: its slopes are the final gradient for an upstream gradient of 1.
#pragma once

#include "scalar.h"

namespace prism {

// grpo, dapo, dr_grpo, bnpo | gspo, gspo_token | cispo | sapo
enum class Family : int { clipped, sequence, cispo, sapo };
enum class Aggregation : int { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Divergence : int { k1, k2, k3, abs };
enum class MaskKind : int { none, boolean, number };  // `number`: of the computing type, 0 = inactive

// Statistics in the order of PolicyStats, then the factor of the slopes in backward.
enum Stat : int {
    stat_tokens, stat_sequences, stat_policy_loss, stat_clip_low, stat_clip_high, stat_dual, stat_ratio_mean, stat_ratio_max,
    stat_approx_kl, stat_kl, stat_entropy, stat_slope_factor, stat_count
};
// Sums over the active tokens of one sequence, before its weight.
enum Sum : int { sum_loss, sum_kl, sum_entropy, sum_ratio, sum_measured, sum_low, sum_high, sum_dual, sum_tokens, sum_count };
// Per sequence in the workspace: the sums, then the largest ratio.
constexpr int kPartials = sum_count + 1;

constexpr double kLogRatioClamp = 20.0;      // token ratios
constexpr double kSequenceLogRatioMax = 10.0;  // sequence ratios
constexpr double kKlLogRatioClamp = 20.0, kKlValueClamp = 10.0;

template <class T>
struct PolicyOptions {
    Family family;
    Aggregation aggregation;
    Divergence divergence;
    bool straight_through;  // the slope is k2's, whatever the divergence
    bool kl_importance;     // the divergence is multiplied by the ratio
    bool has_denominator;  // otherwise this call's own count
    bool has_bound;        // dual clip or delta
    T clip_low, clip_high;  // bounds of the ratio: 1 - lo, 1 + hi
    T bound;
    T tau_positive, tau_negative;
    T kl_coef, entropy_coef;
};

// T is float or double: token arithmetic in T, sums in double. Pointers that may be null are marked.
template <class T>
struct PolicyArguments {
    const T* logp;             // [tokens]
    const T* old_logp;         // [tokens] or null: on-policy
    const T* token_advantage;  // [tokens] or null, then
    const T* advantage;        // [sequences]
    const T* ref_logp;         // [tokens] or null
    const T* entropy;          // [tokens] or null
    const T* is_weight;        // [tokens] or null
    const void* mask;          // [tokens] of `mask_kind`
    const int32_t* offsets;    // [sequences + 1]
    T* loss;                   // []
    T* stats;                  // [stat_count]
    T* slope;                  // [tokens] or null: no gradient wanted
    T* entropy_slope;          // [tokens] or null
    double* workspace;         // [sequences, kPartials]; the CPU twin brings its own where it is null
    int64_t* bad;              // [] counts calls with bad offsets
    int64_t tokens, sequences;
    MaskKind mask_kind;
    Scalar denominator, norm_length;
    PolicyOptions<T> options;

    PRISM_HD bool active(int64_t token) const {
        if (mask_kind == MaskKind::none) return true;
        if (mask_kind == MaskKind::boolean) return static_cast<const bool*>(mask)[token];
        return static_cast<const T*>(mask)[token] != T(0);
    }
    // Tokens of a sequence; memory-safe for any offsets.
    PRISM_HD int64_t begin(int64_t sequence) const { return sequence == 0 ? 0 : inside(offsets[sequence]); }
    PRISM_HD int64_t end(int64_t sequence) const { return inside(offsets[sequence + 1]); }
    // Whether the offsets are 0, ..., not descending, at most `tokens`: of the first one, and of one sequence after those before.
    PRISM_HD bool ordered() const { return offsets[0] == 0; }
    PRISM_HD bool ordered(int64_t sequence) const {
        return offsets[sequence] <= offsets[sequence + 1] && offsets[sequence + 1] <= tokens;
    }
    PRISM_HD int64_t inside(int64_t token) const { return token < 0 ? 0 : token > tokens ? tokens : token; }
};

// Inputs of the policy term for one token; 0 if the token is inactive.
template <class T>
struct Token {
    T fresh, old, advantage;
};

template <class T>
struct TokenTerms {
    T loss, slope;            // of the policy term
    T ratio, moving;          // moving: the ratio as far as it has a gradient
    T measured;               // the log-ratio that approx_kl reports
    T low, high, dual;        // 0 or 1
};

// Ratio of a whole sequence, in the family `sequence`.
template <class T>
struct SequenceRatio {
    T ratio, moving;  // moving: the ratio where its clamp lets the gradient pass, else 0
};

// Loss of one token and its derivative with respect to logp, both before weights. The conventions on ties and bounds are
// those of automatic differentiation of the specification: clamps pass the gradient on their bounds, equal arguments of a
// maximum share it.
template <Family family, bool has_bound, class T>
PRISM_HD PRISM_INLINE TokenTerms<T> token_terms(const Token<T>& x, const PolicyOptions<T>& o, const SequenceRatio<T>& all) {
    TokenTerms<T> out{};
    const T a = x.advantage;
    const T drift = x.fresh - x.old;
    const T limit = T(kLogRatioClamp);
    const T held = drift < -limit ? -limit : drift > limit ? limit : drift;
    if (family == Family::sequence) {
        out.measured = drift;
        out.ratio = all.ratio;
        out.moving = all.moving;
    } else {
        out.measured = held;
        out.ratio = exponential_within(held);
        out.moving = held == drift ? out.ratio : T(0);
    }
    const T ratio = out.ratio, moving = out.moving;
    if (family == Family::sapo) {
        const T positive = o.tau_positive, negative = o.tau_negative, tau = a > T(0) ? positive : negative;
        const T s = T(1) / (T(1) + exponential(-(tau * (ratio - T(1)))));
        out.loss = -a * s * T(4) / tau;
        out.slope = -a * T(4) * (s * (T(1) - s)) * moving;
        return out;
    }
    const T bottom = o.clip_low, top = o.clip_high, clipped = ratio < bottom ? bottom : ratio > top ? top : ratio;
    if (family == Family::cispo) {
        out.loss = -a * clipped * x.fresh;
        out.slope = -a * clipped;
        out.low = flag<T>(ratio < bottom);
        out.high = flag<T>(ratio > top);
        return out;
    }
    // Booleans are the numbers 0 and 1 here: loops over their products vectorise, loops over boolean logic do not.
    const T plain = -a * ratio, bounded = -a * clipped;
    const T holds = flag<T>(bounded > plain);  // never inside the range
    const T shared = flag<T>(bounded == plain) * flag<T>(clipped != ratio);  // equal by rounding or by A = 0
    T passes = (T(1) - holds) * (T(1) - T(0.5) * shared);
    out.loss = bounded > plain ? bounded : plain;
    const T below = flag<T>(a < T(0));
    if (has_bound) {
        const T ceiling = -a * o.bound, each = out.loss;
        out.dual = below * flag<T>(each > ceiling);
        passes *= (T(1) - out.dual) * (T(1) - T(0.5) * below * flag<T>(each == ceiling));
        out.loss = out.dual != T(0) ? ceiling : each;
    }
    out.slope = passes * (-a * moving);
    out.low = holds * below;
    out.high = holds - out.low;  // with A = 0 nothing is held
    return out;
}

// Estimate of KL(policy || reference) and its derivative with respect to logp.
template <class T>
struct KlTerms {
    T value, slope;
};

// The derivative of a straight-through estimate: that of k2.
template <class T>
PRISM_HD PRISM_INLINE T k2_slope(T fresh, T ref) {
    return fresh - ref;
}

template <Divergence divergence, class T>
PRISM_HD PRISM_INLINE KlTerms<T> kl_terms(T fresh, T ref) {
    const T d = fresh - ref;
    if (divergence == Divergence::k1) return {d, T(1)};
    if (divergence == Divergence::k2) return {T(0.5) * d * d, k2_slope(fresh, ref)};
    if (divergence == Divergence::abs) return {d < T(0) ? -d : d, d > T(0) ? T(1) : d < T(0) ? T(-1) : T(0)};
    const T limit = T(kKlLogRatioClamp), top = T(kKlValueClamp);
    const T raw = -d;
    const T k = raw < -limit ? -limit : raw > limit ? limit : raw;
    const T e = exponential_within(k);
    const T value = e - k - T(1);
    // The value is not negative, and exceeds its limit wherever k exceeds its own: one comparison serves both clamps.
    const bool passes = value <= top;
    return {value > top ? top : value, passes ? T(1) - e : T(0)};
}

// The estimate times the ratio, by the product rule. `mean`: the estimate itself; with one ratio per sequence its mean over the
// sequence, because every token contributes equally to that ratio.
template <class T>
PRISM_HD PRISM_INLINE KlTerms<T> times_ratio(const KlTerms<T>& kl, T ratio, T moving, T mean) {
    return {kl.value * ratio, kl.slope * ratio + mean * moving};
}

// A NaN value gets a NaN derivative, so that gradients alone show it.
template <class T>
PRISM_HD PRISM_INLINE T shown(T loss, T slope) {
    return loss != loss ? loss : slope;
}

// Weight of a sequence's tokens before the denominator.
template <class T>
PRISM_HD inline double sequence_weight(const PolicyArguments<T>& a, double active) {
    if (a.options.aggregation == Aggregation::seq_mean_token_mean) return 1.0 / (active > 1.0 ? active : 1.0);
    if (a.options.aggregation == Aggregation::seq_mean_token_sum_norm) return 1.0 / a.norm_length.load();
    return 1.0;
}

template <class T>
PRISM_HD inline SequenceRatio<T> sequence_ratio(double drift_sum, double active) {
    const double drift = drift_sum / (active > 1.0 ? active : 1.0);
    const double top = kSequenceLogRatioMax;
    const T ratio = static_cast<T>(exp(drift > top ? top : drift));
    return {ratio, drift <= top ? ratio : T(0)};
}

// Largest value; NaN if any value is NaN.
template <class T>
PRISM_HD PRISM_INLINE T larger(T a, T b) {
    return (b > a) | (b != b) ? b : a;
}

// From the sums of all sequences (`in`, weighted as below) to loss and statistics.
struct Totals {
    double loss, penalized, kl, entropy, ratio, measured, low, high, dual, tokens, sequences, largest;
    bool ordered;
};

// Adds one sequence to the totals.
template <class T>
PRISM_HD inline void add_sequence(Totals& t, const PolicyArguments<T>& a, int64_t sequence) {
    const double* p = a.workspace + sequence * kPartials;
    const double weight = sequence_weight(a, p[sum_tokens]);
    t.loss += weight * p[sum_loss];
    double extra = 0.0;  // a coefficient of 0 leaves its term out: 0 * NaN is NaN
    if (a.ref_logp != nullptr && a.options.kl_coef != T(0)) extra += a.options.kl_coef * p[sum_kl];
    if (a.entropy != nullptr && a.options.entropy_coef != T(0)) extra -= a.options.entropy_coef * p[sum_entropy];
    t.penalized += weight * extra;
    t.kl += p[sum_kl];
    t.entropy += p[sum_entropy];
    t.ratio += p[sum_ratio];
    t.measured += p[sum_measured];
    t.low += p[sum_low];
    t.high += p[sum_high];
    t.dual += p[sum_dual];
    t.tokens += p[sum_tokens];
    t.sequences += p[sum_tokens] > 0.0 ? 1.0 : 0.0;
    t.largest = larger(t.largest, p[sum_count]);
    t.ordered = t.ordered && a.ordered(sequence);
}

// 1 / denominator. With bad offsets the sequence of a token is unknown: everything becomes NaN.
template <class T>
PRISM_HD inline double inverse_denominator(const PolicyArguments<T>& a, double tokens, double sequences, bool ordered) {
    const bool by_token = a.options.aggregation == Aggregation::token_mean;
    const double count = a.options.has_denominator ? a.denominator.load() : by_token ? tokens : sequences;
    return !ordered ? static_cast<double>(NAN) : count == 0.0 ? 1.0 : 1.0 / count;
}

template <class T>
PRISM_HD inline void write_results(const Totals& t, const PolicyArguments<T>& a) {
    const double inverse = inverse_denominator(a, t.tokens, t.sequences, t.ordered);
    const double unknown = NAN;
    *a.loss = static_cast<T>((t.loss + t.penalized) * inverse);
    auto put = [&](Stat stat, double value) { a.stats[stat] = static_cast<T>(t.ordered ? value : unknown); };
    put(stat_tokens, t.tokens);
    put(stat_sequences, t.sequences);
    put(stat_policy_loss, t.loss * inverse);
    put(stat_clip_low, t.low / t.tokens);
    put(stat_clip_high, t.high / t.tokens);
    put(stat_dual, t.dual / t.tokens);
    put(stat_ratio_mean, t.ratio / t.tokens);
    put(stat_ratio_max, t.tokens > 0.0 ? t.largest : unknown);
    put(stat_approx_kl, -t.measured / t.tokens);
    put(stat_kl, a.ref_logp == nullptr ? unknown : t.kl / t.tokens);
    put(stat_entropy, a.entropy == nullptr ? unknown : t.entropy / t.tokens);
    put(stat_slope_factor, inverse);
}

// CPU twin, on at most `threads` threads.
template <class T>
void policy_loss_cpu(PolicyArguments<T> a, int threads);

// Enqueues the CUDA kernel (one launch) on `stream` and returns a cudaError_t. Never synchronises.
template <class T>
int policy_loss_cuda(const PolicyArguments<T>& a, void* stream);

}  // namespace prism
