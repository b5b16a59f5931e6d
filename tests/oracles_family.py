"""The rest of the family as oracles, in double precision: autograd.grad by hand, nothing of ltsam_fast.

A method is called ``method(model, groups, data, base, options, **own)`` and returns flat(model) after ``data``
and the mean loss at w of each step:

    model    double precision, samples independent of each other (no batch norm), changed in place
    groups   dicts with params of the model, rho and maybe adaptive, eta, perturb, norm_eps; the rest is the base's
    data     pairs (x, y)
    base     a class of torch.optim, made with ``options``; it steps with .grad set by hand
    own      the method's keywords, and for all of them schedule, step -> factor of each group's initial learning rate,
             and max_grad_norm, which clips the direction

The docstrings give the direction, which is the gradient the base optimizer gets. In them

    g(w)    gradient of the batch's mean loss; g is the one at w
    g_a(w)  gradient of (1/B) sum_j a_j l_j(w)
    eps(g)  rho T g / (|T' g| + norm_eps), T = (|w| + eta)^2 and T' = |w| + eta if adaptive, else 1

Vectors are flat: all parameters behind each other in the order of the groups, which numbers the tensors too.
Those of a group with perturb=False have eps = 0 and are outside the norm.
"""

import functools
import math

import torch

from .oracles import flat, losses, minimizing

PERTURBATION = ("rho", "adaptive", "eta", "perturb", "norm_eps")
"""What a group has for the method; the rest is for the base optimizer."""


class Problem:
    """The weights, and one step's batch ``x``, ``y``, number ``t`` and loss at w; ``state`` lives through all steps."""

    def __init__(self, model, groups, base, options):
        self.model, self.groups, self.state = model, [{**g, "params": list(g["params"])} for g in groups], {}
        self.params = [param for group in self.groups for param in group["params"]]
        self.sizes = [param.numel() for param in self.params]
        bases = [{name: g[name] for name in g if name not in PERTURBATION} for g in self.groups]
        options, self.sign = minimizing(options)
        self.base = base(bases, **options)
        self.first_lr = self.lr
        self.rho = self.option("rho", 0.0)
        self.perturbed = self.option("perturb", True)

    def spread(self, values):
        """One value per group as a vector."""
        parts = [torch.full_like(p, value) for g, value in zip(self.groups, values, strict=True) for p in g["params"]]
        return flat(parts)

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
        """``function()`` at w + eps."""
        before = flat(self.params)
        self.assign(before + eps)
        result = function()
        self.assign(before)
        return result

    def losses(self):
        with torch.no_grad():
            return self.sign * losses(self.model, self.x, self.y)

    def gradient(self, a=None, eps=None):
        """Gradient of sum_j a_j l_j at w + eps; without ``a`` of the mean loss."""
        if eps is not None:
            return self.at(eps, lambda: self.gradient(a))
        a = self.ones() / len(self.y) if a is None else a
        total = (a * self.sign * losses(self.model, self.x, self.y)).sum()
        parts = torch.autograd.grad(total, self.params, allow_unused=True)
        self.used = [part is not None for part in parts]
        return flat([torch.zeros_like(p) if part is None else part for p, part in zip(self.params, parts, strict=True)])

    def ones(self):
        return torch.ones(len(self.y), dtype=torch.float64)

    def eps(self, g, rho=None, within=1.0):
        """eps(g) for the coordinates ``within``, which the norm runs over."""
        adaptive = self.option("adaptive", False).bool()
        t = torch.where(adaptive, flat(self.params).abs() + self.option("eta", 0.0), 1.0) * self.perturbed * within
        return (self.rho if rho is None else rho) * t * t * g / ((t * g).norm() + self.option("norm_eps", 1e-12))

    def tail(self, class_counts, eta):
        """1 for samples of a class with n_c < eta, else 0; divided by B."""
        return (torch.tensor(class_counts) < eta).double()[self.y] / len(self.y)


