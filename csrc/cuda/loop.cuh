// The CUDA loops: map and ordered reduce over a table of tensors, for any functor. A launch takes its
// share of the table by value: nothing is copied to the device or kept alive, and a CUDA graph owns what it replays.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "launch_args.h"
#include "rows.h"

// How a kernel starts and takes its argument. tests/cuda_on_host puts a loop on the host in their place.
#ifndef LT_LAUNCH
#define LT_LAUNCH(kernel, blocks, threads, stream, argument) kernel<<<blocks, threads, 0, stream>>>(argument)
#define LT_ARGUMENT(Type) const __grid_constant__ Type
#endif

// The most a kernel takes by value, from sm_70 on: 32,764 bytes since CUDA 12.1, 4 KiB before.
#ifndef LT_ARGUMENT_BYTES
#if CUDART_VERSION >= 12010
#define LT_ARGUMENT_BYTES 32764
#else
#define LT_ARGUMENT_BYTES 4096
#endif
#endif

namespace lt {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements a thread takes from each role at a time: 16 bytes in fp32

/// What a slice knows of a tensor besides its addresses.
struct Row {
  uint32_t first_item;
  uint32_t last : 14;  ///< elements in the last item, less one
  uint32_t hyper : 4;
  uint32_t dtypes : 14;  ///< two bits a role
};

union Word {
  Row row;
  char* address;
  int64_t end;     ///< chunk at which a bucket ends
  int64_t number;  ///< a tensor's position in the caller's list
  double hyper;
};

/// The tensors of one launch. Their elements are dealt out in items of 2^shift. `words` holds, from the front, for each
/// tensor a Row, the addresses of those roles that any tensor has (SGD with step counts: 56 bytes, 570 tensors) and, if
/// the functor asks for it, its number, then the buckets' ends; from the back, rows of hyperparameters.
struct Slice {
  static constexpr int kHyperRows = 16, kWords = (LT_ARGUMENT_BYTES - 112) / 8;
  Signals signals;
  double* slots;  ///< of all chunks, in or out of this slice
  unsigned* ticket;
  int64_t first_slot, first_bucket, bucket_begin;
  uint32_t items, columns;  ///< columns: four bits a role, its word within a tensor's, 0 = no tensor has it
  int tensors, stride, shift, hyper_columns, buckets;
  int live;  ///< hyperparameters are addresses of rows on the device
  Word words[kWords];

  LT_HD const Row& row(int tensor) const { return words[tensor * stride].row; }
  LT_HD char* address(int tensor, int role) const {
    const int column = columns >> (4 * role) & 15;
    return column ? words[tensor * stride + column].address : nullptr;
  }
  LT_HD int64_t number(int tensor) const { return words[tensor * stride + stride - 1].number; }
  LT_HD int hyper_at(int row) const { return kWords - (row + 1) * hyper_columns; }
  /// One choice for each value: a pointer to either place would make every load through it a generic one.
  template <int kCount>
  LT_HD void hyper(int row, double (&h)[kCount]) const {
    const Word* given = words + hyper_at(row);
    const double* device = live ? reinterpret_cast<const double*>(given->address) : nullptr;
#pragma unroll
    for (int i = 0; i < kCount; ++i) h[i] = device ? device[i] : given[i].hyper;
  }
  LT_HD int64_t bucket_end(int bucket) const { return words[tensors * stride + bucket].end; }

  /// The last tensor that starts at or before an item: those of zero elements start where their successor does.
  LT_HD int tensor_of(uint32_t item) const {
    int low = 0, high = tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (row(middle).first_item <= item ? low : high) = middle;
    }
    return low;
  }
};
static_assert(sizeof(Slice) <= LT_ARGUMENT_BYTES, "a kernel's argument");

/// Four undecoded elements. Fetching is apart from decoding so that all roles' loads are under way before the first
/// use.
template <class A>
struct Raw {
  uint32_t word[sizeof(A)];
};

