// Gradients that the forward pass wrote, times the upstream gradient: what remains of backward.
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

// CPU twin. It moves memory and nothing else, so it stays on the caller's thread.
template <class T>
void scale_cpu(const ScaleArguments<T>& a);

// Enqueues the CUDA kernel (one launch) on `stream` and returns a cudaError_t. Never synchronises.
template <class T>
int scale_cuda(const ScaleArguments<T>& a, void* stream);

}  // namespace prism
