// Splits independent work over threads. Results never depend on the number of threads: one thread computes each index.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace prism {

// GOMP_parallel of an OpenMP library: f(data) on each of a team of `threads`, the caller among them.
using TeamCall = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

// GOMP_parallel of the OpenMP library that PyTorch uses, or null. That library's threads wait between two products by spinning:
// threads of our own would have to be started, and would compete with them for the processors.
inline TeamCall& team_call() {
    static TeamCall call = nullptr;
    return call;
}

// Runs f() on `threads` threads, the caller among them.
template <class F>
void on_team(int threads, F f) {
    // Always as many as PyTorch uses: OpenMP ends the threads that a smaller team leaves out, and has to start them again.
    if (TeamCall call = team_call()) {
        call([](void* data) { (*static_cast<F*>(data))(); }, &f, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> pool;
    pool.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) pool.emplace_back([&f] { f(); });
    f();
    for (auto& thread : pool) thread.join();
}

// Calls f(begin, end) on disjoint ranges that cover [0, n), from at most `threads` threads. `work` is a rough count of
// elementary operations of all calls together: small work stays on the caller's thread. Rethrows an exception of f.
template <class F>
void parallel_for(int64_t n, int64_t work, int threads, F f) {
    constexpr int64_t work_per_thread = 1 << 15;
    if (std::min<int64_t>({threads, n, work / work_per_thread}) <= 1) {
        if (n > 0) f(int64_t{0}, n);
        return;
    }
    // A thread that is free takes the next part, so that slow threads delay no other.
    const int64_t parts = std::min<int64_t>({n, int64_t{4} * threads, work / (work_per_thread / 4)});
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    on_team(threads, [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
            try {
                f(n * i / parts, n * (i + 1) / parts);
            } catch (...) {
                std::lock_guard<std::mutex> lock(guard);
                if (!failure) failure = std::current_exception();
            }
        }
    });
    if (failure) std::rethrow_exception(failure);
}

}  // namespace prism