/// Elements first...first + n - 1 of a role, as 16 bytes (8 of 16-bit elements) where they are aligned and all there.
template <class A>
__device__ __forceinline__ Raw<A> fetch(unsigned dtype, bool aligned, const char* address, int first, int n) {
  Raw<A> raw{};
  const char* from = address + int64_t(first) * item_size(uint8_t(dtype));
  if (aligned && n >= kVector) {
    if (dtype >= kBF16) {
      const uint2 low = *reinterpret_cast<const uint2*>(from);
      raw.word[0] = low.x, raw.word[1] = low.y;
    } else {
      const uint4 low = *reinterpret_cast<const uint4*>(from);
      raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
      if constexpr (sizeof(A) == 8) {
        if (dtype == kF64) {
          const uint4 high = reinterpret_cast<const uint4*>(from)[1];
          raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
        }
      }
    }
    return raw;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j >= n) continue;
    if (dtype >= kBF16) {
      raw.word[j / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[j]) << (16 * (j % 2));
    } else if (sizeof(A) == 4 || dtype == kF32) {
      raw.word[j] = reinterpret_cast<const uint32_t*>(from)[j];
    } else if constexpr (sizeof(A) == 8) {
      raw.word[2 * j] = reinterpret_cast<const uint32_t*>(from)[2 * j];
      raw.word[2 * j + 1] = reinterpret_cast<const uint32_t*>(from)[2 * j + 1];
    }
  }
  return raw;
}

/// The reverse of fetch.
template <class A>
__device__ __forceinline__ void put(const Raw<A>& raw, unsigned dtype, bool aligned, char* address, int first, int n) {
  char* to = address + int64_t(first) * item_size(uint8_t(dtype));
  if (aligned && n >= kVector) {
    if (dtype >= kBF16) {
      *reinterpret_cast<uint2*>(to) = uint2{raw.word[0], raw.word[1]};
    } else {
      *reinterpret_cast<uint4*>(to) = uint4{raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
      if constexpr (sizeof(A) == 8) {
        if (dtype == kF64) reinterpret_cast<uint4*>(to)[1] = uint4{raw.word[4], raw.word[5], raw.word[6], raw.word[7]};
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j >= n) continue;
    if (dtype >= kBF16) {
      reinterpret_cast<uint16_t*>(to)[j] = uint16_t(raw.word[j / 2] >> (16 * (j % 2)));
    } else if (sizeof(A) == 4 || dtype == kF32) {
      reinterpret_cast<uint32_t*>(to)[j] = raw.word[j];
    } else if constexpr (sizeof(A) == 8) {
      reinterpret_cast<uint32_t*>(to)[2 * j] = raw.word[2 * j];
      reinterpret_cast<uint32_t*>(to)[2 * j + 1] = raw.word[2 * j + 1];
    }
  }
}

template <class A>
__device__ __forceinline__ void decode(const Raw<A>& raw, unsigned dtype, A (&x)[kVector]) {
  if (dtype == kF32) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = A(bits<float>(raw.word[j]));
  } else if (sizeof(A) == 8 && dtype == kF64) {
    if constexpr (sizeof(A) == 8) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[j] = bits<A>(uint64_t(raw.word[2 * j + 1]) << 32 | raw.word[2 * j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const uint16_t half = uint16_t(raw.word[j / 2] >> (16 * (j % 2)));
      x[j] = A(dtype == kBF16 ? from_bf16(half) : from_f16(half));
    }
  }
}

template <class A>
__device__ __forceinline__ Raw<A> encode(unsigned dtype, const A (&x)[kVector]) {
  Raw<A> raw{};
  if (dtype == kF32) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) raw.word[j] = bits<uint32_t>(float(x[j]));
  } else if (sizeof(A) == 8 && dtype == kF64) {
    if constexpr (sizeof(A) == 8) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        raw.word[2 * j] = uint32_t(bits<uint64_t>(x[j]));
        raw.word[2 * j + 1] = uint32_t(bits<uint64_t>(x[j]) >> 32);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float narrow = float(x[j]);
      raw.word[j / 2] |= uint32_t(dtype == kBF16 ? to_bf16(narrow) : to_f16(narrow)) << (16 * (j % 2));
    }
  }
  return raw;
}

