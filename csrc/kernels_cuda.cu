// The kernels for CUDA GPUs. For each operation first the kernel that one would write first, then
// what the one in use does differently, and that one. All three only stream memory, so those in use
// read and write 16 bytes at a time, and several loads are under way before the first is used.
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

// kernel<<<blocks, threads, 0, stream>>>(arguments...), as a function. Every kernel starts here.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// How many blocks it takes, as CUDA counts them.
unsigned blocks_for(int64_t n, int64_t per_block) {
    const int64_t blocks = (n + per_block - 1) / per_block;
    if (blocks > INT32_MAX) throw std::runtime_error("too large for one launch");
    return unsigned(std::max<int64_t>(blocks, 1));
}

// --------------------------------------------------------------------------------- mask_difficulty

// First: a thread a pixel, and each lesion pixel adds 1 to its image's area.
template <class T>
__global__ void naive_area_kernel(const T* masks, int64_t images, int64_t pixels, int64_t* area) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= images * pixels || masks[i] == T(0)) return;
    atomicAdd(reinterpret_cast<unsigned long long*>(area + i / pixels), 1ull);
}

// A thread an image.
__global__ void naive_difficulty_kernel(Masks batch, double log_of_base) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= batch.images) return;
    batch.difficulty[i] = difficulty_of(batch.area[i], batch.pixels, batch.small[i], log_of_base);
}

// One thread.
__global__ void naive_eta_kernel(Masks batch) {
    double sum = 0;
    for (int64_t i = 0; i < batch.images; ++i) sum += batch.difficulty[i];
    *batch.eta = step_scale(sum, batch.images);
}

template <class T>
void launch_naive_mask_difficulty(const Masks& batch, cudaStream_t stream) {
    check(cudaMemsetAsync(batch.area, 0, size_t(batch.images) * sizeof(int64_t), stream));

    const unsigned blocks = blocks_for(batch.images * batch.pixels, THREADS);
    launch(naive_area_kernel<T>, blocks, THREADS, stream, static_cast<const T*>(batch.masks),
           batch.images, batch.pixels, batch.area);

    launch(naive_difficulty_kernel, blocks_for(batch.images, THREADS), THREADS, stream, batch,
           std::log(batch.log_base));
    launch(naive_eta_kernel, 1, 1, stream, batch);
}

// What the kernel in use does differently:
//
// * A thread loads 16 bytes at a time, and four such loads before it counts the first.
// * Lesion pixels are counted in registers, then over a warp by shuffles, then over a block in
//   shared memory. No atomic for each of them: those of one image would wait for one another.
// * A block counts in one image only, so that no thread has to divide to find out which it is in.
// * One launch instead of three and a memset: the block that finishes last does what is left.

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
    launch(mask_difficulty_kernel<T>, blocks, THREADS, stream, static_cast<const T*>(batch.masks),
           batch.small, batch.images, batch.pixels, per_image, std::log(batch.log_base), batch.area,
           batch.difficulty, batch.eta, partial, ticket);
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
}

void naive::mask_difficulty(const Masks& batch, Place place) {
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    if (batch.pixel == Pixel::byte)
        launch_naive_mask_difficulty<uint8_t>(batch, stream);
    else if (batch.pixel == Pixel::float32)
        launch_naive_mask_difficulty<float>(batch, stream);
    else
        launch_naive_mask_difficulty<int64_t>(batch, stream);
}

// ------------------------------------------------------------------------------- adamw_accumulate_

namespace {

// First: a thread a parameter.
__global__ void naive_adamw_kernel(Step step, AdamWOptions options) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= step.n) return;
    const AdamW adam = adamw_at(*step.t, options);
    const float s = adamw(step.theta[i], step.grad[i], step.m[i], step.v[i], adam);
    if (step.update) step.update[i] += *step.eta * s;
}

// What the kernel in use does differently:
//
// * A thread steps four parameters, loads and stores them 16 bytes at a time, and all five loads
//   are under way before it needs the first.
// * One thread of a block works out 1 - beta^t for all, instead of each: two powers in double, for
//   which most GPUs have few units. The loads are under way meanwhile.
// * Whether there is an update is settled when the kernel is compiled.

// WIDTH parameters, and what a step reads beside them.
template <int WIDTH>
struct Parameters {
    Floats<WIDTH> theta, grad, m, v, update;
};

template <int WIDTH, bool ACCUMULATE>
__device__ Parameters<WIDTH> load_parameters(const Step& step, int64_t at) {
    Parameters<WIDTH> x;
    x.theta = load<WIDTH>(step.theta + at);
    x.grad = load<WIDTH>(step.grad + at);
    x.m = load<WIDTH>(step.m + at);
    x.v = load<WIDTH>(step.v + at);
    if (ACCUMULATE) x.update = load<WIDTH>(step.update + at);
    return x;
}

