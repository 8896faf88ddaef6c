// CUDA kernel of the policy losses: one cooperative launch. A block takes whole sequences, so that lengths and the sequence
// ratios of GSPO need no exchange between blocks; after a barrier over the grid one block adds up the sums of all sequences.
#include <cooperative_groups.h>

#include <initializer_list>

#include "block.cuh"
#include "launch.cuh"
#include "policy_loss.h"
#include "vector.cuh"

namespace prism {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 2;  // guaranteed by the launch bounds

template <class T>
struct Work {
    PolicyArguments<T> arguments;
    bool wide;          // all columns are aligned for 16-byte accesses
    bool entropy_wide;  // and so is the second row of the slopes
};

// kWide consecutive tokens of one sequence; `active` is 0 for those outside it.
template <class T>
struct Group {
    int64_t first, begin, end;
    bool whole;
    Wide<T> active;

    __device__ Group(const PolicyArguments<T>& a, int64_t first, int64_t begin, int64_t end, bool wide)
        : first(first), begin(begin), end(end), whole(wide && first >= begin && first + kWide<T> <= end) {
        if (a.mask_kind == MaskKind::number) {
            active = load_wide(static_cast<const T*>(a.mask), first, begin, end, whole, T(0));
        } else {
#pragma unroll
            for (int i = 0; i < kWide<T>; ++i) active.at[i] = inside(i) && a.active(first + i) ? T(1) : T(0);
        }
    }
    __device__ bool inside(int i) const { return first + i >= begin && first + i < end; }
    // Column x, 0 where inactive.
    __device__ Wide<T> load(const T* x) const {
        Wide<T> value = load_wide(x, first, begin, end, whole, T(0));
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) value.at[i] = active.at[i] != T(0) ? value.at[i] : T(0);
        return value;
    }
    __device__ Wide<T> load_or(const T* x, T value) const {
        if (x != nullptr) return load(x);
        Wide<T> same;
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) same.at[i] = active.at[i] != T(0) ? value : T(0);
        return same;
    }
    __device__ void store(T* x, const Wide<T>& value, bool wide) const {
        store_wide(x, first, begin, end, whole && wide, value);
    }
};

template <class T>
__device__ __forceinline__ TokenTerms<T> terms_of(const Token<T>& x, const PolicyOptions<T>& o, const SequenceRatio<T>& all) {
    switch (o.family) {
        case Family::sequence: return token_terms<Family::sequence, false>(x, o, all);
        case Family::cispo: return token_terms<Family::cispo, false>(x, o, all);
        case Family::sapo: return token_terms<Family::sapo, false>(x, o, all);
        default:
            return o.has_bound ? token_terms<Family::clipped, true>(x, o, all) : token_terms<Family::clipped, false>(x, o, all);
    }
}

template <class T>
__device__ __forceinline__ KlTerms<T> kl_of(T fresh, T ref, Divergence divergence) {
    switch (divergence) {
        case Divergence::k1: return kl_terms<Divergence::k1>(fresh, ref);
        case Divergence::k2: return kl_terms<Divergence::k2>(fresh, ref);
        case Divergence::abs: return kl_terms<Divergence::abs>(fresh, ref);
        default: return kl_terms<Divergence::k3>(fresh, ref);
    }
}

// KL estimate of one token by the options, and its slope, before the factor of the ratio.
template <class T>
__device__ __forceinline__ KlTerms<T> kl_as(T fresh, T ref, const PolicyOptions<T>& o) {
    KlTerms<T> kl = kl_of(fresh, ref, o.divergence);
    if (o.straight_through) kl.slope = k2_slope(fresh, ref);
    return kl;
}

// Calls f(group) for the tokens [begin, end), shared among the threads of the block.
template <class T, class F>
__device__ __forceinline__ void for_groups(const PolicyArguments<T>& a, int64_t begin, int64_t end, bool wide, F f) {
    const int64_t start = begin / kWide<T> * kWide<T>;
    for (int64_t first = start + threadIdx.x * kWide<T>; first < end; first += kThreads * kWide<T>) {
        f(Group<T>(a, first, begin, end, wide));
    }
}