/// The nibble of a bitmap that belongs to four elements, and those as numbers.
template <class A>
__device__ __forceinline__ Raw<A> fetch_bits(const char* address, int first, int n) {
  Raw<A> raw{};
  if (n > 0) raw.word[0] = uint32_t(reinterpret_cast<const uint8_t*>(address)[first / 8]) >> (first & 4);
  return raw;
}

template <class A>
__device__ __forceinline__ void decode_bits(const Raw<A>& raw, A (&x)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) x[j] = A(raw.word[0] >> j & 1);
}

/// An item: up to 2^shift elements of one tensor.
template <class F, class A>
struct Item {
  static constexpr unsigned kNative = sizeof(A) == 8 ? kF64 : kF32;
  int64_t begin;  ///< number of its first element
  int count;
  unsigned dtypes, present = 0, aligned = 0, native = 0;  ///< but for dtypes, one bit a role
  char* address[F::kRoles];                               ///< of the item's first element; null: absent

  __device__ Item(const Slice& slice, int tensor, uint32_t index) {
    const Row row = slice.row(tensor);
    const uint32_t local = index - row.first_item;
    const uint32_t end = tensor + 1 < slice.tensors ? slice.row(tensor + 1).first_item : slice.items;
    begin = int64_t(local) << slice.shift;
    count = index + 1 == end ? row.last + 1 : 1 << slice.shift;
    dtypes = row.dtypes;
#pragma unroll
    for (int r = 0; r < F::kRoles; ++r) {
      address[r] = nullptr;
      if (r == F::step) continue;
      char* base = slice.address(tensor, r);
      if (!base) continue;
      present |= bit(r);
      if (F::bitmaps & bit(r)) {
        address[r] = base + begin / 8;
        aligned |= bit(r);
        native |= bit(r);
        continue;
      }
      address[r] = base + begin * item_size(dtype(r));
      // An item begins at a multiple of 4096 elements: aligned where its tensor is.
      if (reinterpret_cast<uintptr_t>(base) % (dtype(r) >= kBF16 ? 8 : 16) == 0) aligned |= bit(r);
      if (dtype(r) == kNative) native |= bit(r);
    }
  }
  __device__ uint8_t dtype(int role) const { return dtypes >> (2 * role) & 3; }
};

/// Calls body(mask) with the smallest of F's variants that has every role that is present.
template <class F, class Body, size_t... V>
__device__ __forceinline__ void with_variant(unsigned present, const Body& body, std::index_sequence<V...>) {
  bool done = false;
  (((!done && (V + 1 == sizeof...(V) || !(present & ~F::variants[V])))
        ? (body(std::integral_constant<unsigned, F::variants[V]>()), done = true)
        : false),
   ...);
}

template <class F>
using VariantsOf = std::make_index_sequence<sizeof(F::variants) / sizeof(unsigned)>;  // std::size: see bind.h

constexpr int ones(unsigned mask) { return mask ? 1 + ones(mask & (mask - 1)) : 0; }

/// Four vectors under way per thread, counted over the roles read: with 1024 threads 64 KiB a multiprocessor in fp32,
/// where 4.8 TB/s at 0.7 us take 26. Random ones are busy with arithmetic, and need the registers for it.
template <class F, unsigned kPresent>
constexpr int kUnroll = F::random || ones(F::reads & kPresent) > 3 ? 1 : 4 / ones(F::reads & kPresent);

