"""The methods once more, slowly and in double precision: autograd.grad by hand, nothing of ltsam_fast.

A method of the u/v algebra takes, with per-class weights u and v of the samples' losses,

    g_a(w) = grad (1/B) sum_j a[y_j] l_j(w)
    eps    = rho T g_v(w) / (|T' g_v(w)| + norm_eps)        T = (|w| + eta)^2, T' = |w| + eta if adaptive, else 1
    w     <- base_step(w, g_u(w) + g_v(w + eps))

where norms run over all groups that are perturbed.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES, CLASSES, BATCH, STEPS = 6, 4, 16, 25
COUNTS = [50, 20, 5, 2]


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 17), nn.Tanh(), nn.Linear(17, 9), nn.Softplus(), nn.Linear(9, CLASSES)
    return nn.Sequential(*layers).double().to(dtype)


def batches(dtype=torch.float64, steps=STEPS, size=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, FEATURES, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def flat(model_or_params):
    """All weights as one vector in double precision."""
    params = model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params
    return torch.cat([param.detach().double().flatten() for param in params])


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def sam_weights():
    """Class weights u and v: no clean part, all samples alike in the sharp one."""
    return torch.zeros(CLASSES, dtype=torch.float64), torch.ones(CLASSES, dtype=torch.float64)


def focal_weights(counts, gamma, lam):
    """Class weights u and v of Focal-SAM."""
    v = torch.tensor([lam * math.pow(1 - n / sum(counts), gamma) for n in counts], dtype=torch.float64)
    return 1 - v, v


def step(groups, loss, labels, u, v, base, max_grad_norm=0.0):
    """One step. ``loss(number)`` gives the per-sample losses of pass 0, at w, and of pass 1, at w + eps.

    ``groups``: dicts with params, rho and maybe adaptive, eta, perturb, norm_eps. Returns the mean loss at w.
    """
    params = [param for group in groups for param in group["params"]]

    def gradients(per_sample, weights, retain=False):
        mean = (weights[labels] * per_sample).sum() / len(labels)
        return torch.autograd.grad(mean, params, retain_graph=retain, allow_unused=True)

    at_w = loss(0)
    clean = gradients(at_w, u, retain=True) if u.any() else [None] * len(params)
    sharp = dict(zip(params, gradients(at_w, v), strict=True))
    climbing = [
        (param, group, param.detach().abs() + group.get("eta", 0.0) if group.get("adaptive") else 1.0)
        for group in groups
        if group.get("perturb", True)
        for param in group["params"]
        if sharp[param] is not None
    ]
    norm = math.sqrt(sum((t * sharp[param]).square().sum().item() for param, _, t in climbing))
    old = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, group, t in climbing:
            param += t * t * sharp[param] * (group["rho"] / (norm + group.get("norm_eps", 1e-12)))
    there = gradients(loss(1), v)
    with torch.no_grad():
        for param, before, *parts in zip(params, old, clean, there, strict=True):
            param.copy_(before)
            present = [part for part in parts if part is not None]
            param.grad = sum(present) if present else None
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_([param for param in params if param.grad is not None], max_grad_norm)
    base.step()
    return at_w.mean().item()


def minimizing(options):
    """A base's options without ``maximize``, and the sign of the losses: to maximize f is to minimize -f."""
    return {name: value for name, value in options.items() if name != "maximize"}, -1 if options.get("maximize") else 1


def trajectory(groups_of, u, v, base, options, data, max_grad_norm=0.0):
    """The weights after running over ``data``, and the loss at w of each step."""
    model = network()
    groups = groups_of(model)
    options, sign = minimizing(options)
    optimizer = base([{name: g[name] for name in g if name in ("params", "lr")} for g in groups], **options)
    means = []
    for x, y in data:
        mean = step(groups, lambda _, x=x, y=y: sign * losses(model, x, y), y, u, v, optimizer, max_grad_norm)
        means.append(sign * mean)
    return flat(model), means


def softmax_regression(x, y, w, u, v, rho, lr, momentum, steps, adaptive=False):
    """Full-batch softmax regression in numpy: gradients and SGD with momentum written out."""
    buffer = np.zeros_like(w)
    one_hot = np.eye(w.shape[1])[y]

    def gradient(w, a):
        z = x @ w
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return x.T @ (a[y][:, None] * (p - one_hot)) / len(y)

    for _ in range(steps):
        sharp = gradient(w, v)
        t = np.abs(w) if adaptive else np.ones_like(w)
        climbed = w + rho * t * t * sharp / (np.sqrt(((t * sharp) ** 2).sum()) + 1e-12)
        direction = gradient(w, u) + gradient(climbed, v)
        buffer = momentum * buffer + direction
        w = w - lr * buffer
    return w
