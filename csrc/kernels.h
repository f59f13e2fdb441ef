// What the kernels take: raw pointers, 64-bit sizes, and for CUDA a device and its stream. No
// header of torch, so that compiling takes seconds and a build fits every version of torch.
#pragma once

#include <string>
#include <vector>

#include "fedgs_math.h"

namespace fedgs {

enum class Pixel { byte, float32, int64 };  // torch's bool is a byte of 0 or 1

// A batch of masks, and where its areas, difficulties and step scale go.
struct Masks {
    const void* masks;  // (images, pixels); not 0 = lesion
    Pixel pixel;
    const bool* small;  // (images)
    int64_t images;
    int64_t pixels;     // of one image
    double log_base;

    int64_t* area;      // (images)
    float* difficulty;  // (images)
    float* eta;         // one number
};

// What a step reads and writes: vectors of n elements.
struct Step {
    float* theta;
    const float* grad;
    float* m;
    float* v;
    float* update;     // null: nothing is accumulated
    const float* eta;  // one number; null without update
    const int64_t* t;  // one number: which step it is, from 1
    int64_t n;
};

// A weighted sum of updates, each a vector of n elements. out may be total.
struct Sum {
    const float* total;
    std::vector<const float*> updates;
    std::vector<float> weights;  // one an update
    int64_t n;

    float* out;
    double* norms;  // one an update
};

// Lesion areas, difficulties and the step scale of a batch.
void mask_difficulty_cpu(const Masks& batch, int threads);

// A step of AdamW, and update += eta s. adam is that of step t.
void adamw_accumulate_cpu(const Step& step, const AdamW& adam, int threads);

// out = total + sum_k weights[k] updates[k], in this order. norms[k] = |updates[k]|^2, which is
// finite exactly where updates[k] is.
void aggregate_cpu(const Sum& sum, int threads);

// On a GPU the same, in order on the given stream, without allocation or synchronisation: each can
// be captured in a graph. Numbers that change from step to step (t, eta) are therefore read on the
// GPU. They throw std::runtime_error with CUDA's message if a launch fails.
namespace cuda {

// Where a kernel runs.
struct Place {
    int device;
    void* stream;
};

std::string problem(int device);  // why kernels cannot run on this device; empty where they can

// partial: mask_partials(...) ints. ticket: one unsigned, which is 0 before the first call on a
// stream, and 0 again after each.
int64_t mask_partials(Pixel pixel, int64_t images, int64_t pixels);
void mask_difficulty(const Masks& batch, int* partial, unsigned* ticket, Place place);

void adamw_accumulate(const Step& step, const AdamWOptions& options, Place place);

// partial: AGGREGATE_BLOCKS doubles for each update.
constexpr int AGGREGATE_BLOCKS = 1056;  // 8 for each of an H200's 132 multiprocessors
void aggregate(const Sum& sum, double* partial, Place place);

// The same by the kernels that one would write first. They are here to be read, and timed.
namespace naive {

void mask_difficulty(const Masks& batch, Place place);
void adamw_accumulate(const Step& step, const AdamWOptions& options, Place place);
void aggregate(const Sum& sum, Place place);

}  // namespace naive

}  // namespace cuda
}  // namespace fedgs
