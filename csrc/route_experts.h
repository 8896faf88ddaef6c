// Choice of experts and the plan that groups tokens by expert.
//
// Meaning: prism_fast/ops/route_experts.py; executable specification: prism_fast/ops/reference/routing.py.
//
// Rows are cut into chunks of kChunk. Each chunk counts its assignments per expert and sums load and z_stat; running sums over
// the chunks, in their order, give every assignment its place. Neither chunks nor results depend on the number of threads or
// multiprocessors.
#pragma once

#include "half.h"

namespace prism {

constexpr int kChunk = 256;
constexpr int kMaxExperts = 256;
constexpr int kMaxChosen = 8;

PRISM_HD inline int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Tensors of the plan. An assignment is a pair (row, j), numbered row * top_k + j.
struct PlanArguments {
    int64_t* chosen;  // [rows, top_k] expert of each assignment
    int64_t rows;
    int experts, top_k;
    int64_t* permutation;  // [rows * top_k] assignments sorted by expert, then by number
    int32_t* tokens;       // [rows * top_k] the row of each place in it
    int32_t* slots;        // [rows, top_k] the place of each assignment in it
    int32_t* offsets;      // [experts + 1] first place of each expert in it
    int32_t* counts;       // workspace [chunks + 1, experts]: assignments of each chunk, then of all

    PRISM_HD int32_t& count(int64_t chunk, int expert) const { return counts[chunk * experts + expert]; }
    PRISM_HD void place(int32_t slot, int64_t row, int j) const {
        permutation[slot] = row * top_k + j;
        tokens[slot] = static_cast<int32_t>(row);
        slots[row * top_k + j] = slot;
    }
};

// S is the type of the logits, T that of the computation.
template <class S, class T = typename ComputedIn<S>::type>
struct RouteArguments {
    PlanArguments plan;
    const S* logits;  // [rows, experts]; columns are neighbours
    int64_t row_stride;
    bool renormalize;
    T* weights;     // [rows, top_k]
    T* load;        // [experts] sum over rows of the softmax
    T* z_stat;      // [] sum over rows of (log-sum-exp)^2
    double* sums;   // workspace [chunks, experts + 1]: load and z_stat of each chunk
};

// `index` [rows, top_k] and `given` [rows, top_k] are the experts and weights that another router chose.
template <class T>
struct GivenArguments {
    PlanArguments plan;
    const int64_t* index;
    const T* given;
    T* weights;  // [rows, top_k]: `given`, NaN where the index names no expert (such an assignment goes to expert 0)
};

template <class S, class T = typename ComputedIn<S>::type>
struct RouteGradientArguments {
    const S* logits;
    int64_t row_stride;
    const int64_t* chosen;  // [rows, top_k]
    const T* weights;       // [rows, top_k]
    int64_t rows;
    int experts, top_k;
    bool renormalize;
    const T* weights_grad;  // [rows, top_k] or null: 0
    int64_t weights_grad_row, weights_grad_column;  // strides
    const T* load_grad;  // [experts] or null: 0
    int64_t load_grad_stride;
    const T* z_grad;  // [] or null: 0
    S* gradient;      // [rows, experts] dense

    // Upstream gradient of the weight of assignment (row, j).
    PRISM_HD T upstream(int64_t row, int j) const {
        return weights_grad == nullptr ? T(0) : weights_grad[row * weights_grad_row + j * weights_grad_column];
    }
    PRISM_HD T load_upstream(int expert) const {
        return load_grad == nullptr ? T(0) : load_grad[expert * load_grad_stride];
    }
    // Renormalised weights alone do not depend on the experts that were not chosen.
    PRISM_HD bool needs_softmax() const { return !renormalize || load_grad != nullptr || z_grad != nullptr; }
    // Sum over the chosen of weight * upstream.
    PRISM_HD T mean_upstream(int64_t row) const {
        T mean = T(0);
        for (int j = 0; j < top_k; ++j) mean += weights[row * top_k + j] * upstream(row, j);
        return mean;
    }
    // Common term of the gradients of a row's logits if the softmax is not needed: 0, or NaN for a row whose weights are NaN.
    PRISM_HD T untouched(int64_t row) const { return T(0) * weights[row * top_k]; }
    // With p the softmax, w the weights, g, G, Z the gradients of weights, load and z_stat, the gradient of logit e is
    //     p_e (G_e - sum p G + 2 Z log-sum-exp) + ( w_j (g_j - sum w g)         where e was chosen as j, renormalised
    //                                             | [e chosen] w_j g_j - p_e sum w g                  otherwise ).
    PRISM_HD T through_softmax(T p, T upstream_of_load, T mean_load, T z_slope, T mean) const {
        return p * (upstream_of_load - mean_load + z_slope - (renormalize ? T(0) : mean));
    }
    // Renormalised weights sum to 1, so g_j - sum w g = sum w (g_j - g). Differences come first: beside one weight near 1, the
    // others would be lost in a sum that is subtracted afterwards.
    PRISM_HD T through_weight(int64_t row, int j) const {
        const T own = upstream(row, j);
        if (!renormalize) return weights[row * top_k + j] * own;
        T apart = T(0);
        for (int i = 0; i < top_k; ++i) apart += weights[row * top_k + i] * (own - upstream(row, i));
        return weights[row * top_k + j] * apart;
    }
};

// CPU twins, on at most `threads` threads. They allocate their own workspace.
template <class S>
void route_experts_cpu(RouteArguments<S> a, int threads);
template <class T>
void plan_experts_cpu(GivenArguments<T> a, int threads);
template <class S>
void route_experts_backward_cpu(const RouteGradientArguments<S>& a, int threads);

// Enqueue the CUDA kernel on `stream` and return a cudaError_t (0: enqueued). Never synchronise.
template <class S>
int route_experts_cuda(const RouteArguments<S>& a, void* stream);
template <class T>
int plan_experts_cuda(const GivenArguments<T>& a, void* stream);
template <class S>
int route_experts_backward_cuda(const RouteGradientArguments<S>& a, void* stream);

}  // namespace prism
