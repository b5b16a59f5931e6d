"""Cross entropies, their gradients, and Focal-SAM's class weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltsam_fast.reference.arithmetic import wide
from ltsam_fast.reference.draws import noise


def focal_weights(class_counts: Any, gamma: float | Tensor = 1.0, lam: float = 0.5) -> Tensor:
    """v_c = lam (1 - pi_c)^gamma,  pi_c = n_c / n;  gamma is a number or, shape (C,), each class's own."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    return lam * (1 - counts / counts.sum()) ** gamma


@torch.no_grad()
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
    """loss_j as of adjusted_cross_entropy;  grad_a = a[y_j] / B dloss_j / dz_j for a in (u, v)."""
    adjustment: dict[str, Any] = {
        "scale": scale, "shift": shift, "margin": margin, "weight": weight, "label_smoothing": label_smoothing,
        "gamma": gamma, "detach": detach, "spread": None, "draw": None, "seed": 0,
    }  # fmt: skip
    losses, _ = losses_and_state(logits, targets, **adjustment)
    v = v.to(losses)
    grads = [
        cross_entropy_gradient(a[targets] / max(len(losses), 1), logits, targets, **adjustment)
        for a in (1 - v if u is None else u.to(losses), v)
    ]
    return losses, grads[0], grads[1]


def one_hot(targets: Tensor, classes: int) -> Tensor:
    """torch's one_hot without its look at the targets, which vmap forbids."""
    return (targets[:, None] == torch.arange(classes, device=targets.device)).long()


def _adjusted_logits(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    margin: Tensor | None,
    spread: Tensor | None,
    draw: Tensor | None,
    seed: int,
) -> Tensor:
    a = wide(logits)
    if spread is not None and draw is not None:
        a = a - spread.to(a) * noise(len(a), a.shape[1], seed, draw.to(a.device)).to(a)
    if scale is not None:
        a = a * scale.to(a)
    if shift is not None:
        a = a + shift.to(a)
    if margin is not None:
        a = a - one_hot(targets, a.shape[1]) * margin.to(a)
    return a


def miss(nll: Tensor) -> Tensor:
    """1 - p of the label; never quite zero, for its power below one has no derivative there."""
    return -torch.expm1(-nll).clamp(max=-torch.finfo(nll.dtype).tiny)


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
    """loss = sum_c q_c (-log_softmax(a)_c) of a = scale (z - spread |e|) + shift - margin onehot(y), times (1 - p)^gamma."""
    a = _adjusted_logits(logits, targets, scale, shift, margin, spread, draw, seed)
    losses = _losses(a, targets, weight, label_smoothing, gamma, detach)[0]
    return reduced(losses, targets, None if weight is None else weight.to(a), reduction)[0]


def reduced(losses: Tensor, targets: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor | int]:
    """The losses, their sum or their mean, and what the sum was divided by."""
    if reduction == "none":
        return losses, 1
    if reduction == "sum":
        return losses.sum(), 1
    if weight is None:
        return losses.mean(), len(losses)
    divisor = weight[targets].sum()
    return losses.sum() / divisor, divisor


def _losses(
    a: Tensor, targets: Tensor, weight: Tensor | None, label_smoothing: float, gamma: float, detach: bool
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of adjusted logits, and their hit, by which the label enters the derivative."""
    nlls = -a.log_softmax(1)
    nll = nlls.gather(1, targets[:, None])[:, 0]
    weight = a.new_ones(a.shape[1]) if weight is None else weight.to(a)
    losses = (1 - label_smoothing) * weight[targets] * nll
    if label_smoothing:
        losses = losses + label_smoothing / a.shape[1] * (nlls * weight).sum(1)
    if gamma:
        factor = miss(nll) ** gamma
        losses = losses * (factor.detach() if detach else factor)
    return losses, _hit(nll, weight[targets], label_smoothing, gamma, detach)


def _hit(nll: Tensor, weight: Tensor, label_smoothing: float, gamma: float, detach: bool) -> Tensor:
    """The label's part of the loss's derivative by its cross entropy."""
    hit = (1 - label_smoothing) * weight
    if gamma and detach:
        hit = hit * (miss(nll) ** gamma).detach()
    elif gamma:
        missed = miss(nll)
        hit = hit * missed**gamma * (1 + gamma * torch.exp(-nll) * nll / missed)
    return hit


def losses_and_state(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    detach: bool,
    spread: Tensor | None,
    draw: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """What a forward leaves: losses (B,) and, for the backward, (3, B): peak, 1 / sum, hit."""
    a = _adjusted_logits(logits, targets, scale, shift, margin, spread, draw, seed)
    losses, hit = _losses(a, targets, weight, label_smoothing, gamma, detach)
    peak = a.amax(1)
    return losses, torch.stack([peak, 1 / torch.exp(a - peak[:, None]).sum(1), hit])


def cross_entropy_gradient(
    cotangent: Tensor,
    logits: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    detach: bool,
    spread: Tensor | None,
    draw: Tensor | None,
    seed: int,
) -> Tensor:
    """cotangent scale (sum_c q_c softmax(a) - q), q = hit onehot(y) + smoothing / C weight; can be differentiated."""
    a = _adjusted_logits(logits, targets, scale, shift, margin, spread, draw, seed)
    weight = a.new_ones(a.shape[1]) if weight is None else weight.to(a)
    log_p = a.log_softmax(1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    hit = _hit(nll, weight[targets], label_smoothing, gamma, detach)
    q = hit[:, None] * one_hot(targets, a.shape[1]) + label_smoothing / a.shape[1] * weight
    slope = q.sum(1, keepdim=True) * log_p.exp() - q
    if scale is not None:
        slope = slope * scale.to(a)
    return (cotangent.to(a)[:, None] * slope).to(logits.dtype)
