// Normal latents for inference on a CPU, each function in one pass (nvae/kernels/cpu/latents.py; spec §3).
//
// Images are channels-last, arithmetic is float32.

#include "vectors.h"

#include <vector>

extern "C" {

// As in nvae/kernels/cpu/latents.py, which fills it.
struct Normal {
    int64_t images, pixels, channels, terms;    // of one image; channels of the Normal
    int64_t repeated[3], bfloat16[3], threads;  // after how many images a term starts over; its type
    float temperature;
    const void* raw[3];   // (repeated, pixels, 2 · channels), to be summed
    float *mean, *sigma;  // (B, pixels, channels)
};

// As in nvae/kernels/cpu/latents.py, which fills it.
struct Score {
    int64_t images, pixels, channels, closed, threads;
    const float *q_mean, *q_sigma, *p_mean, *p_sigma;  // (B, pixels, channels)
    const float *drawn, *z;                            // likewise
    float *divergence, *log_q, *log_p;                 // (B, channels) each
};
}

namespace {

constexpr int64_t FEW = 8;  // pixels at once: what is between stays in the nearest cache

// log x for normal x > 0, to 2e-7 of it or of 1: the exponent, and the logarithm of a mantissa from ¾ to 1½ as
// 2 artanh((m − 1)/(m + 1)) by its series.
inline Floats logarithm(Floats x) {
    const Integers exponent = ((Integers)x - 0x3f400000) >> 23;
    const Floats mantissa = (Floats)((Bits)x - ((Bits)exponent << 23));
    const Floats t = (mantissa - 1.0f) * reciprocal(mantissa + 1.0f), square = t * t;
    const Floats series = 2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7 + square * (2.0f / 9))));
    return __builtin_convertvector(exponent, Floats) * 0.693147181f + t * series;
}

// 5 tanh(x/5), through (1 − e^(−2x/5)) / (1 + e^(−2x/5)).
inline Floats soft_clamp(Floats x) {
    const Floats power = power_of_two(at_most(at_least(x, -100.0f), 100.0f), -0.4f * LOG2_E);
    return 5.0f * (1.0f - power) * reciprocal(1.0f + power);
}

// ---------------------------------------------------------------------------------------------------------- Normals

template <class F>
inline void over_vectors(float* x, int64_t size, F f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, f(load(x + i)));
    for (; i < size; ++i) x[i] = f(all(x[i]))[0];
}

template <class T>
void add_widened(const void* raw, int64_t offset, int64_t size, float* sums) {
    for (int64_t e = 0; e < size; ++e) sums[e] += widened((static_cast<const T*>(raw) + offset)[e]);
}

// Of `count` pixels of an image; `sums` takes their raw parameters.
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

// ---------------------------------------------------------------------------------------------------------- densities

// The first `count` numbers, in a vector whose others are `rest`.
inline Floats load_some(const float* from, int64_t count, float rest) {
    if (count >= LANES) return load(from);
    Floats numbers = all(rest);
    std::memcpy(&numbers, from, 4 * count);
    return numbers;
}

// Adds the first `count` numbers of a vector.
inline void add_some(float* to, Floats value, int64_t count) {
    if (count >= LANES) return store(to, load(to) + value);
    const Floats sums = load_some(to, count, 0.0f) + value;
    std::memcpy(to, &sums, 4 * count);
}

// Log densities of one image, summed over its pixels; and their difference, or the divergence in closed form.
void score(const Score& p, int64_t image, std::vector<float>& scratch) {
    constexpr float HALF_LOG_2PI = 0.918938533f;
    const int64_t few = FEW * p.channels;
    scratch.assign(3 * few, 0.0f);  // (FEW, channels) each
    float *differences = scratch.data(), *q_densities = differences + few, *p_densities = q_densities + few;
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

}  // namespace

extern "C" {

// Normals from the sum of raw parameters.
void normal(const Normal* problem) {
    const Normal& p = *problem;
    const int64_t parts = (p.pixels + FEW - 1) / FEW;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t task = 0; task < p.images * parts; ++task) {
        thread_local std::vector<float> sums;
        sums.resize(FEW * 2 * p.channels);
        const int64_t first = task % parts * FEW, count = std::min(FEW, p.pixels - first);
        find(p, task / parts, first, count, sums.data());
    }
}

// Sums over the pixels of log densities and divergences.
void score(const Score* problem) {
#pragma omp parallel for num_threads(problem->threads)
    for (int64_t image = 0; image < problem->images; ++image) {
        thread_local std::vector<float> scratch;
        score(*problem, image, scratch);
    }
}
}
