// The stand-in's runtime: streams, graphs, and blocks of threads as fibers. It checks
//
// * launches: the grid, the size of the argument, the stream, which must be the current one;
// * accesses, if the kernels are compiled with -fsanitize=thread, whose calls come here: to nothing but the argument,
//   the block's shared memory once that is written, and tensors that a test has named, each within a single one;
// * races: two threads touch a byte, one writes it, and neither barriers nor fences with an atomic between them order
// the
//   two, by the rules of PTX's memory model.
//
// Threads take turns at barriers, fences, atomics and some accesses; up to three blocks are under way at a time, on a
// system thread each, of which one runs. All is drawn from the seed, so a failure can be repeated.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace on_host {
namespace {

enum : int { kNoDevice = 100, kInvalidConfiguration = 9, kIllegalAddress = 700, kOutOfResources = 701 };
constexpr unsigned kResident = 3;  // blocks at a time

int setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : 0;
}

// ---- Which accesses are ordered

/// When a thread did something: barriers that its block had passed, and fences that it had.
struct Moment {
  uint16_t block, thread;
  uint32_t barriers, fences;
};
constexpr uint16_t kSeveral = 0xffff;  // threads of a block, between the same barriers

/// What is known of other blocks: for a fence of theirs what came before it, by thread and by barriers.
using Known = std::map<std::pair<uint16_t, uint16_t>, Moment>;
using Shared = std::shared_ptr<const Known>;

Shared joined(const Shared& a, const Shared& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<Known>(*a);
  for (const auto& [key, moment] : *b) {
    Moment& mine = both->emplace(key, moment).first->second;
    if (std::make_pair(mine.barriers, mine.fences) < std::make_pair(moment.barriers, moment.fences)) mine = moment;
  }
  return both;
}

bool covers(const Shared& known, const Moment& then) {
  if (known)
    for (const auto& [key, fence] : *known)
      if (key.first == then.block &&
          (fence.barriers > then.barriers ||
           (key.second == then.thread && fence.barriers == then.barriers && fence.fences >= then.fences)))
        return true;
  return false;
}

enum Kind : uint8_t { kRead, kWrite, kAtomic };
constexpr const char* kNames[] = {"read", "write", "atomic"};

struct Access {
  Moment when;
  Kind kind;
};

/// What was done to two bytes since the launch began: the last write, and later the last read and atomic of each block.
struct Cell {
  uint32_t launch = 0, count = 0;
  Access first[2];
  std::vector<Access>* more = nullptr;
};
constexpr size_t kCellBytes = 2;  // nothing smaller is written

struct Memory {
  uintptr_t begin, end;
  std::unique_ptr<Cell[]> cells;
};

// ---- The device

struct Device {
  int error = 0;
  std::string message;
  int launches = 0, blocks = 0, fail_after = -1;
  cudaStream_t current = nullptr, capturing = nullptr;
  bool deferring = false;
  std::vector<Launch> queue;
  std::vector<std::vector<Launch>> graphs;
  std::map<uintptr_t, Memory> memory;
  uint32_t number = 0;
  std::vector<std::unique_ptr<std::vector<Access>>> overflow;

  void fail(int code, const std::string& text) {
    if (error) return;
    error = code;
    message = text;
  }
} device;

/// Lets one system thread run at a time.
class Baton {
 public:
  Baton(unsigned count, unsigned seed) : active_(count), random_(seed) {
    std::iota(active_.begin(), active_.end(), 0u);
  }
  void wait(unsigned me) {
    std::unique_lock<std::mutex> lock(mutex_);
    turned_.wait(lock, [&] { return holder_ == me; });
  }
  void pass(unsigned me) {
    if (active_.size() < 2) return;
    draw();
    if (holder_ != me) wait(me);
  }
  void leave(unsigned me) {
    active_.erase(std::find(active_.begin(), active_.end(), me));
    if (!active_.empty()) draw();
  }

