"""The oracles against each other: where two methods are the same by their formulas."""

import copy
import math

import pytest
import torch
from torch.optim import SGD

from . import oracles
from .method_rows import BASES, RHO, one_group, scaled_weights_only
from .oracles import CLASSES, COUNTS, batches, flat, losses, network, relative_error

DATA = batches(steps=8)
GROUPS = {"plain": one_group, "adaptive": scaled_weights_only}
PLAIN = pytest.mark.parametrize("base", ["nesterov", "adamw"])
HEAD = (torch.tensor(COUNTS) >= 20).double()
SHARP = torch.ones(CLASSES, dtype=torch.float64)


def groups_of(model, kind="plain", **more):
    return [{"rho": RHO, **group, **more} for group in GROUPS[kind](model)]


def run(method, base, kind="plain", data=DATA, group=None, **own):
    model = network()
    return method(model, groups_of(model, kind, **(group or {})), data, *BASES[base], **own)


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
    perturbed = [
        (param, group, param.detach().abs() + group.get("eta", 0.0) if group.get("adaptive") else 1.0)
        for group in groups
        if group.get("perturb", True)
        for param in group["params"]
        if sharp[param] is not None
    ]
    norm = math.sqrt(sum((t * sharp[param]).square().sum().item() for param, _, t in perturbed))
    old = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, group, t in perturbed:
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


def trajectory(groups_of, u, v, base, options, data, max_grad_norm=0.0):
    """The weights after running over ``data``, and the loss at w of each step."""
    model = network()
    groups = groups_of(model)
    optimizer = base(
        [{name: g[name] for name in g if name in ("params", "lr")} for g in groups],
        **{name: value for name, value in options.items() if name != "maximize"},
    )
    sign = -1 if options.get("maximize") else 1
    means = []
    for x, y in data:
        mean = step(groups, lambda _, x=x, y=y: sign * losses(model, x, y), y, u, v, optimizer, max_grad_norm)
        means.append(sign * mean)
    return flat(model), means


def algebra(u, v, base, kind="plain", rho=RHO):
    return trajectory(lambda model: groups_of(model, kind, rho=rho), u, v, *BASES[base], DATA)


def same(result, expected):
    assert relative_error(result[0], expected[0]) < 1e-12
    assert result[1] == pytest.approx(expected[1], rel=1e-12)


def different(result, other):
    assert relative_error(result[0], other[0]) > 1e-6


def dense(t, params):
    return [torch.ones_like(param) for param in params]


SAME_AS_SAM = {
    "itself": (oracles.sam, {}),
    "all sharp": (oracles.focal_sam, {"class_counts": COUNTS, "gamma": 0.0, "lam": 1.0}),
    "all tail": (oracles.imb_sam, {"class_counts": COUNTS, "eta": 1000}),
    "average left alone": (oracles.friendly_sam, {"sigma": 0.0}),
    "average of one step": (oracles.friendly_sam, {"sigma": 0.5, "lmbda": 0.0, "data": DATA[:1]}),
    "one micro-batch": (oracles.micro_batch_sam, {"m": oracles.BATCH}),
    "micro-batch larger than the batch": (oracles.micro_batch_sam, {"m": 100}),
    "dense fisher mask": (oracles.sparse_sam, {"sparsity": 0.0}),
    "dense given mask": (oracles.sparse_sam, {"mask": dense}),
    "all weights and samples": (
        oracles.esam,
        {"beta": 1.0, "gamma": 1.0, "mask": lambda t, params: [torch.ones_like(p) for p in params]},
    ),
    "all tensors": (
        oracles.esam,
        {"beta": 1.0, "gamma": 1.0, "mask": lambda t, params: [1.0] * len(params), "granularity": "tensor"},
    ),
    "ascent in every step": (oracles.look_sam, {"k": 1}),
    "no decomposition": (oracles.gsam, {"alpha": 0.0}),
    "one half": (oracles.wsam, {"gamma": 0.5, "decouple": False}),
}


