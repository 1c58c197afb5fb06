// Convolutions of a row of pixels as products of matrices, whose sums stay in registers.
//
// A tile is some of the channels of a row: (pixels, TILE), of which the first N vectors count. Weights have the order
// that `pack` gives them.
//
// Shapes: M pixels and N vectors of channels at once; C inputs, O outputs.

#pragma once

#include "vectors.h"

#include <cstdio>
#include <cstdlib>
#include <type_traits>

namespace {

constexpr int TILE = VECTORS * LANES;
constexpr int64_t PADDING = 16;  // channels that a convolution makes are padded to a multiple of this
inline int64_t padded(int64_t channels) { return (channels + PADDING - 1) / PADDING * PADDING; }

// ---------------------------------------------------------------------------------------------------------- memory

constexpr int64_t LINE = 64;  // bytes

// Memory of a thread, kept from call to call (what is new costs a page fault for every 4 KiB), in whole cache lines.
class Buffer {
public:
    float* of(int64_t count) {
        const int64_t size = (count * sizeof(float) + LINE - 1) / LINE * LINE;
        if (size > size_) {
            std::free(data_);
            size_ = size;
            data_ = static_cast<float*>(std::aligned_alloc(LINE, size_));
            if (!data_) {
                std::fprintf(stderr, "out of memory: %lld bytes for a convolution\n", static_cast<long long>(size_));
                std::abort();
            }
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }

private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

// ---------------------------------------------------------------------------------------------------------- parts

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(number of pixels, first pixel) for blocks of a row of pixels.
template <int M = ROWS, class F>
inline void over_blocks(int64_t pixels, F f, int64_t first = 0) {
    for (; first + M <= pixels; first += M) f(Constant<M>{}, first);
    if constexpr (M > 1) over_blocks<M / 2>(pixels, f, first);
}

// Calls f(number of vectors, first channel) for tiles of `channels`, a multiple of PADDING, as equal as they can be.
template <class F>
inline void over_tiles(int64_t channels, F f) {
    const int64_t vectors = channels / LANES, tiles = (vectors + VECTORS - 1) / VECTORS;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = vectors * t / tiles, count = vectors * (t + 1) / tiles - first;
        if (count == 3) f(Constant<3>{}, first * LANES);
        if (count == 2) f(Constant<2>{}, first * LANES);
        if (count == 1) f(Constant<1>{}, first * LANES);
    }
}

// (depth, channels), channels padded -> tile after tile of the channels, each (depth, channels of the tile).
inline void pack_tiles(const float* from, int64_t depth, int64_t channels, float* to) {
    over_tiles(channels, [&](auto vectors, int64_t channel) {
        for (int64_t k = 0; k < depth; ++k, to += vectors * LANES)
            std::copy_n(from + k * channels + channel, vectors * LANES, to);
    });
}

// The taps of a kernel: how many, and the row and column offset of each.
struct Taps {
    int64_t count;
    const int64_t* at;

    int64_t row(int64_t tap) const { return at[2 * tap]; }
    int64_t column(int64_t tap) const { return at[2 * tap + 1]; }
    // Whether `number` of them from `tap` on are side by side.
    bool are_beside(int64_t tap, int64_t number) const {
        const int64_t last = tap + number - 1;
        return last < count && row(last) == row(tap) && column(last) == column(tap) + number - 1;
    }
};

// ------------------------------------------------------------------------------------------------- dense convolutions

// sums (M, N) += a (M, depth), `pitch` numbers from row to row, times b (depth, N vectors).
template <int M, int N>
inline __attribute__((always_inline)) void multiply(
    Floats (&sums)[M][N], const float* a, int64_t pitch, const float* b, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, b += N * LANES) {
        Floats row[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) row[n] = load(b + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Floats value = all(a[m * pitch + k]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sums[m][n] += value * row[n];
        }
    }
}

// A row of a convolution of `inputs` channels, activated, as a tile. `origin` is the input below the first pixel's
// centre, `pitch` pixels lie from row to row; weight (taps · inputs, N vectors), bias (N vectors).
template <class Activation, int N>
inline void convolve_row(const float* origin, int64_t pitch, int64_t inputs, int64_t width, const Taps& taps,
                         const float* weight, const float* bias, float* tile) {
    over_blocks(width, [&](auto pixels, int64_t column) {
        constexpr int M = pixels;
        Floats sums[M][N];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) sums[m][n] = load(bias + n * LANES);
        for (int64_t tap = 0; tap < taps.count; ++tap)
            multiply(sums, origin + (taps.row(tap) * pitch + taps.column(tap) + column) * inputs, inputs,
                     weight + tap * inputs * N * LANES, inputs);
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) store(tile + (column + m) * TILE + n * LANES, Activation::of(sums[m][n]));
    });
}

