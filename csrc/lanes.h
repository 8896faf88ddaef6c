// Sums over short buffers, in a fixed order that a compiler can vectorise.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace prism {

constexpr int kLanes = 16;

constexpr int whole_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Sum of f(0) .. f(n - 1), n a multiple of kLanes: sixteen running sums in the type of f, added up in double in the order of a
// tree. In a chunk of some hundred elements each adds some ten numbers, so a float loses almost nothing.
template <class F>
PRISM_INLINE double lane_sum(int n, F f) {
    using T = decltype(f(0));
    T lanes[kLanes] = {};
    for (int i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += f(i + lane);
    }
    double wide[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<double>(lanes[lane]);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) wide[lane] += wide[lane + width];
    }
    return wide[0];
}

template <class T>
PRISM_INLINE double lane_sum(const T* x, int n) {
    return lane_sum(n, [x](int i) { return x[i]; });
}

}  // namespace prism
