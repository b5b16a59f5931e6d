"""The norm of the ascent gradient: a partial sum for each chunk, then one program that adds them up in order."""

import numpy as np
import triton
import triton.language as tl

from .table import accumulator, finite, item, launch, load, on_device, signals_on_device

SLOTS = 1024


@triton.jit
def _squares(g, extra, w, adaptive, eta):
    """t^2,  t = T (g + extra),  T = |w| + eta when adaptive, else 1."""
    total = g + extra
    t = tl.where(adaptive, (tl.abs(w) + eta) * total, total)
    return t * t


@triton.jit
def _chunk_sum(
    row, begin, count, adaptive, eta, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    G, EXTRA, W = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    lanes = tl.zeros([BLOCK], A)
    for start in range(0, count, BLOCK):
        first, left = begin + start, count - start
        g = load(G, first, left, TYPES[0], WIDE, A, BLOCK)
        extra = load(EXTRA, first, left, TYPES[1], WIDE, A, BLOCK)
        w = load(W, first, left, TYPES[2], WIDE, A, BLOCK)
        lanes += _squares(g, extra, w, adaptive, eta)
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def chunk_sums_kernel(items, pointers, hyper, signals, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """scratch[slot] = sum of t^2 over a chunk."""
    tensor, begin, count, group, wide, slot = item(items)
    row = pointers + tensor * 3
    adaptive, eta = tl.load(hyper + group * 2) != 0, tl.load(hyper + group * 2 + 1).to(A)
    scratch = tl.load(signals + 3).to(tl.pointer_type(tl.float64))
    if wide != 0:
        tl.store(scratch + slot, _chunk_sum(row, begin, count, adaptive, eta, TYPES, True, A, BLOCK))
    else:
        tl.store(scratch + slot, _chunk_sum(row, begin, count, adaptive, eta, TYPES, False, A, BLOCK))


@triton.jit
def norms_kernel(ranges, signals, A: tl.constexpr, SLOTS: tl.constexpr):
    """norm[bucket] = sqrt of the sum of its slots; found_inf = 1 if that is not finite."""
    bucket = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(ranges + bucket * 2), tl.load(ranges + bucket * 2 + 1)
    scratch = tl.load(signals + 3).to(tl.pointer_type(tl.float64))
    lanes = tl.zeros([SLOTS], tl.float64)
    for start in range(0, end - begin, SLOTS):
        at = begin + start + tl.arange(0, SLOTS)
        lanes += tl.load(scratch + at, mask=at < end, other=0.0)
    norm = tl.sqrt(tl.sum(lanes, axis=0)).to(A)
    tl.store(tl.load(signals).to(tl.pointer_type(A)) + bucket, norm)
    found_inf = tl.load(signals + 2)
    tl.store(found_inf.to(tl.pointer_type(tl.float32)), 1.0, mask=(found_inf != 0) & (finite(norm) == 0))


def _ranges(part):
    """First and last + 1 chunk of each bucket; tensors are in the buckets' order."""
    edges = np.searchsorted(part.buckets, np.arange(part.bucket_count + 1))
    return np.stack([part.first_chunk[edges[:-1]], part.first_chunk[edges[1:]]], axis=1).astype(np.int64)


def grad_norm(part, hyper, signals, where):
    """norm = sqrt(sum (T (g + extra))^2) for each bucket. See :func:`ltsam_fast.ops.grad_norm`."""
    launch(chunk_sums_kernel, part, hyper, signals, 3)
    ranges = on_device(part, "ranges", lambda: _ranges(part))
    norms_kernel[(part.bucket_count,)](ranges, signals_on_device(part, signals), A=accumulator(part), SLOTS=SLOTS)
