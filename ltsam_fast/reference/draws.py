"""Random numbers made where they are used: the same bits on every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def element_numbers(like: Tensor) -> Tensor:
    """The number of each element in the order of memory."""
    numbers = torch.empty_like(like, dtype=torch.int64)
    numbers.as_strided((numbers.numel(),), (1,)).copy_(torch.arange(numbers.numel()))
    return numbers


def bits(bitmap: Tensor, like: Tensor) -> Tensor:
    """A map of bits as booleans of a tensor's shape."""
    numbers = element_numbers(like)
    return (bitmap[numbers // 8] >> (numbers % 8).to(torch.uint8)) & 1 == 1


def random_words(like: Tensor, number: int, seed: int, step: int, skipped: Tensor | None, offset: int = 0) -> Tensor:
    """32 random bits for each element of a tensor, as int64."""
    return philox(element_numbers(like) + offset, number, seed, step if skipped is None else step - int(skipped))


def philox(elements: Tensor, number: int | Tensor, seed: int, step: int | Tensor) -> Tensor:
    """32 random bits for each element, as int64: Philox-4x32-10, Salmon et al. 2011. A call serves four elements."""
    low = 0xFFFFFFFF
    quad = elements // 4
    a, b, c, d = quad & low, quad >> 32, quad * 0 + number, (quad * 0 + step) & low
    key0, key1 = int(seed) & low, int(seed) >> 32
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c  # of the 64 bits that wrap around, all are right
        a, b, c, d = (y >> 32) & low ^ b ^ key0, y & low, (x >> 32) & low ^ d ^ key1, x & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([a, b, c, d]).gather(0, (elements % 4)[None])[0]


def log(x: Tensor) -> Tensor:
    """ln x in fp32, Cephes' polynomial."""
    u = x.view(torch.int32) - 0x3F3504F3
    e = (u >> 23).float()
    f = ((u & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    square = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + c
    return f + (p * f * square - e * 2.12194440e-4 - 0.5 * square) + e * 0.693359375


_CENTRAL = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
            0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
         1.00167406, 2.83297682)  # fmt: skip


def normal(words: Tensor) -> Tensor:
    """Standard normal numbers, fp32, by the inverse distribution function: Giles 2011."""
    p = ((words & 0x7FFFFFFF).float() + 0.5) * 2.0**-32
    x, w = 1 - 2 * p, -log(4 * p * (1 - p))
    central = w < 5
    root = w.double().sqrt().float()  # in fp32 torch's own root may be a bit off
    t = torch.where(central, w - 2.5, root - 3)
    q = torch.zeros_like(t)
    for near, far in zip(_CENTRAL, _TAIL, strict=True):
        q = q * t + torch.where(central, torch.full_like(q, near), torch.full_like(q, far))
    z = 1.41421356 * (q * x)
    return torch.where(words >> 31 != 0, -z, z)


def round_randomly(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Rounded to a 16-bit dtype, up or down with the chances that keep the mean."""
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    digits, least = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    probability = (words >> 16).float() * 2.0**-16
    if dtype == torch.float16:
        probability = (probability * 2**13).floor() * 2.0**-13
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least)
    place = torch.ldexp(torch.ones_like(x), exponent - (digits - 1))
    return torch.where(x.isfinite(), (x / place + probability).floor() * place, x)


def noise(rows: int, classes: int, seed: int, draw: Tensor) -> Tensor:
    """|e| of GCL, (B, C): the third of a standard normal number, at most 1."""
    row, element = (torch.arange(size, device=draw.device) for size in (rows, classes))
    elements, number = torch.broadcast_tensors(element, row[:, None] & 0xFFFFFF)  # a number has 24 bits
    return (normal(philox(elements, number, seed, draw.reshape(()))).abs() * (1 / 3)).clamp(max=1)
