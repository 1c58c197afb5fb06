// Depthwise convolutions of bfloat16 tensors, and the gradients of their kernels, in float16 (nvae/depthwise.py says when).
//
// 32 channels of a strip of an image are brought into the nearest cache, with zeros around them, and stay there while all
// taps are summed in registers.
//
// Shapes: B images, H W space of x, h w of y = ceil(H/stride); C channels; k kernel side, T = k · k taps.

#include "bfloat16.h"

extern "C" {

// As in nvae/depthwise.py, which fills it. `turned`: the taps the other way round.
struct Depthwise {
    int64_t images, height, width, channels, size, stride, turned, threads;
    const BFloat16 *x, *weight;  // (B, H, W, C), (C, k, k)
    const float* bias;           // (C), or null
    BFloat16* out;               // (B, h, w, C)
};

struct DepthwiseGradient {
    int64_t images, height, width, channels, size, stride, threads;
    const BFloat16 *grad, *x;  // (B, h, w, C), (B, H, W, C)
    float* weight;             // (C, k, k)
};
}

#ifdef __AVX512FP16__
#include <vector>

namespace {

constexpr int64_t WIDTH = Float16::LANES;  // channels at once
constexpr int64_t MOST_TAPS = 25;          // sums in registers at once

// WIDTH channels, `count` of which there are, of rows of an image; pixels lie `apart` numbers apart.
struct Slice {
    const BFloat16* from;  // the image's first pixel
    int64_t apart, count, height, width, top, rows, border;

    int64_t pitch() const { return width + 2 * border; }
    int64_t size() const { return rows * pitch() * WIDTH; }

    Scale scale() const {
        const __mmask32 some = count >= WIDTH ? ~0u : (1u << count) - 1;
        __m512i most = _mm512_setzero_si512();
        const int64_t first = std::max<int64_t>(top, 0) * width, last = std::min(top + rows, height) * width;
        for (int64_t pixel = first; pixel < last; ++pixel) {
            const __m512i bits = _mm512_maskz_loadu_epi16(some, from + pixel * apart);
            most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
        }
        uint16_t found[WIDTH];
        _mm512_storeu_si512(found, most);
        return Scale(*std::max_element(found, found + WIDTH));
    }

