// CUDA kernels of expert routing: one cooperative launch forward, one launch backward, no atomics.
//
// Lanes of a warp form groups that own a row each; a lane holds up to kHeld logits of its row. Assignments are counted and
// placed by ballots: the rows of a warp that chose an expert, in their order.
#include <cooperative_groups.h>

#include "block.cuh"
#include "launch.cuh"
#include "route_experts.h"

namespace prism {
namespace {

constexpr int kThreads = kChunk;  // a thread per row where rows are counted and placed
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = kMaxExperts / kWarp;
constexpr int kBlocksPerMultiprocessor = 2;

int lanes_per_row(int experts) {
    int lanes = 1;
    while (lanes * kHeld < experts) lanes *= 2;
    return lanes;
}

// Combines over the lanes of a group and gives the result to all of them; every lane of the warp calls this.
template <class T, class Op>
__device__ __forceinline__ T group_all(T value, int lanes, Op op) {
    for (int step = lanes / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
}

// One row, spread over a group: slot i of a lane is expert lane + lanes * i.
template <class T>
struct SpreadRow {
    int lane, lanes, experts;
    T x[kHeld];
    T top, total;

    __device__ int expert(int i) const { return lane + lanes * i; }
    __device__ bool holds(int i) const { return expert(i) < experts; }
    __device__ T exponential_of(T value) const { return exponential(value - top); }

    template <class S>
    __device__ void load(const S* row, bool there) {
        top = -static_cast<T>(INFINITY);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            x[i] = holds(i) ? there ? widen(row[expert(i)]) : T(0) : -static_cast<T>(INFINITY);
            top = x[i] > top ? x[i] : top;
        }
        top = group_all(top, lanes, Larger());
        T sum = T(0);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) sum += holds(i) ? exponential_of(x[i]) : T(0);
        total = group_all(sum, lanes, Add());
    }

    // Largest logit that is not taken yet, the lower expert among equals; every lane learns it, its owner takes it.
    __device__ void next(unsigned& taken, bool bad, T& value, int& at) const {
        value = -static_cast<T>(INFINITY);
        at = kMaxExperts;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const T mine = bad ? T(0) : x[i];
            if (holds(i) && !(taken >> i & 1u) && (at == kMaxExperts || mine > value)) {
                value = mine;
                at = expert(i);
            }
        }
        for (int step = lanes / 2; step > 0; step /= 2) {
            const T other = __shfl_xor_sync(kAllLanes, value, step);
            const int there = __shfl_xor_sync(kAllLanes, at, step);
            const bool ahead = at == kMaxExperts || other > value || (other == value && there < at);
            if (there < kMaxExperts && ahead) {
                value = other;
                at = there;
            }
        }
        if (at % lanes == lane) taken |= 1u << (at / lanes);
    }
};

template <class T>
__device__ SpreadRow<T> my_share(int experts, int lanes) {
    SpreadRow<T> row;
    row.lane = static_cast<int>(threadIdx.x) % lanes;
    row.lanes = lanes;
    row.experts = experts;
    return row;
}

// Experts and weights of the rows of a chunk, and the chunk's sums for load and z_stat.
template <class S, class T>
__device__ void choose_chunk(const RouteArguments<S, T>& a, int64_t chunk, int lanes, double (*folded)[kMaxExperts + 1]) {
    const int experts = a.plan.experts, top_k = a.plan.top_k;
    const int groups = kThreads / lanes, group = threadIdx.x / lanes;
    double load[kHeld] = {}, z = 0.0;
    for (int64_t pass = 0; pass < lanes; ++pass) {
        const int64_t row = chunk * kChunk + pass * groups + group;
        const bool there = row < a.plan.rows;
        SpreadRow<T> spread = my_share<T>(experts, lanes);
        spread.load(a.logits + row * a.row_stride, there);
        const bool bad = spread.total != spread.total;
        const T inverse = T(1) / spread.total;
        if (there) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                if (spread.holds(i)) load[i] += static_cast<double>(spread.exponential_of(spread.x[i]) * inverse);
            }
            const double log_sum_exp = static_cast<double>(spread.top + log(spread.total));
            if (spread.lane == 0) z += log_sum_exp * log_sum_exp;
        }
        unsigned taken = 0;
        T weight[kMaxChosen];
        double sum = 0.0;  // as in the CPU twin
        int expert[kMaxChosen];