 private:
  void draw() {
    std::lock_guard<std::mutex> lock(mutex_);
    holder_ = active_[random_() % active_.size()];
    turned_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable turned_;
  std::vector<unsigned> active_;
  std::mt19937 random_;
  unsigned holder_ = 0;
};

struct Counter {
  Shared known;      ///< what the fences before atomics on it have made known
  const void* last;  ///< who was the last: what he does next with it comes after all atomics on it
};
std::unordered_map<uintptr_t, Counter> counters;  // by address

thread_local class Block* current = nullptr;

/// One block at a time: its threads as fibers of the calling system thread.
class Block {
 public:
  Block(const Launch& launch, Baton& baton, unsigned worker, bool shuffles)
      : launch_(launch),
        baton_(baton),
        worker_(worker),
        shuffles_(shuffles),
        fibers_(launch.threads),
        stacks_(new char[size_t(launch.threads) * kStack]) {
    current = this;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* block) {
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_TLS) {
              const uintptr_t begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
              const uintptr_t end = begin + info->dlpi_phdr[i].p_memsz, mine = reinterpret_cast<uintptr_t>(&current);
              if (begin <= mine && mine < end) static_cast<Block*>(block)->shared_ = {begin, end};
            }
          return 0;
        },
        this);
  }

  void run(unsigned index, unsigned seed) {
    index_ = index;
    random_.seed(seed);
    barriers_ = 0;
    known_ = nullptr;
    in_shared_.clear();
    for (Fiber& fiber : fibers_) {
      fiber.begins = fiber.state != kEnded;  // in the middle of a kernel, if there was a fault
      fiber.state = kReady;
      fiber.known = fiber.pending = fiber.fenced = nullptr;
      fiber.fences = 0;
    }
    std::vector<unsigned> ready;
    for (;;) {
      ready.clear();
      for (unsigned t = 0; t < fibers_.size(); ++t)
        if (fibers_[t].state == kReady) ready.push_back(t);
      if (ready.empty() && !meet()) return;
      if (shuffles_) std::shuffle(ready.begin(), ready.end(), random_);
      for (unsigned t : ready) {
        thread_ = t;
        in_kernel_ = true;
        go_on(fibers_[t]);
        in_kernel_ = false;
        if (std::exchange(hands_over_, false)) baton_.pass(worker_);
      }
      if (shuffles_ && random_() % 4 == 0) baton_.pass(worker_);
    }
  }

  void barrier(const char* file, int line) {
    const Aside aside(*this);
    if (left_out(file, line)) return pause();
    fibers_[thread_].line = line;
    yield(kWaiting);
  }
  void fence(const char* file, int line) {
    const Aside aside(*this);
    pause();
    if (left_out(file, line)) return;
    Fiber& fiber = fibers_[thread_];
    fiber.known = joined(fiber.known, fiber.pending);
    const Moment now = moment();
    auto released = std::make_shared<Known>(fiber.known ? *fiber.known : Known());
    (*released)[{now.block, now.thread}] = now;
    fiber.fenced = released;
    ++fiber.fences;
  }
  unsigned add(unsigned* address, unsigned value) {
    const Aside aside(*this);
    pause();
    Fiber& fiber = fibers_[thread_];
    look(reinterpret_cast<uintptr_t>(address), sizeof *address, kAtomic);
    Counter& at = counters[reinterpret_cast<uintptr_t>(address)];
    at.last = &fiber;
    fiber.pending = joined(fiber.pending, at.known);
    at.known = joined(at.known, fiber.fenced);
    const unsigned old = *address;
    *address += value;
    return old;
  }

  void access(uintptr_t address, size_t bytes, Kind kind) {
    if (!in_kernel_) return;
    const Aside aside(*this);
    look(address, bytes, kind);
  }

  Index thread() const { return {thread_}; }
  Index index() const { return {index_}; }
  Index size() const { return {launch_.threads}; }
  Index grid() const { return {launch_.blocks}; }

 private:
  static constexpr size_t kStack = 64 << 10;
  enum State { kReady, kWaiting, kStopped, kEnded };
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    State state = kReady;
    bool begins;
    int line;
    uint32_t fences;
    Shared known, pending, fenced;  ///< pending: of atomics, until a fence comes
  };
  /// While the runtime is busy: the linker may give it the kernels' copies of the library's functions, which are
  /// traced.
  struct Aside {
    Block& block;
    explicit Aside(Block& block) : block(block) { block.in_kernel_ = false; }
    ~Aside() { block.in_kernel_ = true; }
  };

  void look(uintptr_t address, size_t bytes, Kind kind) {
    const uintptr_t stack = reinterpret_cast<uintptr_t>(stacks_.get()) + thread_ * kStack;
    if (address - stack < kStack) return;
    if (address - reinterpret_cast<uintptr_t>(launch_.argument.get()) < launch_.bytes) {
      if (kind == kWrite) stop("writes its argument", address, bytes, kind);
      return;
    }
    if (shuffles_ && random_() % 64 == 0) yield(kReady);
    if (address >= shared_.first && address + bytes <= shared_.second) {
      bool known = kind != kRead;
      for (uintptr_t at = address / kCellBytes; at <= (address + bytes - 1) / kCellBytes; ++at) {
        Cell& cell = in_shared_[at];
        known |= cell.launch == device.number;  // not all: structs have holes
        note(cell, address, bytes, kind);
      }
      return known ? void() : stop("shared memory without a value", address, bytes, kind);
    }
    auto found = device.memory.upper_bound(address);
    if (found == device.memory.begin() || (--found, address + bytes > found->second.end))
      return stop("in no tensor of the call", address, bytes, kind);
    Memory& memory = found->second;
    const size_t first = (address - memory.begin) / kCellBytes,
                 last = (address + bytes - 1 - memory.begin) / kCellBytes;
    if (!memory.cells) memory.cells.reset(new Cell[(memory.end - memory.begin) / kCellBytes + 1]);
    for (size_t at = first; at <= last; ++at) note(memory.cells[at], address, bytes, kind);
  }

  static void enter() {
    for (;;) {
      const Launch& launch = current->launch_;
      launch.call(launch.kernel, launch.argument.get());
      current->yield(kEnded);
    }
  }
  void go_on(Fiber& fiber) {
    const bool begins = std::exchange(fiber.begins, false);
    if (begins) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.get() + size_t(&fiber - fibers_.data()) * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, &Block::enter, 0);
    }
