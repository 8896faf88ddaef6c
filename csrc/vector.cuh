// 16-byte accesses to arrays whose base may or may not be aligned.
#pragma once

#include <cstdint>

namespace prism {

template <class T>
constexpr int kWide = 16 / sizeof(T);  // elements of one access

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
struct alignas(16) Wide {
    T at[kWide<T>];
};

// Elements [first, first + kWide) of x. With `whole`, in one access: x is aligned and all of them lie in [begin, end).
// Otherwise one by one, and those outside [begin, end) become `other`.
template <class T>
__device__ __forceinline__ Wide<T> load_wide(const T* x, int64_t first, int64_t begin, int64_t end, bool whole, T other) {
    if (whole) return *reinterpret_cast<const Wide<T>*>(x + first);
    Wide<T> value;
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
        const int64_t at = first + i;
        value.at[i] = at >= begin && at < end ? x[at] : other;
    }
    return value;
}

template <class T>
__device__ __forceinline__ void store_wide(T* x, int64_t first, int64_t begin, int64_t end, bool whole, const Wide<T>& value) {
    if (whole) {
        *reinterpret_cast<Wide<T>*>(x + first) = value;
        return;
    }
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
        const int64_t at = first + i;
        if (at >= begin && at < end) x[at] = value.at[i];
    }
}

}  // namespace prism
