// The two CPU loops: map and ordered reduce over a table of tensors, for any functor. Work is dealt out in chunks; a
// chunk is walked in tiles that stay in L1, where 16-bit floats are widened and narrowed and from where streaming
// stores leave.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>

#include "launch_args.h"
#include "rows.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// One source, three instruction sets, chosen when the module is loaded. Without FMA contraction (see setup.py) all
// three give the same bits.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define LT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LT_CLONES
#endif

namespace lt {

constexpr int kTile = 1024;  // 7 roles in float: 28 KiB, within the smallest L1 around

/// Elements [begin, begin + count) of one tensor.
struct Chunk {
  int64_t tensor, begin, count;
};

inline Chunk chunk_at(const LaunchArgs& args, int64_t index) {
  const int64_t* first = args.first_chunk;
  int64_t tensor = index;  // where all are small
  if (index >= args.tensors || first[index] > index || first[index + 1] <= index)
    // The last tensor that starts at or before this chunk: those of zero elements start where their successor does.
    tensor = std::upper_bound(first, first + args.tensors + 1, index) - first - 1;
  const int64_t begin = (index - args.first_chunk[tensor]) * kChunk;
  return {tensor, begin, std::min(kChunk, args.numels[tensor] - begin)};
}

/// How many of `threads` there can be. GNU's OpenMP keeps its threads and, in a process forked after they began, would
/// wait for ever for those that stayed behind: there one does all.
inline int team(int threads) {
  static std::atomic<bool> began{false}, lost{false};
  if (threads < 2 || lost) return 1;
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { lost = began.load(); });
  began = true;
  return threads;
}

/// Calls body(chunk) for every chunk. Threads take runs of chunks as they get free: a stalled core costs one run, not
/// half the pass. Results must not depend on who runs what. A thread is worth its start (some 5 us, far more on a busy
/// machine) from about 256 KiB of work on.
template <class Body>
void for_each_chunk(int64_t chunks, int64_t bytes, int threads, const Body& body) {
  threads = int(std::min<int64_t>(threads, 1 + (bytes >> 18)));
  const int64_t run = std::max<int64_t>(1, chunks / (int64_t(threads) * 32));
  (void)run;
#ifdef _OPENMP
  threads = team(int(std::min<int64_t>(threads, chunks)));
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (threads > 1)
#endif
  for (int64_t index = 0; index < chunks; ++index) body(index);
}

template <class A, class Element>
LT_CLONES void widen(const Element* from, int count, A* to) {
  for (int i = 0; i < count; ++i) to[i] = A(from[i]);
}
template <class A, float (*decode)(uint16_t)>
LT_CLONES void decode_all(const uint16_t* from, int count, A* to) {
  for (int i = 0; i < count; ++i) to[i] = A(decode(from[i]));
}
template <class A, uint16_t (*encode)(float)>
LT_CLONES void encode_all(const A* from, int count, uint16_t* to) {
  for (int i = 0; i < count; ++i) to[i] = encode(float(from[i]));
}

/// Bits of a bitmap, lowest first, as numbers.
template <class A>
LT_CLONES void expand(const uint8_t* from, int count, A* to) {
  for (int i = 0; i < count; ++i) to[i] = A(from[i >> 3] >> (i & 7) & 1);
}

/// The random words of `quads` times four elements.
LT_CLONES inline void draw(const Philox philox, int64_t first_quad, int quads, uint32_t* words) {
  constexpr int kPlane = 64, kVector = 16;
  for (int done = 0; done < quads; done += kPlane) {
    uint32_t plane[4][kPlane];
    const int planned = std::min(kPlane, (quads - done + kVector - 1) / kVector * kVector);
    for (int q = 0; q < planned; ++q) {
      uint32_t word[4];
      philox(uint64_t(first_quad + done + q), word);
      for (int j = 0; j < 4; ++j) plane[j][q] = word[j];
    }
    for (int q = 0; q < planned; ++q)
      for (int j = 0; j < 4; ++j) words[4 * (done + q) + j] = plane[j][q];
  }
}