// What channels `channel` on, a tile of N vectors, give to a row of a 1×1 convolution (width, outputs): added to what the
// channels before gave, or to the bias. weight (depth, outputs).
template <int N>
inline void project_row(const float* tile, int64_t width, const float* weight, int64_t channel, int64_t depth,
                        int64_t outputs, const float* bias, float* to) {
    over_tiles(outputs, [&](auto vectors, int64_t output) {
        constexpr int O = vectors;
        over_blocks(width, [&](auto pixels, int64_t column) {
            constexpr int M = pixels;
            Floats sums[M][O] = {};
            multiply(sums, tile + column * TILE, TILE, weight + output * depth + channel * O * LANES, N * LANES);
            for (int m = 0; m < M; ++m)
                for (int o = 0; o < O; ++o) {
                    float* at = to + (column + m) * outputs + output + o * LANES;
                    store(at, load(channel ? at : bias + output + o * LANES) + sums[m][o]);
                }
        });
    });
}

// --------------------------------------------------------------------------------------------- depthwise convolutions

// sums (M) += K taps side by side; pixels are TILE numbers apart, taps of the weight `apart`.
template <int K, int M>
inline __attribute__((always_inline)) void slide(
    Floats (&sums)[M], const float* from, const float* weight, int64_t apart) {
    Floats pixels[M + K - 1];
#pragma GCC unroll 12
    for (int m = 0; m < M + K - 1; ++m) pixels[m] = load(from + m * TILE);
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) {
        const Floats tap = load(weight + k * apart);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m] += pixels[m + k] * tap;
    }
}

// sums (M) += one tap, with `stride` pixels from one output to the next.
template <int M>
inline __attribute__((always_inline)) void stride_over(
    Floats (&sums)[M], const float* from, const float* weight, int64_t stride) {
    const Floats tap = load(weight);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += load(from + m * stride * TILE) * tap;
}

// A row of a depthwise convolution of tiles, activated; weight (taps, N vectors), the rest as in `convolve_row`.
template <class Activation, int N>
inline void convolve_depthwise_row(const float* origin, int64_t pitch, int64_t width, int64_t stride, const Taps& taps,
                                   const float* weight, const float* bias, float* tile) {
    for (int v = 0; v < N; ++v)
        over_blocks(width, [&](auto pixels, int64_t column) {
            constexpr int M = pixels;
            Floats sums[M];
            for (int m = 0; m < M; ++m) sums[m] = load(bias + v * LANES);
            for (int64_t tap = 0; tap < taps.count;) {
                const int64_t pixel = taps.row(tap) * pitch + taps.column(tap) + column * stride;
                const float* from = origin + pixel * TILE + v * LANES;
                const float* kernel = weight + (tap * N + v) * LANES;
                if (stride == 1 && taps.are_beside(tap, 5)) {
                    slide<5>(sums, from, kernel, N * LANES);
                    tap += 5;
                } else if (stride == 1 && taps.are_beside(tap, 3)) {
                    slide<3>(sums, from, kernel, N * LANES);
                    tap += 3;
                } else {
                    stride_over(sums, from, kernel, stride);
                    tap += 1;
                }
            }
            for (int m = 0; m < M; ++m) store(tile + (column + m) * TILE + v * LANES, Activation::of(sums[m]));
        });
}

}  // namespace
