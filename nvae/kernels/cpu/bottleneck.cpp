// Convolutions for inference on a CPU (nvae/bricks/bottleneck.py says what they compute): single ones with an activation before
// them, and inverted bottlenecks: a convolution to many channels, a depthwise one and a 1×1 convolution to few channels,
// with activations between and a gated sum at the end (spec §1 and §3).
//
// What is between a bottleneck's convolutions never reaches memory: of a strip of rows, a tile of the many channels is
// made, convolved and summed into the few, then the next tile, all in the nearest caches. Arithmetic is float32, or float16
// where the caller gives weights for it; a strip whose result is then not finite is computed again in float32.
//
// Shapes: B images, H W space of the input, h w of a phase of the output (H/stride); C inputs, E hidden, O outputs.
// Images are channels-last. Hidden and output channels of weights are padded with zeros to a multiple of PADDING.

#include "products.h"

#include <vector>

namespace {

// Images whose channels lie in two tensors, or in one. Rows of an image from `top` on, some maybe outside it, activated,
// with zeros around the image. Writes up to LANES factors beyond.
struct Images {
    const void *first, *second;
    int64_t first_channels, second_channels, height, width;

    int64_t channels() const { return first_channels + second_channels; }

    template <class A, class T, class Activation>
    void read(int64_t image, int64_t top, int64_t rows, int64_t border, typename A::Factor* to) const {
        const int64_t side = border * channels(), row_size = width * channels();
        for (int64_t i = 0; i < rows; ++i, to += row_size + 2 * side) {
            if (top + i < 0 || top + i >= height) {
                std::fill_n(to, row_size + 2 * side, 0);
                continue;
            }
            const int64_t row = image * height + top + i;
            std::fill_n(to, side, 0);
            if (second_channels)
                for (int64_t pixel = 0; pixel < width; ++pixel) {
                    auto* at = to + side + pixel * channels();
                    read<A, T, Activation>(first, row * width + pixel, first_channels, at);
                    read<A, T, Activation>(second, row * width + pixel, second_channels, at + first_channels);
                }
            else
                read<A, T, Activation>(first, row, row_size, to + side);
            std::fill_n(to + side + row_size, side, 0);
        }
    }

private:
    // The index-th `size` numbers.
    template <class A, class T, class Activation>
    static void read(const void* x, int64_t index, int64_t size, typename A::Factor* to) {
        const T* from = static_cast<const T*>(x) + index * size;
        for (int64_t e = 0; e < size; e += LANES)
            A::to_factors(to + e, Activation::of(load_some(from + e, size - e, 0.0f)));
    }
};

template <class T>
bool all_finite(const T* x, int64_t size) {
    constexpr uint32_t EXPONENT = 0x7f800000;
    bool found = false;
    for (int64_t i = 0; i < size; ++i) {
        const float value = widened(x[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        found |= (bits & EXPONENT) == EXPONENT;
    }
    return !found;
}

// --------------------------------------------------------------------------------------------------------- products

template <class A>
constexpr int TILE = VECTORS * A::LANES;  // most hidden channels in memory at once

// A row of a depthwise convolution of N vectors of channels, activated. `at`: taps, row after row.
template <class A, class Activation, int N>
inline void convolve_depthwise_row(const typename A::Number* origin, int64_t pitch, int64_t width, int64_t stride,
                                   int64_t taps, const int64_t* at, const typename A::Number* weight,
                                   const float* bias, typename A::Factor* to) {
    for (int v = 0; v < N; ++v)
        over_blocks(width, [&](auto pixels, int64_t column) {
            constexpr int M = pixels;
            typename A::Vector sums[M];
            for (int m = 0; m < M; ++m) sums[m] = A::from_floats(bias + v * A::LANES);
            int64_t tap = 0;
            while (tap < taps) {
                const int64_t pixel = at[2 * tap] * pitch + at[2 * tap + 1] + column * stride;
                const typename A::Number* from = origin + pixel * TILE<A> + v * A::LANES;
                const typename A::Number* kernel = weight + (tap * N + v) * A::LANES;
                const auto beside = [&](int64_t count) {
                    const int64_t last = tap + count - 1;
                    return stride == 1 && last < taps && at[2 * last] == at[2 * tap]
                        && at[2 * last + 1] == at[2 * tap + 1] + count - 1;
                };
                if (beside(5)) {
                    slide<A, 5, TILE<A>>(sums, from, kernel, N * A::LANES);
                    tap += 5;
                } else if (beside(3)) {
                    slide<A, 3, TILE<A>>(sums, from, kernel, N * A::LANES);
                    tap += 3;
                } else {
                    stride_over<A, TILE<A>>(sums, from, kernel, stride);
                    tap += 1;
                }
            }
            for (int m = 0; m < M; ++m)
                A::to_factors(to + (column + m) * TILE<A> + v * A::LANES, Activation::of(sums[m]));
        });
}

}  // namespace

// ------------------------------------------------------------------------------------------------ single convolutions

extern "C" {

// As in nvae/bricks/bottleneck.py, which fills it.
struct Convolution {
    int64_t images, height, width, inputs, other_inputs, outputs;  // outputs without padding
    int64_t taps, reach;                                           // reach: the largest |offset|
    int64_t activation;                                            // 0 none, 1 ELU, 2 swish
    int64_t bfloat16, float16, strips, threads;                    // bfloat16: the tensors; float16: the arithmetic
    const void* weight[2];                                         // packed (taps · C, O), in float32 and float16
    const float* bias;                                             // (O)
    const int64_t* at;                                             // (taps, 2): row and column offsets
    const void *x, *other;  // (B, H, W, inputs) and, unless there are none, (B, H, W, other_inputs); C is both
    void* out;              // (B, H, W, O)
};
}

namespace {

template <class A, class T>
void convolve(const Convolution& p, const Strip& strip, Buffer& scratch, T* out) {
    const Images images{p.x, p.other, p.inputs, p.other_inputs, p.height, p.width};
    const int64_t inputs = images.channels(), pitch = p.width + 2 * p.reach, rows = strip.rows() + 2 * p.reach;
    auto* input = scratch.of<typename A::Factor>(rows * pitch * inputs + LANES);
    const auto read = [&](auto activation) {
        images.read<A, T, decltype(activation)>(strip.image, strip.first - p.reach, rows, p.reach, input);
    };
    if (p.activation == 0) read(Identity{});
    if (p.activation == 1) read(Elu{});
    if (p.activation == 2) read(Swish{});
    over_tiles<A>(padded<A>(p.outputs), [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        const auto* weight = static_cast<const typename A::Number*>(p.weight[A::INDEX]) + channel * p.taps * inputs;
        for (int64_t row = 0; row < strip.rows(); ++row) {
            const auto* origin = input + ((row + p.reach) * pitch + p.reach) * inputs;
            T* to = out + row * p.width * p.outputs + channel;
            convolve_row<A, N>(origin, pitch, inputs, p.width, p.taps, p.at, weight, p.bias + channel,
                               [&](const auto& sums, int64_t column) {
                                   for (int m = 0; m < sums.PIXELS; ++m)
                                       for (int v = 0; v < N; ++v)
                                           sums.write(m, v, to + (column + m) * p.outputs + v * A::LANES,
                                                      p.outputs - channel - v * A::LANES);
                               });
        }
    });
}

template <class T>
void convolve(const Convolution& p, const Strip& strip, Buffer& scratch) {
    const int64_t row_size = p.width * p.outputs;
    T* out = static_cast<T*>(p.out) + (strip.image * p.height + strip.first) * row_size;
    if (p.float16) {
        convolve<Float16>(p, strip, scratch, out);
        if (all_finite(out, strip.rows() * row_size)) return;
    }
    convolve<Float32>(p, strip, scratch, out);
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

// As in nvae/bricks/bottleneck.py, which fills it.
struct Bottleneck {
    int64_t images, height, width, inputs;
    int64_t hidden, outputs, stride, enlarge;                        // without padding; enlarge² phases
    int64_t expand_taps, expand_reach, spatial_taps, spatial_reach;  // reach: the largest |offset|
    int64_t elu, squeezed, bfloat16, float16, strips, threads;       // bfloat16: the tensors; float16: the arithmetic
    float scale;
    // Packed (taps · C, E), (phases · taps, E) and (E, O), in float32 and float16.
    const void *expand[2], *spatial[2], *project[2];
    const float *expand_bias, *spatial_bias, *project_bias;  // (E), (E), (O)
    const int64_t *expand_at, *spatial_at;  // (taps, 2): row and column offsets, the same in all phases
    const float *squeeze, *squeeze_bias, *excite, *excite_bias;  // (S, O), (S), (O, S), (O)
    const void *x, *skip;                   // (B, H, W, C), (B, enlarge · h, enlarge · w, O)
    void* out;                              // as skip
    float *y, *sums;  // where a gate waits for several strips: (tasks, most numbers of a strip), (tasks, O padded)
};
}

namespace {

constexpr int64_t MOST_PADDING = 32;  // for any arithmetic
inline int64_t most_padded(int64_t channels) { return (channels + MOST_PADDING - 1) / MOST_PADDING * MOST_PADDING; }

struct Sizes {
    int64_t phases, h, w, outputs;      // of the output; channels as they lie in y
    int64_t input_pitch, hidden_pitch;  // pixels from row to row

    explicit Sizes(const Bottleneck& p)
        : phases(p.enlarge * p.enlarge),
          h((p.height + p.stride - 1) / p.stride),
          w((p.width + p.stride - 1) / p.stride),
          outputs(most_padded(p.outputs)),
          input_pitch(p.width + 2 * p.expand_reach),
          hidden_pitch(p.width + 2 * p.spatial_reach) {}
    int64_t numbers(const Strip& strip) const { return phases * strip.rows() * w * outputs; }
};

struct Scratch {
    Buffer input, hidden, spatial, y, sums, factors;
};

// y of a strip (phases, rows, w, O padded): every tile of the hidden channels in turn.
template <class A, class T, class Inner, class Outer>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    using Number = typename A::Number;
    using Factor = typename A::Factor;
    const int64_t depth = most_padded(p.hidden), outputs = padded<A>(p.outputs);
    const int64_t top = strip.first * p.stride - p.spatial_reach;  // the image's row that the hidden ones start at
    const int64_t rows = (strip.rows() - 1) * p.stride + 1 + 2 * p.spatial_reach;
    const int64_t read_rows = rows + 2 * p.expand_reach, hidden_size = rows * n.hidden_pitch * TILE<A>;
    Factor* input = scratch.input.of<Factor>(read_rows * n.input_pitch * p.inputs + LANES);
    Number* hidden = scratch.hidden.of<Number>(hidden_size);
    Factor* spatial = scratch.spatial.of<Factor>(n.w * TILE<A>);
    const Images images{p.x, nullptr, p.inputs, 0, p.height, p.width};
    images.read<A, T, Identity>(strip.image, top - p.expand_reach, read_rows, p.expand_reach, input);
    std::fill_n(hidden, hidden_size, Number(0));  // around the image it stays so
    const auto weights = [](const void* const(&packed)[2]) { return static_cast<const Number*>(packed[A::INDEX]); };

    over_tiles<A>(padded<A>(p.hidden), [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        for (int64_t i = std::max<int64_t>(-top, 0); i < std::min(rows, p.height - top); ++i) {
            const Factor* origin = input + ((i + p.expand_reach) * n.input_pitch + p.expand_reach) * p.inputs;
            Number* to = hidden + (i * n.hidden_pitch + p.spatial_reach) * TILE<A>;
            convolve_row<A, N>(origin, n.input_pitch, p.inputs, p.width, p.expand_taps, p.expand_at,
                               weights(p.expand) + channel * p.expand_taps * p.inputs, p.expand_bias + channel,
                               [&](const auto& sums, int64_t column) {
                                   for (int m = 0; m < sums.PIXELS; ++m)
                                       for (int v = 0; v < N; ++v)
                                           store(to + (column + m) * TILE<A> + v * A::LANES,
                                                 Inner::of(sums.number(m, v)));
                               });
        }
        for (int64_t row = 0; row < strip.rows(); ++row)
            for (int64_t phase = 0; phase < n.phases; ++phase) {
                const Number* origin =
                    hidden + ((row * p.stride + p.spatial_reach) * n.hidden_pitch + p.spatial_reach) * TILE<A>;
                const int64_t first_tap = (channel * n.phases + phase * N * A::LANES) * p.spatial_taps;
                convolve_depthwise_row<A, Outer, N>(origin, n.hidden_pitch, n.w, p.stride, p.spatial_taps, p.spatial_at,
                                                    weights(p.spatial) + first_tap, p.spatial_bias + channel, spatial);
                float* sums_row = y + (phase * strip.rows() + row) * n.w * n.outputs;
                over_tiles<A>(outputs, [&](auto out_vectors, int64_t output) {
                    constexpr int O = out_vectors;
                    const Number* weight = weights(p.project) + output * depth + channel * O * A::LANES;
                    over_blocks(n.w, [&](auto pixels, int64_t column) {
                        constexpr int M = pixels;
                        typename A::Vector sums[M][O] = {};
                        multiply<A>(sums, spatial + column * TILE<A>, TILE<A>, weight, N * A::LANES);
                        for (int m = 0; m < M; ++m)
                            for (int v = 0; v < O; ++v) {
                                float* to = sums_row + (column + m) * n.outputs + output + v * A::LANES;
                                A::add(to, channel ? to : p.project_bias + output + v * A::LANES, sums[m][v]);
                            }
                    });
                });
            }
    });
}

template <class A, class T>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    if (p.elu)
        convolve<A, T, Elu, EluTwice>(p, n, strip, scratch, y);
    else
        convolve<A, T, Swish, Swish>(p, n, strip, scratch, y);
}

template <class T>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    if (p.float16) {
        convolve<Float16, T>(p, n, strip, scratch, y);
        if (all_finite(y, n.numbers(strip))) return;
    }
    convolve<Float32, T>(p, n, strip, scratch, y);
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
            float* y = p.y ? p.y + task * most : scratch.y.of<float>(most);
            float* sums = p.y ? p.sums + task * n.outputs : scratch.sums.of<float>(n.outputs);
            convolve<T>(p, n, strip, scratch, y);
            if (p.squeezed) sum(n, strip, y, sums);
            if (p.y) continue;
            float* factors = scratch.factors.of<float>(n.outputs);
            find_factors(p, n, sums, factors);
            add<T>(p, n, strip, y, factors);
        }
        if (p.y) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; ++task) {
                float* factors = scratch.factors.of<float>(n.outputs);
                find_factors(p, n, p.sums + task / p.strips * p.strips * n.outputs, factors);
                add<T>(p, n, Strip(task, p.strips, n.h), p.y + task * most, factors);
            }
        }
    }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ latents

