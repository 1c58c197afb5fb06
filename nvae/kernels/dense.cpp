// Dense convolutions of bfloat16 tensors at stride 1, and their gradients, in float16 (nvae/dense.py says when).
//
// Shapes: B images, H W space; C inputs, O outputs; kh kw of a kernel, T taps, kh · kw.

#include "bfloat16.h"

extern "C" {

// As in nvae/dense.py, which fills it. A result's pixel sees taps from (−top, −left) on, `dilation` pixels apart.
// `turned`: with the kernel's inputs as outputs, and its taps the other way round.
struct Dense {
    int64_t images, height, width, inputs, outputs, rows, columns, top, left, dilation, turned, threads;
    const BFloat16 *x, *weight;  // (B, H, W, C), (O, kh, kw, C); turned, (C, kh, kw, O)
    const float* bias;           // (O), or null
    BFloat16* out;               // (B, H, W, O)
};

struct DenseGradients {
    int64_t images, height, width, inputs, outputs, rows, columns, top, left, dilation, threads;
    const BFloat16 *grad, *x;  // (B, H, W, O), (B, H, W, C)
    float *weight, *bias;      // (O, kh, kw, C), (O) or null
};
}

#ifdef __AVX512FP16__
#include <omp.h>

#include <vector>

namespace {

constexpr int64_t BLOCK = 8;  // outputs at once in a weight's gradient
constexpr float ZEROS[VECTORS * Float16::LANES] = {};

// Rows of an image, some maybe outside it, with zeros around it.
struct Window {
    int64_t height, width, channels, top, rows, border;

    int64_t pitch() const { return width + 2 * border; }
    int64_t first() const { return std::max<int64_t>(top, 0); }
    int64_t last() const { return std::min(top + rows, height); }

    Scale scale(const BFloat16* image) const {
        const int64_t row_size = width * channels;
        return Scale(largest_of(image + first() * row_size, (last() - first()) * row_size));
    }

    // Calls write(to, from, count) for LANES numbers at a time, of which `count` are the pixel's or row's (none where it
    // is not positive). Pixels come to lie `apart` numbers apart; what is written beyond one belongs to the next.
    template <class Number, class Write>
    void read(const BFloat16* image, int64_t apart, Number* to, Write write) const {
        for (int64_t i = 0; i < rows; ++i, to += pitch() * apart) {
            if (top + i < 0 || top + i >= height) {
                std::fill_n(to, pitch() * apart, 0);
                continue;
            }
            const BFloat16* from = image + (top + i) * width * channels;
            std::fill_n(to, border * apart, 0);
            Number* inside = to + border * apart;
            if (apart == channels)
                for (int64_t e = 0; e < width * channels; e += LANES) write(inside + e, from + e, width * channels - e);
            else
                for (int64_t pixel = 0; pixel < width; ++pixel)
                    for (int64_t e = 0; e < apart; e += LANES)
                        write(inside + pixel * apart + e, from + pixel * channels + e, channels - e);
            std::fill_n(inside + width * apart, border * apart, 0);
        }
    }
};

// The taps of a kernel: (row, column) from the result's pixel.
struct Taps {
    int64_t count, reach = 0;  // reach: the largest |offset|
    std::vector<int64_t> at;   // (T, 2)

