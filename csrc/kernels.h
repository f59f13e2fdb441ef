// The kernels' prototypes: raw pointers, 64-bit sizes, and for CUDA a device and its stream. No header of torch.
#pragma once

#include <string>

#include "fedgs_math.h"

namespace fedgs {

enum class Pixel { byte, float32, int64 };  // torch's bool is a byte of 0 or 1

// area, delta (images), eta (1) from masks (images, pixels) and small (images).
void mask_difficulty_cpu(const void* masks, Pixel pixel, const bool* small, int64_t images, int64_t pixels, double log_base,
                         int64_t* area, float* delta, float* eta, int threads);

// A step on vectors of n, and delta += eta s unless delta is null.
void adamw_accumulate_cpu(float* theta, const float* grad, float* m, float* v, float* delta, const float* eta, int64_t n,
                          const AdamW& adam, int threads);

// out = theta - sum_k weights[k] updates[k], all of n; norms[k] = |updates[k]|^2, which is finite where updates[k] is.
void aggregate_cpu(const float* theta, const float* const* updates, const float* weights, int clients, int64_t n,
                   float* out, double* norms, int threads);

// On a GPU the same, in order on the given stream, without allocation or synchronisation: each can be captured in a graph.
// They throw std::runtime_error with CUDA's message if a launch fails.
namespace cuda {

std::string problem(int device);  // why kernels cannot run on this device; empty where they can

// partial: mask_partials(...) ints; ticket: one unsigned, 0 before the first call on a stream, and 0 again after each.
int64_t mask_partials(Pixel pixel, int64_t images, int64_t pixels);
void mask_difficulty(const void* masks, Pixel pixel, const bool* small, int64_t images, int64_t pixels, double log_base,
                     int64_t* area, float* delta, float* eta, int* partial, unsigned* ticket, int device, void* stream);

void adamw_accumulate(float* theta, const float* grad, float* m, float* v, float* delta, const float* eta, int64_t n,
                      const AdamW& adam, int device, void* stream);

// partial: clients * AGGREGATE_BLOCKS doubles.
constexpr int AGGREGATE_BLOCKS = 1056;  // 8 for each of an H200's 132 multiprocessors
void aggregate(const float* theta, const float* const* updates, const float* weights, int clients, int64_t n, float* out,
               double* norms, double* partial, int device, void* stream);

}  // namespace cuda
}  // namespace fedgs
