"""Climb to w + eps and come back."""

import triton
import triton.language as tl

from .table import divide, finite, inverse_scale, item, launch, load, narrow, number, skipped, store


@triton.jit
def _perturb(w, g, scale, adaptive, eta):
    """W + (T g) scale,  T = (|w| + eta)^2 when adaptive, else 1."""
    t = tl.abs(w) + eta
    return w + tl.where(adaptive, t * t * g, g) * scale


@triton.jit
def _perturb_blocks(
    row, begin, end, scale, active, adaptive, eta,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, G, BACKUP = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    for first in range(begin, end, BLOCK):
        old = load(W, first, end, TYPES[0], WIDE, A, BLOCK)
        g = load(G, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        w = narrow(_perturb(old.to(A), g, scale, adaptive, eta), TYPES[0])
        store(BACKUP, first, end, old, TYPES[2], WIDE, BLOCK)
        store(W, first, end, tl.where(active, w, old), TYPES[0], WIDE, BLOCK)


@triton.jit
def perturb_kernel(
    items, pointers, hyper, norm: tl.int64, grad_scale: tl.int64, found_inf: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backup = w;  w = w + (T g) rho / (|g| + eps)."""
    tensor, begin, whole, end, group, _ = item(items)
    row, h = pointers + tensor * 3, hyper + group * 4
    inverse, size = inverse_scale(grad_scale, A), number(norm, 0.0, A)
    scale = divide(tl.load(h).to(A) * inverse, size * inverse + tl.load(h + 3).to(A))
    active = (skipped(found_inf) == 0) & finite(size) & finite(scale)
    adaptive, eta = tl.load(h + 1) != 0, tl.load(h + 2).to(A)
    _perturb_blocks(row, begin, whole, scale, active, adaptive, eta, TYPES, True, A, BLOCK)
    _perturb_blocks(row, whole, end, scale, active, adaptive, eta, TYPES, False, A, BLOCK)


@triton.jit
def _restore_blocks(row, begin, end, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    W, BACKUP = tl.load(row), tl.load(row + 1)
    for first in range(begin, end, BLOCK):
        store(W, first, end, load(BACKUP, first, end, TYPES[1], WIDE, A, BLOCK), TYPES[0], WIDE, BLOCK)


@triton.jit
def restore_kernel(items, pointers, hyper, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """W = backup, bit for bit."""
    tensor, begin, whole, end, _, _ = item(items)
    row = pointers + tensor * 2
    _restore_blocks(row, begin, whole, TYPES, True, A, BLOCK)
    _restore_blocks(row, whole, end, TYPES, False, A, BLOCK)


def perturb_(part, hyper, signals, where):
    """Keeps the weights and climbs. See :func:`ltsam_fast.ops.perturb_`."""
    launch(perturb_kernel, part, hyper, signals, 3)


def restore_(part, hyper, signals, where):
    """Puts the old weights back. See :func:`ltsam_fast.ops.restore_`."""
    launch(restore_kernel, part, hyper, (), 2)