template <class A>
void load(uint8_t dtype, const char* from, int count, A* to) {
  switch (dtype) {
    case kF32:
      return widen(reinterpret_cast<const float*>(from), count, to);
    case kF64:
      return widen(reinterpret_cast<const double*>(from), count, to);
    case kBF16:
      return decode_all<A, from_bf16>(reinterpret_cast<const uint16_t*>(from), count, to);
    default:
      return decode_all<A, from_f16>(reinterpret_cast<const uint16_t*>(from), count, to);
  }
}

template <class A>
void narrow(uint8_t dtype, const A* from, int count, char* to) {
  switch (dtype) {
    case kF32:
      return widen(from, count, reinterpret_cast<float*>(to));
    case kF64:
      return widen(from, count, reinterpret_cast<double*>(to));
    case kBF16:
      return encode_all<A, to_bf16>(from, count, reinterpret_cast<uint16_t*>(to));
    default:
      return encode_all<A, to_f16>(from, count, reinterpret_cast<uint16_t*>(to));
  }
}

/// Copies past the caches. An ordinary store first reads the line it overwrites: a third more traffic.
inline void stream(char* to, const char* from, int64_t count) {
#ifdef __SSE2__
  const int64_t head = std::min<int64_t>(count, -reinterpret_cast<intptr_t>(to) & 15);
  memcpy(to, from, size_t(head));
  int64_t i = head;
  for (; i + 16 <= count; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  memcpy(to + i, from + i, size_t(count - i));
#else
  memcpy(to, from, size_t(count));
#endif
}

/// Makes streamed stores visible to other threads before the pass is reported done.
inline void end_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

/// Passes that move more than this stream what they only write: nothing of it would still be cached when it is next
/// read.
inline int64_t stream_threshold() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return cache > 0 ? cache : int64_t(32) << 20;
#else
  return int64_t(32) << 20;
#endif
}

template <class F>
int64_t bytes_of(int role, uint8_t dtype, int64_t elements) {
  return F::bitmaps >> role & 1 ? elements / 8 : elements * item_size(dtype);
}

template <class F>
int64_t bytes_moved(const LaunchArgs& args) {
  int64_t total = 0;
  for (int64_t t = 0; t < args.tensors; ++t)
    for (int r = 0; r < F::kRoles; ++r)
      if (r != F::step && args.pointers[t * F::kRoles + r])
        total += bytes_of<F>(r, args.dtypes[t * F::kRoles + r], args.numels[t]) *
                 (int(F::reads >> r & 1) + int(F::writes >> r & 1));
  return total;
}

/// Where a chunk's roles lie: the tensor itself when its elements are of type A, else a tile that is filled or emptied.
template <class F, class A>
struct Tiles {
  alignas(64) A in[F::kRoles][kTile];
  alignas(64) A out[F::kRoles][kTile];
  alignas(64) char narrowed[kTile * 8];
  alignas(64) uint32_t words[F::random ? kTile : 1];
};

template <unsigned kPresent, class F, class A, size_t... R>
LT_CLONES void map_tile(const F f, const A* const* in, A* const* out, const uint32_t* words, int count,
                        std::index_sequence<R...>) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    A x[F::kRoles];
    ((x[R] = (F::reads & kPresent & bit(R)) ? in[R][i] : A(0)), ...);
    if constexpr (F::random)
      f(x, words[i]);
    else
      f(x);
    ((void)((F::writes & kPresent & bit(R)) && (out[R][i] = x[R], true)), ...);
  }
}

constexpr int kLanes = 64;

