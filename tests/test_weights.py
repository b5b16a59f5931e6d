"""Weights of one's own: of the classes (``class_weights``) and the samples (``step(weights=...)``), and each class's gamma."""

from __future__ import annotations

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import ltsam_fast as lf

from . import test_plans
from .method_rows import EVERY, closure_of, every
from .oracles import CLASSES, COUNTS, FEATURES, STEPS, batches, flat, network, relative_error

WEIGHED = ("FocalSAM", "ImbSAM", "SSESAM")
PLANS = ("published", "auto")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
LR, MOMENTUM, DECAY, RHO = 0.1, 0.9, 1e-3, 0.2


def by_hand(model, data, rho=RHO, adaptive=False, head_too=False):
    """The methods in plain PyTorch, with SGD by hand: data are (x, losses of (model, x), u, v) for each step.

    w <- SGD(w, g_u(w + eps_u) + g_v(w + eps_v)), eps_a = rho T^2 g_a / |T g_a|, g_a = grad of (1/B) sum_j a_j l_j; the
    clean loss has eps_u = 0 but with ``head_too``.
    """
    params, buffers, means = list(model.parameters()), None, []

    def gradient(x, losses, a, eps=None):
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param, one in zip(params, eps or [], strict=eps is not None):
                param += one
        found = losses(model, x)
        grads = torch.autograd.grad((a * found).sum() / len(found), params)
        with torch.no_grad():
            for param, one in zip(params, before, strict=True):
                param.copy_(one)
        return grads

    def climb(x, losses, a):
        scale = [param.detach().abs() if adaptive else torch.ones_like(param) for param in params]
        grads = gradient(x, losses, a)
        norm = sum(((t * g) ** 2).sum() for t, g in zip(scale, grads, strict=True)).sqrt()
        return [rho * t * t * g / (norm + 1e-12) for t, g in zip(scale, grads, strict=True)]

    for x, losses, u, v in data:
        means.append(losses(model, x).mean().item())
        clean = gradient(x, losses, u, climb(x, losses, u) if head_too else None)
        sharp = gradient(x, losses, v, climb(x, losses, v))
        grads = [a + b + DECAY * p.detach() for a, b, p in zip(clean, sharp, params, strict=True)]
        buffers = grads if buffers is None else [MOMENTUM * m + g for m, g in zip(buffers, grads, strict=True)]
        with torch.no_grad():
            for param, one in zip(params, buffers, strict=True):
                param -= LR * one
    return flat(model), means


def made(name, model, plan="auto", **more):
    more = {"rho": RHO, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, **more}
    return getattr(lf, name)(model.parameters(), SGD, model=model, plan=plan, **more)


def cross_entropy(y):
    return lambda model, x: F.cross_entropy(model(x), y.to(x.device), reduction="none")


def closure(model, x, losses):
    """Of all samples, or of some: ``losses(model, x)`` are of those in x."""
    return lambda index=slice(None): losses(model, x, index)


def drawn(generator, classes=CLASSES, zeros=0.3):
    """A random weight for each class or sample, some of them zero; u may be negative."""
    u, v = torch.rand(2, classes, generator=generator, dtype=torch.float64)
    u, v = (one * (torch.rand(classes, generator=generator) >= zeros) for one in (1.2 * u - 0.1, v))
    v[0] += 0.1  # they are not all zero
    return u, v


SIZES = (9, 1, 7, 16, 3)


