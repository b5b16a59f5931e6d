"""Norms and inner products: partial sums for each chunk, then one program for each result that adds them up in order."""

import numpy as np
import triton
import triton.language as tl

from .chunks import accumulator, coefficient, finite, item, launch, launched, load, on_device, pointer_to, sqrt

SLOTS = 2048


@triton.jit
def _squares(total, w, adaptive, eta):
    """t^2,  t = T total,  T = |w| + eta when adaptive, else 1."""
    t = tl.where(adaptive, (tl.abs(w) + eta) * total, total)
    return t * t


@triton.jit
def _norm_blocks(
    row, begin, end, c0, c1, adaptive, eta,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    G, KEPT, W = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    lanes = tl.zeros([BLOCK], A)
    for first in range(begin, end, BLOCK):
        g = load(G, first, end, TYPES[0], WIDE, A, BLOCK).to(A)
        kept = load(KEPT, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        w = load(W, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        lanes += _squares(c0 * g + c1 * kept, w, adaptive, eta)
    return tl.sum(lanes.to(tl.float64), axis=0)


@launched
def chunk_norms_kernel(
    items,
    pointers,
    hyper,
    scratch: tl.int64,
    combination: tl.int64,
    TYPES: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scratch[slot] = sum of t^2 over a chunk."""
    tensor, begin, whole, end, group, slot, _ = item(items)
    row = pointers + tensor * 3
    adaptive, eta = tl.load(hyper + group * 2) != 0, tl.load(hyper + group * 2 + 1).to(A)
    c0, c1 = coefficient(combination, 0, 1.0, A), coefficient(combination, 1, 1.0, A)
    total = _norm_blocks(row, begin, whole, c0, c1, adaptive, eta, TYPES, True, A, BLOCK)
    if whole < end:
        total += _norm_blocks(row, whole, end, c0, c1, adaptive, eta, TYPES, False, A, BLOCK)
    tl.store(pointer_to(scratch, tl.float64) + slot, total)


@triton.jit
def _dots_blocks(row, begin, end, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    G, OTHER = tl.load(row), tl.load(row + 1)
    gg, oo, go = tl.zeros([BLOCK], A), tl.zeros([BLOCK], A), tl.zeros([BLOCK], A)
    for first in range(begin, end, BLOCK):
        g = load(G, first, end, TYPES[0], WIDE, A, BLOCK).to(A)
        other = load(OTHER, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        gg += g * g
        oo += other * other
        go += g * other
    return tl.sum(gg.to(tl.float64), axis=0), tl.sum(oo.to(tl.float64), axis=0), tl.sum(go.to(tl.float64), axis=0)


@launched
def chunk_dots_kernel(
    items, pointers, hyper, scratch: tl.int64, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    """scratch[3 slot...] = sums of g g, other other and g other over a chunk."""
    tensor, begin, whole, end, _, slot, _ = item(items)
    row, sums = pointers + tensor * 2, pointer_to(scratch, tl.float64) + slot * 3
    gg, oo, go = _dots_blocks(row, begin, whole, TYPES, True, A, BLOCK)
    if whole < end:
        more_gg, more_oo, more_go = _dots_blocks(row, whole, end, TYPES, False, A, BLOCK)
        gg, oo, go = gg + more_gg, oo + more_oo, go + more_go
    tl.store(sums, gg)
    tl.store(sums + 1, oo)
    tl.store(sums + 2, go)


@launched
def totals_kernel(
    ranges, scratch: tl.int64, out: tl.int64, found_inf: tl.int64,
    SUMS: tl.constexpr, ROOT: tl.constexpr, A: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """out[bucket, sum] = the sum of its slots, or its root; found_inf = 1 if that is not finite."""
    result = tl.program_id(0).to(tl.int64)
    bucket, which = result // SUMS, result % SUMS
    begin, end = tl.load(ranges + bucket * 2), tl.load(ranges + bucket * 2 + 1)
    lanes = tl.zeros([SLOTS], tl.float64)
    for first in range(begin, end, SLOTS):
        at = first + tl.arange(0, SLOTS)
        lanes += tl.load(pointer_to(scratch, tl.float64) + at * SUMS + which, mask=at < end, other=0.0)
    total = tl.sum(lanes, axis=0)
    if ROOT:
        total = sqrt(total)
    total = total.to(A)
    tl.store(pointer_to(out, A) + result, total)
    found_inf = found_inf.to(tl.int64)
    tl.store(pointer_to(found_inf, tl.float32), 1.0, mask=(found_inf != 0) & (finite(total) == 0))


def _ranges(args):
    """First and last + 1 chunk of each bucket; tensors are in the buckets' order."""
    edges = np.searchsorted(args.buckets, np.arange(args.bucket_count + 1))
    return np.stack([args.first_chunk[edges[:-1]], args.first_chunk[edges[1:]]], axis=1).astype(np.int64)


def _reduce(kernel, args, also, roles, sums, root):
    out, _, found_inf, *_ = args.addresses
    slots = args.scratch + 8  # the first double is a counter of the CUDA back end's
    launch(kernel, args, (slots, *also), roles)
    ranges = on_device(args, "ranges", lambda: _ranges(args))
    totals_kernel[(args.bucket_count * sums,)](
        ranges, slots, out, found_inf, SUMS=sums, ROOT=root, A=accumulator(args), SLOTS=SLOTS, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def grad_norm(args):
    """norm = sqrt(sum (T (g + kept))^2) for each bucket. See :func:`ltsam_fast.ops.grad_norm`."""
    _reduce(chunk_norms_kernel, args, args.addresses[3:4], 3, 1, True)


def grad_dots(args):
    """(g.g, other.other, g.other) for each bucket. See :func:`ltsam_fast.ops.grad_dots`."""
    _reduce(chunk_dots_kernel, args, (), 2, 3, False)
