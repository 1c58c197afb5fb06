// Vectors of this processor in float32, activations (spec §1 and §3), and the types of tensors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int VECTORS = 3;  // registers hold ROWS × VECTORS sums, VECTORS weights and one input

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const UnalignedFloats*>(at); }
inline void store(float* at, Floats value) { *reinterpret_cast<UnalignedFloats*>(at) = value; }
inline Floats all(float value) { return value - Floats{}; }

// ---------------------------------------------------------------------------------------------------------- functions

constexpr float LOG2_E = 1.44269504f;
// (2^v − 1)/v for v from −½ to ½: the polynomial of degree 4 through its values at Chebyshev's nodes.
constexpr float POWER[] = {0.693147181f, 0.240223490f, 0.0555038101f, 0.00966636852f, 0.00133813025f};

// x, but at least `low` or at most `high`; NaN stays NaN.
inline Floats at_least(Floats x, float low) { return low > x ? all(low) : x; }
inline Floats at_most(Floats x, float high) { return high < x ? all(high) : x; }

// 2^(factor · x) for |factor · x| up to 126, with a relative error up to 3e-7: the integer part through the exponent's
// bits, the rest by a polynomial.
inline Floats power_of_two(Floats x, float factor) {
    const Floats ROUNDING = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    const Floats shifted = x * factor + ROUNDING;
    const Floats rest = x * factor - (shifted - ROUNDING);
    Floats y = all(POWER[4]);
    for (int i = 3; i >= 0; --i) y = y * rest + POWER[i];
    y = y * rest + 1.0f;
    return (Floats)((Bits)y + ((Bits)shifted << 23));
}

inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// -------------------------------------------------------------------------------------------------------- activations

struct Swish {
    static Floats of(Floats x) {
        const Floats low = at_least(x, -87.0f);
        return low * reciprocal(1.0f + power_of_two(at_most(low, 87.0f), -LOG2_E));
    }
};

struct Elu {
    static Floats of(Floats x) { return x < 0.0f ? power_of_two(at_least(x, -87.0f), LOG2_E) - 1.0f : x; }
};

// (e^v − 1)/v for v from −1 to 0, through its values at Chebyshev's nodes: of degree 6, to 1e-8.
constexpr float QUOTIENT[] = {
    0.999999998f, 0.499999797f, 0.166663403f, 0.0416468493f, 0.00827550484f, 0.00130077496f, 0.000129076311f};

struct EluTwice {
    static Floats of(Floats x) {
        const Floats once = power_of_two(at_least(at_most(x, 0.0f), -87.0f), LOG2_E) - 1.0f;
        Floats y = all(QUOTIENT[6]);
        for (int i = 5; i >= 0; --i) y = y * once + QUOTIENT[i];
        return x < 0.0f ? y * once : x;
    }
};

// --------------------------------------------------------------------------------------------------- types of tensors

struct BFloat16 {
    uint16_t bits;
};

inline float widened(float value) { return value; }
inline float widened(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void assign(float& to, float value) { to = value; }
inline void assign(BFloat16& to, float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