/// Calls body(plain, v) for this thread's vectors v, v + kThreads, ... of an item, kStep at a time. Plain ones need no
/// test: every role is there, of the accumulator's type and aligned, and so are all kStep vectors.
template <unsigned kPresent, int kStep, class F, class A, class Body>
__device__ __forceinline__ void for_vectors(const Item<F, A>& item, const Body& body) {
  int v = threadIdx.x;
  if ((item.aligned & item.native & kPresent) == kPresent)
    for (; (v + (kStep - 1) * kThreads + 1) * kVector <= item.count; v += kStep * kThreads) body(std::true_type(), v);
  for (; v * kVector < item.count; v += kStep * kThreads) body(std::false_type(), v);
}

template <bool kPlain, unsigned kPresent, int kStep, class F, class A>
__device__ __forceinline__ void load_vectors(const Item<F, A>& item, int v, A (&x)[kStep][F::kRoles][kVector]) {
  Raw<A> raw[kStep][F::kRoles];
#pragma unroll
  for (int s = 0; s < kStep; ++s)
#pragma unroll
    for (int r = 0; r < F::kRoles; ++r) {
      if (!(kPresent & F::reads & bit(r))) continue;
      const int first = (v + s * kThreads) * kVector;
      if (F::bitmaps & bit(r)) {
        raw[s][r] = fetch_bits<A>(item.address[r], first, item.address[r] ? item.count - first : 0);
        continue;
      }
      raw[s][r] = kPlain ? fetch<A>(item.kNative, true, item.address[r], first, kVector)
                         : fetch<A>(item.dtype(r), item.aligned & bit(r), item.address[r], first,
                                    item.address[r] ? item.count - first : 0);
    }
#pragma unroll
  for (int s = 0; s < kStep; ++s)
#pragma unroll
    for (int r = 0; r < F::kRoles; ++r) {
      if (kPresent & F::bitmaps & bit(r))
        decode_bits(raw[s][r], x[s][r]);
      else if (kPresent & F::reads & bit(r))
        decode(raw[s][r], kPlain ? item.kNative : item.dtype(r), x[s][r]);
      else
        for (int j = 0; j < kVector; ++j) x[s][r][j] = 0;
    }
}

template <bool kPlain, unsigned kPresent, int kStep, class F, class A>
__device__ __forceinline__ void store_vectors(const Item<F, A>& item, int v, const A (&x)[kStep][F::kRoles][kVector]) {
#pragma unroll
  for (int s = 0; s < kStep; ++s)
#pragma unroll
    for (int r = 0; r < F::kRoles; ++r) {
      if (!(kPresent & F::writes & bit(r))) continue;
      const int first = (v + s * kThreads) * kVector;
      const unsigned dtype = kPlain ? item.kNative : item.dtype(r);
      const Raw<A> raw = encode(dtype, x[s][r]);
      if (kPlain)
        put(raw, dtype, true, item.address[r], first, kVector);
      else if (item.address[r])
        put(raw, dtype, item.aligned & bit(r), item.address[r], first, item.count - first);
    }
}

/// Calls visit(element, lane, word) for each element of this thread's share of an item and stores what F writes. The
/// word is random if F asks for that.
template <class F, class A, class Visit>
__device__ __forceinline__ void walk(const F& f, const Item<F, A>& item, const Visit& visit) {
  with_variant<F>(
      item.present,
      [&](auto mask) {
        constexpr unsigned kPresent = mask.value;
        constexpr int kStep = kUnroll<F, kPresent>;
        for_vectors<kPresent, kStep>(item, [&](auto plain, int v) {
          A x[kStep][F::kRoles][kVector];
          load_vectors<plain.value, kPresent>(item, v, x);
#pragma unroll
          for (int s = 0; s < kStep; ++s) {
            uint32_t word[kVector] = {};
            if constexpr (F::random) f.philox(uint64_t(item.begin / kVector + v + s * kThreads), word);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
              A element[F::kRoles];
#pragma unroll
              for (int r = 0; r < F::kRoles; ++r) element[r] = x[s][r][j];
              visit(element, j, word[j]);
#pragma unroll
              for (int r = 0; r < F::kRoles; ++r) x[s][r][j] = element[r];
            }
          }
          store_vectors<plain.value, kPresent>(item, v, x);
        });
      },
      VariantsOf<F>());
}