def method(direction):
    """A method from the direction of its steps. It may set ``after``, which is added to the weights after the base."""

    @functools.wraps(direction)
    def run(model, groups, data, base, options, *, schedule=None, max_grad_norm=0.0, **own):
        problem, means = Problem(model, groups, base, options), []
        rates = [group["lr"] for group in problem.base.param_groups]
        for problem.t, (problem.x, problem.y) in enumerate(data):
            for group, rate in zip(problem.base.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(problem.t) if schedule else rate
            problem.loss, problem.after = problem.losses().mean().item(), 0.0
            parts = direction(problem, **own).split(problem.sizes)
            for param, part, used in zip(problem.params, parts, problem.used, strict=True):
                param.grad = part.view_as(param).clone() if used else None
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(problem.params, max_grad_norm)
            problem.base.step()
            problem.assign(flat(problem.params) + problem.after)
            means.append(problem.sign * problem.loss)
        return flat(model), means

    return run


@method
def imb_sam(p, class_counts, eta=20, tail_weight=1.0):
    """g_u(w) + g_v(w + eps(g_v)), u = [n_c >= eta], v = tail_weight [n_c < eta]."""
    tail = p.tail(class_counts, eta)
    u, v = 1 / len(p.y) - tail, tail_weight * tail
    return p.gradient(u) + p.gradient(v, p.eps(p.gradient(v)))


@method
def sse_sam(p, class_counts, eta=100, tail_rho=None, switch_step=None):
    """g_h(w + eps(g_h)) + g_t(w + eps(g_t)), h = [n_c >= eta] with rho, t = [n_c < eta] with tail_rho.

    From step ``switch_step`` on the head's rho is 0.
    """
    tail = p.tail(class_counts, eta)
    head = 1 / len(p.y) - tail
    head_rho = p.rho if switch_step is None or p.t < switch_step else 0 * p.rho
    tail_rho = p.rho if tail_rho is None else tail_rho
    head_eps, tail_eps = p.eps(p.gradient(head), head_rho), p.eps(p.gradient(tail), tail_rho)
    return p.gradient(head, head_eps) + p.gradient(tail, tail_eps)


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
    inside = [any(param is one for one in head) for param in p.params]
    count = sum(size for size, own in zip(p.sizes, inside, strict=True) if own)
    norm = math.sqrt(sum(param.detach().square().sum().item() for param in head)) + 1e-12
    sign = p.spread([-1.0 if group.get("maximize") else 1.0 for group in p.base.param_groups])
    direction = (1 - flat_ratio) * p.gradient()
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
        direction = direction + flat_ratio * p.gradient(of_class / len(p.y), sign * torch.cat(delta))
    return direction


@method
def gnm(p, noise, dis_mul=0.1, decay_every=None, loss_there=False):
    """g(w + rho dis_mul 0.5^(t // decay_every) noise(t, number of the tensor, its shape)).

    The noise comes clamped and times its sigma. ``loss_there`` reports the mean loss at the noisy weights instead.
    """
    drawn = flat([noise(p.t, number, param.shape) for number, param in enumerate(p.params)])
    halvings = p.t // decay_every if decay_every else 0
    there = p.perturbed * drawn * p.rho * dis_mul * 0.5**halvings
    if loss_there:
        p.loss = p.at(there, p.losses).mean().item()
    return p.gradient(eps=there)


@method
def friendly_sam(p, sigma=1.0, lmbda=0.9):
    """g(w + eps(d)), d = g - sigma m, then m = lmbda m + (1 - lmbda) g; at first d = g and m = g."""
    g, m = p.gradient(), p.state.get("m")
    p.state["m"] = g if m is None else lmbda * m + (1 - lmbda) * g
    return p.gradient(eps=p.eps(g if m is None else g - sigma * m))


@method
def m_sam(p, m):
    """sum_i (m_i/B) g^i(w + eps(g^i)), g^i of the mean loss of the i-th m_i samples; m_i = m but for the last."""
    direction = 0
    for part in torch.arange(len(p.y)).split(m):
        a = p.ones() * 0
        a[part] = 1 / len(part)
        direction = direction + len(part) / len(p.y) * p.gradient(a, p.eps(p.gradient(a)))
    return direction


@method
def sparse_sam(p, sparsity=0.5, refresh_every=1, num_samples=16, mask=None):
    """g(w + mask eps(g)), the norm that of the full g; int(N (1 - sparsity)) ones in the mask.

    ``mask(t)`` gives it: a tensor of 0 and 1 for each parameter. Without: every ``refresh_every`` steps, at w, those of
    the largest mean of (grad l_j)^2 over the batch's first ``num_samples``, out of the N weights that are perturbed.
    """
    if mask is not None:
        p.state["mask"] = flat(mask(p.t))
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

    e = mask eps(g) / beta with g and its norm those of all weights; mask(t, number of the tensor, its shape) is 0 or 1.
    With granularity="tensor" it is one number, and tensors with 0 are outside the norm as well.
    """
    masks = [mask(p.t, number, param.shape) for number, param in enumerate(p.params)]
    if granularity == "tensor":
        drawn = flat([torch.full_like(param, float(one)) for param, one in zip(p.params, masks, strict=True)])
    else:
        drawn = flat(masks)
    e = drawn * p.eps(p.gradient(), p.rho / beta, within=drawn if granularity == "tensor" else 1.0)
    kept = (p.at(e, p.losses) - p.losses()).topk(math.ceil(gamma * len(p.y))).indices
    a = p.ones() * 0
    a[kept] = 1 / len(kept)
    return p.gradient(a, e)


@method
def look_sam(p, k=5, alpha=0.7):
    """Every k-th step g_s = g(w + eps(g)), and g_v = g_s - <g_s, g> g / |g|^2; else g + alpha |g| g_v / |g_v|."""
    g = p.gradient()
    if p.t % k:
        return g + alpha * g.norm() * p.state["g_v"] / p.state["g_v"].norm()
    g_s = p.gradient(eps=p.eps(g))
    p.state["g_v"] = g_s - (g_s @ g) / (g @ g) * g
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
    p.after = -p.lr * a * (g_p - g)
    return g
