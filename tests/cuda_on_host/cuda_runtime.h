// A stand-in for CUDA that runs the kernels of csrc/cuda on the host: what they compute, when they synchronize and how
// their launches divide the work is theirs; speed is not. runtime.cpp says what it checks. What is not declared here
// does not compile: of CUDA's functions only some that are legal while a stream is captured, of the ways in which
// threads meet only these.
//
// LTSAM_HOST_DEVICE: the current device, d, has d + 1 multiprocessors with two blocks each; -1: there is none
// LTSAM_HOST_SEED: order of blocks and of threads; 0: one after the other
// LTSAM_HOST_WITHOUT=FILE:LINE: the barrier or fence there is left out
#pragma once
#include <cstddef>
#include <memory>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

enum cudaError_t : int;
constexpr cudaError_t cudaSuccess{};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

namespace on_host {

struct Index {
  unsigned x;
};
Index thread_index(), block_index(), block_size(), grid_size();
void barrier(const char* file, int line);
void fence(const char* file, int line);
unsigned atomic_add(unsigned* address, unsigned value);

/// A kernel with its argument, which the launch copies as CUDA does: nothing of the caller's is read when it runs.
struct Launch {
  unsigned blocks, threads;
  cudaStream_t stream;
  std::shared_ptr<const void> argument;
  size_t bytes;
  void (*kernel)();
  void (*call)(void (*kernel)(), const void* argument);
};
void submit(const Launch& launch);

template <class Argument>
void launch(void (*kernel)(const Argument&), unsigned blocks, unsigned threads, cudaStream_t stream,
            const Argument& argument) {
  submit({blocks, threads, stream, std::make_shared<const Argument>(argument), sizeof argument,
          reinterpret_cast<void (*)()>(kernel), [](void (*kernel)(), const void* argument) {
            reinterpret_cast<void (*)(const Argument&)>(kernel)(*static_cast<const Argument*>(argument));
          }});
}

}  // namespace on_host

#define LT_LAUNCH(kernel, blocks, threads, stream, argument) \
  on_host::launch(kernel, blocks, unsigned(threads), stream, argument)
#define LT_ARGUMENT(Type) const Type&

#define threadIdx (on_host::thread_index())
#define blockIdx (on_host::block_index())
#define blockDim (on_host::block_size())
#define gridDim (on_host::grid_size())
#define __syncthreads() on_host::barrier(__FILE__, __LINE__)
#define __threadfence() on_host::fence(__FILE__, __LINE__)
inline unsigned atomicAdd(unsigned* address, unsigned value) { return on_host::atomic_add(address, value); }