@PLAIN
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", SAME_AS_SAM)
def test_special_cases_are_sam(name, kind, base):
    method, own = SAME_AS_SAM[name]
    own = dict(own)
    data = own.pop("data", DATA)
    model = network()
    groups = groups_of(model, kind)
    expected = trajectory(lambda m: groups_of(m, kind), 0 * SHARP, SHARP, *BASES[base], data)
    same(method(model, groups, data, *BASES[base], **own), expected)


SAME_AS_BASE = {
    "no tail": (oracles.imb_sam, {"class_counts": COUNTS, "eta": 0}),
    "no radius": (oracles.sse_sam, {"class_counts": COUNTS, "eta": 20, "tail_rho": 0.0, "group": {"rho": 0.0}}),
    "no flat part": (oracles.cc_sam, {"class_counts": COUNTS, "flat_ratio": 0.0, "noise_ratio": 1.0}),
    "no perturbation": (oracles.cc_sam, {"class_counts": COUNTS, "scope": "all", "noise_ratio": 0.0}),
    "no noise": (oracles.gnm, {"noise": lambda t, params: [torch.zeros_like(p) for p in params]}),
    "no amplitude": (oracles.gnm, {"noise": lambda t, params: [torch.ones_like(p) for p in params], "dis_mul": 0.0}),
    "empty mask": (oracles.sparse_sam, {"sparsity": 1.0}),
    "nothing perturbed": (oracles.gsam, {"alpha": 0.4, "group": {"perturb": False}}),
    "no sharpness": (oracles.wsam, {"gamma": 0.0, "decouple": True}),
    "no sharpness, coupled": (oracles.wsam, {"gamma": 0.0, "decouple": False}),
}


@PLAIN
@pytest.mark.parametrize("name", SAME_AS_BASE)
def test_special_cases_are_the_base(name, base):
    method, own = SAME_AS_BASE[name]
    model = network()
    optimizer = BASES[base][0](model.parameters(), **BASES[base][1])
    means = []
    for x, y in DATA:
        optimizer.zero_grad()
        loss = losses(model, x, y).mean()
        loss.backward()
        optimizer.step()
        means.append(loss.item())
    same(run(method, base, **own), (flat(model), means))


@PLAIN
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("tail_weight", [1.0, 2.0])
def test_imb_sam_is_of_the_algebra(tail_weight, kind, base):
    result = run(oracles.imb_sam, base, kind, class_counts=COUNTS, tail_weight=tail_weight)
    same(result, algebra(HEAD, tail_weight * (1 - HEAD), base, kind))


@PLAIN
@pytest.mark.parametrize("kind", GROUPS)
def test_focal_sam_is_of_the_algebra(kind, base):
    v = 0.7 * (1 - torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)) ** 3
    same(run(oracles.focal_sam, base, kind, class_counts=COUNTS, gamma=3.0, lam=0.7), algebra(1 - v, v, base, kind))


@PLAIN
@pytest.mark.parametrize("kind", GROUPS)
def test_sse_sam_after_the_switch_is_imb_sam(kind, base):
    own = {"class_counts": COUNTS, "eta": 20}
    after = run(oracles.sse_sam, base, kind, switch_step=0, **own)
    same(after, run(oracles.imb_sam, base, kind, **own))
    before = run(oracles.sse_sam, base, kind, **own)
    same(run(oracles.sse_sam, base, kind, switch_step=len(DATA), **own), before)
    middle = run(oracles.sse_sam, base, kind, switch_step=3, **own)
    different(middle, before)
    different(middle, after)
    same(
        run(oracles.sse_sam, base, kind, switch_step=3, data=DATA[:3], **own),
        run(oracles.sse_sam, base, kind, data=DATA[:3], **own),
    )


@PLAIN
def test_sse_sam_has_two_radii(base):
    """With the tail's radius 0 it is the algebra with head and tail swapped; of one kind of class, it is SAM."""
    result = run(oracles.sse_sam, base, class_counts=COUNTS, eta=20, tail_rho=0.0)
    same(result, algebra(1 - HEAD, HEAD, base))
    result = run(oracles.sse_sam, base, class_counts=COUNTS, eta=1000, tail_rho=0.3)
    same(result, algebra(0 * SHARP, SHARP, base, rho=0.3))