    // (rows, pitch, WIDTH), with zeros around the image.
    void read(float factor, _Float16* to) const {
        for (int64_t i = top; i < top + rows; ++i, to += pitch() * WIDTH) {
            if (i < 0 || i >= height) {
                std::fill_n(to, pitch() * WIDTH, _Float16(0));
                continue;
            }
            std::fill_n(to, border * WIDTH, _Float16(0));
            _Float16* inside = to + border * WIDTH;
            const BFloat16* pixel = from + i * width * apart;
            for (int64_t column = 0; column < width; ++column, inside += WIDTH, pixel += apart)
                store(inside, joined(load_some(pixel, count, 0.0f) * factor,
                                     load_some(pixel + LANES, std::max<int64_t>(count - LANES, 0), 0.0f) * factor));
            std::fill_n(inside, border * WIDTH, _Float16(0));
        }
    }
};

struct Scratch {
    Buffer x, grad;
};

template <class Problem>
int64_t out_height(const Problem& p) { return (p.height + p.stride - 1) / p.stride; }
template <class Problem>
int64_t out_width(const Problem& p) { return (p.width + p.stride - 1) / p.stride; }
template <class Problem>
int64_t slices(const Problem& p) { return (p.channels + WIDTH - 1) / WIDTH; }
template <class Problem>
int64_t strips(const Problem& p) {
    const int64_t row_bytes = sizeof(_Float16) * (p.width + p.size) * WIDTH * p.stride;
    return strips_of(p.images * slices(p), out_height(p), row_bytes, p.size / 2, p.threads);
}

// What a strip of y sees of x.
template <class Problem>
Slice seen(const Problem& p, const Strip& strip, int64_t channel) {
    const int64_t border = p.size / 2;
    return {p.x + strip.image * p.height * p.width * p.channels + channel,
            p.channels, p.channels - channel, p.height, p.width,
            strip.first * p.stride - border, (strip.rows() - 1) * p.stride + p.size, border};
}

// A row of y, to finish(sums (M), first pixel). `x`: where the first pixel's first tap is; `weight` (T, WIDTH).
template <class F>
inline void convolve_slice_row(const _Float16* x, int64_t pitch, int64_t width, int64_t stride, int64_t size,
                               const _Float16* weight, F finish) {
    over_blocks(width, [&](auto pixels, int64_t column) {
        constexpr int M = pixels;
        Halves sums[M] = {};
        for (int64_t i = 0; i < size; ++i) {
            const _Float16* from = x + (i * pitch + column * stride) * WIDTH;
            const _Float16* taps = weight + i * size * WIDTH;
            int64_t j = 0;
            if (stride == 1) {
                for (; j + 5 <= size; j += 5) slide<Float16, 5, WIDTH>(sums, from + j * WIDTH, taps + j * WIDTH, WIDTH);
                for (; j + 3 <= size; j += 3) slide<Float16, 3, WIDTH>(sums, from + j * WIDTH, taps + j * WIDTH, WIDTH);
            }
            for (; j < size; ++j) stride_over<Float16, WIDTH>(sums, from + j * WIDTH, taps + j * WIDTH, stride);
        }
        finish(sums, column);
    });
}

void convolve(const Depthwise& p, const Strip& strip, int64_t channel, const _Float16* weight, float back,
              Scratch& scratch) {
    const Slice slice = seen(p, strip, channel);
    const Scale scale = slice.scale();
    _Float16* x = scratch.x.of<_Float16>(slice.size());
    slice.read(scale.there, x);
    const int64_t h = out_height(p), w = out_width(p);
    const int64_t count = p.bias ? slice.count : 0, more = std::max<int64_t>(count - LANES, 0);
    const Floats bias[] = {load_some(p.bias + channel, count, 0.0f), load_some(p.bias + channel + LANES, more, 0.0f)};
    for (int64_t row = 0; row < strip.rows(); ++row) {
        BFloat16* to = p.out + ((strip.image * h + strip.first + row) * w) * p.channels + channel;
        const auto finish = [&](const auto& sums, int64_t column) {
            for (const Halves& sum : sums) {
                BFloat16* at = to + column++ * p.channels;
                store_some(at, first_of(sum) * scale.back * back + bias[0], slice.count);
                if (slice.count > LANES)
                    store_some(at + LANES, second_of(sum) * scale.back * back + bias[1], slice.count - LANES);
            }
        };
        convolve_slice_row(x + row * p.stride * slice.pitch() * WIDTH, slice.pitch(), w, p.stride, p.size, weight,
                           finish);
    }
}

// sums (ROWS_OF_TAPS · K) += products of a row of y's gradient with what its taps see.
template <int ROWS_OF_TAPS, int K>
inline __attribute__((always_inline)) void accumulate(Halves (&sums)[ROWS_OF_TAPS][K], const _Float16* grad,
                                                      const _Float16* x, int64_t pitch, int64_t stride, int64_t count) {
    for (int64_t pixel = 0; pixel < count; ++pixel, grad += WIDTH, x += stride * WIDTH) {
        const Halves value = load(grad);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS_OF_TAPS; ++i)
#pragma GCC unroll 11
            for (int j = 0; j < K; ++j) sums[i][j] += value * load(x + (i * pitch + j) * WIDTH);
    }
}

// Adds `rows_of_taps` of them, from tap row `first` on, to `found` (T, WIDTH).
template <int ROWS_OF_TAPS, int K>
void add_taps(const DepthwiseGradient& p, const Strip& strip, const _Float16* x, int64_t pitch, const _Float16* grad,
              int64_t first, float back, float* found) {
    const int64_t w = out_width(p);
    Halves sums[ROWS_OF_TAPS][K] = {};
    int64_t depth = 0;
    const auto flush = [&] {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS_OF_TAPS; ++i)
#pragma GCC unroll 11
            for (int j = 0; j < K; ++j) {
                float* to = found + ((first + i) * K + j) * WIDTH;
                store(to, load(to) + first_of(sums[i][j]) * back);
                store(to + LANES, load(to + LANES) + second_of(sums[i][j]) * back);
                sums[i][j] = Halves{};
            }
        depth = 0;
    };
    for (int64_t row = 0; row < strip.rows(); ++row)
        for (int64_t column = 0; column < w;) {
            const int64_t count = std::min<int64_t>(w - column, DEPTH - depth);
            accumulate(sums, grad + (row * w + column) * WIDTH,
                       x + ((row * p.stride + first) * pitch + column * p.stride) * WIDTH, pitch, p.stride, count);
            column += count, depth += count;
            if (depth == DEPTH) flush();
        }
    flush();
}

