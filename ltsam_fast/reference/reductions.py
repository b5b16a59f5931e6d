"""Norms and inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.reference.arithmetic import Tensors, combined, entry, of_group, wide


@torch.no_grad()
def grad_norm(
    grads: Tensors,
    params: Tensors | None = None,
    *,
    kept_grads: Tensors | None = None,
    combination: Tensor | None = None,
    adaptive: Any = False,
    eta: Any = 0.0,
    groups: Sequence[int] | None = None,
    per_group: bool = False,
    found_inf: Tensor | None = None,
) -> Tensor:
    """sqrt(sum (T g)^2),  T = |w| + eta when adaptive, else 1;  g is the sum, or the combination, of grads and kept_grads."""
    present = [g for g in (*grads, *(kept_grads or ())) if g is not None]
    device = present[0].device if present else torch.device("cpu")
    exact = any(g.dtype == torch.float64 for g in present)
    rows = max((len(value) for value in (adaptive, eta) if isinstance(value, Sequence)), default=1)
    outputs = max(max(groups or (), default=-1) + 1, rows) if per_group else 1
    squares = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(outputs)]
    for i, g in enumerate(grads):
        other = entry(kept_grads, i)
        like = other if g is None else g
        if like is None:
            continue
        t = combined(like, g, other, combination)
        if of_group(adaptive, groups, i):
            t = (wide(params[i]).abs() + of_group(eta, groups, i)) * t  # type: ignore[index, arg-type]
        bucket = groups[i] if per_group else 0  # type: ignore[index]
        squares[bucket] = squares[bucket] + t.square().sum().double().to(device)
    norm = torch.stack(squares).sqrt().to(torch.float64 if exact else torch.float32)
    if found_inf is not None and not bool(norm.isfinite().all()):
        found_inf.fill_(1.0)
    return norm if per_group else norm[0]


@torch.no_grad()
def grad_dots(grads: Tensors, other: Tensors) -> Tensor:
    """(g.g, h.h, g.h) over all tensors."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for g, h in zip(grads, other, strict=True):
        like = h if g is None else g
        if like is not None:
            pairs.append((torch.zeros_like(like) if g is None else g, torch.zeros_like(like) if h is None else h))
    exact = any(one.dtype == torch.float64 for pair in pairs for one in pair)
    sums = torch.zeros(3, dtype=torch.float64, device=pairs[0][0].device if pairs else "cpu")
    for g, h in pairs:
        g, h = wide(g), wide(h)
        sums += torch.stack([(g * g).sum(), (h * h).sum(), (g * h).sum()]).to(sums)
    return sums.to(torch.float64 if exact else torch.float32)


def class_grad_norms(
    class_grads: Sequence[Tensors], params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0
) -> Tensor:
    """The norm of each of K gradients."""
    norms = [grad_norm(grads, params, adaptive=adaptive, eta=eta) for grads in class_grads]
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float32)
