"""Cross entropy of adjusted logits: one program a row, which reads its logits from memory once and then from L2."""

import triton
import triton.language as tl

from .chunks import TYPES, divide, pointer_to, store
from .philox import normal, random_words


@triton.jit
def _vector(address, at, classes, A: tl.constexpr):
    """A block of a vector of the classes; zeros beyond the last."""
    return tl.load(pointer_to(address, A) + at, mask=at < classes, other=0.0)


@triton.jit
def _adjusted(
    z, first, row, label, classes, scale, shift, margin, spread, draw, seed,
    SCALES: tl.constexpr, SHIFTS: tl.constexpr, MARGINS: tl.constexpr, SPREADS: tl.constexpr,
    A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row's adjusted logits; what lies beyond the last class weighs nothing."""
    at = first + tl.arange(0, BLOCK)
    a = tl.load(z + at, mask=at < classes, other=0.0).to(A)
    if SPREADS:
        number = tl.load(pointer_to(draw, tl.int64))
        words = random_words(first, tl.full([], 0, tl.int64) + seed, number, row & 0xFFFFFF, BLOCK)
        third = tl.abs(normal(words)) * 0.3333333333
        a -= _vector(spread, at, classes, A) * tl.minimum(third, 1.0).to(A)
    if SCALES:
        a *= _vector(scale, at, classes, A)
    if SHIFTS:
        a += _vector(shift, at, classes, A)
    if MARGINS:
        a -= tl.where(at == label, _vector(margin, at, classes, A), 0.0)
    return tl.where(at < classes, a, float("-inf"))


@triton.jit
def _focused(nll, GAMMA: tl.constexpr, DETACH: tl.constexpr):
    """(1 - p)^gamma of the label, and the derivative by its cross entropy of what it makes of that; in fp64."""
    nll = nll.to(tl.float64)
    series = nll * (1 - nll / 2 * (1 - nll / 3 * (1 - nll / 4)))
    missed = tl.where(nll < 1e-4, series, 1 - tl.exp(-nll))
    factor = tl.exp(GAMMA * tl.log(missed))
    slope = factor
    if not DETACH:
        moves = (missed > 0) & (missed < 1)
        slope = factor * tl.where(moves, 1 + GAMMA * (1 - missed) * nll / tl.where(moves, missed, 1.0), 1.0)
    return factor, slope


@triton.jit(do_not_specialize=["rows", "seed"])  # a last batch, or another run, is not worth a compilation
def cross_entropy_kernel(
    logits: tl.int64, targets: tl.int64, scale: tl.int64, shift: tl.int64, margin: tl.int64, spread: tl.int64,
    draw: tl.int64, weight: tl.int64, weight_sum: tl.int64, losses: tl.int64, state: tl.int64, cotangent_0: tl.int64,
    cotangent_1: tl.int64, grad_0: tl.int64, grad_1: tl.int64, rows, classes, seed: tl.int64,
    SCALES: tl.constexpr, SHIFTS: tl.constexpr, MARGINS: tl.constexpr, SPREADS: tl.constexpr, WEIGHS: tl.constexpr,
    SMOOTHING: tl.constexpr, GAMMA: tl.constexpr, DETACH: tl.constexpr, BY_LABEL: tl.constexpr,
    FORWARD: tl.constexpr, KEEPS: tl.constexpr, GRADS: tl.constexpr,
    TYPE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See lt::CrossEntropy. A label out of range gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(pointer_to(targets, tl.int64) + row)
    known = (label >= 0) & (label < classes)
    label = tl.where(known, label, 0)
    z = pointer_to(logits, TYPE) + row * classes
    kept = pointer_to(state, A) + row
    nothing = tl.full([], float("nan"), A)
    smooth = tl.full([], SMOOTHING, A) / classes
    weights = tl.full([], 1.0, A) * classes
    if WEIGHS and SMOOTHING != 0:
        weights = tl.load(pointer_to(weight_sum, A))

    if FORWARD:
        peak, total, of_label = tl.full([], float("-inf"), A), tl.full([], 0.0, A), tl.full([], 0.0, A)
        for first in range(0, classes, BLOCK):
            a = _adjusted(
                z, first, row, label, classes, scale, shift, margin, spread, draw, seed,
                SCALES, SHIFTS, MARGINS, SPREADS, A, BLOCK,
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(a, axis=0))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # as long as there is nothing but -inf
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(a - base), axis=0)
            peak = higher
            of_label += tl.sum(tl.where(first + tl.arange(0, BLOCK) == label, a, 0.0), axis=0)
        log_sum = tl.log(total.to(tl.float64)).to(A)
        nll = log_sum + (peak - of_label)
        hit = tl.full([], 1.0 - SMOOTHING, A)
        if WEIGHS:
            hit *= tl.load(pointer_to(weight, A) + label)
        loss = hit * nll
        if SMOOTHING != 0:
            spread_sum = tl.full([], 0.0, A)
            for first in range(0, classes, BLOCK):
                a = _adjusted(
                    z, first, row, label, classes, scale, shift, margin, spread, draw, seed,
                    SCALES, SHIFTS, MARGINS, SPREADS, A, BLOCK,
                )  # fmt: skip
                at = first + tl.arange(0, BLOCK)
                below = tl.where(at < classes, peak - a, 0.0)
                if WEIGHS:
                    below *= _vector(weight, at, classes, A)
                spread_sum += tl.sum(below, axis=0)
            loss += smooth * (weights * log_sum + spread_sum)
        if GAMMA != 0:
            factor, slope = _focused(nll, GAMMA, DETACH)
            loss, hit = (factor * loss).to(A), (slope * hit).to(A)
        inverse_sum = divide(1.0, total)
        hit = tl.where(known, hit, nothing)
        tl.store(pointer_to(losses, A) + row, tl.where(known, loss, nothing))
        if KEEPS:
            tl.store(kept, peak)
            tl.store(kept + rows, inverse_sum)
            tl.store(kept + 2 * rows, hit)
    else:
        peak, inverse_sum, hit = tl.load(kept), tl.load(kept + rows), tl.load(kept + 2 * rows)

    if GRADS > 0:
        factor_0, factor_1 = tl.full([], 1.0, A), tl.full([], 1.0, A)
        at_cotangent = label if BY_LABEL else row
        factor_0 = tl.load(pointer_to(cotangent_0, A) + at_cotangent)
        if GRADS > 1:
            factor_1 = tl.load(pointer_to(cotangent_1, A) + at_cotangent)
        if BY_LABEL:
            share = tl.full([], 1.0, A) * rows
            factor_0, factor_1 = divide(factor_0, share), divide(factor_1, share)
        if SMOOTHING == 0:
            factor_0, factor_1 = factor_0 * hit, factor_1 * hit
        factor_0, factor_1 = tl.where(known, factor_0, nothing), tl.where(known, factor_1, nothing)
        for first in range(0, classes, BLOCK):
            a = _adjusted(
                z, first, row, label, classes, scale, shift, margin, spread, draw, seed,
                SCALES, SHIFTS, MARGINS, SPREADS, A, BLOCK,
            )  # fmt: skip
            at = first + tl.arange(0, BLOCK)
            slope = tl.exp(a - peak) * inverse_sum
            if SMOOTHING != 0:
                shares = tl.full([BLOCK], 1.0, A)
                if WEIGHS:
                    shares = _vector(weight, at, classes, A)
                slope = (hit + smooth * weights) * slope - (smooth * shares + tl.where(at == label, hit, 0.0))
            else:
                slope -= (at == label).to(A)
            if SCALES:
                slope *= _vector(scale, at, classes, A)
            begin, end = row * classes + first, (row + 1) * classes
            store(grad_0, begin, end, factor_0 * slope, TYPE, False, BLOCK)
            if GRADS > 1:
                store(grad_1, begin, end, factor_1 * slope, TYPE, False, BLOCK)


def cross_entropy(args):
    """Losses, their state, gradients. See :class:`ltsam_fast.launch_args.RowArgs`."""
    addresses, classes, TYPE = args.addresses, args.classes, TYPES[args.dtype]
    BLOCK = min(4096, max(16, triton.next_power_of_2(classes)))
    has = [bool(address) for address in addresses]
    smoothing, gamma, detach, seed, by_label = args.numbers
    cross_entropy_kernel[(args.rows,)](
        *addresses, args.rows, classes, seed,
        SCALES=has[2], SHIFTS=has[3], MARGINS=has[4], SPREADS=has[5], WEIGHS=has[7],
        SMOOTHING=smoothing, GAMMA=gamma, DETACH=detach, BY_LABEL=by_label,
        FORWARD=has[9], KEEPS=has[10], GRADS=has[13] + has[14],
        TYPE=TYPE, A=tl.float64 if TYPE is tl.float64 else tl.float32, BLOCK=BLOCK,
        num_warps=max(1, BLOCK // 512), enable_fp_fusion=False,
    )  # fmt: skip
