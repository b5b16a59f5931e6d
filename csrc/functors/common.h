// What every functor shares: element types, accumulator arithmetic, the signals a pass reads. Host and device, no loop.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LT_HD __host__ __device__ __forceinline__
#else
#define LT_HD inline __attribute__((always_inline))
#endif

namespace lt {

/// Elements per chunk: the unit of work, and of the fixed summation order. ltsam_fast.launch_args.CHUNK must agree.
constexpr int64_t kChunk = 16384;

/// Codes of ltsam_fast.launch_args.DTYPES.
enum Dtype : uint8_t { kF32, kF64, kBF16, kF16, kBitmap };

LT_HD constexpr int item_size(uint8_t dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

LT_HD constexpr unsigned bit(int role) { return 1u << role; }

/// Device addresses of what one pass tells the next; null where it does not apply.
struct Signals {
  void* norm;               ///< of the accumulator's type: one number, or as many as a reduction has outputs
  const float* grad_scale;  ///< gradients are this much too large
  float* found_inf;         ///< non-zero: skip the update
  const void* combination;  ///< four numbers of the accumulator's type, see Combination
  const float* skipped;     ///< how many of the steps so far were none: random numbers do not count them

  template <class A>
  LT_HD A norm_as() const {
    return *static_cast<const A*>(norm);
  }
  template <class A>
  LT_HD A inverse_scale() const {
    return grad_scale ? A(1) / A(*grad_scale) : A(1);
  }
  LT_HD double taken(double step) const { return skipped ? step - double(*skipped) : step; }
  LT_HD bool skip() const { return found_inf && *found_inf != 0.0f; }
};

template <class To, class From>
LT_HD To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}

template <class A>
struct WordOf;
template <>
struct WordOf<float> {
  using type = uint32_t;
};
template <>
struct WordOf<double> {
  using type = uint64_t;
};

/// A choice that is the same for all elements. As a mask it leaves no branch in a loop: GCC vectorizes no loop with
/// one.
template <class A>
struct Choice {
  using Word = typename WordOf<A>::type;
  Word mask;

  LT_HD Choice(bool yes) : mask(yes ? ~Word(0) : Word(0)) {}
  LT_HD A operator()(A yes, A no) const { return bits<A>(Word((bits<Word>(yes) & mask) | (bits<Word>(no) & ~mask))); }
};

/// How two gradients are combined: c[0] g + c[1] other is the direction, c[2] g + c[3] other a decoupled step.
template <class A>
struct Combination {
  A c[4];

  LT_HD Combination(const Signals& s, A otherwise) {
    const A* given = static_cast<const A*>(s.combination);
    c[0] = given ? given[0] : A(1);
    c[1] = given ? given[1] : otherwise;
    c[2] = given ? given[2] : A(0);
    c[3] = given ? given[3] : A(0);
  }
  LT_HD A direction(A g, A other) const { return c[0] * g + c[1] * other; }
  LT_HD A decoupled(A g, A other) const { return c[2] * g + c[3] * other; }
};

/// What a functor may know of the tensor it is made for.
struct Here {
  const float* step;  ///< its count of steps, or null
  int64_t number;     ///< its position in the list, and for random numbers where it begins: see Philox
  uint8_t dtype;      ///< of its first role
};

template <class A>
LT_HD bool finite(A x) {
  return x - x == A(0);  // inf - inf and NaN - NaN are NaN; unlike std::isfinite the same text on both sides
}

// 16-bit floats as bit patterns: plain integer code, so that compilers without a half type build it too and the CPU
// loop vectorizes. Rounding is to nearest, ties to even.
LT_HD float from_bf16(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

LT_HD uint16_t to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | (u & 0x7f0000u ? 0u : 0x40u);  // keeps its bits, so that a copy is exact
  return f != f ? uint16_t(nan) : uint16_t(rounded);
}

LT_HD float from_f16(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 rebuilds the exponent, and normalizes subnormal halves exactly on the way.
  const float scaled = bits<float>(magnitude) * 0x1p112f;
  const uint32_t value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits<uint32_t>(scaled);
  return bits<float>(value | (uint32_t(h & 0x8000u) << 16));
}

LT_HD uint16_t to_f16(float f) {
  const uint32_t u = bits<uint32_t>(f), magnitude = u & 0x7fffffffu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  // Subnormal halves: adding 0.5 lets the float adder round at bit 2^-24, the half's last place.
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 2^16 or above: infinite
  const uint32_t payload = (magnitude >> 13) & 0x3ffu;
  half = magnitude > 0x7f800000u ? 0x7c00u | (payload ? payload : 0x200u) : half;  // NaN
  return uint16_t(sign | half);
}

}  // namespace lt
