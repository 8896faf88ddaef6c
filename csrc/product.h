// Matrix products whose bits do not depend on the number of threads. PyTorch's product shares a result among all threads, takes
// its kernels by the shares, and with them the last bits; here a result is cut into blocks of a fixed size, each computed by one
// thread, with the same library.
#pragma once

#include <cstdint>

namespace prism {

// c = a b: rows x depth times depth x columns. An operand lies row by row, or column by column where it is `turned`; `a_line` and
// `b_line` are the distances between its lines. The rows of c are dense.
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

// Makes `product` use the gemm of the shared library at `path`, loaded already. Whether it has one that can be told to compute on
// its caller's thread alone.
bool use_products_of(const char* path);

// On at most `threads` threads. Needs `use_products_of`.
template <class T>
void product(const ProductArguments<T>& a, int threads);

}  // namespace prism
