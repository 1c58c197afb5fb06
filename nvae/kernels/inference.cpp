// Convolutions for inference on a CPU (nvae/inference.py says what they compute): single ones with an activation before
// them, and inverted bottlenecks: a convolution to many channels, a depthwise one and a 1×1 convolution to few channels,
// with activations between and a gated sum at the end (spec §1 and §3).
//
// What is between a bottleneck's convolutions never reaches memory: of a strip of rows, a tile of the many channels is
// made, convolved and summed into the few, then the next tile, all in the nearest caches. Arithmetic is float32.
//
// Shapes: B images, H W space of the input, h w of a phase of the output (H/stride); C inputs, E hidden, O outputs.
// Images are channels-last. Hidden and output channels of weights are padded with zeros to a multiple of PADDING.

#include <algorithm>
#include <cmath>
#include <cstdio>
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
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Unaligned*>(at) = value; }
inline Vector all(float value) { return value - Vector{}; }

// ------------------------------------------------------------------------------------------------------- activations

// The x of which none is beyond `low` or `high`; what is not a number stays so.
inline Vector at_least(Vector x, float low) { return low > x ? all(low) : x; }
inline Vector at_most(Vector x, float high) { return high < x ? all(high) : x; }

// 2^(factor · x) for |factor · x| up to 126, to 3e-7 of it: the integer part by the exponent's bits, the rest, from −½
// to ½, by a polynomial: 1 + v times the one of degree 4 that meets (2^v − 1)/v at Chebyshev's nodes.
constexpr float POWER[] = {1.0f, 0.693147181f, 0.240223490f, 0.0555038101f, 0.00966636852f, 0.00133813025f};
inline Vector power_of_two(Vector x, float factor) {
    const Vector ROUNDING = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    const Vector shifted = x * factor + ROUNDING;
    const Vector rest = x * factor - (shifted - ROUNDING);
    Vector y = all(POWER[5]);
    for (int i = 4; i >= 0; --i) y = y * rest + POWER[i];
    return (Vector)((Bits)y + ((Bits)shifted << 23));
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

struct Identity {
    static Vector of(Vector x) { return x; }
};

struct Swish {
    static Vector of(Vector x) {
        const Vector low = at_least(x, -87.0f);
        return low * reciprocal(1.0f + power_of_two(at_most(low, 87.0f), -LOG2_E));
    }
};

struct Elu {
    static Vector of(Vector x) { return x < 0.0f ? power_of_two(at_least(x, -87.0f), LOG2_E) - 1.0f : x; }
};

struct EluTwice {
    static Vector of(Vector x) { return Elu::of(Elu::of(x)); }
};

// log x for normal x > 0, to 2e-7 of it or of 1: the exponent, and the logarithm of a mantissa from ¾ to 1½ as
// 2 artanh((m − 1)/(m + 1)) by its series.
inline Vector logarithm(Vector x) {
    const Integers exponent = ((Integers)x - 0x3f400000) >> 23;
    const Vector mantissa = (Vector)((Bits)x - ((Bits)exponent << 23));
    const Vector t = (mantissa - 1.0f) / (mantissa + 1.0f), square = t * t;
    const Vector series = 2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7 + square * (2.0f / 9))));
    return __builtin_convertvector(exponent, Vector) * 0.693147181f + t * series;
}

// 5 tanh(x/5) (spec §3), through (1 − e^(−2x/5)) / (1 + e^(−2x/5)).
inline Vector soft_clamp(Vector x) {
    const Vector power = power_of_two(at_most(at_least(x, -100.0f), 100.0f), -0.4f * LOG2_E);
    return 5.0f * (1.0f - power) * reciprocal(1.0f + power);
}

template <class F>
inline void over_vectors(float* x, int64_t size, F f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, f(load(x + i)));
    for (; i < size; ++i) x[i] = f(all(x[i]))[0];
}

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

// A vector of `count` numbers, the others `rest`.
inline Vector load_some(const float* from, int64_t count, float rest) {
    if (count >= LANES) return load(from);
    Vector numbers = all(rest);
    std::memcpy(&numbers, from, 4 * count);
    return numbers;
}

// Adds the first `count` of a vector's numbers.
inline void add_some(float* to, Vector value, int64_t count) {
    if (count >= LANES) return store(to, load(to) + value);
    const Vector sums = load_some(to, count, 0.0f) + value;
    std::memcpy(to, &sums, 4 * count);
}

