// CUDA kernel for group advantages: one warp per group id, one launch (three with normalize = batch), no atomics.
//
// Group ids come in any order and their number is known on the device only, so warp g looks for the rows of group g itself:
// a scan of all ids, 32 at a time, that keeps the row numbers in shared memory. For the batches of RL (up to some thousand
// rows) this costs a few microseconds and saves the sort, its workspace and its launches.
#include <cuda_runtime.h>

#include "group_advantage.h"

namespace prism {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kListed = 512;  // rows of a group that fit the list; a larger group scans the ids on every walk
constexpr int kBatchThreads = 1024;

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
            const unsigned found = __ballot_sync(0xffffffffu, mine);
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
    template <class F>
    __device__ double sum(F f) const {
        double total = 0.0;
        each([&](int64_t row) { total += f(row); });
        for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        return total;
    }
    template <class F>
    __device__ double lowest(F f) const {
        double low = INFINITY;
        each([&](int64_t row) { low = lower(f(row), low); });
        for (int step = kWarp / 2; step > 0; step /= 2) low = lower(__shfl_xor_sync(0xffffffffu, low, step), low);
        return low;
    }
};

// All threads of one block over all rows.
struct BlockTeam {
    int64_t rows;
    double* partial;  // [kBatchThreads / kWarp]

    template <class F>
    __device__ double sum(F f) const {
        double total = 0.0;
        for (int64_t row = threadIdx.x; row < rows; row += kBatchThreads) total += f(row);
        for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        __syncthreads();  // the previous sum has been read by everyone
        if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = total;
        __syncthreads();
        total = partial[threadIdx.x % kWarp];
        for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        return total;
    }
};
static_assert(kBatchThreads == kWarp * kWarp, "the second step of BlockTeam::sum is one warp wide");

template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) group_kernel(const AdvantageArguments<T> a, bool gather, bool finish) {
    __shared__ int lists[kWarpsPerBlock][kListed];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
    if (group >= a.rows) return;
    if (lane == 0 && finish) mark_unknown(a, group);  // as many warps as rows: each also looks after the row of its number
    const WarpTeam team(a.group, a.rows, group, lane, lists[warp]);
    if (team.count == 0) return;
    if (gather) gather_values(team, a);
    if (finish) finish_group(team, a);
}

template <class T>
__global__ void __launch_bounds__(kBatchThreads) batch_kernel(const AdvantageArguments<T> a) {
    __shared__ double partial[kBatchThreads / kWarp];
    const BlockTeam team{a.rows, partial};
    for (int term = 0; term < a.terms(); ++term) {
        const double scale = scale_of_batch(team, a, term);
        if (threadIdx.x == 0) a.batch_scale(term) = scale;
    }
}

}  // namespace

template <class T>
int group_advantage_cuda(const AdvantageArguments<T>& a, void* stream_pointer) {
    auto stream = static_cast<cudaStream_t>(stream_pointer);
    if (a.rows == 0) return cudaSuccess;
    const auto blocks = static_cast<unsigned>((a.rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    const bool batch = a.options.normalize == Normalize::batch;
    group_kernel<T><<<blocks, kWarp * kWarpsPerBlock, 0, stream>>>(a, true, !batch);
    if (batch) {
        batch_kernel<T><<<1, kBatchThreads, 0, stream>>>(a);
        group_kernel<T><<<blocks, kWarp * kWarpsPerBlock, 0, stream>>>(a, false, true);
    }
    return cudaGetLastError();
}

template int group_advantage_cuda<float>(const AdvantageArguments<float>&, void*);
template int group_advantage_cuda<double>(const AdvantageArguments<double>&, void*);

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace prism
