"""Scripts written for the published classes: call for call, with nothing changed but the import."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, RMSprop

import ltsam_fast as lf
from ltsam_fast import compat, plain, reference

from . import oracles
from .method_rows import BASES, ETA, SOME, imb_sam_step, on_cpu, tail_of
from .oracles import COUNTS, batches, flat, losses, network, relative_error

RHO = 0.1
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def groups(model, **more):
    return [{"params": list(model.parameters()), "rho": RHO, "norm_eps": 1e-16, **more}]


def script_with(optimizer, model, form, rho_of=None):
    """A script for davda54's class, with a schedule of the radius in the groups."""
    for step, (x, y) in enumerate(batches()):
        for group in optimizer.param_groups if rho_of else ():
            group["rho"] = rho_of(step)
        losses(model, x, y).mean().backward()
        if form == "closure":

            def closure(x=x, y=y):
                loss = losses(model, x, y).mean()
                loss.backward()
                return loss

            assert optimizer.step(closure).shape == ()
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True)
            losses(model, x, y).mean().backward()
            optimizer.second_step(zero_grad=True)


def assert_agrees(model, oracle, base=SGD, options=BASE, split=None, **more):
    """The script's weights are the oracle's: ``more`` goes to the groups or to it."""
    twin = network()
    names = ("rho", "norm_eps", "adaptive", "eta")
    group = {"rho": RHO, "norm_eps": 1e-16, **{name: more.pop(name) for name in names if name in more}}
    groups = split(twin, group) if split else [{"params": list(twin.parameters()), **group}]
    expected, _ = oracle(twin, groups, batches(), base, options, **more)
    assert relative_error(flat(model), expected) < 1e-9


@pytest.mark.parametrize("factor", [1, 2])
def test_imb_sam(factor):
    model = network()
    optimizer = compat.ImbSAM(SGD(model.parameters(), **BASE), model, rho=RHO)
    for x, y in batches():
        imb_sam_step(optimizer, model, x, y, factor)
    own = {"class_counts": COUNTS, "eta": ETA, "tail_weight": factor}
    twin = network()
    expected, _ = oracles.imb_sam(twin, groups(twin), batches(), SGD, BASE, **own)
    assert relative_error(flat(model), expected) < 1e-9


def test_imb_sam_by_closure_has_todays_factor():
    model = network()
    optimizer = compat.ImbSAM(SGD(model.parameters(), **BASE), model, rho=RHO, class_counts=COUNTS, eta=ETA)
    for x, y in batches():
        optimizer.step(lambda x=x, y=y: losses(model, x, y), targets=y)
    twin = network()
    own = {"class_counts": COUNTS, "eta": ETA, "tail_weight": 2}
    assert relative_error(flat(model), oracles.imb_sam(twin, groups(twin), batches(), SGD, BASE, **own)[0]) < 1e-9


def test_sam_around_an_optimizer():
    model = network()
    optimizer = compat.SAM(SGD(model.parameters(), **BASE), model, rho=RHO)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        optimizer.first_step()
        losses(model, x, y).mean().backward()
        optimizer.second_step()
    twin = network()
    expected, _ = oracles.sam(twin, groups(twin), batches(), SGD, BASE)
    assert relative_error(flat(model), expected) < 1e-9