// The first `count` of a vector's numbers, or all.
template <class T>
inline void store_some(T* to, Vector value, int64_t count) {
    float numbers[LANES];
    store(numbers, value);
    if (count >= LANES)
        for (int i = 0; i < LANES; ++i) assign(to[i], numbers[i]);
    else
        for (int i = 0; i < count; ++i) assign(to[i], numbers[i]);
}

// ---------------------------------------------------------------------------------------------------------- memory

constexpr int64_t PADDING = 16;

// Memory of a thread, kept from call to call (what is new costs a page fault for every 4 KiB), in whole cache lines.
class Buffer {
public:
    float* of(int64_t size) {
        if (size > size_) {
            std::free(data_);
            size_ = (size + PADDING - 1) / PADDING * PADDING;
            data_ = static_cast<float*>(std::aligned_alloc(4 * PADDING, 4 * size_));
            if (!data_) {
                std::fprintf(stderr, "out of memory: %lld bytes for inference\n", static_cast<long long>(4 * size_));
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

// Rows of an image from `top` on, some maybe outside it, in float32 with zeros around the image.
template <class T, class Activation>
void read(const void* x, int64_t height, int64_t width, int64_t channels, int64_t image, int64_t top, int64_t rows,
          int64_t border, float* to) {
    const int64_t row_size = width * channels, side = border * channels;
    for (int64_t i = 0; i < rows; ++i, to += row_size + 2 * side) {
        if (top + i < 0 || top + i >= height) {
            std::fill_n(to, row_size + 2 * side, 0.0f);
            continue;
        }
        const T* from = static_cast<const T*>(x) + (image * height + top + i) * row_size;
        float* inside = to + side;
        std::fill_n(to, side, 0.0f);
        for (int64_t e = 0; e < row_size; ++e) inside[e] = widened(from[e]);
        if constexpr (!std::is_same_v<Activation, Identity>) over_vectors(inside, row_size, Activation::of);
        std::fill_n(inside + row_size, side, 0.0f);
    }
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

// A tile of a convolution along a row: calls finish(sums (M, N), first pixel). `origin` is what the row's first pixel
// has below its kernel's centre; `weight` (taps · inputs, N vectors), `bias` (N vectors).
template <int N, class F>
inline void convolve_row(const float* origin, int64_t pitch, int64_t inputs, int64_t width, int64_t taps,
                         const int64_t* at, const float* weight, const float* bias, F finish) {
    over_blocks(width, [&](auto pixels, int64_t column) {
        constexpr int M = pixels;
        Vector sums[M][N];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < N; ++v) sums[m][v] = load(bias + v * LANES);
        for (int64_t tap = 0; tap < taps; ++tap)
            multiply(sums, origin + (at[2 * tap] * pitch + at[2 * tap + 1] + column) * inputs, inputs,
                     weight + tap * inputs * N * LANES, inputs);
        finish(sums, column);
    });
}

// sums (M) += K taps side by side of a depthwise kernel; pixels are TILE numbers apart, taps of the weight `apart`.
template <int K, int M>
inline __attribute__((always_inline)) void slide(
    Vector (&sums)[M], const float* from, const float* weight, int64_t apart) {
    Vector pixels[M + K - 1];
#pragma GCC unroll 12
    for (int m = 0; m < M + K - 1; ++m) pixels[m] = load(from + m * TILE);
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) {
        const Vector tap = load(weight + k * apart);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m] += pixels[m + k] * tap;
    }
}

// As `slide` for one tap, with `stride` pixels from one output to the next.
template <int M>
inline __attribute__((always_inline)) void stride_over(
    Vector (&sums)[M], const float* from, const float* weight, int64_t stride) {
    const Vector tap = load(weight);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += load(from + m * stride * TILE) * tap;
}

// A row of a depthwise convolution of N vectors of channels, activated. `at`: taps, row after row.
template <class Activation, int N>
inline void convolve_depthwise_row(const float* origin, int64_t pitch, int64_t width, int64_t stride, int64_t taps,
                                   const int64_t* at, const float* weight, const float* bias, float* to) {
    for (int v = 0; v < N; ++v)
        over_blocks(width, [&](auto pixels, int64_t column) {
            constexpr int M = pixels;
            Vector sums[M];
            for (int m = 0; m < M; ++m) sums[m] = load(bias + v * LANES);
            int64_t tap = 0;
            while (tap < taps) {
                const int64_t pixel = at[2 * tap] * pitch + at[2 * tap + 1] + column * stride;
                const float* from = origin + pixel * TILE + v * LANES;
                const float* kernel = weight + (tap * N + v) * LANES;
                const auto beside = [&](int64_t count) {
                    const int64_t last = tap + count - 1;
                    return stride == 1 && last < taps && at[2 * last] == at[2 * tap]
                        && at[2 * last + 1] == at[2 * tap + 1] + count - 1;
                };
                if (beside(5)) {
                    slide<5>(sums, from, kernel, N * LANES);
                    tap += 5;
                } else if (beside(3)) {
                    slide<3>(sums, from, kernel, N * LANES);
                    tap += 3;
                } else {
                    stride_over(sums, from, kernel, stride);
                    tap += 1;
                }
            }
            for (int m = 0; m < M; ++m) store(to + (column + m) * TILE + v * LANES, Activation::of(sums[m]));
        });
}

inline int64_t padded(int64_t channels) { return (channels + PADDING - 1) / PADDING * PADDING; }

}  // namespace

// ------------------------------------------------------------------------------------------------ single convolutions

extern "C" {

// As in nvae/inference.py, which fills it.
struct Convolution {
    int64_t images, height, width, inputs, outputs;  // outputs without padding
    int64_t taps, reach;                             // reach: the largest |offset|
    int64_t elu, bfloat16, strips, threads;
    const float *weight, *bias;  // packed (taps · C, O), (O)
    const int64_t* at;           // (taps, 2): row and column offsets
    const void* x;               // (B, H, W, C)
    void* out;                   // (B, H, W, O)
};
}

namespace {

template <class T>
void convolve(const Convolution& p, const Strip& strip, Buffer& scratch) {
    const int64_t pitch = p.width + 2 * p.reach, rows = strip.rows() + 2 * p.reach;
    float* input = scratch.of(rows * pitch * p.inputs);
    const auto reading = p.elu ? read<T, Elu> : read<T, Identity>;
    reading(p.x, p.height, p.width, p.inputs, strip.image, strip.first - p.reach, rows, p.reach, input);
    over_tiles(padded(p.outputs), [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        const float* weight = p.weight + channel * p.taps * p.inputs;
        for (int64_t row = strip.first; row < strip.last; ++row) {
            const float* origin = input + ((row - strip.first + p.reach) * pitch + p.reach) * p.inputs;
            T* to = static_cast<T*>(p.out) + (strip.image * p.height + row) * p.width * p.outputs + channel;
            convolve_row<N>(origin, pitch, p.inputs, p.width, p.taps, p.at, weight, p.bias + channel,
                            [&](const auto& sums, int64_t column) {
                                for (const auto& pixel : sums) {
                                    T* at = to + column++ * p.outputs;
                                    for (int v = 0; v < N; ++v)
                                        store_some(at + v * LANES, pixel[v], p.outputs - channel - v * LANES);
                                }
                            });
        }
    });
}

}  // namespace

extern "C" void convolution(const Convolution* problem) {
    const Convolution& p = *problem;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
    for (int64_t task = 0; task < p.images * p.strips; ++task) {
        thread_local Buffer scratch;
        const Strip strip(task, p.strips, p.height);
        if (p.bfloat16)
            convolve<BFloat16>(p, strip, scratch);
        else
            convolve<float>(p, strip, scratch);
    }
}

// ----------------------------------------------------------------------------------------------- inverted bottlenecks

extern "C" {

// As in nvae/inference.py, which fills it.
struct Bottleneck {
    int64_t images, height, width, inputs;
    int64_t hidden, outputs, stride, enlarge;  // hidden with padding, outputs without; enlarge² phases
    int64_t expand_taps, expand_reach, spatial_taps, spatial_reach;  // reach: the largest |offset|
    int64_t elu, squeezed, bfloat16, strips, threads;
    float scale;
    const float *expand, *expand_bias;      // packed (taps · C, E), (E)
    const float *spatial, *spatial_bias;    // packed (phases · taps, E), (E)
    const float *project, *project_bias;    // packed (E, O), (O)
    const int64_t *expand_at, *spatial_at;  // (taps, 2): row and column offsets, the same in all phases
    const float *squeeze, *squeeze_bias, *excite, *excite_bias;  // (S, O), (S), (O, S), (O)
    const void *x, *skip;                   // (B, H, W, C), (B, enlarge · h, enlarge · w, O)
    void* out;                              // as skip
    float *y, *sums;  // where a gate waits for several strips: (tasks, most numbers of a strip), (tasks, O padded)
};
}

namespace {

struct Sizes {
    int64_t phases, h, w, outputs;      // of the output; channels padded
    int64_t input_pitch, hidden_pitch;  // pixels from row to row

