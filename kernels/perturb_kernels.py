"""Perturb the weights to w + eps, and restore them."""

import triton
import triton.language as tl

from .chunks import (
    coefficient,
    divide,
    finite,
    inverse_scale,
    item,
    launch_map,
    launched,
    load,
    load_bits,
    narrow,
    note,
    number,
    pointer_to,
    skipped,
    store,
)
from .philox import normal, random_words, round_randomly


@triton.jit
def _perturb(old, d, scale, adaptive, eta):
    """Old + (T d) scale,  T = (|old| + eta)^2 when adaptive, else 1."""
    t = tl.abs(old) + eta
    return old + tl.where(adaptive, t * t * d, d) * scale


@triton.jit
def _perturb_blocks(
    row, begin, end, c0, c1, scale, inverse, active, adaptive, eta, decay, fresh, probability, stochastic, seed, step,
    tensor,
    RANDOM: tl.constexpr, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, ORIGINAL, G = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    BACKUP, MEAN, MASK = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    for first in range(begin, end, BLOCK):
        old = load(ORIGINAL, first, end, TYPES[1], WIDE, A, BLOCK)
        g = load(G, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        mean = load(MEAN, first, end, TYPES[4], WIDE, A, BLOCK)
        moves = active & (load_bits(MASK, first, end, TYPES[5], BLOCK) == 0)
        perturbed = _perturb(old.to(A), c0 * g + c1 * mean.to(A), scale, adaptive, eta)
        if RANDOM:
            word = random_words(first, seed, step, tensor, BLOCK)
            moves = moves & ((word & 0xFFFF).to(tl.int32) < probability)
            if TYPES[0] == tl.bfloat16 or TYPES[0] == tl.float16:
                rounded = round_randomly(perturbed.to(tl.float32), word, TYPES[0]).to(A)
                perturbed = tl.where(stochastic, rounded, perturbed)
        store(BACKUP, first, end, narrow(old, TYPES[3]), TYPES[3], WIDE, BLOCK)
        new = narrow(perturbed, TYPES[0])
        store(W, first, end, tl.where(moves, new, narrow(old, TYPES[0])), TYPES[0], WIDE, BLOCK)
        if TYPES[4] is not None:
            taken_in = narrow(decay * mean.to(A) + fresh * (g * inverse), TYPES[4])
            store(MEAN, first, end, tl.where(active, taken_in, mean), TYPES[4], WIDE, BLOCK)


@launched
def perturb_kernel(
    items, pointers, hyper, norm: tl.int64, grad_scale: tl.int64, found_inf: tl.int64, combination: tl.int64,
    skipped_steps: tl.int64, scratch: tl.int64, call: tl.int64,
    RANDOM: tl.constexpr, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backup = old;  w = old + (T d) rho / (|d| + eps);  d = g, or the combination of g and mean;  mean takes g in."""
    tensor, begin, whole, end, group, slot, position = item(items)
    note(scratch, slot, call)
    row, h = pointers + tensor * 6, hyper + group * (9 if RANDOM else 5)
    inverse, size = inverse_scale(grad_scale, A), number(norm, 0.0, A)
    scale = divide(tl.load(h).to(A) * inverse, size * inverse + tl.load(h + 3).to(A))
    active = (skipped(found_inf) == 0) & finite(size) & finite(scale)
    adaptive, eta, decay = tl.load(h + 1) != 0, tl.load(h + 2).to(A), tl.load(h + 4).to(A)
    fresh = (1.0 - tl.load(h + 4)).to(A)  # in fp32 1 - 0.999 has four digits
    c0, c1 = coefficient(combination, 0, 1.0, A), coefficient(combination, 1, 0.0, A)
    probability, stochastic, seed, step = 0, False, tl.load(h), tl.load(h)
    if RANDOM:
        probability, stochastic = (tl.load(h + 5) * 65536 + 0.5).to(tl.int32), tl.load(h + 6) != 0
        seed, step = tl.load(h + 7), tl.load(h + 8) - number(skipped_steps, 0.0, tl.float32)
    _perturb_blocks(
        row, begin, whole, c0, c1, scale, inverse, active, adaptive, eta, decay, fresh, probability, stochastic, seed, step,
        position,
        RANDOM, TYPES, True, A, BLOCK,
    )  # fmt: skip
    _perturb_blocks(
        row, whole, end, c0, c1, scale, inverse, active, adaptive, eta, decay, fresh, probability, stochastic, seed, step,
        position,
        RANDOM, TYPES, False, A, BLOCK,
    )  # fmt: skip


@triton.jit
def _gaussian_blocks(
    row, begin, end, amplitude, sigma, clip, seed, step, tensor,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, ORIGINAL, BACKUP = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    for first in range(begin, end, BLOCK):
        old = load(ORIGINAL, first, end, TYPES[1], WIDE, A, BLOCK)
        e = sigma * normal(random_words(first, seed, step, tensor, BLOCK)).to(A)
        e = tl.minimum(tl.maximum(e, -clip), clip)
        store(BACKUP, first, end, narrow(old, TYPES[2]), TYPES[2], WIDE, BLOCK)
        store(W, first, end, old.to(A) + amplitude * e, TYPES[0], WIDE, BLOCK)


@launched
def gaussian_perturb_kernel(
    items, pointers, hyper, skipped_steps: tl.int64, scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backup = old;  w = old + amplitude clamp(sigma z, -clip, clip),  z standard normal."""
    tensor, begin, whole, end, group, slot, position = item(items)
    note(scratch, slot, call)
    row, h = pointers + tensor * 3, hyper + group * 5
    amplitude, sigma, clip = tl.load(h).to(A), tl.load(h + 1).to(A), tl.load(h + 2).to(A)
    seed, step = tl.load(h + 3), tl.load(h + 4) - number(skipped_steps, 0.0, tl.float32)
    _gaussian_blocks(row, begin, whole, amplitude, sigma, clip, seed, step, position, TYPES, True, A, BLOCK)
    _gaussian_blocks(row, whole, end, amplitude, sigma, clip, seed, step, position, TYPES, False, A, BLOCK)


@triton.jit
def _combine_blocks(
    row, begin, end, c0, c1, active, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    OUT, G, KEPT = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    for first in range(begin, end, BLOCK):
        out = load(OUT, first, end, TYPES[0], WIDE, A, BLOCK)
        g = load(G, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        kept = load(KEPT, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        combined = narrow(c0 * g + c1 * kept, TYPES[0])
        store(OUT, first, end, tl.where(active, combined, out), TYPES[0], WIDE, BLOCK)


@launched
def combine_kernel(
    items, pointers, hyper, found_inf: tl.int64, combination: tl.int64, scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Out = c0 g + c1 kept."""
    tensor, begin, whole, end, _, slot, _ = item(items)
    note(scratch, slot, call)
    row, active = pointers + tensor * 3, skipped(found_inf) == 0
    c0, c1 = coefficient(combination, 0, 1.0, A), coefficient(combination, 1, 1.0, A)
    _combine_blocks(row, begin, whole, c0, c1, active, TYPES, True, A, BLOCK)
    _combine_blocks(row, whole, end, c0, c1, active, TYPES, False, A, BLOCK)


@triton.jit
def _class_blocks(
    row, begin, end, scale, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    W, G = tl.load(row), tl.load(row + 1)
    for first in range(begin, end, BLOCK):
        w = load(W, first, end, TYPES[0], WIDE, A, BLOCK).to(A)
        g = load(G, first, end, TYPES[1], WIDE, A, BLOCK).to(A)
        store(G, first, end, w + scale * g, TYPES[1], WIDE, BLOCK)


@launched
def perturb_by_class_kernel(
    items, pointers, hyper, scales: tl.int64, scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G = w + scale g, with a scale for each tensor."""
    tensor, begin, whole, end, _, slot, position = item(items)
    note(scratch, slot, call)
    row, scale = pointers + tensor * 2, tl.load(pointer_to(scales, A) + position)
    _class_blocks(row, begin, whole, scale, TYPES, True, A, BLOCK)
    _class_blocks(row, whole, end, scale, TYPES, False, A, BLOCK)


@triton.jit
def _restore_blocks(row, begin, end, TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    W, BACKUP = tl.load(row), tl.load(row + 1)
    for first in range(begin, end, BLOCK):
        store(W, first, end, load(BACKUP, first, end, TYPES[1], WIDE, A, BLOCK), TYPES[0], WIDE, BLOCK)


@launched
def restore_kernel(
    items, pointers, hyper, scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W = backup, bit for bit."""
    tensor, begin, whole, end, _, slot, _ = item(items)
    note(scratch, slot, call)
    row = pointers + tensor * 2
    _restore_blocks(row, begin, whole, TYPES, True, A, BLOCK)
    _restore_blocks(row, whole, end, TYPES, False, A, BLOCK)


def perturb_(args):
    """Backs the weights up and perturbs them. See :func:`ltsam_fast.ops.perturb_`."""
    launch_map(perturb_kernel, args, args.addresses, 6, RANDOM=False)


def random_perturb_(args):
    """Backs the weights up and perturbs them, with random draws. See :func:`ltsam_fast.ops.perturb_`."""
    launch_map(perturb_kernel, args, args.addresses, 6, RANDOM=True)


def gaussian_perturb_(args):
    """Backs the weights up and adds noise. See :func:`ltsam_fast.ops.gaussian_perturb_`."""
    launch_map(gaussian_perturb_kernel, args, args.addresses[4:], 3)


def combine_(args):
    """Combines two gradients. See :func:`ltsam_fast.ops.combine_`."""
    launch_map(combine_kernel, args, args.addresses[2:4], 3)


def perturb_by_class_(args):
    """Perturbs for many classes. See :func:`ltsam_fast.ops.perturb_by_class_`."""
    launch_map(perturb_by_class_kernel, args, args.addresses[:1], 2)


def restore_(args):
    """Restores the weights. See :func:`ltsam_fast.ops.restore_`."""
    launch_map(restore_kernel, args, (), 2)
