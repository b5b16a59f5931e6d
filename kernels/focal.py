"""Cross entropy with two weighted gradients: one program a row, which reads its logits from memory once and then from L2."""

import triton
import triton.language as tl

from .table import TYPES, store


@triton.jit
def focal_kernel(
    logits, labels, u, v, losses, grad_u, grad_v, rows, classes,
    TYPE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss = log sum e^z - z_y;  grad_a = a_y / rows (softmax(z) - onehot(y)). A label out of range gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels.to(tl.int64).to(tl.pointer_type(tl.int64)) + row)
    known = (label >= 0) & (label < classes)
    label = tl.where(known, label, 0)
    z = logits.to(tl.int64).to(tl.pointer_type(TYPE)) + row * classes
    peak = tl.full([BLOCK], float("-inf"), A)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.load(z + at, mask=at < classes, other=float("-inf")).to(A))
    top = tl.max(peak, axis=0)
    lanes = tl.zeros([BLOCK], A)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lanes += tl.exp(tl.load(z + at, mask=at < classes, other=float("-inf")).to(A) - top)
    total = tl.sum(lanes, axis=0)
    nothing = tl.full([], float("nan"), A)
    loss = tl.log(total) + (top - tl.load(z + label).to(A))
    tl.store(losses.to(tl.int64).to(tl.pointer_type(A)) + row, tl.where(known, loss, nothing))
    weight_u = tl.where(known, tl.load(u.to(tl.int64).to(tl.pointer_type(A)) + label) / rows, nothing)
    weight_v = tl.where(known, tl.load(v.to(tl.int64).to(tl.pointer_type(A)) + label) / rows, nothing)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(z + at, mask=at < classes, other=float("-inf")).to(A) - top) / total
        slope = p - (at == label).to(A)
        store(grad_u.to(tl.int64), row * classes + start, classes - start, weight_u * slope, TYPE, False, BLOCK)
        store(grad_v.to(tl.int64), row * classes + start, classes - start, weight_v * slope, TYPE, False, BLOCK)


def focal_cross_entropy(logits, targets, u, v, losses, grad_u, grad_v, rows, classes, dtype, where):
    """Losses and both weighted gradients. See :func:`ltsam_fast.ops.focal_cross_entropy`."""
    TYPE = TYPES[dtype]
    focal_kernel[(rows,)](
        logits, targets, u, v, losses, grad_u, grad_v, rows, classes,
        TYPE=TYPE, A=tl.float64 if TYPE is tl.float64 else tl.float32, BLOCK=min(4096, triton.next_power_of_2(classes)),
        enable_fp_fusion=False,
    )  # fmt: skip
