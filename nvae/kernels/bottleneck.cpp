// Inverted bottlenecks for inference: convolution to many channels, depthwise convolution, 1×1 convolution to few, with
// activations between and a gated sum at the end (spec §1 and §3; nvae/bottleneck.py says what it computes).
//
// What is between the convolutions never reaches memory: of a strip of rows, a tile of the many channels is made,
// convolved and summed into the few, then the next tile, all in the nearest caches. Arithmetic is float32.
//
// Shapes: B images, H W space of the input, h w of a phase of the output (H/stride); C inputs, E hidden, O outputs.
// Images are channels-last. Hidden and output channels of weights are padded with zeros to a multiple of PADDING.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Registers hold ROWS × VECTORS sums, VECTORS weights and one input.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int VECTORS = 3, TILE = VECTORS * LANES;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Unaligned*>(at) = value; }
inline Vector all(float value) { return value - Vector{}; }

// ------------------------------------------------------------------------------------------------------- activations

// 2^(factor · x) for factor · x up to 126, to 3e-7 of it: the integer part by the exponent's bits, the rest, from −½ to
// ½, by a polynomial: 1 + v times the one of degree 4 that meets (2^v − 1)/v at Chebyshev's nodes.
constexpr float POWER[] = {1.0f, 0.693147181f, 0.240223490f, 0.0555038101f, 0.00966636852f, 0.00133813025f};
inline Vector power_of_two(Vector x, float factor) {
    const Vector ROUNDING = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
#ifndef __AVX512F__
    x = x * factor > -126.0f ? x : all(-126.0f / factor);
#endif
    const Vector shifted = x * factor + ROUNDING;
    const Vector n = shifted - ROUNDING, rest = x * factor - n;
    Vector y = all(POWER[5]);
    for (int i = 4; i >= 0; --i) y = y * rest + POWER[i];
#ifdef __AVX512F__
    return (Vector)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    return (Vector)((Integers)y + ((Integers)shifted << 23));
#endif
}

inline Vector reciprocal(Vector x) {
#ifdef __AVX512F__
    const Vector guess = (Vector)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

constexpr float LOG2_E = 1.44269504f;

struct Swish {
    static Vector of(Vector x) { return x * reciprocal(1.0f + power_of_two(x > -87.0f ? x : all(-87.0f), -LOG2_E)); }
};

struct Elu {
    static Vector of(Vector x) { return x < 0.0f ? power_of_two(x, LOG2_E) - 1.0f : x; }
};

struct EluTwice {
    static Vector of(Vector x) { return Elu::of(Elu::of(x)); }
};

// --------------------------------------------------------------------------------------------------------- the types

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

// --------------------------------------------------------------------------------------------------------- products

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(number of vectors, first channel) for tiles of `channels`, as equal as they can be.
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

// Calls f(number of pixels, first pixel) for blocks of a row of pixels.
template <int M = ROWS, class F>
inline void over_blocks(int64_t pixels, F f, int64_t first = 0) {
    for (; first + M <= pixels; first += M) f(Constant<M>{}, first);
    if constexpr (M > 1) over_blocks<M / 2>(pixels, f, first);
}

// sums (M, N) += a (M, depth), `pitch` numbers from row to row, times b (depth, N vectors).
template <int M, int N>
inline __attribute__((always_inline)) void multiply(
    Vector (&sums)[M][N], const float* a, int64_t pitch, const float* b, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, b += N * LANES) {
        Vector row[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) row[n] = load(b + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vector value = all(a[m * pitch + k]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sums[m][n] += value * row[n];
        }
    }
}

}  // namespace