def problem(generator, dtype, device, steps=STEPS, tail=True):
    """Batches of odd sizes, of one sample too; some without samples of classes 2 and 3."""
    data = []
    for step in range(steps):
        size = SIZES[step % len(SIZES)]
        y = torch.randint(0, CLASSES if tail and step % 3 else 2, (size,), generator=generator)
        x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
        data.append((x.to(device, dtype), y.to(device)))
    return data


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", (*WEIGHED, "FocalASAM", "SSESAM-2"))
def test_weights_of_classes_agree_with_the_oracle(name, plan, dtype, backend, device, generator):
    steps = 4 if backend == "triton" and device == "cpu" else STEPS
    u, v = drawn(generator)
    data = problem(generator, dtype, device, steps)
    model = network(dtype).to(device)
    more = {"adaptive": name == "FocalASAM"} | ({"switch_step": 0} if name == "SSESAM-2" else {})
    opt = made(
        {"FocalASAM": "FocalSAM", "SSESAM-2": "SSESAM"}.get(name, name), model, plan, class_weights=(u, v), **more
    )
    means = [opt.step(closure_of(model, x, y), targets=y).item() for x, y in data]
    exact = [(x.double().cpu(), cross_entropy(y.cpu()), u[y.cpu()], v[y.cpu()]) for x, y in data]
    wanted = by_hand(network(), exact, adaptive=more["adaptive"], head_too=name == "SSESAM")
    assert relative_error(flat(model).cpu(), wanted[0]) < TOLERANCE[dtype]
    torch.testing.assert_close(means, wanted[1], rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", WEIGHED)
def test_weights_of_samples_agree_with_the_oracle(name, plan, dtype, backend, device, generator):
    steps = 4 if backend == "triton" and device == "cpu" else STEPS
    data = problem(generator, dtype, device, steps)
    model, exact, means = network(dtype).to(device), [], []
    opt = made(name, model, plan)
    for number, (x, y) in enumerate(data):
        u, v = drawn(generator, len(y), zeros=(0.0, 0.4, 0.9)[number % 3])
        if number % 5 == 4:
            v.zero_()  # nothing is sharp in this batch
        if number % 7 == 6:
            u = (v == 0).double()  # no sample in common
        means.append(opt.step(closure_of(model, x, y), weights=(u.to(device, dtype), v.to(device, dtype))).item())
        exact.append((x.double().cpu(), cross_entropy(y.cpu()), u.to(dtype).double(), v.to(dtype).double()))
    wanted = by_hand(network(), exact, head_too=name == "SSESAM")
    assert relative_error(flat(model).cpu(), wanted[0]) < TOLERANCE[dtype]
    torch.testing.assert_close(means, wanted[1], rtol=TOLERANCE[dtype], atol=0)


# --- the class-wise method whose weights are spelled out

OPTIONS = {
    "FocalSAM": {"gamma": 3.0, "lam": 0.5},
    "FocalSAM-1.3": {"gamma": 1.0, "lam": 1.3},  # rare classes' clean weight is negative
    "FocalSAM-CA": {"gamma": [0.5, 1.0, 2.0, 0.0]},
    "FocalSAM-SAM": {"gamma": 0.0, "lam": 1.0},
    "ImbSAM": {"eta": 10, "tail_weight": 2.0},
    "SSESAM": {"eta": 10, "tail_rho": 0.1, "switch_step": 5},
}
KEPT = ("tail_rho", "switch_step")
"""Options that class weights do not replace."""


@pytest.mark.parametrize("form", ("classes", "samples", "parts", "scaled", "loss"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", OPTIONS)
def test_weights_spelled_out_are_the_method_bit_for_bit(case, plan, dtype, form):
    name, options, ends = case.partition("-")[0], OPTIONS[case], []
    known = made(name, network(), class_counts=COUNTS, **options)
    u, v = known.clean_weights, known.sharp_weights
    for spelled in (False, True):
        model, found = network(dtype), []
        if not spelled:
            more = {"class_counts": COUNTS, **options}
        else:
            more = {name: value for name, value in options.items() if name in KEPT}
            more |= {"class_weights": (u, v)} if form == "classes" else {}
        opt = made(name, model, plan, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if form == "scaled" else None
        for x, y in problem(torch.Generator().manual_seed(2), dtype, "cpu", 12):
            xs, ys = ([x[:2], x[2:]], [y[:2], y[2:]]) if form == "parts" and len(y) > 2 else ([x], [y])
            if form == "loss":
                closures = [lambda i=slice(None), x=x, model=model: model(x[i]) for x in xs]
            else:
                closures = [closure_of(model, *pair) for pair in zip(xs, ys, strict=True)]
            keywords = {"loss": F.cross_entropy} if form == "loss" else {}
            if spelled and form != "classes":
                keywords["weights"] = [(u[y], v[y]) for y in ys]
                ys = ys if form == "loss" else None
            found.append(opt.step(closures, ys, scaler, **keywords))
            if scaler is not None:
                scaler.update()
        ends.append((flat(model), torch.stack(found)))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", WEIGHED)
def test_the_packages_own_losses_may_be_weighed(name, plan):
    """Which make both gradients of the logits in one pass for weights of classes."""
    options, ends = EVERY[name].options, []
    known = made(name, network(), **options)
    for spelled in (False, True):
        model = network()
        opt = made(name, model, plan, **{one: options[one] for one in options if one in KEPT or not spelled})
        for x, y in batches(steps=8):
            more = {"weights": (known.clean_weights[y], known.sharp_weights[y])} if spelled else {}
            opt.step(lambda i=slice(None), x=x, model=model: model(x[i]), y, loss=lf.losses.VS(COUNTS), **more)
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-11


# --- what it is for


@pytest.mark.parametrize("plan", PLANS)
def test_mixup_is_two_weighted_losses(plan, generator):
    """The pair of a mixed sample are two losses of one forward pass, in a batch of 2 B."""
    known = made("FocalSAM", network(), class_counts=COUNTS, gamma=2.0)
    u, v = known.clean_weights, known.sharp_weights
    model, exact = network(), []
    opt = made("FocalSAM", model, plan)
    for x, y in batches(steps=STEPS):
        lam = torch.rand((), generator=generator, dtype=torch.float64)
        other = torch.randperm(len(y), generator=generator)
        mixed, both = lam * x + (1 - lam) * x[other], torch.cat([y, y[other]])

        def losses(model=model, mixed=mixed, both=both):
            return F.cross_entropy(model(mixed).repeat(2, 1), both, reduction="none")

        share = 2 * torch.stack([lam, 1 - lam]).repeat_interleave(len(y))  # 2: the mean is over 2 B losses
        opt.step(losses, weights=(share * u[both], share * v[both]))

        def weighted(a, y=y, other=other, lam=lam):
            def total(model, inputs):
                logits, z = model(inputs), y[other]
                one = a[y] * F.cross_entropy(logits, y, reduction="none")
                return lam * one + (1 - lam) * a[z] * F.cross_entropy(logits, z, reduction="none")

            return total

        exact.append((mixed, weighted(u), weighted(v)))
    assert relative_error(flat(model), two_losses(network(), exact)) < 1e-9


def two_losses(model, data):
    """Focal-SAM's steps with a clean and a sharp loss that are given as functions."""
    params = list(model.parameters())
    base = SGD(params, LR, MOMENTUM, weight_decay=DECAY)
    for x, clean, sharp in data:
        g_u = torch.autograd.grad(clean(model, x).mean(), params)
        g_v = torch.autograd.grad(sharp(model, x).mean(), params)
        norm = torch.cat([g.flatten() for g in g_v]).norm() + 1e-12
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param, g in zip(params, g_v, strict=True):
                param += RHO * g / norm
        g_p = torch.autograd.grad(sharp(model, x).mean(), params)
        with torch.no_grad():
            for param, one, a, b in zip(params, before, g_u, g_p, strict=True):
                param.copy_(one)
                param.grad = a + b
        base.step()
    return flat(model)


@pytest.mark.parametrize("kind", ("regression", "multi-label", "a criterion"))
@pytest.mark.parametrize("name", WEIGHED)
def test_no_classes_are_needed(name, kind, generator):
    model, exact = network(), []
    opt = made(name, model)
    for x, y in batches(steps=6):
        goal = torch.rand(len(y), CLASSES, generator=generator, dtype=torch.float64).round(decimals=1)
        u, v = drawn(generator, len(y))
        if kind == "regression":
            each = lambda model, x, i=slice(None), goal=goal: (model(x[i]) - goal[i]).square().sum(1)  # noqa: E731
        else:
            each = lambda model, x, i=slice(None), goal=goal: F.binary_cross_entropy_with_logits(  # noqa: E731
                model(x[i]), goal[i], reduction="none"
            ).mean(1)
        if kind == "a criterion":
            of_logits = lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1)  # noqa: E731
            opt.step(lambda i=slice(None), x=x: model(x[i]), goal, loss=of_logits, weights=(u, v))
        else:
            opt.step(closure(model, x, each), weights=(u, v))
        exact.append((x, each, u, v))
    assert relative_error(flat(model), by_hand(network(), exact, head_too=name == "SSESAM")[0]) < 1e-9


def test_a_gamma_for_each_class_agrees_with_the_oracle(backend, device, generator):
    steps = 4 if backend == "triton" and device == "cpu" else STEPS
    gamma = 3 * torch.rand(CLASSES, generator=generator, dtype=torch.float64)
    v = [0.7 * (1 - n / sum(COUNTS)) ** g for n, g in zip(COUNTS, gamma.tolist(), strict=True)]
    v = torch.tensor(v, dtype=torch.float64)
    data = problem(generator, torch.float64, device, steps)
    model = network().to(device)
    opt = made("FocalSAM", model, class_counts=COUNTS, gamma=gamma, lam=0.7)
    for x, y in data:
        opt.step(closure_of(model, x, y), targets=y)
    exact = [(x.cpu(), cross_entropy(y.cpu()), 1 - v[y.cpu()], v[y.cpu()]) for x, y in data]
    assert relative_error(flat(model).cpu(), by_hand(network(), exact)[0]) < 1e-9


# --- plans


class Recorder:
    """Notes of which samples it is asked for, and whether weights were perturbed."""

    def __init__(self, model, opt, x, y):
        self.model, self.opt, self.x, self.y, self.calls = model, opt, x, y, []

    def __call__(self, index=slice(None)):
        self.calls.append(("e" if self.opt.is_perturbed else "w", torch.arange(len(self.y))[index].tolist()))
        return F.cross_entropy(self.model(self.x[index]), self.y[index], reduction="none")


WHOLE = [0, 1, 2, 3, 4]
WAYS = {
    "disjoint": ("FocalSAM", [1, 0, 2, 1, 0], [0, 3, 0, 0, 1], [("w", [0, 2, 3]), ("w", [1, 4]), ("e", [1, 4])]),
    "disjoint, two perturbed": (
        "SSESAM", [1, 0, 2, 1, 0], [0, 3, 0, 0, 1], [("w", [0, 2, 3]), ("w", [1, 4]), ("e", [0, 2, 3]), ("e", [1, 4])],
    ),
    "some sharp": ("ImbSAM", [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [("w", WHOLE), ("e", [1, 2])]),
    "none sharp": ("ImbSAM", [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [("w", WHOLE)]),
    "none clean": ("FocalSAM", [0, 0, 0, 0, 0], [0, 1, 0, 2, 0], [("w", WHOLE), ("e", [1, 3])]),
    "all in both": ("FocalSAM", [1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [("w", WHOLE), ("e", WHOLE)]),
    "one in neither": ("FocalSAM", [0, 0, 2, 1, 1], [0, 3, 1, 0, 0], [("w", WHOLE), ("e", [1, 2])]),
    "nothing": ("FocalSAM", [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [("w", WHOLE)]),
}  # fmt: skip


@pytest.mark.parametrize("form", ("samples", "classes"))
@pytest.mark.parametrize("case", WAYS)
def test_samples_without_weight_are_not_evaluated(case, form):
    name, u, v, wanted = WAYS[case]
    if form == "classes" and not any(u + v):
        return  # which is refused
    model, y = network(), torch.tensor(WHOLE)
    model[4] = nn.Linear(9, 5).double()
    opt = made(name, model, **({"class_weights": (u, v)} if form == "classes" else {}))
    x, weights = torch.randn(5, FEATURES, dtype=torch.float64), tuple(torch.tensor(one).float() for one in (u, v))
    for _ in range(3):
        calls = Recorder(model, opt, x, y)
        opt.step(calls, **({"targets": y} if form == "classes" else {"weights": weights}))
    assert calls.calls == wanted


@pytest.mark.parametrize("seed", range(40))
def test_every_way_is_the_published_one(seed):
    """Random networks and weights, of one part or several, with a scaler or without."""
    draw = random.Random(seed)
    name, kind = draw.choice(WEIGHED), draw.choice([*test_plans.MAKERS])
    groups, base = draw.choice([*test_plans.GROUPS]), draw.choice((SGD, AdamW))
    parts, scaled, indexed = draw.choice((1, 1, 2, 3)), draw.random() < 0.3, draw.random() < 0.7
    ends, own = (
        [],
        {"class_counts": None, "tail_rho": 0.2, "switch_step": 2} if name == "SSESAM" else {"class_counts": None},
    )
    for plan in PLANS:
        model, opt = test_plans.made(name, kind, groups, plan, base=base, **own)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None
        generator, start, found = torch.Generator().manual_seed(seed), flat(model), []
        for step in range(5):
            pairs = [test_plans.batch(generator, kind, torch.float64, SIZES[step] + part, 1) for part in range(parts)]
            weights = [drawn(generator, len(y), (0.0, 0.5, 0.9)[step % 3]) for _, y in pairs]
            if step == 3:
                weights = [((v == 0).double(), v) for _, v in weights]
            closures = [test_plans.closure_of(model, x, y, indexed) for x, y in pairs]
            found.append(opt.step(closures, weights=weights, scaler=scaler))
            if scaler is not None:
                scaler.update()
        ends.append((flat(model), torch.stack(found)))
    bound = 1e-11 * (1 if base is SGD else 100) * (ends[0][0] - start).norm()
    assert (ends[1][0] - ends[0][0]).norm() <= bound, (name, kind, groups, base, parts, indexed)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", WEIGHED)
def test_parts_are_the_whole_batch_and_radius_0_is_the_base(name, plan, generator):
    for rho in (RHO, 0.0):
        model, exact = network(), []
        opt = made(name, model, plan, rho=rho)
        for x, y in batches(steps=6):
            u, v = drawn(generator, len(y), 0.6)
            cut = [list(one.split([5, 1, 10])) for one in (x, y, u, v)]
            opt.step(
                [closure_of(model, *pair) for pair in zip(*cut[:2], strict=True)],
                weights=list(zip(*cut[2:], strict=True)),
            )
            exact.append((x, cross_entropy(y), u, v))
        assert relative_error(flat(model), by_hand(network(), exact, rho, head_too=name == "SSESAM")[0]) < 1e-9


def test_networks_that_mix_samples_are_evaluated_whole(generator):
    def mixing():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()

    model = mixing()
    opt = made("ImbSAM", model)
    exact = []
    for x, y in batches(steps=6):
        u, v = drawn(generator, len(y), 0.5)
        opt.step(closure_of(model, x, y), weights=(u, v))
        exact.append((x, cross_entropy(y), u, v))
    assert relative_error(flat(model), by_hand(mixing(), exact)[0]) < 1e-9
    opt = made("ImbSAM", mixing(), "require")
    with pytest.raises(ValueError, match="BatchNorm1d"):
        opt.step(closure_of(opt.model, x, y), weights=(u, v))


def test_an_overflow_skips_the_step():
    model = network()
    opt, scaler = made("FocalSAM", model), torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batches(steps=1)[0]
    before, weights = flat(model), (torch.ones(16), torch.rand(16))
    opt.step(lambda i=slice(None): closure_of(model, x, y)(i) * torch.inf, scaler=scaler, weights=weights)
    scaler.update()
    assert torch.equal(flat(model), before) and scaler.get_scale() == 2.0
    opt.step(closure_of(model, x, y), scaler=scaler, weights=weights)
    assert not torch.equal(flat(model), before)


# --- options


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.stack, lambda pair: tuple(one.tolist() for one in pair)])
@pytest.mark.parametrize("name", WEIGHED)
def test_class_weights_are_an_option(name, kind):
    u, v = torch.tensor([1.0, 0.5, 0.25, -0.5]), torch.tensor([0.0, 0.5, 0.75, 1.5])
    opt = made(name, network(), class_weights=kind((u, v)))
    wanted = tuple(u.tolist()), tuple(v.tolist())
    assert opt.class_weights == opt.param_groups[0]["class_weights"] == opt.defaults["class_weights"] == wanted
    assert f"class_weights: {wanted}" in repr(opt)
    assert torch.equal(opt.clean_weights, u.double()) and torch.equal(opt.sharp_weights, v.double())
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = made(name, network())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one in (loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert one.class_weights == wanted and torch.equal(one.sharp_weights, v.double())
    opt.class_weights = (v, u.abs())
    assert torch.equal(opt.clean_weights, v.double()) and torch.equal(opt.sharp_weights, u.double().abs())
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert opt.param_groups[1]["class_weights"] == opt.class_weights


def test_a_resumed_run_continues():
    u, v = [1.0, 0.5, 0.25, 0.0], [0.0, 0.5, 0.75, 1.5]
    data, ends = batches(steps=8), []
    for stop in (8, 3):
        model = network()
        opt = made("FocalSAM", model, class_weights=(u, v))
        for number, (x, y) in enumerate(data):
            if number == stop:
                state, model = (copy.deepcopy(opt.state_dict()), model.state_dict()), network(seed=9)
                model.load_state_dict(state[1])
                opt = made("FocalSAM", model)
                opt.load_state_dict(state[0])
            opt.step(closure_of(model, x, y), targets=y)
        ends.append(flat(model))
    assert torch.equal(*ends)


REFUSED = [
    (([1, 1], [1, 1, 1]), "class_weights must be a pair"),
    (([1, 1], [1, -1]), "class_weights must be a pair"),
    (([1, np.nan], [1, 1]), "class_weights must be a pair"),
    (([1, 1], [1, np.inf]), "class_weights must be a pair"),
    (([0, 0], [0, 0]), "class_weights must be a pair"),
    (([], []), "class_weights must be a pair"),
    (([1, 1],), "class_weights must be a pair"),
    ([1, 1], "class_weights must be a pair"),
    ("uv", "class_weights must be a pair"),
    (3, "class_weights must be a pair"),
    (torch.ones(3, 2), "class_weights must be a pair"),
]


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize(("value", "message"), REFUSED, ids=str)
def test_class_weights_that_are_none_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}.*got [^\n]*$"):
        made(name, network(), class_weights=value)


def test_class_weights_and_counts_are_not_both_given():
    pair = [1.0] * CLASSES, [0.5] * CLASSES
    for name in WEIGHED:
        with pytest.raises(ValueError, match="class_weights and class_counts were both given: leave out one"):
            made(name, network(), class_weights=pair, class_counts=COUNTS)
        opt = made(name, network(), class_counts=COUNTS)
        with pytest.raises(ValueError, match="both given"):
            opt.class_weights = pair
        assert opt.class_weights is None
    with pytest.raises(ValueError, match="class_weights and tail_classes were both given"):
        made("ImbSAM", network(), class_weights=pair, tail_classes=[3])
    model, (x, y) = network(), batches(steps=1)[0]
    opt = made("ImbSAM", model, class_weights=([1.0, 1.0], [0.0, 1.0]))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\)"):
        opt.step(closure_of(model, x, y), targets=y)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_gamma_may_be_a_vector(kind):
    opt = made("FocalSAM", network(), class_counts=COUNTS, gamma=kind([0.0, 1.0, 2.0, 0.5]), lam=0.8)
    assert opt.gamma == opt.param_groups[0]["gamma"] == (0.0, 1.0, 2.0, 0.5)
    wanted = [0.8 * (1 - n / sum(COUNTS)) ** g for n, g in zip(COUNTS, opt.gamma, strict=True)]
    torch.testing.assert_close(opt.sharp_weights, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)
    assert pickle.loads(pickle.dumps(opt)).gamma == opt.gamma
    opt.gamma = 1.0
    assert opt.gamma == 1.0
    for bad in ([1.0], [1.0] * 5, [], [[1.0] * 4], [1.0, -1.0, 1.0, 1.0], [1.0, np.nan, 1, 1], ["1"] * 4, [True] * 4):
        with pytest.raises(ValueError, match=r"^gamma must be .*got"):
            opt.gamma = bad
        with pytest.raises(ValueError, match=r"^gamma must be .*got"):
            made("FocalSAM", network(), class_counts=COUNTS, gamma=bad)
    assert opt.gamma == 1.0
    for bad in ([1.0], [1.0, -1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="^gamma must be"):
            lf.ops.focal_weights(COUNTS, bad)


# --- errors


@every
def test_methods_without_two_losses_refuse_weights(name):
    if EVERY[name].cls.takes_weights:
        return
    model, (x, y) = network(), batches(steps=1)[0]
    opt, before = EVERY[name].make(model, lr=0.1), flat(model)
    with pytest.raises(ValueError, match=f"weights must be left out: {name} does not tell .*multiply the losses"):
        opt.step(closure_of(model, x, y), y, weights=(torch.ones(16), torch.ones(16)))
    assert torch.equal(flat(model), before)


ONES = torch.ones(16)
BAD = {
    "one": (ONES, "weights must be a pair"),
    "one of a pair": ((ONES,), "weights must be a pair"),
    "a number": ((1.0, ONES), "weights must be a pair"),
    "a list of pairs": ([(ONES, ONES)] * 2, "weights must be a pair"),
    "lists": (([1.0] * 16, [1.0] * 16), "weights must be a pair"),
    "of two sizes": ((ONES, ONES[:15]), r"weights must be u and v of one shape \(B,\)"),
    "of a matrix": ((ONES.view(4, 4), ONES.view(4, 4)), r"weights must be u and v of one shape \(B,\)"),
    "of no sample": ((ONES[:0], ONES[:0]), r"weights must be u and v of one shape \(B,\)"),
    "integers": ((ONES.long(), ONES), "weights must be floating point, got torch.int64: give weights.float()"),
    "complex": ((ONES, ONES + 0j), "weights must be floating point"),
    "not finite": ((ONES, ONES * torch.nan), "weights must be finite"),
    "infinite": ((ONES * torch.inf, ONES), "weights must be finite"),
    "negative": (
        (ONES, -ONES),
        r"weights must be finite, and those of the sharp loss >= 0, got u in \[1, 1\] and v in \[-1, -1\]",
    ),
    "with a gradient": ((ONES, ONES.clone().requires_grad_()), r"weights require a gradient.*give weights.detach\(\)"),
    "elsewhere": ((ONES.to("meta"), ONES.to("meta")), "weights must be on the cpu or with the parameters, got meta"),
    "in two places": ((ONES, ONES.to("meta")), r"weights must be u and v of one shape \(B,\), .* on one device"),
    "too many": ((torch.ones(17), torch.ones(17)), "weights has 17 entries, but closure returned 16 losses"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", WEIGHED)
def test_bad_weights_are_named_and_change_nothing(name, case):
    weights, message = BAD[case]
    model, (x, y) = network(), batches(steps=1)[0]
    opt = made(name, model)
    before, state = flat(model), opt.state_dict()
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        opt.step(closure_of(model, x, y), weights=weights)
    assert torch.equal(flat(model), before) and opt.state_dict() == state and not opt.is_perturbed
    opt.step(closure_of(model, x, y), weights=(ONES, ONES))


def test_each_part_has_its_pair():
    model, (x, y) = network(), batches(steps=1)[0]
    opt, closures = made("FocalSAM", model), [closure_of(model, x, y)] * 2
    for weights in ((ONES, ONES), [(ONES, ONES)], [(ONES, ONES)] * 3, [ONES] * 4):
        with pytest.raises(ValueError, match="weights must be a pair .* for each of the 2 closures, got"):
            opt.step(closures, weights=weights)
    opt.step(closures, weights=[(ONES, ONES), [ONES, ONES]])


def test_without_counts_the_error_names_every_remedy():
    model, (x, y) = network(), batches(steps=1)[0]
    with pytest.raises(ValueError, match=r"class_counts must be given .*class_weights=\(u, v\).*weights=\(u, v\)"):
        made("FocalSAM", model).step(closure_of(model, x, y), targets=y)


@pytest.mark.parametrize("base", (SGD, AdamW))
def test_counts_of_the_constructor_come_back(base):
    """A step with weights leaves nothing behind: with targets alone the next one weighs the classes."""
    ends = []
    for weighed in (True, False):
        model = network()
        opt = lf.FocalSAM(model.parameters(), base, lr=0.01, class_counts=COUNTS, gamma=2.0, model=model)
        for number, (x, y) in enumerate(batches(steps=6)):
            if weighed and number % 2:
                opt.step(closure_of(model, x, y), weights=(opt.clean_weights[y], opt.sharp_weights[y]))
            else:
                opt.step(closure_of(model, x, y), targets=y)
        ends.append(flat(model))
    assert torch.equal(*ends)
