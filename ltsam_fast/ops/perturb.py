"""Passes that perturb weights, restore them, or combine gradients."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ltsam_fast.ops.checks import check_offsets
from ltsam_fast.ops.dispatch import OPS, Hyper, Tensors, run
from ltsam_fast.table import TensorTable


def perturb_(
    params: Sequence[Tensor],
    grads: Tensors,
    backups: Tensors | None,
    norm: Tensor,
    *,
    rho: Hyper,
    maximize: Hyper = False,
    adaptive: Hyper = False,
    eta: Hyper = 0.0,
    eps: Hyper = 1e-12,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    original_params: Sequence[Tensor] | None = None,
    means: Tensors | None = None,
    combination: Tensor | None = None,
    decay: Hyper = 0.0,
    mask: Tensors | None = None,
    probability: Hyper = 1.0,
    stochastic: bool = False,
    seed: int | None = None,
    step: int = 0,
    skipped: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Backs the weights up and perturbs them along the gradient, in one pass: 16 bytes moved per fp32 element.

    .. math:: b \leftarrow w, \quad w \leftarrow w + \frac{\rho}{\|d\| + \epsilon} T d,
        \qquad T = (|w| + \eta)^2 \text{ if adaptive else } 1

    with the ascent direction ``d = g``, or ``d = c0 g + c1 m`` with means, which then take the gradient in.

    Args:
        params: T weights ``w``, changed in place.
        grads: T ascent gradients ``g``; ``None``: that weight stays.
        backups: T tensors of the weights' dtypes, filled with the old weights; ``None``: they are not kept.
        norm: Norm of the ascent direction, one number, from :func:`grad_norm`. When it is not finite, nothing is perturbed.
        rho: Radius, in units of the weights, >= 0.
        maximize: Against the gradient: the worst weights nearby where the loss is maximized; a flag, or one for each group.
        adaptive: ASAM's scaling.
        eta: ASAM's constant, >= 0.
        eps: Added to the norm, >= 0.
        groups: Group of each tensor.
        grad_scale: What the gradients, and so the norm, are too large by.
        found_inf: When not zero, nothing is perturbed.
        original_params: T tensors with the old weights, when ``params`` are perturbed already; ``None``: ``params`` themselves.
        means: T running means ``m`` of the (unscaled) gradients, updated to ``decay m + (1 - decay) g`` unless the step is
            skipped.
        combination: Four numbers ``c``, of which two count; ``None``: 1, 0.
        decay: Of the means, >= 0.
        mask: T maps of bits, uint8 of ceil(n / 8) elements: bit i % 8 (lowest first) of byte i / 8 is 1 when element i, in
            the order of memory, is not to move.
        probability: In [0, 1], to 2^-16: each element moves with this probability, drawn anew. Needs ``seed``.
        stochastic: Round weights of 16 bits up or down at random, so that steps below their resolution survive on average.
            Needs ``seed``.
        seed: Seed of the draws, in [0, 2^53). They depend on seed, step, the tensor's position and the element's alone.
        step: Number of the step, in [0, 2^32).
        skipped: One float32 number, read on the device and subtracted from ``step``: how many of the steps were none.
        table: A table to reuse, for callers that keep one; with a seed another one than without.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: Foret et al. 2021 (SAM), eq. 2; Kwon et al. 2021 (ASAM), eq. 3; means: Li et al. 2024 (Friendly SAM), Alg. 1;
    mask: Mi et al. 2022 (sparse SAM), Alg. 1; probability: Du et al. 2022 (ESAM), section 3.2.

    >>> import torch
    >>> from ltsam_fast.ops import grad_norm
    >>> w, g, backup = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0]), torch.empty(2)
    >>> perturb_([w], [g], [backup], grad_norm([g]), rho=0.5)
    >>> w
    tensor([1.3000, 1.4000])
    """
    if norm is None:
        raise ValueError("norm must be a tensor of one element, from grad_norm(), got None")
    rho = _signed(rho, maximize)
    values: dict[str, Hyper] = {"rho": rho, "adaptive": adaptive, "eta": eta, "eps": eps, "decay": decay}
    op = OPS["perturb_"]
    if seed is not None:
        op = OPS["random_perturb_"]
        values |= {"probability": probability, "stochastic": stochastic, "seed": seed, "step": step}
    elif stochastic or any(one != 1.0 for one in _listed(probability)):
        raise ValueError("seed must be given with probability or stochastic, got None")
    roles = (params, original_params, grads, backups, means, mask)
    signals: Any = {
        "norm": norm,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "combination": combination,
        "skipped": skipped,
    }
    run(op, roles, values, groups, table, **signals)


def _listed(value: Hyper) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value]


def _signed(rho: Hyper, maximize: Hyper) -> Hyper:
    """The radii as native code takes them: negative where the loss is maximized."""
    radii = _listed(rho)
    for radius in radii:
        if isinstance(radius, Real) and not radius >= 0:
            raise ValueError(f"rho must be a finite number >= 0, got {radius}")
    flags = _listed(maximize)
    if not any(flags):
        return rho
    radii, flags = (one * max(len(radii), len(flags)) if len(one) == 1 else one for one in (radii, flags))
    return tuple(-radius if flag else radius for radius, flag in zip(radii, flags, strict=True))