extern "C" {

constexpr int64_t PADDING = 16;

// As in nvae/bottleneck.py, which fills it.
struct Problem {
    int64_t images, height, width, inputs;
    int64_t hidden, outputs, stride, enlarge;  // hidden with padding, outputs without; enlarge² phases
    int64_t expand_taps, expand_reach, spatial_taps, spatial_reach;  // reach: the largest |offset|
    int64_t elu, squeezed, bfloat16, strips, threads;
    float scale;
    const float *expand, *expand_bias;    // packed (taps · C, E), (E)
    const float *spatial, *spatial_bias;  // packed (phases · taps, E), (E)
    const float *project, *project_bias;  // packed (E, O), (O)
    const int64_t *expand_at, *spatial_at;  // (taps, 2): row and column offsets, the same in all phases
    const float *squeeze, *squeeze_bias, *excite, *excite_bias;  // (S, O), (S), (O, S), (O)
    const void *x, *skip;  // (B, H, W, C), (B, enlarge · h, enlarge · w, O)
    void* out;             // as skip
    float *y, *sums;       // (B, phases, h, w, O padded), (B, strips, O padded)
};
}

namespace {

struct Strip {
    int64_t image, first, last;  // rows of a phase of the output
};

// Memory of a thread, kept from call to call (what is new costs a page fault for every 4 KiB), in whole cache lines.
class Buffer {
public:
    float* of(int64_t size) {
        if (size > size_) {
            std::free(data_);
            size_ = (size + PADDING - 1) / PADDING * PADDING;
            data_ = static_cast<float*>(std::aligned_alloc(4 * PADDING, 4 * size_));
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }

private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

struct Scratch {
    Buffer input, hidden, spatial, factors;
};

struct Sizes {
    int64_t phases, h, w, outputs;        // of the output; channels padded
    int64_t input_pitch, hidden_pitch;    // pixels from row to row
    explicit Sizes(const Problem& p)
        : phases(p.enlarge * p.enlarge),
          h((p.height + p.stride - 1) / p.stride),
          w((p.width + p.stride - 1) / p.stride),
          outputs((p.outputs + PADDING - 1) / PADDING * PADDING),
          input_pitch(p.width + 2 * p.expand_reach),
          hidden_pitch(p.width + 2 * p.spatial_reach) {}
};

// The rows that a strip needs of the input, in float32, with zeros around the image.
template <class T>
void read(const Problem& p, const Sizes& n, int64_t image, int64_t top, int64_t rows, float* to) {
    const int64_t border = p.expand_reach * p.inputs, row_size = p.width * p.inputs;
    for (int64_t i = 0; i < rows; ++i) {
        float* row = to + i * n.input_pitch * p.inputs;
        if (top + i < 0 || top + i >= p.height) {
            std::fill_n(row, n.input_pitch * p.inputs, 0.0f);
            continue;
        }
        const T* from = static_cast<const T*>(p.x) + (image * p.height + top + i) * row_size;
        std::fill_n(row, border, 0.0f);
        for (int64_t e = 0; e < row_size; ++e) row[border + e] = widened(from[e]);
        std::fill_n(row + border + row_size, border, 0.0f);
    }
}

// y of a strip: every tile of the hidden channels in turn.
template <class Inner, class Outer>
void convolve(const Problem& p, const Sizes& n, const Strip& strip, Scratch& scratch) {
    const int64_t top = strip.first * p.stride - p.spatial_reach;  // the image's row that the hidden ones start at
    const int64_t rows = (strip.last - strip.first - 1) * p.stride + 1 + 2 * p.spatial_reach;
    const int64_t read_rows = rows + 2 * p.expand_reach, hidden_size = rows * n.hidden_pitch * TILE;
    float* input = scratch.input.of(read_rows * n.input_pitch * p.inputs);
    float *hidden = scratch.hidden.of(hidden_size), *spatial = scratch.spatial.of(n.w * TILE);
    if (p.bfloat16)
        read<BFloat16>(p, n, strip.image, top - p.expand_reach, read_rows, input);
    else
        read<float>(p, n, strip.image, top - p.expand_reach, read_rows, input);
    std::fill_n(hidden, hidden_size, 0.0f);  // around the image it stays so

    over_tiles(p.hidden, [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        const float* expand = p.expand + channel * p.expand_taps * p.inputs;
        for (int64_t i = std::max<int64_t>(-top, 0); i < std::min(rows, p.height - top); ++i)
            over_blocks(p.width, [&](auto pixels, int64_t column) {
                constexpr int M = pixels;
                Vector sums[M][N];
                for (int m = 0; m < M; ++m)
                    for (int v = 0; v < N; ++v) sums[m][v] = load(p.expand_bias + channel + v * LANES);
                for (int64_t tap = 0; tap < p.expand_taps; ++tap) {
                    const int64_t row = i + p.expand_reach + p.expand_at[2 * tap];
                    const int64_t from = column + p.expand_reach + p.expand_at[2 * tap + 1];
                    multiply(sums, input + (row * n.input_pitch + from) * p.inputs, p.inputs,
                             expand + tap * p.inputs * N * LANES, p.inputs);
                }
                float* to = hidden + (i * n.hidden_pitch + p.spatial_reach + column) * TILE;
                for (int m = 0; m < M; ++m)
                    for (int v = 0; v < N; ++v) store(to + m * TILE + v * LANES, Inner::of(sums[m][v]));
            });

        for (int64_t row = strip.first; row < strip.last; ++row)
            for (int64_t phase = 0; phase < n.phases; ++phase) {
                const float* kernel = p.spatial + channel * n.phases * p.spatial_taps + phase * p.spatial_taps * N * LANES;
                const float* origin = hidden
                    + (((row - strip.first) * p.stride + p.spatial_reach) * n.hidden_pitch + p.spatial_reach) * TILE;
                for (int v = 0; v < N; ++v)
                    over_blocks(n.w, [&](auto pixels, int64_t column) {
                        constexpr int M = pixels;
                        Vector sums[M];
                        for (int m = 0; m < M; ++m) sums[m] = load(p.spatial_bias + channel + v * LANES);
                        for (int64_t tap = 0; tap < p.spatial_taps; ++tap) {
                            const Vector weight = load(kernel + (tap * N + v) * LANES);
                            const int64_t row_offset = p.spatial_at[2 * tap], column_offset = p.spatial_at[2 * tap + 1];
                            const float* from = origin + v * LANES
                                + (row_offset * n.hidden_pitch + column_offset + column * p.stride) * TILE;
#pragma GCC unroll 8
                            for (int m = 0; m < M; ++m) sums[m] += load(from + m * p.stride * TILE) * weight;
                        }
                        for (int m = 0; m < M; ++m)
                            store(spatial + (column + m) * TILE + v * LANES, Outer::of(sums[m]));
                    });

                float* y = p.y + (((strip.image * n.phases + phase) * n.h + row) * n.w) * n.outputs;
                over_tiles(n.outputs, [&](auto out_vectors, int64_t output) {
                    constexpr int O = out_vectors;
                    const float* weight = p.project + output * p.hidden + channel * O * LANES;
                    over_blocks(n.w, [&](auto pixels, int64_t column) {
                        constexpr int M = pixels;
                        float* to = y + column * n.outputs + output;
                        Vector sums[M][O];
                        for (int m = 0; m < M; ++m)
                            for (int v = 0; v < O; ++v)
                                sums[m][v] = load((channel ? to + m * n.outputs : p.project_bias + output) + v * LANES);
                        multiply(sums, spatial + column * TILE, TILE, weight, N * LANES);
                        for (int m = 0; m < M; ++m)
                            for (int v = 0; v < O; ++v) store(to + m * n.outputs + v * LANES, sums[m][v]);
                    });
                });
            }
    });
}

// Calls f(y of one pixel, its row and column in the output) for a strip.
template <class F>
inline void over_pixels(const Problem& p, const Sizes& n, const Strip& strip, F f) {
    for (int64_t phase = 0; phase < n.phases; ++phase)
        for (int64_t row = strip.first; row < strip.last; ++row)
            for (int64_t column = 0; column < n.w; ++column)
                f(p.y + (((strip.image * n.phases + phase) * n.h + row) * n.w + column) * n.outputs,
                  row * p.enlarge + phase / p.enlarge, column * p.enlarge + phase % p.enlarge);
}

void sum(const Problem& p, const Sizes& n, const Strip& strip, float* sums) {
    std::fill_n(sums, n.outputs, 0.0f);
    over_pixels(p, n, strip, [&](const float* y, int64_t, int64_t) {
        for (int64_t o = 0; o < n.outputs; ++o) sums[o] += y[o];
    });
}

// What each output channel of an image is multiplied with: scale, times the gate of squeeze-and-excitation.
void find_factors(const Problem& p, const Sizes& n, int64_t image, float* factors) {
    std::fill_n(factors, n.outputs, p.scale);
    if (!p.squeezed) return;
    std::vector<float> mean(n.outputs, 0.0f), squeezed(p.squeezed);
    for (int64_t s = 0; s < p.strips; ++s)
        for (int64_t o = 0; o < n.outputs; ++o) mean[o] += p.sums[(image * p.strips + s) * n.outputs + o];
    for (int64_t j = 0; j < p.squeezed; ++j) {
        float sum = 0.0f;
        for (int64_t o = 0; o < p.outputs; ++o) sum += p.squeeze[j * p.outputs + o] * mean[o];
        squeezed[j] = std::max(sum / (n.phases * n.h * n.w) + p.squeeze_bias[j], 0.0f);
    }
    for (int64_t o = 0; o < p.outputs; ++o) {
        float logit = p.excite_bias[o];
        for (int64_t j = 0; j < p.squeezed; ++j) logit += p.excite[o * p.squeezed + j] * squeezed[j];
        factors[o] /= 1.0f + std::exp(-logit);
    }
}

template <class T>
void add(const Problem& p, const Sizes& n, const Strip& strip, float* factor) {
    find_factors(p, n, strip.image, factor);
    over_pixels(p, n, strip, [&](const float* y, int64_t row, int64_t column) {
        const int64_t at = ((strip.image * n.h * p.enlarge + row) * n.w * p.enlarge + column) * p.outputs;
        const T* skip = static_cast<const T*>(p.skip) + at;
        T* out = static_cast<T*>(p.out) + at;
        for (int64_t o = 0; o < p.outputs; ++o) assign(out[o], widened(skip[o]) + factor[o] * y[o]);
    });
}

}  // namespace

extern "C" {

// (depth, channels) -> tile after tile of the channels, each (depth, channels of the tile); channels are padded already.
void pack(const float* from, int64_t depth, int64_t channels, float* to) {
    over_tiles(channels, [&](auto vectors, int64_t channel) {
        for (int64_t k = 0; k < depth; ++k, to += vectors * LANES)
            std::copy_n(from + k * channels + channel, vectors * LANES, to);
    });
}

// out = skip + scale · gate(mean of y) · y, with y = project(outer(spatial(inner(expand(x))))).
void bottleneck(const Problem* problem) {
    const Problem& p = *problem;
    const Sizes n(p);
    const int64_t tasks = p.images * p.strips;
    const auto strip_of = [&](int64_t task) {
        const int64_t s = task % p.strips;
        return Strip{task / p.strips, n.h * s / p.strips, n.h * (s + 1) / p.strips};
    };
#pragma omp parallel num_threads(p.threads)
    {
        thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const Strip strip = strip_of(task);
            if (p.elu)
                convolve<Elu, EluTwice>(p, n, strip, scratch);
            else
                convolve<Swish, Swish>(p, n, strip, scratch);
            if (p.squeezed) sum(p, n, strip, p.sums + task * n.outputs);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            float* factors = scratch.factors.of(n.outputs);
            if (p.bfloat16)
                add<BFloat16>(p, n, strip_of(task), factors);
            else
                add<float>(p, n, strip_of(task), factors);
        }
    }
}
}
