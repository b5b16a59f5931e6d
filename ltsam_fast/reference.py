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


def _combined(
    like: Tensor, g: Tensor | None, other: Tensor | None, combination: Tensor | None, first: int = 0
) -> Tensor:
    """c[first] g + c[first + 1] other; without a combination the sum."""
    if combination is None:
        return _gradient(like, g, other)
    c = combination.to(like.device, _wide(like).dtype)
    zeros = torch.zeros_like(_wide(like))
    parts = [zeros if one is None else _wide(one) for one in (g, other)]
    return c[first] * parts[0] + c[first + 1] * parts[1]


def _number(signal: Tensor, like: Tensor) -> Tensor:
    return signal.detach().reshape(()).to(like.device, _wide(like).dtype)


def _skip(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf != 0)


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
        other = _entry(kept_grads, i)
        like = other if g is None else g
        if like is None:
            continue
        t = _combined(like, g, other, combination)
        if _value(adaptive, groups, i):
            t = (_wide(params[i]).abs() + _value(eta, groups, i)) * t  # type: ignore[index, arg-type]
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
        g, h = _wide(g), _wide(h)
        sums += torch.stack([(g * g).sum(), (h * h).sum(), (g * h).sum()]).to(sums)
    return sums.to(torch.float64 if exact else torch.float32)


def class_grad_norms(
    class_grads: Sequence[Tensors], params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0
) -> Tensor:
    """The norm of each of K gradients."""
    norms = [grad_norm(grads, params, adaptive=adaptive, eta=eta) for grads in class_grads]
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float32)


def _numbers(like: Tensor) -> Tensor:
    """The number of each element in the order of memory."""
    numbers = torch.empty_like(like, dtype=torch.int64)
    numbers.as_strided((numbers.numel(),), (1,)).copy_(torch.arange(numbers.numel()))
    return numbers