#pragma unroll
        for (int j = 0; j < kMaxChosen; ++j) {
            if (j >= top_k) break;
            T value;
            spread.next(taken, bad, value, expert[j]);
            weight[j] = bad ? static_cast<T>(NAN) : spread.exponential_of(value);
            sum += static_cast<double>(weight[j]);
        }
        if (!there || spread.lane != 0) continue;
        const T whole = a.renormalize ? static_cast<T>(sum) : spread.total;
#pragma unroll
        for (int j = 0; j < kMaxChosen; ++j) {
            if (j >= top_k) break;
            a.plan.chosen[row * top_k + j] = expert[j];
            a.weights[row * top_k + j] = weight[j] / whole;
        }
    }
    const int warp = threadIdx.x / kWarp;
    __syncthreads();  // all threads have read the sums of an earlier chunk; the chunk's choices are visible
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        double sum = load[i];
        for (int step = lanes; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        const int expert = static_cast<int>(threadIdx.x) % lanes + lanes * i;
        if (threadIdx.x % kWarp < lanes && expert < experts) folded[warp][expert] = sum;
    }
    z = warp_all(z, Add());
    if (threadIdx.x % kWarp == 0) folded[warp][experts] = z;
    __syncthreads();
    for (int e = threadIdx.x; e <= experts; e += kThreads) {
        double sum = 0.0;
        for (int w = 0; w < kWarps; ++w) sum += folded[w][e];
        a.sums[chunk * (experts + 1) + e] = sum;
    }
}

// The experts that the row of this thread chose.
struct Choice {
    int expert[kMaxChosen];

    __device__ Choice(const PlanArguments& a, int64_t row) {
#pragma unroll
        for (int j = 0; j < kMaxChosen; ++j) {
            expert[j] = j < a.top_k && row < a.rows ? static_cast<int>(a.chosen[row * a.top_k + j]) : -1;
        }
    }
    // How often it chose this one. Our router chooses an expert once per row; a plan of another may name one twice.
    __device__ int times(int e) const {
        int n = 0;
#pragma unroll
        for (int j = 0; j < kMaxChosen; ++j) n += expert[j] == e;
        return n;
    }
};

// Sum over the lanes before this one; `all` becomes the sum over the warp.
__device__ __forceinline__ int before(int value, int& all) {
    const int lane = threadIdx.x % kWarp;
    int sum = value;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
    }
    all = __shfl_sync(kAllLanes, sum, kWarp - 1);
    return sum - value;
}

// Assignments of each warp's rows per expert.
__device__ void count_chunk(const Choice& choice, int experts, int (*counted)[kMaxExperts]) {
    for (int e = 0; e < experts; ++e) {
        const int times = choice.times(e);
        int all = 0;
        // Almost always no row chose an expert twice, and counting ballots is enough.
        if (__any_sync(kAllLanes, times > 1)) {
            before(times, all);
        } else {
            all = __popc(__ballot_sync(kAllLanes, times > 0));
        }
        if (threadIdx.x % kWarp == 0) counted[threadIdx.x / kWarp][e] = all;
    }
    __syncthreads();
}

__device__ void store_counts(const PlanArguments& a, int64_t chunk, int (*counted)[kMaxExperts]) {
    const Choice choice(a, chunk * kChunk + threadIdx.x);
    __syncthreads();  // counts of an earlier chunk have been read
    count_chunk(choice, a.experts, counted);
    for (int e = threadIdx.x; e < a.experts; e += kThreads) {
        int sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += counted[w][e];
        a.count(chunk, e) = sum;
    }
}

// Turns each chunk's counts into first places within their expert; the totals follow the last chunk. A warp per expert.
__device__ void scan_counts(const PlanArguments& a, int expert) {
    const int64_t chunks = chunks_of(a.rows);
    const int lane = threadIdx.x % kWarp;
    int total = 0;
    for (int64_t first = 0; first < chunks; first += kWarp) {
        const int64_t chunk = first + lane;
        const int here = chunk < chunks ? a.count(chunk, expert) : 0;
        int all;
        const int place = before(here, all);
        if (chunk < chunks) a.count(chunk, expert) = total + place;
        total += all;
    }
    if (lane == 0) a.count(chunks, expert) = total;
}