template <int K>
void add_all_taps(const DepthwiseGradient& p, const Strip& strip, const _Float16* x, int64_t pitch,
                  const _Float16* grad, float back, float* found) {
    constexpr int AT_ONCE = std::min<int>(MOST_TAPS / K, K);
    int64_t first = 0;
    for (; first + AT_ONCE <= K; first += AT_ONCE)
        add_taps<AT_ONCE, K>(p, strip, x, pitch, grad, first, back, found);
    for (; first < K; ++first) add_taps<1, K>(p, strip, x, pitch, grad, first, back, found);
}

// A strip's part of the kernel's gradient, (T, WIDTH).
void find_gradient(const DepthwiseGradient& p, const Strip& strip, int64_t channel, float* found, Scratch& scratch) {
    const int64_t h = out_height(p), w = out_width(p);
    const Slice slice = seen(p, strip, channel);
    const Slice grads{p.grad + strip.image * h * w * p.channels + channel,
                      p.channels, slice.count, h, w, strip.first, strip.rows(), 0};
    const Scale x_scale = slice.scale(), grad_scale = grads.scale();
    _Float16 *x = scratch.x.of<_Float16>(slice.size()), *grad = scratch.grad.of<_Float16>(grads.size());
    slice.read(x_scale.there, x);
    grads.read(grad_scale.there, grad);
    const float back = x_scale.back * grad_scale.back;
    std::fill_n(found, p.size * p.size * WIDTH, 0.0f);
    const int64_t pitch = slice.pitch();
    if (p.size == 3) add_all_taps<3>(p, strip, x, pitch, grad, back, found);
    if (p.size == 5) add_all_taps<5>(p, strip, x, pitch, grad, back, found);
    if (p.size == 7) add_all_taps<7>(p, strip, x, pitch, grad, back, found);
    if (p.size == 11) add_all_taps<11>(p, strip, x, pitch, grad, back, found);
}

}  // namespace

extern "C" {

void depthwise(const Depthwise* problem) {
    const Depthwise& p = *problem;
    const int64_t taps = p.size * p.size;
    const Scale scale(largest_of(p.weight, p.channels * taps));
    thread_local Buffer kernel;
    _Float16* weight = kernel.of<_Float16>(slices(p) * taps * WIDTH);  // (slices, T, WIDTH)
    std::fill_n(weight, slices(p) * taps * WIDTH, _Float16(0));
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
            weight[(c / WIDTH * taps + tap) * WIDTH + c % WIDTH] =
                _Float16(widened(p.weight[c * taps + (p.turned ? taps - 1 - tap : tap)]) * scale.there);
    const int64_t tasks = p.images * strips(p);
#pragma omp parallel num_threads(p.threads)
    {
        thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * slices(p); ++task) {
            const int64_t slice = task % slices(p);
            convolve(p, Strip(task / slices(p), strips(p), out_height(p)), slice * WIDTH, weight + slice * taps * WIDTH,
                     scale.back, scratch);
        }
    }
}

// Each strip of each image has its own sums, which are then added in their order.
void depthwise_gradient(const DepthwiseGradient* problem) {
    const DepthwiseGradient& p = *problem;
    const int64_t taps = p.size * p.size, tasks = p.images * strips(p), part = taps * WIDTH;
    thread_local Buffer sums;
    float* found = sums.of<float>(tasks * slices(p) * part);
#pragma omp parallel num_threads(p.threads)
    {
        thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * slices(p); ++task)
            find_gradient(p, Strip(task / slices(p), strips(p), out_height(p)), task % slices(p) * WIDTH,
                          found + task * part, scratch);
#pragma omp for
        for (int64_t slice = 0; slice < slices(p); ++slice) {
            std::vector<float> total(part, 0.0f);
            for (int64_t task = 0; task < tasks; ++task)
                for (int64_t e = 0; e < part; ++e) total[e] += found[(task * slices(p) + slice) * part + e];
            for (int64_t c = slice * WIDTH; c < std::min((slice + 1) * WIDTH, p.channels); ++c)
                for (int64_t tap = 0; tap < taps; ++tap) p.weight[c * taps + tap] = total[tap * WIDTH + c % WIDTH];
        }
    }
}
}
#endif