/// The functor of the tensor at hand, made by one thread (Adam's takes two pow() in double) and only when it changes.
template <class F>
struct Constants {
  int made_for = -1;

  __device__ F at(const Slice& slice, int tensor) {
    __shared__ double storage[(sizeof(F) + 7) / 8];
    const Row& row = slice.row(tensor);
    Here here{nullptr, 0, uint8_t(row.dtypes & 3)};
    if constexpr (F::step >= 0) here.step = reinterpret_cast<const float*>(slice.address(tensor, F::step));
    if constexpr (F::keyed) here.number = slice.number(tensor);
    const int group = row.hyper, wanted = here.step || F::keyed ? Slice::kHyperRows + tensor : group;
    if (wanted != made_for) {
      __syncthreads();  // some may still read the one before
      if (threadIdx.x == 0) {
        double h[sizeof(F::hyper) / sizeof(*F::hyper)];
        if constexpr (F::hyper[0] != nullptr) slice.hyper(group, h);
        new (storage) F(h, slice.signals, here);
      }
      __syncthreads();
      made_for = wanted;
    }
    return *reinterpret_cast<const F*>(storage);
  }
};

/// True in the block that comes here last; it sees what the first threads of all others wrote, and may write over what
/// these have read. The ticket is zero again afterwards, for the next launch or the next replay of a graph. The thread
/// that counts has both fences to itself: another's would say nothing of what this one does.
__device__ inline bool last_block(unsigned* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

/// op over the block's threads, as a tree: always in the same order.
template <class Op>
__device__ double block_fold(double x, const Op& op) {
  __shared__ double cells[kThreads];
  __syncthreads();  // some may still read the result before
  cells[threadIdx.x] = x;
  __syncthreads();
  for (unsigned width = blockDim.x / 2; width; width /= 2) {
    if (threadIdx.x < width) cells[threadIdx.x] = op(cells[threadIdx.x], cells[threadIdx.x + width]);
    __syncthreads();
  }
  return cells[0];
}

__device__ inline double block_sum(double x) {
  return block_fold(x, [](double a, double b) { return a + b; });
}

/// Least blocks a multiprocessor is to hold. Left to itself, ptxas stops at 64 registers and spills Adam's.
template <class F, class A>
constexpr int kMinBlocks = (F::kRoles > 6 ? 3 : 4) * sizeof(float) / sizeof(A);

template <class F, class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks<F, A>) map_kernel(LT_ARGUMENT(Slice) slice) {
  Constants<F> constants;
  for (uint32_t index = blockIdx.x; index < slice.items; index += gridDim.x) {
    const int tensor = slice.tensor_of(index);
    const F f = constants.at(slice, tensor);
    walk(f, Item<F, A>(slice, tensor, index), [&](A* element, int, uint32_t word) {
      if constexpr (F::random)
        f(element, word);
      else
        f(element);
    });
  }
  if constexpr (F::step >= 0) {
    // After every block has read them, so the last one counts.
    if (!(slice.columns >> (4 * F::step) & 15) || !last_block(slice.ticket) || slice.signals.skip()) return;
    for (int tensor = threadIdx.x; tensor < slice.tensors; tensor += kThreads)
      if (char* step = slice.address(tensor, F::step)) *reinterpret_cast<float*>(step) += 1.0f;
  }
}