template <int WIDTH, bool ACCUMULATE>
__device__ void step_and_store(const Step& step, int64_t at, Parameters<WIDTH> x, float eta,
                               const AdamW& adam) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float s = adamw(x.theta.x[i], x.grad.x[i], x.m.x[i], x.v.x[i], adam);
        if (ACCUMULATE) x.update.x[i] += eta * s;
    }

    store(step.theta + at, x.theta);
    store(step.m + at, x.m);
    store(step.v + at, x.v);
    if (ACCUMULATE) store(step.update + at, x.update);
}

// One thread steps WIDTH parameters; the last thread those that are left over.
template <int WIDTH, bool ACCUMULATE>
__global__ void __launch_bounds__(THREADS) adamw_kernel(Step step, AdamWOptions options) {
    __shared__ AdamW adam;
    const Range range = piece(int64_t(blockIdx.x) * THREADS + threadIdx.x, WIDTH, step.n);
    const bool whole = range.begin + WIDTH <= step.n;

    Parameters<WIDTH> x;
    if (whole) x = load_parameters<WIDTH, ACCUMULATE>(step, range.begin);
    const float eta = ACCUMULATE ? *step.eta : 0.0f;
    if (threadIdx.x == 0) adam = adamw_at(*step.t, options);
    __syncthreads();

    if (whole) {
        step_and_store<WIDTH, ACCUMULATE>(step, range.begin, x, eta, adam);
        return;
    }
    for (int64_t i = range.begin; i < range.end; ++i) {
        const Parameters<1> one = load_parameters<1, ACCUMULATE>(step, i);
        step_and_store<1, ACCUMULATE>(step, i, one, eta, adam);
    }
}

template <int WIDTH>
void launch_adamw(const Step& step, const AdamWOptions& options, cudaStream_t stream) {
    const auto kernel = step.update ? adamw_kernel<WIDTH, true> : adamw_kernel<WIDTH, false>;
    launch(kernel, blocks_for(step.n, THREADS * WIDTH), THREADS, stream, step, options);
}

}  // namespace

void adamw_accumulate(const Step& step, const AdamWOptions& options, Place place) {
    if (step.n == 0) return;
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);

    // Parts of a larger vector may begin anywhere: they are stepped one parameter at a time.
    const bool wide = aligned(step.theta) && aligned(step.grad) && aligned(step.m) &&
                      aligned(step.v) && aligned(step.update);
    if (wide)
        launch_adamw<4>(step, options, stream);
    else
        launch_adamw<1>(step, options, stream);
}

void naive::adamw_accumulate(const Step& step, const AdamWOptions& options, Place place) {
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    launch(naive_adamw_kernel, blocks_for(step.n, THREADS), THREADS, stream, step, options);
}

// --------------------------------------------------------------------------------------- aggregate

namespace {

// First: a launch a client, after total was copied to out; a thread an element.
__global__ void naive_add_kernel(const float* update, float weight, int64_t n, float* out,
                                 double* norm) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] += weight * update[i];
    atomicAdd(norm, double(update[i]) * double(update[i]));
}

// What the kernel in use does differently:
//
// * One launch for up to 32 clients: the running sum stays in registers while they pass. That is
//   K + 1 reads and 1 write of n elements, instead of 2 K + 1 reads and K + 1 writes.
// * 16 bytes at a time, and four loads under way.
// * Squares are added up over a thread, a warp and a block, and over the blocks by a second kernel:
//   no n atomics that wait for one another, and always the same order, so always the same bits.

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

        // The first 32 clients begin with total, those that follow go on from out: each further 32
        // read and write the running sum once more than one launch for all would have to.
        const float* from = first == 0 ? sum.total : sum.out;
        double* sums = partial + int64_t(first) * blocks;
        launch(kernel, blocks, THREADS, stream, from, group, sum.n, sum.out, sums);
        launch(norms_kernel, unsigned(group.count), 32, stream, sums, int(blocks),
               sum.norms + first);
    }
}

void naive::aggregate(const Sum& sum, Place place) {
    const OnDevice guard(place.device);
    const auto stream = static_cast<cudaStream_t>(place.stream);
    const size_t bytes = size_t(sum.n) * sizeof(float);
    check(cudaMemcpyAsync(sum.out, sum.total, bytes, cudaMemcpyDeviceToDevice, stream));
    check(cudaMemsetAsync(sum.norms, 0, sum.updates.size() * sizeof(double), stream));
    for (size_t k = 0; k < sum.updates.size(); ++k)
        launch(naive_add_kernel, blocks_for(sum.n, THREADS), THREADS, stream, sum.updates[k],
               sum.weights[k], sum.n, sum.out, sum.norms + k);
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
