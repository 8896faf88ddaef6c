// CUDA kernel for group advantages: one warp per group id, one launch (three with normalize = batch), no atomics.
//
// Group ids come in any order, and only the device knows how many there are. So warp g finds the rows of group g by a scan of
// all ids, 32 at a time, and keeps the row numbers in shared memory. For the batches of RL (up to some thousand rows) this takes
// a few microseconds and saves the sort, its workspace and its launches.
#include "group_advantage.h"
#include "launch.cuh"
#include "teams.cuh"

namespace prism {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kBatchThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) group_kernel(const AdvantageArguments<T> a, bool gather, bool finish) {
    __shared__ int lists[kWarpsPerBlock][kListed];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
    if (group >= a.rows) return;
    if (lane == 0 && finish) mark_unknown(a, group);  // one warp per row too: each also checks the row of its number
    const WarpTeam team(a.group, a.rows, group, lane, lists[warp]);
    if (team.count == 0) return;
    if (gather) gather_values(team, a);
    if (finish) finish_group(team, a);
}

template <class T>
__global__ void __launch_bounds__(kBatchThreads) batch_kernel(const AdvantageArguments<T> a) {
    __shared__ double shared[kBatchThreads / kWarp];
    const BlockTeam team{a.rows, shared};
    for (int term = 0; term < a.terms(); ++term) {
        const double scale = scale_of_batch(team, a, term);
        if (threadIdx.x == 0) a.batch_scale(term) = scale;
    }
}

}  // namespace

template <class T>
int group_advantage_cuda(const AdvantageArguments<T>& a, void* stream) {
    if (a.rows == 0) return cudaSuccess;
    const auto blocks = static_cast<unsigned>((a.rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    constexpr unsigned threads = kWarp * kWarpsPerBlock;
    if (a.options.normalize != Normalize::batch) return launch(group_kernel<T>, blocks, threads, stream, a, true, true);
    int error = launch(group_kernel<T>, blocks, threads, stream, a, true, false);
    if (error == cudaSuccess) error = launch(batch_kernel<T>, 1, kBatchThreads, stream, a);
    if (error == cudaSuccess) error = launch(group_kernel<T>, blocks, threads, stream, a, false, true);
    return error;
}

template int group_advantage_cuda<float>(const AdvantageArguments<float>&, void*);
template int group_advantage_cuda<double>(const AdvantageArguments<double>&, void*);

}  // namespace prism
