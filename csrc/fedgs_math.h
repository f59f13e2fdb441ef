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

// What a step of AdamW needs beside its vectors. Bias corrections are worked out once a step, in
// double.
struct AdamW {
    float keep;         // 1 - lr weight_decay: the decoupled decay
    float gain1;        // 1 - beta1
    float beta2;
    float gain2;        // 1 - beta2
    float correction2;  // 1 / (1 - beta2^t)
    float rate;         // lr / (1 - beta1^t)
    float eps;

    AdamW(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay)
        : keep(float(1 - lr * weight_decay)),
          gain1(float(1 - beta1)),
          beta2(float(beta2)),
          gain2(float(1 - beta2)),
          correction2(float(1 / (1 - std::pow(beta2, double(step))))),
          rate(float(lr / (1 - std::pow(beta1, double(step))))),
          eps(float(eps)) {}
};

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
