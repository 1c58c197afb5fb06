// Vectors of this processor: arithmetic in float32 and, where the processor has it (AVX512-FP16), in float16;
// activations, types of tensors, memory of a thread, and products of matrices in registers (spec §1 and §3).
//
// float16 stands in for bfloat16, whose products such a processor forms at half of float32's rate and float16's at twice
// that rate. It rounds eight times finer; at most DEPTH products are summed in it, then float32 sums go on. What is
// beyond its range becomes infinite or not a number: who calls looks for that, and computes again in float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
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
constexpr int VECTORS = 3;  // registers hold ROWS × VECTORS sums, VECTORS weights and one factor

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const UnalignedFloats*>(at); }
inline void store(float* at, Floats value) { *reinterpret_cast<UnalignedFloats*>(at) = value; }
inline Floats all(float value) { return value - Floats{}; }

#ifdef __AVX512FP16__
typedef _Float16 Halves __attribute__((vector_size(64)));
typedef _Float16 UnalignedHalves __attribute__((vector_size(64), aligned(2), may_alias));

inline Halves load(const _Float16* at) { return *reinterpret_cast<const UnalignedHalves*>(at); }
inline void store(_Float16* at, Halves value) { *reinterpret_cast<UnalignedHalves*>(at) = value; }
inline Halves all(_Float16 value) { return (Halves)_mm512_set1_ph(value); }

inline __m256h halved(Floats value) { return _mm512_cvtxps_ph((__m512)value); }
inline Halves joined(Floats first, Floats second) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_castph_pd(halved(first)));
    return (Halves)_mm512_insertf64x4(low, _mm256_castph_pd(halved(second)), 1);
}
inline Floats first_of(Halves value) { return (Floats)_mm512_cvtxph_ps(_mm512_castph512_ph256((__m512h)value)); }
inline Floats second_of(Halves value) {
    return (Floats)_mm512_cvtxph_ps(_mm256_castpd_ph(_mm512_extractf64x4_pd((__m512d)value, 1)));
}
#endif

// ------------------------------------------------------------------------------------------------------- activations

constexpr float LOG2_E = 1.44269504f;
// (2^v − 1)/v for v from −½ to ½: the polynomial of degree 4 that meets it at Chebyshev's nodes.
constexpr float POWER[] = {0.693147181f, 0.240223490f, 0.0555038101f, 0.00966636852f, 0.00133813025f};

// The x of which none is beyond `low` or `high`; what is not a number stays so.
inline Floats at_least(Floats x, float low) { return low > x ? all(low) : x; }
inline Floats at_most(Floats x, float high) { return high < x ? all(high) : x; }

// 2^(factor · x) for |factor · x| up to 126, to 3e-7 of it: the integer part by the exponent's bits, the rest by a
// polynomial.
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

#ifdef __AVX512FP16__
// t as an integer and a rest from −½ to ½, and 2^rest − 1, to float16's precision relative to itself.
struct Power {
    Halves whole, beyond_one;
    explicit Power(Halves t) : whole((Halves)_mm512_roundscale_ph((__m512h)t, 0)) {
        const Halves rest = t - whole;
        Halves y = all(_Float16(POWER[3]));
        for (int i = 2; i >= 0; --i) y = y * rest + _Float16(POWER[i]);
        beyond_one = y * rest;
    }
    Halves times_power(Halves x) const { return (Halves)_mm512_scalef_ph((__m512h)x, (__m512h)whole); }
};
#endif

struct Identity {
    static Floats of(Floats x) { return x; }
};

struct Swish {
    static Floats of(Floats x) {
        const Floats low = at_least(x, -87.0f);
        return low * reciprocal(1.0f + power_of_two(at_most(low, 87.0f), -LOG2_E));
    }
#ifdef __AVX512FP16__
    static Halves of(Halves x) {
        const Power power(x * _Float16(-LOG2_E));
        const Halves below = power.times_power(power.beyond_one + _Float16(1)) + _Float16(1);
        return x * (Halves)_mm512_rcp_ph((__m512h)below);
    }
#endif
};

struct Elu {
    static Floats of(Floats x) { return x < 0.0f ? power_of_two(at_least(x, -87.0f), LOG2_E) - 1.0f : x; }
#ifdef __AVX512FP16__
    static Halves of(Halves x) { return joined(x, below(x)); }
    static Halves below(Halves x) {  // 2^whole · (2^rest − 1) + (2^whole − 1): small x stay precise
        const Halves one = all(_Float16(1));
        const Halves low = (Halves)_mm512_max_ph((__m512h)all(_Float16(-20)), (__m512h)x);  // the second, if not a number
        const Power power(low * _Float16(LOG2_E));
        return power.times_power(power.beyond_one) + (power.times_power(one) - one);
    }
    static Halves joined(Halves above, Halves below) {
        const __mmask32 negative = _mm512_cmp_ph_mask((__m512h)above, _mm512_setzero_ph(), _CMP_LT_OQ);
        return (Halves)_mm512_mask_blend_ph(negative, (__m512h)above, (__m512h)below);
    }
#endif
};

