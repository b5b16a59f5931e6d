"""Behaviours that every method has, whatever it computes: a table of methods by behaviours."""

import copy
import functools
import io
import pickle
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from ltsam_fast.backend import backend_for

from . import oracles
from .methods import BASES, EACH, INTERFACES, METHODS, RHO, SOME, on_cpu, one_group
from .oracles import CLASSES, batches, flat, losses, network, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@functools.cache
def expected(method, base):
    return METHODS[method].oracle(*BASES[base], batches())


def each(*names):
    return pytest.mark.parametrize("name", names)


def with_bases(*names):
    return pytest.mark.parametrize("base", names)


by_interface = pytest.mark.parametrize("interface", INTERFACES)


# --- the formula


@on_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@by_interface
@with_bases(*BASES)
@each(*METHODS)
def test_agrees_with_oracle(name, base, interface, dtype, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model = network(dtype)
    opt = method.make(model, kind, **options)
    weights = method.drive(interface, opt, model, batches(dtype))
    assert relative_error(weights, expected(name, base)[0]) < TOLERANCE[dtype]


@on_cpu
@by_interface
@with_bases("momentum", "adam", "rmsprop")
@each(*METHODS)
def test_bfloat16_stays_finite_and_learns(name, base, interface, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model = network(torch.bfloat16)
    x, y = batches(torch.bfloat16, 1)[0]
    before = losses(model, x, y).mean().item()
    opt = method.make(model, kind, **options)
    assert method.drive(interface, opt, model, [(x, y)] * 10).isfinite().all()
    assert losses(model, x, y).mean().item() < before


@on_cpu
@each(*METHODS)
def test_returns_the_loss_at_the_unperturbed_weights(name, backend):
    method, (kind, options) = METHODS[name], BASES["momentum"]
    model = network()
    opt = method.make(model, kind, **options)
    results = [method.closure(opt, model, x, y) for x, y in batches()]
    assert all(
        r.shape == () and not r.requires_grad and r.grad_fn is None and r.dtype == torch.float64 for r in results
    )
    assert [r.item() for r in results] == pytest.approx(expected(name, "momentum")[1], rel=1e-9)


@each(*EACH)
def test_calls_the_closure_twice_and_clears_gradients(name):
    method, model, (x, y) = METHODS[name], network(), batches(steps=1)[0]
    opt = method.make(model, lr=0.1)
    calls = []
    opt.step(lambda: calls.append(torch.is_grad_enabled()) or losses(model, x, y), targets=y)
    assert calls == [True, True]
    assert all(p.grad is None for p in model.parameters())


@on_cpu
@each(*EACH)
def test_without_radius_is_the_base_optimizer(name, backend):
    model, twin = network(), network()
    opt = METHODS[name].make(model, SGD, rho=0.0, lr=0.1, momentum=0.9)
    plain = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        METHODS[name].closure(opt, model, x, y)
        plain.zero_grad()
        losses(twin, x, y).mean().backward()
        plain.step()
    assert relative_error(flat(model), flat(twin)) < 1e-12


@on_cpu
@with_bases("nesterov", "adam", "rmsprop")
@each(*METHODS)
def test_clips_like_clip_grad_norm(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    for limit in (0.05, 1e3):
        model = network()
        opt = method.make(model, kind, max_grad_norm=limit, **options)
        weights = method.drive("closure", opt, model, batches(steps=8))
        assert relative_error(weights, method.oracle(kind, options, batches(steps=8), limit)[0]) < 1e-9


@on_cpu
@by_interface
@each(*METHODS)
def test_same_bits_on_every_run(name, interface, backend):
    method, runs = METHODS[name], []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(oracles.FEATURES, 3000), nn.Tanh(), nn.Linear(3000, CLASSES))
            opt = method.make(model, lr=0.1, momentum=0.9)
            x, y = batches(torch.float32, 1)[0]
            v = method.weights[1].to(x.dtype)[y]
            for i, p in enumerate(
                model.parameters()
            ):  # matmul may differ between numbers of threads, the passes may not
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            grads = [p.grad.clone() for p in model.parameters()]
            for phase in opt.phases:
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.grad = g * (1 + v.mean())
                getattr(opt, phase)()
            runs.append(flat(model))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*runs)


@on_cpu
@with_bases("sgd", "adam", "rmsprop")
@each(*EACH)
def test_backward_through_overwritten_weights_is_noticed(name, base, backend):
    """The passes write past autograd, which must know all the same."""
    method, (kind, options), model = METHODS[name], BASES[base], network()
    opt = method.make(model, kind, **options)
    for phase in opt.phases:
        losses(model, *batches(steps=1)[0]).mean().backward()
        outdated = losses(model, *batches(steps=1)[0]).mean()
        getattr(opt, phase)()
        if opt.is_perturbed or phase == opt.phases[-1]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outdated.backward()


# --- groups


@on_cpu
@with_bases("nesterov", "adam", "adadelta")
@each(*EACH)
def test_groups_have_their_own_options(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]

    def groups(model):
        first, second, third = model[0], model[2], model[4]
        return [
            {"params": list(first.parameters()), "rho": 0.3, "lr": 0.02},
            {"params": list(second.parameters()), "perturb": False},
            {"params": [third.weight], "adaptive": True, "eta": 0.1, "norm_eps": 0.5},
            {"params": [third.bias], "rho": 0.0},
        ]

    model = network()
    opt = method.cls(groups(model), kind, rho=RHO, **method.options, **options)
    weights = method.drive("closure", opt, model, batches())
    oracle, _ = oracles.trajectory(
        lambda model: [{"rho": RHO} | group for group in groups(model)], *method.weights, kind, options, batches()
    )
    assert relative_error(weights, oracle) < 1e-9


@by_interface
@each(*EACH)
def test_group_left_out_is_not_perturbed_and_not_in_the_norm(name, interface):
    model = network()
    left_out, perturbed = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    groups = [{"params": left_out, "perturb": False}, {"params": perturbed}]
    opt = METHODS[name].cls(groups, SGD, rho=RHO, lr=0.1, **METHODS[name].options)
    before, kept = flat(perturbed), flat(left_out)
    seen = []

    def look(*_):
        seen.append((flat(left_out), (flat(perturbed) - before).norm().item()))

    model.register_forward_pre_hook(look)
    METHODS[name].drive(interface, opt, model, batches(steps=1))
    assert [torch.equal(weights, kept) for weights, _ in seen] == [True, True]
    assert [distance for _, distance in seen] == pytest.approx([0.0, RHO], rel=1e-9)


@on_cpu
@with_bases("momentum", "adam", "rmsprop")
@each(*EACH)
def test_add_param_group_later(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model, twin, data = network(), network(), batches(steps=12)

    def split(model):
        return [*model[0].parameters(), *model[2].parameters()], list(model[4].parameters())

    opt = method.cls(split(model)[0], kind, rho=RHO, **method.options, **options)
    method.drive("closure", opt, model, data[:5])
    opt.add_param_group({"params": split(model)[1], "rho": 0.4, "lr": 0.003})
    method.drive("closure", opt, model, data[5:])
    assert opt.param_groups is opt.base_optimizer.param_groups and len(opt.param_groups) == 2

    early, late = split(twin)
    plain = kind(early, **options)
    groups = [{"params": early, "rho": RHO}]
    for number, (x, y) in enumerate(data):
        if number == 5:
            plain.add_param_group({"params": late, "lr": 0.003})
            groups.append({"params": late, "rho": 0.4})
        twin.zero_grad()
        oracles.step(groups, lambda _, x=x, y=y: losses(twin, x, y), y, *method.weights, plain)
    assert relative_error(flat(model), flat(twin)) < 1e-9


@each(*EACH)
def test_takes_all_that_torch_takes_as_parameters(name):
    method, (x, y) = METHODS[name], batches(steps=1)[0]
    model = network()
    method.drive("closure", method.make(model, lr=0.1), model, [(x, y)])
    for parameters in (
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m[0].parameters()}, {"params": [*m[2].parameters(), *m[4].parameters()]}],
        lambda m: [{"params": m[0].named_parameters()}, {"params": nn.Sequential(m[2], m[4]).named_parameters()}],
    ):
        other = network()
        opt = method.cls(parameters(other), SGD, rho=RHO, lr=0.1, **method.options)
        method.drive("closure", opt, other, [(x, y)])
        assert torch.equal(flat(other), flat(model))
        assert "param_names" not in opt.param_groups[0] or opt.state_dict()["param_groups"][0]["param_names"]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
        (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
        (Adam, {"lr": 0.01, "foreach": True}),
        (AdamW, {"lr": 0.01, "fused": True}),
        (Adam, {"lr": torch.tensor(0.01)}),
        (torch.optim.RMSprop, {"lr": 0.01, "foreach": True}),
        (torch.optim.Adagrad, {"lr": 0.01, "fused": True}),
        (functools.partial(SGD, momentum=0.9), {"lr": 0.1}),
    ],
    ids=str,
)
@each(*EACH)
def test_takes_the_base_optimizers_options(name, base, options):
    method, data = METHODS[name], batches(steps=5)
    plain = {key: float(value) for key, value in options.items() if key in ("lr", "momentum")}
    if isinstance(base, functools.partial):
        plain |= base.keywords
    model, twin = network(), network()
    method.drive("closure", method.make(model, base, **options), model, data)
    method.drive("closure", method.make(twin, getattr(base, "func", base), **plain), twin, data)
    assert relative_error(flat(model), flat(twin)) < 1e-6  # the learning rate's tensor is float32