@PLAIN
def test_cc_sam_scopes(base):
    own = {"class_counts": COUNTS, "noise_ratio": 0.05}
    whole = run(oracles.cc_sam, base, scope="all", **own)
    same(run(oracles.cc_sam, base, scope="head", **own), whole)  # one group
    model = network()
    params = list(model.parameters())
    groups = [{"params": params[:-2]}, {"params": params[-2:]}]
    last = oracles.cc_sam(model, groups, DATA, *BASES[base], **own)
    model = network()
    given = oracles.cc_sam(model, groups_of(model), DATA, *BASES[base], head=list(model.parameters())[-2:], **own)
    same(given, last)
    different(last, whole)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_cc_sam_by_hand(scope):
    """One step: each class on its own copy of the network, moved by its radius."""
    (x, y), model = DATA[0], network()
    params = list(model.parameters())
    first = 0 if scope == "all" else len(params) - 2
    inside = params[first:]
    norm, count = flat(inside).norm().item(), len(flat(inside))
    expected = 0.7 * flat(torch.autograd.grad(losses(model, x, y).mean(), params))
    for k in range(CLASSES):
        mine = y == k
        moved = copy.deepcopy(model)
        grads = torch.autograd.grad(losses(model, x[mine], y[mine]).mean(), inside)
        with torch.no_grad():
            for param, grad in zip(list(moved.parameters())[first:], grads, strict=True):
                length = 0.05 * math.sqrt(norm / grad.norm().item() / 2) * (count / (COUNTS[k] - 1)) ** 0.25
                param += length * grad / grad.norm()
        total = losses(moved, x[mine], y[mine]).sum() / len(y)
        expected = expected + 0.3 * flat(torch.autograd.grad(total, list(moved.parameters())))
    own = {"class_counts": COUNTS, "noise_ratio": 0.05, "flat_ratio": 0.3, "scope": scope, "head": inside}
    result, _ = oracles.cc_sam(model, groups_of(model), DATA[:1], SGD, {"lr": 0.1}, **own)
    assert relative_error((flat(network()) - result) / 0.1, expected) < 1e-12


def test_cc_sam_counts_a_class_of_one_as_two_and_skips_zero_gradients():
    own = {"scope": "all", "noise_ratio": 0.05}
    one, two = (run(oracles.cc_sam, "nesterov", class_counts=[50, 20, 5, n], **own) for n in (1, 2))
    same(one, two)
    model = network()
    with torch.no_grad():
        model[-1].weight.zero_()  # no gradient reaches the layers below
    result, _ = oracles.cc_sam(model, groups_of(model), DATA[:1], *BASES["sgd"], class_counts=COUNTS, **own)
    assert result.isfinite().all()