def gaussian_perturb_(
    params: Sequence[Tensor],
    backups: Tensors | None,
    *,
    amplitude: Hyper,
    sigma: Hyper = 1 / 3,
    clip: Hyper = 1.0,
    seed: int = 0,
    step: int = 0,
    skipped: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    original_params: Sequence[Tensor] | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Keeps the weights and adds clipped Gaussian noise that is made on the way, in one pass: 12 bytes per fp32 element.

    .. math:: b \leftarrow w, \quad w \leftarrow w + a \, \mathrm{clamp}(\sigma z, -c, c), \quad z \sim N(0, 1)

    Args:
        params: T weights ``w``, changed in place.
        backups: T tensors of the weights' dtypes, filled with the old weights; ``None``: they are not kept.
        amplitude: ``a`` >= 0, in units of the weights.
        sigma: Standard deviation before clipping, >= 0.
        clip: ``c`` >= 0.
        seed: In [0, 2^53). The noise depends on seed, step, the tensor's position and the element's (in the order of
            memory) alone: not on the backend, the number of threads or other tensors.
        step: Number of the step, in [0, 2^32).
        skipped: One float32 number, read on the device and subtracted from ``step``: how many of the steps were none.
        offsets: For shards of larger tensors the element number that each begins at, in [0, 2^40): they then get the
            noise that the whole tensor has there. Shards that begin elsewhere than at a multiple of 4 must be contiguous.
        groups: Group of each tensor.
        original_params: T tensors with the old weights, when ``params`` are perturbed already; ``None``: ``params`` themselves.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: GNM-PT (NeurIPS 2024, arXiv 2410.21042), poster, eqs. 1-3. Philox-4x32-10 (Salmon et al. 2011) and the inverse
    distribution function after Giles (2011).

    >>> import torch
    >>> w, backup = torch.zeros(4), torch.empty(4)
    >>> gaussian_perturb_([w], [backup], amplitude=1.0)
    >>> bool((w.abs() <= 1.0).all() and w.any())
    True
    """
    values: dict[str, Hyper] = {"amplitude": amplitude, "sigma": sigma, "clip": clip, "seed": seed, "step": step}
    if offsets is not None:
        check_offsets(offsets, params)
    roles = (params, original_params, backups)
    run(OPS["gaussian_perturb_"], roles, values, groups, table, offsets, skipped=skipped)


def perturb_by_class_(
    params: Sequence[Tensor],
    class_grads: Sequence[Sequence[Tensor]],
    scales: Tensor,
    *,
    table: TensorTable | None = None,
) -> None:
    r"""Turns K gradients of the same weights into K perturbed copies of the weights, in one pass over all of them.

    .. math:: g_k \leftarrow w + s_{k} g_k

    Args:
        params: T weights ``w``, not changed.
        class_grads: K lists of T gradients ``g_k``, overwritten with the perturbed weights, say one list per class.
        scales: Shape (K,), or (K, T) for a scale of each tensor's own: radius divided by norm.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or gradients share memory.
        TypeError: A dtype is not supported.

    Source: the class-conditional perturbations of CC-SAM (Zhou et al., CVPR 2023).

    >>> import torch
    >>> w, g = torch.tensor([1.0, 1.0]), [torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0])]
    >>> perturb_by_class_([w], [[g[0]], [g[1]]], torch.tensor([0.5, 0.25]))
    >>> g
    [tensor([1., 2.]), tensor([2., 1.])]
    """
    classes, tensors = len(class_grads), len(params)
    for k, grads in enumerate(class_grads):
        if len(grads) != tensors:
            raise ValueError(
                f"class_grads[{k}] has {len(grads)} entries, but params has {tensors}: give one per weight"
            )
    if not isinstance(scales, Tensor) or tuple(scales.shape) not in {(classes,), (classes, tensors)}:
        shape = tuple(scales.shape) if isinstance(scales, Tensor) else scales
        raise ValueError(f"scales must have shape ({classes},) or ({classes}, {tensors}), got {shape}")
    flat = scales.reshape(classes, -1).expand(classes, tensors).reshape(-1)
    rows = (list(params) * classes, [grad for grads in class_grads for grad in grads])
    run(OPS["perturb_by_class_"], rows, table=table, scales=flat)


def combine_(
    out: Sequence[Tensor],
    grads: Tensors,
    kept_grads: Tensors,
    combination: Tensor,
    *,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    """Fills ``out`` with ``c0 g + c1 g'``, with numbers that are on the device, in one pass: 16 bytes per fp32 element.

    Args:
        out: T tensors, overwritten.
        grads: T gradients ``g``; ``None`` counts as zeros.
        kept_grads: T gradients ``g'``; ``None`` counts as zeros.
        combination: Four numbers ``c``, of which two count.
        found_inf: When not zero, nothing is written.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    run(OPS["combine_"], (out, grads, kept_grads), table=table, found_inf=found_inf, combination=combination)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor], *, table: TensorTable | None = None) -> None:
    """Puts the old weights back, bit for bit, into the same storage: 8 bytes moved per fp32 element.

    Args:
        params: T weights, overwritten.
        backups: T tensors from :func:`perturb_`.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    run(OPS["restore_"], (params, backups), table=table)
