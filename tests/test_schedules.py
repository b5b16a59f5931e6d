"""Which steps perturb the weights, ``active``, and how far, ``rho_schedule``: over all methods."""

import copy
import functools
import io
import math

import pytest
import torch

import ltsam_fast as lf
from ltsam_fast.optim.schedules import check_active, is_active

from .method_rows import EVERY, PHASED, every, phased, step_in_phases
from .oracles import FEATURES, batches, flat, losses, network

STEPS = 10
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
ACTIVE = {
    "share": (0.4, [6, 7, 8, 9]),
    "every": (("every", 3), [0, 3, 6, 9]),
    "range": (range(2, 5), [2, 3, 4]),
    "list": (["range", 1, 8, 3], [1, 4, 7]),
    "function": (lambda step: step in (1, 4, 5), [1, 4, 5]),
    "none": (0.0, []),
    "whole": (1.0, list(range(10))),
}


class Normed(torch.nn.Module):
    """With batch norm, and parameters in several groups, one of them empty."""

    def __init__(self):
        super().__init__()
        self.net = network(dtype=torch.float32)
        self.norm = torch.nn.BatchNorm1d(FEATURES)

    def forward(self, x):
        return self.net(self.norm(x))

    def groups(self):
        params = list(self.net.parameters())
        norm = {"params": list(self.norm.parameters()), "rho": 0.02}
        return [{"params": params[:2], "rho": 0.3}, {"params": []}, norm, {"params": params[2:], "lr": 0.02}]


def step_of_base(opt, model, x, y):
    losses(model, x, y).mean().backward()
    opt.base_optimizer.step()
    opt.zero_grad()


def alternated(row, active, dtype=torch.float32, base=torch.optim.SGD, options=SGD):
    """By hand: the base optimizer's own step, of torch, where the method is not active."""
    model = network(dtype=dtype)
    opt = row.make(model, base, **options)
    for number, (x, y) in enumerate(batches(dtype=dtype, steps=STEPS)):
        if number in active:
            row.step("closure", opt, model, x, y)
        else:
            step_of_base(opt, model, x, y)
    return flat(model)


@pytest.mark.parametrize("kind", ACTIVE)
def test_which_steps(kind):
    active, steps = ACTIVE[kind]
    kept = check_active("active", active)
    assert [step for step in range(STEPS) if is_active(kept, step, STEPS)] == steps
    opt = lf.SAM(network().parameters(), torch.optim.SGD, active=active, total_steps=STEPS, lr=0.1)
    assert opt.active == kept and opt.param_groups[0]["active"] == kept


@pytest.mark.parametrize("kind", ACTIVE)
@every
def test_steps_equal_an_alternation_by_hand_bit_for_bit(name, kind):
    row, (active, steps) = EVERY[name], ACTIVE[kind]
    model = network(dtype=torch.float32)
    opt = row.make(model, active=active, total_steps=STEPS, **SGD)
    row.drive("closure", opt, model, batches(dtype=torch.float32, steps=STEPS))
    assert torch.equal(flat(model), alternated(row, steps))
    group = opt.param_groups[0]
    assert (group["steps"], group["base_steps"]) == (STEPS, STEPS - len(steps))


@every
def test_batch_norm_groups_and_autocast(name):
    """All in one autocast context of the caller's; by hand in one for each step, for it keeps casts of weights that move."""
    row, (active, steps) = EVERY[name], ACTIVE["every"]
    row = row.having(m=4) if name == "MicroBatchSAM" else row  # batch norm makes nothing of one sample
    data, autocast = batches(dtype=torch.float32, steps=STEPS), functools.partial(torch.autocast, "cpu", torch.bfloat16)
    model, other = Normed(), Normed()
    opt = row.make(model, torch.optim.SGD, model.groups(), model=model, active=active, **SGD)
    with autocast():
        row.drive("closure", opt, model, data)
    by_hand = row.make(other, torch.optim.SGD, other.groups(), model=other, **SGD)
    for number, (x, y) in enumerate(data):
        with autocast():
            if number in steps:
                row.step("closure", by_hand, other, x, y)
            else:
                step_of_base(by_hand, other, x, y)
    assert torch.equal(flat(model), flat(other)) and torch.equal(model.norm.running_mean, other.norm.running_mean)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.NAdam])
