"""The methods in double precision, by autograd.grad alone: nothing of ltsam_fast. And the problem that most tests solve.

A method is called ``method(model, groups, data, base, options, **own)`` and returns flat(model) after ``data`` and the mean
loss at w of each step:

    model    double precision, samples independent of each other (no batch norm), changed in place
    groups   dicts with params of the model, rho and maybe adaptive, eta, perturb, norm_eps; the rest is the base's
    data     pairs (x, y)
    base     a class of torch.optim, made with ``options``; it steps with .grad set by hand
    own      the method's keywords, and for all of them
               schedule       step -> factor of each group's initial learning rate
               max_grad_norm  clips the direction
               loss           (model, x, y, perturbed) -> losses (B,), in which a parameter may be missing

The docstrings give the direction, which is the gradient that the base optimizer gets. In them

    g(w)    gradient of the batch's mean loss; g is the one at w
    g_a(w)  gradient of (1/B) sum_j a_j l_j(w)
    eps(g)  rho T g / (|T' g| + norm_eps), T = (|w| + eta)^2 and T' = |w| + eta if adaptive, else 1

Vectors are flat: all parameters behind each other in the order of the groups. Those of a group with perturb=False have
eps = 0 and are outside the norm.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES, CLASSES, BATCH, STEPS = 6, 4, 16, 25
COUNTS = [50, 20, 5, 2]
PERTURBATION = ("rho", "adaptive", "eta", "perturb", "norm_eps")
"""What a group has for the method; the rest is for the base optimizer."""


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


class Problem:
    """The weights, and one step's batch ``x``, ``y``, number ``t`` and loss at w; ``state`` lives through all steps."""

    def __init__(self, model, groups, base, options, loss=None):
        self.model, self.groups, self.state = model, [{**g, "params": list(g["params"])} for g in groups], {}
        self.loss_of = loss or (lambda model, x, y, perturbed: losses(model, x, y))
        self.params = [param for group in self.groups for param in group["params"]]
        self.sizes = [param.numel() for param in self.params]
        bases = [{name: g[name] for name in g if name not in PERTURBATION} for g in self.groups]
        # To maximize f is to minimize -f.
        self.sign = -1 if options.get("maximize") else 1
        self.base = base(bases, **{name: value for name, value in options.items() if name != "maximize"})
        self.first_lr = self.lr
        self.rho = self.option("rho", 0.0)
        self.perturbed = self.option("perturb", True)

    def spread(self, values):
        """One value per group as a vector."""
        parts = [torch.full_like(p, value) for g, value in zip(self.groups, values, strict=True) for p in g["params"]]
        return flat(parts)

    def spread_tensors(self, values):
        """One value per tensor as a vector."""
        return flat([torch.full_like(param, value) for param, value in zip(self.params, values, strict=True)])

    def option(self, name, default):
        return self.spread([group.get(name, default) for group in self.groups])

    @property
    def lr(self):
        return self.spread([group["lr"] for group in self.base.param_groups])

    def assign(self, vector):
        with torch.no_grad():
            for param, part in zip(self.params, vector.split(self.sizes), strict=True):
                param.copy_(part.view_as(param))

    def at(self, eps, function):
        """``function(perturbed=True)`` at w + eps."""
        before = flat(self.params)
        self.assign(before + eps)
        result = function(perturbed=True)
        self.assign(before)
        return result

    def losses(self, perturbed=False):
        with torch.no_grad():
            return self.sign * self.loss_of(self.model, self.x, self.y, perturbed)

    def begin(self, t, x, y):
        self.t, self.x, self.y, self.kept = t, x, y, [False] * len(self.params)
        self.loss, self.after = self.losses().mean().item(), 0.0

    def gradient(self, a=None, eps=None, keep=False):
        """Gradient of sum_j a_j l_j at w + eps; without ``a`` of the mean loss.

        A parameter is stepped if the step's last gradient or one with ``keep`` depends on it.
        """

        def compute(perturbed=False):
            per_sample = self.sign * self.loss_of(self.model, self.x, self.y, perturbed)
            total = (per_sample / len(self.y) if a is None else a * per_sample).sum()
            parts = dict.fromkeys(self.params)
            wanted = [param for param in self.params if param.requires_grad]
            parts.update(zip(wanted, torch.autograd.grad(total, wanted, allow_unused=True), strict=True))
            self.used = [parts[param] is not None for param in self.params]
            return flat([torch.zeros_like(param) if part is None else part for param, part in parts.items()])

        result = compute() if eps is None else self.at(eps, compute)
        self.kept = [one or (keep and used) for one, used in zip(self.kept, self.used, strict=True)]
        return result

    def ones(self):
        return torch.ones(len(self.y), dtype=torch.float64)

    def eps(self, g, rho=None, within=1.0):
        """eps(g) for the coordinates ``within``, which the norm runs over."""
        adaptive = self.option("adaptive", False).bool()
        t = torch.where(adaptive, flat(self.params).abs() + self.option("eta", 0.0), 1.0) * self.perturbed * within
        return (self.rho if rho is None else rho) * t * t * g / ((t * g).norm() + self.option("norm_eps", 1e-12))

    def moving(self):
        """The parameters that are perturbed."""
        return [param for group in self.groups if group.get("perturb", True) for param in group["params"]]

    def has(self):
        """1 where the last gradient has something, 0 for parameters that it lacks."""
        return self.spread_tensors([float(one) for one in self.used])

    def drawn(self, draw, lacking=True):
        """``draw(t, params)`` as a vector: a tensor or a number for each parameter that is perturbed.

        ``lacking=False`` leaves those out that the last gradient lacks.
        """
        used = dict(zip(self.params, self.used, strict=True)) if not lacking else {}
        moving = [param for param in self.moving() if used.get(param, True)]
        found = dict(zip(moving, draw(self.t, moving), strict=True))
        return flat([torch.zeros_like(param) + found.get(param, 0.0) for param in self.params])

    def tail(self, class_counts, eta):
        """1 for samples of a class with n_c < eta, else 0; divided by B."""
        return (torch.tensor(class_counts) < eta).double()[self.y] / len(self.y)

    def uv(self, u, v, rho=None):
        """g_u(w) + g_v(w + eps(g_v))."""
        return self.gradient(u, keep=True) + self.gradient(v, self.eps(self.gradient(v), rho))


