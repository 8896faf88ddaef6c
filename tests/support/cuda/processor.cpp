#include "processor.h"

#include <linux/futex.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <numeric>
#include <thread>

// ThreadSanitizer takes what passes through an atomic for an order in memory, unless it is told to look away.
#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char*, int);
extern "C" void AnnotateIgnoreSyncEnd(const char*, int);
#else
static void AnnotateIgnoreSyncBegin(const char*, int) {}
static void AnnotateIgnoreSyncEnd(const char*, int) {}
#endif

namespace processor {

// A stack that threads of kernels run on, one after another. It never ends and stays for later launches.
struct Fiber {
    jmp_buf at;
    ucontext_t start{};
    bool started = false;
    Thread* thread = nullptr;  // null: its thread has returned
};

namespace {

constexpr size_t kStack = 128 << 10;
constexpr time_t kPatience = 60;  // seconds

const char* setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value == nullptr ? otherwise : value;
}

const bool real_threads = setting("PRISM_CARD_THREADS", "0")[0] == '1';

// A number below n: xorshift, the same in every process with the same seed.
size_t chance(size_t n) {
    static uint64_t state = (std::strtoull(setting("PRISM_CARD_SEED", "1"), nullptr, 10) + 1) * 0x9e3779b97f4a7c15u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 32) * n >> 32;
}

thread_local Thread* current = nullptr;

const std::function<void()>* work = nullptr;
std::deque<Fiber> fibers;
std::vector<Fiber*> ready;
Fiber* running = nullptr;
jmp_buf scheduler;

// Gives way to whoever is ready, until resumed.
void give_way() {
    if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

void live() {
    for (;;) {
        (*work)();
        running->thread = nullptr;
        give_way();
    }
}

void resume(Fiber& fiber) {
    running = &fiber;
    current = fiber.thread;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

Fiber& fiber_at(size_t i) {
    if (i < fibers.size()) return fibers[i];
    Fiber& fiber = fibers.emplace_back();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) refuse("no memory for another stack");
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, live, 0);
    return fiber;
}

void run_fibers(std::vector<Thread>& threads) {
    for (size_t i = 0; i < threads.size(); ++i) {
        Fiber& fiber = fiber_at(i);
        fiber.thread = &threads[i];
        ready.push_back(&fiber);
    }
    size_t left = threads.size();
    while (!ready.empty()) {
        std::swap(ready[chance(ready.size())], ready.back());
        Fiber& next = *ready.back();
        ready.pop_back();
        resume(next);
        left -= next.thread == nullptr;
    }
    if (left != 0) refuse("threads of a block wait for others that never come");
}

void run_threads(std::vector<Thread>& threads) {
    std::vector<std::thread> pool;
    for (Thread& thread : threads) {
        pool.emplace_back([&thread] {
            current = &thread;
            (*work)();
        });
    }
    for (std::thread& thread : pool) thread.join();
}

}  // namespace

Thread& self() { return *current; }

void refuse(const char* what) {
    std::fprintf(stderr, "processor of the tests: %s\n", what);
    std::abort();
}

uint64_t Meeting::meet(uint64_t share) {
    if (!ordered_) AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    const uint32_t turn = turn_.load();
    sum_.fetch_add(share);
    if (arrived_.fetch_add(1) + 1 == expected_) {
        result_[turn & 1] = sum_.exchange(0);
        arrived_ = 0;
        let_go(turn);
    }
    wait(turn);
    const uint64_t result = result_[turn & 1];
    if (!ordered_) AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    return result;
}

void Meeting::let_go(uint32_t turn) {
    turn_ = turn + 1;
    if (real_threads) {
        syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    } else {
        ready.insert(ready.end(), waiting_.begin(), waiting_.end());
        waiting_.clear();
    }
}

void Meeting::wait(uint32_t turn) {
    if (!real_threads) {
        (turn_ == turn ? waiting_ : ready).push_back(running);
        return give_way();
    }
    const timespec patience{kPatience, 0};
    while (turn_ == turn) {
        if (syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, &patience, nullptr, 0) != 0 && errno == ETIMEDOUT) {
            refuse("threads of a block wait for others that never come");
        }
    }
}

Block::Block(Grid& grid, unsigned index)
    : grid(grid), index(index), barrier(grid.threads, true), warps(grid.threads / kLanes),
      shared(kSharedArrays * kSharedBytes, chance(2) == 0 ? 0xff : 0x7e) {}  // NaN, -1; or large numbers

const Slot* exchange(unsigned lanes, int operation, uint64_t value) {
    if (lanes != 0xffffffffu) refuse("an exchange between some lanes of a warp only");
    Warp& warp = self().warp();
    const unsigned lane = self().lane();
    Slot* slots = warp.slots[warp.exchange.parity()];
    slots[lane].value.store(value, std::memory_order_relaxed);
    slots[lane].operation.store(operation, std::memory_order_relaxed);
    warp.exchange.meet();
    if (slots[(lane + 1) % kLanes].operation.load(std::memory_order_relaxed) != operation) {
        refuse("lanes of a warp meet in different operations");
    }
    return slots;
}

bool run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& body) {
    constexpr unsigned room = kMultiprocessors * kBlocksPerMultiprocessor;
    if (threads == 0 || threads % kLanes != 0) refuse("a block that is not made of whole warps");
    if (cooperative && blocks > room) return false;
    work = &body;
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[chance(i)]);
    Grid grid{blocks, threads, cooperative, Meeting(blocks * threads, true)};
    for (unsigned first = 0; first < blocks; first += room) {
        std::deque<Block> alive;
        std::vector<Thread> all;
        for (unsigned i = first; i < std::min(first + room, blocks); ++i) {
            alive.emplace_back(grid, order[i]);
            for (unsigned thread = 0; thread < threads; ++thread) all.push_back({&alive.back(), thread});
        }
        real_threads ? run_threads(all) : run_fibers(all);
    }
    return true;
}

}  // namespace processor
