// The kernels for CUDA GPUs. All three only stream memory: threads read and write 16 bytes at a
// time, and several loads are under way before the first is used.
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
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(~0u, value, offset);
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

// --------------------------------------------------------------------------------- mask_difficulty

constexpr int LOADS = 4;                          // 16-byte loads that each thread has under way
constexpr int MASK_BYTES = THREADS * LOADS * 16;  // what a block reads

// How many pixels of these 16 bytes are not 0. The pointer only tells the pixels' type.
__device__ int count_nonzero(uint4 x, const uint8_t*) {
    int count = 0;
    for (const unsigned word : {x.x, x.y, x.z, x.w}) {
        // A byte's top bit becomes 1 where the byte is not 0.
        const unsigned top_bits = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u;
        count += __popc(top_bits);
    }
    return count;
}

__device__ int count_nonzero(uint4 x, const float*) {
    int count = 0;
    for (const unsigned word : {x.x, x.y, x.z, x.w}) count += __uint_as_float(word) != 0.0f;
    return count;
}

__device__ int count_nonzero(uint4 x, const int64_t*) {
    return ((x.x | x.y) != 0) + ((x.z | x.w) != 0);
}

// A thread's share of a block's pixels: some singly up to a multiple of 16 bytes, then 16 bytes at
// a time, then the rest singly.
template <class T>
__device__ int count_share(const T* masks, int n) {
    constexpr int PER_LOAD = 16 / int(sizeof(T));
    const int thread = int(threadIdx.x);
    const int misaligned = int(reinterpret_cast<uintptr_t>(masks) % 16 / sizeof(T));
    const int head = min(n, (PER_LOAD - misaligned) % PER_LOAD);
    const int loads = (n - head) / PER_LOAD;
    const int tail = head + loads * PER_LOAD;

    const uint4* packs = reinterpret_cast<const uint4*>(masks + head);
    uint4 x[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int pack = thread + i * THREADS;
        x[i] = pack < loads ? packs[pack] : uint4{};
    }

    int count = thread < head && masks[thread] != T(0);
    if (tail + thread < n) count += masks[tail + thread] != T(0);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) count += count_nonzero(x[i], masks);
    return count;
}

// Each block counts one piece of one image. The last block to finish adds the pieces up, in order,
// and works out the rest.
template <class T>
__global__ void __launch_bounds__(THREADS)
mask_difficulty_kernel(const T* __restrict__ masks, const bool* __restrict__ small, int64_t images,
                       int64_t pixels, int per_image, double log_of_base, int64_t* area,
                       float* difficulty, float* eta, int* partial, unsigned* ticket) {
    __shared__ int counts[WARPS];
    __shared__ bool last;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;

    if (images > 0) {
        const int64_t image = blockIdx.x / unsigned(per_image);
        const int64_t index = blockIdx.x % unsigned(per_image);
        const Range range = piece(index, MASK_BYTES / sizeof(T), pixels);
        const T* start = masks + image * pixels + range.begin;
        const int count = warp_sum(count_share(start, int(range.end - range.begin)));
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

    // Areas: a warp an image.
    for (int64_t image = warp; image < images; image += WARPS) {
        int64_t sum = 0;
        for (int i = lane; i < per_image; i += 32) sum += __ldcg(partial + image * per_image + i);
        sum = warp_sum(sum);
        if (lane == 0) area[image] = sum;
    }
    __syncthreads();

    // Difficulties: a thread an image.
    for (int64_t image = threadIdx.x; image < images; image += THREADS)
        difficulty[image] = difficulty_of(area[image], pixels, small[image], log_of_base);
    __syncthreads();

    // The step scale, and the ticket for the next call.
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int64_t image = 0; image < images; ++image) sum += difficulty[image];
        *eta = step_scale(sum, images);
        *ticket = 0;
    }
}

int64_t size_of(Pixel pixel) {
    if (pixel == Pixel::byte) return 1;
    if (pixel == Pixel::float32) return 4;
    return 8;
}

int pieces_of_image(Pixel pixel, int64_t pixels) {
    const int64_t pieces = (pixels * size_of(pixel) + MASK_BYTES - 1) / MASK_BYTES;
    return int(std::max<int64_t>(pieces, 1));
}

