"""Climb to w + eps and come back."""

import triton
import triton.language as tl

from .table import finite, inverse_scale, item, launch, load, norm_of, skipped, store


@triton.jit
def _perturb(w, g, scale, adaptive, eta):
    """W + (T g) scale,  T = (|w| + eta)^2 when adaptive, else 1."""
    t = tl.abs(w) + eta
    return w + tl.where(adaptive, t * t * g, g) * scale


@triton.jit
def _perturb_chunk(
    row, begin, count, scale, active, adaptive, eta,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, G, BACKUP = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    for start in range(0, count, BLOCK):
        first, left = begin + start, count - start
        w = load(W, first, left, TYPES[0], WIDE, A, BLOCK)
        g = load(G, first, left, TYPES[1], WIDE, A, BLOCK)
        store(BACKUP, first, left, w, TYPES[2], WIDE, BLOCK)
        store(W, first, left, tl.where(active, _perturb(w, g, scale, adaptive, eta), w), TYPES[0], WIDE, BLOCK)


@triton.jit
def perturb_kernel(items, pointers, hyper, signals, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """Backup = w;  w = w + (T g) rho / (|g| + eps)."""
    tensor, begin, count, group, wide, _ = item(items)
    row, h = pointers + tensor * 3, hyper + group * 4
    inverse, norm = inverse_scale(signals, A), norm_of(signals, A)
    scale = tl.load(h).to(A) * inverse / (norm * inverse + tl.load(h + 3).to(A))
    active = (skipped(signals) == 0) & finite(norm) & finite(scale)
    adaptive, eta = tl.load(h + 1) != 0, tl.load(h + 2).to(A)
    if wide != 0:
        _perturb_chunk(row, begin, count, scale, active, adaptive, eta, TYPES, True, A, BLOCK)
    else:
        _perturb_chunk(row, begin, count, scale, active, adaptive, eta, TYPES, False, A, BLOCK)


@triton.jit
def _restore_chunk(row, begin, count, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    W, BACKUP = tl.load(row), tl.load(row + 1)
    for start in range(0, count, BLOCK):
        first, left = begin + start, count - start
        store(W, first, left, load(BACKUP, first, left, TYPES[1], WIDE, A, BLOCK), TYPES[0], WIDE, BLOCK)


@triton.jit
def restore_kernel(items, pointers, hyper, signals, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """W = backup."""
    tensor, begin, count, _, wide, _ = item(items)
    row = pointers + tensor * 2
    if wide != 0:
        _restore_chunk(row, begin, count, TYPES, True, A, BLOCK)
    else:
        _restore_chunk(row, begin, count, TYPES, False, A, BLOCK)


def perturb_(part, hyper, signals, where):
    """Keeps the weights and climbs. See :func:`ltsam_fast.ops.perturb_`."""
    launch(perturb_kernel, part, hyper, signals, 3)


def restore_(part, hyper, signals, where):
    """Puts the old weights back. See :func:`ltsam_fast.ops.restore_`."""
    launch(restore_kernel, part, hyper, signals, 2)
