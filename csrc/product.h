// Matrix products whose bits do not depend on the number of threads. PyTorch's product divides a result among all threads; the
// size of a share decides the library's kernel, and the kernel the last bits. Here one thread computes each block of a fixed
// size, with the same library.
#pragma once

#include <cstdint>

namespace prism {

// c = a b: rows x depth times depth x columns. An operand is stored by rows, or by columns if `turned`; `a_line` and `b_line` are
// the distances between these rows or columns, in elements. The rows of c are dense.
template <class T>
struct ProductArguments {
    const T* a;
    bool a_turned;
    int64_t a_line;
    const T* b;
    bool b_turned;
    int64_t b_line;
    T* c;
    int64_t c_line;
    int64_t rows, columns, depth;
};

// Makes `product` use the gemm of the shared library at `path`, which is already loaded. Returns whether it has one that can be
// restricted to its caller's thread.
bool use_products_of(const char* path);

// On at most `threads` threads. Needs `use_products_of`.
template <class T>
void product(const ProductArguments<T>& a, int threads);

}  // namespace prism