/// One slot a chunk, filled by one block: where the chunk lies in a launch or on the device leaves no trace in the sum.
template <class F, class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks<F, A>) reduce_kernel(LT_ARGUMENT(Slice) slice) {
  Constants<F> constants;
  for (uint32_t index = blockIdx.x; index < slice.items; index += gridDim.x) {
    const int tensor = slice.tensor_of(index);
    const F f = constants.at(slice, tensor);
    A lanes[kVector][F::sums] = {};
    // What a role or the end of an item lacks reads as zero, and so does its term.
    walk(f, Item<F, A>(slice, tensor, index), [&](A* element, int lane, uint32_t) { f.add(element, lanes[lane]); });
#pragma unroll
    for (int s = 0; s < F::sums; ++s) {
      const double sum =
          block_sum((double(lanes[0][s]) + double(lanes[1][s])) + (double(lanes[2][s]) + double(lanes[3][s])));
      if (threadIdx.x == 0) slice.slots[(slice.first_slot + index) * F::sums + s] = sum;
    }
  }
  if (!slice.buckets || !last_block(slice.ticket)) return;
  int64_t begin = slice.bucket_begin;
  for (int bucket = 0; bucket < slice.buckets; ++bucket) {
    const int64_t end = slice.bucket_end(bucket);
    for (int s = 0; s < F::sums; ++s) {
      double sum = 0;
      for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) sum += slice.slots[slot * F::sums + s];
      const A result = A(F::finish(block_sum(sum)));
      if (threadIdx.x == 0) {
        static_cast<A*>(slice.signals.norm)[(slice.first_bucket + bucket) * F::sums + s] = result;
        if (slice.signals.found_inf && !finite(result)) *slice.signals.found_inf = 1.0f;
      }
    }
    begin = end;
  }
}

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

/// Blocks of a kernel that the current device runs at a time.
template <auto kKernel>
int64_t resident_blocks(const char* op) {
  static std::atomic<int> known[64];  // by device: asking takes 2 us
  int device, processors, blocks;
  check(cudaGetDevice(&device), op);
  std::atomic<int>& count = known[device % 64];
  if (count == 0) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), op);
    count = processors * blocks;
  }
  return count;
}

/// Fills slices with a table's tensors.
template <class F>
struct Packer {
  static_assert(F::kRoles <= 8 && (F::step < 0 ? F::kRoles < 8 : F::step == F::kRoles - 1), "bits in Row and Slice");
  const LaunchArgs& args;
  const Hyper& hyper;
  Slice slice;
  int32_t groups[Slice::kHyperRows];
  int hyper_rows = 0;
  int64_t next = 0;

  Packer(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, int shift) : args(args), hyper(hyper) {
    slice.signals = signals;
    slice.slots = args.slots();
    slice.ticket = reinterpret_cast<unsigned*>(args.scratch);
    slice.first_bucket = slice.bucket_begin = 0;
    slice.shift = shift;
    slice.live = hyper.live != nullptr;
    slice.hyper_columns = slice.live ? 1 : int(hyper.columns);
    slice.columns = 0;
    slice.stride = 1;
    for (int r = 0; r < F::kRoles; ++r)
      for (int64_t t = 0; t < args.tensors; ++t)
        if (args.pointers[t * F::kRoles + r]) {
          slice.columns |= uint32_t(slice.stride++) << (4 * r);
          break;
        }
    slice.stride += F::keyed;
    clear();
  }

  void clear() {
    slice.items = 0;
    slice.tensors = slice.buckets = hyper_rows = 0;
  }

  bool fits(int rows, int hyper_rows, int buckets) const {
    return rows * slice.stride + hyper_rows * slice.hyper_columns + buckets <= Slice::kWords;
  }

  /// Adds tensors until the slice is full. Returns whether all are in it, or in an earlier one.
  bool fill() {
    slice.first_slot = args.first_chunk[next];
    for (; next < args.tensors; ++next)
      if (!add(next)) return false;
    return true;
  }

