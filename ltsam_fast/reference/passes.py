"""Passes that perturb, restore and update weights. Each writes all it changes of a tensor at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.reference.arithmetic import Tensors, combined, entry, gradient, number, of_group, skip, wide, write
from ltsam_fast.reference.draws import bits, normal, random_words, round_randomly


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    grads: Tensors,
    backups: Tensors | None,
    norm: Tensor,
    *,
    rho: Any,
    maximize: Any = False,
    adaptive: Any = False,
    eta: Any = 0.0,
    eps: Any = 1e-12,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    original_params: Sequence[Tensor] | None = None,
    means: Tensors | None = None,
    combination: Tensor | None = None,
    decay: Any = 0.0,
    mask: Tensors | None = None,
    probability: Any = 1.0,
    stochastic: bool = False,
    seed: int | None = None,
    step: int = 0,
    skipped: Tensor | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """backup = w;  w = w + (T d) rho / (|d| + eps),  T = (|w| + eta)^2 when adaptive, else 1;  d = g, or c0 g + c1 mean.

    ``numbers``: positions of the tensors for random numbers, where these lists are a part of longer ones.
    """
    active = not skip(found_inf) and bool(norm.isfinite())
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        at = partial(of_group, groups=groups, index=i)
        mean, masked = entry(means, i), entry(mask, i)
        source = (w if original_params is None else original_params[i]).clone()
        old, new, new_mean = wide(source), source, None
        size = number(norm, w)
        inverse = 1 / number(grad_scale, w) if grad_scale is not None else torch.ones_like(size)
        scale = (-at(rho) if at(maximize) else at(rho)) * inverse / (size * inverse + at(eps))
        if active and bool(scale.isfinite()):
            d = combined(w, g, mean, torch.tensor([1.0, 0.0]) if combination is None else combination)
            t = (old.abs() + at(eta)).square() if at(adaptive) else 1
            perturbed = old + t * d * scale
            moves = torch.ones_like(w, dtype=torch.bool) if masked is None else ~bits(masked, w)
            if seed is not None:
                words = random_words(w, numbers[i] if numbers else i, seed, step, skipped)
                moves &= (words & 0xFFFF) < int(at(probability) * 65536 + 0.5)
                perturbed = round_randomly(perturbed, w.dtype, words) if stochastic else perturbed
            new = torch.where(moves, perturbed, old)
            if mean is not None:
                new_mean = at(decay) * wide(mean) + (1 - at(decay)) * (gradient(w, g) * inverse)
        write((entry(backups, i), source), (w, new), (mean, new_mean))


@torch.no_grad()
def gaussian_perturb_(
    params: Sequence[Tensor],
    backups: Tensors | None,
    *,
    amplitude: Any,
    sigma: Any = 1 / 3,
    clip: Any = 1.0,
    seed: int = 0,
    step: int = 0,
    skipped: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    original_params: Sequence[Tensor] | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """backup = w;  w = w + amplitude clamp(sigma z, -clip, clip),  z standard normal.  ``numbers``: as for perturb_."""
    for i, w in enumerate(params):
        at = partial(of_group, groups=groups, index=i)
        source = (w if original_params is None else original_params[i]).clone()
        old = wide(source)
        words = random_words(w, numbers[i] if numbers else i, seed, step, skipped, offsets[i] if offsets else 0)
        limit = torch.tensor(at(clip), dtype=old.dtype, device=w.device)  # torch takes no number beyond the dtype's
        new = old + at(amplitude) * (at(sigma) * normal(words).to(old.dtype)).clamp(-limit, limit)
        write((entry(backups, i), source), (w, new))


@torch.no_grad()
def perturb_by_class_(params: Sequence[Tensor], class_grads: Sequence[Sequence[Tensor]], scales: Tensor) -> None:
    """g_k = w + s_k g_k."""
    scales = scales.reshape(len(class_grads), -1).expand(-1, len(params))
    for k, grads in enumerate(class_grads):
        for i, (w, g) in enumerate(zip(params, grads, strict=True)):
            write((g, wide(w) + scales[k, i].to(wide(w)) * wide(g)))


@torch.no_grad()
def combine_(
    out: Sequence[Tensor], grads: Tensors, kept_grads: Tensors, combination: Tensor, *, found_inf: Tensor | None = None
) -> None:
    """out = c0 g + c1 g'."""
    if skip(found_inf):
        return
    for i, one in enumerate(out):
        write((one, combined(one, grads[i], kept_grads[i], combination)))


