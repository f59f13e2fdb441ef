// The kernels for CPUs: each vector is read once and written once, in pieces that threads take in
// turn.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

// One build for all x86-64 machines: the loader picks the AVX2 or the plain version of a function.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FEDGS_SIMD __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FEDGS_SIMD
#endif

namespace fedgs {
namespace {

constexpr int64_t PIECE = 1 << 15;  // elements that a thread takes at a time

int64_t pieces_of(int64_t n) { return (n + PIECE - 1) / PIECE; }

// Calls work(0) ... work(pieces - 1) on several threads. They live for one call: torch's OpenMP
// threads cannot be reached without its headers, and a second pool of threads that spin while they
// wait would take the cores from them.
template <class Work>
void in_parallel(int64_t pieces, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(i);
    };

    // Fewer than four pieces are not worth a thread.
    const int64_t useful = std::min<int64_t>(threads, pieces / 4);
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < useful; ++i) {
        try {
            helpers.emplace_back(take);
        } catch (const std::system_error&) {
            break;  // the machine has no thread left: those that run do the work
        }
    }
    take();
    for (auto& helper : helpers) helper.join();
}

// --------------------------------------------------------------------------------- mask_difficulty

// Counts in the pixels' own width first, so that as many pixels as fit a register are counted at
// once.
FEDGS_SIMD int64_t count_nonzero(const uint8_t* x, int64_t n) {
    int64_t count = 0;
    for (int64_t begin = 0; begin < n;) {
        uint8_t lanes[64] = {};
        const int64_t rows = std::min<int64_t>((n - begin) / 64, 255);  // a lane holds up to 255
        for (int64_t row = 0; row < rows; ++row, begin += 64)
            for (int lane = 0; lane < 64; ++lane) lanes[lane] += x[begin + lane] != 0;
        for (const uint8_t lane : lanes) count += lane;

        // What does not fill a row of lanes any more is counted one by one.
        if (rows < 255)
            for (; begin < n; ++begin) count += x[begin] != 0;
    }
    return count;
}

FEDGS_SIMD int64_t count_nonzero(const float* x, int64_t n) {
    int32_t count = 0;  // n is at most PIECE
    for (int64_t i = 0; i < n; ++i) count += x[i] != 0.0f;
    return count;
}

FEDGS_SIMD int64_t count_nonzero(const int64_t* x, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += x[i] != 0;
    return count;
}

template <class T>
void count_areas(const Masks& batch, int threads) {
    const auto masks = static_cast<const T*>(batch.masks);
    const int64_t per_image = pieces_of(batch.pixels);
    const int64_t pieces = batch.images * per_image;

    std::vector<int64_t> counts(size_t(pieces), 0);
    in_parallel(pieces, threads, [&](int64_t i) {
        const Range range = piece(i % per_image, PIECE, batch.pixels);
        const T* image = masks + i / per_image * batch.pixels;
        counts[size_t(i)] = count_nonzero(image + range.begin, range.end - range.begin);
    });

    std::fill_n(batch.area, batch.images, 0);
    for (int64_t i = 0; i < pieces; ++i) batch.area[i / per_image] += counts[size_t(i)];
}

}  // namespace

void mask_difficulty_cpu(const Masks& batch, int threads) {
    if (batch.pixel == Pixel::byte) count_areas<uint8_t>(batch, threads);
    if (batch.pixel == Pixel::float32) count_areas<float>(batch, threads);
    if (batch.pixel == Pixel::int64) count_areas<int64_t>(batch, threads);

    const double log_of_base = std::log(batch.log_base);
    double sum = 0;
    for (int64_t i = 0; i < batch.images; ++i) {
        const float difficulty =
            difficulty_of(batch.area[i], batch.pixels, batch.small[i], log_of_base);
        batch.difficulty[i] = difficulty;
        sum += difficulty;
    }
    *batch.eta = step_scale(sum, batch.images);
}

// ------------------------------------------------------------------------------- adamw_accumulate_

namespace {

// __restrict__ promises that the vectors do not overlap, so that the compiler may vectorise the
// loop. csrc/__init__.py refuses vectors that do.
FEDGS_SIMD void step_range(float* __restrict__ theta, const float* __restrict__ grad,
                           float* __restrict__ m, float* __restrict__ v, Range range, AdamW adam) {
    for (int64_t i = range.begin; i < range.end; ++i) adamw(theta[i], grad[i], m[i], v[i], adam);
}

FEDGS_SIMD void step_and_accumulate_range(float* __restrict__ theta,
                                          const float* __restrict__ grad, float* __restrict__ m,
                                          float* __restrict__ v, float* __restrict__ update,
                                          float eta, Range range, AdamW adam) {
    for (int64_t i = range.begin; i < range.end; ++i)
        update[i] += eta * adamw(theta[i], grad[i], m[i], v[i], adam);
}

}  // namespace