    explicit Sizes(const Bottleneck& p)
        : phases(p.enlarge * p.enlarge),
          h((p.height + p.stride - 1) / p.stride),
          w((p.width + p.stride - 1) / p.stride),
          outputs(padded(p.outputs)),
          input_pitch(p.width + 2 * p.expand_reach),
          hidden_pitch(p.width + 2 * p.spatial_reach) {}
    int64_t numbers(const Strip& strip) const { return phases * strip.rows() * w * outputs; }
};

struct Scratch {
    Buffer input, hidden, spatial, y, sums, factors;
};

// y of a strip (phases, rows, w, O padded): every tile of the hidden channels in turn.
template <class T, class Inner, class Outer>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    const int64_t top = strip.first * p.stride - p.spatial_reach;  // the image's row that the hidden ones start at
    const int64_t rows = (strip.rows() - 1) * p.stride + 1 + 2 * p.spatial_reach;
    const int64_t read_rows = rows + 2 * p.expand_reach, hidden_size = rows * n.hidden_pitch * TILE;
    float* input = scratch.input.of(read_rows * n.input_pitch * p.inputs);
    float *hidden = scratch.hidden.of(hidden_size), *spatial = scratch.spatial.of(n.w * TILE);
    const int64_t first_row = top - p.expand_reach;
    read<T, Identity>(p.x, p.height, p.width, p.inputs, strip.image, first_row, read_rows, p.expand_reach, input);
    std::fill_n(hidden, hidden_size, 0.0f);  // around the image it stays so

