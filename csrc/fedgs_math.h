// The method's scalar formulas: one text for the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FEDGS_FN __host__ __device__ inline
#else
#define FEDGS_FN inline
#endif

namespace fedgs {

// Elements [begin, end) of n that piece number `index` works on. Every index of a kernel comes
// from here, in 64 bits.
struct Range {
    int64_t begin, end;
};

FEDGS_FN Range piece(int64_t index, int64_t size, int64_t n) {
    const int64_t begin = index * size;
    return {begin, begin + size < n ? begin + size : n};
}

// Difficulty of an image, delta_x = tanh(log_l(1 / a)^2) with a = area / pixels; 0 where its lesion
// is not small, or out of view.
FEDGS_FN float difficulty_of(int64_t area, int64_t pixels, bool small, double log_of_base) {
    if (!small || area == 0) return 0.0f;
    const double power = std::log(double(pixels) / double(area)) / log_of_base;
    return float(std::tanh(power * power));
}

// Step scale of a batch of B images, eta = 1 + (2 / B) sum_x delta_x, in [1, 3].
FEDGS_FN float step_scale(double sum_of_difficulties, int64_t images) {
    return float(1.0 + 2.0 * sum_of_difficulties / double(images > 0 ? images : 1));
}

// What a step of AdamW is told.
struct AdamWOptions {
    double lr, beta1, beta2, eps, weight_decay;
};

// What every parameter's step needs of that. In step t, which counts from 1.
struct AdamW {
    float keep;         // 1 - lr weight_decay: the decoupled decay
    float gain1;        // 1 - beta1
    float beta2;
    float gain2;        // 1 - beta2
    float correction2;  // 1 / (1 - beta2^t)
    float rate;         // lr / (1 - beta1^t)
    float eps;
};

// Worked out once for many parameters, in double: beta2^t is nearly 1.
FEDGS_FN AdamW adamw_at(int64_t t, const AdamWOptions& options) {
    AdamW adam;
    adam.keep = float(1 - options.lr * options.weight_decay);
    adam.gain1 = float(1 - options.beta1);
    adam.beta2 = float(options.beta2);
    adam.gain2 = float(1 - options.beta2);
    adam.correction2 = float(1 / (1 - std::pow(options.beta2, double(t))));
    adam.rate = float(options.lr / (1 - std::pow(options.beta1, double(t))));
    adam.eps = float(options.eps);
    return adam;
}

// One parameter's step, in place: decay, moments, theta -= s. -> s = lr m_hat / (sqrt(v_hat) + eps)
FEDGS_FN float adamw(float& theta, float grad, float& m, float& v, const AdamW& adam) {
    m += adam.gain1 * (grad - m);
    v = adam.beta2 * v + adam.gain2 * grad * grad;
    const float s = m / (std::sqrt(v * adam.correction2) + adam.eps) * adam.rate;

    // The decay moves theta, but is no part of s: the server never hears of it.
    theta = adam.keep * theta - s;
    return s;
}

}  // namespace fedgs
