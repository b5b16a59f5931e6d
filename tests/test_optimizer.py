"""The methods as optimizers of torch: groups, state, copies, schedulers, hooks, and the rest of torch around them."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import ltsam_fast as lf
from ltsam_fast import lists

from .method_rows import (
    BASES,
    EACH_WAY,
    EVERY,
    KINDS,
    RHO,
    ROWS,
    closure_of,
    driven,
    each_way,
    every,
    on_cpu,
    phased,
    step_in_phases,
    two_groups,
    with_bases,
)
from .oracles import CLASSES, COUNTS, FEATURES, batches, flat, losses, network, relative_error


@every
def test_is_a_torch_optimizer(name):
    row, model = EVERY[name], network()
    opt = row.make(model, AdamW, lr=0.01)
    assert isinstance(opt, torch.optim.Optimizer)
    assert {*AdamW(model.parameters()).defaults, "rho", "adaptive", "eta", "norm_eps", "perturb"} <= {*opt.defaults}
    assert opt.defaults["lr"] == 0.01 and opt.defaults["rho"] == RHO
    assert repr(opt).startswith(row.method) and "rho: 0.1" in repr(opt) and "lr: 0.01" in repr(opt)
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- parameters and groups


@every
def test_takes_all_that_torch_takes_as_parameters(name):
    row, data, results = EVERY[name], batches(steps=1), []
    for parameters in (
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m[0].parameters()}, {"params": [*m[2].parameters(), *m[4].parameters()]}],
        lambda m: [{"params": m[0].named_parameters()}, {"params": nn.Sequential(m[2], m[4]).named_parameters()}],
    ):
        model = network()
        opt = row.make(model, SGD, parameters(model), lr=0.1)
        results.append(row.drive("closure", opt, model, data))
        assert "param_names" not in opt.param_groups[0] or opt.state_dict()["param_groups"][0]["param_names"]
    assert all(torch.equal(one, results[0]) for one in results)


@with_bases(*KINDS)
@every
def test_layers_that_are_frozen_at_first(name, base):
    """A frozen layer stays as it is; later, in the groups from the start or added then, it moves: the same in both ways."""
    row, (kind, options), results = EVERY[name], BASES[base], []
    for added in (False, True):
        model = network()
        late = {"params": list(model[0].parameters()), "rho": 0.4, "lr": 0.003}
        model[0].requires_grad_(False)
        before = flat(model[0])
        groups = [{"params": [*model[2].parameters(), *model[4].parameters()]}, *([] if added else [late])]
        opt = row.make(model, kind, groups, **options)
        row.drive("closure", opt, model, batches(steps=6)[:3])
        assert torch.equal(flat(model[0]), before)
        model[0].requires_grad_(True)
        if added:
            opt.add_param_group(late)
        row.drive("closure", opt, model, batches(steps=6)[3:])
        assert not torch.equal(flat(model[0]), before)
        assert opt.param_groups is opt.base_optimizer.param_groups and len(opt.param_groups) == 2
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize(("base", "empty", "how"), [(SGD, 0, ""), (RMSprop, 1, "scaled"), (AdamW, 2, "bfloat16")])
@every
def test_a_group_without_parameters(name, base, empty, how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    results = []
    for inserted in (False, True):
        model = network(dtype)
        params = list(model.parameters())
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        if inserted:
            groups.insert(empty, {"params": [], "rho": 5.0})
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if how == "scaled" else None
        opt = EVERY[name].make(model, base, groups, lr=0.02)
        for x, y in batches(dtype, steps=3):
            opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
            if scaler:
                scaler.update()
        copy.deepcopy(opt).load_state_dict(opt.state_dict())
        results.append(flat(model))
    assert torch.equal(*results)


@on_cpu
@every
def test_nothing_depends_on_the_default_dtype(name, backend):
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, data = network(torch.float32), batches(torch.float32, steps=2)
        torch.set_default_dtype(dtype)
        try:
            for scaled in (False, True):
                scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
                opt = EVERY[name].make(model, lr=0.02, momentum=0.9)
                for x, y in data:
                    opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
                    if scaled:
                        scaler.update()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(flat(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- maximize


MAXIMIZING = {
    "sgd": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "nadam": (NAdam, {"lr": 0.01}),
}
TO_MAXIMIZE = [(name, base, 0.0) for name in EVERY for base in ("sgd", "adamw", "rmsprop")]
TO_MAXIMIZE += [(name, "sgd", 0.05) for name in EVERY] + [("SAM", "adam", 0.05), ("SAM", "nadam", 0.05)]


def signed(sign):
    return lambda model, x, y: sign * losses(model, x, y)


@pytest.mark.parametrize(("name", "base", "limit"), TO_MAXIMIZE)
def test_to_maximize_f_is_to_minimize_its_negative(name, base, limit):
    row, (kind, options), results = EVERY[name], MAXIMIZING[base], []
    for sign, maximize in ((1, False), (-1, True)):
        model = network()
        opt = row.make(model, kind, maximize=maximize, max_grad_norm=limit, **options)
        means = [sign * row.step("closure", opt, model, x, y, signed(sign)) for x, y in batches(steps=6)]
        results.append((flat(model), torch.stack(means)))
    assert relative_error(results[1][0], results[0][0]) < 1e-12
    torch.testing.assert_close(results[1][1], results[0][1])


@phased
def test_to_maximize_with_the_phases(name):
    row, results = EVERY[name].of("phases"), []
    for sign, maximize in ((1, False), (-1, True)):
        model = network()
        opt = row.make(model, SGD, maximize=maximize, lr=0.02, momentum=0.9)
        results.append(row.drive("phases", opt, model, batches(steps=6), signed(sign)))
    assert relative_error(*results) < 1e-12


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@every
def test_some_groups_maximize(name, base):
    """A saddle point's problem: as if the gradients of those groups had the other sign."""
    row, (kind, options), results = EVERY[name], MAXIMIZING[base], []
    options = {**options, "weight_decay": 0.0}
    for reversed_by_hand in (True, False):
        model = network()
        params = list(model.parameters())
        flag = {} if reversed_by_hand else {"maximize": True}
        opt = row.make(model, kind, [{"params": params[:2], **flag}, {"params": params[2:], "rho": 0.2}], **options)
        for param in params[:2] if reversed_by_hand else ():
            param.register_hook(torch.neg)
        if name == "ESAM" and not reversed_by_hand:
            before = flat(model)
            with pytest.raises(ValueError, match="maximize must be the same in all groups"):
                opt.step(closure_of(model, *batches()[0]))
            assert torch.equal(flat(model), before)
            return
        results.append(row.drive("closure", opt, model, batches(steps=6)))
    assert relative_error(*results) < 1e-12


