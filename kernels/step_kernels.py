"""Restore, add up the gradients and update in one pass."""

import triton
import triton.language as tl

from .chunks import (
    coefficient,
    divide,
    inverse_scale,
    item,
    launch_map,
    launched,
    load,
    narrow,
    note,
    number,
    on_device,
    pointer_to,
    skipped,
    sqrt,
    store,
)


@triton.jit
def _factors(maximize, max_norm, norm, grad_scale, A: tl.constexpr):
    """What the summed gradient is multiplied by, one after the other: unscaling with the sign, and clipping to max_norm."""
    inverse = inverse_scale(grad_scale, A)
    clip = divide(max_norm.to(A), number(norm, 0.0, A) * inverse + 1e-6)
    clips = (max_norm > 0) & (norm != 0) & ~(clip >= 1)  # NaN stays, as in torch
    return tl.where(maximize != 0, -inverse, inverse), tl.where(clips, clip, 1.0)


@triton.jit
def _coefficients(combination, A: tl.constexpr):
    """How g and kept are combined: for the direction, and for a decoupled step."""
    return (
        coefficient(combination, 0, 1.0, A),
        coefficient(combination, 1, 1.0, A),
        coefficient(combination, 2, 0.0, A),
        coefficient(combination, 3, 0.0, A),
    )


@triton.jit
def _decayed(d, decay, old):
    """Without decay the weights do not count, be they infinite."""
    return tl.where(decay != 0, d + decay * old, d)


@triton.jit
def _sgd(old, total, m, inverse, clip, lr, momentum, fresh, decay, nesterov, first):
    """W = old - lr m,  m = momentum m + fresh d,  d = clip inverse total + decay old;  the first m is d."""
    d = _decayed(total * inverse * clip, decay, old)
    buffer = tl.where(first, d, momentum * m + fresh * d)
    return old - lr * tl.where(nesterov, d + momentum * buffer, buffer), buffer