extern "C" {

// As in nvae/bricks/bottleneck.py, which fills it.
struct Normal {
    int64_t images, pixels, channels, terms;  // of one image; channels of the Normal
    int64_t repeated[3], bfloat16[3], threads;  // after how many images a term starts over; its type
    float temperature;
    const void* raw[3];  // (repeated, pixels, 2 · channels), to be summed
    float *mean, *sigma;  // (B, pixels, channels)
};

// As in nvae/bricks/bottleneck.py, which fills it.
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
                 [&](Floats log_sigma) { return (power_of_two(log_sigma, LOG2_E) + 0.01f) * p.temperature; });
}

// Log densities of one image, summed over its pixels; and their difference, or the divergence in closed form.
void score(const Score& p, int64_t image, Buffer& scratch) {
    constexpr float HALF_LOG_2PI = 0.918938533f;
    const int64_t few = FEW * p.channels;
    float *differences = scratch.of<float>(3 * few), *q_densities = differences + few, *p_densities = q_densities + few;
    std::fill_n(differences, 3 * few, 0.0f);  // (FEW, channels) each
    for (int64_t first = 0; first < p.pixels; first += FEW) {
        const int64_t offset = (image * p.pixels + first) * p.channels;
        const int64_t size = std::min(FEW, p.pixels - first) * p.channels;
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t at = offset + i, count = size - i;
            const Floats q_mean = load_some(p.q_mean + at, count, 0.0f);
            const Floats p_mean = load_some(p.p_mean + at, count, 0.0f);
            const Floats q_sigma = load_some(p.q_sigma + at, count, 1.0f);
            const Floats p_sigma = load_some(p.p_sigma + at, count, 1.0f);
            const Floats log_q_sigma = logarithm(q_sigma), log_p_sigma = logarithm(p_sigma);
            const Floats per_p = reciprocal(p_sigma);
            const Floats q_noise = (load_some(p.drawn + at, count, 0.0f) - q_mean) * reciprocal(q_sigma);
            const Floats p_noise = (load_some(p.z + at, count, 0.0f) - p_mean) * per_p;
            const Floats q_density = -0.5f * q_noise * q_noise - HALF_LOG_2PI - log_q_sigma;
            const Floats p_density = -0.5f * p_noise * p_noise - HALF_LOG_2PI - log_p_sigma;
            const Floats apart = (q_mean - p_mean) * per_p, ratio = q_sigma * per_p;
            const Floats exact = 0.5f * (apart * apart + ratio * ratio) - 0.5f - (log_q_sigma - log_p_sigma);
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

template <class A>
void pack_as(const float* from, int64_t depth, int64_t channels, typename A::Number* to) {
    over_tiles<A>(channels, [&](auto vectors, int64_t channel) {
        for (int64_t k = 0; k < depth; ++k, to += vectors * A::LANES)
            std::copy_n(from + k * channels + channel, vectors * A::LANES, to);
    });
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
        find(p, task / parts, first, count, sums.of<float>(FEW * 2 * p.channels));
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
void pack(const float* from, int64_t depth, int64_t channels, float* to) { pack_as<Float32>(from, depth, channels, to); }
void pack_float16(const float* from, int64_t depth, int64_t channels, void* to) {
    pack_as<Float16>(from, depth, channels, static_cast<Float16::Number*>(to));
}

// Whether this processor has arithmetic in float16.
int64_t has_float16() { return HAS_FLOAT16; }
}