@each(*EACH)
def test_subclasses_of_a_fused_base_step_by_themselves(name):
    class Halved(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] /= 2
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 2

    model, twin, data = network(), network(), batches(steps=5)
    METHODS[name].drive("closure", METHODS[name].make(model, Halved, lr=0.2, momentum=0.9), model, data)
    METHODS[name].drive("closure", METHODS[name].make(twin, SGD, lr=0.1, momentum=0.9), twin, data)
    assert relative_error(flat(model), flat(twin)) < 1e-12


# --- state


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def two_groups(method, model, kind, options):
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.2, "lr": 0.01},
        {"params": [*model[2].parameters(), *model[4].parameters()], "adaptive": True},
    ]
    opt = method.cls(groups, kind, rho=RHO, **method.options, **options)
    return opt, CosineAnnealingLR(opt, T_max=20)


@on_cpu
@by_interface
@with_bases(*BASES)
@each(*EACH)
def test_resumes_bit_for_bit(name, base, interface, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    data = batches(torch.float32, 9)

    def run(model, opt, schedule, data):
        for batch in data:
            method.drive(interface, opt, model, [batch])
            schedule.step()
        return flat(model)

    model = network(torch.float32)
    whole = run(model, *two_groups(method, model, kind, options), data)

    model = network(torch.float32)
    opt, schedule = two_groups(method, model, kind, options)
    run(model, opt, schedule, data[:4])
    saved = saved_and_loaded([part.state_dict() for part in (model, opt, schedule)])
    model = network(torch.float32, seed=5)
    opt, schedule = two_groups(method, model, kind, options)
    run(model, opt, schedule, data[:1])
    for part, state in zip((model, opt, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert torch.equal(run(model, opt, schedule, data[4:]), whole)
    assert opt.state is opt.base_optimizer.state and opt.param_groups is opt.base_optimizer.param_groups


@by_interface
@with_bases(*SOME)
@each(*EACH)
def test_checkpoint_holds_the_base_state_and_no_weights(name, base, interface):
    method, (kind, options) = METHODS[name], BASES[base]
    model, twin = network(), network()
    opt = method.make(model, kind, **options)
    method.drive(interface, opt, model, batches(steps=2))
    plain = kind(twin.parameters(), **options)
    losses(twin, *batches(steps=1)[0]).mean().backward()
    plain.step()
    entries = {key for state in plain.state_dict()["state"].values() for key in state}
    for state in opt.state_dict()["state"].values():
        assert entries <= set(state) <= entries | {"step"}


@on_cpu
@with_bases(*(base for base, (kind, _) in BASES.items() if kind in (SGD, Adam, AdamW)), "rmsprop", "adadelta")
@each(*EACH)
def test_goes_on_from_the_plain_optimizers_checkpoint(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    data = batches(steps=10)
    model = network()
    plain = kind(model.parameters(), **options)

    def run(data):
        for x, y in data:
            plain.zero_grad()
            losses(model, x, y).mean().backward()
            plain.step()

    run(data[:5])
    other = copy.deepcopy(model)
    saved = saved_and_loaded(plain.state_dict())
    run(data[5:])
    opt = method.make(other, kind, **{**options, "lr": 77.0, "rho": 0.0})
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.0  # also for Adadelta, whose own rho is another thing
    assert opt.param_groups[0]["lr"] == options["lr"]
    method.drive("closure", opt, other, data[5:])
    assert relative_error(flat(other), flat(model)) < 1e-12


@each(*EACH)
def test_a_plain_checkpoint_leaves_the_groups_own_options(name):
    method, model = METHODS[name], network()
    parts = [list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]]
    plain = SGD([{"params": part} for part in parts], lr=0.3)
    groups = [{"params": parts[0], "perturb": False}, {"params": parts[1], "rho": 0.7, "adaptive": True}]
    opt = method.cls(groups, SGD, rho=RHO, lr=0.1, **method.options)
    opt.load_state_dict(plain.state_dict())
    assert [(g["lr"], g["perturb"], g["rho"], g["adaptive"]) for g in opt.param_groups] == [
        (0.3, False, RHO, False),
        (0.3, True, 0.7, True),
    ]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@with_bases(*SOME)
@each(*EACH)
def test_copies_go_on_alike(name, base, duplicate):
    method, (kind, options) = METHODS[name], BASES[base]
    data = batches(torch.float32, 8)
    model = network(torch.float32)
    opt = method.make(model, kind, model=model, max_grad_norm=0.5, **options)
    method.drive("closure", opt, model, data[:4])
    other_model, other = duplicate((model, opt))
    assert other.model is other_model and other.max_grad_norm == 0.5
    assert other.param_groups[0]["params"][0] is other_model[0].weight
    assert other.state is other.base_optimizer.state and other.state is not opt.state
    continued = method.drive("closure", other, other_model, data[4:])
    assert torch.equal(method.drive("closure", opt, model, data[4:]), continued)


@each(*EACH)
def test_between_phases_there_is_no_state_to_save(name):
    method, model = METHODS[name], network()
    opt = method.make(model, lr=0.1, momentum=0.9)
    method.drive("closure", opt, model, batches(steps=2))
    saved, before = opt.state_dict(), flat(model)
    for stop in range(1, len(opt.phases)):
        for phase in opt.phases[:stop]:
            losses(model, *batches(steps=1)[0]).mean().backward()
            getattr(opt, phase)()
        for attempt in (
            opt.state_dict,
            lambda: opt.load_state_dict(saved),
            lambda: copy.deepcopy(opt),
            lambda: pickle.dumps(opt),
            lambda: method.closure(opt, model, *batches(steps=1)[0]),
        ):
            with pytest.raises(ValueError, match=r"first_step|between two phases"):
                attempt()
        opt.restore()
        assert torch.equal(flat(model), before)
        opt.state_dict()
        model.zero_grad()


# --- like any torch optimizer


@by_interface
@each(*EACH)
def test_learning_rate_schedulers_take_it_without_a_warning(name, interface):
    method = METHODS[name]
    for make in (
        lambda opt: StepLR(opt, 2, 0.5),
        lambda opt: CosineAnnealingLR(opt, 10),
        lambda opt: OneCycleLR(opt, 0.2, total_steps=10),
    ):
        model = network()
        opt = method.make(model, SGD, lr=0.1, momentum=0.9)
        schedule = make(opt)
        rates = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in batches(steps=4):
                method.drive(interface, opt, model, [batch])
                schedule.step()
                rates.append(opt.param_groups[0]["lr"])
                assert opt.base_optimizer.param_groups[0]["lr"] == rates[-1]
        assert len(set(rates)) > 1


@with_bases("momentum", "rmsprop")
@each(*EACH)
def test_step_hooks_run_once(name, base):
    method, (kind, options), model = METHODS[name], BASES[base], network()
    opt = method.make(model, kind, **options)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    method.drive("closure", opt, model, batches(steps=2))
    assert seen == ["before", "after"] * 2


@each(*EACH)
def test_is_a_torch_optimizer(name):
    method, model = METHODS[name], network()
    opt = method.make(model, AdamW, lr=0.01)
    assert isinstance(opt, torch.optim.Optimizer)
    own = {"rho", "adaptive", "eta", "norm_eps", "perturb", "steps", "skipped_steps"}
    assert set(AdamW(model.parameters()).defaults) | own == set(opt.defaults)
    assert opt.defaults["lr"] == 0.01 and opt.defaults["rho"] == RHO
    assert repr(opt).startswith(method.cls.__name__) and "rho: 0.1" in repr(opt) and "lr: 0.01" in repr(opt)
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@on_cpu
@by_interface
@with_bases(*SOME)
@each(*EACH)
def test_parameters_stay_where_they_are(name, base, interface, backend):
    method, (kind, options), model = METHODS[name], BASES[base], network()
    opt = method.make(model, kind, **options)
    addresses = [p.data_ptr() for p in model.parameters()]
    method.drive(interface, opt, model, batches(steps=3))
    assert [p.data_ptr() for p in model.parameters()] == addresses


# --- batches in parts


@on_cpu
@pytest.mark.parametrize("sizes", [(16,), (8, 8), (5, 10, 1)])
@with_bases("momentum", "adamw", "rmsprop")
@each(*METHODS)
def test_a_batch_in_parts_is_one_batch(name, base, sizes, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model, data = network(), batches(steps=6)
    opt = method.make(model, kind, **options)
    reported = []
    for x, y in data:
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        closures = [lambda xi=xi, yi=yi: losses(model, xi, yi) for xi, yi in parts]
        targets = [yi for _, yi in parts]
        reported.append(opt.step(closures, targets=targets).item())
    weights, means = method.oracle(kind, options, data)
    assert relative_error(flat(model), weights) < 1e-9
    assert reported == pytest.approx(means, rel=1e-9)


# --- mixed precision


@on_cpu
@pytest.mark.parametrize("enabled", [True, False])
@with_bases("momentum", "adamw", "rmsprop")
@each(*METHODS)
def test_scaled_steps_are_the_unscaled_ones(name, base, enabled, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    for limit in (0.0, 0.05):
        model, twin = network(torch.float32), network(torch.float32)
        opt, plain = (method.make(m, kind, max_grad_norm=limit, **options) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3, enabled=enabled)
        for x, y in batches(torch.float32, 8):
            one = method.closure(opt, model, x, y, scaler=scaler)
            scaler.update()
            two = method.closure(plain, twin, x, y)
            assert one.item() == pytest.approx(two.item(), rel=1e-5)
        assert relative_error(flat(model), flat(twin)) < 1e-5
        if enabled:
            assert (
                scaler.get_scale() == 256.0 * 4
            )  # one update a step: 8 good steps, the scale grew with the 3rd and 6th


def snapshot(opt):
    """State with absent buffers as zeros, for the first step of a base optimizer makes them."""
    return {
        (i, key): torch.as_tensor(value).clone()
        for i, param in enumerate(opt.param_groups[0]["params"])
        for key, value in opt.state.get(param, {}).items()
        if value is not None
    }


@on_cpu
@pytest.mark.parametrize("at", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("overflowing", [(1,), (2,), (1, 2)], ids=["pass 1", "pass 2", "both"])
@with_bases(*SOME, "adam-amsgrad")
@each(*EACH)
def test_a_step_that_overflows_changes_nothing(name, base, overflowing, at, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model, twin, data = network(torch.float32), network(torch.float32), batches(torch.float32, 5)
    opt, plain = (method.make(m, kind, **options) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for number, (x, y) in enumerate(data):
        if number == at:
            calls, weights, state = [], flat(model), snapshot(opt)

            def loss(model, x, y, calls=calls):
                calls.append(1)
                return losses(model, x, y) * (1e36 if len(calls) in overflowing else 1.0)

            method.closure(opt, model, x, y, loss, scaler=scaler)
            assert torch.equal(flat(model), weights) and len(calls) == 2
            after = snapshot(opt)
            assert all(torch.equal(after.pop(key), value) for key, value in state.items())
            assert not any(value.any() for value in after.values())
            assert scaler.get_scale() == 2.0**16
            scaler.update()
            assert scaler.get_scale() == 2.0**15
        else:
            method.closure(opt, model, x, y, scaler=scaler)
            scaler.update()
            method.closure(plain, twin, x, y)
    assert scaler.get_scale() == 2.0**15
    assert relative_error(flat(model), flat(twin)) < 1e-5


# --- running statistics


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            nn.BatchNorm2d(3, momentum=None),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.InstanceNorm2d(3),
        )
        self.head = nn.Sequential(nn.Linear(3 * 16, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.head(self.norms(self.conv(x)).flatten(1))


def images(steps, size=7):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(steps)
    ]


def normalized(seed=0):
    torch.manual_seed(seed)
    return Normalized()


def flags(model):
    names = ("training", "momentum", "track_running_stats")
    return [tuple(getattr(module, name, None) for name in names) for module in model.modules()]


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@by_interface
@each(*EACH)
def test_statistics_are_those_of_the_unperturbed_pass(name, interface):
    method, data = METHODS[name], images(4)
    model, twin = normalized(), normalized()
    before = flags(model)
    opt = method.make(model, SGD, lr=0.0, model=model)  # the weights stay, so a twin sees the same activations
    for batch in data:
        method.drive(interface, opt, model, [batch])
        twin(batch[0])
        assert same(buffers(model), buffers(twin))
    assert flags(model) == before


@by_interface
@each(*EACH)
def test_without_model_every_pass_is_counted_as_published(name, interface):
    method, model = METHODS[name], normalized()
    opt = method.make(model, SGD, lr=0.0)
    method.drive(interface, opt, model, images(3))
    assert model.head[1].num_batches_tracked == 6


@each(*EACH)
def test_statistics_are_left_alone_where_the_user_froze_them(name):
    method, model = METHODS[name], normalized()
    model.norms.eval()
    opt = method.make(model, SGD, lr=0.1, model=model)
    before, were = buffers(model.norms), flags(model)
    method.drive("closure", opt, model, images(3))
    assert same(buffers(model.norms), before) and flags(model) == were
    assert model.head[1].num_batches_tracked == 3


@each(*EACH)
def test_two_optimizers_of_one_model_share_its_statistics(name):
    method, model = METHODS[name], normalized()
    before = flags(model)
    params = list(model.parameters())
    first, second = (
        method.cls(half, SGD, rho=RHO, lr=0.01, model=model, **method.options) for half in (params[:4], params[4:])
    )
    for x, y in images(3):  # interleaved phases
        for one, two in zip(first.phases, second.phases, strict=True):
            losses(model, x, y).mean().backward()
            grads = [p.grad.clone() for p in params]
            getattr(first, one)()
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            getattr(second, two)()
            model.zero_grad()
    assert flags(model) == before
    clean = len(first.phases) - 1
    assert model.head[1].num_batches_tracked == 3 * clean

    def inner():  # a step within a step
        method.closure(second, model, x, y)
        return losses(model, x, y)

    first.step(inner, targets=y)
    assert flags(model) == before and buffers(model).keys() == buffers(normalized()).keys()


# --- parameters without gradients


class Parts(nn.Module):
    """Quadratic losses in any of several tensors, so that a pass can leave some out."""

    def __init__(self, count=4):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.ParameterList(
            nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(count)
        )

    def losses(self, x, used):
        return sum((x @ self.w[i] - i - 1).square().sum(1) for i in used)


@on_cpu
@with_bases("sgd", *SOME)
@each(*(name for name, method in METHODS.items() if method.groups is one_group))
def test_parameters_without_gradient_in_a_pass(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    options = {**options, "lr": 0.01}
    # Which tensors each pass uses: only the first, only the second, one that appears later, and one that never does.
    schedule = [((0, 1), (0, 2)), ((0,), (0, 1, 2)), ((0, 1), (0,)), ((2, 0), (1, 2)), ((0, 1, 2), (0, 1, 2))] * 2
    model, twin = Parts(), Parts()
    opt = method.make(model, kind, **options)
    options, sign = oracles.minimizing(options)
    plain = kind(twin.parameters(), **options)
    groups = [{"params": list(twin.parameters()), "rho": RHO, "adaptive": method.options.get("adaptive", False)}]
    generator = torch.Generator().manual_seed(4)
    for passes in schedule:
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        y = torch.randint(0, CLASSES, (5,), generator=generator)
        calls = iter(passes)
        opt.step(lambda x=x, calls=calls: model.losses(x, next(calls)), targets=y)
        twin.zero_grad()
        oracles.step(groups, lambda n, x=x, p=passes: sign * twin.losses(x, p[n]), y, *method.weights, plain)
        assert relative_error(flat(model), flat(twin)) < 1e-9
    assert torch.equal(model.w[3], Parts().w[3]) and model.w[3] not in opt.state


@on_cpu
@with_bases("momentum", "adam", "rmsprop")
@each(*EACH)
def test_clipping_counts_gradients_of_any_pass(name, base, backend):
    """A gradient that only the first pass has, and Focal-SAM keeps, is part of the norm."""
    method, (kind, options), twin = METHODS[name], BASES[base], Parts()
    model = Parts()
    opt = method.make(model, kind, max_grad_norm=0.1, **options)
    plain = kind(twin.parameters(), **options)
    x, y = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 3])
    calls = iter([(0, 1), (0,)])
    opt.step(lambda: model.losses(x, next(calls)), targets=y)
    groups = [{"params": list(twin.parameters()), "rho": RHO}]
    oracles.step(groups, lambda n: twin.losses(x, ((0, 1), (0,))[n]), y, *method.weights, plain, max_grad_norm=0.1)
    assert relative_error(flat(model), flat(twin)) < 1e-9


@by_interface
@with_bases("momentum", "adam", "rmsprop")
@each(*EACH)
def test_frozen_parameters_are_never_touched(name, base, interface):
    method, (kind, options), model = METHODS[name], BASES[base], network()
    opt = method.make(model, kind, **options)
    losses(model, *batches(steps=1)[0]).mean().backward()  # gradients that are left over
    model[2].requires_grad_(False)
    model[0].zero_grad()
    model[4].zero_grad()
    before = flat(model[2])
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.equal(flat(model[2]), before)))
    start = flat(model)
    method.drive(interface, opt, model, batches(steps=3))
    assert all(seen) and torch.equal(flat(model[2]), before) and not torch.equal(flat(model), start)
    model[2].requires_grad_(True)
    method.drive(interface, opt, model, batches(steps=1))
    assert not torch.equal(flat(model[2]), before)


@each(*EACH)
def test_only_unperturbed_groups_have_gradients(name):
    """A frozen backbone and a head that is left out: nothing to climb, so the base optimizer's step."""
    method, model, twin, data = METHODS[name], network(), network(), batches(steps=3)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    body, head = [*model[0].parameters(), *model[2].parameters()], list(model[4].parameters())
    groups = [{"params": body}, {"params": head, "perturb": False}]
    opt = method.cls(groups, SGD, rho=RHO, lr=0.1, **method.options)
    method.drive("closure", opt, model, data)
    plain = SGD(twin[4].parameters(), lr=0.1)
    for x, y in data:
        plain.zero_grad()
        losses(twin, x, y).mean().backward()
        plain.step()
    assert relative_error(flat(model), flat(twin)) < 1e-12


# --- shapes, layouts and dtypes


class Odd(nn.Module):
    """A scalar, empty tensors first, middle and last, a convolution, and a weight used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.empty_too = nn.Parameter(torch.zeros(0))
        self.mix = nn.Linear(4, 4)
        self.unmix = nn.Linear(4, 4, bias=False)
        self.unmix.weight = self.mix.weight
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.last = nn.Parameter(torch.zeros(2, 0))
        self.double()

    def forward(self, x):
        hidden = self.unmix(torch.tanh(self.mix(self.conv(x).mean((2, 3)))))
        out = self.scale * hidden @ self.transposed @ self.transposed.t()
        return out + self.empty.sum() + self.empty_too.sum() + self.last.sum()


@on_cpu
@pytest.mark.parametrize("channels_last", [False, True])
@with_bases("momentum", "adamw", "rmsprop")
@each("SAM", "ASAM", "FocalSAM")
def test_odd_shapes_and_layouts(name, base, channels_last, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    options = {**options, "lr": 0.01}
    model, twin = Odd(), Odd()
    generator = torch.Generator().manual_seed(5)
    data = [
        (
            torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (6,), generator=generator),
        )
        for _ in range(5)
    ]
    if channels_last:
        model.to(memory_format=torch.channels_last)
        assert not model.conv.weight.is_contiguous()
    strides = [p.stride() for p in model.parameters()]
    opt = method.make(model, kind, **options)
    options, sign = oracles.minimizing(options)
    plain = kind(twin.parameters(), **options)
    groups = [{"params": list(twin.parameters()), "rho": RHO, "adaptive": method.options.get("adaptive", False)}]
    for x, y in data:
        mine = x.to(memory_format=torch.channels_last) if channels_last else x
        method.closure(opt, model, mine, y)
        twin.zero_grad()
        oracles.step(groups, lambda _, x=x, y=y: sign * losses(twin, x, y), y, *method.weights, plain)
    assert relative_error(flat(model), flat(twin)) < 1e-9
    assert [p.stride() for p in model.parameters()] == strides


@on_cpu
@with_bases("momentum", "adam", "rmsprop")
@each(*EACH)
def test_gradients_need_not_lie_like_their_weights(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    results = []
    for lay_out in (lambda g: g, lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, g], -1)[..., 0]):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(5, 3))
        opt = method.cls([w], kind, rho=RHO, **options)
        for number in range(3 * len(opt.phases)):
            w.grad = lay_out(torch.randn(5, 3, generator=torch.Generator().manual_seed(number)))
            getattr(opt, opt.phases[number % len(opt.phases)])()
        results.append(w.detach())
    assert relative_error(results[1], results[0]) < 1e-6 and relative_error(results[2], results[0]) < 1e-6


@on_cpu
@with_bases("momentum", "adam")
@each(*EACH)
def test_mixed_dtypes_in_one_model(name, base, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model = nn.Sequential(network()[:3], network(torch.float32)[3:])
    opt = method.make(model, kind, **options)

    def loss(x, y):
        return F.cross_entropy(model[1](model[0](x).float()), y, reduction="none")

    for x, y in batches():
        opt.step(lambda x=x, y=y: loss(x, y), targets=y)
    assert relative_error(flat(model), expected(name, base)[0]) < 2e-4


@on_cpu
@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.double(), lambda m: m.bfloat16()])
@each(*EACH)
def test_a_model_that_changes_its_dtype_comes_back_exactly(name, change, backend):
    method, model = METHODS[name], network(torch.bfloat16)
    opt = method.make(model, SGD, lr=0.0)
    method.drive("closure", opt, model, batches(torch.bfloat16, 2))
    change(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    before = flat(model)
    assert torch.equal(method.drive("closure", opt, model, batches(model[0].weight.dtype, 2)), before)


@on_cpu
@each(*EACH)
def test_a_model_whose_weights_moved(name, backend):
    method, model, twin = METHODS[name], network(), network()
    opt, plain = (method.make(m, lr=0.1, momentum=0.9) for m in (model, twin))
    for x, y in batches(steps=5):
        for p in model.parameters():
            p.data = p.data.clone()
        method.closure(opt, model, x, y)
        method.closure(plain, twin, x, y)
    assert torch.equal(flat(model), flat(twin))


# --- errors and interruptions leave the weights


class Fails:
    """A loss that raises in one of its calls, or in that call's backward pass."""

    def __init__(self, call, in_backward, error):
        self.calls, self.call, self.in_backward, self.error = 0, call, in_backward, error

    def __call__(self, model, x, y):
        self.calls += 1
        if self.calls != self.call:
            return losses(model, x, y)
        if not self.in_backward:
            raise self.error
        hidden = model[:2](x)
        hidden.register_hook(self.fail)
        return F.cross_entropy(model[2:](hidden), y, reduction="none")

    def fail(self, grad):
        raise self.error


@on_cpu
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("out of memory")], ids=repr)
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2])
@with_bases("nesterov", "rmsprop")
@each(*EACH)
def test_an_error_in_a_pass_leaves_the_original_weights(name, base, call, in_backward, error, backend):
    method, (kind, options) = METHODS[name], BASES[base]
    model, twin, data = network(), network(), batches(steps=6)
    opt, plain = (method.make(m, kind, **options) for m in (model, twin))
    method.drive("closure", opt, model, data[:3])
    before = flat(model)
    with pytest.raises(type(error)):
        method.closure(opt, model, *data[3], Fails(call, in_backward, error))
    assert torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(method.drive("closure", opt, model, data[3:]), method.drive("closure", plain, twin, data))


@pytest.mark.parametrize("call", [1, 2])
@each(*EACH)
def test_an_error_in_a_pass_restores_the_layers_flags(name, call):
    method, model = METHODS[name], normalized()
    opt = method.make(model, SGD, lr=0.1, model=model)
    before, calls = flags(model), []

    def loss(model, x, y):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return losses(model, x, y)

    with pytest.raises(KeyboardInterrupt):
        method.closure(opt, model, *images(1)[0], loss)
    assert flags(model) == before and all(b is not None for b in model.state_dict().values())


@on_cpu
@by_interface
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("op", ["grad_norm", "perturb_", "sgd_step_", "restore_"])
@each(*EACH)
def test_ctrl_c_within_the_passes(name, op, after, interface, backend, monkeypatch):
    """The signal arrives while an op runs: the weights are then those of before the step, or of after it."""
    method, model, data = METHODS[name], network(), batches(steps=2)
    base = torch.optim.RMSprop if op == "restore_" else SGD
    opt = method.make(model, base, lr=0.1)
    method.drive(interface, opt, model, data[:1])
    before, twin = flat(model), copy.deepcopy(model)
    whole = method.drive(
        interface, method.make(twin, base, lr=0.1), twin, data[1:]
    )  # momentum-free, so state is no matter
    module = backend_for(torch.device("cpu"))
    real = getattr(module, op)

    def interrupted(*args, **kwargs):
        if not after:
            signal.raise_signal(signal.SIGINT)
        result = real(*args, **kwargs)
        if after:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, op, interrupted)
        with pytest.raises(KeyboardInterrupt):
            method.drive(interface, opt, model, data[1:])
    now = flat(model)
    if base is SGD:
        assert torch.equal(now, before) or torch.equal(now, whole)
    assert opt._phase in (0, 1) and not opt.is_perturbed
    opt.restore()
    assert torch.equal(flat(model), now)
    model.zero_grad()
    method.drive(interface, opt, model, data)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@on_cpu
