"""CC-SAM's gradients and perturbations, class by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.gradients import check_all_dense


def members_of(labels: Sequence[Any]) -> dict[int, dict[int, list[int]]]:
    """For each class the parts of the batch that it occurs in, with the numbers of its samples there."""
    members: dict[int, dict[int, list[int]]] = {}
    for part, targets in enumerate(labels):
        for number, label in enumerate(targets.tolist()):
            members.setdefault(label, {}).setdefault(part, []).append(number)
    return members


def added(found: Sequence[Tensor | None], params: list[Tensor], so_far: list[Tensor] | None) -> list[Tensor]:
    """Gradients in memory of their own, added to what there is so far."""
    check_all_dense(found)
    if so_far is None:
        so_far = [torch.empty_like(param, requires_grad=False) for param in params]
        for mine, grad in zip(so_far, found, strict=True):
            mine.zero_() if grad is None else mine.copy_(grad)
    else:
        for mine, grad in zip(so_far, found, strict=True):
            if grad is not None:
                mine += grad
    return so_far


def climb_by_class(
    params: list[Tensor],
    grads: list[list[Tensor]],
    counts: list[float],
    noise_ratio: float,
    signs: list[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Turns each class's gradients into its perturbed weights: all norms in one pass, all perturbations in another.

    Args:
        params: T weights.
        grads: K lists of T gradients, overwritten.
        counts: K numbers of training samples.
        noise_ratio: Factor of all radii.
        signs: T factors: -1 where the loss is maximized, and its class's grows worse downhill.
        grad_scale: What the gradients are too large by.
        found_inf: Set when a gradient is not finite.

    Source: the published radius of CC-SAM, see :class:`ltsam_fast.CCSAM`.
    """
    norms = ops.grad_norm(
        [grad for one in grads for grad in one], groups=range(len(grads) * len(params)), per_group=True,
        found_inf=found_inf,
    ).double()  # fmt: skip
    inverse = 1.0 if grad_scale is None else 1 / grad_scale.double()
    norms = norms * inverse
    rare = torch.tensor([max(count, 2.0) - 1 for count in counts], dtype=torch.float64, device=norms.device)
    weight_norm = ops.grad_norm(params).double() + 1e-12
    size = sum(param.numel() for param in params)
    radius = noise_ratio * weight_norm.sqrt() * size**0.25 / math.sqrt(2) * rare**-0.25
    scales = torch.where(norms > 0, radius.repeat_interleave(len(params)) * norms**-1.5, torch.zeros_like(norms))
    factors = inverse * torch.tensor(signs, dtype=torch.float64, device=norms.device)
    ops.perturb_by_class_(params, grads, scales.view(len(grads), len(params)) * factors)
