// Scalar functions that are the same on host and device. A compiler can vectorise loops over them, because they have no calls
// and no branches, only selections. NaN arguments give NaN.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PRISM_HD __host__ __device__
#else
#define PRISM_HD
#endif

// Loops that gain from newer instructions are compiled twice; the loader picks one version. Only gcc with glibc does this
// reliably. Both give the same results: the build forbids contraction, and the code fixes every order.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && defined(__x86_64__) && defined(__gnu_linux__)
#define PRISM_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#define PRISM_INLINE inline __attribute__((always_inline))
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define PRISM_CLONES
#define PRISM_INLINE inline __attribute__((always_inline))
#else
#define PRISM_CLONES
#define PRISM_INLINE inline
#endif

namespace prism {

template <class T>
struct ExpLimits;
// Arguments below `low` give exactly 0 (the result would not be a normal number). On the host, arguments above `high` give
// e^high, which is within a factor of 2.2 of the largest number.
template <>
struct ExpLimits<float> {
    static constexpr float low = -87.25f, high = 88.25f, lowest = -FLT_MAX;
};
template <>
struct ExpLimits<double> {
    static constexpr double low = -708.25, high = 709.0, lowest = -DBL_MAX;
};

template <class To, class From>
PRISM_HD PRISM_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// 1 or 0 by a mask of bits. Compilers vectorise loops over this, but turn selections between constants into jumps.
template <class T>
PRISM_HD PRISM_INLINE T flag(bool yes) {
    if constexpr (sizeof(T) == sizeof(int32_t)) {
        return bits_as<T>(-static_cast<int32_t>(yes) & bits_as<int32_t>(T(1)));
    } else {
        return bits_as<T>(-static_cast<int64_t>(yes) & bits_as<int64_t>(T(1)));
    }
}

// Minimum, NaN if either is NaN.
PRISM_HD inline double lower(double a, double b) { return a < b || a != a ? a : b; }

// e^x on the host, ExpLimits low <= x <= high: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor series of e^r to rounding
// error, times 2^n. Adding 1.5 * 2^23 (2^52) rounds to the nearest integer and leaves it in the lowest bits.
PRISM_HD PRISM_INLINE float host_exp(float x) {
    const float magic = 12582912.0f;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; the first product is exact
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r * r + r;
    const int32_t power = bits_as<int32_t>(shifted) << 23;
    return (p + 1.0f) * bits_as<float>(power + (127 << 23));
}

PRISM_HD PRISM_INLINE double host_exp(double x) {
    const double magic = 6755399441055744.0;
    const double shifted = x * 1.4426950408889634 + magic;
    const double n = shifted - magic;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r;
    const uint64_t power = bits_as<uint64_t>(shifted) << 52;
    return (p + 1.0) * bits_as<double>(power + (uint64_t{1023} << 52));
}

// e^x for arguments that a clamp keeps within ExpLimits; the CUDA library's function on a GPU.
template <class T>
PRISM_HD PRISM_INLINE T exponential_within(T x) {
#ifdef __CUDA_ARCH__
    return exp(x);
#else
    return host_exp(x);
#endif
}

// e^x for any argument.
template <class T>
PRISM_HD PRISM_INLINE T exponential(T x) {
    const T low = ExpLimits<T>::low;
#ifdef __CUDA_ARCH__
    return x < low ? T(0) : exp(x);
#else
    const T high = ExpLimits<T>::high, held = x < low ? low : x > high ? high : x, result = host_exp(held);
    return x < low ? T(0) : result;
#endif
}

}  // namespace prism