#ifdef __SANITIZE_ADDRESS__  // follows swapcontext() from stack to stack, and nothing else
    swapcontext(&scheduler_, &fiber.context);
  }
  void yield(State state) {
    Fiber& fiber = fibers_[thread_];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler_);
  }
#else  // without its system calls
    if (_setjmp(back_)) return;
    if (begins) setcontext(&fiber.context);
    _longjmp(fiber.place, 1);
  }
  void yield(State state) {
    Fiber& fiber = fibers_[thread_];
    fiber.state = state;
    if (!_setjmp(fiber.place)) _longjmp(back_, 1);
  }
#endif
  bool left_out(const char* file, int line) const {
    if (!without_) return false;
    const char* name = std::strrchr(file, '/');
    return (name ? name + 1 : file) + (":" + std::to_string(line)) == without_;
  }
  void pause() {
    hands_over_ = shuffles_;
    if (shuffles_) yield(kReady);
  }

  /// When no thread can go on: the barrier, if all wait at one. False if the block has ended.
  bool meet() {
    const auto waits = [&](const Fiber& fiber) { return fiber.state == kWaiting && fiber.line == fibers_[0].line; };
    const size_t waiting = size_t(std::count_if(fibers_.begin(), fibers_.end(), waits));
    if (waiting != fibers_.size()) {
      const auto ended = [](const Fiber& fiber) { return fiber.state >= kStopped; };
      if (!std::all_of(fibers_.begin(), fibers_.end(), ended))
        device.fail(kIllegalAddress, "threads of a block do not all come to the same barrier");
      return false;
    }
    for (Fiber& fiber : fibers_) known_ = joined(known_, fiber.known);
    for (Fiber& fiber : fibers_) fiber.known = known_, fiber.state = kReady;
    ++barriers_;
    return true;
  }

  Moment moment() const { return {uint16_t(index_), uint16_t(thread_), barriers_, fibers_[thread_].fences}; }

  bool ordered(const Access& other, uintptr_t address) const {
    const Moment& then = other.when;
    if (other.kind == kAtomic && counters[address].last == &fibers_[thread_]) return true;
    if (then.block == index_) return then.barriers < barriers_ || then.thread == thread_;
    return covers(fibers_[thread_].known, then);
  }

  void note(Cell& cell, uintptr_t address, size_t bytes, Kind kind) {
    if (cell.launch != device.number) {
      cell.launch = device.number;
      cell.count = 0;
      cell.more = nullptr;
    }
    Access* mine = nullptr;
    for (uint32_t i = 0; i < cell.count; ++i) {
      Access& other = i < 2 ? cell.first[i] : (*cell.more)[i - 2];
      if (!(kind == other.kind && kind != kWrite) && !ordered(other, address)) {
        std::ostringstream text;
        text << "race with a " << kNames[other.kind] << " by ";
        other.when.thread == kSeveral ? text << "threads" : text << "thread " << other.when.thread;
        text << " of block " << other.when.block;
        return stop(text.str(), address, bytes, kind);
      }
      if (other.kind == kind && other.when.block == index_) mine = &other;
    }
    const Moment now = moment();
    if (kind == kWrite) {
      cell.count = 1;
      cell.more = nullptr;
      cell.first[0] = {now, kind};
    } else if (mine) {
      const bool together = mine->when.barriers == barriers_ && mine->when.thread != now.thread;
      mine->when = now;
      if (together) mine->when.thread = kSeveral;
    } else if (cell.count < 2) {
      cell.first[cell.count++] = {now, kind};
    } else {
      if (!cell.more) {
        device.overflow.push_back(std::make_unique<std::vector<Access>>());
        cell.more = device.overflow.back().get();
      }
      cell.more->push_back({now, kind});
      ++cell.count;
    }
  }

  /// Notes a fault. The thread goes no further.
  void stop(const std::string& what, uintptr_t address, size_t bytes, Kind kind) {
    std::ostringstream text;
    text << what << ": " << kNames[kind] << " of " << bytes << " bytes at 0x" << std::hex << address << std::dec
         << " by thread " << thread_ << " of block " << index_;
    device.fail(kIllegalAddress, text.str());
    yield(kStopped);
  }

  const Launch& launch_;
  Baton& baton_;
  const unsigned worker_;
  const bool shuffles_;
  const char* const without_ = std::getenv("LTSAM_HOST_WITHOUT");
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  jmp_buf back_;
  unsigned index_ = 0, thread_ = 0;
  uint32_t barriers_ = 0;
  bool hands_over_ = false, in_kernel_ = false;
  Shared known_;
  std::pair<uintptr_t, uintptr_t> shared_;
  std::unordered_map<uintptr_t, Cell> in_shared_;
};