    template <class Problem>
    explicit Taps(const Problem& p) : count(p.rows * p.columns) {
        for (int64_t tap = 0; tap < count; ++tap) {
            at.push_back(tap / p.columns * p.dilation - p.top);
            at.push_back(tap % p.columns * p.dilation - p.left);
        }
        for (int64_t offset : at) reach = std::max(reach, std::abs(offset));
    }
    void turn() {
        for (int64_t& offset : at) offset = -offset;
    }
};

// One tap's kernel of a tile of N vectors, (C, N vectors).
void pack(const Dense& p, int64_t tap, int64_t channel, int64_t lanes, float scale, _Float16* to) {
    const int64_t taps = p.rows * p.columns;
    std::fill_n(to, p.inputs * lanes, _Float16(0));
    const int64_t count = std::min(lanes, p.outputs - channel);
    if (p.turned) {
        const BFloat16* from = p.weight + tap * p.outputs + channel;
        for (int64_t k = 0; k < p.inputs; ++k, from += taps * p.outputs, to += lanes)
            for (int64_t lane = 0; lane < count; ++lane) to[lane] = _Float16(widened(from[lane]) * scale);
    } else {
        for (int64_t lane = 0; lane < count; ++lane) {
            const BFloat16* from = p.weight + ((channel + lane) * taps + tap) * p.inputs;
            for (int64_t k = 0; k < p.inputs; ++k) to[k * lanes + lane] = _Float16(widened(from[k]) * scale);
        }
    }
}

struct Scratch {
    Buffer input, grad, sums;
};

void convolve(const Dense& p, const Strip& strip, const Taps& taps, const _Float16* weight, float back,
              const float* bias, Scratch& scratch) {
    const int64_t reach = taps.reach;
    const Window window{p.height, p.width, p.inputs, strip.first - reach, strip.rows() + 2 * reach, reach};
    const BFloat16* image = p.x + strip.image * p.height * p.width * p.inputs;
    const Scale scale = window.scale(image);
    auto* input = scratch.input.of<Float16::Factor>(window.rows * window.pitch() * p.inputs + LANES);
    window.read(image, p.inputs, input, [&](Float16::Factor* to, const BFloat16* from, int64_t count) {
        Float16::to_factors(to, scaled(from, count, scale.there));
    });
    over_tiles<Float16>(padded<Float16>(p.outputs), [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        for (int64_t row = 0; row < strip.rows(); ++row) {
            const auto* origin = input + ((row + reach) * window.pitch() + reach) * p.inputs;
            BFloat16* to = p.out + ((strip.image * p.height + strip.first + row) * p.width) * p.outputs + channel;
            convolve_row<Float16, N>(
                origin, window.pitch(), p.inputs, p.width, taps.count, taps.at.data(),
                weight + channel * taps.count * p.inputs, ZEROS,
                [&](const auto& sums, int64_t column) {
                    for (int m = 0; m < sums.PIXELS; ++m)
                        for (int v = 0; v < 2 * N; ++v) {
                            const int64_t count = p.outputs - channel - v * LANES;
                            if (count <= 0) continue;
                            const Floats value = sums.half(m, v / 2, v % 2) * scale.back * back;
                            store_some(to + (column + m) * p.outputs + v * LANES,
                                       value + load(bias + channel + v * LANES), count);
                        }
                });
        }
    });
}

// part (BLOCK, N) += grad (depth, BLOCK) transposed times x (depth, N vectors).
template <int N>
inline __attribute__((always_inline)) void accumulate(Halves (&part)[BLOCK][N], const Float16::Factor* grad,
                                                      int64_t grad_step, const _Float16* x, int64_t x_step,
                                                      int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, grad += grad_step, x += x_step) {
        Halves row[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) row[n] = load(x + n * Float16::LANES);
#pragma GCC unroll 8
        for (int m = 0; m < BLOCK; ++m) {
            const Halves value = Float16::every(grad[m]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) part[m][n] += value * row[n];
        }
    }
}

// sums (BLOCK, `apart`) += part · back, and part starts over.
template <int N>
inline __attribute__((always_inline)) void flush(Halves (&part)[BLOCK][N], float back, float* sums, int64_t apart) {
#pragma GCC unroll 8
    for (int m = 0; m < BLOCK; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) {
            float* to = sums + m * apart + n * Float16::LANES;
            store(to, load(to) + first_of(part[m][n]) * back);
            store(to + LANES, load(to + LANES) + second_of(part[m][n]) * back);
            part[m][n] = Halves{};
        }
}

inline int64_t in_blocks(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK * BLOCK; }

