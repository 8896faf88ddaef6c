// Splits independent work over threads. Results never depend on the number of threads: each index is one thread's alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace prism {

// Calls f(begin, end) on disjoint ranges that cover [0, n). `work` is a rough count of elementary operations in all of it;
// a thread costs about 20 µs to start, so small work stays on the caller's thread. An exception in f is thrown again here.
template <class F>
void parallel_for(int64_t n, int64_t work, int threads, F f) {
    constexpr int64_t work_per_thread = 1 << 15;
    const int64_t wanted = std::min<int64_t>({threads, n, work / work_per_thread});
    if (wanted <= 1) {
        if (n > 0) f(int64_t{0}, n);
        return;
    }
    std::exception_ptr failure;
    std::mutex guard;
    auto part = [&](int64_t i) {
        try {
            f(n * i / wanted, n * (i + 1) / wanted);
        } catch (...) {
            std::lock_guard<std::mutex> lock(guard);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> pool;
    pool.reserve(wanted - 1);
    for (int64_t i = 1; i < wanted; ++i) pool.emplace_back(part, i);
    part(0);
    for (auto& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace prism
