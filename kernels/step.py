"""Restore, add up the gradients and update in one pass."""

import triton
import triton.language as tl

from .table import inverse_scale, item, launch, load, norm_of, on_device, signals_on_device, skipped, store


@triton.jit
def _factor(maximize, max_norm, signals, A: tl.constexpr):
    """What the summed gradient is multiplied by: unscaling, clipping to max_norm, the sign."""
    inverse = inverse_scale(signals, A)
    clip = max_norm.to(A) / (norm_of(signals, A) * inverse + 1e-6)
    clips = (max_norm > 0) & (tl.load(signals) != 0) & (clip < 1)
    factor = tl.where(clips, inverse * clip, inverse)
    return tl.where(maximize != 0, -factor, factor)


@triton.jit
def _sgd(old, g, extra, m, factor, lr, momentum, fresh, decay, nesterov, first):
    d = (g + extra) * factor + decay * old
    buffer = tl.where(first, d, momentum * m + fresh * d)
    return old - lr * tl.where(nesterov, d + momentum * buffer, buffer), buffer


@triton.jit
def _sgd_chunk(
    row, begin, count, active, factor, lr, momentum, fresh, decay, nesterov, first_step,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, SOURCE, G, EXTRA, M = (tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4))
    for start in range(0, count, BLOCK):
        first, left = begin + start, count - start
        old = load(SOURCE, first, left, TYPES[1], WIDE, A, BLOCK)
        g = load(G, first, left, TYPES[2], WIDE, A, BLOCK)
        extra = load(EXTRA, first, left, TYPES[3], WIDE, A, BLOCK)
        m = load(M, first, left, TYPES[4], WIDE, A, BLOCK)
        w, buffer = _sgd(old, g, extra, m, factor, lr, momentum, fresh, decay, nesterov, first_step)
        store(W, first, left, tl.where(active, w, old), TYPES[0], WIDE, BLOCK)
        store(M, first, left, tl.where(active, buffer, m), TYPES[4], WIDE, BLOCK)