@every
def test_with_other_bases(name, base):
    row, (active, steps), options = EVERY[name], ACTIVE["every"], {"lr": 0.01}
    model = network(dtype=torch.float32)
    row.drive("closure", row.make(model, base, active=active, **options), model, batches(torch.float32, STEPS))
    assert torch.equal(flat(model), alternated(row, steps, base=base, options=options))


@phased
def test_phases(name):
    """A step of the base optimizer has one."""
    row, (active, steps) = EVERY[name].of("phases"), ACTIVE["every"]
    model = network(dtype=torch.float32)
    opt = row.make(model, active=active, **SGD)
    for number, (x, y) in enumerate(batches(dtype=torch.float32, steps=STEPS)):
        if number in steps:
            step_in_phases(opt, lambda: losses(model, x, y), y)  # noqa: B023
        else:
            assert opt.phases == ("first_step",)
            losses(model, x, y).mean().backward()
            opt.first_step()
            opt.zero_grad()
    torch.testing.assert_close(flat(model), alternated(row, steps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
@every
def test_resumes_at_the_switch(name, at):
    row, data = EVERY[name], batches(dtype=torch.float32, steps=STEPS)
    options = {"active": 0.5, "total_steps": STEPS, "rho_schedule": "linear", **SGD}
    whole, first, second = (network(dtype=torch.float32) for _ in range(3))
    row.drive("closure", row.make(whole, **options), whole, data)
    opt = row.make(first, **options)
    row.drive("closure", opt, first, data[:at])
    file = io.BytesIO()
    torch.save([first.state_dict(), opt.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    second.load_state_dict(model)
    resumed = row.make(second, **(SGD | {"active": "all"}))  # the checkpoint says which
    resumed.load_state_dict(state)
    row.drive("closure", resumed, second, data[at:])
    assert torch.equal(flat(second), flat(whole))


def test_functions_stay_the_scripts():
    """They are not in checkpoints, and loading one leaves them as they are."""

    def active(step):
        return step > 2

    make = lambda **options: lf.SAM(network().parameters(), torch.optim.SGD, lr=0.1, **options)  # noqa: E731
    saved = make(active=active, rho_schedule=math.sqrt).state_dict()
    torch.save(saved, file := io.BytesIO())
    file.seek(0)
    other = make(active=active, rho_schedule=math.sqrt)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.active is active and other.rho_schedule is math.sqrt
    plain = make(active=("every", 2))
    plain.load_state_dict(saved)
    assert plain.active == ("every", 2)
    assert copy.deepcopy(other).active is active


def test_one_forward_and_no_perturbation_in_steps_of_the_base():
    model, seen = network(), []
    opt = lf.SAM(model.parameters(), torch.optim.SGD, active=range(1, 2), lr=0.1, model=model)
    for x, y in batches(steps=3):
        count = 0

        def closure():
            nonlocal count
            count += 1
            return losses(model, x, y)  # noqa: B023

        opt.step(closure)
        seen.append(count)
    assert seen == [1, 2, 1]


@every
def test_overflows_leave_everything(name):
    """In steps of either kind, and the method's own count goes on where it was."""
    row = EVERY[name]
    model = network(dtype=torch.float32)
    opt = row.make(model, active=("every", 2), **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (x, y) in enumerate(batches(dtype=torch.float32, steps=6)):
        before = flat(model)
        row.step("closure", opt, model, x * torch.inf if number in (2, 3) else x, y, scaler=scaler)
        scaler.update()
        assert torch.equal(flat(model), before) == (number in (2, 3))
    assert opt.state_dict()["param_groups"][0]["skipped_steps"] == 1
    assert scaler.get_scale() == 2.0**8


@every
def test_clipping_and_batches_in_parts(name):
    row, data = EVERY[name], batches(steps=6, size=16)
    if row.by_parts:
        pytest.skip("treats each part by itself")
    one, other = network(), network()
    whole, parts = (row.make(model, active=("every", 2), max_grad_norm=0.1, **SGD) for model in (one, other))
    for x, y in data:
        row.step("closure", whole, one, x, y)
        closures = [lambda i=slice(None), k=k: losses(other, x[k][i], y[k][i]) for k in (slice(0, 9), slice(9, 16))]  # noqa: B023
        parts.step(closures, targets=[y[:9], y[9:]])
    torch.testing.assert_close(flat(other), flat(one), rtol=1e-10, atol=1e-12)


FACTORS = {
    "linear": lambda t: t / STEPS,
    "quadratic": lambda t: (t / STEPS) ** 2,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)),
    "lr": lambda t: 0.8**t,
    "function": lambda t: 1 + t,
}


@pytest.mark.parametrize("schedule", FACTORS)
@every
def test_radii_follow_the_schedule(name, schedule):
    """As if the radii were set by hand before each step."""
    row, factor = EVERY[name], FACTORS[schedule]
    options = {"total_steps": STEPS} if name != "SparseSAM" else {"total_steps": STEPS, "drop_rate": 0.0}
    one, other = network(), network()
    scheduled = row.make(one, rho_schedule=factor if schedule == "function" else schedule, **options, **SGD)
    by_hand = row.make(other, **options, **SGD)
    radius = [option for option in ("rho", "tail_rho", "noise_ratio") if option in by_hand.param_groups[0]]
    largest = {option: getattr(by_hand, option) for option in radius}
    rates = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.8) for opt in (scheduled, by_hand)]
    for number, (x, y) in enumerate(batches(steps=STEPS)):
        for option in radius:
            setattr(by_hand, option, factor(number) * largest[option])
        row.step("closure", scheduled, one, x, y)
        row.step("closure", by_hand, other, x, y)
        for rate in rates:
            rate.step()
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-9, atol=1e-11)