@PLAIN
def test_gnm_moves_by_the_noise_and_halves_it(base):
    def noise(t, params):
        return [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(100 * t)) for p in params]

    plain = run(oracles.gnm, base, noise=noise)
    scaled = run(oracles.gnm, base, noise=lambda *a: [0.5 * one for one in noise(*a)], dis_mul=0.2)
    same(scaled, plain)
    halved = run(oracles.gnm, base, noise=noise, decay_every=3)
    same(run(oracles.gnm, base, noise=lambda t, params: [one * 0.5 ** (t // 3) for one in noise(t, params)]), halved)
    different(halved, plain)
    there = run(oracles.gnm, base, noise=noise, loss_there=True)
    assert torch.equal(there[0], plain[0]) and there[1] != plain[1]


def test_gnm_is_sam_when_the_noise_is_the_ascent():
    model = network()
    x, y = DATA[0]
    grads = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    result = run(oracles.gnm, "sgd", data=DATA[:1], noise=lambda t, params: [one / norm for one in grads], dis_mul=1.0)
    same(result, run(oracles.gsam, "sgd", data=DATA[:1], alpha=0.0))


def test_friendly_sam_by_hand():
    """Three steps written out; the average is of the raw gradients."""
    model, m = network(), None
    for x, y in DATA[:3]:
        params = list(model.parameters())
        g = flat(torch.autograd.grad(losses(model, x, y).mean(), params))
        d = g if m is None else g - 0.7 * m
        m = g if m is None else 0.8 * m + 0.2 * g
        before = flat(model)
        torch.nn.utils.vector_to_parameters(before + RHO * d / d.norm(), params)
        there = flat(torch.autograd.grad(losses(model, x, y).mean(), params))
        torch.nn.utils.vector_to_parameters(before - 0.1 * there, params)
    result = run(oracles.friendly_sam, "sgd", data=DATA[:3], sigma=0.7, lmbda=0.8)
    assert relative_error(result[0], flat(model)) < 1e-11


@PLAIN
def test_micro_batch_sam_is_the_mean_of_the_micro_batches(base):
    """Plain SGD is linear in the direction: a step is the weighted mean of SAM steps on the micro-batches."""
    (x, y), model = DATA[0], network()
    parts = [slice(0, 6), slice(6, 12), slice(12, 16)]
    moves = [
        trajectory(groups_of, 0 * SHARP, SHARP, SGD, {"lr": 0.1}, [(x[part], y[part])])[0] - flat(model)
        for part in parts
    ]
    expected = flat(model) + (6 * moves[0] + 6 * moves[1] + 4 * moves[2]) / 16
    assert relative_error(run(oracles.micro_batch_sam, "sgd", data=DATA[:1], m=6)[0], expected) < 1e-12
    different(run(oracles.micro_batch_sam, base, m=6), run(oracles.micro_batch_sam, base, m=16))


@PLAIN
def test_sparse_sam_keeps_the_largest_scores(base):
    model = network()
    x, y = DATA[0]
    params = list(model.parameters())
    score = sum(
        flat(torch.autograd.grad(losses(model, x[j : j + 1], y[j : j + 1]).sum(), params)).square() for j in range(5)
    )
    keep = int(len(score) * (1 - 0.3))
    mask = (score >= score.sort(descending=True).values[keep - 1]).double()
    assert mask.sum() == keep
    pieces = mask.split([param.numel() for param in params])
    masks = [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]
    fisher = run(oracles.sparse_sam, base, sparsity=0.3, num_samples=5, refresh_every=100)
    same(fisher, run(oracles.sparse_sam, base, mask=lambda t, params: masks))
    different(fisher, run(oracles.sparse_sam, base, sparsity=0.3, num_samples=5, refresh_every=1))


@PLAIN
def test_esam_selects_weights_and_samples(base):
    def drawn(t, params):
        generator = torch.Generator().manual_seed(100 * t)
        return [(torch.rand(p.shape, generator=generator) < 0.6).double() for p in params]

    some = run(oracles.esam, base, mask=drawn, beta=0.6, gamma=1.0)
    same(some, run(oracles.sparse_sam, base, mask=drawn, group={"rho": RHO / 0.6}))
    fewer = run(oracles.esam, base, mask=drawn, beta=0.6, gamma=0.5)
    different(fewer, some)
    same(run(oracles.esam, base, mask=drawn, beta=0.6, gamma=7.5 / 16), fewer)  # rounded up


def test_esam_keeps_the_largest_increases():
    (x, y), model = DATA[2], network()
    params = list(model.parameters())
    at_w = losses(model, x, y)
    g = flat(torch.autograd.grad(at_w.mean(), params))
    torch.nn.utils.vector_to_parameters(flat(model) + RHO / 0.6 * g / g.norm(), params)
    there = losses(model, x, y)
    increases = (there - at_w).tolist()
    kept = sorted(range(len(y)), key=lambda j: -increases[j])[:8]
    assert set(kept) != set(there.topk(8).indices.tolist())
    expected = flat(torch.autograd.grad(there[kept].mean(), params))
    own = {"mask": lambda t, params: [torch.ones_like(p) for p in params], "beta": 0.6, "gamma": 8 / 16}
    result, _ = run(oracles.esam, "sgd", data=DATA[2:3], **own)
    assert relative_error((flat(network()) - result) / 0.1, expected) < 1e-12


@PLAIN
def test_esam_leaves_tensors_out_of_the_norm(base):
    """The same as taking them out of the perturbation."""

    def sam_on_weights(model):
        weights = [param for param in model.parameters() if param.dim() > 1]
        biases = [param for param in model.parameters() if param.dim() == 1]
        return [{"params": weights, "rho": RHO / 0.6}, {"params": biases, "rho": RHO, "perturb": False}]

    model = network()
    named = [{**group, "perturb": True, "rho": RHO} for group in sam_on_weights(model)]
    own = {"beta": 0.6, "gamma": 1.0, "granularity": "tensor"}
    result = oracles.esam(
        model, named, DATA, *BASES[base], mask=lambda t, params: [float(p.dim() > 1) for p in params], **own
    )
    same(result, trajectory(sam_on_weights, 0 * SHARP, SHARP, *BASES[base], DATA))


def test_look_sam_adds_the_kept_part():
    """At the step after an ascent on the same weights: g + alpha |g| g_v / |g_v|, with g_v orthogonal to g."""
    model, still = network(), {"lr": 0.0}
    x, y = DATA[0]
    params = list(model.parameters())
    g = flat(torch.autograd.grad(losses(model, x, y).mean(), params))
    lr = [0.0, 0.1]
    moved, _ = run(oracles.look_sam, "sgd", data=DATA[:1] * 2, k=2, alpha=0.5, schedule=lambda t: lr[t] / 0.1)
    direction = (flat(model) - moved) / 0.1
    extra = direction - g
    assert abs(extra @ g) < 1e-12 * (g @ g)
    assert extra.norm().item() == pytest.approx(0.5 * g.norm().item(), rel=1e-10)
    sam = trajectory(groups_of, 0 * SHARP, SHARP, SGD, {"lr": 0.1}, DATA[:1])[0]
    g_s = (flat(model) - sam) / 0.1
    assert relative_error(g_s - (g_s @ g) / (g @ g) * g, (extra / extra.norm()) * (extra @ g_s) / extra.norm()) < 1e-10
    assert torch.equal(run(oracles.look_sam, "sgd", group=still, k=3)[0], flat(model))


@PLAIN
def test_gsam_radius_follows_the_learning_rate(base):
    constant = run(oracles.gsam, base, alpha=0.2)
    same(run(oracles.gsam, base, alpha=0.2, rho_min=0.01, rho_max=RHO), constant)
    falling = {"schedule": lambda t: 1 - t / 10}
    tied = run(oracles.gsam, base, alpha=0.2, rho_min=0.02, rho_max=0.2, **falling)
    fixed = run(oracles.gsam, base, alpha=0.2, group={"rho": 0.2}, **falling)
    different(tied, fixed)
    first, third = (run(oracles.gsam, base, rho_min=0.02, rho_max=0.2, data=DATA[:n], **falling) for n in (2, 3))
    different(first, third)


def test_gsam_removes_the_surplus():
    """With alpha=1 the direction is 2 g_p - g in the part along g_p, and -g across it."""
    model = network()
    x, y = DATA[0]
    g = flat(torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters())))
    g_p, direction = (
        (flat(model) - run(oracles.gsam, "sgd", data=DATA[:1], alpha=alpha)[0]) / 0.1 for alpha in (0.0, 1.0)
    )
    change = direction - g_p
    assert abs(change @ g_p) < 1e-12 * (g_p @ g_p)
    assert relative_error(change + g, (g @ g_p) / (g_p @ g_p) * g_p) < 1e-11


def test_wsam_decoupled_is_the_same_for_plain_sgd_alone():
    same(run(oracles.wsam, "sgd", gamma=0.8), run(oracles.wsam, "sgd", gamma=0.8, decouple=False))
    different(run(oracles.wsam, "adamw", gamma=0.8), run(oracles.wsam, "adamw", gamma=0.8, decouple=False))


@PLAIN
def test_schedule_and_clipping_as_in_the_algebra(base):
    clipped = trajectory(groups_of, 0 * SHARP, SHARP, *BASES[base], DATA, max_grad_norm=0.1)
    same(run(oracles.gsam, base, alpha=0.0, max_grad_norm=0.1), clipped)
    kind, options = BASES[base]
    halved = trajectory(groups_of, 0 * SHARP, SHARP, kind, {**options, "lr": 0.5 * options["lr"]}, DATA)
    same(run(oracles.gsam, base, alpha=0.0, schedule=lambda t: 0.5), halved)


def test_every_class_is_in_the_first_batch():
    assert len(DATA[0][1].unique()) == CLASSES