    over_tiles(p.hidden, [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        for (int64_t i = std::max<int64_t>(-top, 0); i < std::min(rows, p.height - top); ++i) {
            const float* origin = input + ((i + p.expand_reach) * n.input_pitch + p.expand_reach) * p.inputs;
            float* to = hidden + (i * n.hidden_pitch + p.spatial_reach) * TILE;
            convolve_row<N>(origin, n.input_pitch, p.inputs, p.width, p.expand_taps, p.expand_at,
                            p.expand + channel * p.expand_taps * p.inputs, p.expand_bias + channel,
                            [&](const auto& sums, int64_t column) {
                                for (const auto& pixel : sums) {
                                    float* at = to + column++ * TILE;
                                    for (int v = 0; v < N; ++v) store(at + v * LANES, Inner::of(pixel[v]));
                                }
                            });
        }
        for (int64_t row = 0; row < strip.rows(); ++row)
            for (int64_t phase = 0; phase < n.phases; ++phase) {
                const float* origin =
                    hidden + ((row * p.stride + p.spatial_reach) * n.hidden_pitch + p.spatial_reach) * TILE;
                const float* kernel = p.spatial + (channel * n.phases + phase * N * LANES) * p.spatial_taps;
                convolve_depthwise_row<Outer, N>(origin, n.hidden_pitch, n.w, p.stride, p.spatial_taps, p.spatial_at,
                                                 kernel, p.spatial_bias + channel, spatial);
                float* sums_row = y + (phase * strip.rows() + row) * n.w * n.outputs;
                over_tiles(n.outputs, [&](auto out_vectors, int64_t output) {
                    constexpr int O = out_vectors;
                    const float* weight = p.project + output * p.hidden + channel * O * LANES;
                    over_blocks(n.w, [&](auto pixels, int64_t column) {
                        constexpr int M = pixels;
                        float* to = sums_row + column * n.outputs + output;
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

template <class T>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    if (p.elu)
        convolve<T, Elu, EluTwice>(p, n, strip, scratch, y);
    else
        convolve<T, Swish, Swish>(p, n, strip, scratch, y);
}

// The sum of y (pixels, O padded) over the pixels of a strip.
void sum(const Sizes& n, const Strip& strip, const float* y, float* sums) {
    std::fill_n(sums, n.outputs, 0.0f);
    for (const float* end = y + n.numbers(strip); y < end; y += n.outputs)
        for (int64_t o = 0; o < n.outputs; ++o) sums[o] += y[o];
}

// What each output channel of an image is multiplied with: scale, times the gate of squeeze-and-excitation. `sums` are
// those of the image's strips.
void find_factors(const Bottleneck& p, const Sizes& n, const float* sums, float* factors) {
    std::fill_n(factors, n.outputs, p.scale);
    if (!p.squeezed) return;
    std::vector<float> mean(n.outputs, 0.0f), squeezed(p.squeezed);
    for (int64_t s = 0; s < p.strips; ++s)
        for (int64_t o = 0; o < n.outputs; ++o) mean[o] += sums[s * n.outputs + o];
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
void add(const Bottleneck& p, const Sizes& n, const Strip& strip, const float* y, const float* factors) {
    for (int64_t phase = 0; phase < n.phases; ++phase)
        for (int64_t row = strip.first; row < strip.last; ++row) {
            const int64_t out_row = (strip.image * n.h + row) * p.enlarge + phase / p.enlarge;
            int64_t at = (out_row * n.w * p.enlarge + phase % p.enlarge) * p.outputs;
            for (int64_t column = 0; column < n.w; ++column, y += n.outputs, at += p.enlarge * p.outputs) {
                const T* skip = static_cast<const T*>(p.skip) + at;
                T* out = static_cast<T*>(p.out) + at;
                for (int64_t o = 0; o < p.outputs; ++o) assign(out[o], widened(skip[o]) + factors[o] * y[o]);
            }
        }
}

// A strip at a time; or, where a gate waits for several strips, all of their y first, then the gates and sums.
template <class T>
void run(const Bottleneck& p) {
    const Sizes n(p);
    const int64_t tasks = p.images * p.strips, most = (n.h + p.strips - 1) / p.strips * n.phases * n.w * n.outputs;
#pragma omp parallel num_threads(p.threads)
    {
        thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const Strip strip(task, p.strips, n.h);
            float* y = p.y ? p.y + task * most : scratch.y.of(most);
            float* sums = p.y ? p.sums + task * n.outputs : scratch.sums.of(n.outputs);
            convolve<T>(p, n, strip, scratch, y);
            if (p.squeezed) sum(n, strip, y, sums);
            if (p.y) continue;
            float* factors = scratch.factors.of(n.outputs);
            find_factors(p, n, sums, factors);
            add<T>(p, n, strip, y, factors);
        }
        if (p.y) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                float* factors = scratch.factors.of(n.outputs);
                find_factors(p, n, p.sums + task / p.strips * p.strips * n.outputs, factors);
                add<T>(p, n, Strip(task, p.strips, n.h), p.y + task * most, factors);
            }
        }
    }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ latents

extern "C" {

// As in nvae/inference.py, which fills it.
struct Normal {
    int64_t images, pixels, channels, terms;  // of one image; channels of the Normal
    int64_t repeated[3], bfloat16[3], threads;  // after how many images a term starts over; its type
    float temperature;
    const void* raw[3];  // (repeated, pixels, 2 · channels), to be summed
    float *mean, *sigma;  // (B, pixels, channels)
};

// As in nvae/inference.py, which fills it.
struct Score {
    int64_t images, pixels, channels, closed, threads;
    const float *q_mean, *q_sigma, *p_mean, *p_sigma;  // (B, pixels, channels)
    const float *drawn, *z;                            // likewise
    float *divergence, *log_q, *log_p;                 // (B, channels) each
};
}

namespace {

constexpr int64_t FEW = 8;  // pixels at once: what is between stays in the nearest cache

template <class T>
void add_widened(const void* raw, int64_t offset, int64_t size, float* sums) {
    for (int64_t e = 0; e < size; ++e) sums[e] += widened((static_cast<const T*>(raw) + offset)[e]);
}

void find(const Normal& p, int64_t image, int64_t first, int64_t count, float* sums) {
    const int64_t pixel_size = 2 * p.channels, size = count * pixel_size;
    std::fill_n(sums, size, 0.0f);
    for (int64_t term = 0; term < p.terms; ++term) {
        const int64_t offset = (image % p.repeated[term] * p.pixels + first) * pixel_size;
        if (p.bfloat16[term])
            add_widened<BFloat16>(p.raw[term], offset, size, sums);
        else
            add_widened<float>(p.raw[term], offset, size, sums);
    }
    over_vectors(sums, size, soft_clamp);
    const int64_t to = (image * p.pixels + first) * p.channels;
    for (int64_t i = 0; i < count; ++i) {
        std::copy_n(sums + i * pixel_size, p.channels, p.mean + to + i * p.channels);
        std::copy_n(sums + i * pixel_size + p.channels, p.channels, p.sigma + to + i * p.channels);
    }
    over_vectors(p.sigma + to, count * p.channels,
                 [&](Vector log_sigma) { return (power_of_two(log_sigma, LOG2_E) + 0.01f) * p.temperature; });
}

// Log densities of one image, summed over its pixels; and their difference, or the divergence in closed form.
void score(const Score& p, int64_t image, Buffer& scratch) {
    constexpr float HALF_LOG_2PI = 0.918938533f;
    const int64_t few = FEW * p.channels;
    float *differences = scratch.of(3 * few), *q_densities = differences + few, *p_densities = q_densities + few;
    std::fill_n(differences, 3 * few, 0.0f);  // (FEW, channels) each
    for (int64_t first = 0; first < p.pixels; first += FEW) {
        const int64_t offset = (image * p.pixels + first) * p.channels;
        const int64_t size = std::min(FEW, p.pixels - first) * p.channels;
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t at = offset + i, count = size - i;
            const Vector q_mean = load_some(p.q_mean + at, count, 0.0f);
            const Vector p_mean = load_some(p.p_mean + at, count, 0.0f);
            const Vector q_sigma = load_some(p.q_sigma + at, count, 1.0f);
            const Vector p_sigma = load_some(p.p_sigma + at, count, 1.0f);
            const Vector log_q_sigma = logarithm(q_sigma), log_p_sigma = logarithm(p_sigma);
            const Vector per_p = reciprocal(p_sigma);
            const Vector q_noise = (load_some(p.drawn + at, count, 0.0f) - q_mean) * reciprocal(q_sigma);
            const Vector p_noise = (load_some(p.z + at, count, 0.0f) - p_mean) * per_p;
            const Vector q_density = -0.5f * q_noise * q_noise - HALF_LOG_2PI - log_q_sigma;
            const Vector p_density = -0.5f * p_noise * p_noise - HALF_LOG_2PI - log_p_sigma;
            const Vector apart = (q_mean - p_mean) * per_p, ratio = q_sigma * per_p;
            const Vector exact = 0.5f * (apart * apart + ratio * ratio) - 0.5f - (log_q_sigma - log_p_sigma);
            add_some(differences + i, p.closed ? exact : q_density - p_density, count);
            add_some(q_densities + i, q_density, count);
            add_some(p_densities + i, p_density, count);
        }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
        float sums[3] = {};
        for (int64_t i = 0; i < FEW; ++i)
            for (int64_t kind = 0; kind < 3; ++kind) sums[kind] += differences[kind * few + i * p.channels + c];
        p.divergence[image * p.channels + c] = sums[0];
        p.log_q[image * p.channels + c] = sums[1];
        p.log_p[image * p.channels + c] = sums[2];
    }
}

}  // namespace

extern "C" {

// Normals from the sum of raw parameters (spec §3).
void normal(const Normal* problem) {
    const Normal& p = *problem;
    const int64_t parts = (p.pixels + FEW - 1) / FEW;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t task = 0; task < p.images * parts; ++task) {
        thread_local Buffer sums;
        const int64_t first = task % parts * FEW, count = std::min(FEW, p.pixels - first);
        find(p, task / parts, first, count, sums.of(FEW * 2 * p.channels));
    }
}

void score(const Score* problem) {
#pragma omp parallel for num_threads(problem->threads)
    for (int64_t image = 0; image < problem->images; ++image) {
        thread_local Buffer scratch;
        score(*problem, image, scratch);
    }
}

// out = skip + scale · gate(mean of y) · y, with y = project(outer(spatial(inner(expand(x))))).
void bottleneck(const Bottleneck* problem) {
    if (problem->bfloat16)
        run<BFloat16>(*problem);
    else
        run<float>(*problem);
}

// (depth, channels) -> tile after tile of the channels, each (depth, channels of the tile); channels come padded.
void pack(const float* from, int64_t depth, int64_t channels, float* to) {
    over_tiles(channels, [&](auto vectors, int64_t channel) {
        for (int64_t k = 0; k < depth; ++k, to += vectors * LANES)
            std::copy_n(from + k * channels + channel, vectors * LANES, to);
    });
}
}
