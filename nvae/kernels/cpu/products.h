// Products of matrices in registers, in float32 and, where the processor has it, in float16; convolutions as such products.
//
// Shapes: M pixels and N vectors of outputs at once; C inputs, O outputs of a kernel, h w space of the output.

#pragma once

#include "vectors.h"

namespace {

// ---------------------------------------------------------------------------------------------------------- memory

constexpr int64_t LINE = 64;  // bytes

// Memory of a thread, kept from call to call (what is new costs a page fault for every 4 KiB), in whole cache lines.
class Buffer {
public:
    template <class T>
    T* of(int64_t count) {
        const int64_t size = (count * sizeof(T) + LINE - 1) / LINE * LINE;
        if (size > size_) {
            std::free(data_);
            size_ = size;
            data_ = std::aligned_alloc(LINE, size_);
            if (!data_) {
                std::fprintf(stderr, "out of memory: %lld bytes for a convolution\n", static_cast<long long>(size_));
                std::abort();
            }
        }
        return static_cast<T*>(data_);
    }
    ~Buffer() { std::free(data_); }

private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// --------------------------------------------------------------------------------------------------------- products

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(number of pixels, first pixel) for blocks of a row of pixels.
template <int M = ROWS, class F>
inline void over_blocks(int64_t pixels, F f, int64_t first = 0) {
    for (; first + M <= pixels; first += M) f(Constant<M>{}, first);
    if constexpr (M > 1) over_blocks<M / 2>(pixels, f, first);
}

// Calls f(number of vectors, first channel) for tiles of `channels`, as equal as they can be.
template <class A, class F>
inline void over_tiles(int64_t channels, F f) {
    const int64_t vectors = channels / A::LANES, tiles = (vectors + VECTORS - 1) / VECTORS;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = vectors * t / tiles, count = vectors * (t + 1) / tiles - first;
        if (count == 3) f(Constant<3>{}, first * A::LANES);
        if (count == 2) f(Constant<2>{}, first * A::LANES);
        if (count == 1) f(Constant<1>{}, first * A::LANES);
    }
}

template <class A>
inline int64_t padded(int64_t channels) {
    return (channels + A::PADDING - 1) / A::PADDING * A::PADDING;
}

// sums (M, N) += a (M, depth), `pitch` factors from row to row, times b (depth, N vectors).
template <class A, int M, int N>
inline __attribute__((always_inline)) void multiply(typename A::Vector (&sums)[M][N], const typename A::Factor* a,
                                                    int64_t pitch, const typename A::Number* b, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, b += N * A::LANES) {
        typename A::Vector row[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) row[n] = load(b + n * A::LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const typename A::Vector value = A::every(a[m * pitch + k]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sums[m][n] += value * row[n];
        }
    }
}

// An arithmetic: its numbers and vectors, the factors that a product takes one of at a time, and sums of products.
struct Float32 {
    using Number = float;
    using Vector = Floats;
    using Factor = float;
    static constexpr int LANES = ::LANES, PADDING = 16, INDEX = 0;  // of its weights

    static Vector every(Factor factor) { return all(factor); }
    static Vector from_floats(const float* at) { return load(at); }
    static void to_factors(Factor* to, Floats value) { store(to, value); }
    static void add(float* to, const float* from, Vector value) { store(to, load(from) + value); }

    // M pixels, N vectors.
    template <int M, int N>
    struct Sums {
        static constexpr int PIXELS = M;
        Vector at[M][N];

        explicit Sums(const float* bias) {
            for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) at[m][n] = load(bias + n * LANES);
        }
        void add(const Factor* a, int64_t pitch, const Number* b, int64_t depth) {
            multiply<Float32>(at, a, pitch, b, depth);
        }
        Vector number(int m, int n) const { return at[m][n]; }
        template <class T>
        void write(int m, int n, T* to, int64_t count) const {
            store_some(to, at[m][n], count);
        }
    };
};

#ifdef __AVX512FP16__
struct Float16 {
    using Number = _Float16;
    using Vector = Halves;
    using Factor = uint32_t;  // the number twice: 32 bits go to all lanes of a vector at no cost, 16 do not
    static constexpr int LANES = 32, PADDING = 32, INDEX = 1, DEPTH = 64;

    static Vector every(Factor factor) { return (Vector)_mm512_set1_epi32(factor); }
    static Vector from_floats(const float* at) { return joined(load(at), load(at + ::LANES)); }
    static void to_factors(Factor* to, Floats value) { twice(to, _mm256_castph_si256(halved(value))); }
    static void to_factors(Factor* to, Vector value) {
        twice(to, _mm512_castsi512_si256((__m512i)value));
        twice(to + ::LANES, _mm512_extracti64x4_epi64((__m512i)value, 1));
    }
    static void add(float* to, const float* from, Vector value) {
        store(to, load(from) + first_of(value));
        store(to + ::LANES, load(from + ::LANES) + second_of(value));
    }