template <class T>
void launch_mask_difficulty(const Masks& batch, int* partial, unsigned* ticket,
                            cudaStream_t stream) {
    const int per_image = pieces_of_image(batch.pixel, batch.pixels);
    const unsigned blocks = blocks_for(batch.images * per_image, 1);  // without images one, for eta
    mask_difficulty_kernel<<<blocks, THREADS, 0, stream>>>(
        static_cast<const T*>(batch.masks), batch.small, batch.images, batch.pixels, per_image,
        std::log(batch.log_base), batch.area, batch.difficulty, batch.eta, partial, ticket);
}

}  // namespace

int64_t mask_partials(Pixel pixel, int64_t images, int64_t pixels) {
    return images * pieces_of_image(pixel, pixels);
}

void mask_difficulty(const Masks& batch, int* partial, unsigned* ticket, Place place) {
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    if (batch.pixel == Pixel::byte)
        launch_mask_difficulty<uint8_t>(batch, partial, ticket, stream);
    else if (batch.pixel == Pixel::float32)
        launch_mask_difficulty<float>(batch, partial, ticket, stream);
    else
        launch_mask_difficulty<int64_t>(batch, partial, ticket, stream);
    check(cudaGetLastError());
}

// ------------------------------------------------------------------------------- adamw_accumulate_

namespace {

template <int WIDTH, bool ACCUMULATE>
__device__ void step_at(float* theta, const float* grad, float* m, float* v, float* update,
                        float eta, int64_t at, const AdamW& adam) {
    Floats<WIDTH> t = load<WIDTH>(theta + at);
    Floats<WIDTH> first = load<WIDTH>(m + at);
    Floats<WIDTH> second = load<WIDTH>(v + at);
    const Floats<WIDTH> g = load<WIDTH>(grad + at);
    Floats<WIDTH> u;
    if (ACCUMULATE) u = load<WIDTH>(update + at);

#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float s = adamw(t.x[i], g.x[i], first.x[i], second.x[i], adam);
        if (ACCUMULATE) u.x[i] += eta * s;
    }

    store(theta + at, t);
    store(m + at, first);
    store(v + at, second);
    if (ACCUMULATE) store(update + at, u);
}

// One thread steps WIDTH parameters; the last thread those that are left over.
template <int WIDTH, bool ACCUMULATE>
__global__ void __launch_bounds__(THREADS)
adamw_kernel(float* __restrict__ theta, const float* __restrict__ grad, float* __restrict__ m,
             float* __restrict__ v, float* __restrict__ update, const float* __restrict__ eta,
             int64_t n, AdamW adam) {
    const float scale = ACCUMULATE ? *eta : 0.0f;
    const Range range = piece(int64_t(blockIdx.x) * THREADS + threadIdx.x, WIDTH, n);
    if (range.begin + WIDTH <= n)
        step_at<WIDTH, ACCUMULATE>(theta, grad, m, v, update, scale, range.begin, adam);
    else if (WIDTH > 1)
        for (int64_t i = range.begin; i < range.end; ++i)
            step_at<1, ACCUMULATE>(theta, grad, m, v, update, scale, i, adam);
}

template <int WIDTH>
void launch_adamw(const Step& step, const AdamW& adam, cudaStream_t stream) {
    const auto kernel = step.update ? adamw_kernel<WIDTH, true> : adamw_kernel<WIDTH, false>;
    const unsigned blocks = blocks_for(step.n, THREADS * WIDTH);
    kernel<<<blocks, THREADS, 0, stream>>>(step.theta, step.grad, step.m, step.v, step.update,
                                           step.eta, step.n, adam);
}

}  // namespace

void adamw_accumulate(const Step& step, const AdamW& adam, Place place) {
    if (step.n == 0) return;
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);

    // Parts of a larger vector may begin anywhere: they are stepped one parameter at a time.
    const bool wide = aligned(step.theta) && aligned(step.grad) && aligned(step.m) &&
                      aligned(step.v) && aligned(step.update);
    if (wide)
        launch_adamw<4>(step, adam, stream);
    else
        launch_adamw<1>(step, adam, stream);
    check(cudaGetLastError());
}

// --------------------------------------------------------------------------------------- aggregate