# --- state


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


RESUMED = EACH_WAY + [(name, "nesterov", "closure") for name in ROWS if name not in EVERY]
RESUMED += [("SAM", base, "closure") for base in BASES if base not in KINDS]


@pytest.mark.parametrize(("name", "base", "interface"), RESUMED)
def test_resumes_bit_for_bit(name, base, interface):
    row, (kind, options), data = ROWS[name].of(interface), BASES[base], batches(torch.float32, 10)

    def fresh(seed=0):
        model = network(torch.float32, seed)
        opt = row.make(model, kind, two_groups(model), **options)
        return model, opt, lr_scheduler.CosineAnnealingLR(opt, T_max=20)

    def run(model, opt, schedule, data):
        for batch in data:
            row.drive(interface, opt, model, [batch])
            schedule.step()
        return flat(model)

    whole = run(*fresh(), data)
    parts = fresh()
    run(*parts, data[:5])
    saved = through_a_file([part.state_dict() for part in parts])
    parts = fresh(seed=5)
    run(*parts, data[:1])
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    assert torch.equal(run(*parts, data[5:]), whole)
    opt = parts[1]
    assert opt.state is opt.base_optimizer.state and opt.param_groups is opt.base_optimizer.param_groups


@each_way
def test_a_checkpoint_holds_the_bases_state_and_no_weights(name, base, interface):
    row, (kind, options) = EVERY[name].of(interface), BASES[base]
    model, other = network(), network()
    opt = row.make(model, kind, **options)
    row.drive(interface, opt, model, batches(steps=2))
    plain = kind(other.parameters(), **options)
    losses(other, *batches(steps=1)[0]).mean().backward()
    plain.step()
    entries = {key for state in plain.state_dict()["state"].values() for key in state}
    for state in opt.state_dict()["state"].values():
        assert entries <= set(state) <= entries | {*row.state, "step"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@each_way
def test_copies_and_pickles_go_on_alike(name, base, interface, duplicate):
    row, (kind, options) = EVERY[name].of(interface), BASES[base]
    data, model = batches(torch.float32, 8), network(torch.float32)
    opt = row.make(model, kind, model=model, max_grad_norm=0.5, **options)
    row.drive(interface, opt, model, data[:4])
    other_model, other = duplicate((model, opt))
    assert other.model is other_model and other.max_grad_norm == 0.5
    assert other.param_groups[0]["params"][0] is other_model[0].weight
    assert other.state is other.base_optimizer.state and other.state is not opt.state
    continued = row.drive(interface, other, other_model, data[4:])
    assert torch.equal(row.drive(interface, opt, model, data[4:]), continued)


@phased
def test_between_phases_there_is_no_state_to_save(name):
    row, model, data = EVERY[name].of("phases"), network(), batches(steps=2)
    opt = row.make(model, lr=0.1, momentum=0.9)
    row.drive("closure", opt, model, data)
    saved, before = opt.state_dict(), flat(model)
    for until in range(1, len(opt.phases)):
        step_in_phases(opt, closure_of(model, *data[0]), until=until)
        for attempt in (
            opt.state_dict,
            lambda: opt.load_state_dict(saved),
            lambda: copy.deepcopy(opt),
            lambda: pickle.dumps(opt),
            lambda: row.step("closure", opt, model, *data[0]),
        ):
            with pytest.raises(ValueError, match=r"first_step|between two phases"):
                attempt()
        opt.restore()
        assert torch.equal(flat(model), before)
        opt.state_dict()


# --- schedulers and hooks


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=3),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}
SCHEDULED = [("SAM", kind, interface) for kind in SCHEDULERS for interface in ("closure", "phases")]
SCHEDULED += [(name, "OneCycleLR", "closure") for name in EVERY if name != "SAM"]


