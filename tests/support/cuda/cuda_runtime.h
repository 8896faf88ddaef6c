// Stands in for the CUDA runtime where tests compile csrc/*.cu with the C++ compiler of the host: the part of CUDA C++ that
// these kernels use, on processor.h. What is missing here does not compile. Shared arrays and <<<>>> are translated by
// tests/support/cuda_card.py.
#pragma once

#include <math.h>  // not cmath: overloads of log and exp for float, as in CUDA

#include <cstdint>
#include <cstring>

#include "processor.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x;

    explicit dim3(unsigned x) : x(x) {}
};

#define threadIdx (dim3(processor::self().index))
#define blockIdx (dim3(processor::self().block->index))
#define blockDim (dim3(processor::self().block->grid.threads))
#define gridDim (dim3(processor::self().block->grid.blocks))

inline void __syncthreads() { processor::self().block->barrier.meet(); }
inline int __syncthreads_or(int yes) { return processor::self().block->barrier.meet(yes != 0) != 0; }
inline int __syncthreads_and(int yes) { return processor::self().block->barrier.meet(yes == 0) == 0; }
inline void __syncwarp() { processor::self().warp().barrier.meet(); }

namespace processor {

enum Operation : int { shuffle_xor = 1, shuffle_up, shuffle, ballot };

// x of lane `from(lane)`; the caller's own where there is no such lane.
template <class T, class From>
T shuffled(unsigned lanes, int operation, T x, From from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    const Slot* slots = exchange(lanes, operation, bits);
    const int lane = static_cast<int>(self().lane()), source = from(lane);
    bits = slots[source >= 0 && source < static_cast<int>(kLanes) ? source : lane].value.load(std::memory_order_relaxed);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace processor

template <class T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
    return processor::shuffled(lanes, processor::shuffle_xor, x, [mask](int lane) { return lane ^ mask; });
}

template <class T>
T __shfl_up_sync(unsigned lanes, T x, unsigned delta) {
    return processor::shuffled(lanes, processor::shuffle_up, x, [delta](int lane) { return lane - static_cast<int>(delta); });
}

template <class T>
T __shfl_sync(unsigned lanes, T x, int source) {
    return processor::shuffled(lanes, processor::shuffle, x, [source](int) { return source % static_cast<int>(processor::kLanes); });
}

inline unsigned __ballot_sync(unsigned lanes, int yes) {
    const processor::Slot* slots = processor::exchange(lanes, processor::ballot, yes != 0);
    unsigned found = 0;
    for (unsigned lane = 0; lane < processor::kLanes; ++lane) {
        found |= static_cast<unsigned>(slots[lane].value.load(std::memory_order_relaxed)) << lane;
    }
    return found;
}

inline int __any_sync(unsigned lanes, int yes) { return __ballot_sync(lanes, yes) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) {
    return __atomic_fetch_add(to, x, __ATOMIC_RELAXED);
}

// The host's side.
enum cudaError_t { cudaSuccess = 0, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "too many blocks in cooperative launch";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = processor::kMultiprocessors, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class Parameter>
cudaError_t cudaLaunchCooperativeKernel(
    void (*kernel)(Parameter), dim3 blocks, dim3 threads, void** arguments, size_t, cudaStream_t
) {
    // A kernel has a copy of its arguments.
    const bool fits = processor::run(blocks.x, threads.x, true, [=] { kernel(*static_cast<const Parameter*>(*arguments)); });
    return fits ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

namespace processor {

// kernel<<<blocks, threads>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const Arguments&... arguments) {
    run(blocks, threads, false, [&] { kernel(arguments...); });
}

}  // namespace processor
