// Log-probability of one token per row of logits, entropy of the row, and the gradient of both.
//
// Meaning: prism_fast/ops/selected_logprob.py; executable specification: prism_fast/ops/reference/selected_logprob.py.
//
// With z_j = (x_j - top) / temperature, S = sum_j e^z_j and U = sum_j e^z_j z_j:
//     logp = z_target - log S,   H = log S - U / S,   d / dx_j = ([j = target] g - p_j (g + h (log p_j + H))) / temperature
// where g and h are the upstream gradients of logp and H. The row's maximum `top` and log S stay two numbers: their sum, rounded
// to one number, would lose the difference between two logits near 10,000.
#pragma once

#include "half.h"

namespace prism {

// S is the type of the logits, T that of the computation (double for double, else float).
template <class S, class T = typename ComputedIn<S>::type>
struct LogprobArguments {
    const S* logits;  // [rows, vocabulary], unit stride in the vocabulary
    int64_t row_stride;
    const void* target;  // [rows] int64 or int32
    bool target_is_64;
    const T* temperature;  // [rows], [] with stride 0, or null:
    int64_t temperature_stride;
    T one_temperature;
    int64_t ignore_index;
    int64_t rows, vocabulary;
    // Written by forward, read by backward.
    T* logp;     // [rows]; forward only
    T* entropy;  // [rows] or null
    T* top;      // [rows]
    T* log_sum;  // [rows]
    // Backward.
    const T* logp_grad;  // [rows] or null: 0
    int64_t logp_grad_stride;
    const T* entropy_grad;  // [rows] or null: 0
    int64_t entropy_grad_stride;
    S* gradient;  // [rows, vocabulary], contiguous
    int64_t* bad;  // []: forward adds the number of rows whose target is no column

    PRISM_HD int64_t target_of(int64_t row) const {
        return target_is_64 ? static_cast<const int64_t*>(target)[row] : static_cast<const int32_t*>(target)[row];
    }
    PRISM_HD T temperature_of(int64_t row) const {
        return temperature == nullptr ? one_temperature : temperature[row * temperature_stride];
    }
    PRISM_HD bool known(int64_t token) const { return token >= 0 && token < vocabulary; }
};

// Sums over the row so far, relative to `top`. `bad` records NaN logits, which comparisons ignore.
template <class T>
struct RowSums {
    T top;
    T total, weighted;  // S and U
    bool bad;

    PRISM_HD static RowSums none() { return {-static_cast<T>(INFINITY), T(0), T(0), false}; }

    // Makes the sums relative to a new, not smaller maximum.
    PRISM_HD void raise(T higher, T temperature) {
        if (higher > top) {
            if (total != T(0)) {
                const T shift = (top - higher) / temperature, factor = exponential(shift);
                const T held = shift < ExpLimits<T>::low ? ExpLimits<T>::low : shift;
                weighted = factor * (weighted + held * total);
                total *= factor;
            }
            top = higher;
        }
    }
};

// Log-probability (and entropy) of a row from its sums; NaN for a row with NaN or +infinity, or with -infinity alone.
template <class S, class T, class Sum>
PRISM_HD inline void finish_row(const LogprobArguments<S, T>& a, int64_t row, T top, Sum total, Sum weighted, bool bad) {
    const int64_t token = a.target_of(row);
    const bool usable = !bad && top > -static_cast<T>(INFINITY) && top < static_cast<T>(INFINITY);
    const Sum nan = static_cast<Sum>(NAN);
    const Sum log_sum = usable ? static_cast<Sum>(log(static_cast<double>(total))) : nan;
    a.top[row] = top;
    a.log_sum[row] = static_cast<T>(log_sum);
    if (a.entropy != nullptr) a.entropy[row] = static_cast<T>(log_sum - weighted / total);
    if (!a.known(token)) {
        a.logp[row] = static_cast<T>(NAN);
        return;
    }
    const Sum x = widen(a.logits[row * a.row_stride + token]);
    Sum z = (x - static_cast<Sum>(top)) / static_cast<Sum>(a.temperature_of(row));
    constexpr Sum lowest = ExpLimits<T>::lowest;
    z = z < lowest ? lowest : z;  // a banned token has the lowest log-probability, not minus infinity
    a.logp[row] = static_cast<T>(z - log_sum < lowest ? lowest : z - log_sum);
}

// Results of an ignored row, whose logits are not read.
template <class S, class T>
PRISM_HD inline void finish_ignored(const LogprobArguments<S, T>& a, int64_t row) {
    a.logp[row] = a.top[row] = a.log_sum[row] = T(0);
    if (a.entropy != nullptr) a.entropy[row] = T(0);
}

// The numbers of a row that backward needs.
template <class T>
struct RowSlope {
    T g, h, temperature, top, log_sum, entropy;
    int64_t target;  // -1: none
    bool idle;       // the whole row is exactly 0
};

template <class S, class T>
PRISM_HD inline RowSlope<T> row_slope(const LogprobArguments<S, T>& a, int64_t row) {
    const int64_t token = a.target_of(row);
    RowSlope<T> r{};
    r.idle = token == a.ignore_index;
    if (r.idle) return r;
    r.g = a.logp_grad == nullptr ? T(0) : a.logp_grad[row * a.logp_grad_stride];
    r.h = a.entropy_grad == nullptr ? T(0) : a.entropy_grad[row * a.entropy_grad_stride];
    if (!a.known(token) && r.g != T(0)) r.g = static_cast<T>(NAN);
    r.idle = r.g == T(0) && r.h == T(0);
    r.temperature = a.temperature_of(row);
    r.top = a.top[row];
    r.log_sum = a.log_sum[row];
    r.entropy = a.entropy_grad == nullptr ? T(0) : a.entropy[row];
    r.target = a.known(token) ? token : -1;
    return r;
}

// Gradient with respect to one logit, without the term g of the target.
template <bool with_entropy, class T>
PRISM_HD PRISM_INLINE T logit_slope(T x, T top, T inverse_temperature, T log_sum, T entropy, T g, T h) {
    const T log_p = (x - top) * inverse_temperature - log_sum;
    const T p = exponential(log_p);
    if (!with_entropy) return -p * g * inverse_temperature;
    const T held = log_p < ExpLimits<T>::low ? ExpLimits<T>::low : log_p;  // p is 0 there, and 0 * infinity is NaN
    return -p * (g + h * (held + entropy)) * inverse_temperature;
}

// CPU twins, on at most `threads` threads.
template <class S>
void selected_logprob_cpu(const LogprobArguments<S>& a, int threads);
template <class S>
void selected_logprob_backward_cpu(const LogprobArguments<S>& a, int threads);

// Enqueue the CUDA kernels (one launch each) on `stream` and return a cudaError_t. Never synchronise.
template <class S>
int selected_logprob_cuda(const LogprobArguments<S>& a, void* stream);
template <class S>
int selected_logprob_backward_cuda(const LogprobArguments<S>& a, void* stream);

}  // namespace prism