@pytest.mark.parametrize("form", ["phases", "closure"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", SOME)
def test_sam_with_a_base_class(base, adaptive, form):
    kind, options = BASES[base]
    model = network()
    optimizer = compat.SAM(params=model.parameters(), base_optimizer=kind, rho=RHO, adaptive=adaptive, **options)
    script_with(optimizer, model, form)
    assert_agrees(model, oracles.sam, kind, options, adaptive=adaptive, norm_eps=1e-12)


def test_sse_sam():
    model = network()
    optimizer = compat.SSESAM(
        SGD(model.parameters(), **BASE), model, head_rho=RHO, tail_rho=0.2, gamma=0.4, total_epochs=5
    )
    data = batches()
    for epoch in range(5):
        for x, y in data[5 * epoch : 5 * epoch + 5]:
            tail = tail_of(y)
            for number, chosen in enumerate((~tail, tail)):
                (losses(model, x, y)[chosen].sum() / len(y)).backward(retain_graph=True)
                optimizer.compute_and_add_epsilon(n_i=number)
                (losses(model, x, y)[chosen].sum() / len(y)).backward(retain_graph=True)
                optimizer.compute_grad_sum_and_restore_p()
            optimizer.update()
        optimizer.update_rho()
    twin = network()
    own = {"class_counts": COUNTS, "eta": ETA, "tail_rho": 0.2, "switch_step": 10}
    assert relative_error(flat(model), oracles.sse_sam(twin, groups(twin), data, SGD, BASE, **own)[0]) < 1e-9


def test_gnm_with_its_double_epoch_0():
    config = SimpleNamespace(dis_mul=0.5, loss=SimpleNamespace(GCL=SimpleNamespace(reweight_epoch=2)))
    model, data = network(), batches()
    optimizer = compat.GNM(config, model.parameters(), SGD, rho=RHO, adaptive=False, **BASE)
    for step, (x, y) in enumerate(data):
        optimizer.first_step(step // 5, zero_grad=True)
        losses(model, x, y).mean().backward()
        optimizer.second_step(zero_grad=True)

    def noise(step, params):
        halved = 0.5 ** ((step // 5 - 1) // 2)  # 2 in epoch 0, 1 in 1 and 2, 1/2 in 3 and 4
        drawn = [torch.zeros_like(param, requires_grad=False) for param in params]
        reference.gaussian_perturb_(drawn, None, amplitude=halved, step=step)
        return drawn

    twin = network()
    expected, _ = oracles.gnm(twin, groups(twin), data, SGD, BASE, noise=noise, dis_mul=0.5)
    assert relative_error(flat(model), expected) < 1e-9


def test_a_wrapped_optimizer_keeps_its_scheduler_and_state():
    model = network()
    base = SGD(model.parameters(), **BASE)
    schedule = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5)
    optimizer = compat.ImbSAM(base, model, rho=RHO, class_counts=COUNTS)
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups
    (x, y), *_ = batches()
    optimizer.step(lambda: losses(model, x, y), targets=y)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert "momentum_buffer" in base.state[next(model.parameters())]
    with pytest.raises(TypeError, match="optimizer must be"):
        compat.ImbSAM(model.parameters(), model)


# --- ASAM's authors, F-SAM


def weights_scaled(model, group):
    """Samsung's rule: what has "weight" in its name is scaled."""
    named = list(model.named_parameters())
    return [
        {**group, "params": [p for name, p in named if "weight" in name], "adaptive": True},
        {**group, "params": [p for name, p in named if "weight" not in name], "adaptive": False, "eta": 0.0},
    ]


def samsungs_script(minimizer, model):
    schedule = torch.optim.lr_scheduler.StepLR(minimizer.optimizer, 5, 0.5)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        minimizer.ascent_step()
        losses(model, x, y).mean().backward()
        minimizer.descent_step()
        schedule.step()


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("base", SOME)
def test_asam_of_its_authors(base, eta):
    kind, options = BASES[base]
    model = network()
    samsungs_script(compat.ASAM(kind(model.parameters(), **options), model, rho=RHO, eta=eta), model)
    half = lambda t: 0.5 ** (t // 5)  # noqa: E731
    assert_agrees(model, oracles.sam, kind, options, weights_scaled, eta=eta, schedule=half)


def test_sam_of_asams_authors():
    for make in (
        lambda base, model: compat.SAM(base, model, rho=RHO, eta=0.01),
        lambda base, model: compat.SAM(base, model, RHO, 0.01),
        lambda base, model: compat.SAM(optimizer=base, model=model, rho=RHO, eta=0.01),
    ):
        model = network()
        samsungs_script(make(SGD(model.parameters(), **BASE), model), model)
        half = lambda t: 0.5 ** (t // 5)  # noqa: E731
        assert_agrees(model, oracles.sam, schedule=half)


def test_asam_in_several_groups_with_numbers_that_change():
    """Groups of their own learning rates; ``rho`` and ``eta`` are set as scripts set the published attributes."""
    model = network()
    parts = [list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]]
    base = SGD([{"params": parts[0], "lr": 0.01}, {"params": parts[1]}], **BASE)
    minimizer = compat.ASAM(base, model, rho=3.0, eta=5.0)
    minimizer.rho, minimizer.eta = RHO, 0.2
    samsungs_script(minimizer, model)

    def groups(twin, group):
        first, rest = (
            weights_scaled(part, group) for part in (nn.ModuleList([twin[0]]), nn.ModuleList([twin[2], twin[4]]))
        )
        return [{**one, "lr": 0.01} for one in first] + rest

    half = lambda t: 0.5 ** (t // 5)  # noqa: E731
    twin = network()
    order = groups(twin, {"rho": RHO, "norm_eps": 1e-16, "eta": 0.2})
    oracles.sam(twin, order, batches(), SGD, BASE, schedule=half)
    assert relative_error(flat(model), flat(twin)) < 1e-9


def test_asam_survives_copies():
    model = network()
    minimizer = compat.ASAM(SGD(model.parameters(), **BASE), model, rho=RHO)
    pairs = [copy.deepcopy((model, minimizer)), pickle.loads(pickle.dumps((model, minimizer)))]
    for its, one in ((model, minimizer), *pairs):
        samsungs_script(one, its)
        assert torch.equal(flat(its), flat(model))


@pytest.mark.parametrize("form", ["phases", "closure"])
@pytest.mark.parametrize("base", SOME)
def test_friendly_sam(base, form):
    kind, options = BASES[base]
    model = network()
    optimizer = compat.FriendlySAM(model.parameters(), kind, RHO, 0.7, 0.6, 0, **options)
    script_with(optimizer, model, form)
    assert_agrees(model, oracles.friendly_sam, kind, options, norm_eps=1e-12, sigma=0.7, lmbda=0.6)


# --- the forms of SAM


@pytest.mark.parametrize(
    "make",
    [
        lambda base, model: compat.SAM(optimizer=base, model=model, rho=RHO),
        lambda base, model: compat.SAM(base, model=model, rho=RHO),
        lambda base, model: compat.SAM(base, model, RHO),
    ],
)
def test_sam_around_an_optimizer_by_keywords(make):
    model = network()
    optimizer = make(SGD(model.parameters(), **BASE), model)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        optimizer.first_step()
        losses(model, x, y).mean().backward()
        optimizer.second_step()
    assert_agrees(model, oracles.sam)


def test_the_forms_of_sam_are_not_mixed():
    model = network()
    base = SGD(model.parameters(), **BASE)
    for call in (
        lambda: compat.SAM(model.parameters(), SGD, optimizer=base, lr=0.1),
        lambda: compat.SAM(base, model, rho=RHO, lr=0.1),
        lambda: compat.SAM(base, model, model=model),
    ):
        with pytest.raises(TypeError, match="around an optimizer SAM takes optimizer, model, rho and eta"):
            call()
    for bad in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
            compat.SAM(base, model, rho=bad)
        assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize("make", [compat.SAM, compat.ImbSAM, compat.ASAM], ids=lambda cls: cls.__name__)
def test_the_radius_given_is_the_radius(make):
    """Whatever the groups hold: an option of Adadelta's of this name, or what an earlier wrapper left."""
    model = network()
    for base in (Adadelta(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)):
        for rho in (0.3, 0.2):
            optimizer = make(base, model, rho=rho)
            assert optimizer.rho == optimizer.param_groups[0]["rho"] == rho
            assert optimizer.optimizer is base
        optimizer.rho = 0.7
        assert [group["rho"] for group in optimizer.param_groups] == [0.7]
        with pytest.raises(ValueError, match="rho must be a finite number >= 0, got -1"):
            optimizer.rho = -1
        assert optimizer.rho == 0.7


def test_imb_sam_whose_radius_is_set():
    model = network()
    optimizer = compat.ImbSAM(SGD(model.parameters(), **BASE), model, rho=3.0)
    for step, (x, y) in enumerate(batches()):
        optimizer.rho = 0.01 * step
        imb_sam_step(optimizer, model, x, y)

    @oracles.method
    def oracle(p):
        tail = p.tail(COUNTS, ETA)
        return p.gradient(1 / len(p.y) - tail) + p.gradient(tail, p.eps(p.gradient(tail), 0.01 * p.t))

    assert_agrees(model, oracle)


@pytest.mark.parametrize("form", ["phases", "closure"])
def test_a_schedule_of_the_radius_in_the_groups(form):
    model = network()
    optimizer = compat.SAM(model.parameters(), SGD, rho=3.0, **BASE)
    script_with(optimizer, model, form, rho_of=lambda step: 0.01 * step)

    @oracles.method
    def oracle(p):
        return p.gradient(eps=p.eps(p.gradient(), 0.01 * p.t))

    assert_agrees(model, oracle, norm_eps=1e-12)


@pytest.mark.parametrize("cls", [compat.SAM, compat.FriendlySAM], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
def test_step_with_a_closure_that_is_not_the_published_ones(base, cls):
    model, (x, y) = network(), batches(steps=1)[0]
    optimizer = cls(model.parameters(), base, rho=1.0, lr=0.1)
    before = flat(model)

    def backward(returned):
        loss = losses(model, x, y)
        loss.mean().backward()
        return returned(loss)

    wrong = {
        "no parameter has a gradient": (False, lambda: backward(torch.mean)),
        "must call backward.*got \\(16,\\).*ltsam_fast.SAM": (True, lambda: losses(model, x, y)),
        "must call backward.*got \\(16,\\).*ltsam_fast": (True, lambda: backward(lambda loss: loss)),
        "must call backward.*left no gradient": (True, lambda: losses(model, x, y).mean()),
        "must be given alone": (True, [lambda: backward(torch.mean)]),
        "closure must be given": (True, 3),
    }
    for message, (with_gradients, closure) in wrong.items():
        model.zero_grad()
        if with_gradients:
            losses(model, x, y).mean().backward()
        with pytest.raises(ValueError, match=message) as error:
            optimizer.step(closure)
        assert "\n" not in str(error.value)
        assert torch.equal(flat(model), before)
    losses(model, x, y).mean().backward()
    with pytest.raises(ValueError, match="must be given alone"):
        optimizer.step(lambda: losses(model, x, y), targets=y)
    assert torch.equal(flat(model), before)


# --- GSAM


def test_gsam_with_set_closure():
    """The README's script; the learning rate has a schedule of the same kind, with a warm-up."""
    radii, rates = [], []
    model = network()
    base = SGD(model.parameters(), **BASE)
    schedule = compat.LinearScheduler(T_max=30, max_value=0.1, min_value=0.001, warmup_steps=3, optimizer=base)
    schedule.step()
    rho_scheduler = compat.CosineScheduler(T_max=30, max_value=0.2, min_value=0.02)
    optimizer = compat.GSAM(
        params=model.parameters(), base_optimizer=base, model=model, gsam_alpha=0.3, rho_scheduler=rho_scheduler,
        adaptive=True,
    )  # fmt: skip
    for x, y in batches():

        def loss_fn(predictions, targets, smoothing):
            assert smoothing == 0.0
            return nn.functional.cross_entropy(predictions, targets)

        rates.append(base.param_groups[0]["lr"])
        radii.append(optimizer.rho_t)
        optimizer.set_closure(loss_fn, x, y, smoothing=0.0)
        at_w = losses(model, x, y).mean()
        predictions, loss = optimizer.step()
        assert predictions.shape == (len(y), 4) and abs(loss - at_w) < 1e-12
        schedule.step()
        optimizer.update_rho_t()
    assert rates[:4] == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1]) and rates[3 + 9] == pytest.approx(0.1 - 0.099 / 3)
    assert radii[0] == 0.2 and radii[10] == pytest.approx(0.02 + 0.18 * 0.75)

    @oracles.method
    def oracle(p):
        g = p.gradient()
        g_p = p.gradient(eps=p.eps(g, radii[p.t]))
        return g_p - 0.3 * (g - (g @ g_p) / (g_p @ g_p) * g_p)

    rate = [rate / 0.1 for rate in rates]
    assert_agrees(model, oracle, adaptive=True, norm_eps=1e-12, schedule=rate.__getitem__)


def test_gsam_with_a_closure_of_ones_own():
    model = network()
    constant = compat.LinearScheduler(T_max=100, max_value=RHO, min_value=RHO)
    optimizer = compat.GSAM(model.parameters(), SGD(model.parameters(), **BASE), model, 0.4, constant)
    with pytest.raises(ValueError, match="set_closure"):
        optimizer.step()
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.base_optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            loss.backward()
            return outputs, loss

        optimizer.step(closure)
        assert optimizer.update_rho_t() == RHO
    assert_agrees(model, oracles.gsam, norm_eps=1e-12)


def test_the_schedules_of_gsam():
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(base, 10, eta_min=0.01)
    follow = compat.ProportionScheduler(cosine, max_lr=0.1, min_lr=0.01, max_value=2.0, min_value=1.0)
    for _ in range(10):
        assert follow.step() == pytest.approx(1 + (base.param_groups[0]["lr"] - 0.01) / 0.09)
        base.step()
        cosine.step()
    base.param_groups[0]["lr"] = cosine._last_lr[0] = 0.0
    assert follow.step() == 1.0  # below min_lr, as in a warm-up
    power = compat.PolyScheduler(T_max=9, max_value=1.0, min_value=0.2, init_value=0.5, warmup_steps=1)
    assert [power.step() for _ in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.2 + 0.8 / 2**0.5])
    with pytest.raises(ValueError, match="max_lr and max_value must not be below"):
        compat.ProportionScheduler(cosine, 0.1, 0.1, 2.0, 1.0)


# --- WSAM


def clipped(g, limit):
    return g if limit is None else g * min(1.0, limit / (g.norm().item() + 1e-6))


@oracles.method
def weighted_sam(p, gamma, decouple, max_norm, twice=False):
    """WSAM; its ``step`` after a backward() of the script's gets a first gradient of twice the size."""
    a, first = gamma / (1 - gamma), p.gradient() * (2 if twice else 1)
    g_p = clipped(p.gradient(eps=p.eps(first)), max_norm)
    g = clipped(first, max_norm)
    if not decouple:
        return a * g_p + (1 - a) * g
    p.after = -p.lr * a * (g_p - g)
    return g


@pytest.mark.parametrize("form", ["phases", "closure", "closure alone"])
@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("base", ["nesterov", "adamw", "rmsprop"])
def test_weighted_sam(base, max_norm, decouple, form):
    kind, options = BASES[base]
    options = {name: value for name, value in options.items() if name != "maximize"}
    model = network()
    optimizer = compat.WeightedSAM(
        model,
        kind(model.parameters(), **options),
        rho=RHO,
        gamma=0.8,
        adaptive=False,
        decouple=decouple,
        max_norm=max_norm,
    )
    if form == "closure alone":
        for x, y in batches():

            def closure(x=x, y=y):
                loss = losses(model, x, y).mean()
                loss.backward()
                return loss

            loss = losses(model, x, y).mean()
            assert abs(optimizer.step(closure) - loss) < 1e-12
            optimizer.zero_grad()
    else:
        script_with(optimizer, model, form)
    own = {"gamma": 0.8, "decouple": decouple, "max_norm": max_norm, "twice": form == "closure"}
    assert_agrees(model, weighted_sam, kind, options, norm_eps=1e-12, **own)


def test_weighted_sams_alpha_is_in_the_groups():
    model = network()
    base = SGD(
        [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[4].parameters()]}], **BASE
    )
    optimizer = compat.WeightedSAM(model, base, rho=RHO, gamma=0.5)
    for group in optimizer.param_groups:
        assert group["alpha"] == 1.0
        group["alpha"] = 4.0
    script_with(optimizer, model, "phases")
    assert_agrees(model, weighted_sam, norm_eps=1e-12, gamma=0.8, decouple=True, max_norm=None)
    optimizer.param_groups[0]["alpha"] = 1.0
    before = flat(model)
    with pytest.raises(ValueError, match="alpha must be the same in all groups"):
        script_with(optimizer, model, "phases")
    assert torch.equal(flat(model), before)
    smoothed = RMSprop(model.parameters(), lr=0.1, alpha=0.9)
    assert compat.WeightedSAM(model, smoothed).param_groups[0]["alpha"] == 0.9


def test_running_statistics_of_scripts():
    """Those that bypass the second pass do so here, by their own helpers or by themselves."""
    for helpers in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.1), nn.Linear(5, 4)).double()
        twin = copy.deepcopy(model)
        optimizer = compat.WeightedSAM(model, SGD(model.parameters(), lr=0.1), rho=1.0)
        (x, y), *_ = batches()
        twin(x)
        phases = (
            (optimizer.first_step, compat.enable_running_stats),
            (optimizer.second_step, compat.disable_running_stats),
        )
        for phase, stats in phases:
            if helpers:
                stats(model)
                stats(model)
            losses(model, x, y).mean().backward()
            phase(zero_grad=True)
        compat.enable_running_stats(model)
        assert model[1].momentum == 0.1 and not hasattr(model[1], "backup_momentum")
        assert torch.equal(model[1].running_mean, twin[1].running_mean)


