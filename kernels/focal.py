"""Cross entropy with two weighted gradients: one program a row, which reads its logits from memory once and then from L2."""

import triton
import triton.language as tl

from .table import TYPES, divide, store


@triton.jit
def _logits(z, first, classes, A: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's logits; what lies beyond the last class weighs nothing."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(z + at, mask=at < classes, other=float("-inf")).to(A)


@triton.jit
def _focal(z, label, first, peak, inverse_sum, weight, BLOCK: tl.constexpr):
    """Weight (softmax(z) - onehot(label))."""
    onehot = (first + tl.arange(0, BLOCK) == label).to(z.dtype)
    return weight * (tl.exp(z - peak) * inverse_sum - onehot)


@triton.jit
def focal_kernel(
    logits: tl.int64, labels: tl.int64, u: tl.int64, v: tl.int64, losses: tl.int64, grad_u: tl.int64, grad_v: tl.int64,
    rows, classes, TYPE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss = log sum e^z - z_y;  grad_a = a_y / rows (softmax(z) - onehot(y)). A label out of range gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels.to(tl.pointer_type(tl.int64)) + row)
    known = (label >= 0) & (label < classes)
    label = tl.where(known, label, 0)
    begin = row * classes
    z = logits.to(tl.pointer_type(TYPE)) + begin
    peak, total = tl.full([], float("-inf"), A), tl.full([], 0.0, A)
    for first in range(0, classes, BLOCK):
        block = _logits(z, first, classes, A, BLOCK)
        higher = tl.maximum(peak, tl.max(block, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # as long as there is nothing but -inf
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(block - base), axis=0)
        peak = higher
    loss = tl.log(total.to(tl.float64)).to(A) + (peak - tl.load(z + label).to(A))
    nothing = tl.full([], float("nan"), A)
    tl.store(losses.to(tl.pointer_type(A)) + row, tl.where(known, loss, nothing))
    inverse_sum, share = divide(1.0, total), tl.full([], 1.0, A) * rows
    weight_u = tl.where(known, divide(tl.load(u.to(tl.pointer_type(A)) + label), share), nothing)
    weight_v = tl.where(known, divide(tl.load(v.to(tl.pointer_type(A)) + label), share), nothing)
    for first in range(0, classes, BLOCK):
        block = _logits(z, first, classes, A, BLOCK)
        at, end = begin + first, begin + classes
        store(grad_u, at, end, _focal(block, label, first, peak, inverse_sum, weight_u, BLOCK), TYPE, False, BLOCK)
        store(grad_v, at, end, _focal(block, label, first, peak, inverse_sum, weight_v, BLOCK), TYPE, False, BLOCK)


def focal_cross_entropy(logits, targets, u, v, losses, grad_u, grad_v, rows, classes, dtype, where):
    """Losses and both weighted gradients. See :func:`ltsam_fast.ops.focal_cross_entropy`."""
    TYPE = TYPES[dtype]
    BLOCK = min(4096, triton.next_power_of_2(classes))
    focal_kernel[(rows,)](
        logits, targets, u, v, losses, grad_u, grad_v, rows, classes,
        TYPE=TYPE, A=tl.float64 if TYPE is tl.float64 else tl.float32, BLOCK=BLOCK,
        num_warps=max(1, BLOCK // 512), enable_fp_fusion=False,
    )  # fmt: skip
