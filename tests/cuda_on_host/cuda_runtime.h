// A stand-in for CUDA that runs the kernels of csrc/cuda on the host: what they compute, when they synchronize and how
// their launches divide the work is theirs; speed and the memory model are not. Threads of a block are fibers that take
// turns at barriers, blocks run at the same time on a few system threads; who comes first is drawn from a seed.
//
// GCC's thread sanitizer, if it watches, takes each fiber for a thread of its own, whose only order is that of the
// barriers: what a kernel forgets to synchronize is reported, be it the shared memory of a block.
//
// LTSAM_HOST_DEVICE: the current device, d, has d + 1 multiprocessors with two blocks each; -1: there is none
// LTSAM_HOST_UNORDERED: 1, and barriers order nothing for the thread sanitizer, which must then report them as missing
// LTSAM_HOST_SEED: order of blocks and, between barriers, of threads
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define LT_NOT_WATCHED __attribute__((no_sanitize("thread")))
#else
#define LT_NOT_WATCHED
#endif

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
struct OnHostIndex {
  unsigned x;
};
inline thread_local OnHostIndex threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorNoDevice = 100, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

namespace on_host {

inline int setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : 0;
}

/// A fiber, as the thread sanitizer knows it; what changes fibers must not be watched itself.
struct Watched {
#ifdef __SANITIZE_THREAD__
  void* context = __tsan_create_fiber(0);
  ~Watched() { __tsan_destroy_fiber(context); }
  static void* current() { return __tsan_get_current_fiber(); }
  LT_NOT_WATCHED static void go(void* to) { __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync); }
  LT_NOT_WATCHED static void before(void* place) { __tsan_release(place); }
  LT_NOT_WATCHED static void after(void* place) { __tsan_acquire(place); }
#else
  void* context = nullptr;
  static void* current() { return nullptr; }
  static void go(void*) {}
  static void before(void*) {}
  static void after(void*) {}
#endif
};

/// One block at a time: its threads as fibers of the calling system thread.
class Block {
 public:
  explicit Block(unsigned threads)
      : fibers_(threads), watched_(threads), stacks_(new char[size_t(threads) * kStack]), order_(threads), random_(0) {
    std::iota(order_.begin(), order_.end(), 0u);
  }

  /// Returns false if some threads ended while others waited at a barrier.
  template <class Kernel>
  LT_NOT_WATCHED bool run(const Kernel& kernel, unsigned seed) {
    random_.seed(seed);
    body_ = [](void* k) { (*static_cast<const Kernel*>(k))(); };
    kernel_ = const_cast<Kernel*>(&kernel);
    current_ = this;
    scheduler_watched_ = Watched::current();
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      getcontext(&fibers_[t]);
      fibers_[t].uc_stack.ss_sp = stacks_.get() + size_t(t) * kStack;
      fibers_[t].uc_stack.ss_size = kStack;
      fibers_[t].uc_link = &scheduler_;
      makecontext(&fibers_[t], &Block::enter, 0);
    }
    for (size_t waiting = fibers_.size(); waiting;) {
      std::shuffle(order_.begin(), order_.end(), random_);
      waiting_ = 0;
      for (unsigned t : order_) {
        threadIdx.x = running_ = t;
        Watched::before(&fibers_);
        Watched::go(watched_[t].context);
        swapcontext(&scheduler_, &fibers_[t]);
      }
      Watched::after(&barrier_);
      waiting = waiting_;
      if (waiting && waiting != fibers_.size()) return false;
    }
    return true;
  }

  LT_NOT_WATCHED static void barrier() {
    Block& block = *current_;
    const unsigned thread = block.running_;
    ++block.waiting_;
    block.leave();
    swapcontext(&block.fibers_[thread], &block.scheduler_);
    static const bool unordered = setting("LTSAM_HOST_UNORDERED") != 0;
    if (!unordered) Watched::after(&block.fibers_);
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  LT_NOT_WATCHED static void enter() {
    Block& block = *current_;
    Watched::after(&block.fibers_);
    block.body_(block.kernel_);
    block.leave();
  }
  LT_NOT_WATCHED void leave() {
    Watched::before(&barrier_);
    Watched::go(scheduler_watched_);
  }

  static inline thread_local Block* current_ = nullptr;
  std::vector<ucontext_t> fibers_;
  std::vector<Watched> watched_;
  std::unique_ptr<char[]> stacks_;
  std::vector<unsigned> order_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  void* scheduler_watched_ = nullptr;
  char barrier_ = 0;
  void (*body_)(void*) = nullptr;
  void* kernel_ = nullptr;
  unsigned running_ = 0;
  size_t waiting_ = 0;
};

inline std::atomic<cudaError_t> last_error{cudaSuccess};
inline std::atomic<int> launches{0}, blocks_launched{0};

template <class Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  const int device = setting("LTSAM_HOST_DEVICE"), seed = setting("LTSAM_HOST_SEED");
  if (device < 0) {
    last_error = cudaErrorNoDevice;
    return;
  }
  ++launches;
  blocks_launched += int(blocks);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(seed)));
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    Block block(threads);
    blockDim.x = threads;
    gridDim.x = blocks;
    for (unsigned i; (i = next++) < blocks;) {
      blockIdx.x = order[i];
      if (!block.run(kernel, unsigned(seed) + order[i])) last_error = cudaErrorLaunchFailure;
    }
  };
  std::vector<std::thread> workers(std::min(blocks, 3u) - 1);
  for (std::thread& worker : workers) worker = std::thread(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace on_host

/// Numbers since the last call, for tests.
extern "C" __attribute__((visibility("default"))) int on_host_launches() { return on_host::launches.exchange(0); }
extern "C" __attribute__((visibility("default"))) int on_host_blocks() { return on_host::blocks_launched.exchange(0); }

#define LT_LAUNCH(kernel, blocks, threads, stream, argument) \
  ((void)(stream), on_host::launch(blocks, threads, [&] { kernel(argument); }))
#define LT_ARGUMENT(Type) const Type&

inline void __syncthreads() { on_host::Block::barrier(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

inline cudaError_t cudaGetLastError() { return on_host::last_error.exchange(cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "unspecified launch failure";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = on_host::setting("LTSAM_HOST_DEVICE");
  return *device < 0 ? cudaErrorNoDevice : cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device + 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