# --- LookSAM


@oracles.method
def look_sam_by_tensor(p, k, alpha, kept=False):
    """As rollovd's class: every tensor has its own decomposition. ``kept``: the clean gradient is not cleared."""
    g = p.gradient()
    if p.t % k == 0:
        g_s = p.gradient(eps=p.eps(g)) + (g if kept else 0)
        parts = zip(g_s.split(p.sizes), g.split(p.sizes), strict=True)
        p.state["g_v"] = torch.cat([s - (s @ one) / (one @ one) * one for s, one in parts])
        return g_s
    parts = zip(g.split(p.sizes), p.state["g_v"].split(p.sizes), strict=True)
    return torch.cat([one + alpha * one.norm() / (v.norm() + 1e-8) * v for one, v in parts])


@pytest.mark.parametrize("zero_sam_grad", [True, False])
@pytest.mark.parametrize("base", SOME)
def test_look_sam(base, zero_sam_grad):
    kind, options = BASES[base]
    options = {name: value for name, value in options.items() if name != "maximize"}
    model = network()
    criterion = nn.CrossEntropyLoss()
    optimizer = compat.LookSAM(
        k=3, alpha=0.7, model=model, base_optimizer=kind, criterion=criterion, rho=RHO, **options
    )
    for index, (samples, targets) in enumerate(batches()):
        criterion(model(samples), targets).backward()
        optimizer.step(t=index, samples=samples, targets=targets, zero_sam_grad=zero_sam_grad, zero_grad=True)
    own = {"k": 3, "alpha": 0.7, "kept": not zero_sam_grad}
    assert_agrees(model, look_sam_by_tensor, kind, options, norm_eps=1e-8, **own)