namespace {

constexpr int GROUP = 32;  // clients of one launch: their addresses travel with its arguments
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

// A thread keeps its part of out in registers while all clients pass over it, so that out is
// written once. out may be total.
// partial: (clients, blocks) sums of squares, in double, where no float's square overflows.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
aggregate_kernel(const float* total, const __grid_constant__ Clients clients, int64_t n, float* out,
                 double* partial) {
    __shared__ double sums[GROUP][WARPS];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    if (lane == 0)
        for (int k = 0; k < clients.count; ++k) sums[k][warp] = 0;

    constexpr int64_t TILE = int64_t(THREADS) * PACKS * WIDTH;
    constexpr int STRIDE = THREADS * WIDTH;  // between the packs of a thread
    for (int64_t tile = blockIdx.x; tile * TILE < n; tile += gridDim.x) {
        const int64_t start = piece(tile, TILE, n).begin + threadIdx.x * WIDTH;
        Floats<WIDTH> sum[PACKS], x[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            sum[p] = load_within<WIDTH>(total, start + p * STRIDE, n);

        for (int k = 0; k < clients.count; ++k) {
            const float* update = clients.updates[k];
#pragma unroll
            for (int p = 0; p < PACKS; ++p)
                x[p] = load_within<WIDTH>(update, start + p * STRIDE, n);

            double squares[PACKS] = {};  // several chains of additions
#pragma unroll
            for (int p = 0; p < PACKS; ++p)
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    sum[p].x[j] += clients.weights[k] * x[p].x[j];
                    squares[p] += double(x[p].x[j]) * double(x[p].x[j]);
                }
            const double square = warp_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
            if (lane == 0) sums[k][warp] += square;
        }

#pragma unroll
        for (int p = 0; p < PACKS; ++p) store_within(out, sum[p], start + p * STRIDE, n);
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
    const double* of_client = partial + int64_t(blockIdx.x) * blocks;
    double sum = 0;
    for (int i = int(threadIdx.x); i < blocks; i += 32) sum += of_client[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

}  // namespace

void aggregate(const Sum& sum, double* partial, Place place) {
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    const int clients = int(sum.updates.size());

    const bool wide = aligned(sum.total) && aligned(sum.out) &&
                      std::all_of(sum.updates.begin(), sum.updates.end(), aligned);
    const auto kernel = wide ? aggregate_kernel<4> : aggregate_kernel<1>;
    const int tile = THREADS * PACKS * (wide ? 4 : 1);
    const unsigned blocks = std::min<unsigned>(blocks_for(sum.n, tile), AGGREGATE_BLOCKS);

    for (int first = 0; first < clients; first += GROUP) {
        Clients group{};
        group.count = std::min(clients - first, GROUP);
        std::copy_n(&sum.updates[first], group.count, group.updates);
        std::copy_n(&sum.weights[first], group.count, group.weights);

        // The first 32 clients begin with total, those that follow go on from out.
        const float* from = first == 0 ? sum.total : sum.out;
        double* sums = partial + int64_t(first) * blocks;
        kernel<<<blocks, THREADS, 0, stream>>>(from, group, sum.n, sum.out, sums);
        check(cudaGetLastError());

        double* norms = sum.norms + first;
        norms_kernel<<<unsigned(group.count), 32, 0, stream>>>(sums, int(blocks), norms);
        check(cudaGetLastError());
    }
}

// ----------------------------------------------------------------------------------------- devices

namespace {

// Asking for a kernel's attributes loads it: none has to be loaded while a graph is captured.
template <class Kernel>
void load_kernel(Kernel* kernel) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace

std::string problem(int device) {
    try {
        const OnDevice guard(device);
        load_kernel(mask_difficulty_kernel<uint8_t>);
        load_kernel(mask_difficulty_kernel<float>);
        load_kernel(mask_difficulty_kernel<int64_t>);
        load_kernel(adamw_kernel<1, false>);
        load_kernel(adamw_kernel<1, true>);
        load_kernel(adamw_kernel<4, false>);
        load_kernel(adamw_kernel<4, true>);
        load_kernel(aggregate_kernel<1>);
        load_kernel(aggregate_kernel<4>);
        load_kernel(norms_kernel);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

}  // namespace fedgs::cuda
