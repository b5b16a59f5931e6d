"""Cross entropies, and Focal-SAM's class weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import reference
from ltsam_fast.launch_args import Numbers, accumulator
from ltsam_fast.ops import differentiable
from ltsam_fast.ops.checks import (
    check_counts,
    check_logits,
    check_loss_numbers,
    check_range,
    check_reduction,
    class_vector,
)


def focal_weights(class_counts: Any, gamma: float | Sequence[float] | Tensor = 1.0, lam: float = 0.5) -> Tensor:
    """Focal-SAM's weight of each class's sharpness, v_c = lam (1 - pi_c)^gamma with pi_c = n_c / n.

    Args:
        class_counts: C numbers of training samples, >= 0, not all zero.
        gamma: Focus on the tail, >= 0; a number, or C of them, one per class.
        lam: Overall weight; may exceed 1 (the paper's iNaturalist recipe has 1.1), v is not clamped.

    Returns:
        Shape (C,), float64.

    Raises:
        ValueError: ``class_counts`` is empty, negative, not finite or sums to zero; ``gamma`` or ``lam`` is not finite.

    Source: Focal-SAM (ICML 2025, arXiv 2505.01660), Algorithm 1.

    >>> focal_weights([90, 10], gamma=1.0, lam=0.5)
    tensor([0.0500, 0.4500], dtype=torch.float64)
    """
    counts = check_counts(class_counts)
    if not isinstance(gamma, (int, float)):
        gamma = torch.as_tensor(gamma, dtype=torch.float64)
        if gamma.dim() and gamma.shape != counts.shape:
            raise ValueError(
                f"gamma must be a number, or one for each of the {len(counts)} classes, got {gamma.tolist()}"
            )
    for name, value in (("gamma", gamma), ("lam", lam)):
        numbers = torch.as_tensor(value)
        if not bool(((numbers >= 0) & numbers.isfinite()).all()):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return reference.focal_weights(counts, gamma, lam)


def focal_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    detach: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Per-sample cross entropy and the gradients of both of Focal-SAM's losses, from one pass over the logits.

    .. math:: \ell_j = \log \sum_c e^{z_{jc}} - z_{j y_j}, \qquad
        \nabla_{z_j} \frac{1}{B} \sum_i a_{y_i} \ell_i = \frac{a_{y_j}}{B} (\mathrm{softmax}(z_j) - 1_{y_j})

    Feed the gradients to autograd: ``logits.backward(grad_u, retain_graph=True)``. The results themselves are detached. With
    arguments of :func:`adjusted_cross_entropy` :math:`\ell` is that loss.

    Args:
        logits: (B, C), contiguous or not.
        targets: (B,), int64 in [0, C).
        v: (C,) weights of the sharp loss, e.g. :func:`focal_weights`.
        u: (C,) weights of the clean loss; ``None``: 1 - v.
        scale: (C,); this and all that follow: see :func:`adjusted_cross_entropy`.
        shift: (C,)
        margin: (C,)
        weight: (C,)
        label_smoothing: In [0, 1].
        gamma: >= 0.
        detach: A flag.

    Returns:
        losses (B,) in fp32, or fp64 for fp64 logits; grad_u and grad_v (B, C) in the logits' dtype.

    Raises:
        ValueError: Shapes do not fit, or a target is out of range (on cpu; on a GPU that check would wait for the device,
            so there such a row comes out as NaN).
        TypeError: A dtype is not supported.

    Source: Focal-SAM (ICML 2025), Algorithm 1, with its two backward passes' cotangents in one kernel.

    >>> losses, grad_u, grad_v = focal_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.25, 0.75]))
    >>> losses, grad_u, grad_v
    (tensor([0.6931]), tensor([[ 0.1250, -0.1250]]), tensor([[ 0.3750, -0.3750]]))
    """
    logits, targets = check_logits(logits, targets)
    logits = logits.detach()
    check_range(targets, logits.shape[1])
    classes = logits.shape[1]
    both = []
    for name, given in (("u", 1 - v if u is None else u), ("v", v)):
        if not isinstance(given, Tensor) or tuple(given.shape) != (classes,):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name} must be a tensor of shape ({classes},), one weight per class, got {got}")
        both.append(given.detach().to(logits.device, accumulator(logits)).contiguous())
    vectors, numbers = prepared(
        logits, scale=scale, shift=shift, margin=margin, weight=weight, label_smoothing=label_smoothing, gamma=gamma,
        detach=detach,
    )  # fmt: skip
    return differentiable.both_gradients(logits.contiguous(), targets, both, vectors, numbers)


