#include "product.h"

#include <algorithm>

#include "parallel.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace prism {
namespace {

constexpr int64_t kBlockRows = 256, kBlockColumns = 512;

// gemm of BLAS, on matrices stored by columns.
template <class T>
using Gemm = void (*)(const char* turn_a, const char* turn_b, const int* m, const int* n, const int* k, const T* alpha, const T* a,
                      const int* lda, const T* b, const int* ldb, const T* beta, T* c, const int* ldc);

template <class T>
Gemm<T>& gemm() {
    static Gemm<T> call = nullptr;
    return call;
}

// Sets how many threads the library may use for calls from this thread; returns the previous number, 0 if none was set.
using SetThreads = int (*)(int);
SetThreads set_threads = nullptr;

struct OneThread {
    int before = set_threads(1);
    ~OneThread() { set_threads(before); }
};

template <class T>
void block(const ProductArguments<T>& a, int64_t row, int64_t column) {
    const int rows = static_cast<int>(std::min(kBlockRows, a.rows - row));
    const int columns = static_cast<int>(std::min(kBlockColumns, a.columns - column)), depth = static_cast<int>(a.depth);
    const int a_line = static_cast<int>(a.a_line), b_line = static_cast<int>(a.b_line), c_line = static_cast<int>(a.c_line);
    const T one = T(1), zero = T(0);
    // Read by columns, the memory of c holds its transpose: the transpose of b times the transpose of a.
    gemm<T>()(
        a.b_turned ? "T" : "N", a.a_turned ? "T" : "N", &columns, &rows, &depth, &one,
        a.b + column * (a.b_turned ? a.b_line : 1), &b_line, a.a + row * (a.a_turned ? 1 : a.a_line), &a_line, &zero,
        a.c + row * a.c_line + column, &c_line
    );
}

}  // namespace

bool use_products_of([[maybe_unused]] const char* path) {
#ifdef __linux__
    if (void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
        gemm<float>() = reinterpret_cast<Gemm<float>>(dlsym(library, "sgemm_"));
        gemm<double>() = reinterpret_cast<Gemm<double>>(dlsym(library, "dgemm_"));
        set_threads = reinterpret_cast<SetThreads>(dlsym(library, "MKL_Set_Num_Threads_Local"));
        dlclose(library);
    }
#endif
    return gemm<float>() != nullptr && gemm<double>() != nullptr && set_threads != nullptr;
}

template <class T>
void product(const ProductArguments<T>& a, int threads) {
    const int64_t down = (a.rows + kBlockRows - 1) / kBlockRows, across = (a.columns + kBlockColumns - 1) / kBlockColumns;
    parallel_for(down * across, a.rows * a.columns * a.depth / 8, threads, [&](int64_t begin, int64_t end) {
        const OneThread only;
        for (int64_t at = begin; at < end; ++at) block(a, at / across * kBlockRows, at % across * kBlockColumns);
    });
}

template void product(const ProductArguments<float>&, int);
template void product(const ProductArguments<double>&, int);

}  // namespace prism