@torch.no_grad()
def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w = backup, bit for bit."""
    write(*zip(params, backups, strict=True))


def direction(
    w: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    maximize: bool,
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    combination: Tensor | None,
) -> Tensor:
    """The summed, or combined, gradient: unscaled, clipped to max_norm, turned around to maximize."""
    d = combined(w, *gradients, combination)
    inverse = 1 / number(grad_scale, w) if grad_scale is not None else 1.0
    d = d * inverse
    if max_norm > 0 and norm is not None:
        d = d * (max_norm / (number(norm, w) * inverse + 1e-6)).clamp(max=1.0)
    return -d if maximize else d


def _decayed(d: Tensor, weight_decay: float, old: Tensor) -> Tensor:
    """Without decay the weights do not count, be they infinite."""
    decay = torch.tensor(weight_decay, dtype=old.dtype)
    return d + decay.to(old.device) * old if decay else d


def decoupled_step(
    w: Tensor,
    lr: float,
    gradients: tuple[Tensor | None, Tensor | None],
    maximize: bool,
    grad_scale: Tensor | None,
    combination: Tensor | None,
) -> Tensor | float:
    """The step that the base optimizer does not see: lr (c2 g + c3 g'), turned around to maximize."""
    if combination is None:
        return 0.0
    inverse = 1 / number(grad_scale, w) if grad_scale is not None else 1.0
    return lr * (combined(w, *gradients, combination, first=2) * (-inverse if maximize else inverse))


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    *,
    lr: Any,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: Any = False,
    maximize: Any = False,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    momentum_buffers: Tensors | None = None,
    steps: Tensors | None = None,
    max_norm: Any = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch.optim.SGD on the restored weights with the gradient g + g'."""
    for i, w in enumerate(params):
        at = partial(of_group, groups=groups, index=i)
        source, m, step = w if backups is None else backups[i], entry(momentum_buffers, i), entry(steps, i)
        if skip(found_inf):
            write((w, source))
            continue
        old, buffer = wide(source), None  # type: ignore[arg-type]
        d = direction(w, (grads[i], entry(kept_grads, i)), at(maximize), at(max_norm), norm, grad_scale, combination)
        d = _decayed(d, at(weight_decay), old)
        if at(momentum) != 0 and m is not None:
            first = step is not None and bool(step == 0)
            buffer = d if first else at(momentum) * wide(m) + (1 - at(dampening)) * d
            d = d + at(momentum) * buffer if at(nesterov) else buffer
        apart = decoupled_step(w, at(lr), (grads[i], entry(kept_grads, i)), at(maximize), grad_scale, combination)
        write((m, buffer), (w, old - at(lr) * d - apart), (step, None if step is None else step + 1))


@torch.no_grad()
def adam_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Any,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled: Any = False,
    maximize: Any = False,
    max_exp_avg_sqs: Tensors | None = None,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    max_norm: Any = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch.optim.Adam, or AdamW when decoupled, on the restored weights with the gradient g + g'."""
    for i, w in enumerate(params):
        at = partial(of_group, groups=groups, index=i)
        source, vmax = w if backups is None else backups[i], entry(max_exp_avg_sqs, i)
        if skip(found_inf):
            write((w, source))
            continue
        m, v, t = wide(exp_avgs[i]), wide(exp_avg_sqs[i]), float(steps[i]) + 1  # type: ignore[arg-type]
        old = wide(source)  # type: ignore[arg-type]
        d = direction(w, (grads[i], entry(kept_grads, i)), at(maximize), at(max_norm), norm, grad_scale, combination)
        if at(decoupled):
            old = old * (1 - at(lr) * at(weight_decay))
        else:
            d = _decayed(d, at(weight_decay), old)
        mean = m + (1 - at(beta1)) * (d - m)
        square = at(beta2) * v + (1 - at(beta2)) * d * d
        largest = square if vmax is None else torch.maximum(wide(vmax), square)
        apart = decoupled_step(w, at(lr), (grads[i], entry(kept_grads, i)), at(maximize), grad_scale, combination)
        move = at(lr) / (1 - at(beta1) ** t) * mean / (largest.sqrt() / (1 - at(beta2) ** t) ** 0.5 + at(eps))
        write(
            (exp_avgs[i], mean), (exp_avg_sqs[i], square), (vmax, largest), (w, old - move - apart),
            (steps[i], steps[i] + 1),  # type: ignore[operator]
        )  # fmt: skip