void run(const Launch& launch) {
  const unsigned seed = unsigned(setting("LTSAM_HOST_SEED"));
  std::vector<unsigned> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  ++device.number;
  device.overflow.clear();
  counters.clear();
  unsigned next = 0;
  const unsigned workers = seed ? std::min(launch.blocks, kResident) : 1;
  Baton baton(workers, seed);
  const auto work = [&](unsigned worker) {
    baton.wait(worker);
    {
      Block block(launch, baton, worker, seed != 0);
      while (next < launch.blocks) {
        const unsigned index = order[next++];
        block.run(index, seed + index);
      }
    }
    current = nullptr;
    baton.leave(worker);
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < workers; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

std::string shown(const char* what, uint64_t value) { return std::string(what) + " " + std::to_string(value); }

}  // namespace

Index thread_index() { return current->thread(); }
Index block_index() { return current->index(); }
Index block_size() { return current->size(); }
Index grid_size() { return current->grid(); }
void barrier(const char* file, int line) { current->barrier(file, line); }
void fence(const char* file, int line) { current->fence(file, line); }
unsigned atomic_add(unsigned* address, unsigned value) { return current->add(address, value); }

void submit(const Launch& launch) {
  if (setting("LTSAM_HOST_DEVICE") < 0) return device.fail(kNoDevice, "no CUDA-capable device is detected");
  if (device.fail_after >= 0 && device.fail_after-- == 0)
    return device.fail(kOutOfResources, "too many resources requested for launch");
  if (launch.blocks < 1 || launch.blocks > 0x7fffffffu)
    return device.fail(kInvalidConfiguration, shown("invalid grid:", launch.blocks));
  if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32)
    return device.fail(kInvalidConfiguration, shown("invalid block:", launch.threads));
  if (launch.bytes > LT_ARGUMENT_BYTES)
    return device.fail(kInvalidConfiguration, shown("argument too large:", launch.bytes));
  if (launch.stream != device.current)
    return device.fail(kInvalidConfiguration,
                       shown("not the current stream:", reinterpret_cast<uintptr_t>(launch.stream)));
  ++device.launches;
  device.blocks += int(launch.blocks);
  if (device.capturing)
    device.graphs.back().push_back(launch);
  else if (device.deferring)
    device.queue.push_back(launch);
  else
    run(launch);
}

}  // namespace on_host

