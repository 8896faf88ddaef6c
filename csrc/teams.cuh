// Teams of threads that walk over rows, as defined in group_advantage.h.
#pragma once

#include "block.cuh"

namespace prism {

constexpr int kListed = 512;  // rows of a group that fit the list; a larger group scans the ids on every walk

// A warp over the rows of one group, which may be anywhere in the batch.
struct WarpTeam {
    const int64_t* ids;
    int64_t rows, group;
    int lane;
    int* list;
    int64_t count;

    __device__ WarpTeam(const int64_t* ids, int64_t rows, int64_t group, int lane, int* list)
        : ids(ids), rows(rows), group(group), lane(lane), list(list), count(0) {
#pragma unroll 4
        for (int64_t base = 0; base < rows; base += kWarp) {
            const bool mine = base + lane < rows && ids[base + lane] == group;
            const unsigned found = __ballot_sync(kAllLanes, mine);
            const int64_t at = count + __popc(found & ((1u << lane) - 1));
            if (mine && at < kListed) list[at] = static_cast<int>(base + lane);
            count += __popc(found);
        }
        __syncwarp();
    }
    template <class F>
    __device__ void each(F f) const {
        if (count <= kListed) {
            for (int64_t i = lane; i < count; i += kWarp) f(static_cast<int64_t>(list[i]));
        } else {
            for (int64_t row = lane; row < rows; row += kWarp) {
                if (ids[row] == group) f(row);
            }
        }
    }
    // Every member visits every row.
    template <class F>
    __device__ void scan(F f) const {
        if (count <= kListed) {
            for (int64_t i = 0; i < count; ++i) f(static_cast<int64_t>(list[i]));
        } else {
            for (int64_t row = 0; row < rows; ++row) {
                if (ids[row] == group) f(row);
            }
        }
    }
    template <class F>
    __device__ double sum(F f) const {
        double total = 0.0;
        each([&](int64_t row) { total += f(row); });
        return warp_all(total, Add());
    }
    template <class F>
    __device__ double lowest(F f) const {
        double low = INFINITY;
        each([&](int64_t row) { low = lower(f(row), low); });
        return warp_all(low, Lower());
    }
};

// All threads of one block over all rows. `shared` holds one double per warp.
struct BlockTeam {
    int64_t rows;
    double* shared;

    template <class F>
    __device__ void each(F f) const {
        for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) f(row);
    }
    template <class F>
    __device__ double sum(F f) const {
        double total = 0.0;
        each([&](int64_t row) { total += f(row); });
        return block_all(total, 0.0, shared, Add());
    }
};

}  // namespace prism
