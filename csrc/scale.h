// Multiplies gradients that the forward pass wrote by the upstream gradient: the whole backward pass of the losses.
#pragma once

#include "numeric.h"

namespace prism {

template <class T>
struct ScaleArguments {
    const T* x;         // [count]
    const T* upstream;  // []
    const T* factor;    // [] or null: 1
    T* out;             // [count]
    int64_t count;
};

template <class T>
PRISM_HD inline T scale_factor(const ScaleArguments<T>& a) {
    return a.factor == nullptr ? *a.upstream : *a.upstream * *a.factor;
}

// On the host: whether scaling would change nothing, so that backward need not copy.
template <class T>
bool scale_is_one(const T* upstream, const T* factor) {
    return *upstream * (factor == nullptr ? T(1) : *factor) == T(1);
}

// CPU twin, on the caller's thread: memory limits it.
template <class T>
void scale_cpu(const ScaleArguments<T>& a);

// Enqueues the CUDA kernel (one launch) on `stream` and returns a cudaError_t. Never synchronises.
template <class T>
int scale_cuda(const ScaleArguments<T>& a, void* stream);

}  // namespace prism