@triton.jit
def sgd_step_kernel(items, pointers, hyper, signals, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """torch.optim.SGD on the restored weights with the gradient g + extra."""
    tensor, begin, count, group, wide, _ = item(items)
    row, h = pointers + tensor * 6, hyper + group * 7
    lr, momentum, decay = tl.load(h).to(A), tl.load(h + 1).to(A), tl.load(h + 3).to(A)
    fresh = 1.0 - tl.load(h + 2).to(A)
    factor = _factor(tl.load(h + 5), tl.load(h + 6), signals, A)
    steps = tl.load(row + 5)
    taken = tl.load(steps.to(tl.pointer_type(tl.float32)), mask=steps != 0, other=1.0)
    first_step, nesterov, active = (momentum == 0) | (taken == 0), tl.load(h + 4) != 0, skipped(signals) == 0
    if wide != 0:
        _sgd_chunk(
            row, begin, count, active, factor, lr, momentum, fresh, decay, nesterov, first_step, TYPES, True, A, BLOCK
        )
    else:
        _sgd_chunk(
            row, begin, count, active, factor, lr, momentum, fresh, decay, nesterov, first_step, TYPES, False, A, BLOCK
        )


@triton.jit
def _adam(old, g, extra, m, v, vmax, factor, step_size, fresh1, beta2, fresh2, root, eps, keep, decay):
    d = (g + extra) * factor + decay * old
    mean = m + fresh1 * (d - m)
    square = beta2 * v + fresh2 * d * d
    largest = tl.maximum(vmax, square)
    return old * keep - step_size * mean / (tl.sqrt(largest) / root + eps), mean, square, largest


@triton.jit
def _adam_chunk(
    row, begin, count, active, factor, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
    TYPES: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W, SOURCE, G, EXTRA = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    M, V, VMAX = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    for start in range(0, count, BLOCK):
        first, left = begin + start, count - start
        old = load(SOURCE, first, left, TYPES[1], WIDE, A, BLOCK)
        g = load(G, first, left, TYPES[2], WIDE, A, BLOCK)
        extra = load(EXTRA, first, left, TYPES[3], WIDE, A, BLOCK)
        m = load(M, first, left, TYPES[4], WIDE, A, BLOCK)
        v = load(V, first, left, TYPES[5], WIDE, A, BLOCK)
        vmax = load(VMAX, first, left, TYPES[6], WIDE, A, BLOCK)
        w, mean, square, largest = _adam(
            old, g, extra, m, v, vmax, factor, step_size, fresh1, beta2, fresh2, root, eps, keep, decay
        )
        store(W, first, left, tl.where(active, w, old), TYPES[0], WIDE, BLOCK)
        store(M, first, left, tl.where(active, mean, m), TYPES[4], WIDE, BLOCK)
        store(V, first, left, tl.where(active, square, v), TYPES[5], WIDE, BLOCK)
        store(VMAX, first, left, tl.where(active, largest, vmax), TYPES[6], WIDE, BLOCK)


@triton.jit
def adam_step_kernel(items, pointers, hyper, signals, TYPES: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """torch.optim.Adam, or AdamW when decoupled, on the restored weights with the gradient g + extra."""
    tensor, begin, count, group, wide, _ = item(items)
    row, h = pointers + tensor * 8, hyper + group * 8
    lr, beta1, beta2, decay = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 4)
    decoupled = tl.load(h + 5) != 0
    factor = _factor(tl.load(h + 6), tl.load(h + 7), signals, A)
    t = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
    step_size = (lr / (1.0 - tl.exp(t * tl.log(beta1)))).to(A)
    root = tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))).to(A)
    keep = tl.where(decoupled, 1.0 - lr * decay, 1.0).to(A)
    decay = tl.where(decoupled, 0.0, decay).to(A)
    fresh1, fresh2, eps, active = (1.0 - beta1).to(A), (1.0 - beta2).to(A), tl.load(h + 3).to(A), skipped(signals) == 0
    beta2 = beta2.to(A)
    if wide != 0:
        _adam_chunk(
            row, begin, count, active, factor, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
            TYPES, True, A, BLOCK,
        )  # fmt: skip
    else:
        _adam_chunk(
            row, begin, count, active, factor, step_size, fresh1, beta2, fresh2, root, eps, keep, decay,
            TYPES, False, A, BLOCK,
        )  # fmt: skip


@triton.jit
def count_steps_kernel(pointers, signals, tensors, ROLES: tl.constexpr, BLOCK: tl.constexpr):
    """Step += 1 for every tensor that has one, unless skipped; a launch of its own, after all have read it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(pointers + at.to(tl.int64) * ROLES + ROLES - 1, mask=at < tensors, other=0)
    step = address.to(tl.pointer_type(tl.float32))
    taken = tl.where(skipped(signals), 0.0, 1.0)
    tl.store(step, tl.load(step, mask=address != 0, other=0.0) + taken, mask=address != 0)


def _step(kernel, part, hyper, signals, roles):
    launch(kernel, part, hyper, signals, roles - 1)  # the last role is the step count
    if part.pointers[:, -1].any():
        pointers = on_device(part, "pointers", lambda: part.pointers)
        tensors = len(part.pointers)
        count_steps_kernel[(triton.cdiv(tensors, 128),)](
            pointers, signals_on_device(part, signals), tensors, ROLES=roles, BLOCK=128
        )


def sgd_step_(part, hyper, signals, where):
    """Restores, sums and takes SGD's step. See :func:`ltsam_fast.ops.sgd_step_`."""
    _step(sgd_step_kernel, part, hyper, signals, 6)


def adam_step_(part, hyper, signals, where):
    """Restores, sums and takes Adam's step. See :func:`ltsam_fast.ops.adam_step_`."""
    _step(adam_step_kernel, part, hyper, signals, 8)