@each(*EACH)
def test_restore_starts_over(name, backend):
    method, model, twin, data = METHODS[name], network(), network(), batches(steps=4)
    opt, plain = (method.make(m, lr=0.1, momentum=0.9) for m in (model, twin))
    opt.restore()
    method.drive("phases", opt, model, data[:2])
    before = flat(model)
    for phase in opt.phases[:-1]:
        losses(model, *data[2]).mean().backward()
        getattr(opt, phase)()
    assert not torch.equal(flat(model), before)
    opt.restore()
    assert torch.equal(flat(model), before)
    model.zero_grad()
    assert torch.equal(method.drive("phases", opt, model, data[2:]), method.drive("phases", plain, twin, data))


INTERRUPTED = """
import os, random, signal, sys, threading, time
import torch
from torch import nn
import ltsam_fast as lf

name, interface = sys.argv[1:]
torch.set_num_threads(1)

def fresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 4))
    options = {"class_counts": [40, 9, 3, 1]} if name == "FocalSAM" else {}
    return model, getattr(lf, name)(model.parameters(), torch.optim.SGD, rho=0.5, lr=1e-3, model=model, **options)

x, y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4

def step(model, opt):
    loss = lambda: nn.functional.cross_entropy(model(x), y, reduction="none")
    if interface == "closure":
        opt.step(loss, targets=y)
    elif name == "SAM":
        for phase in (opt.first_step, opt.second_step):
            loss().mean().backward()
            phase(zero_grad=True)
    else:
        for phase in (opt.first_step, opt.second_step, opt.third_step):
            loss().mean().backward()
            phase()

def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def bits(vector):
    return vector.numpy().tobytes()

model, opt = fresh()
armed, done, caught = threading.Event(), threading.Event(), []

def interrupt():
    seed = random.Random(0)
    while not done.is_set():
        if armed.wait(0.1):
            time.sleep(seed.uniform(0, 0.004))
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)

sender = threading.Thread(target=interrupt)
sender.start()
end = time.monotonic() + 1.5
while time.monotonic() < end and len(caught) < 300:
    stop = time.monotonic() + 1
    try:
        armed.set()
        while time.monotonic() < stop:
            step(model, opt)
    except KeyboardInterrupt:
        if interface == "phases":
            opt.restore()
            opt.zero_grad()
        caught.append(bits(weights(model)))
done.set()
sender.join()
model, opt = fresh()
path, last = {bits(weights(model)): 0}, caught[-1]
while last not in path and len(path) < 20000:
    step(model, opt)
    path[bits(weights(model))] = len(path)
steps = [path.get(one) for one in caught]
assert None not in steps, (steps.index(None), len(steps), len(path))
assert steps == sorted(steps)
print(len(caught), "interrupts in", steps[-1], "steps")
"""


@by_interface
@each(*EACH)
def test_ctrl_c_at_random_moments(name, interface):
    """Real signals: whenever they come, the weights are those after a whole number of steps."""
    command = [sys.executable, "-c", INTERRUPTED, name, interface]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 20, result.stdout