def _bits(bitmap: Tensor, like: Tensor) -> Tensor:
    """A map of bits as booleans of a tensor's shape."""
    numbers = _numbers(like)
    return (bitmap[numbers // 8] >> (numbers % 8).to(torch.uint8)) & 1 == 1


def _random_words(like: Tensor, number: int, seed: int, step: int, skipped: Tensor | None, offset: int = 0) -> Tensor:
    """32 random bits for each element of a tensor, as int64."""
    return _philox(_numbers(like) + offset, number, seed, step if skipped is None else step - int(skipped))


def _philox(elements: Tensor, number: int | Tensor, seed: int, step: int | Tensor) -> Tensor:
    """32 random bits for each element, as int64: Philox-4x32-10, Salmon et al. 2011. A call serves four elements."""
    low = 0xFFFFFFFF
    quad = elements // 4
    a, b, c, d = quad & low, quad >> 32, quad * 0 + number, (quad * 0 + step) & low
    key0, key1 = int(seed) & low, int(seed) >> 32
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c  # of the 64 bits that wrap around, all are right
        a, b, c, d = (y >> 32) & low ^ b ^ key0, y & low, (x >> 32) & low ^ d ^ key1, x & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([a, b, c, d]).gather(0, (elements % 4)[None])[0]


def _log(x: Tensor) -> Tensor:
    """ln x in fp32, Cephes' polynomial."""
    u = x.view(torch.int32) - 0x3F3504F3
    e = (u >> 23).float()
    f = ((u & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    square = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + c
    return f + (p * f * square - e * 2.12194440e-4 - 0.5 * square) + e * 0.693359375


_CENTRAL = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
            0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
         1.00167406, 2.83297682)  # fmt: skip


def _normal(words: Tensor) -> Tensor:
    """Standard normal numbers, fp32, by the inverse distribution function: Giles 2011."""
    p = ((words & 0x7FFFFFFF).float() + 0.5) * 2.0**-32
    x, w = 1 - 2 * p, -_log(4 * p * (1 - p))
    central = w < 5
    root = w.double().sqrt().float()  # in fp32 torch's own root may be a bit off
    t = torch.where(central, w - 2.5, root - 3)
    q = torch.zeros_like(t)
    for near, far in zip(_CENTRAL, _TAIL, strict=True):
        q = q * t + torch.where(central, torch.full_like(q, near), torch.full_like(q, far))
    z = 1.41421356 * (q * x)
    return torch.where(words >> 31 != 0, -z, z)


def _round_randomly(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Rounded to a 16-bit dtype, up or down with the chances that keep the mean."""
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    digits, least = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    probability = (words >> 16).float() * 2.0**-16
    if dtype == torch.float16:
        probability = (probability * 2**13).floor() * 2.0**-13
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least)
    place = torch.ldexp(torch.ones_like(x), exponent - (digits - 1))
    return torch.where(x.isfinite(), (x / place + probability).floor() * place, x)


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
) -> None:
    """backup = w;  w = w + (T d) rho / (|d| + eps),  T = (|w| + eta)^2 when adaptive, else 1;  d = g, or c0 g + c1 mean."""
    active = not _skip(found_inf) and bool(norm.isfinite())
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        backup, mean, still = _entry(backups, i), _entry(means, i), _entry(mask, i)
        source = w if original_params is None else original_params[i]
        if backup is not None:
            backup.copy_(source)
        old = _wide(source).clone()
        w.copy_(source)
        size = _number(norm, w)
        inverse = 1 / _number(grad_scale, w) if grad_scale is not None else torch.ones_like(size)
        scale = (-at(rho) if at(maximize) else at(rho)) * inverse / (size * inverse + at(eps))
        if not active or not bool(scale.isfinite()):
            continue
        d = _gradient(w, g) if combination is None else _combined(w, g, mean, combination)
        t = (old.abs() + at(eta)).square() if at(adaptive) else 1
        perturbed = old + t * d * scale
        moves = torch.ones_like(w, dtype=torch.bool) if still is None else ~_bits(still, w)
        if seed is not None:
            words = _random_words(w, i, seed, step, skipped)
            moves &= (words & 0xFFFF) < int(at(probability) * 65536 + 0.5)
            perturbed = _round_randomly(perturbed, w.dtype, words) if stochastic else perturbed
        w.copy_(torch.where(moves, perturbed, old))
        if mean is not None:
            mean.copy_(at(decay) * _wide(mean) + (1 - at(decay)) * (_gradient(w, g) * inverse))


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
) -> None:
    """backup = w;  w = w + amplitude clamp(sigma z, -clip, clip),  z standard normal."""
    for i, w in enumerate(params):
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        source, backup = w if original_params is None else original_params[i], _entry(backups, i)
        if backup is not None:
            backup.copy_(source)
        old = _wide(source).clone()
        z = _normal(_random_words(w, i, seed, step, skipped, offsets[i] if offsets else 0)).to(old.dtype)
        w.copy_(old + at(amplitude) * (at(sigma) * z).clamp(-at(clip), at(clip)))


@torch.no_grad()
def perturb_by_class_(params: Sequence[Tensor], class_grads: Sequence[Any], scales: Tensor) -> None:
    """g_k = w + s_k g_k. Lists may also be flat: T weights, T gradients, T scales."""
    if class_grads and isinstance(class_grads[0], Tensor):
        class_grads, scales = [class_grads], scales[None]
    scales = scales.reshape(len(class_grads), -1).expand(-1, len(params))
    for k, grads in enumerate(class_grads):
        for i, (w, g) in enumerate(zip(params, grads, strict=True)):
            g.copy_(_wide(w) + scales[k, i].to(_wide(w)) * _wide(g))


@torch.no_grad()
def combine_(
    out: Sequence[Tensor], grads: Tensors, kept_grads: Tensors, combination: Tensor, *, found_inf: Tensor | None = None
) -> None:
    """out = c0 g + c1 g'."""
    if _skip(found_inf):
        return
    for i, one in enumerate(out):
        one.copy_(_combined(one, grads[i], kept_grads[i], combination))


@torch.no_grad()
def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w = backup, bit for bit."""
    for w, backup in zip(params, backups, strict=True):
        w.copy_(backup)


def _direction(
    w: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    maximize: bool,
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    combination: Tensor | None,
) -> Tensor:
    """The summed, or mixed, gradient: unscaled, clipped to max_norm, turned around to maximize."""
    d = _combined(w, *gradients, combination)
    inverse = 1 / _number(grad_scale, w) if grad_scale is not None else 1.0
    d = d * inverse
    if max_norm > 0 and norm is not None:
        d = d * (max_norm / (_number(norm, w) * inverse + 1e-6)).clamp(max=1.0)
    return -d if maximize else d


def _decoupled_step(
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
    inverse = 1 / _number(grad_scale, w) if grad_scale is not None else 1.0
    return lr * _combined(w, *gradients, combination, first=2) * (-inverse if maximize else inverse)


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
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        source, m, step = _entry(backups, i), _entry(momentum_buffers, i), _entry(steps, i)
        w.copy_(w if source is None else source)
        if _skip(found_inf):
            continue
        d = _direction(w, (grads[i], _entry(kept_grads, i)), at(maximize), at(max_norm), norm, grad_scale, combination)
        d = d + at(weight_decay) * _wide(w)
        if at(momentum) != 0 and m is not None:
            first = step is not None and bool(step == 0)
            buffer = d if first else at(momentum) * _wide(m) + (1 - at(dampening)) * d
            m.copy_(buffer)
            d = d + at(momentum) * buffer if at(nesterov) else buffer
        decoupled_step = _decoupled_step(
            w, at(lr), (grads[i], _entry(kept_grads, i)), at(maximize), grad_scale, combination
        )
        w.copy_(_wide(w) - at(lr) * d - decoupled_step)
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
        at = lambda value, i=i: _value(value, groups, i)  # noqa: E731
        source, m, v, vmax = _entry(backups, i), exp_avgs[i], exp_avg_sqs[i], _entry(max_exp_avg_sqs, i)
        w.copy_(w if source is None else source)
        if _skip(found_inf):
            continue
        t = float(steps[i]) + 1
        old = _wide(w)
        d = _direction(w, (grads[i], _entry(kept_grads, i)), at(maximize), at(max_norm), norm, grad_scale, combination)
        if at(decoupled):
            old = old * (1 - at(lr) * at(weight_decay))
        else:
            d = d + at(weight_decay) * old
        mean = _wide(m) + (1 - at(beta1)) * (d - _wide(m))
        square = at(beta2) * _wide(v) + (1 - at(beta2)) * d * d
        largest = square if vmax is None else torch.maximum(_wide(vmax), square)
        decoupled_step = _decoupled_step(
            w, at(lr), (grads[i], _entry(kept_grads, i)), at(maximize), grad_scale, combination
        )
        move = at(lr) / (1 - at(beta1) ** t) * mean / (largest.sqrt() / (1 - at(beta2) ** t) ** 0.5 + at(eps))
        w.copy_(old - move - decoupled_step)
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
    slope = (z.softmax(1) - _one_hot(targets, z.shape[1])) / max(len(z), 1)
    return losses, (u[targets, None] * slope).to(logits.dtype), (v[targets, None] * slope).to(logits.dtype)


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """torch's one_hot without its look at the targets, which vmap forbids."""
    return (targets[:, None] == torch.arange(classes, device=targets.device)).long()


def _noise(rows: int, classes: int, seed: int, draw: Tensor) -> Tensor:
    """|e| of GCL, (B, C): the third of a standard normal number, at most 1."""
    row, element = (torch.arange(size, device=draw.device) for size in (rows, classes))
    elements, number = torch.broadcast_tensors(element, row[:, None] & 0xFFFFFF)  # a number has 24 bits
    return (_normal(_philox(elements, number, seed, draw.reshape(()))).abs() * (1 / 3)).clamp(max=1)


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
    a = _wide(logits)
    if spread is not None and draw is not None:
        a = a - spread.to(a) * _noise(len(a), a.shape[1], seed, draw.to(a.device)).to(a)
    if scale is not None:
        a = a * scale.to(a)
    if shift is not None:
        a = a + shift.to(a)
    if margin is not None:
        a = a - _one_hot(targets, a.shape[1]) * margin.to(a)
    return a


def _missed(nll: Tensor) -> Tensor:
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
) -> Tensor:
    """loss = sum_c q_c (-log_softmax(a)_c) of a = scale (z - spread |e|) + shift - margin onehot(y), times (1 - p)^gamma."""
    a = _adjusted_logits(logits, targets, scale, shift, margin, spread, draw, seed)
    nlls = -a.log_softmax(1)
    nll = nlls.gather(1, targets[:, None])[:, 0]
    weight = a.new_ones(a.shape[1]) if weight is None else weight.to(a)
    losses = (1 - label_smoothing) * weight[targets] * nll
    if label_smoothing:
        losses = losses + label_smoothing / a.shape[1] * (nlls * weight).sum(1)
    if gamma:
        factor = _missed(nll) ** gamma
        losses = losses * (factor.detach() if detach else factor)
    return losses


def _hit(nll: Tensor, weight: Tensor, label_smoothing: float, gamma: float, detach: bool) -> Tensor:
    """The label's part of the loss's derivative by its cross entropy."""
    hit = (1 - label_smoothing) * weight
    if gamma and detach:
        hit = hit * (_missed(nll) ** gamma).detach()
    elif gamma:
        missed = _missed(nll)
        hit = hit * missed**gamma * (1 + gamma * torch.exp(-nll) * nll / missed)
    return hit


def _losses_and_state(logits: Tensor, targets: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What a native forward leaves: losses (B,) and, for the backward, (3, B): peak, 1 / sum, hit."""
    losses = adjusted_cross_entropy(logits, targets, **arguments)
    shaping = {name: arguments[name] for name in ("scale", "shift", "margin", "spread", "draw", "seed")}
    a = _adjusted_logits(logits, targets, **shaping)
    peak = a.amax(1)
    inverse_sum = 1 / torch.exp(a - peak[:, None]).sum(1)
    nll = -a.log_softmax(1).gather(1, targets[:, None])[:, 0]
    weight = a.new_ones(a.shape[1]) if arguments["weight"] is None else arguments["weight"].to(a)
    hit = _hit(nll, weight[targets], *(arguments[name] for name in ("label_smoothing", "gamma", "detach")))
    return losses, torch.stack([peak, inverse_sum, hit])


def _cross_entropy_gradient(
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
    q = hit[:, None] * _one_hot(targets, a.shape[1]) + label_smoothing / a.shape[1] * weight
    slope = q.sum(1, keepdim=True) * log_p.exp() - q
    if scale is not None:
        slope = slope * scale.to(a)
    return (cotangent.to(a)[:, None] * slope).to(logits.dtype)
