// Numbers of 16 bits in memory, converted without branches so that loops over them vectorise.
#pragma once

#include "numeric.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace prism {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// The type that values of S are computed in.
template <class S>
struct ComputedIn {
    using type = float;
};
template <>
struct ComputedIn<double> {
    using type = double;
};

PRISM_HD PRISM_INLINE float widen(float x) { return x; }
PRISM_HD PRISM_INLINE double widen(double x) { return x; }
PRISM_HD PRISM_INLINE float widen(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
PRISM_HD PRISM_INLINE float widen(Float16 x) {
#ifdef __CUDA_ARCH__
    return __half2float(bits_as<__half>(x.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    const uint32_t finite = bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f);  // moves the exponent; subnormals too
    const uint32_t endless = (rest << 13) | 0x7f800000u;  // infinity and NaN
    return bits_as<float>(sign | (rest >= 0x7c00u ? endless : finite));
#endif
}

// Round to nearest, ties to even.
PRISM_HD PRISM_INLINE void narrow(float x, float& to) { to = x; }
PRISM_HD PRISM_INLINE void narrow(double x, double& to) { to = x; }
PRISM_HD PRISM_INLINE void narrow(float x, Bfloat16& to) {
#ifdef __CUDA_ARCH__
    to.bits = bits_as<uint16_t>(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = 0x7fc0u | ((bits >> 16) & 0x8000u);
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
#endif
}
PRISM_HD PRISM_INLINE void narrow(float x, Float16& to) {
#ifdef __CUDA_ARCH__
    to.bits = bits_as<uint16_t>(__float2half_rn(x));
#else
    const uint32_t bits = bits_as<uint32_t>(x), sign = bits & 0x80000000u, size = bits ^ sign;
    const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14 the last bit of a half is the last bit of a float between 0.5 and 1: the addition rounds.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - bits_as<uint32_t>(0.5f);
    const uint32_t endless = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t half = size >= 0x47800000u ? endless : size < 0x38800000u ? small : normal;
    to.bits = static_cast<uint16_t>(half | (sign >> 16));
#endif
}

}  // namespace prism