def test_a_rate_set_by_hand_counts_from_its_largest():
    model, ((x, y),) = network(), batches(steps=1)
    opt = lf.SAM(model.parameters(), torch.optim.SGD, rho_schedule="lr", lr=0.2)
    opt.step(lambda: losses(model, x, y))
    opt.param_groups[0]["lr"] = 0.05
    assert opt.rho_factors(1) == [0.25]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"active": 0.3}, "total_steps must be given with active=0.3"),
        ({"rho_schedule": "linear"}, "total_steps must be given with rho_schedule='linear'"),
        ({"active": "some"}, "active must be"),
        ({"active": 1.5, "total_steps": 3}, "active must be"),
        ({"active": True, "total_steps": 3}, "active must be"),
        ({"active": ("every", 0)}, "active must be"),
        ({"active": ("every", 2.5)}, "active must be"),
        ({"active": ("range", 1)}, "active must be"),
        ({"active": ()}, "active must be"),
        ({"active": math.nan, "total_steps": 3}, "active must be"),
        ({"rho_schedule": "up"}, "rho_schedule must be one of"),
        ({"total_steps": 0}, "total_steps must be"),
    ],
    ids=str,
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        lf.SAM(network().parameters(), torch.optim.SGD, lr=0.1, **options)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "much", None])
def test_a_schedule_must_return_a_radius(value):
    model, ((x, y),) = network(), batches(steps=1)
    opt = lf.SAM(model.parameters(), torch.optim.SGD, rho_schedule=lambda step: value, lr=0.1)
    before = flat(model)
    with pytest.raises(ValueError, match="rho_schedule must return"):
        opt.step(lambda: losses(model, x, y))
    assert torch.equal(flat(model), before)


def test_gsam_has_a_schedule_of_its_own():
    with pytest.raises(ValueError, match="rho_schedule must be 'constant' with rho_min"):
        lf.GSAM(network().parameters(), torch.optim.SGD, rho_min=0.1, rho_max=0.2, rho_schedule="lr", lr=0.1)


def test_every_method_is_tried():
    assert set(PHASED) <= set(EVERY)
