"""Random numbers made where they are used: the same bits as csrc/functors/random.h makes."""

import triton
import triton.language as tl

from .chunks import sqrt


@triton.jit
def random_words(first, seed, step, number, BLOCK: tl.constexpr):
    """32 random bits for each of BLOCK elements from ``first``, a multiple of 4, on; four elements share a call.

    The bits of a tensor's number above the lowest 24 are the quad that it begins at, as a shard of a larger one.
    """
    quad = (number >> 24) + first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    zeros = (quad * 0).to(tl.uint32)
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(
        seed.to(tl.int64).to(tl.uint64),
        low,
        high,
        zeros + (number & 0xFFFFFF).to(tl.uint32),
        zeros + step.to(tl.int64).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.uint32)


@triton.jit
def _log(x):
    """Ln x in fp32: Cephes' polynomial."""
    u = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (u >> 23).to(tl.float32)
    f = ((u & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = p * f * square - e * 2.12194440e-4 - 0.5 * square
    return f + y + e * 0.693359375


@triton.jit
def normal(word):
    """Standard normal numbers, fp32, by the inverse distribution function: Giles 2011."""
    p = ((word & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    x, w = 1.0 - 2.0 * p, -_log(4.0 * p * (1.0 - p))
    central = w < 5.0
    t = tl.where(central, w - 2.5, sqrt(w) - 3.0)
    q = tl.where(central, 2.81022636e-08, -0.000200214257)
    q = q * t + tl.where(central, 3.43273939e-07, 0.000100950558)
    q = q * t + tl.where(central, -3.5233877e-06, 0.00134934322)
    q = q * t + tl.where(central, -4.39150654e-06, -0.00367342844)
    q = q * t + tl.where(central, 0.00021858087, 0.00573950773)
    q = q * t + tl.where(central, -0.00125372503, -0.0076224613)
    q = q * t + tl.where(central, -0.00417768164, 0.00943887047)
    q = q * t + tl.where(central, 0.246640727, 1.00167406)
    q = q * t + tl.where(central, 1.50140941, 2.83297682)
    z = 1.41421356 * (q * x)
    return tl.where((word >> 31) != 0, -z, z)


@triton.jit
def round_randomly(x, word, TYPE: tl.constexpr):
    """An fp32 value rounded to a 16-bit type, up or down with the chances that keep the mean."""
    digits: tl.constexpr = 7 if TYPE == tl.bfloat16 else 10
    least: tl.constexpr = 1 if TYPE == tl.bfloat16 else 113
    probability = (word >> 16).to(tl.int32).to(tl.float32) * 1.52587890625e-05
    if TYPE == tl.float16:
        probability = tl.floor(probability * 8192.0) * 0.0001220703125  # so that the sum is exact
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    lift = tl.where(exponent < 64, 64, 0)  # powers of two, lest units or reciprocals leave fp32's range
    held = tl.maximum(exponent, least) + lift
    place = ((held - digits) << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - held + digits) << 23).to(tl.float32, bitcast=True)
    up, down = ((127 + lift) << 23).to(tl.float32, bitcast=True), ((127 - lift) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, x, tl.floor(x * up * inverse + probability) * place * down)