template <unsigned kPresent, class F, class A, size_t... R>
LT_CLONES void reduce_tile(const F f, const A* const* in, A (*lanes)[F::sums], int count, std::index_sequence<R...>) {
  A sum[kLanes][F::sums];
  for (int j = 0; j < kLanes; ++j)
    for (int s = 0; s < F::sums; ++s) sum[j][s] = lanes[j][s];
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      A x[F::kRoles];
      ((x[R] = (kPresent & bit(R)) ? in[R][i + j] : A(0)), ...);
      f.add(x, sum[j]);
    }
  for (int j = 0; i < count; ++i, ++j) {
    A x[F::kRoles];
    ((x[R] = (kPresent & bit(R)) ? in[R][i] : A(0)), ...);
    f.add(x, sum[j]);
  }
  for (int j = 0; j < kLanes; ++j)
    for (int s = 0; s < F::sums; ++s) lanes[j][s] = sum[j][s];
}

/// Joins lanes by halves. One after the other, each would wait for the one before: longer than a tiny tensor takes for
/// all else.
template <class T, int kCount, class Join>
inline T fold(T (&lanes)[kCount], const Join& join) {
#pragma GCC unroll 8
  for (int half = kCount / 2; half; half /= 2)
#pragma GCC ivdep
    for (int j = 0; j < half; ++j) lanes[j] = join(lanes[j], lanes[j + half]);
  return lanes[0];
}

template <class A, int kSums>
LT_CLONES void add_lanes(const A (&lanes)[kLanes][kSums], double* sums) {
  for (int s = 0; s < kSums; ++s) {
    double part[kLanes];
    for (int j = 0; j < kLanes; ++j) part[j] = double(lanes[j][s]);
    sums[s] = fold(part, [](double a, double b) { return a + b; });
  }
}

/// Walks one chunk in tiles: body.run<present>(in, out, count) does the arithmetic, with `present` the smallest of F's
/// variants that has every role this tensor brings.
template <class F, class A, class Body, size_t... V>
void walk_chunk(const LaunchArgs& args, const Chunk& chunk, bool streaming, Body& body, std::index_sequence<V...>) {
  static thread_local Tiles<F, A> tiles;
  const int64_t* pointers = args.pointers + chunk.tensor * F::kRoles;
  const uint8_t* dtypes = args.dtypes + chunk.tensor * F::kRoles;
  constexpr uint8_t native = sizeof(A) == 8 ? kF64 : kF32;

  unsigned present = 0;
  for (int r = 0; r < F::kRoles; ++r) present |= pointers[r] && r != F::step ? bit(r) : 0u;
  unsigned variant = F::variants[std::size(F::variants) - 1];
  for (unsigned candidate : F::variants)
    if ((present & ~candidate) == 0) {
      variant = candidate;
      break;
    }

  const A* in[F::kRoles] = {};
  A* out[F::kRoles] = {};
  for (int64_t offset = 0; offset < chunk.count; offset += kTile) {
    const int count = int(std::min<int64_t>(kTile, chunk.count - offset));
    if constexpr (F::random) draw(body.f.philox, (chunk.begin + offset) / 4, (count + 3) / 4, tiles.words);
    for (int r = 0; r < F::kRoles; ++r) {
      if (!(variant & bit(r))) continue;
      char* address = reinterpret_cast<char*>(pointers[r]) + bytes_of<F>(r, dtypes[r], chunk.begin + offset);
      const bool writes = F::writes & bit(r), reads = F::reads & bit(r);
      const bool streams = streaming && !reads;
      out[r] = writes && pointers[r] && dtypes[r] == native && !streams ? reinterpret_cast<A*>(address) : tiles.out[r];
      if (!reads) continue;
      in[r] = tiles.in[r];
      if (!pointers[r])
        std::fill_n(tiles.in[r], count, A(0));
      else if (F::bitmaps & bit(r))
        expand(reinterpret_cast<const uint8_t*>(address), count, tiles.in[r]);
      else if (dtypes[r] == native)
        in[r] = reinterpret_cast<const A*>(address);
      else
        load(dtypes[r], address, count, tiles.in[r]);
    }
    ((void)(variant == F::variants[V] && (body.template run<F::variants[V]>(in, out, tiles.words, count), true)), ...);
    for (int r = 0; r < F::kRoles; ++r) {
      if (!(F::writes & present & bit(r)) || out[r] != tiles.out[r]) continue;
      const int size = item_size(dtypes[r]);
      char* address = reinterpret_cast<char*>(pointers[r]) + (chunk.begin + offset) * size;
      const bool streams = streaming && !(F::reads & bit(r));
      const char* from = reinterpret_cast<const char*>(tiles.out[r]);
      if (dtypes[r] != native) {
        char* to = streams ? tiles.narrowed : address;
        narrow(dtypes[r], tiles.out[r], count, to);
        from = to;
      }
      if (streams) stream(address, from, int64_t(count) * size);
    }
  }
}

