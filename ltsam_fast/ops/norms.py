"""Norms and inner products of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltsam_fast.launch_args import Role
from ltsam_fast.lists import has_none
from ltsam_fast.ops.checks import check_groups
from ltsam_fast.ops.dispatch import OPS, Hyper, Tensors, hyper_rows, reduce
from ltsam_fast.table import TensorTable


def grad_norm(
    grads: Tensors,
    params: Tensors | None = None,
    *,
    kept_grads: Tensors | None = None,
    combination: Tensor | None = None,
    adaptive: Hyper = False,
    eta: Hyper = 0.0,
    groups: Sequence[int] | None = None,
    per_group: bool = False,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> Tensor:
    r"""The global norm of a gradient in one pass: 4 bytes read per fp32 element.

    .. math:: \|T (g + g')\|_2, \qquad T = |w| + \eta \text{ if adaptive else } 1

    Args:
        grads: T gradients ``g``; ``None`` counts as zeros.
        params: T weights ``w``; needed when adaptive.
        kept_grads: T gradients ``g'`` to be added, or ``None``.
        combination: Four numbers ``c``, of which two count: the norm is of ``c0 g + c1 g'``; ``None``: both are 1.
        adaptive: Scale by ``|w| + eta`` (ASAM); a flag, or one for each group.
        eta: ASAM's constant, >= 0; a number, or one for each group.
        groups: Group of each tensor.
        per_group: Return one norm for each group instead of the norm over all.
        found_inf: One float32 number, set to 1 when the result is not finite.
        table: A table to reuse, for callers that keep one.

    Returns:
        A 0-d tensor on the device of the first tensor, or shape (G,) with ``per_group``; float32, or float64 if any tensor
        is. The gradient is not unscaled: divide by the scale.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or ``found_inf`` is in a tensor's memory.
        TypeError: A dtype is not supported.

    Source: Foret et al. 2021 (SAM), eq. 2; Kwon et al. 2021 (ASAM), eq. 3. A fixed order of summation makes it repeatable.

    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    op = OPS["grad_norm"]
    hyper = hyper_rows(op, {"adaptive": adaptive, "eta": eta})
    if per_group:
        if groups is None:
            raise ValueError("groups must be given when per_group is set, got None")
        check_groups(groups, len(grads), len(hyper))
    scaled = any(adaptive) if isinstance(adaptive, Sequence) else bool(adaptive)
    if params is None and scaled:
        raise ValueError("params must be given when adaptive is set: the norm is of |w| g")
    shape = (max(max(groups, default=-1) + 1, len(hyper)),) if per_group and groups is not None else ()
    if kept_grads is not None and len(kept_grads) == len(grads) and has_none(grads):
        if combination is not None:
            grads = _filled(grads, kept_grads)
        else:  # a tensor is known by its first role, so a gradient that stands alone takes it
            pairs = list(zip(grads, kept_grads, strict=True))
            grads = [other if grad is None else grad for grad, other in pairs]
            kept_grads = [None if grad is None else other for grad, other in pairs]
    roles: tuple[Role, ...] = (grads, kept_grads, params if scaled else None)
    if per_group and groups is not None and list(groups) != sorted(groups):
        order = sorted(range(len(groups)), key=groups.__getitem__)
        roles = tuple(None if role is None else [role[i] for i in order] for role in roles)
        groups = [groups[i] for i in order]
    buckets = groups if per_group else None
    norms = reduce(op, roles, hyper, groups, buckets, shape, table, found_inf, combination=combination)
    if not norms:
        return torch.zeros(shape, dtype=torch.float32)
    return norms[0] if len(norms) == 1 else _join(norms)


def _join(norms: list[Tensor]) -> Tensor:
    """The norm over parts on several devices or in several precisions."""
    exact = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.linalg.vector_norm(exact, dim=0).to(dtype)


def _filled(grads: Tensors, kept_grads: Tensors) -> list[Tensor | None]:
    """Zeros for gradients that are missing where their partner is there."""
    return [
        torch.zeros_like(other) if grad is None and other is not None else grad
        for grad, other in zip(grads, kept_grads, strict=True)
    ]


def grad_dots(grads: Tensors, other: Tensors, *, table: TensorTable | None = None) -> Tensor:
    r"""The inner products of two gradients over all tensors, in one pass: 8 bytes read per fp32 element.

    Args:
        grads: T gradients ``g``; ``None`` counts as zeros.
        other: T gradients ``h``; ``None`` counts as zeros.
        table: A table to reuse, for callers that keep one.

    Returns:
        Shape (3,): ``g.g``, ``h.h``, ``g.h``; float32, or float64 if any tensor is.

    Raises:
        ValueError: Lengths, shapes or devices do not fit.
        TypeError: A dtype is not supported.

    >>> grad_dots([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])])
    tensor([5., 9., 3.])
    """
    if len(other) == len(grads) and has_none(grads):
        grads = _filled(grads, other)
    op = OPS["grad_dots"]
    dots = reduce(op, (grads, other), hyper_rows(op, {}), shape=(3,), table=table)
    if len(dots) < 2:
        return dots[0] if dots else torch.zeros(3, dtype=torch.float32)
    dtype = torch.float64 if any(one.dtype == torch.float64 for one in dots) else torch.float32
    return torch.stack([one.to(dots[0].device, torch.float64) for one in dots]).sum(0).to(dtype)


def class_grad_norms(
    class_grads: Sequence[Tensors], params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0
) -> Tensor:
    """The norms of K gradients, say one per class, in one pass over all of them.

    Args:
        class_grads: K lists of T gradients; ``None`` counts as zeros.
        params: T weights, needed when adaptive.
        adaptive: Scale by ``|w| + eta``.
        eta: ASAM's constant, >= 0.

    Returns:
        Shape (K,), float32, or float64 if any gradient is.

    Raises:
        ValueError: The K lists differ in length, or as for :func:`grad_norm`.

    Source: the class-conditional gradients of CC-SAM (Zhou et al. 2023).

    >>> class_grad_norms([[torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]])
    tensor([5., 2.])
    """
    lengths = {len(grads) for grads in class_grads}
    if len(lengths) > 1:
        raise ValueError(f"class_grads must hold lists of one length, got lengths {sorted(lengths)}")
    if not class_grads:
        return torch.zeros(0, dtype=torch.float32)
    grads = [grad for one in class_grads for grad in one]
    groups = [k for k, one in enumerate(class_grads) for _ in one]
    norms = grad_norm(
        grads, None if params is None else [*params] * len(class_grads), adaptive=adaptive, eta=eta, groups=groups,
        per_group=True,
    )  # fmt: skip
    return norms if len(norms) == len(class_grads) else norms.new_zeros(len(class_grads))