def test_look_sam_where_it_cannot_step():
    model, (x, y) = network(), batches(steps=1)[0]
    optimizer = compat.LookSAM(3, 0.7, model, SGD, nn.CrossEntropyLoss(), lr=0.1)
    before = flat(model)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.step(t=0, samples=x, targets=y)
    losses(model, x, y).mean().backward()
    with pytest.raises(ValueError, match="t must be a multiple of k = 3 in the first step, got 1"):
        optimizer.step(t=1, samples=x, targets=y)
    with pytest.raises(ValueError, match="t must be given"):
        optimizer.step()
    assert torch.equal(flat(model), before)


def test_look_sam_resumes():
    def run(model, optimizer, steps):
        for index, (x, y) in steps:
            losses(model, x, y).mean().backward()
            optimizer.step(t=index, samples=x, targets=y)

    def make(model):
        return compat.LookSAM(4, 0.7, model, AdamW, nn.CrossEntropyLoss(), rho=RHO, lr=0.01)

    data = list(enumerate(batches(steps=10)))
    model, other = network(), network()
    optimizer = make(model)
    run(model, optimizer, data[:6])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed = make(other)
    for one, state in zip((other, resumed), torch.load(file), strict=True):
        one.load_state_dict(state)
    for its, one in ((model, optimizer), (other, resumed)):
        run(its, one, data[6:])
    assert torch.equal(flat(other), flat(model))


