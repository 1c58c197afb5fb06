// bfloat16 tensors computed with in float16: numbers are scaled by powers of two before they are rounded, so that the
// largest is just below 2^LARGEST: those of a strip of an image by one factor, those of a kernel by another. A sum of DEPTH
// products then stays in float16's range, and what is up to 2^-18 of the largest keeps float16's precision.

#pragma once

#include "products.h"

extern "C" {
// Whether this processor has arithmetic in float16.
int64_t has_float16() { return HAS_FLOAT16; }
}

#ifdef __AVX512FP16__
namespace {

constexpr int DEPTH = Float16::DEPTH;
constexpr int LARGEST = 4;           // its logarithm to base 2: DEPTH · 2^4 · 2^4 = 2^14
constexpr int64_t CACHED = 1 << 20;  // bytes of a strip that fit the second cache beside others

// Powers of two that bring numbers below 2^LARGEST, and back.
struct Scale {
    float there = 1.0f, back = 1.0f;

    explicit Scale(uint16_t largest) {  // the bits of a bfloat16
        const int exponent = (largest >> 7) - 127;
        if (largest == 0 || exponent == 128) return;  // nothing to scale, or not a number
        const int shift = std::clamp(LARGEST - 1 - exponent, -120, 120);
        there = std::ldexp(1.0f, shift);
        back = std::ldexp(1.0f, -shift);
    }
};

inline uint16_t largest_of(const BFloat16* x, int64_t size) {
    uint16_t most = 0;
    for (int64_t i = 0; i < size; ++i) most = std::max(most, uint16_t(x[i].bits & 0x7fff));
    return most;
}

inline Floats scaled(const BFloat16* from, int64_t count, float scale) { return load_some(from, count, 0.0f) * scale; }

// Into how many an image is cut: each fits the cache, and no processor is without one.
inline int64_t strips_of(int64_t images, int64_t height, int64_t row_bytes, int64_t reach, int64_t threads) {
    const int64_t fitting = std::max<int64_t>(CACHED / row_bytes - 2 * reach, 4);
    const int64_t for_threads = std::min((threads + images - 1) / std::max<int64_t>(images, 1), height / 4);
    return std::max<int64_t>({(height + fitting - 1) / fitting, for_threads, 1});
}

}  // namespace
#endif
