// The kernels for CUDA GPUs. All three only stream memory: threads read and write 16 bytes at a time, and several loads
// are under way before the first is used.
#include "kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fedgs::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// `WIDTH` consecutive floats: with 4 of them one 16-byte access.
template <int WIDTH>
struct alignas(4 * WIDTH) Floats {
    float x[WIDTH];
};

template <int WIDTH>
__device__ Floats<WIDTH> load(const float* from) {
    return *reinterpret_cast<const Floats<WIDTH>*>(from);
}

template <int WIDTH>
__device__ void store(float* to, const Floats<WIDTH>& values) {
    *reinterpret_cast<Floats<WIDTH>*>(to) = values;
}

template <class T>
__device__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgotten, or the next launch would be blamed for it
    throw std::runtime_error(cudaGetErrorString(error));
}

// Makes a device the current one for as long as this lives.
struct OnDevice {
    int device, before = 0;
    explicit OnDevice(int device) : device(device) {
        check(cudaGetDevice(&before));
        if (before != device) check(cudaSetDevice(device));
    }
    ~OnDevice() {
        if (before != device) cudaSetDevice(before);
    }
};

// How many blocks it takes, as CUDA counts them.
unsigned blocks_for(int64_t n, int64_t per_block) {
    const int64_t blocks = (n + per_block - 1) / per_block;
    if (blocks > INT32_MAX) throw std::runtime_error("too large for one launch");
    return unsigned(std::max<int64_t>(blocks, 1));
}

// ------------------------------------------------------------------------------------------- mask_difficulty

constexpr int LOADS = 4;                          // 16-byte loads that each thread has under way
constexpr int MASK_BYTES = THREADS * LOADS * 16;  // what a block reads

// How many of the 16 bytes' pixels are not 0.
__device__ int count_nonzero(uint4 x, const uint8_t*) {
    int count = 0;
    for (const unsigned word : {x.x, x.y, x.z, x.w})  // a byte's top bit becomes 1 where the byte is not 0
        count += __popc((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u);
    return count;
}

__device__ int count_nonzero(uint4 x, const float*) {
    return (__uint_as_float(x.x) != 0.0f) + (__uint_as_float(x.y) != 0.0f) + (__uint_as_float(x.z) != 0.0f) +
           (__uint_as_float(x.w) != 0.0f);
}

__device__ int count_nonzero(uint4 x, const int64_t*) { return ((x.x | x.y) != 0) + ((x.z | x.w) != 0); }

// A thread's share of a block's pixels: some singly up to a multiple of 16 bytes, then 16 bytes at a time, then the rest.
template <class T>
__device__ int count_share(const T* masks, int n) {
    constexpr int PER_LOAD = 16 / int(sizeof(T));
    const int thread = int(threadIdx.x), misaligned = int(reinterpret_cast<uintptr_t>(masks) % 16 / sizeof(T));
    const int head = min(n, (PER_LOAD - misaligned) % PER_LOAD), loads = (n - head) / PER_LOAD, tail = head + loads * PER_LOAD;
    const uint4* packs = reinterpret_cast<const uint4*>(masks + head);
    uint4 x[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) x[i] = thread + i * THREADS < loads ? packs[thread + i * THREADS] : uint4{};
    int count = thread < head && masks[thread] != T(0);
    if (tail + thread < n) count += masks[tail + thread] != T(0);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) count += count_nonzero(x[i], masks);
    return count;
}

// Each block counts one piece of one image. The last one to finish adds the pieces up, in order, and works out the rest.
template <class T>
__global__ void __launch_bounds__(THREADS)
mask_difficulty_kernel(const T* __restrict__ masks, const bool* __restrict__ small, int64_t images, int64_t pixels,
                       int per_image, double log_of_base, int64_t* area, float* delta, float* eta, int* partial,
                       unsigned* ticket) {
    __shared__ int counts[WARPS];
    __shared__ bool last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (images > 0) {
        const int64_t image = blockIdx.x / unsigned(per_image);
        const Range range = piece(blockIdx.x % unsigned(per_image), MASK_BYTES / sizeof(T), pixels);
        const int count = warp_sum(count_share(masks + image * pixels + range.begin, int(range.end - range.begin)));
        if (lane == 0) counts[warp] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (images > 0) {
            int count = 0;
            for (int i = 0; i < WARPS; ++i) count += counts[i];
            partial[blockIdx.x] = count;
        }
        __threadfence();  // the count is there before the ticket says so
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        __threadfence();  // and whoever took the last ticket sees all counts
    }
    __syncthreads();
    if (!last) return;
    for (int64_t image = warp; image < images; image += WARPS) {
        int64_t sum = 0;
        for (int i = lane; i < per_image; i += 32) sum += __ldcg(partial + image * per_image + i);
        sum = warp_sum(sum);
        if (lane == 0) area[image] = sum;
    }
    __syncthreads();
    for (int64_t image = threadIdx.x; image < images; image += THREADS)
        delta[image] = difficulty(area[image], pixels, small[image], log_of_base);
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int64_t image = 0; image < images; ++image) sum += delta[image];
        *eta = step_scale(sum, images);
        *ticket = 0;
    }
}

