// Numbers on the host or on the device.
#pragma once

#include "numeric.h"

namespace prism {

// A number on the host, or a 0-d tensor on the device.
enum class ScalarKind : int { host, float32, float64, int32, int64 };
struct Scalar {
    const void* address;
    ScalarKind kind;
    double number;

    PRISM_HD double load() const {
        switch (kind) {
            case ScalarKind::float32: return *static_cast<const float*>(address);
            case ScalarKind::float64: return *static_cast<const double*>(address);
            case ScalarKind::int32: return *static_cast<const int32_t*>(address);
            case ScalarKind::int64: return static_cast<double>(*static_cast<const int64_t*>(address));
            default: return number;
        }
    }
};

}  // namespace prism
