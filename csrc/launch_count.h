// Counts the kernels that an op enqueues, also on a machine without a GPU: every launch in csrc/ goes through launch.cuh, which
// counts it. A dry run only counts: the host code of an op runs to its end with nothing enqueued.
#pragma once

#include <cstdint>

namespace prism {

struct LaunchCount {
    bool dry = false;
    int64_t launches = 0;
};

inline LaunchCount& launch_count() {
    thread_local LaunchCount count;
    return count;
}

// Text of a cudaError_t.
const char* cuda_error_text(int error);

}  // namespace prism
