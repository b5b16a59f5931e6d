"""The ops in plain PyTorch: their definition, short enough to check by eye, exact enough for fp64 tests.

Same names and arguments as :mod:`ltsam_fast.ops`, where they are documented. Sums are kept in fp32, and in fp64 for fp64
tensors. This is also the backend ``"torch"``, on which everything runs where nothing could be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()


def _entry(tensors: Tensors | None, index: int) -> Tensor | None:
    return None if tensors is None else tensors[index]


def _value(value: Any, groups: Sequence[int] | None, index: int) -> Any:
    """The hyperparameter of a tensor: one value for all, or one for each group."""
    if not isinstance(value, Sequence):
        return value
    return value[groups[index] if groups and len(value) > 1 else 0]


def _gradient(like: Tensor, *gradients: Tensor | None) -> Tensor:
    """The sum of the gradients that are there."""
    total = torch.zeros_like(_wide(like))
    for gradient in gradients:
        if gradient is not None:
            total = total + _wide(gradient)
    return total


def _number(signal: Tensor, like: Tensor) -> Tensor:
    return signal.detach().reshape(()).to(like.device, _wide(like).dtype)


def _skip(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf != 0)


@torch.no_grad()
def grad_norm(
    grads: Tensors,
    params: Tensors | None = None,
    *,
    extra: Tensors | None = None,
    adaptive: Any = False,
    eta: Any = 0.0,
    groups: Sequence[int] | None = None,
    per_group: bool = False,
    found_inf: Tensor | None = None,
) -> Tensor:
    """sqrt(sum (T g)^2),  T = |w| + eta when adaptive, else 1."""
    present = [g for g in (*grads, *(extra or ())) if g is not None]
    device = present[0].device if present else torch.device("cpu")
    exact = any(g.dtype == torch.float64 for g in present)
    rows = max((len(value) for value in (adaptive, eta) if isinstance(value, Sequence)), default=1)
    outputs = max(max(groups or (), default=-1) + 1, rows) if per_group else 1
    squares = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(outputs)]
    for i, g in enumerate(grads):
        other = _entry(extra, i)
        like = other if g is None else g
        if like is None:
            continue
        t = _gradient(like, g, other)
        if _value(adaptive, groups, i):
            t = (_wide(params[i]).abs() + _value(eta, groups, i)) * t  # type: ignore[index, arg-type]
        bucket = groups[i] if per_group else 0  # type: ignore[index]
        squares[bucket] = squares[bucket] + t.square().sum().double().to(device)
    norm = torch.stack(squares).sqrt().to(torch.float64 if exact else torch.float32)
    if found_inf is not None and not bool(norm.isfinite().all()):
        found_inf.fill_(1.0)
    return norm if per_group else norm[0]


def class_grad_norms(
    class_grads: Sequence[Tensors], params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0
) -> Tensor:
    """The norm of each of K gradients."""
    norms = [grad_norm(grads, params, adaptive=adaptive, eta=eta) for grads in class_grads]
    return torch.stack(norms) if norms else torch.zeros(0)


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    grads: Tensors,
    backups: Sequence[Tensor],
    norm: Tensor,
    *,
    rho: Any,
    adaptive: Any = False,
    eta: Any = 0.0,
    eps: Any = 1e-12,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """backup = w;  w = w + (T g) rho / (|g| + eps),  T = (|w| + eta)^2 when adaptive, else 1."""
    active = not _skip(found_inf) and bool(norm.isfinite())
    for i, (w, g, backup) in enumerate(zip(params, grads, backups, strict=True)):
        backup.copy_(w)
        if not active or g is None:
            continue
        size = _number(norm, w)
        inverse = 1 / _number(grad_scale, w) if grad_scale is not None else torch.ones_like(size)
        scale = _value(rho, groups, i) * inverse / (size * inverse + _value(eps, groups, i))
        if not bool(scale.isfinite()):
            continue
        t = (_wide(w).abs() + _value(eta, groups, i)).square() if _value(adaptive, groups, i) else 1
        w.copy_(_wide(w) + t * _wide(g) * scale)


@torch.no_grad()
def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w = backup, bit for bit."""
    for w, backup in zip(params, backups, strict=True):
        w.copy_(backup)


