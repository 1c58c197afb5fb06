// The discretised mixture of logistics without gradients (nvae/kernels/cpu/mixture.py says what it computes; spec §4).
//
// A pixel's components are the numbers of a vector, or of several.

#include "products.h"

extern "C" {

// As in nvae/kernels/cpu/mixture.py, which fills it.
struct Mixture {
    int64_t images, pixels, components, colours, levels, threads;  // pixels of an image; levels but for the lowest
    float highest;                                                 // level, from −1 to 1
    const float *params, *x;  // (B, H, W, channels of the parameters), (B, H, W, C) from 0 to 1
    float* log_prob;          // (B, H, W), nats
};
}

namespace {

inline Floats exponential(Floats x) { return power_of_two(at_most(at_least(x, -87.0f), 87.0f), LOG2_E); }

// log σ(x).
inline Floats log_sigmoid(Floats x) {
    const Floats negative = x > 0.0f ? -x : x;
    return at_most(x, 0.0f) - logarithm(1.0f + exponential(negative));
}

// 1 − e^(−x) for x ≥ 0, precise for small x, too: with −x log₂ e an integer n ≤ 0 and a rest, it is
// −(2^n (2^rest − 1) + (2^n − 1)).
inline Floats one_less_power(Floats x) {
    const Floats ROUNDING = all(12582912.0f);
    const Floats t = at_most(x, 87.0f) * -LOG2_E;
    const Floats shifted = t + ROUNDING, rest = t - (shifted - ROUNDING);
    const Floats power = (Floats)((Bits)all(1.0f) + ((Bits)shifted << 23));  // 2^n
    Floats y = all(POWER[4]);
    for (int i = 3; i >= 0; --i) y = y * rest + POWER[i];
    return (1.0f - power) - power * (y * rest);
}

inline Floats hyperbolic_tangent(Floats x) {
    const Floats part = one_less_power(2.0f * (x < 0.0f ? -x : x)), size = part * reciprocal(2.0f - part);
    return x < 0.0f ? -size : size;
}

template <class F>
inline float over_lanes(Floats vector, F f) {
    float numbers[LANES];
    store(numbers, vector);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) numbers[i] = f(numbers[i], numbers[i + step]);
    return numbers[0];
}

// Of `count` numbers; those of a vector beyond them are at most LOWEST.
constexpr float LOWEST = -3e38f;
template <class F>
inline float log_sum_exp(int64_t count, F vector) {
    Floats most = all(LOWEST), sum = all(0.0f);
    for (int64_t m = 0; m < count; m += LANES) {
        const Floats values = vector(m);
        most = values > most ? values : most;
    }
    const float top = over_lanes(most, [](float a, float b) { return a > b ? a : b; });
    for (int64_t m = 0; m < count; m += LANES) sum += exponential(vector(m) - top);
    return top + std::log(over_lanes(sum, [](float a, float b) { return a + b; }));
}

// As `logistic_log_prob` of nvae/bricks/likelihoods.py: of `level`, from 0 to `levels`.
inline Floats log_prob_of(float level, int64_t levels, float half, Floats mean, Floats log_scale) {
    const float above = (2.0f * level + 1.0f) * half - 1.0f, below = (2.0f * level - 1.0f) * half - 1.0f;
    const Floats inverse = exponential(-at_least(log_scale, -7.0f));
    if (level <= 0.0f) return log_sigmoid((above - mean) * inverse);
    if (level >= levels) return log_sigmoid((mean - below) * inverse);
    const Floats upper = log_sigmoid((above - mean) * inverse), lower = log_sigmoid((mean - below) * inverse);
    return upper + lower + logarithm(one_less_power(at_least(2.0f * half * inverse, 1e-37f)));
}

// Of a pixel. `joint` takes the components' log-probabilities.
float log_prob(const Mixture& p, const float* logits, const float* x, float* joint) {
    const int64_t count = p.components, of_colour = (p.colours == 3 ? 3 : 2) * count;
    const float half = (p.highest + 1.0f) / (2.0f * p.levels);
    for (int64_t m = 0; m < count; m += LANES) {
        const auto component = [&](int64_t colour, int64_t kind) {
            return load_some(logits + count + colour * of_colour + kind * count + m, count - m, 0.0f);
        };
        Floats sum = load_some(logits + m, count - m, LOWEST);
        for (int64_t colour = 0; colour < p.colours; ++colour) {
            Floats mean = component(colour, 0);
            if (colour == 1) mean += hyperbolic_tangent(component(0, 2)) * (2.0f * x[0] - 1.0f);
            if (colour == 2) {
                mean += hyperbolic_tangent(component(1, 2)) * (2.0f * x[0] - 1.0f);
                mean += hyperbolic_tangent(component(2, 2)) * (2.0f * x[1] - 1.0f);
            }
            const float level = std::nearbyint(2.0f * x[colour] / (2.0f * half));
            sum += log_prob_of(level, p.levels, half, mean, component(colour, 1));
        }
        store(joint + m, sum);
    }
    return log_sum_exp(count, [&](int64_t m) { return load(joint + m); })
        - log_sum_exp(count, [&](int64_t m) { return load_some(logits + m, count - m, LOWEST); });
}

}  // namespace

extern "C" void mixture(const Mixture* problem) {
    const Mixture& p = *problem;
    const int64_t channels = p.components * (p.colours == 3 ? 10 : 3);
#pragma omp parallel for num_threads(p.threads)
    for (int64_t image = 0; image < p.images; ++image) {
        thread_local Buffer scratch;
        float* joint = scratch.of<float>(p.components + LANES);
        for (int64_t pixel = image * p.pixels; pixel < (image + 1) * p.pixels; ++pixel)
            p.log_prob[pixel] = log_prob(p, p.params + pixel * channels, p.x + pixel * p.colours, joint);
    }
}