def adjusted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    detach: bool = False,
    spread: Tensor | None = None,
    draw: Tensor | None = None,
    seed: int = 0,
    reduction: str = "none",
) -> Tensor:
    r"""Per-sample cross entropy of adjusted logits, in one pass; differentiable by the logits, in another.

    .. math:: a_c = \alpha_c (z_c - \nu_c |e_c|) + \beta_c - \mu_y [c = y], \qquad
        \ell = \sum_c q_c \Big(\log \sum_k e^{a_k} - a_c\Big), \quad
        q_c = (1 - \epsilon) w_y [c = y] + \tfrac{\epsilon}{C} w_c

    With ``gamma`` the loss is :math:`w_y (1 - p)^\gamma (-\ln p)` of the label's probability :math:`p = e^{a_y} / \sum_k
    e^{a_k}`. Nothing of size (B, C) is kept for the backward but the logits themselves, and nothing is written but their
    gradient; logits that are not contiguous are copied. The reference implementation computes a backward that is itself to
    be differentiated, and up to 131072 logits on a CPU where no backend was chosen: there torch's functions are
    faster, and keep a matrix or more of the logits' size.

    Args:
        logits: (B, C), contiguous or not.
        targets: (B,), integers in [0, C).
        scale: (C,) factors ``alpha`` of the logits; ``None``: 1.
        shift: (C,) ``beta``, added to the logits; ``None``: 0.
        margin: (C,) ``mu``, subtracted from the adjusted logit of the label; ``None``: 0.
        weight: (C,) weights ``w`` of the classes; ``None``: 1.
        label_smoothing: ``epsilon`` in [0, 1]; with weights the meaning is that of torch.nn.functional.cross_entropy.
        gamma: Focus on samples with a small ``p``, >= 0; not together with label smoothing.
        detach: No gradient flows through ``(1 - p)^gamma``.
        spread: (C,) ``nu`` >= 0, amplitudes of the noise ``e ~ clamp(N(0, 1/9), -1, 1)``; ``None``: none. It is made where it
            is used, from Philox by ``seed``, ``draw``, row and class: the same on every backend.
        draw: One int64 number on the logits' device; another one is another noise. Needed with ``spread``.
        seed: In [0, 2^53).
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which divides the sum by that of the samples' weights.

    Returns:
        losses (B,), or their sum or mean, in fp32, or fp64 for fp64 logits. No gradient flows to anything but the logits.

    Raises:
        ValueError: Shapes or numbers do not fit, or a target is out of range (on cpu; on a GPU that check would wait for the
            device, so there such a row comes out as NaN).
        TypeError: A dtype is not supported.

    Source: see :mod:`ltsam_fast.losses`, whose losses are calls of this.

    >>> adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), shift=torch.tensor([3.0, 1.0]).log())
    tensor([1.3863])
    """
    logits, targets = check_logits(logits, targets)
    check_reduction(reduction)
    vectors, numbers = prepared(
        logits, scale=scale, shift=shift, margin=margin, weight=weight, label_smoothing=label_smoothing, gamma=gamma,
        detach=detach, spread=spread, draw=draw, seed=seed,
    )  # fmt: skip
    return differentiable.adjusted_cross_entropy(logits, targets, vectors, numbers, reduction)


def prepared(
    logits: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    detach: bool,
    spread: Tensor | None = None,
    draw: Tensor | None = None,
    seed: int = 0,
) -> tuple[differentiable.Vectors, Numbers]:
    """The arguments of :func:`adjusted_cross_entropy`, checked and as backends take them."""
    check_loss_numbers(label_smoothing, gamma, seed)
    if spread is None:
        draw = None
    elif not isinstance(draw, Tensor) or draw.numel() != 1 or draw.dtype != torch.int64:
        raise ValueError(f"draw must be a tensor with one int64 number when spread is given, got {draw!r}")
    else:
        draw = draw.to(logits.device)
    vectors = (
        class_vector("scale", scale, logits),
        class_vector("shift", shift, logits),
        class_vector("margin", margin, logits),
        class_vector("weight", weight, logits),
        class_vector("spread", spread, logits),
        draw,
    )
    return vectors, Numbers(float(label_smoothing), float(gamma), bool(detach), seed)
