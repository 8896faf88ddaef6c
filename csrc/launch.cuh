// The only place where kernels are enqueued. Both forms return a cudaError_t and never synchronise.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_count.h"

namespace prism {

// Counts the launch; returns whether to enqueue it.
inline bool launching() {
    ++launch_count().launches;
    return !launch_count().dry;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream, const Arguments&... arguments) {
    if (!launching()) return cudaSuccess;
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

// All blocks run at once and may wait for each other (cooperative_groups::this_grid().sync()). More blocks than the device
// holds is an error of the launch, never a hang. Kernel nodes of a CUDA graph keep the property.
template <class Parameter>
int launch_together(void (*kernel)(Parameter), unsigned blocks, unsigned threads, void* stream, Parameter argument) {
    if (!launching()) return cudaSuccess;
    void* arguments[] = {&argument};
    return cudaLaunchCooperativeKernel(
        kernel, dim3(blocks), dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream)
    );
}

// Multiprocessors of the current device; 1 in a dry run, where there may be no device.
inline int multiprocessors() {
    if (launch_count().dry) return 1;
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count;
}

}  // namespace prism