template <class T>
__device__ void one_sequence(const Work<T>& work, int64_t sequence, double* shared) {
    const PolicyArguments<T>& a = work.arguments;
    const bool wide = work.wide;
    const PolicyOptions<T>& o = a.options;
    const int64_t begin = a.begin(sequence), end = a.end(sequence);
    const bool spread = o.family == Family::sequence;
    double tokens = end > begin ? static_cast<double>(end - begin) : 0.0, drift = 0.0, divergence = 0.0;
    const bool mean_kl = spread && o.kl_importance && a.ref_logp != nullptr;
    if (spread || a.mask_kind != MaskKind::none) {
        double count = 0.0;
        for_groups(a, begin, end, wide, [&](const Group<T>& group) {
            Wide<T> fresh{}, old{};
            if (spread && a.old_logp != nullptr) {
                fresh = group.load(a.logp);
                old = group.load(a.old_logp);
            } else if (spread) {
                old = fresh = group.load(a.logp);
            }
            Wide<T> ref{};
            if (mean_kl) ref = group.load(a.ref_logp);
#pragma unroll
            for (int i = 0; i < kWide<T>; ++i) {
                count += group.active.at[i] != T(0) ? 1.0 : 0.0;
                drift += static_cast<double>(fresh.at[i]) - static_cast<double>(old.at[i]);
                if (mean_kl) divergence += static_cast<double>(kl_as(fresh.at[i], ref.at[i], o).value);
            }
        });
        tokens = block_all(count, 0.0, shared, Add());
        if (spread) drift = block_all(drift, 0.0, shared, Add());
        if (mean_kl) divergence = block_all(divergence, 0.0, shared, Add());
    }
    const SequenceRatio<T> all = spread ? sequence_ratio<T>(drift, tokens) : SequenceRatio<T>{T(1), T(1)};
    const T mean = static_cast<T>(divergence / (tokens > 1.0 ? tokens : 1.0));
    const T share = static_cast<T>(sequence_weight(a, tokens));
    const T advantage = a.advantage == nullptr ? T(0) : a.advantage[sequence];
    double sums[sum_tokens] = {};
    T largest = static_cast<T>(-INFINITY);
    for_groups(a, begin, end, wide, [&](const Group<T>& group) {
        const Wide<T> fresh = group.load(a.logp);
        const Wide<T> old = a.old_logp == nullptr ? fresh : group.load(a.old_logp);
        const Wide<T> advantages = group.load_or(a.token_advantage, advantage);
        const Wide<T> weights = group.load_or(a.is_weight, T(1));
        Wide<T> ref{}, entropy{}, slope, entropy_slope;
        if (a.ref_logp != nullptr) ref = group.load(a.ref_logp);
        if (a.entropy != nullptr) entropy = group.load(a.entropy);
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) {
            const bool active = group.active.at[i] != T(0);
            const TokenTerms<T> terms = terms_of(Token<T>{fresh.at[i], old.at[i], advantages.at[i]}, o, all);
            T slant = terms.slope * weights.at[i], loss = terms.loss * weights.at[i];
            sums[sum_loss] += static_cast<double>(loss);
            sums[sum_ratio] += active ? static_cast<double>(terms.ratio) : 0.0;
            sums[sum_measured] += static_cast<double>(terms.measured);
            sums[sum_low] += static_cast<double>(terms.low);
            sums[sum_high] += static_cast<double>(terms.high);
            sums[sum_dual] += static_cast<double>(terms.dual);
            sums[sum_entropy] += static_cast<double>(entropy.at[i]);
            largest = active ? larger(largest, terms.ratio) : largest;
            if (a.ref_logp != nullptr) {
                KlTerms<T> kl = kl_as(fresh.at[i], ref.at[i], o);
                if (o.kl_importance) kl = times_ratio(kl, terms.ratio, terms.moving, spread ? mean : kl.value);
                sums[sum_kl] += active ? static_cast<double>(kl.value) : 0.0;
                if (o.kl_coef != T(0)) {
                    slant += o.kl_coef * kl.slope;
                    loss += o.kl_coef * kl.value;
                }
            }
            if (a.entropy != nullptr && o.entropy_coef != T(0)) loss -= o.entropy_coef * entropy.at[i];
            slope.at[i] = active ? shown(loss, slant * share) : T(0);
            entropy_slope.at[i] = active ? shown(loss, -o.entropy_coef * share) : T(0);
        }
        if (a.slope != nullptr) group.store(a.slope, slope, true);
        if (a.entropy_slope != nullptr) group.store(a.entropy_slope, entropy_slope, work.entropy_wide);
    });
    double* partial = a.workspace + sequence * kPartials;