def _direction(
    w: Tensor,
    gradients: tuple[Tensor | None, ...],
    maximize: bool,
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The summed gradient: unscaled, clipped to max_norm, turned around to maximize."""
    d = _gradient(w, *gradients)
    inverse = 1 / _number(grad_scale, w) if grad_scale is not None else 1.0
    d = d * inverse
    if max_norm > 0 and norm is not None:
        d = d * (max_norm / (_number(norm, w) * inverse + 1e-6)).clamp(max=1.0)
    return -d if maximize else d


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
    extra: Tensors | None = None,
    momentum_buffers: Tensors | None = None,
    steps: Tensors | None = None,
    max_norm: Any = 0.0,
    norm: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch.optim.SGD on the restored weights with the gradient g + extra."""
    for i, w in enumerate(params):
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        source, m, step = _entry(backups, i), _entry(momentum_buffers, i), _entry(steps, i)
        w.copy_(w if source is None else source)
        if _skip(found_inf):
            continue
        d = _direction(w, (grads[i], _entry(extra, i)), at(maximize), at(max_norm), norm, grad_scale)
        d = d + at(weight_decay) * _wide(w)
        if at(momentum) != 0 and m is not None:
            first = step is not None and bool(step == 0)
            buffer = d if first else at(momentum) * _wide(m) + (1 - at(dampening)) * d
            m.copy_(buffer)
            d = d + at(momentum) * buffer if at(nesterov) else buffer
        w.copy_(_wide(w) - at(lr) * d)
        if step is not None:
            step += 1


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
    extra: Tensors | None = None,
    max_norm: Any = 0.0,
    norm: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch.optim.Adam, or AdamW when decoupled, on the restored weights with the gradient g + extra."""
    for i, w in enumerate(params):
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        source, m, v, vmax = _entry(backups, i), exp_avgs[i], exp_avg_sqs[i], _entry(max_exp_avg_sqs, i)
        w.copy_(w if source is None else source)
        if _skip(found_inf):
            continue
        t = float(steps[i]) + 1
        old = _wide(w)
        d = _direction(w, (grads[i], _entry(extra, i)), at(maximize), at(max_norm), norm, grad_scale)
        if at(decoupled):
            old = old * (1 - at(lr) * at(weight_decay))
        else:
            d = d + at(weight_decay) * old
        mean = _wide(m) + (1 - at(beta1)) * (d - _wide(m))
        square = at(beta2) * _wide(v) + (1 - at(beta2)) * d * d
        largest = square if vmax is None else torch.maximum(_wide(vmax), square)
        w.copy_(old - at(lr) / (1 - at(beta1) ** t) * mean / (largest.sqrt() / (1 - at(beta2) ** t) ** 0.5 + at(eps)))
        m.copy_(mean)
        v.copy_(square)
        if vmax is not None:
            vmax.copy_(largest)
        steps[i] += 1  # type: ignore[index]


def focal_weights(class_counts: Any, gamma: float = 1.0, lam: float = 0.5) -> Tensor:
    """v_c = lam (1 - pi_c)^gamma,  pi_c = n_c / n."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    return lam * (1 - counts / counts.sum()) ** gamma


@torch.no_grad()
def focal_cross_entropy(
    logits: Tensor, targets: Tensor, v: Tensor, u: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_j = logsumexp(z_j) - z_j[y_j];  grad_a = a[y_j] / B (softmax(z_j) - onehot(y_j)) for a in (u, v)."""
    z = _wide(logits)
    v = v.to(z)
    u = 1 - v if u is None else u.to(z)
    losses = torch.logsumexp(z, 1) - z.gather(1, targets[:, None])[:, 0]
    slope = (z.softmax(1) - torch.nn.functional.one_hot(targets, z.shape[1])) / max(len(z), 1)
    return losses, (u[targets, None] * slope).to(logits.dtype), (v[targets, None] * slope).to(logits.dtype)
