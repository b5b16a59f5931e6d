"""The methods next to the rest of torch: averaged weights, schedulers, hooks, functional calls, networks of unusual make."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, RMSprop, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from .family import EVERY, ROWS, closure_of
from .methods import METHODS, focal_phases, sam_phases
from .oracles import CLASSES, FEATURES, batches, flat, network, relative_error

PHASES = {"SAM": sam_phases, "FocalSAM": focal_phases}
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


def make(name, model, base=SGD, /, **options):
    return (METHODS | ROWS)[name].make(model, base, **{"lr": 0.05, **options})


@pytest.mark.parametrize("interface", ["closure", "phases"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_takes_the_optimizer(kind, interface):
    """The learning rates are those that the base optimizer alone would get, without a warning."""
    model = network()
    opt, plain = make("SAM", model, momentum=0.9), SGD(network().parameters(), lr=0.05, momentum=0.9)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)  # SequentialLR's, about itself
        schedules = SCHEDULERS[kind](opt), SCHEDULERS[kind](plain)
        for x, y in batches(steps=5):
            METHODS["SAM"].drive(interface, opt, model, [(x, y)])
            plain.step()
            for schedule in schedules:
                schedule.step(1.0) if kind == "ReduceLROnPlateau" else schedule.step()
            rates.append(opt.param_groups[0]["lr"])
            assert rates[-1] == plain.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"]
    assert len(set(rates)) > 1


def test_a_scheduler_of_the_base_optimizer_does_not_warn():
    model = network()
    opt = make("SAM", model)
    schedule = lr_scheduler.StepLR(opt.base_optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["SAM"].drive("closure", opt, model, batches(steps=1))
        schedule.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("interface", ["closure", "phases"])
@pytest.mark.parametrize("base", [SGD, RMSprop])
@pytest.mark.parametrize("name", PHASES)
def test_hooks_run_once_a_step(name, base, interface, scaled):
    """The optimizer's own and those for all optimizers, which the base optimizer inside must not set off again."""
    model = network(torch.float32)
    opt = make(name, model, base, lr=0.01)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before all")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after all")),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    try:
        for x, y in batches(torch.float32, steps=2):
            if interface == "closure":
                opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
            else:
                for number, phase in enumerate(opt.phases):
                    scaler.scale(F.cross_entropy(model(x), y)).backward()
                    getattr(opt, phase)(**({"scaler": scaler} if number == 0 else {}))
            scaler.update()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == sorted(["before", "after", "before all", "after all"] * 2)
    assert {one.split()[0] for one in seen[:2]} == {"before"} and {one.split()[0] for one in seen[2:4]} == {"after"}


def test_state_dict_hooks():
    model, seen = network(), []
    opt = make("FocalSAM", model)
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state: seen.append("post"))
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append("load"))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["pre", "post", "load", "loaded"]


@pytest.mark.parametrize("name", EVERY)
def test_averaged_weights_are_of_unperturbed_ones(name):
    """Stochastic averages and exponential ones, and statistics made anew, as for a run that notes its weights itself."""
    torch.manual_seed(0)
    alone = name == "MSAM"  # it evaluates single samples, which cannot be normalized by the batch
    norm = nn.LayerNorm(8) if alone else nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)).double()
    opt = make(name, model, model=model)
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


@pytest.mark.parametrize("name", EVERY)
def test_functional_call(name):
    """The closure may call the model with its parameters in a dictionary; tensors made from them get their gradients."""
    results = []
    for functional in (False, True):
        model = network()
        opt = make(name, model)
        for x, y in batches(steps=4):

            def closure(index=slice(None), x=x, y=y, model=model):
                out = torch.func.functional_call(model, dict(model.named_parameters()), (x[index],))
                return F.cross_entropy(out, y[index], reduction="none")

            opt.step(closure if functional else closure_of(model, x, y), targets=y)
        results.append(flat(model))
    assert torch.equal(*results)


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


@pytest.mark.parametrize("name", EVERY)
def test_tied_weights_count_once(name):
    results = []
    for tied in (False, True):
        model = Tied(tied)
        opt = make(name, model)
        for x, y in batches(steps=4):
            opt.step(closure_of(model, x, y), targets=y)
        results.append(flat(model))
    assert torch.equal(*results) and sum(len(group["params"]) for group in opt.param_groups) == 2


class Checkpointed(nn.Module):
    """Layers in an activation checkpoint, behind others or the first ones, and a parameter of somebody else."""

    def __init__(self, reentrant, begin):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.reentrant, self.begin = network(), reentrant, begin
        self.foreign = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))

    def forward(self, x):
        x = self.net[: self.begin](x.clone().requires_grad_())
        x = checkpoint(self.net[self.begin : 3], x, use_reentrant=self.reentrant)
        return self.net[3:](x) * self.foreign