    template <int M, int N>
    struct Sums {
        static constexpr int PIXELS = M;
        Vector at[M][N];  // of the last `depth` products, and the bias where nothing is in `wide`
        Floats wide[M][N][2];
        int64_t depth = 0;
        bool is_wide = false;

        explicit Sums(const float* bias) {
            for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) at[m][n] = from_floats(bias + n * LANES);
        }
        void add(const Factor* a, int64_t pitch, const Number* b, int64_t count) {
            while (count) {
                if (depth == DEPTH) widen();
                const int64_t part = std::min(count, DEPTH - depth);
                multiply<Float16>(at, a, pitch, b, part);
                a += part, b += part * N * LANES, count -= part, depth += part;
            }
        }
        void widen() {
            for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) {
                    const Floats parts[] = {first_of(at[m][n]), second_of(at[m][n])};
                    for (int i = 0; i < 2; ++i) wide[m][n][i] = is_wide ? wide[m][n][i] + parts[i] : parts[i];
                    at[m][n] = Vector{};
                }
            is_wide = true;
            depth = 0;
        }
        Floats half(int m, int n, int i) const {
            const Floats part = i ? second_of(at[m][n]) : first_of(at[m][n]);
            return is_wide ? wide[m][n][i] + part : part;
        }
        Vector number(int m, int n) const { return is_wide ? joined(half(m, n, 0), half(m, n, 1)) : at[m][n]; }
        template <class T>
        void write(int m, int n, T* to, int64_t count) const {
            store_some(to, half(m, n, 0), count);
            if (count > ::LANES) store_some(to + ::LANES, half(m, n, 1), count - ::LANES);
        }
    };

private:
    static void twice(Factor* to, __m256i numbers) {
        const __m512i wide = _mm512_cvtepu16_epi32(numbers);
        _mm512_storeu_si512(to, _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)));
    }
};
#else
using Float16 = Float32;  // where there is none
#endif

#ifdef __AVX512FP16__
constexpr bool HAS_FLOAT16 = true;
#else
constexpr bool HAS_FLOAT16 = false;
#endif

// A tile of a convolution along a row: calls finish(Sums (M, N), first pixel). `origin` is what the row's first pixel
// has below its kernel's centre; `weight` (taps · inputs, N vectors), `bias` (N vectors).
template <class A, int N, class F>
inline void convolve_row(const typename A::Factor* origin, int64_t pitch, int64_t inputs, int64_t width, int64_t taps,
                         const int64_t* at, const typename A::Number* weight, const float* bias, F finish) {
    over_blocks(width, [&](auto pixels, int64_t column) {
        constexpr int M = pixels;
        typename A::template Sums<M, N> sums(bias);
        for (int64_t tap = 0; tap < taps; ++tap)
            sums.add(origin + (at[2 * tap] * pitch + at[2 * tap + 1] + column) * inputs, inputs,
                     weight + tap * inputs * N * A::LANES, inputs);
        finish(sums, column);
    });
}

// sums (M) += K taps side by side of a depthwise kernel; pixels are APART numbers apart, taps of the weight `apart`.
template <class A, int K, int APART, int M>
inline __attribute__((always_inline)) void slide(
    typename A::Vector (&sums)[M], const typename A::Number* from, const typename A::Number* weight, int64_t apart) {
    typename A::Vector pixels[M + K - 1];
#pragma GCC unroll 12
    for (int m = 0; m < M + K - 1; ++m) pixels[m] = load(from + m * APART);
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) {
        const typename A::Vector tap = load(weight + k * apart);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m] += pixels[m + k] * tap;
    }
}

// As `slide` for one tap, with `stride` pixels from one output to the next.
template <class A, int APART, int M>
inline __attribute__((always_inline)) void stride_over(
    typename A::Vector (&sums)[M], const typename A::Number* from, const typename A::Number* weight, int64_t stride) {
    const typename A::Vector tap = load(weight);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += load(from + m * stride * APART) * tap;
}

// A part of one image's output.
struct Strip {
    int64_t image, first, last;  // rows

    Strip(int64_t task, int64_t strips, int64_t height)
        : image(task / strips),
          first(height * (task % strips) / strips),
          last(height * (task % strips + 1) / strips) {}
    int64_t rows() const { return last - first; }
};

}  // namespace