#pragma unroll
    for (int i = 0; i < sum_tokens; ++i) {
        const double sum = block_all(sums[i], 0.0, shared, Add());
        if (threadIdx.x == 0) partial[i] = sum;
    }
    const double top = block_all(static_cast<double>(largest), -static_cast<double>(INFINITY), shared, Larger());
    if (threadIdx.x == 0) {
        partial[sum_tokens] = tokens;
        partial[sum_count] = top;
    }
}

// One block: the sums of all sequences, then loss and statistics.
template <class T>
__device__ void fold(const PolicyArguments<T>& a, double* shared) {
    Totals t{};
    t.largest = -INFINITY;
    t.ordered = a.ordered();
    for (int64_t sequence = threadIdx.x; sequence < a.sequences; sequence += kThreads) add_sequence(t, a, sequence);
    double* all[] = {&t.loss, &t.penalized, &t.kl, &t.entropy, &t.ratio, &t.measured, &t.low, &t.high, &t.dual, &t.tokens, &t.sequences};
#pragma unroll
    for (double* sum : all) *sum = block_all(*sum, 0.0, shared, Add());
    t.largest = block_all(t.largest, -static_cast<double>(INFINITY), shared, Larger());
    t.ordered = __syncthreads_and(t.ordered);
    if (threadIdx.x != 0) return;
    write_results(t, a);
    if (!t.ordered) count_one(a.bad);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) policy_kernel(const Work<T> work) {
    __shared__ double shared[kThreads / kWarp];
    const PolicyArguments<T>& a = work.arguments;
    for (int64_t sequence = blockIdx.x; sequence < a.sequences; sequence += gridDim.x) {
        one_sequence(work, sequence, shared);
    }
    const int64_t padding = a.sequences == 0 ? 0 : a.end(a.sequences - 1);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t at = padding + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.tokens; at += stride) {
        if (a.slope != nullptr) a.slope[at] = T(0);
        if (a.entropy_slope != nullptr) a.entropy_slope[at] = T(0);
    }
    cooperative_groups::this_grid().sync();
    if (blockIdx.x == 0) fold(a, shared);
}

}  // namespace

template <class T>
int policy_loss_cuda(const PolicyArguments<T>& a, void* stream) {
    Work<T> work{a, true, aligned(a.entropy_slope)};
    for (const void* column : std::initializer_list<const void*>{
             a.logp, a.old_logp, a.token_advantage, a.ref_logp, a.entropy, a.is_weight, a.slope}) {
        work.wide = work.wide && aligned(column);
    }
    if (a.mask_kind == MaskKind::number) work.wide = work.wide && aligned(a.mask);
    const int64_t room = static_cast<int64_t>(multiprocessors()) * kBlocksPerMultiprocessor;
    const int64_t blocks = a.sequences < 1 ? 1 : a.sequences < room ? a.sequences : room;
    return launch_together(policy_kernel<T>, static_cast<unsigned>(blocks), kThreads, stream, work);
}

template int policy_loss_cuda<float>(const PolicyArguments<float>&, void*);
template int policy_loss_cuda<double>(const PolicyArguments<double>&, void*);

}  // namespace prism