@pytest.mark.parametrize(("name", "kind", "interface"), SCHEDULED)
def test_every_scheduler_takes_the_optimizer(name, kind, interface):
    """The learning rates are those that the base optimizer alone would get, without a warning."""
    row, model = EVERY[name], network()
    opt, plain = row.make(model, lr=0.05, momentum=0.9), SGD(network().parameters(), lr=0.05, momentum=0.9)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)  # SequentialLR's, about itself
        schedules = SCHEDULERS[kind](opt), SCHEDULERS[kind](plain)
        for batch in batches(steps=5):
            row.drive(interface, opt, model, [batch])
            plain.step()
            for schedule in schedules:
                schedule.step(1.0) if kind == "ReduceLROnPlateau" else schedule.step()
            rates.append(opt.param_groups[0]["lr"])
            assert rates[-1] == plain.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"]
    assert len(set(rates)) > 1


def test_a_scheduler_of_the_base_optimizer_does_not_warn():
    model = network()
    opt = EVERY["SAM"].make(model, lr=0.05)
    schedule = lr_scheduler.StepLR(opt.base_optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EVERY["SAM"].drive("closure", opt, model, batches(steps=1))
        schedule.step()


@pytest.mark.parametrize(("base", "scaled"), [(SGD, True), (RMSprop, False)])
@driven
def test_hooks_run_once_a_step(name, interface, base, scaled):
    """The optimizer's own and those for all optimizers, which the base optimizer inside must not set off again."""
    row, model = EVERY[name].of(interface), network(torch.float32)
    opt, seen = row.make(model, base, lr=0.01), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before all")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after all")),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    try:
        for x, y in batches(torch.float32, steps=2):
            row.step(interface, opt, model, x, y, scaler=scaler)
            scaler.update()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == sorted(["before", "after", "before all", "after all"] * 2)
    assert {one.split()[0] for one in seen[:2]} == {"before"} and {one.split()[0] for one in seen[2:4]} == {"after"}