# --- ESAM


@oracles.method
def esam_by_tensor(p, beta, gamma, chance):
    """As the published class: tensors that are frozen till the next ascent, and losses above the int(gamma B)-th rise."""
    frozen = p.state.get("frozen", [False] * len(p.sizes))
    within = p.spread_tensors([0.0 if one else 1.0 for one in frozen])
    e = within * p.eps(p.gradient(), p.rho / beta, within=within)
    a = p.ones() / len(p.y)
    if gamma < 0.99:
        rise = p.at(e, p.losses) - p.losses()
        chosen = rise > rise.sort(descending=True).values[max(1, int(gamma * len(p.y))) - 1]
        if not chosen.any():
            chosen = rise == rise.max()
        a = chosen.double() / chosen.sum()
    direction = p.gradient(a, e)
    p.state["frozen"] = [chance.random() > beta for _ in p.sizes]
    if all(p.state["frozen"]):  # the published class fails in the next step
        p.state["frozen"][-1] = False
    return direction


@pytest.mark.parametrize(("beta", "gamma"), [(0.6, 0.5), (1.0, 0.5), (0.5, 1.0), (1.0, 1.0), (0.6, 0.07)])
@pytest.mark.parametrize("base", SOME)
def test_esam(base, beta, gamma):
    kind, options = BASES[base]
    options = {name: value for name, value in options.items() if name != "maximize"}
    model = network()
    loss_fct = nn.CrossEntropyLoss(reduction="none")
    base_optimizer = kind(model.parameters(), **options)
    optimizer = compat.ESAM(
        model.parameters(), base_optimizer, rho=RHO, beta=beta, gamma=gamma, adaptive=False, nograd_cutoff=0.05
    )

    def defined_backward(loss):
        loss.backward()

    random.seed(3)
    for inputs, targets in batches():
        at_w = losses(model, inputs, targets)
        paras = [inputs, targets, loss_fct, model, defined_backward]
        optimizer.paras = paras
        optimizer.step()
        predictions, loss = optimizer.returnthings
        assert predictions.shape == (16, 4) and torch.allclose(loss, at_w, rtol=1e-12)
    own = {"beta": beta, "gamma": gamma, "chance": random.Random(3)}
    assert_agrees(model, esam_by_tensor, kind, options, norm_eps=1e-7, **own)


