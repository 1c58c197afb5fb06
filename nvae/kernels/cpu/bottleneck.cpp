// Inverted bottlenecks for inference on a CPU (nvae/kernels/cpu/bottleneck.py says what they compute): a convolution to
// many channels, a depthwise one and a 1×1 convolution to few channels, with activations between and a gated sum at the
// end (spec §1 and §3).
//
// What is between the convolutions never reaches memory: of a strip of rows, a tile of the many channels is made,
// convolved and summed into the few, then the next tile, all in the nearest caches. Arithmetic is float32.
//
// Shapes: B images, H W space of the input, h w of a phase of the output (H/stride); C inputs, E hidden, O outputs.
// Images are channels-last.

#include "products.h"

#include <vector>

extern "C" {

// As in nvae/kernels/cpu/bottleneck.py, which fills it.
struct Bottleneck {
    int64_t images, height, width, inputs, hidden, outputs;          // without padding
    int64_t stride, enlarge;                                         // enlarge² phases
    int64_t expand_taps, expand_reach, spatial_taps, spatial_reach;  // reach: the largest |offset|
    int64_t elu, squeezed;                                           // the gate's hidden width, 0 without a gate
    int64_t bfloat16, strips, threads;                               // the type of x, skip and out; of an image
    float scale;
    // Packed (taps · C, E), (phases · taps, E), (E, O); biases (E), (E), (O). E and O are padded with zeros.
    const float *expand, *spatial, *project, *expand_bias, *spatial_bias, *project_bias;
    const int64_t *expand_at, *spatial_at;                        // (taps, 2): row and column offsets, as in `Taps`
    const float *squeeze, *squeeze_bias, *excite, *excite_bias;  // (S, O), (S), (O, S), (O)
    const void *x, *skip;  // (B, H, W, C), (B, enlarge · h, enlarge · w, O)
    void* out;             // as skip
    float *y, *sums;  // where a gate waits for several strips: (tasks, most numbers of a strip), (tasks, O padded)
};
}

namespace {

// A part of one image's output.
struct Strip {
    int64_t image, first, last;  // rows

    Strip(int64_t task, int64_t strips, int64_t height)
        : image(task / strips),
          first(height * (task % strips) / strips),
          last(height * (task % strips + 1) / strips) {}
    int64_t rows() const { return last - first; }
};

struct Sizes {
    int64_t phases, h, w, outputs;      // of the output; channels as they lie in y
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

// ------------------------------------------------------------------------------------------------- the convolutions

// Rows of an image from `top` on, some maybe outside it, with zeros around the image.
template <class T>
void read(const Bottleneck& p, int64_t image, int64_t top, int64_t rows, float* to) {
    const int64_t side = p.expand_reach * p.inputs, size = p.width * p.inputs;
    for (int64_t row = top; row < top + rows; ++row, to += size + 2 * side) {
        std::fill_n(to, size + 2 * side, 0.0f);
        if (row < 0 || row >= p.height) continue;
        const T* from = static_cast<const T*>(p.x) + (image * p.height + row) * size;
        for (int64_t i = 0; i < size; ++i) to[side + i] = widened(from[i]);
    }
}

// y of a strip (phases, rows, w, O padded): every tile of the hidden channels in turn.
template <class T, class Inner, class Outer>
void convolve(const Bottleneck& p, const Sizes& n, const Strip& strip, Scratch& scratch, float* y) {
    const Taps expand_taps{p.expand_taps, p.expand_at}, spatial_taps{p.spatial_taps, p.spatial_at};
    const int64_t top = strip.first * p.stride - p.spatial_reach;  // the image's row that the hidden ones start at
    const int64_t rows = (strip.rows() - 1) * p.stride + 1 + 2 * p.spatial_reach;
    const int64_t read_rows = rows + 2 * p.expand_reach, hidden_size = rows * n.hidden_pitch * TILE;
    float* input = scratch.input.of(read_rows * n.input_pitch * p.inputs);
    float* hidden = scratch.hidden.of(hidden_size);
    float* spatial = scratch.spatial.of(n.w * TILE);
    read<T>(p, strip.image, top - p.expand_reach, read_rows, input);
    std::fill_n(hidden, hidden_size, 0.0f);  // around the image it stays so

    over_tiles(padded(p.hidden), [&](auto vectors, int64_t channel) {
        constexpr int N = vectors;
        for (int64_t i = std::max<int64_t>(-top, 0); i < std::min(rows, p.height - top); ++i)
            convolve_row<Inner, N>(input + ((i + p.expand_reach) * n.input_pitch + p.expand_reach) * p.inputs,
                                   n.input_pitch, p.inputs, p.width, expand_taps,
                                   p.expand + channel * p.expand_taps * p.inputs, p.expand_bias + channel,
                                   hidden + (i * n.hidden_pitch + p.spatial_reach) * TILE);
        for (int64_t row = 0; row < strip.rows(); ++row)
            for (int64_t phase = 0; phase < n.phases; ++phase) {
                const int64_t origin = (row * p.stride + p.spatial_reach) * n.hidden_pitch + p.spatial_reach;
                const int64_t first_tap = (channel * n.phases + phase * N * LANES) * p.spatial_taps;
                convolve_depthwise_row<Outer, N>(hidden + origin * TILE, n.hidden_pitch, n.w, p.stride, spatial_taps,
                                                 p.spatial + first_tap, p.spatial_bias + channel, spatial);
                project_row<N>(spatial, n.w, p.project, channel, padded(p.hidden), n.outputs, p.project_bias,
                               y + (phase * strip.rows() + row) * n.w * n.outputs);
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

// ------------------------------------------------------------------------------------------------ the gate and the sum

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

extern "C" {

// out = skip + scale · gate(mean of y) · y, with y = project(outer(spatial(inner(expand(x))))).
void bottleneck(const Bottleneck* problem) {
    if (problem->bfloat16)
        run<BFloat16>(*problem);
    else
        run<float>(*problem);
}

// A matrix (depth, channels), channels padded, as the functions above read it.
void pack(const float* from, int64_t depth, int64_t channels, float* to) { pack_tiles(from, depth, channels, to); }
}