  bool add(int64_t tensor) {
    const int64_t* pointers = args.pointers + tensor * F::kRoles;
    const int64_t numel = args.numels[tensor];
    if (numel == 0 && (F::step < 0 || !pointers[F::step < 0 ? 0 : F::step])) return true;
    const int row = int(std::find(groups, groups + hyper_rows, args.groups[tensor]) - groups);
    const bool fresh = row == hyper_rows;
    if ((fresh && row == Slice::kHyperRows) || !fits(slice.tensors + 1, hyper_rows + fresh, 0)) return false;
    if (fresh) {
      groups[hyper_rows++] = args.groups[tensor];
      Word* first = slice.words + slice.hyper_at(row);
      if (slice.live)
        first->address = reinterpret_cast<char*>(const_cast<double*>(hyper.live + args.groups[tensor] * hyper.columns));
      else
        for (int c = 0; c < slice.hyper_columns; ++c) first[c].hyper = hyper.row(args.groups[tensor])[c];
    }
    Word* words = slice.words + slice.tensors++ * slice.stride;
    uint32_t dtypes = 0;
    for (int r = 0; r < F::kRoles; ++r) {
      if (const int column = slice.columns >> (4 * r) & 15)
        words[column].address = reinterpret_cast<char*>(pointers[r]);
      if (r != F::step && !(F::bitmaps & bit(r))) dtypes |= uint32_t(args.dtypes[tensor * F::kRoles + r]) << (2 * r);
    }
    if (F::keyed) words[slice.stride - 1].number = args.numbers[tensor];
    const int64_t items = ((numel - 1) >> slice.shift) + 1;  // 0 of 0 elements
    words->row = {slice.items, uint32_t(numel - 1) & ((1u << slice.shift) - 1), uint32_t(row), dtypes};
    slice.items += uint32_t(items);
    return true;
  }
};

constexpr int kChunkShift = 14, kSmallShift = 12;
static_assert(int64_t(1) << kChunkShift == kChunk, "an item of a reduction is a chunk");

template <class Kernel, class Argument>
void launch(const char* op, Kernel* kernel, int64_t blocks, int threads, intptr_t stream, const Argument& argument) {
  LT_LAUNCH(kernel, unsigned(blocks), threads, reinterpret_cast<cudaStream_t>(stream), argument);
  check(cudaGetLastError(), op);
}

template <auto kKernel>
void launch_slice(const char* op, const Slice& slice, intptr_t stream) {
  const int64_t blocks = std::min<int64_t>(slice.items, resident_blocks<kKernel>(op));
  launch(op, kKernel, std::max<int64_t>(1, blocks), kThreads, stream, slice);
}

struct CudaLoop {
  template <class F, class A>
  static void map(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, intptr_t stream) {
    constexpr auto kernel = map_kernel<F, A>;
    // Whole chunks where there is enough to do, so that less time goes into finding them; else what fills the device.
    const bool large = args.chunks() > 16 * resident_blocks<kernel>(F::name);
    Packer<F> packer(args, hyper, signals, large ? kChunkShift : kSmallShift);
    for (bool all = false; !all; packer.clear()) {
      all = packer.fill();
      if (packer.slice.tensors) launch_slice<kernel>(F::name, packer.slice, stream);
      args.launched = packer.next;
    }
  }

  template <class F, class A>
  static void reduce(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, intptr_t stream) {
    constexpr auto kernel = reduce_kernel<F, A>;
    Packer<F> packer(args, hyper, signals, kChunkShift);
    for (; !packer.fill(); packer.clear()) launch_slice<kernel>(F::name, packer.slice, stream);
    Slice& slice = packer.slice;
    int64_t tensor = 0;
    for (int64_t bucket = 0; bucket < args.buckets; ++bucket) {
      const int64_t begin = args.first_chunk[tensor];
      while (tensor < args.tensors && args.bucket_of[tensor] == bucket) ++tensor;
      if (!packer.fits(slice.tensors, packer.hyper_rows, slice.buckets + 1)) {
        launch_slice<kernel>(F::name, slice, stream);
        packer.clear();
        slice.first_bucket = bucket;
        slice.bucket_begin = begin;
      }
      slice.words[slice.tensors * slice.stride + slice.buckets++].end = args.first_chunk[tensor];
    }
    if (slice.buckets) launch_slice<kernel>(F::name, slice, stream);
  }

  template <class A>
  static void cross_entropy(const Rows<A>& rows, intptr_t stream);  // cuda/row_loop.cuh
};

}  // namespace lt
