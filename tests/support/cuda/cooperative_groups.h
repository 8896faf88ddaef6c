// As far as csrc/ uses it; see cuda_runtime.h beside this file.
#pragma once

#include "processor.h"

namespace cooperative_groups {

struct GridGroup {
    void sync() const {
        processor::Grid& grid = processor::self().block->grid;
        if (!grid.cooperative) processor::refuse("a barrier of the grid in an ordinary launch");
        grid.barrier.meet();
    }
};

inline GridGroup this_grid() { return {}; }

}  // namespace cooperative_groups
