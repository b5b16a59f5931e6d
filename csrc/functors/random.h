// Random numbers made where they are used: the same on every back end and for any number of threads.
#pragma once
#include "functors/common.h"

namespace lt {

/// Philox-4x32 with ten rounds. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
/// Four consecutive elements share a call: element e of tensor `number` in step `step` gets word e % 4 of quad e / 4.
/// The bits of a tensor's number above the lowest 24 are the quad that it begins at, as a shard of a larger one.
struct Philox {
  uint32_t seed_low, seed_high, number, step;
  uint64_t first;

  LT_HD Philox(double seed, double step, int64_t number)
      : seed_low(uint32_t(uint64_t(seed))),
        seed_high(uint32_t(uint64_t(seed) >> 32)),
        number(uint32_t(number & 0xffffff)),
        step(uint32_t(int64_t(step))),  // minus the steps that were skipped, it may be negative
        first(uint64_t(number >> 24)) {}

  LT_HD void operator()(uint64_t quad, uint32_t (&word)[4]) const {
    quad += first;
    uint32_t a = uint32_t(quad), b = uint32_t(quad >> 32), c = number, d = step;
    uint32_t key0 = seed_low, key1 = seed_high;
    for (int round = 0; round < 10; ++round) {
      const uint64_t x = uint64_t(0xD2511F53u) * a, y = uint64_t(0xCD9E8D57u) * c;
      a = uint32_t(y >> 32) ^ b ^ key0;
      c = uint32_t(x >> 32) ^ d ^ key1;
      b = uint32_t(y);
      d = uint32_t(x);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
  }
};

/// ln x of a normal float, to 1 ulp: Cephes' polynomial (Moshier 1992) on [sqrt(1/2), sqrt(2)]. Written out, for
/// libraries differ in the last bit.
LT_HD float log_(float x) {
  const uint32_t u = bits<uint32_t>(x) - 0x3f3504f3u;  // sqrt(1/2)
  const float e = float(int32_t(u) >> 23);
  const float f = bits<float>((u & 0x7fffffu) + 0x3f3504f3u) - 1.0f, square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float y = p * f * square - e * 2.12194440e-4f - 0.5f * square;
  return f + y + e * 0.693359375f;
}

/// A standard normal number from 32 random bits, by the inverse distribution function; |z| < 6.4. Giles, "Approximating
/// the erfinv function", GPU Computing Gems 2011, single precision.
LT_HD float normal(uint32_t word) {
  const float p = (float(int32_t(word & 0x7fffffffu)) + 0.5f) * 0x1p-32f;  // of one tail, in (0, 1/2]
  const float x = 1.0f - 2.0f * p, tail = 4.0f * p * (1.0f - p);
  const float w = -log_(tail);
  const float near = w - 2.5f, far = std::sqrt(w) - 3.0f;
  const bool central = w < 5.0f;
  const float t = central ? near : far;
  float q = central ? 2.81022636e-08f : -0.000200214257f;
  q = q * t + (central ? 3.43273939e-07f : 0.000100950558f);
  q = q * t + (central ? -3.5233877e-06f : 0.00134934322f);
  q = q * t + (central ? -4.39150654e-06f : -0.00367342844f);
  q = q * t + (central ? 0.00021858087f : 0.00573950773f);
  q = q * t + (central ? -0.00125372503f : -0.0076224613f);
  q = q * t + (central ? -0.00417768164f : 0.00943887047f);
  q = q * t + (central ? 0.246640727f : 1.00167406f);
  q = q * t + (central ? 1.50140941f : 2.83297682f);
  const float z = 1.41421356f * (q * x);
  return bits<float>(bits<uint32_t>(z) | (word & 0x80000000u));
}

/// Rounds a float to a 16-bit type up or down at random, with the chances that keep the mean. The result is exact in
/// that type.
struct RandomRounding {
  int32_t digits, least;  ///< stored digits of the mantissa; below the exponent `least` its numbers are subnormal
  float grain, inverse_grain;

  LT_HD RandomRounding(uint8_t dtype)
      : digits(dtype == kBF16 ? 7 : 10),
        least(dtype == kBF16 ? 1 : 113),
        grain(dtype == kBF16 ? 0x1p16f : 0x1p13f),  // as fine as leaves the sum below exact
        inverse_grain(dtype == kBF16 ? 0x1p-16f : 0x1p-13f) {}

  LT_HD float operator()(float x, uint32_t draw) const {
    const float probability = std::floor(float(int32_t(draw)) * 0x1p-16f * grain) * inverse_grain;
    const int32_t exponent = int32_t(bits<uint32_t>(x) >> 23) & 0xff;
    const int32_t lift = exponent < 64 ? 64 : 0;  // powers of two, lest units or reciprocals leave float's range
    const int32_t held = (exponent < least ? least : exponent) + lift;
    const float place = bits<float>((held - digits) << 23);  // the unit in the last place
    const float inverse = bits<float>((254 - held + digits) << 23);
    const float up = bits<float>((127 + lift) << 23), down = bits<float>((127 - lift) << 23);
    const float rounded = std::floor(x * up * inverse + probability) * place * down;
    return exponent == 255 ? x : rounded;  // infinite, or no number
  }
};

}  // namespace lt