// First place of each expert's assignments, in shared memory.
__device__ void start_of_experts(const PlanArguments& a, int* start, int* of_warp) {
    static_assert(kThreads >= kMaxExperts, "an expert per thread");
    const int e = threadIdx.x, warp = threadIdx.x / kWarp;
    int all;
    const int place = before(e < a.experts ? a.count(chunks_of(a.rows), e) : 0, all);
    if (threadIdx.x % kWarp == 0) of_warp[warp] = all;
    __syncthreads();
    int earlier = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
        earlier += w < warp ? of_warp[w] : 0;
        total += of_warp[w];
    }
    if (e < a.experts) start[e] = place + earlier;
    if (blockIdx.x == 0) {
        if (e < a.experts) a.offsets[e] = place + earlier;
        if (e == 0) a.offsets[a.experts] = total;
    }
    __syncthreads();
}

__device__ void place_chunk(const PlanArguments& a, int64_t chunk, const int* start, int (*counted)[kMaxExperts]) {
    const int64_t row = chunk * kChunk + threadIdx.x;
    const Choice choice(a, row);
    const int warp = threadIdx.x / kWarp;
    __syncthreads();
    count_chunk(choice, a.experts, counted);
    for (int e = 0; e < a.experts; ++e) {
        const int times = choice.times(e);
        if (!__any_sync(kAllLanes, times > 0)) continue;
        int all, place = before(times, all) + start[e] + a.count(chunk, e);
        for (int w = 0; w < warp; ++w) place += counted[w][e];
        if (times == 0) continue;
#pragma unroll
        for (int j = 0; j < kMaxChosen; ++j) {
            if (choice.expert[j] == e) a.place(place++, row, j);
        }
    }
}

// The steps after the counts of all chunks; `also` runs in a warp per item of [experts, items).
template <class Also>
__device__ void finish_plan(const PlanArguments& a, int (*counted)[kMaxExperts], int items, Also also) {
    __shared__ int start[kMaxExperts], of_warp[kWarps];
    cooperative_groups::this_grid().sync();
    const int warps = gridDim.x * kWarps;
    for (int item = blockIdx.x * kWarps + threadIdx.x / kWarp; item < items; item += warps) {
        if (item < a.experts) scan_counts(a, item);
        also(item);
    }
    cooperative_groups::this_grid().sync();
    start_of_experts(a, start, of_warp);
    const int64_t chunks = chunks_of(a.rows);
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) place_chunk(a, chunk, start, counted);
}

template <class S, class T>
struct RouteWork {
    RouteArguments<S, T> a;
    int lanes;
};