// Adds a strip's part to sums (T, O in blocks, C padded) and bias (O in blocks + LANES).
void add_gradients(const DenseGradients& p, const Strip& strip, const Taps& taps, float* sums, float* bias,
                   Scratch& scratch) {
    const int64_t reach = taps.reach, inputs = padded<Float16>(p.inputs), outputs = in_blocks(p.outputs);
    const Window around{p.height, p.width, p.inputs, strip.first - reach, strip.rows() + 2 * reach, reach};
    const Window inside{p.height, p.width, p.outputs, strip.first, strip.rows(), 0};
    const BFloat16* image = p.x + strip.image * p.height * p.width * p.inputs;
    const BFloat16* grads = p.grad + strip.image * p.height * p.width * p.outputs;
    const Scale x_scale = around.scale(image), grad_scale = inside.scale(grads);
    auto* x = scratch.input.of<_Float16>(around.rows * around.pitch() * inputs + LANES);
    around.read(image, inputs, x, [&](_Float16* to, const BFloat16* from, int64_t count) {
        _mm256_storeu_ph(to, halved(scaled(from, count, x_scale.there)));
    });
    auto* grad = scratch.grad.of<Float16::Factor>(strip.rows() * p.width * outputs + LANES);
    inside.read(grads, outputs, grad, [&](Float16::Factor* to, const BFloat16* from, int64_t count) {
        Float16::to_factors(to, scaled(from, count, grad_scale.there));
    });
    for (int64_t pixel = 0; p.bias && pixel < strip.rows() * p.width; ++pixel)
        for (int64_t o = 0; o < p.outputs; o += LANES)
            store(bias + o, load(bias + o) + load_some(grads + (strip.first * p.width + pixel) * p.outputs + o,
                                                       p.outputs - o, 0.0f));
    const float back = x_scale.back * grad_scale.back;
    over_tiles<Float16>(inputs, [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        for (int64_t output = 0; output < outputs; output += BLOCK)
            for (int64_t tap = 0; tap < taps.count; ++tap) {
                const int64_t offset = (taps.at[2 * tap] + reach) * around.pitch() + taps.at[2 * tap + 1] + reach;
                float* to = sums + (tap * outputs + output) * inputs + channel;
                Halves part[BLOCK][N] = {};
                int64_t depth = 0;
                for (int64_t row = 0; row < strip.rows(); ++row)
                    for (int64_t column = 0; column < p.width;) {
                        const int64_t count = std::min<int64_t>(p.width - column, DEPTH - depth);
                        accumulate(part, grad + (row * p.width + column) * outputs + output, outputs,
                                   x + (row * around.pitch() + column + offset) * inputs + channel,
                                   inputs, count);
                        column += count, depth += count;
                        if (depth == DEPTH) flush(part, back, to, inputs), depth = 0;
                    }
                flush(part, back, to, inputs);
            }
    });
}

}  // namespace

extern "C" {

void dense(const Dense* problem) {
    const Dense& p = *problem;
    const int64_t outputs = padded<Float16>(p.outputs);
    Taps taps(p);
    if (p.turned) taps.turn();
    const Scale scale(largest_of(p.weight, p.inputs * p.outputs * taps.count));
    thread_local Buffer kernel, offsets;
    _Float16* weight = kernel.of<_Float16>(taps.count * p.inputs * outputs);
    float* bias = offsets.of<float>(outputs);
    std::fill_n(bias, outputs, 0.0f);
    if (p.bias) std::copy_n(p.bias, p.outputs, bias);
    const int64_t row_bytes = sizeof(Float16::Factor) * (p.width + 2 * taps.reach) * p.inputs;
    const int64_t strips = strips_of(p.images, p.height, row_bytes, taps.reach, p.threads);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for
        for (int64_t tap = 0; tap < taps.count; ++tap)
            over_tiles<Float16>(outputs, [&](auto vectors, int64_t channel) {
                constexpr int64_t lanes = vectors * Float16::LANES;
                pack(p, tap, channel, lanes, scale.there, weight + (channel * taps.count + tap * lanes) * p.inputs);
            });
        thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p.images * strips; ++task)
            convolve(p, Strip(task, strips, p.height), taps, weight, scale.back, bias, scratch);
    }
}

// Each thread sums its strips, always the same ones; then all threads' sums are added in their order.
void dense_gradients(const DenseGradients* problem) {
    const DenseGradients& p = *problem;
    const Taps taps(p);
    const int64_t inputs = padded<Float16>(p.inputs), outputs = in_blocks(p.outputs);
    const int64_t sums_size = taps.count * outputs * inputs, bias_size = outputs + LANES;
    const int64_t row_bytes = sizeof(_Float16) * (p.width + 2 * taps.reach) * inputs + 4 * p.width * outputs;
    const int64_t strips = strips_of(p.images, p.height, row_bytes, taps.reach, p.threads);
    std::vector<float*> sums(p.threads, nullptr);
#pragma omp parallel num_threads(p.threads)
    {
        thread_local Scratch scratch;
        float* own = scratch.sums.of<float>(sums_size + bias_size);
        std::fill_n(own, sums_size + bias_size, 0.0f);
        sums[omp_get_thread_num()] = own;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p.images * strips; ++task)
            add_gradients(p, Strip(task, strips, p.height), taps, own, own + sums_size, scratch);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < p.outputs; ++o) {
            if (p.bias) p.bias[o] = 0.0f;
            std::fill_n(p.weight + o * taps.count * p.inputs, taps.count * p.inputs, 0.0f);
            for (const float* found : sums) {
                if (!found) continue;  // fewer threads than were asked for
                if (p.bias) p.bias[o] += found[sums_size + o];
                for (int64_t tap = 0; tap < taps.count; ++tap)
                    for (int64_t c = 0; c < p.inputs; ++c)
                        p.weight[(o * taps.count + tap) * p.inputs + c] += found[(tap * outputs + o) * inputs + c];
            }
        }
    }
}
}
#endif