def test_esam_where_it_cannot_step():
    model, (x, y) = network(), batches(steps=1)[0]
    optimizer = compat.ESAM(model.parameters(), SGD(model.parameters(), lr=0.1), rho=1.0, beta=0.5, gamma=0.5)
    before = flat(model)
    with pytest.raises(ValueError, match="paras must be set"):
        optimizer.step()
    optimizer.paras = [x, y, nn.CrossEntropyLoss(), model, torch.Tensor.backward]
    with pytest.raises(ValueError, match="loss_fct must return the per-sample losses"):
        optimizer.step()
    model[0].requires_grad_(False)
    optimizer.paras[2] = nn.CrossEntropyLoss(reduction="none")
    optimizer.step()
    assert torch.equal(flat(model[0]), before[: 7 * 17]) and not model[0].weight.requires_grad


# --- all of them


AROUND = {
    "SAM": lambda base, model: compat.SAM(base, model, RHO),
    "ImbSAM": lambda base, model: compat.ImbSAM(base, model, RHO),
    "ASAM": lambda base, model: compat.ASAM(base, model, RHO),
    "SSESAM": lambda base, model: compat.SSESAM(base, model, RHO, RHO),
    "GSAM": lambda base, model: compat.GSAM([], base, model, 0.4, compat.LinearScheduler(9, RHO, RHO)),
    "WeightedSAM": lambda base, model: compat.WeightedSAM(model, base, RHO),
    "ESAM": lambda base, model: compat.ESAM([], base, RHO),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_wrapped_optimizer_is_an_optimizer(name):
    model = network()
    sam = lf.SAM(model.parameters(), SGD, lr=0.1)
    for wrong in (sam,) if name == "SAM" else (sam, model.parameters(), None, SGD):
        with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer"):
            AROUND[name](wrong, model)
    base = SGD(model.parameters(), **BASE)
    optimizer = AROUND[name](base, model)
    assert optimizer.optimizer is base and optimizer.param_groups is base.param_groups


def test_the_guide_lists_what_is_here():
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "migrate.md").read_text()
    assert "docs/guides/migrate.md" in compat.__doc__
    for name in compat.__all__:
        assert f"`{name}" in guide, name


def signed_cross_entropy(sign, z, y):
    return sign * F.cross_entropy(z, y, reduction="none")


def test_esam_selects_by_what_is_maximized():
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        model = network()
        random.seed(0)
        sgd = SGD(model.parameters(), lr=0.1, maximize=maximize)
        opt = compat.ESAM(model.parameters(), sgd, rho=0.3, beta=1.0, gamma=0.5)
        for x, y in batches(steps=4):
            criterion = functools.partial(signed_cross_entropy, sign)
            opt.paras = [x, y, criterion, model, torch.Tensor.backward]
            opt.step()
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


def test_a_refused_optimizer_is_as_it_was():
    model = network()
    lbfgs = torch.optim.LBFGS(model.parameters())
    before = {name: value for name, value in lbfgs.param_groups[0].items() if name != "params"}
    with pytest.raises(ValueError, match="LBFGS"):
        compat.ImbSAM(lbfgs, model, 0.1)
    assert {name: value for name, value in lbfgs.param_groups[0].items() if name != "params"} == before


@pytest.mark.parametrize("bad", [{"rho": -1.0}, {"eta": -1.0}, {"eta": float("nan")}])
def test_a_refused_number_leaves_the_optimizer_as_it_was(bad):
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    before = dict(base.param_groups[0])
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        compat.ASAM(base, model, **bad)
    assert base.param_groups[0] == before