SHARED = ("FocalSAM", "ImbSAM", "SSESAM", "CCSAM")


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize(("name", "shared"), [*((name, None) for name in EVERY), *((name, "auto") for name in SHARED)])
def test_weights_in_reentrant_checkpoints_count(name, shared, begin):
    """torch.autograd.grad doesn't see them."""
    results = []
    for reentrant in (False, True):
        model = Checkpointed(reentrant, begin)
        params = [{"params": list(model.net.parameters())}]
        more = {"model": model, "shared_backward": shared if reentrant else False} if shared else {}
        opt = (METHODS | ROWS)[name].make(model, SGD, params, lr=0.05, momentum=0.9, **more)
        for x, y in batches(steps=4):
            opt.step(closure_of(model, x, y), targets=y)
        results.append(flat(model))
        assert all(param.grad is None for param in model.net.parameters())
    assert relative_error(*results) < 1e-12


@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
@pytest.mark.parametrize("name", EVERY)
def test_layers_that_thaw_later(name, base):
    """A frozen layer stays as it is; thawed, in the groups from the start or added then, it moves; the same in both ways."""
    results = []
    for added in (False, True):
        model = network()
        model[0].requires_grad_(False)
        before = flat(model[0])
        groups = [{"params": list(model[2].parameters())}, {"params": list(model[4].parameters())}]
        if not added:
            groups.insert(1, {"params": list(model[0].parameters())})
        opt = (METHODS | ROWS)[name].make(model, base, groups, lr=0.01)
        data = batches(steps=6)
        for x, y in data[:3]:
            opt.step(closure_of(model, x, y), targets=y)
        assert torch.equal(flat(model[0]), before)
        model[0].requires_grad_(True)
        if added:
            opt.add_param_group({"params": list(model[0].parameters())})
        for x, y in data[3:]:
            opt.step(closure_of(model, x, y), targets=y)
        assert not torch.equal(flat(model[0]), before)
        results.append(flat(model))
    if name not in (
        "GNM",
        "ESAM",
        "CCSAM",
        "SSESAM",
    ):  # they number the parameters, or take the last group for the head
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


ACCUMULATE = [name for name in EVERY if name not in ("MSAM", "ESAM", "SparseSAM")]
WEIGHTS = torch.tensor([0.3, 1.0, 2.5, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[2] * 8, [1, 5, 1, 2, 3, 1, 1, 2]])
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
@pytest.mark.parametrize("name", ACCUMULATE)
def test_eight_micro_batches_are_one_batch(name, base, sizes):
    """Class weights in the loss included; m-SAM, ESAM and sparse SAM treat each part by itself."""
    results = []
    for parts in (False, True):
        model = network()
        opt = make(name, model, base, lr=0.01)
        for x, y in batches(steps=6):
            cut = sizes if parts else [16]
            pieces = list(zip(x.split(cut), y.split(cut), strict=True))
            closures = [
                lambda index=slice(None), x=x, y=y, model=model: F.cross_entropy(
                    model(x[index]), y[index], WEIGHTS, reduction="none"
                )
                for x, y in pieces
            ]
            opt.step(closures, targets=[y for _, y in pieces])
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


@pytest.mark.parametrize("number", [None, 0, 3, 7])
@pytest.mark.parametrize("interface", ["closure", "phases"])
@pytest.mark.parametrize("name", PHASES)
def test_micro_batches_under_a_scaler(name, interface, number):
    """An overflow in any of them, in the last pass, skips the step; without one it is the step of the whole batch."""
    results = []
    for scaled in (False, True):
        model = network(torch.float32)
        opt = make(name, model, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, enabled=scaled)
        for step, (x, y) in enumerate(batches(torch.float32, steps=4)):
            bad = scaled and number is not None and step == 2
            if not scaled and number is not None and step == 2:
                continue
            pieces = list(zip(x.split(2), y.split(2), strict=True))

            def loss(i, x, y, model=model, opt=opt, bad=bad):
                infinite = bad and i == number and opt.is_perturbed
                return F.cross_entropy(model(x), y, reduction="none") * (float("inf") if infinite else 1.0)

            if interface == "closure":
                closures = [lambda i=i, piece=piece, loss=loss: loss(i, *piece) for i, piece in enumerate(pieces)]
                opt.step(closures, targets=[y for _, y in pieces], scaler=scaler)
            else:
                for turn, phase in enumerate(opt.phases):
                    for i, piece in enumerate(pieces):
                        scaler.scale(loss(i, *piece).sum() / 16).backward()
                    getattr(opt, phase)(**({"scaler": scaler} if turn == 0 else {}))
                    opt.zero_grad()
            if scaled:
                scaler.update(8.0)
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