using on_host::device;

cudaError_t cudaGetLastError() { return cudaError_t(std::exchange(device.error, 0)); }
const char* cudaGetErrorString(cudaError_t) { return device.message.c_str(); }
cudaError_t cudaGetDevice(int* index) {
  *index = on_host::setting("LTSAM_HOST_DEVICE");
  if (*index >= 0) return cudaSuccess;
  device.message = "no CUDA-capable device is detected";
  return cudaError_t(on_host::kNoDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int index) {
  *value = index + 1;
  return cudaSuccess;
}

// ---- For tests

/// Launches, or blocks, since the last call.
EXPORTED int on_host_launches() { return std::exchange(device.launches, 0); }
EXPORTED int on_host_blocks() { return std::exchange(device.blocks, 0); }
/// The only memory that kernels may touch, besides what was named before.
EXPORTED void on_host_memory(uintptr_t address, size_t bytes) {
  if (bytes) device.memory[address] = {address, address + bytes, nullptr};
}
EXPORTED void on_host_forget() { device.memory.clear(); }
EXPORTED void on_host_set_stream(void* stream) { device.current = stream; }
/// The launch after so many more fails, and does nothing.
EXPORTED void on_host_fail_after(int launches) { device.fail_after = launches; }

/// Launches on the current stream are noted for a graph; returns its number.
EXPORTED int on_host_begin_capture() {
  device.capturing = device.current;
  device.graphs.emplace_back();
  return int(device.graphs.size()) - 1;
}
EXPORTED void on_host_end_capture() { device.capturing = nullptr; }
/// Launches only wait from now on, until on_host_synchronize().
EXPORTED void on_host_defer() { device.deferring = true; }

/// Return what is wrong, or null.
EXPORTED const char* on_host_try(unsigned blocks, unsigned threads, size_t bytes) {
  on_host::submit({blocks, threads, device.current, nullptr, bytes, nullptr, nullptr});
  return std::exchange(device.error, 0) ? device.message.c_str() : nullptr;
}
EXPORTED const char* on_host_replay(int graph) {
  for (const on_host::Launch& launch : device.graphs[size_t(graph)]) on_host::run(launch);
  return std::exchange(device.error, 0) ? device.message.c_str() : nullptr;
}
EXPORTED const char* on_host_synchronize() {
  device.deferring = false;
  for (const on_host::Launch& launch : std::exchange(device.queue, {})) on_host::run(launch);
  return std::exchange(device.error, 0) ? device.message.c_str() : nullptr;
}

// ---- What compilers put before each access for -fsanitize=thread

static void seen(const void* address, size_t bytes, on_host::Kind kind) {
  if (on_host::current) on_host::current->access(reinterpret_cast<uintptr_t>(address), bytes, kind);
}
#define SEEN(bytes)                                                                         \
  extern "C" void __tsan_read##bytes(void* p) { seen(p, bytes, on_host::kRead); }           \
  extern "C" void __tsan_write##bytes(void* p) { seen(p, bytes, on_host::kWrite); }         \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { seen(p, bytes, on_host::kRead); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { seen(p, bytes, on_host::kWrite); }
SEEN(1)
SEEN(2)
SEEN(4)
SEEN(8)
SEEN(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { seen(p, bytes, on_host::kRead); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { seen(p, bytes, on_host::kWrite); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic32_store(volatile int* p, int x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }
extern "C" int __tsan_atomic32_fetch_add(volatile int* p, int x, int) {
  return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
extern "C" char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