def method(direction):
    """A method from the direction of its steps. It may set ``after``, which is added to the weights after the base."""

    @functools.wraps(direction)
    def run(model, groups, data, base, options, *, schedule=None, max_grad_norm=0.0, loss=None, **own):
        problem, means = Problem(model, groups, base, options, loss), []
        rates = [group["lr"] for group in problem.base.param_groups]
        for t, (x, y) in enumerate(data):
            for group, rate in zip(problem.base.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(t) if schedule else rate
            problem.begin(t, x, y)
            parts = direction(problem, **own).split(problem.sizes)
            for param, part, used, kept in zip(problem.params, parts, problem.used, problem.kept, strict=True):
                param.grad = part.view_as(param).clone() if used or kept else None
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(problem.params, max_grad_norm)
            problem.base.step()
            problem.assign(flat(problem.params) + problem.after)
            means.append(problem.sign * problem.loss)
        return flat(model), means

    return run


@method
def sam(p, unified_lambda=1.0, loss_budget=None, renormalize=False, total_steps=None):
    """g(w + eps(g)).

    With ``unified_lambda``, l, a number or "1/t" or "1-1/t", the direction is (1 - l + l / |T' g|) g; with ``loss_budget`` the
    radius is at most b (1 + cos(pi t / total_steps)) / 2 |T' g|^-1; with ``renormalize`` the result gets the norm of g.
    """
    g = p.gradient()
    there = p.eps(g)
    adaptive = p.option("adaptive", False).bool()
    scales = torch.where(adaptive, flat(p.params).abs() + p.option("eta", 0.0), 1.0) * p.perturbed
    size = (scales * g).norm()
    lmbda = {"1/t": 1 / (p.t + 1), "1-1/t": p.t / (p.t + 1)}.get(unified_lambda, unified_lambda)
    there = there * (lmbda + (1 - lmbda) * size)
    if loss_budget is not None:
        budget = loss_budget * math.cos(math.pi * p.t / total_steps / 2) ** 2
        there = there * torch.minimum(torch.ones_like(p.rho), budget / size / (p.rho * p.perturbed).max())
    g_p = p.gradient(eps=there)
    return g_p * g.norm() / g_p.norm() if renormalize else g_p


@method
def momentum_sam(p, direction="momentum"):
    """g(w - eps(m)), m the base's momentum, or g(w + eps(h)), h the gradient of the step before; at first g(w)."""
    if direction == "momentum":
        names = ("momentum_buffer", "exp_avg")
        found = [
            next((s[n] for n in names if s.get(n) is not None), None)
            for s in map(p.base.state.get, p.params, [{}] * 99)
        ]
        d = -flat([torch.zeros_like(q) if one is None else one for q, one in zip(p.params, found, strict=True)])
    else:
        d = p.state.get("h", torch.zeros_like(p.rho))
    there = p.eps(d) if d.any() else None
    if there is not None:
        p.loss = p.at(there, p.losses).mean().item()
    g = p.gradient(eps=there)
    p.state["h"] = torch.where(p.has() > 0, g, d)
    return g


@method
def focal_sam(p, class_counts, gamma=1.0, lam=0.5):
    """g_u(w) + g_v(w + eps(g_v)), v = lam (1 - pi)^gamma, u = 1 - v, pi the share of the sample's class."""
    v = torch.tensor([lam * math.pow(1 - n / sum(class_counts), gamma) for n in class_counts], dtype=torch.float64)
    return p.uv((1 - v)[p.y] / len(p.y), v[p.y] / len(p.y))


@method
def tail_momentum_sam(p, class_counts, gamma=1.0, lam=0.5, decay=0.9):
    """g_u(w + eps(m)) + g_v(w + eps(m)) with Focal-SAM's u and v, then m = decay m + (1 - decay) g_v; at first m = g_v."""
    v = torch.tensor([lam * math.pow(1 - n / sum(class_counts), gamma) for n in class_counts], dtype=torch.float64)
    m = p.state.get("m", torch.zeros_like(p.rho))
    there = p.eps(m) if "m" in p.state else None
    if there is not None:
        p.loss = p.at(there, p.losses).mean().item()
    g_v = p.gradient(v[p.y] / len(p.y), there, keep=True)
    later = decay * m + (1 - decay) * g_v if "m" in p.state else g_v
    p.state["m"] = torch.where(p.has() > 0, later, m)
    return p.gradient((1 - v)[p.y] / len(p.y), there) + g_v


@method
def imb_sam(p, class_counts, eta=20, tail_weight=1.0):
    """g_u(w) + g_v(w + eps(g_v)), u = [n_c >= eta], v = tail_weight [n_c < eta]."""
    tail = p.tail(class_counts, eta)
    return p.uv(1 / len(p.y) - tail, tail_weight * tail)


@method
def sse_sam(p, class_counts, eta=100, tail_rho=None, switch_step=None):
    """g_h(w + eps(g_h)) + g_t(w + eps(g_t)), h = [n_c >= eta] with rho, t = [n_c < eta] with tail_rho.

    From step ``switch_step`` on the head's rho is 0.
    """
    tail = p.tail(class_counts, eta)
    head = 1 / len(p.y) - tail
    tail_rho = p.rho if tail_rho is None else tail_rho
    if switch_step is not None and p.t >= switch_step:
        return p.uv(head, tail, tail_rho)
    head_eps, tail_eps = p.eps(p.gradient(head)), p.eps(p.gradient(tail), tail_rho)
    return p.gradient(head, head_eps, keep=True) + p.gradient(tail, tail_eps)


@method
def cc_sam(p, class_counts, scope="head", head=None, noise_ratio=1e-6, flat_ratio=0.5):
    """(1 - flat_ratio) g(w) + flat_ratio (1/B) sum_k sum_{j of class k} grad l_j(w + delta_k).

    Only ``head``, tensors, is perturbed: of P weights with the joint norm |w_head|. With G_k the gradient of the mean
    loss of the batch's samples of class k, for each tensor t of it

        r         = noise_ratio sqrt(|w_head| + 1e-12) / (sqrt(|G_kt|) sqrt(2) (max(n_k, 2) - 1)^(1/4) P^(1/4))
        delta_kt  = r sqrt(P) G_kt / |G_kt|, and 0 if G_kt = 0; the other way where the group is maximized
    """
    if head is None:
        head = p.params if scope == "all" else p.groups[-1]["params"]
    head = [param for param in head if any(param is one for one in p.moving())]
    inside = [any(param is one for one in head) for param in p.params]
    count = sum(size for size, own in zip(p.sizes, inside, strict=True) if own)
    norm = math.sqrt(sum(param.detach().square().sum().item() for param in head)) + 1e-12
    sign = p.spread([-1.0 if group.get("maximize") else 1.0 for group in p.base.param_groups])
    direction = (1 - flat_ratio) * p.gradient(keep=True)
    for k in p.y.unique().tolist():
        of_class = (p.y == k).double()
        delta = []
        for part, own in zip(p.gradient(of_class / of_class.sum()).split(p.sizes), inside, strict=True):
            size = part.norm().item()
            if own and size:
                n = max(class_counts[k], 2) - 1
                r = noise_ratio * norm**0.5 / size**0.5 / 2**0.5 / n**0.25 / count**0.25
                delta.append(r * count**0.5 * part / size)
            else:
                delta.append(0 * part)
        direction = direction + flat_ratio * p.gradient(of_class / len(p.y), sign * torch.cat(delta), keep=True)
    return direction


@method
def gnm(p, noise, dis_mul=0.1, decay_every=None, loss_there=False):
    """g(w + rho dis_mul 0.5^(t // decay_every) noise(t, params)).

    The noise, a tensor for each parameter that is perturbed, comes clamped and times its sigma. ``loss_there`` reports the
    mean loss at the noisy weights instead.
    """
    halvings = p.t // decay_every if decay_every else 0
    there = p.drawn(noise) * p.rho * dis_mul * 0.5**halvings
    if loss_there:
        p.loss = p.at(there, p.losses).mean().item()
    return p.gradient(eps=there)


@method
def friendly_sam(p, sigma=1.0, lmbda=0.9):
    """g(w + eps(d)), d = g - sigma m, then m = lmbda m + (1 - lmbda) g; at first d = g and m = g.

    Parameters that g lacks are left out, and their m stays.
    """
    g, here = p.gradient(), p.has()
    m, begun = p.state.get("m", 0 * g), p.state.get("begun", 0 * g)
    p.state["m"] = torch.where(here * begun > 0, lmbda * m + (1 - lmbda) * g, torch.where(here > 0, g, m))
    p.state["begun"] = begun.maximum(here)
    return p.gradient(eps=p.eps(g - sigma * m * here))


@method
def vasso(p, theta=0.4):
    """g(w + eps(d)), d = (1 - theta) d + theta g; at first d = g. Parameters that g lacks are left out, and their d stays."""
    g, here = p.gradient(), p.has()
    d, begun = p.state.get("d", 0 * g), p.state.get("begun", 0 * g)
    p.state["d"] = torch.where(here * begun > 0, (1 - theta) * d + theta * g, torch.where(here > 0, g, d))
    p.state["begun"] = begun.maximum(here)
    return p.gradient(eps=p.eps(p.state["d"] * here))


@method
def micro_batch_sam(p, m):
    """sum_i (m_i/B) g^i(w + eps(g^i)), g^i of the mean loss of the i-th m_i samples; m_i = m but for the last."""
    direction = 0
    for part in torch.arange(len(p.y)).split(m):
        a = p.ones() * 0
        a[part] = 1 / len(part)
        direction = direction + len(part) / len(p.y) * p.gradient(a, p.eps(p.gradient(a)), keep=True)
    return direction


@method
def sparse_sam(p, sparsity=0.5, refresh_every=1, num_samples=16, mask=None):
    """g(w + mask eps(g)), the norm that of the full g; int(N (1 - sparsity)) ones in the mask.

    ``mask(t, params)`` gives it: a tensor of 0 and 1 for each parameter. Without: every ``refresh_every`` steps, at w, those of
    the largest mean of (grad l_j)^2 over the batch's first ``num_samples``, out of the N weights that are perturbed.
    """
    if mask is not None:
        p.state["mask"] = p.drawn(mask)
    elif p.t % refresh_every == 0:
        samples = torch.eye(len(p.y), dtype=torch.float64)[:num_samples]
        score = torch.stack([p.gradient(one).square() for one in samples]).mean(0)
        keep = int(int(p.perturbed.sum()) * (1 - sparsity))
        p.state["mask"] = torch.zeros_like(score)
        p.state["mask"][torch.where(p.perturbed.bool(), score, -1.0).topk(keep).indices] = 1.0
    return p.gradient(eps=p.state["mask"] * p.eps(p.gradient()))


@method
def esam(p, mask, beta=0.6, gamma=0.5, granularity="element"):
    """Gradient at w + e of the mean over the ceil(gamma B) samples of the largest l_j(w + e) - l_j(w).

    e = mask eps(g) / beta with g and its norm those of all weights; mask(t, params) gives a tensor of 0 and 1 for each of
    those that are perturbed. With granularity="tensor" it gives one number for each, and tensors with 0 are outside the norm.
    """
    g = p.gradient()
    drawn = p.drawn(mask, lacking=False)
    e = drawn * p.eps(g, p.rho / beta, within=drawn if granularity == "tensor" else 1.0)
    kept = (p.at(e, p.losses) - p.losses()).topk(math.ceil(gamma * len(p.y))).indices
    a = p.ones() * 0
    a[kept] = 1 / len(kept)
    return p.gradient(a, e)


@method
def look_sam(p, k=5, alpha=0.7):
    """Every k-th step g_s = g(w + eps(g)), and g_v = g_s - <g_s, g> g / |g|^2; else g + alpha |g| g_v / |g_v|.

    Parameters that g_s lacks are outside the products and keep their g_v; those that the second g lacks are outside |g_v|.
    """
    g = p.gradient()
    if p.t % k:
        g_v = p.has() * p.state["g_v"]
        return g + alpha * g.norm() * g_v / g_v.norm()
    g_s = p.gradient(eps=p.eps(g))
    g = p.has() * g
    p.state["g_v"] = torch.where(p.has() > 0, g_s - (g_s @ g) / (g @ g) * g, p.state.get("g_v", 0 * g))
    return g_s


@method
def gsam(p, alpha=0.4, rho_min=None, rho_max=None):
    """g_p - alpha (g - <g, g_p> g_p / |g_p|^2), g_p = g(w + eps(g)).

    With both given rho = rho_min + (rho_max - rho_min) lr / lr_max, lr_max each group's initial learning rate.
    """
    rho = None if rho_min is None or rho_max is None else rho_min + (rho_max - rho_min) * p.lr / p.first_lr
    g = p.gradient()
    g_p = p.gradient(eps=p.eps(g, rho))
    return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)


@method
def wsam(p, gamma=0.9, decouple=True):
    """a g_p + (1 - a) g, g_p = g(w + eps(g)), a = gamma / (1 - gamma).

    decouple=True: the base gets g, then w <- w - lr a (g_p - g).
    """
    a = gamma / (1 - gamma)
    g = p.gradient()
    g_p = p.gradient(eps=p.eps(g))
    if not decouple:
        return a * g_p + (1 - a) * g
    p.after = -p.lr * a * (g_p - g) * p.has()
    return g


def softmax_regression(x, y, w, u, v, rho, lr, momentum, steps, adaptive=False):
    """Full-batch softmax regression in numpy: gradients and SGD with momentum written out; u and v are class weights."""
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
        there = w + rho * t * t * sharp / (np.sqrt(((t * sharp) ** 2).sum()) + 1e-12)
        direction = gradient(w, u) + gradient(there, v)
        buffer = momentum * buffer + direction
        w = w - lr * buffer
    return w
