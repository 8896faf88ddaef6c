// Steps of the experts between their matrix products, one pass over memory each: SwiGLU, its gradient with that of the routing
// weights, and the weighted sum of the experts' rows by token. For the CPU alone.
//
// Meaning: prism_fast/ops/moe_experts.py; executable specification: prism_fast/ops/reference/moe_experts.py.
//
// S is the type of the rows, T that of the computation. `assignment` is a part of a plan's permutation: assignment a is choice
// a % top_k of token a / top_k, and tokens do not descend within an expert.
#pragma once

#include "half.h"

namespace prism {

// act = silu(gate) * up
template <class S>
struct SwigluArguments {
    const S* pre;        // [rows, 2 inner], gate before up
    int64_t row_stride;  // of pre; columns are neighbours
    int64_t rows, inner;
    S* act;  // [rows, inner] dense
};

// With g = d_act and w the routing weight: d_pre = w g d(act)/d(pre), d_weights = sum g act, and w act overwrites g: d_down is
// its product with the upstream rows.
template <class S, class T = typename ComputedIn<S>::type>
struct SwigluGradientArguments {
    const S* pre;
    int64_t row_stride;
    int64_t rows, inner;
    const int64_t* assignment;  // [rows]
    const T* weights;           // by assignment
    S* d_act;                   // [rows, inner] dense; read: upstream row times down; written: w act
    S* d_pre;                   // [rows, 2 inner] dense, or null: not wanted
    T* d_weights;               // by assignment, or null: not wanted
};

// to[token] += weight * from, in the order of the rows.
template <class S, class T = typename ComputedIn<S>::type>
struct AddRowsArguments {
    const S* from;  // [rows, width] dense
    int64_t rows, width;
    const int64_t* assignment;  // [rows]
    int top_k;
    const T* weights;  // by assignment, or null: 1
    T* to;             // [tokens, width] dense

    int64_t token(int64_t row) const { return assignment[row] / top_k; }
};

// On at most `threads` threads; results do not depend on their number.
template <class S>
void swiglu(const SwigluArguments<S>& a, int threads);
template <class S>
void swiglu_backward(const SwigluGradientArguments<S>& a, int threads);
template <class S>
void add_rows(const AddRowsArguments<S>& a, int threads);

// Asks the system, if it supports this, for pages of 2 MiB within [address, address + bytes).
void prefer_huge_pages(void* address, int64_t bytes);

}  // namespace prism
