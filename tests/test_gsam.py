"""GSAM's radius: between rho_min and rho_max, whatever the schedule of the learning rate."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop, lr_scheduler

import ltsam_fast as lf

LOW, HIGH, TOP = 0.02, 0.1, 0.1
STEPS = 12
SCHEDULES = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, TOP, total_steps=STEPS + 1, cycle_momentum=False),
    "warm-up": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / 5, 1.0)),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
    "sequence": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 9)], [3]
    ),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS),
}
"""Schedules whose largest rate is known from the start."""


class Climb:
    """One weight matrix for each learning rate, and how far each step climbs."""

    def __init__(self, lr, base=SGD, tensor=False, **options):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
        self.x = torch.randn(8, 5, dtype=torch.float64)
        rates = [torch.tensor(one) if tensor else one for one in lr]
        groups = [{"params": [p], "lr": one, **options} for p, one in zip(self.params, rates, strict=True)]
        self.opt = lf.GSAM(groups, base, rho_min=LOW, rho_max=HIGH, lr=0.1)

    def step(self, n):
        before, norms = [p.detach().clone() for p in self.params], []

        def losses():
            norms.append([float((p.detach() - b).norm()) for p, b in zip(self.params, before, strict=True)])
            return sum((self.x @ p - n % 3).square() for p in self.params)

        self.opt.step(losses)
        for p, b in zip(self.params, before, strict=True):  # each step begins at the same weights
            p.data.copy_(b)
        grads = torch.autograd.grad(losses().mean(), self.params)
        whole = torch.cat(grads).norm()
        return [far * float(whole / g.norm()) for far, g in zip(norms[1], grads, strict=True)]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_radius_follows_the_schedules_range(name, base, tensor):
    start = 1.0 if name == "OneCycleLR" else TOP  # OneCycleLR sets the rate itself
    run = Climb([start, start / 2], base, tensor)
    tops = [TOP, TOP] if name == "OneCycleLR" else [TOP, TOP / 2]
    schedule = SCHEDULES[name](run.opt)
    found = []
    for n in range(STEPS):
        if n == 5:  # a resumed run goes on in the same way
            saved = copy.deepcopy((run.opt.state_dict(), schedule.state_dict()))
            run = Climb([0.3, 0.3], base, tensor)
            schedule = SCHEDULES[name](run.opt)
            run.opt.load_state_dict(saved[0]), schedule.load_state_dict(saved[1])
        rates = [float(group["lr"]) for group in run.opt.param_groups]
        wanted = [LOW + (HIGH - LOW) * rate / top for rate, top in zip(rates, tops, strict=True)]
        found.append(run.step(n))
        assert found[-1] == pytest.approx(wanted, rel=1e-5)
        assert all(LOW <= one * (1 + 1e-9) and one <= HIGH * (1 + 1e-9) for one in found[-1])
        schedule.step()
    assert max(max(pair) for pair in found) > 0.09


def radii(run, rates):
    found = []
    for n, rate in enumerate(rates):
        run.opt.param_groups[0]["lr"] = rate
        found.append(run.step(n)[0])
    return found


def at(share):
    return pytest.approx(LOW + (HIGH - LOW) * share, rel=1e-6)


def test_without_a_schedule_the_largest_rate_so_far_counts():
    assert radii(Climb([0.1, 0.1]), [0.1, 0.05, 0.2, 0.1, 0.4, 0.1]) == [at(s) for s in (1, 0.5, 1, 0.5, 1, 0.25)]


def test_a_largest_rate_of_ones_own():
    assert radii(Climb([0.1, 0.1], lr_max=0.2), [0.1, 0.2, 0.4, 0.05]) == [at(s) for s in (0.5, 1, 1, 0.25)]
    opt = lf.GSAM([nn.Parameter(torch.zeros(2))], SGD, rho_min=LOW, rho_max=HIGH, lr_min=0.1, lr=0.05)
    for bad in (0.1, -1.0, float("inf"), "a"):
        with pytest.raises(ValueError, match=r"lr_max must be (a finite number >= 0|> lr_min = 0\.1), got"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr_max": bad})
    assert len(opt.param_groups) == 1


def test_below_the_least_rate():
    run = Climb([0.1, 0.1])
    run.opt.lr_min = 0.05
    assert radii(run, [0.1, 0.05, 0.01, 0.075]) == [at(s) for s in (1, 0, 0, 0.5)]
