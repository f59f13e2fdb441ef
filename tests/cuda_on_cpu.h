// CUDA on a CPU: as much of it as csrc/kernels_cuda.cu uses. With this header in place of
// <cuda_runtime.h> a C++ compiler takes the same source, and the kernels run where there is no GPU,
// watched by the compiler's sanitizers. tests/test_cuda_on_cpu.py does both.
//
// Threads are fibres of one thread of the system. They take turns wherever CUDA's threads meet
// (barriers, shuffles, atomics, fences): in order, or as a seed has it, with several blocks under
// way at once. What is noticed, beside wrong results:
//
// * a barrier or a shuffle that not all of its threads come to, or at which some come to another;
// * an access outside its buffer, of shared memory, too (AddressSanitizer), or of 16 bytes at an
//   address that is no multiple of 16 (UBSan). Shared memory begins with garbage, not with zeros;
// * a race: two threads at the same place, one of them writing, and nothing between that makes the
//   first access visible to the second (ThreadSanitizer, in a build of its own). Only these order
//   anything: a launch is after the one before it on its stream, what precedes a barrier is before
//   what follows it in the block, and what precedes a __threadfence() and an atomic is before what
//   follows that same atomic, taken by another thread, and a __threadfence(). A shuffle orders
//   nothing. A missing barrier or fence is a race however the threads happen to take turns.
//
// Not noticed: races between an atomic and a plain access to the same place; caches that are stale
// although the fences are there (before sm_70); anything about speed, registers and occupancy; what
// nvcc makes of the source; and rounding that differs on a GPU (fused multiply-add, tanh, pow).
// A fibre runs threads of several blocks, one after another; a race between two of those is missed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
// The test writes `__shared__ T name[N];` as `auto& name = cuda_on_cpu::shared<T[N]>(__COUNTER__);`.

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread whose turn it is

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace cuda_on_cpu {

// What cuda_on_cpu.cpp does. It is not compiled for ThreadSanitizer, which would watch it, too.
void launch(unsigned blocks, unsigned threads, void* stream, std::function<void()> thread);
void* shared_memory(int name, size_t bytes);
uint64_t shuffle(unsigned mask, uint64_t value, int offset, int line);

template <class T>
T& shared(int name) {
    return *static_cast<T*>(shared_memory(name, sizeof(T)));
}

}  // namespace cuda_on_cpu

// -------------------------------------------------------------------------------- in the kernels

void __syncthreads(int line = __builtin_LINE());
void __threadfence();
int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
double atomicAdd(double* address, double value);

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = cuda_on_cpu::shuffle(mask, bits, offset, line);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T __ldcg(const T* address) {
    return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

inline int min(int a, int b) { return a < b ? a : b; }

// --------------------------------------------------------------------------------- around them

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}

// Arguments are copied at once; the kernel runs in synchronize().
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> copies(arguments...);
    cuda_on_cpu::launch(config->gridDim.x, config->blockDim.x, config->stream,
                        [kernel, copies] { std::apply(kernel, copies); });
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    cuda_on_cpu::launch(1, 1, stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
    cuda_on_cpu::launch(1, 1, stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}
