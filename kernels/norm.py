"""The norm of the ascent gradient: a partial sum for each chunk, then one program a norm that adds them up in order."""

import numpy as np
import triton
import triton.language as tl

from .table import accumulator, finite, item, launch, load, on_device, sqrt

SLOTS = 2048


@triton.jit
def _squares(g, extra, w, adaptive, eta):
    """t^2,  t = T (g + extra),  T = |w| + eta when adaptive, else 1."""
    total = g + extra
    t = tl.where(adaptive, (tl.abs(w) + eta) * total, total)
    return t * t


@triton.jit
def _blocks_sum(
    row, begin, end, adaptive, eta, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    G, EXTRA, W = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    lanes = tl.zeros([BLOCK], A)
    for first in range(begin, end, BLOCK):
        g = load(G, first, end, TYPES[0], WIDE, A, BLOCK).to(A)
        extra = load(EXTRA, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        w = load(W, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        lanes += _squares(g, extra, w, adaptive, eta)
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def chunk_sums_kernel(
    items, pointers, hyper, scratch: tl.int64, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    """scratch[slot] = sum of t^2 over a chunk."""
    tensor, begin, whole, end, group, slot = item(items)
    row = pointers + tensor * 3
    adaptive, eta = tl.load(hyper + group * 2) != 0, tl.load(hyper + group * 2 + 1).to(A)
    total = _blocks_sum(row, begin, whole, adaptive, eta, TYPES, True, A, BLOCK)
    if whole < end:
        total += _blocks_sum(row, whole, end, adaptive, eta, TYPES, False, A, BLOCK)
    tl.store(scratch.to(tl.pointer_type(tl.float64)) + slot, total)


@triton.jit
def norms_kernel(ranges, scratch: tl.int64, norm: tl.int64, found_inf: tl.int64, A: tl.constexpr, SLOTS: tl.constexpr):
    """norm[bucket] = sqrt of the sum of its slots; found_inf = 1 if that is not finite."""
    bucket = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(ranges + bucket * 2), tl.load(ranges + bucket * 2 + 1)
    lanes = tl.zeros([SLOTS], tl.float64)
    for first in range(begin, end, SLOTS):
        at = first + tl.arange(0, SLOTS)
        lanes += tl.load(scratch.to(tl.pointer_type(tl.float64)) + at, mask=at < end, other=0.0)
    result = sqrt(tl.sum(lanes, axis=0)).to(A)
    tl.store(norm.to(tl.int64).to(tl.pointer_type(A)) + bucket, result)
    found_inf = found_inf.to(tl.int64)
    tl.store(found_inf.to(tl.pointer_type(tl.float32)), 1.0, mask=(found_inf != 0) & (finite(result) == 0))


def _ranges(part):
    """First and last + 1 chunk of each bucket; tensors are in the buckets' order."""
    edges = np.searchsorted(part.buckets, np.arange(part.bucket_count + 1))
    return np.stack([part.first_chunk[edges[:-1]], part.first_chunk[edges[1:]]], axis=1).astype(np.int64)


def grad_norm(part, hyper, signals, where):
    """norm = sqrt(sum (T (g + extra))^2) for each bucket. See :func:`ltsam_fast.ops.grad_norm`."""
    norm, _, found_inf = signals
    launch(chunk_sums_kernel, part, hyper, (part.scratch,), 3)
    ranges = on_device(part, "ranges", lambda: _ranges(part))
    norms_kernel[(part.bucket_count,)](
        ranges, part.scratch, norm, found_inf, A=accumulator(part), SLOTS=SLOTS, num_warps=8, enable_fp_fusion=False
    )