def test_state_dict_hooks():
    model, seen = network(), []
    opt = EVERY["FocalSAM"].make(model, lr=0.05)
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state: seen.append("post"))
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append("load"))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "load", "loaded"]


# --- phases


@phased
def test_phases_clear_gradients(name):
    """Those that keep gradients by themselves, the others when asked."""
    row, model, (x, y) = EVERY[name].of("phases"), network(), batches(steps=1)[0]
    opt = row.make(model, lr=0.1)
    by_themselves = len(opt.phases) > 2
    for zero_grad in (True,) if by_themselves else (False, True):
        for number, phase in enumerate(opt.phases):
            model.zero_grad()
            if number == 0 and name == "SparseSAM":
                opt.refresh_mask(losses(model, x, y))
            losses(model, x, y).mean().backward()
            named = {} if by_themselves else {"zero_grad": zero_grad}
            assert getattr(opt, phase)(**named) is None
            cleared = zero_grad or (number == 0 and name in ("GSAM", "WSAM", "LookSAM"))
            assert all((p.grad is None) == cleared for p in model.parameters())


@phased
@pytest.mark.parametrize("base", (AdamW, Adagrad))  # fused or not
@pytest.mark.parametrize("enabled", (True, False))
def test_phases_take_no_gradients(name, base, enabled):
    """Whether those of a method, or all methods': and the caller's mode is as before."""
    row, model, (x, y) = EVERY[name].of("phases"), network(), batches(steps=1)[0]
    opt = row.make(model, base, lr=0.1)
    if name == "SparseSAM":
        opt.refresh_mask(losses(model, x, y))
    seen = []
    for hook in (opt.register_step_pre_hook, opt.register_step_post_hook):
        hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for phase in opt.phases:
        losses(model, x, y).mean().backward()
        with torch.set_grad_enabled(enabled):
            getattr(opt, phase)()
            assert torch.is_grad_enabled() == enabled
    kept = [value for state in opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert seen == [False, False] and all(p.is_leaf for p in model.parameters())
    assert kept and not any(value.requires_grad for value in kept)


@phased
def test_gradients_accumulated_by_hand_over_micro_batches(name):
    """The phases' loop with several backward() calls a phase."""
    if name == "SparseSAM":
        pytest.skip("its mask comes from the samples of one call")
    row, data, results = EVERY[name].of("phases"), batches(steps=5), []
    for size in (16, 4):
        model = network()
        opt = row.make(model, lr=0.1, momentum=0.9)
        for x, y in data:
            for phase in opt.phases:
                if opt.is_perturbed or name != "GNM":
                    for part, labels in zip(x.split(size), y.split(size), strict=True):
                        (losses(model, part, labels).sum() / 16).backward()
                getattr(opt, phase)()
                opt.zero_grad()
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


# --- the rest of torch


@every
def test_averaged_weights_are_of_unperturbed_ones(name):
    """Stochastic averages and exponential ones, and statistics made anew, as for a run that notes its weights itself."""
    torch.manual_seed(0)
    alone = name == "MicroBatchSAM"  # it evaluates single samples, which cannot be normalized by the batch
    norm = nn.LayerNorm(8) if alone else nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)).double()
    opt = EVERY[name].make(model, model=model, lr=0.05)
    mean = swa_utils.AveragedModel(model)
    running = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    noted, data = [], batches(steps=6)
    for x, y in data:
        opt.step(closure_of(model, x, y), targets=y)
        assert not opt.is_perturbed
        mean.update_parameters(model), running.update_parameters(model)
        noted.append(flat(model))
    assert relative_error(flat(mean.module), torch.stack(noted).mean(0)) < 1e-12
    expected = noted[0]
    for one in noted[1:]:
        expected = 0.9 * expected + 0.1 * one
    assert relative_error(flat(running.module), expected) < 1e-12
    swa_utils.update_bn(data, mean)
    if alone:
        return
    inputs = torch.cat([mean.module[0](x) for x, _ in data])
    torch.testing.assert_close(mean.module[1].running_mean, inputs.mean(0).detach())


