// CUDA kernel of the pairwise loss: one launch of one block. A batch has some hundred rows, so the launch takes most of the
// time. The block sums over all rows; one warp computes a group.
#include "launch.cuh"
#include "pairwise_loss.h"
#include "teams.cuh"

namespace prism {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads) pairwise_kernel(const PairwiseArguments<T> a) {
    __shared__ double shared[kWarps];
    __shared__ int lists[kWarps][kListed];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool first = threadIdx.x == 0;
    const BlockTeam rows{a.rows, shared}, teachers{a.groups, shared};
    const PairwiseScales scales = pairwise_scales(rows, a);
    double bradley_terry = 0.0, squares = 0.0, distances = 0.0;
    for (int column = 0; column < a.columns; ++column) {
        bradley_terry += pair_column(rows, teachers, a, scales, column, first, squares);
    }
    __syncthreads();  // the pairs' slopes and the students' gradients are written
    for (int64_t group = warp; group < a.groups; group += kWarps) {
        __syncwarp();  // the list of the group before has been read
        const WarpTeam team(a.group, a.rows, group, lane, lists[warp]);
        for (int column = 0; column < a.columns; ++column) {
            const double squared = group_column(team, a, scales, group, column, lane == 0);
            if (lane == 0) distances += squared;
        }
    }
    distances = block_all(distances, 0.0, shared, Add());
    if (first) *a.loss = static_cast<T>(total_loss(a, scales, bradley_terry, squares, distances));
}

}  // namespace

template <class T>
int pairwise_loss_cuda(const PairwiseArguments<T>& a, void* stream) {
    return launch(pairwise_kernel<T>, 1, kThreads, stream, a);
}

template int pairwise_loss_cuda<float>(const PairwiseArguments<float>&, void*);
template int pairwise_loss_cuda<double>(const PairwiseArguments<double>&, void*);

}  // namespace prism