template <class S, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) route_kernel(const RouteWork<S, T> work) {
    __shared__ double folded[kWarps][kMaxExperts + 1];
    __shared__ int counted[kWarps][kMaxExperts];
    const RouteArguments<S, T>& a = work.a;
    const int64_t chunks = chunks_of(a.plan.rows);
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        choose_chunk(a, chunk, work.lanes, folded);
        store_counts(a.plan, chunk, counted);
    }
    const int experts = a.plan.experts;
    finish_plan(a.plan, counted, experts + 1, [&](int item) {
        double sum = 0.0;
        for (int64_t chunk = threadIdx.x % kWarp; chunk < chunks; chunk += kWarp) sum += a.sums[chunk * (experts + 1) + item];
        sum = warp_all(sum, Add());
        if (threadIdx.x % kWarp != 0) return;
        *(item < experts ? a.load + item : a.z_stat) = static_cast<T>(sum);
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) given_kernel(const GivenArguments<T> a) {
    __shared__ int counted[kWarps][kMaxExperts];
    const int64_t chunks = chunks_of(a.plan.rows);
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int64_t row = chunk * kChunk + threadIdx.x;
        for (int j = 0; row < a.plan.rows && j < a.plan.top_k; ++j) {
            const int64_t at = row * a.plan.top_k + j;
            const bool known = a.index[at] >= 0 && a.index[at] < a.plan.experts;
            a.plan.chosen[at] = known ? a.index[at] : 0;
            a.weights[at] = known ? a.given[at] : static_cast<T>(NAN);
        }
        store_counts(a.plan, chunk, counted);
    }
    finish_plan(a.plan, counted, a.plan.experts, [](int) {});
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RouteGradientArguments<S, T> a, int lanes) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
    const bool there = row < a.rows;
    SpreadRow<T> spread = my_share<T>(a.experts, lanes);
    T slope[kHeld] = {};
    const T mean = there ? a.mean_upstream(row) : T(0);
    T mean_load = T(0), z_slope = T(0);
    if (a.needs_softmax()) {
        spread.load(a.logits + row * a.row_stride, there);
        const T inverse = T(1) / spread.total;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (!spread.holds(i)) continue;
            slope[i] = spread.exponential_of(spread.x[i]) * inverse;
            mean_load += slope[i] * a.load_upstream(spread.expert(i));
        }
        mean_load = group_all(mean_load, lanes, Add());
        z_slope = a.z_grad == nullptr ? T(0) : T(2) * *a.z_grad * (spread.top + log(spread.total));
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (!spread.holds(i)) continue;
            slope[i] = a.through_softmax(slope[i], a.load_upstream(spread.expert(i)), mean_load, z_slope, mean);
        }
    } else if (there) {
        const T untouched = a.untouched(row);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) slope[i] = untouched;
    }
    if (!there) return;
    for (int j = 0; j < a.top_k; ++j) {
        const int expert = static_cast<int>(a.chosen[row * a.top_k + j]);
        // As in the CPU twin: without renormalisation the chosen expert's slope is computed anew.
        const T through = a.renormalize ? a.through_weight(row, j)
                                        : a.through_softmax(a.weights[row * a.top_k + j], a.load_upstream(expert), mean_load,
                                                            z_slope, mean - a.upstream(row, j));
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (expert == spread.expert(i)) slope[i] = a.renormalize ? slope[i] + through : through;
        }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (spread.holds(i)) narrow(slope[i], a.gradient[row * a.experts + spread.expert(i)]);
    }
}

unsigned blocks_for(int64_t rows) {
    const int64_t chunks = chunks_of(rows), room = static_cast<int64_t>(multiprocessors()) * kBlocksPerMultiprocessor;
    return static_cast<unsigned>(chunks < 1 ? 1 : chunks < room ? chunks : room);
}

}  // namespace

template <class S>
int route_experts_cuda(const RouteArguments<S>& a, void* stream) {
    using T = typename ComputedIn<S>::type;
    const RouteWork<S, T> work{a, lanes_per_row(a.plan.experts)};
    return launch_together(route_kernel<S, T>, blocks_for(a.plan.rows), kThreads, stream, work);
}

template <class T>
int plan_experts_cuda(const GivenArguments<T>& a, void* stream) {
    return launch_together(given_kernel<T>, blocks_for(a.plan.rows), kThreads, stream, a);
}

template <class S>
int route_experts_backward_cuda(const RouteGradientArguments<S>& a, void* stream) {
    using T = typename ComputedIn<S>::type;
    if (a.rows == 0) return cudaSuccess;
    const int lanes = lanes_per_row(a.experts);
    const auto blocks = static_cast<unsigned>((a.rows * lanes + kThreads - 1) / kThreads);
    return launch(backward_kernel<S, T>, blocks, kThreads, stream, a, lanes);
}

#define PRISM_FOR(S)                                             \
    template int route_experts_cuda(const RouteArguments<S>&, void*); \
    template int route_experts_backward_cuda(const RouteGradientArguments<S>&, void*);
PRISM_FOR(float)
PRISM_FOR(double)
PRISM_FOR(Bfloat16)
PRISM_FOR(Float16)
#undef PRISM_FOR
template int plan_experts_cuda(const GivenArguments<float>&, void*);
template int plan_experts_cuda(const GivenArguments<double>&, void*);

}  // namespace prism