class Tied(nn.Module):
    """One weight at both ends."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6).double(), nn.Linear(6, 6, bias=False).double()
        self.last.weight = self.first.weight
        self.tied = tied

    def forward(self, x):
        weight = self.last.weight if self.tied else self.first.weight
        return F.linear(torch.tanh(self.first(x)), weight)[:, :CLASSES]


@every
def test_tied_weights_count_once(name):
    results = []
    for tied in (False, True):
        model = Tied(tied)
        opt = EVERY[name].make(model, lr=0.05)
        results.append(EVERY[name].drive("closure", opt, model, batches(steps=4)))
    assert torch.equal(*results) and sum(len(group["params"]) for group in opt.param_groups) == 2


@phased
def test_hooks_come_in_one_order_in_both_interfaces(name):
    """Those for all optimizers first before the step, and last after it, as torch calls them."""
    row, model, said = EVERY[name].of("phases"), network(), []
    opt = row.make(model, lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: said.append("all before")),
        register_optimizer_step_post_hook(lambda *_: said.append("all after")),
        opt.register_step_pre_hook(lambda *_: said.append("before")),
        opt.register_step_post_hook(lambda *_: said.append("after")),
    ]
    try:
        for interface in ("closure", "phases"):
            row.drive(interface, opt, model, batches(steps=1))
    finally:
        for handle in handles:
            handle.remove()
    assert said == ["all before", "before", "after", "all after"] * 2


def test_a_step_within_a_step_is_refused():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = flat(model)

    def closure():
        if opt.is_perturbed:
            opt.step(lambda: losses(model, x, y))
        return losses(model, x, y)

    with pytest.raises(ValueError, match="by a closure of the same step"):
        opt.step(closure)
    assert torch.equal(flat(model), before)
    opt.step(lambda: losses(model, x, y))


def test_with_all_weights_zero_nothing_moves():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.ImbSAM(model.parameters(), torch.optim.SGD, class_counts=COUNTS, eta=1000, tail_weight=0.0, lr=0.1)
    before = flat(model)
    opt.step(lambda: losses(model, x, y), targets=y)
    assert torch.equal(flat(model), before) and opt.param_groups[0]["steps"] == 1


def test_parameters_and_their_groups_are_those_of_now():
    model = network()
    first, *others = model.parameters()
    opt = lf.SAM([{"params": [first]}, {"params": others}], SGD, lr=0.1)
    assert opt.all_params()[1] == [0] + [1] * len(others)
    opt.param_groups[0]["params"] += opt.param_groups.pop()["params"]
    for _ in range(2):
        assert lists.same_items(opt.all_params()[0], [first, *others]) and opt.all_params()[1] == [0] * (
            1 + len(others)
        )
    opt.param_groups[0]["params"][1:] = others[1:]
    assert lists.same_items(opt.all_params()[0], [first, *others[1:]]) and opt.all_params()[1] == [0] * len(others)
    opt.add_param_group({"params": others[:1]})
    assert opt.all_params()[1] == [0] * len(others) + [1]