// (e^v − 1)/v for v from −1 to 0, met at Chebyshev's nodes: of degree 6 to 1e-8, of degree 3 to 6e-5.
constexpr float QUOTIENT[] = {0.999999998f, 0.499999797f, 0.166663403f, 0.0416468493f, 0.00827550484f, 0.00130077496f, 0.000129076311f};
constexpr float SHORT_QUOTIENT[] = {0.999952895f, 0.498484419f, 0.158865595f, 0.0282534727f};

struct EluTwice {
    static Floats of(Floats x) {
        const Floats once = power_of_two(at_least(at_most(x, 0.0f), -87.0f), LOG2_E) - 1.0f;
        Floats y = all(QUOTIENT[6]);
        for (int i = 5; i >= 0; --i) y = y * once + QUOTIENT[i];
        return x < 0.0f ? y * once : x;
    }
#ifdef __AVX512FP16__
    static Halves of(Halves x) {
        const Halves once = Elu::below(x);
        Halves y = all(_Float16(SHORT_QUOTIENT[3]));
        for (int i = 2; i >= 0; --i) y = y * once + _Float16(SHORT_QUOTIENT[i]);
        return Elu::joined(x, y * once);
    }
#endif
};

// log x for normal x > 0, to 2e-7 of it or of 1: the exponent, and the logarithm of a mantissa from ¾ to 1½ as
// 2 artanh((m − 1)/(m + 1)) by its series.
inline Floats logarithm(Floats x) {
    const Integers exponent = ((Integers)x - 0x3f400000) >> 23;
    const Floats mantissa = (Floats)((Bits)x - ((Bits)exponent << 23));
    const Floats t = (mantissa - 1.0f) * reciprocal(mantissa + 1.0f), square = t * t;
    const Floats series = 2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7 + square * (2.0f / 9))));
    return __builtin_convertvector(exponent, Floats) * 0.693147181f + t * series;
}

// 5 tanh(x/5) (spec §3), through (1 − e^(−2x/5)) / (1 + e^(−2x/5)).
inline Floats soft_clamp(Floats x) {
    const Floats power = power_of_two(at_most(at_least(x, -100.0f), 100.0f), -0.4f * LOG2_E);
    return 5.0f * (1.0f - power) * reciprocal(1.0f + power);
}

template <class F>
inline void over_vectors(float* x, int64_t size, F f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, f(load(x + i)));
    for (; i < size; ++i) x[i] = f(all(x[i]))[0];
}

// -------------------------------------------------------------------------------------------------- types of tensors

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

// Which of a vector's numbers are among the first `count`, for AVX-512.
inline uint16_t first_bits(int64_t count) { return (1u << std::clamp<int64_t>(count, 0, 16)) - 1; }

// A vector of `count` numbers, the others `rest`.
inline Floats load_some(const float* from, int64_t count, float rest) {
    if (count >= LANES) return load(from);
#ifdef __AVX512F__
    return (Floats)_mm512_mask_loadu_ps((__m512)all(rest), first_bits(count), from);
#else
    Floats numbers = all(rest);
    std::memcpy(&numbers, from, 4 * count);
    return numbers;
#endif
}
inline Floats load_some(const BFloat16* from, int64_t count, float rest) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 some = first_bits(count);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16);
    return (Floats)_mm512_mask_mov_ps((__m512)all(rest), some, _mm512_castsi512_ps(bits));
#else
    Floats numbers = all(rest);
    if (count >= LANES)
        for (int i = 0; i < LANES; ++i) numbers[i] = widened(from[i]);
    else
        for (int i = 0; i < count; ++i) numbers[i] = widened(from[i]);
    return numbers;
#endif
}

// Adds the first `count` of a vector's numbers.
inline void add_some(float* to, Floats value, int64_t count) {
    if (count >= LANES) return store(to, load(to) + value);
    const Floats sums = load_some(to, count, 0.0f) + value;
    std::memcpy(to, &sums, 4 * count);
}

// The first `count` of a vector's numbers, or all.
template <class T>
inline void store_some(T* to, Floats value, int64_t count) {
    if constexpr (std::is_same_v<T, float>)
        if (count >= LANES) return store(to, value);
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        return _mm256_mask_storeu_epi16(to, first_bits(count), (__m256i)_mm512_cvtneps_pbh((__m512)value));
    }
#endif
    float numbers[LANES];
    store(numbers, value);
    if (count >= LANES)
        for (int i = 0; i < LANES; ++i) assign(to[i], numbers[i]);
    else
        for (int i = 0; i < count; ++i) assign(to[i], numbers[i]);
}

}  // namespace