def test_a_wrapped_optimizers_groups_keep_their_own_options():
    """Those that are no arguments of the constructor, such as ``perturb``; what an earlier wrapper left does not count."""
    model = network()
    base = SGD([{"params": model[0].parameters(), "perturb": False}, {"params": model[2].parameters()}], lr=0.1)
    compat.GSAM([], base, model, 0.9, compat.LinearScheduler(9, 0.3, 0.3))
    optimizer = compat.ImbSAM(base, model, rho=RHO, eta=3)
    assert [group["perturb"] for group in base.param_groups] == [False, True]
    assert [group["rho"] for group in base.param_groups] == [RHO, RHO] and optimizer.eta == 3
    before = flat(model[0])
    losses(model, *batches()[0]).mean().backward()
    optimizer.first_step()
    losses(model, *batches()[0]).mean().backward()
    optimizer.second_step()
    assert optimizer.is_perturbed and torch.equal(flat(model[0]), before)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (compat.SAM, "params base_optimizer rho adaptive optimizer kwargs"),
        (compat.ASAM, "optimizer model rho eta"),
        (compat.FriendlySAM, "params base_optimizer rho sigma lmbda adaptive kwargs"),
        (compat.ImbSAM, "optimizer model rho class_counts eta tail_weight"),
        (compat.SSESAM, "optimizer model head_rho tail_rho gamma total_epochs"),
        (compat.GNM, "config params base_optimizer rho adaptive kwargs"),
        (compat.GSAM, "params base_optimizer model gsam_alpha rho_scheduler adaptive perturb_eps kwargs"),
        (compat.WeightedSAM, "model base_optimizer rho gamma sam_eps adaptive decouple max_norm kwargs"),
        (compat.LookSAM, "k alpha model base_optimizer criterion rho kwargs"),
        (compat.ESAM, "params base_optimizer rho beta gamma adaptive kwargs"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_signatures_are_the_published_ones(cls, names):
    assert list(inspect.signature(cls).parameters) == names.split()


# --- a step by its phases, whatever their names


def whole_step(optimizer, model, x, y, backward=torch.Tensor.backward, scaler=None, last=None):
    """A step by the phases; ``last`` may stand in the place of the last one."""
    *phases, end = optimizer.phases
    tail = tail_of(y)
    masks = (~tail, tail, tail) if isinstance(optimizer, compat.ImbSAM) else (~tail, ~tail, tail, tail)
    if len(optimizer.phases) == 2:
        masks = (torch.ones_like(tail),) * 2
    begins = isinstance(optimizer, compat.GNM)
    for number, phase in enumerate(phases):
        if not begins:
            backward((losses(model, x, y) * masks[number]).mean())
        first = {"scaler": scaler} if scaler is not None and not number else {}
        epsilon = {"n_i": number // 2} if phase == "compute_and_add_epsilon" else {}
        getattr(optimizer, phase)(**epsilon, **first)
        if optimizer.phases == ("first_step", "second_step"):
            optimizer.zero_grad()
    if end != "update":
        backward((losses(model, x, y) * masks[len(phases)]).mean())
    (last or getattr(optimizer, end))()
    optimizer.zero_grad()


CONFIG = SimpleNamespace(dis_mul=0.5, loss=SimpleNamespace(GCL=SimpleNamespace(reweight_epoch=2)))
PHASED = {
    **AROUND,
    "FriendlySAM": lambda base, model: compat.FriendlySAM(model.parameters(), type(base), RHO, **base.defaults),
    "GNM": lambda base, model: compat.GNM(CONFIG, model.parameters(), type(base), RHO, **base.defaults),
}


ONE_FORM = {
    ("first phase", "ASAM"): "ascent_step takes no scaler",
    ("last phase", "SSESAM"): "update leaves no gradient for a scaler to look at",
    ("last phase", "FriendlySAM"): "the first phase has to know the scale of what is kept",
}


@pytest.mark.parametrize("base", [SGD, RMSprop])
@pytest.mark.parametrize("form", ["first phase", "last phase"])
@pytest.mark.parametrize("name", PHASED)
def test_phases_with_a_scaler(name, form, base):
    """It is given to the first phase, or takes the last one; an overflow skips the step."""
    if (form, name) in ONE_FORM:
        pytest.skip(ONE_FORM[form, name])
    ends = []
    for scaled in (False, True):
        model = network()
        random.seed(0)
        optimizer = PHASED[name](base(model.parameters(), lr=0.1), model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for number, (x, y) in enumerate(batches(steps=4)):
            if not scaled:
                if number != 2:
                    whole_step(optimizer, model, x, y)
                continue
            overflow = torch.inf if number == 2 else 1.0

            def backward(loss, scaler=scaler, overflow=overflow):
                scaler.scale(loss * overflow).backward()

            before = flat(model)
            if form == "first phase":
                whole_step(optimizer, model, x, y, backward, scaler)
            else:
                whole_step(optimizer, model, x, y, backward, last=functools.partial(scaler.step, optimizer))
            scaler.update()
            assert torch.equal(flat(model), before) == (number == 2)
        ends.append(flat(model))
    if name not in ("ESAM", "GNM"):  # whose draws go by the steps, skipped ones included
        assert relative_error(*ends) < 1e-8


def into_buckets(model):
    """Has gradients lie where every backward writes: DDP's with ``gradient_as_bucket_view=True`` do."""
    for param in model.parameters():
        bucket = torch.zeros(param.numel() + 1, dtype=param.dtype)

        def move(param, bucket=bucket):
            view = bucket[1:].view_as(param)
            view.copy_(param.grad)
            param.grad = view

        param.register_post_accumulate_grad_hook(move)


@pytest.mark.parametrize("name", [*PHASED, "LookSAM"])
def test_gradients_in_buckets(name):
    ends = []
    for buckets in (False, True):
        model = network()
        random.seed(0)
        if buckets:
            into_buckets(model)
        if name == "LookSAM":
            optimizer = compat.LookSAM(2, 0.7, model, SGD, nn.CrossEntropyLoss(), RHO, lr=0.1)
        else:
            optimizer = PHASED[name](SGD(model.parameters(), lr=0.1), model)
        for step, (x, y) in enumerate(batches(steps=4)):
            if name == "LookSAM":
                losses(model, x, y).mean().backward()
                optimizer.step(step, x, y)
            else:
                whole_step(optimizer, model, x, y)
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", PHASED)
def test_hooks_are_called_once_a_step(name):
    model, calls = network(), []
    optimizer = PHASED[name](SGD(model.parameters(), lr=0.1), model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    (x, y), *_ = batches(steps=1)
    whole_step(optimizer, model, x, y)
    assert calls == ["before", "after"] and optimizer.param_groups[0]["steps"] == 1
    if isinstance(optimizer, (compat.WeightedSAM, compat.GSAM)):
        optimizer.step(lambda: losses(model, x, y).mean().backward())
        assert calls == ["before", "after"] * 2


def test_between_two_phases_no_step_begins():
    (x, y), *_ = batches(steps=1)
    for name in ("SAM", "GSAM", "WeightedSAM"):
        model = network()
        optimizer = AROUND[name](SGD(model.parameters(), lr=0.1), model)
        losses(model, x, y).mean().backward()
        optimizer.first_step()
        with pytest.raises(ValueError, match=r"step\(\) was called where second_step\(\) is next"):
            optimizer.step(lambda model=model: losses(model, x, y).mean().backward())
    sse = AROUND["SSESAM"](SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=r"call compute_and_add_epsilon\(\), .*, update\(\)"):
        sse.step(lambda: losses(model, x, y))


# --- whole scripts, for the SAM that most people have and for Focal-SAM


def script_with_two_steps(SAM, model, data, adaptive):
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.1, momentum=0.9, weight_decay=0.0005
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.2)
    for inputs, targets in data:
        predictions = model(inputs)
        loss = F.cross_entropy(predictions, targets, label_smoothing=0.1, reduction="none")
        loss.mean().backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(inputs), targets, label_smoothing=0.1, reduction="none").mean().backward()
        optimizer.second_step(zero_grad=True)
        with torch.no_grad():
            _ = torch.argmax(predictions.data, 1) == targets
        scheduler.step()
    return flat(model)


def script_with_closure(SAM, model, data, adaptive):
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.1, momentum=0.9, weight_decay=0.0005
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.2)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    for input, output in data:

        def closure(input=input, output=output):
            loss = loss_function(model(input), output)
            loss.backward()
            return loss

        loss = loss_function(model(input), output)
        loss.backward()
        optimizer.step(closure)
        optimizer.zero_grad()
        scheduler.step()
    return flat(model)


def script_with_three_steps(FocalSAM, model, data, scaler=None):
    criterion = nn.CrossEntropyLoss(reduction="none")
    optimizer = FocalSAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=False, lr=0.1, momentum=0.9, weight_decay=2e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    flat_gamma, sharpness = 3.0, 0.5
    for images, target in data:
        classes = torch.unique(target)
        counts = torch.tensor(COUNTS, dtype=images.dtype)
        focus = sharpness * (1 - counts / counts.sum()).pow(flat_gamma)[classes]
        mask = (target[:, None] == classes[None, :]).to(images.dtype)

        def weighted(loss, weight, mask=mask):
            return (mask * loss[:, None] * weight[None, :]).sum() / len(mask)

        def backward(loss, **kwargs):
            (loss if scaler is None else scaler.scale(loss)).backward(**kwargs)
            if scaler is not None:
                scaler.unscale_(optimizer)

        loss = criterion(model(images), target)
        backward(weighted(loss, 1 - focus), retain_graph=True)
        optimizer.first_step()
        backward(weighted(loss, focus))
        optimizer.second_step()
        loss = criterion(model(images), target)
        backward(weighted(loss, focus))
        optimizer.third_step()
        scheduler.step()
    return flat(model)


def smoothed(model, x, y, perturbed):
    return F.cross_entropy(model(x), y, label_smoothing=0.1, reduction="none")


@on_cpu
@pytest.mark.parametrize("script", [script_with_two_steps, script_with_closure])
@pytest.mark.parametrize("adaptive", [False, True])
def test_scripts_for_sam(script, adaptive, backend):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}
    model = network()
    script(compat.SAM, model, batches(), adaptive)
    more = {"adaptive": adaptive, "norm_eps": 1e-12, "schedule": lambda t: 0.2 ** (t // 10), "loss": smoothed}
    assert_agrees(model, oracles.sam, options=options, **more)


@on_cpu
def test_a_script_for_focal_sam(backend):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
    model = network()
    script_with_three_steps(lf.FocalSAM, model, batches())
    more = {"norm_eps": 1e-12, "schedule": lambda t: 0.5 * (1 + math.cos(math.pi * t / 30))}
    assert_agrees(model, oracles.focal_sam, options=options, class_counts=COUNTS, gamma=3.0, lam=0.5, **more)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the plain loop's
def test_scripts_give_what_the_plain_loops_give():
    for adaptive in (False, True):
        results = [script_with_two_steps(SAM, network(), batches(), adaptive) for SAM in (lf.SAM, plain.SAM)]
        assert relative_error(*results) < 1e-9
    results = [script_with_three_steps(kind, network(), batches()) for kind in (lf.FocalSAM, plain.FocalSAM)]
    assert relative_error(*results) < 1e-9


def test_reference_closure_may_zero_gradients_and_return_what_it_likes():
    results = []
    for returned in ("loss", "detached", "number", "nothing"):
        model = network()
        opt = compat.SAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
        for x, y in batches(steps=3):

            def closure(x=x, y=y, model=model, opt=opt, returned=returned):
                opt.zero_grad()
                loss = losses(model, x, y).mean()
                loss.backward()
                return {"loss": loss, "detached": loss.detach(), "number": loss.item()}.get(returned)

            closure()
            value = opt.step(closure)
            assert returned != "loss" or (value.shape == () and not value.requires_grad)
            opt.zero_grad()
        results.append(flat(model))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("base", [SGD, Adam, RMSprop])
def test_an_error_in_a_reference_closure_leaves_the_original_weights(base, error):
    model, (x, y) = network(), batches(steps=1)[0]
    opt = compat.SAM(model.parameters(), base, rho=1.0, lr=0.1)
    before = flat(model)

    def closure():
        assert not torch.equal(flat(model), before)
        losses(model, x, y).mean().backward()
        raise error

    losses(model, x, y).mean().backward()
    with pytest.raises(error):
        opt.step(closure)
    assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())
    opt.state_dict()


def test_a_closure_that_forgot_backward():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = compat.SAM(model.parameters(), SGD, lr=0.1)
    before = flat(model)
    losses(model, x, y).mean().backward()
    with pytest.raises(ValueError, match="closure must call backward"):
        opt.step(lambda: losses(model, x, y).mean())
    assert torch.equal(flat(model), before)