template <class F>
F functor_for(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, int64_t tensor) {
  Here here{nullptr, args.numbers[tensor], args.dtypes[tensor * F::kRoles]};
  if constexpr (F::step >= 0) here.step = reinterpret_cast<const float*>(args.pointers[tensor * F::kRoles + F::step]);
  return F(hyper.row(args.groups[tensor]), signals, here);
}

template <class F, class A>
struct MapBody {
  const F f;
  template <unsigned kPresent>
  void run(const A* const* in, A* const* out, const uint32_t* words, int count) {
    map_tile<kPresent>(f, in, out, words, count, std::make_index_sequence<F::kRoles>());
  }
};

template <class F, class A>
struct ReduceBody {
  const F f;
  A lanes[kLanes][F::sums] = {};
  template <unsigned kPresent>
  void run(const A* const* in, A* const*, const uint32_t*, int count) {
    reduce_tile<kPresent>(f, in, lanes, count, std::make_index_sequence<F::kRoles>());
  }
};

template <class F>
using Variants = std::make_index_sequence<std::size(F::variants)>;

struct CpuLoop {
  template <class F, class A>
  static void map(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, intptr_t threads) {
    const int64_t bytes = bytes_moved<F>(args);
    const bool streaming = bytes > stream_threshold();
    for_each_chunk(args.chunks(), bytes, int(threads), [&](int64_t index) {
      const Chunk chunk = chunk_at(args, index);
      MapBody<F, A> body{functor_for<F>(args, hyper, signals, chunk.tensor)};
      walk_chunk<F, A>(args, chunk, streaming, body, Variants<F>());
      if (streaming) end_stream();
    });
    if constexpr (F::step >= 0) {
      if (signals.skip()) return;
      for (int64_t t = 0; t < args.tensors; ++t)
        if (const int64_t count = args.pointers[t * F::kRoles + F::step]) *reinterpret_cast<float*>(count) += 1.0f;
    }
  }

  template <class F, class A>
  static void reduce(const LaunchArgs& args, const Hyper& hyper, const Signals& signals, intptr_t threads) {
    for_each_chunk(args.chunks(), bytes_moved<F>(args), int(threads), [&](int64_t index) {
      const Chunk chunk = chunk_at(args, index);
      ReduceBody<F, A> body{functor_for<F>(args, hyper, signals, chunk.tensor)};
      walk_chunk<F, A>(args, chunk, false, body, Variants<F>());
      add_lanes(body.lanes, args.slots() + index * F::sums);
    });
    int64_t tensor = 0;
    for (int64_t bucket = 0; bucket < args.buckets; ++bucket) {
      double sum[F::sums] = {};
      for (; tensor < args.tensors && args.bucket_of[tensor] == bucket; ++tensor)
        for (int64_t c = args.first_chunk[tensor]; c < args.first_chunk[tensor + 1]; ++c)
          for (int s = 0; s < F::sums; ++s) sum[s] += args.slots()[c * F::sums + s];
      for (int s = 0; s < F::sums; ++s) {
        const A result = A(F::finish(sum[s]));
        static_cast<A*>(signals.norm)[bucket * F::sums + s] = result;
        if (signals.found_inf && !finite(result)) *signals.found_inf = 1.0f;
      }
    }
  }

  template <class A>
  static void cross_entropy(const Rows<A>& rows, intptr_t threads);  // cpu/row_loop.h
};

}  // namespace lt