void adamw_accumulate_cpu(const Step& step, const AdamW& adam, int threads) {
    in_parallel(pieces_of(step.n), threads, [&](int64_t i) {
        const Range range = piece(i, PIECE, step.n);
        if (step.update == nullptr)
            step_range(step.theta, step.grad, step.m, step.v, range, adam);
        else
            step_and_accumulate_range(step.theta, step.grad, step.m, step.v, step.update,
                                      *step.eta, range, adam);
    });
}

// --------------------------------------------------------------------------------------- aggregate

namespace {

constexpr int64_t BLOCK = 1 << 13;  // elements of out that stay in the cache while clients pass

// Fresh memory comes a page at a time, which takes longer than what is computed here: ask for pages
// of 2 MB.
void ask_for_huge_pages(float* start, int64_t n) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 1 << 21;
    const auto begin = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) / PAGE * PAGE;
    const auto end = reinterpret_cast<uintptr_t>(start + n) / PAGE * PAGE;
    if (begin < end)  // if the system refuses, the result is the same
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start, (void)n;
#endif
}

double square(float x) { return double(x) * double(x); }  // in double no float's square overflows

// out = from + weight a in a range, and norms[0] += the sum of a^2 there. out may be from.
FEDGS_SIMD void add_one(const float* from, const float* const* updates, const float* weights,
                        Range range, float* out, double* norms) {
    const float* a = updates[0];
    const float weight = weights[0];
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = range.begin; i < range.end; ++i) {
        out[i] = from[i] + weight * a[i];
        sum += square(a[i]);
    }
    norms[0] += sum;
}

// The same for four clients at once, which keeps more of the memory's streams busy. Sums are still
// made in the clients' order.
FEDGS_SIMD void add_four(const float* from, const float* const* updates, const float* weights,
                         Range range, float* out, double* norms) {
    const float *a = updates[0], *b = updates[1], *c = updates[2], *d = updates[3];
    const float weight_a = weights[0], weight_b = weights[1];
    const float weight_c = weights[2], weight_d = weights[3];
    double sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)
    for (int64_t i = range.begin; i < range.end; ++i) {
        out[i] = from[i] + weight_a * a[i] + weight_b * b[i] + weight_c * c[i] + weight_d * d[i];
        sum_a += square(a[i]);
        sum_b += square(b[i]);
        sum_c += square(c[i]);
        sum_d += square(d[i]);
    }
    norms[0] += sum_a;
    norms[1] += sum_b;
    norms[2] += sum_c;
    norms[3] += sum_d;
}

// All clients over a block of out, four at a time as long as there are four.
void add_all(const Sum& sum, Range block, double* norms) {
    const int clients = int(sum.updates.size());
    const float* from = sum.total;
    for (int k = 0; k < clients;) {
        const int count = k + 4 <= clients ? 4 : 1;
        const auto add = count == 4 ? add_four : add_one;
        add(from, &sum.updates[k], &sum.weights[k], block, sum.out, norms + k);

        // Those that follow go on from what is there now.
        from = sum.out;
        k += count;
    }
}

}  // namespace

void aggregate_cpu(const Sum& sum, int threads) {
    ask_for_huge_pages(sum.out, sum.n);
    const size_t clients = sum.updates.size();
    const int64_t pieces = pieces_of(sum.n);

    // Each piece has norms of its own: they are added in order, whichever thread was first.
    std::vector<double> partial(size_t(pieces) * clients, 0.0);
    in_parallel(pieces, threads, [&](int64_t i) {
        const Range whole = piece(i, PIECE, sum.n);
        for (int64_t begin = whole.begin; begin < whole.end; begin += BLOCK) {
            const Range block = {begin, std::min(begin + BLOCK, whole.end)};
            add_all(sum, block, &partial[size_t(i) * clients]);
        }
    });

    std::fill_n(sum.norms, clients, 0.0);
    for (size_t i = 0; i < partial.size(); ++i) sum.norms[i % clients] += partial[i];
}

}  // namespace fedgs