int64_t size_of(Pixel pixel) { return pixel == Pixel::byte ? 1 : pixel == Pixel::float32 ? 4 : 8; }

int pieces_of_image(Pixel pixel, int64_t pixels) {
    return int(std::max<int64_t>((pixels * size_of(pixel) + MASK_BYTES - 1) / MASK_BYTES, 1));
}

template <class T>
void launch_mask_difficulty(const void* masks, const bool* small, int64_t images, int64_t pixels, int per_image,
                            double log_base, int64_t* area, float* delta, float* eta, int* partial, unsigned* ticket,
                            cudaStream_t stream) {
    mask_difficulty_kernel<<<blocks_for(images * per_image, 1), THREADS, 0, stream>>>(  // without images, one for eta
        static_cast<const T*>(masks), small, images, pixels, per_image, std::log(log_base), area, delta, eta, partial, ticket);
}

}  // namespace

int64_t mask_partials(Pixel pixel, int64_t images, int64_t pixels) { return images * pieces_of_image(pixel, pixels); }

void mask_difficulty(const void* masks, Pixel pixel, const bool* small, int64_t images, int64_t pixels, double log_base,
                     int64_t* area, float* delta, float* eta, int* partial, unsigned* ticket, int device, void* stream) {
    const OnDevice guard(device);
    const auto launch = pixel == Pixel::byte      ? launch_mask_difficulty<uint8_t>
                        : pixel == Pixel::float32 ? launch_mask_difficulty<float>
                                                  : launch_mask_difficulty<int64_t>;
    launch(masks, small, images, pixels, pieces_of_image(pixel, pixels), log_base, area, delta, eta, partial, ticket,
           static_cast<cudaStream_t>(stream));
    check(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------ adamw_accumulate_

namespace {

template <int WIDTH, bool ACCUMULATE>
__device__ void step(float* theta, const float* grad, float* m, float* v, float* delta, float eta, int64_t at,
                     const AdamW& adam) {
    Floats<WIDTH> t = load<WIDTH>(theta + at), first = load<WIDTH>(m + at), second = load<WIDTH>(v + at), d;
    const Floats<WIDTH> g = load<WIDTH>(grad + at);
    if (ACCUMULATE) d = load<WIDTH>(delta + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float s = adamw(t.x[i], g.x[i], first.x[i], second.x[i], adam);
        if (ACCUMULATE) d.x[i] += eta * s;
    }
    store(theta + at, t), store(m + at, first), store(v + at, second);
    if (ACCUMULATE) store(delta + at, d);
}

// One thread steps WIDTH parameters; the last thread those that are left over.
template <int WIDTH, bool ACCUMULATE>
__global__ void __launch_bounds__(THREADS)
adamw_kernel(float* __restrict__ theta, const float* __restrict__ grad, float* __restrict__ m, float* __restrict__ v,
             float* __restrict__ delta, const float* __restrict__ eta, int64_t n, AdamW adam) {
    const float scale = ACCUMULATE ? *eta : 0.0f;
    const Range range = piece(int64_t(blockIdx.x) * THREADS + threadIdx.x, WIDTH, n);
    if (range.begin + WIDTH <= n)
        step<WIDTH, ACCUMULATE>(theta, grad, m, v, delta, scale, range.begin, adam);
    else if (WIDTH > 1)
        for (int64_t i = range.begin; i < range.end; ++i) step<1, ACCUMULATE>(theta, grad, m, v, delta, scale, i, adam);
}

template <int WIDTH>
void launch_adamw(float* theta, const float* grad, float* m, float* v, float* delta, const float* eta, int64_t n,
                  const AdamW& adam, cudaStream_t stream) {
    const auto kernel = delta ? adamw_kernel<WIDTH, true> : adamw_kernel<WIDTH, false>;
    kernel<<<blocks_for(n, THREADS * WIDTH), THREADS, 0, stream>>>(theta, grad, m, v, delta, eta, n, adam);
}

}  // namespace

void adamw_accumulate(float* theta, const float* grad, float* m, float* v, float* delta, const float* eta, int64_t n,
                      const AdamW& adam, int device, void* stream) {
    if (n == 0) return;
    const OnDevice guard(device);
    const bool wide = aligned(theta) && aligned(grad) && aligned(m) && aligned(v) && aligned(delta);
    (wide ? launch_adamw<4> : launch_adamw<1>)(theta, grad, m, v, delta, eta, n, adam, static_cast<cudaStream_t>(stream));
    check(cudaGetLastError());
}

// -------------------------------------------------------------------------------------------------- aggregate

namespace {

constexpr int GROUP = 32;  // clients of one launch: their pointers travel among the kernel's arguments
constexpr int PACKS = 4;   // loads that each thread has under way

struct Clients {
    const float* updates[GROUP];
    float weights[GROUP];
    int count;
};

// Floats at i of n; 0 beyond the end.
template <int WIDTH>
__device__ Floats<WIDTH> load_within(const float* from, int64_t i, int64_t n) {
    Floats<WIDTH> values{};
    if (i + WIDTH <= n) return load<WIDTH>(from + i);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
        if (i + j < n) values.x[j] = from[i + j];
    return values;
}

template <int WIDTH>
__device__ void store_within(float* to, const Floats<WIDTH>& values, int64_t i, int64_t n) {
    if (i + WIDTH <= n) return store(to + i, values);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
        if (i + j < n) to[i + j] = values.x[j];
}

// A thread keeps its part of out in registers while all clients pass over it, so that out is written once.
// out may be theta. partial: (clients, blocks) sums of squares, in double, where no float's square overflows.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
aggregate_kernel(const float* theta, const __grid_constant__ Clients clients, int64_t n, float* out, double* partial) {
    __shared__ double sums[GROUP][WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0)
        for (int k = 0; k < clients.count; ++k) sums[k][warp] = 0;
    constexpr int64_t TILE = int64_t(THREADS) * PACKS * WIDTH;
    for (int64_t tile = blockIdx.x; tile * TILE < n; tile += gridDim.x) {
        const int64_t start = piece(tile, TILE, n).begin + threadIdx.x * WIDTH;
        Floats<WIDTH> sum[PACKS], x[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) sum[p] = load_within<WIDTH>(theta, start + p * THREADS * WIDTH, n);
        for (int k = 0; k < clients.count; ++k) {
#pragma unroll
            for (int p = 0; p < PACKS; ++p) x[p] = load_within<WIDTH>(clients.updates[k], start + p * THREADS * WIDTH, n);
            double squares[PACKS] = {};  // several chains of additions
#pragma unroll
            for (int p = 0; p < PACKS; ++p)
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    sum[p].x[j] -= clients.weights[k] * x[p].x[j];
                    squares[p] += double(x[p].x[j]) * double(x[p].x[j]);
                }
            const double square = warp_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
            if (lane == 0) sums[k][warp] += square;
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) store_within(out, sum[p], start + p * THREADS * WIDTH, n);
    }
    __syncthreads();
    if (int(threadIdx.x) < clients.count) {
        double square = 0;
        for (int i = 0; i < WARPS; ++i) square += sums[threadIdx.x][i];
        partial[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = square;
    }
}

// norms[k] = sum of a client's partial sums; one warp a client.
__global__ void norms_kernel(const double* __restrict__ partial, int blocks, double* norms) {
    double sum = 0;
    for (int i = int(threadIdx.x); i < blocks; i += 32) sum += partial[int64_t(blockIdx.x) * blocks + i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

}  // namespace

void aggregate(const float* theta, const float* const* updates, const float* weights, int clients, int64_t n, float* out,
               double* norms, double* partial, int device, void* stream_) {
    const OnDevice guard(device);
    const auto stream = static_cast<cudaStream_t>(stream_);
    const bool wide = aligned(theta) && aligned(out) && std::all_of(updates, updates + clients, aligned);
    const auto kernel = wide ? aggregate_kernel<4> : aggregate_kernel<1>;
    const unsigned blocks = std::min<unsigned>(blocks_for(n, THREADS * PACKS * (wide ? 4 : 1)), AGGREGATE_BLOCKS);
    for (int first = 0; first < clients; first += GROUP) {  // more than 32 clients go on from out
        Clients group{};
        group.count = std::min(clients - first, GROUP);
        std::copy_n(updates + first, group.count, group.updates);
        std::copy_n(weights + first, group.count, group.weights);
        double* sums = partial + int64_t(first) * blocks;
        kernel<<<blocks, THREADS, 0, stream>>>(first ? out : theta, group, n, out, sums);
        check(cudaGetLastError());
        norms_kernel<<<unsigned(group.count), 32, 0, stream>>>(sums, int(blocks), norms + first);
        check(cudaGetLastError());
    }
}

// --------------------------------------------------------------------------------------------------- devices

std::string problem(int device) {
    cudaFuncAttributes attributes;
    try {
        const OnDevice guard(device);
        // Asking for a kernel's attributes loads it: none has to be loaded while a graph is captured.
        check(cudaFuncGetAttributes(&attributes, mask_difficulty_kernel<uint8_t>));
        check(cudaFuncGetAttributes(&attributes, mask_difficulty_kernel<float>));
        check(cudaFuncGetAttributes(&attributes, mask_difficulty_kernel<int64_t>));
        for (const auto kernel : {adamw_kernel<1, false>, adamw_kernel<1, true>, adamw_kernel<4, false>, adamw_kernel<4, true>})
            check(cudaFuncGetAttributes(&attributes, kernel));
        for (const auto kernel : {aggregate_kernel<1>, aggregate_kernel<4>}) check(cudaFuncGetAttributes(&attributes, kernel));
        check(cudaFuncGetAttributes(&attributes, norms_kernel));
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

}  // namespace fedgs::cuda
