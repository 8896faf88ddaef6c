// A processor for tests: runs the blocks of a CUDA kernel on the CPU, every thread of a block with a stack of its own.
//
// The threads are fibers, and after each meeting chance says who goes on (PRISM_CARD_SEED): whoever relies on an order that no
// barrier gives is found out, and a meeting that somebody misses ends the process instead of hanging. With
// PRISM_CARD_THREADS=1 they are threads of the operating system: slow, but ThreadSanitizer sees what no order tried shows.
//
// As on a card: blocks of a cooperative launch live all at once, other blocks come in any order, a few at a time; memory that
// a block shares starts poisoned; lanes that exchange values are not thereby ordered in memory, which __syncwarp,
// __syncthreads and the barrier of the grid do. Stricter than a card: a thread that has returned does not count as having come
// to a barrier. Arithmetic is the host's: the last bits of exp and its like differ from a card's, products and sums are not
// fused, 16-bit types are converted by the code of the host.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace processor {

constexpr unsigned kLanes = 32;
constexpr unsigned kMultiprocessors = 2, kBlocksPerMultiprocessor = 2;  // so many blocks live at once
constexpr int kSharedArrays = 8, kSharedBytes = 32 << 10;               // of a block; bytes of each array

struct Fiber;

// Where `expected` threads wait for one another.
class Meeting {
public:
    // With `ordered`, what each has written before is what all see afterwards.
    Meeting(unsigned expected, bool ordered) : expected_(expected), ordered_(ordered) {}
    // Returns the sum of what they bring.
    uint64_t meet(uint64_t share = 0);
    // Of the meeting to come, for those who will take part.
    unsigned parity() const { return turn_.load(std::memory_order_relaxed) & 1u; }

private:
    void let_go(uint32_t turn);
    void wait(uint32_t turn);

    const unsigned expected_;
    const bool ordered_;
    std::atomic<unsigned> arrived_{0};
    std::atomic<uint64_t> sum_{0}, result_[2]{};
    std::atomic<uint32_t> turn_{0};
    std::vector<Fiber*> waiting_;
};

// What a lane brings to an exchange, and to which operation.
struct Slot {
    std::atomic<uint64_t> value{0};
    std::atomic<int> operation{0};
};

struct Warp {
    Meeting exchange{kLanes, false}, barrier{kLanes, true};
    Slot slots[2][kLanes];  // in turns: a slow lane may still read the last exchange
};

struct Grid {
    unsigned blocks, threads;  // threads of one block
    bool cooperative;
    Meeting barrier;
};

struct Block {
    Grid& grid;
    unsigned index;
    Meeting barrier;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;

    Block(Grid& grid, unsigned index);
};

struct Thread {
    Block* block;
    unsigned index;

    Warp& warp() const { return block->warps[index / kLanes]; }
    unsigned lane() const { return index % kLanes; }
};

// The thread that calls this.
Thread& self();

// Ends the process: what the kernel does has no meaning on a card.
[[noreturn]] void refuse(const char* what);

// What the lanes of the caller's warp bring; all of them call this, with the same operation.
const Slot* exchange(unsigned lanes, int operation, uint64_t value);

// Runs body() on every thread of every block. False: more blocks than can live at once.
bool run(unsigned blocks, unsigned threads, bool cooperative, const std::function<void()>& body);

// The array that declaration `number` of a source file makes for each block.
template <class Array, int number>
Array& shared() {
    static_assert(number < kSharedArrays && sizeof(Array) <= kSharedBytes, "more shared memory than a block has here");
    return *reinterpret_cast<Array*>(self().block->shared.data() + number * kSharedBytes);
}

}  // namespace processor
