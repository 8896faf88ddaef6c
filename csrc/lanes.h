// Sums over short buffers, in a fixed order that a compiler can vectorise.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace prism {

constexpr int kLanes = 16;

constexpr int whole_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Sum of f(0) .. f(n - 1), n a multiple of kLanes. Sixteen running sums are folded in the order of a tree.
template <class F>
PRISM_INLINE double lane_sum(int n, F f) {
    double lanes[kLanes] = {};
    for (int i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(f(i + lane));
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

template <class T>
PRISM_INLINE double lane_sum(const T* x, int n) {
    return lane_sum(n, [x](int i) { return x[i]; });
}

}  // namespace prism