@triton.jit
def _sgd_blocks(
    row, begin, end, active, combination, inverse, clip, lr, momentum, fresh, decay, nesterov, first_step,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, ORIGINAL, G, KEPT, M = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    c0, c1, c2, c3 = _coefficients(combination, A)
    for first in range(begin, end, BLOCK):
        old = load(ORIGINAL, first, end, TYPES[1], WIDE, A, BLOCK)
        g = load(G, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        kept = load(KEPT, first, end, TYPES[3], WIDE, A, BLOCK).to(A)
        m = load(M, first, end, TYPES[4], WIDE, A, BLOCK)
        total, decoupled = c0 * g + c1 * kept, c2 * g + c3 * kept
        w, buffer = _sgd(old.to(A), total, m.to(A), inverse, clip, lr, momentum, fresh, decay, nesterov, first_step)
        w = tl.where(combination != 0, w - lr * (decoupled * inverse), w)
        new_w, new_m = narrow(w, TYPES[0]), narrow(buffer, TYPES[4])
        store(W, first, end, tl.where(active, new_w, narrow(old, TYPES[0])), TYPES[0], WIDE, BLOCK)
        store(M, first, end, tl.where(active & (momentum != 0), new_m, m), TYPES[4], WIDE, BLOCK)


@launched
def sgd_step_kernel(
    items, pointers, hyper, norm: tl.int64, grad_scale: tl.int64, found_inf: tl.int64, combination: tl.int64,
    scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """torch.optim.SGD on the restored weights with the gradient g + kept."""
    tensor, begin, whole, end, group, slot, _ = item(items)
    note(scratch, slot, call)
    row, h = pointers + tensor * 6, hyper + group * 7
    lr, momentum, decay = tl.load(h).to(A), tl.load(h + 1).to(A), tl.load(h + 3).to(A)
    fresh = (1.0 - tl.load(h + 2)).to(A)
    inverse, clip = _factors(tl.load(h + 5), tl.load(h + 6), norm, grad_scale, A)
    first_step = (momentum == 0) | (number(tl.load(row + 5), 1.0, tl.float32) == 0)
    nesterov, active = (tl.load(h + 4) != 0) & (momentum != 0), skipped(found_inf) == 0
    _sgd_blocks(
        row, begin, whole, active, combination, inverse, clip, lr, momentum, fresh, decay, nesterov, first_step,
        TYPES, True, A, BLOCK,
    )  # fmt: skip
    _sgd_blocks(
        row, whole, end, active, combination, inverse, clip, lr, momentum, fresh, decay, nesterov, first_step,
        TYPES, False, A, BLOCK,
    )  # fmt: skip


@triton.jit
def _adam(old, total, m, v, vmax, inverse, clip, step_size, fresh1, beta2, fresh2, root, eps, keep, decay):
    """W = keep old - step_size m / (sqrt(v) / root + eps),  m += fresh1 (d - m),  v = beta2 v + fresh2 d^2."""
    d = _decayed(total * inverse * clip, decay, old)
    mean = m + fresh1 * (d - m)
    square = beta2 * v + fresh2 * d * d
    # Vmax reads as 0 without amsgrad. NaN stays, as in torch.
    largest = tl.where((vmax > square) | (vmax != vmax), vmax, square)
    return old * keep - divide(step_size * mean, divide(sqrt(largest), root) + eps), mean, square, largest


@triton.jit
def _adam_blocks(
    row, begin, end, active, combination, inverse, clip, lr, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, ORIGINAL, G, KEPT = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    M, V, VMAX = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    c0, c1, c2, c3 = _coefficients(combination, A)
    for first in range(begin, end, BLOCK):
        old = load(ORIGINAL, first, end, TYPES[1], WIDE, A, BLOCK)
        g = load(G, first, end, TYPES[2], WIDE, A, BLOCK).to(A)
        kept = load(KEPT, first, end, TYPES[3], WIDE, A, BLOCK).to(A)
        m = load(M, first, end, TYPES[4], WIDE, A, BLOCK)
        v = load(V, first, end, TYPES[5], WIDE, A, BLOCK)
        vmax = load(VMAX, first, end, TYPES[6], WIDE, A, BLOCK)
        total, decoupled = c0 * g + c1 * kept, c2 * g + c3 * kept
        w, mean, square, largest = _adam(
            old.to(A), total, m.to(A), v.to(A), vmax.to(A),
            inverse, clip, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
        )  # fmt: skip
        w = tl.where(combination != 0, w - lr * (decoupled * inverse), w)
        new_w, new_m = narrow(w, TYPES[0]), narrow(mean, TYPES[4])
        new_v, new_vmax = narrow(square, TYPES[5]), narrow(largest, TYPES[6])
        store(W, first, end, tl.where(active, new_w, narrow(old, TYPES[0])), TYPES[0], WIDE, BLOCK)
        store(M, first, end, tl.where(active, new_m, m), TYPES[4], WIDE, BLOCK)
        store(V, first, end, tl.where(active, new_v, v), TYPES[5], WIDE, BLOCK)
        store(VMAX, first, end, tl.where(active, new_vmax, vmax), TYPES[6], WIDE, BLOCK)


@launched
def adam_step_kernel(
    items, pointers, hyper, norm: tl.int64, grad_scale: tl.int64, found_inf: tl.int64, combination: tl.int64,
    scratch: tl.int64, call: tl.int64,
    TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """torch.optim.Adam, or AdamW when decoupled, on the restored weights with the gradient g + kept."""
    tensor, begin, whole, end, group, slot, _ = item(items)
    note(scratch, slot, call)
    row, h = pointers + tensor * 8, hyper + group * 8
    lr, beta1, beta2, decay = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 4)
    decoupled = tl.load(h + 5) != 0
    inverse, clip = _factors(tl.load(h + 6), tl.load(h + 7), norm, grad_scale, A)
    t = number(tl.load(row + 7), 0.0, tl.float32).to(tl.float64) + 1.0
    step_size = (lr / (1.0 - tl.exp(t * tl.log(beta1)))).to(A)
    root = sqrt(1.0 - tl.exp(t * tl.log(beta2))).to(A)
    keep = tl.where(decoupled, 1.0 - lr * decay, 1.0).to(A)
    decay = tl.where(decoupled, 0.0, decay).to(A)
    fresh1, fresh2, eps = (1.0 - beta1).to(A), (1.0 - beta2).to(A), tl.load(h + 3).to(A)
    beta2, lr, active = beta2.to(A), lr.to(A), skipped(found_inf) == 0
    _adam_blocks(
        row, begin, whole, active, combination, inverse, clip, lr, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
        TYPES, True, A, BLOCK,
    )  # fmt: skip
    _adam_blocks(
        row, whole, end, active, combination, inverse, clip, lr, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
        TYPES, False, A, BLOCK,
    )  # fmt: skip


@launched
def count_steps_kernel(pointers, tensors, found_inf: tl.int64, ROLES: tl.constexpr, BLOCK: tl.constexpr):
    """Step += 1 for every tensor that has one, unless skipped; a launch of its own, after all have read it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(pointers + at.to(tl.int64) * ROLES + ROLES - 1, mask=at < tensors, other=0)
    step = pointer_to(address, tl.float32)
    taken = tl.where(skipped(found_inf), 0.0, 1.0)
    tl.store(step, tl.load(step, mask=address != 0, other=0.0) + taken, mask=address != 0)


def _step(kernel, args, roles):
    launch_map(kernel, args, args.addresses[:4], roles - 1)  # the last role is the step count
    if args.pointers[:, -1].any():
        pointers = on_device(args, "pointers", lambda: args.pointers)
        tensors = len(args.pointers)
        count_steps_kernel[(triton.cdiv(tensors, 128),)](pointers, tensors, args.addresses[2], ROLES=roles, BLOCK=128)


def sgd_step_(args):
    """Restores, sums and takes SGD's step. See :func:`ltsam_fast.ops.sgd_step_`."""
    _step(sgd_step_kernel, args, 6)


def adam_step_(args):
    """Restores, sums and takes Adam's step. See :func:`ltsam_fast.ops.adam_step_`."""
    _step(adam_step_kernel, args, 8)
