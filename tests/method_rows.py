"""The methods, one row each: every behaviour in these tests runs over ``EVERY``. A new method is one row there.

Beside them the base optimizers, and what drives a step in either interface.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

import ltsam_fast as lf
from ltsam_fast import reference

from . import oracles
from .oracles import COUNTS, batches, flat, losses, network

RHO = 0.1
SEED = 5


def one_group(model):
    return [{"params": list(model.parameters())}]


def two_groups(model):
    """With radii and learning rates of their own."""
    params = list(model.parameters())
    return [{"params": params[:2], "rho": 0.05, "lr": 0.02}, {"params": params[2:], "rho": 0.3}]


def scaled_weights_only(model):
    """The official ASAM: |w| + eta for weights, biases as they are."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "adaptive": True, "eta": 0.01}, {"params": biases, "adaptive": False}]


def noise(step, params):
    """GNM's: clamp(N(0, (1/3)^2), -1, 1)."""
    drawn = [torch.zeros_like(param, requires_grad=False) for param in params]
    reference.gaussian_perturb_(drawn, None, amplitude=1.0, seed=SEED, step=step)
    return drawn


def coordinates(step, params, beta=0.6):
    """The weights that ESAM perturbs."""
    drawn = [torch.zeros_like(param, requires_grad=False) for param in params]
    ones = [torch.ones_like(one) for one in drawn]
    reference.perturb_(drawn, ones, None, torch.ones(()), rho=1.0, eps=0.0, probability=beta, seed=SEED, step=step)
    return drawn


def tensors(step, params, beta=0.6):
    """The tensors that ESAM perturbs."""
    generator = torch.Generator().manual_seed(SEED + 0x9E3779B9 * step)
    return (torch.rand(len(params), generator=generator) < beta).float().tolist()


def closure_of(model, x, y, loss=losses):
    """Takes an index, which is for the methods that evaluate a part of the batch."""
    return lambda index=slice(None): loss(model, x[index], y[index])


@dataclass(frozen=True)
class Row:
    """A method with its options, its oracle, and what sets it apart from others in the tests of all of them."""

    method: str
    """The class in ltsam_fast."""
    oracle: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    """The constructor's own keywords, which the oracle gets too."""
    others: dict[str, Any] = field(default_factory=dict)
    """The oracle's further keywords."""
    groups: Callable[..., list[dict[str, Any]]] = one_group
    passes: tuple[str, ...] = ("w", "e")
    """Of each closure call in the first step on ``batches()[0]``: at w or at w + eps."""
    in_phases: dict[str, Any] = field(default_factory=dict)
    """Options with which the explicit phases are the step."""
    unperturbed: dict[str, Any] = field(default_factory=lambda: {"rho": 0.0})
    """Options with which a step is the base optimizer's."""
    by_parts: bool = False
    """Treats each part of a batch by itself."""
    indexed: bool = False
    """Needs a closure that takes an index."""
    adaptive: bool = True
    """Takes ``adaptive=True``."""
    counts_tried: bool = False
    """What it does at every so many steps counts those that overflowed too."""
    state: tuple[str, ...] = ()
    """What it keeps of each parameter from step to step."""
    averages: bool = False
    """That is made of gradients, and has one more where the rest of the step fails."""
    joined: bool = False
    """DistributedDataParallel's workers take the joined batch's step without ``ascent_sync``."""

    @property
    def cls(self):
        return getattr(lf, self.method)

    @property
    def told(self):
        """Needs the samples' classes."""
        return "class_counts" in self.options

    @property
    def once(self):
        """Evaluates the batch once a step."""
        return len(self.passes) == 1

    def of(self, interface):
        """This row for one of the interfaces."""
        return dataclasses.replace(self, options=self.options | self.in_phases) if interface == "phases" else self

    def having(self, **options):
        """This row with other options."""
        return dataclasses.replace(self, options=self.options | options)

    def make(self, model, base=SGD, params=None, /, **options):
        groups = self.groups(model) if params is None else params
        return self.cls(groups, base, **{"rho": RHO, **self.options, **options})

    def expected(self, base, options, data, groups=None, model=None, **more):
        """The oracle's weights and losses; ``groups`` is a function of the model."""
        model = network() if model is None else model
        adaptive = self.options.get("adaptive", False)
        groups = [{"rho": RHO, "adaptive": adaptive, **group} for group in (groups or self.groups)(model)]
        own = {name: value for name, value in self.options.items() if name not in ("adaptive", "seed")} | self.others
        return self.oracle(model, groups, data, base, options, **own, **more)

    def step(self, interface, opt, model, x, y, loss=losses, scaler=None):
        """One step; returns the loss, which the phases do not."""
        if interface == "closure":
            return opt.step(closure_of(model, x, y, loss), targets=y, scaler=scaler)
        step_in_phases(opt, lambda: loss(model, x, y), y, scaler)

    def drive(self, interface, opt, model, data, loss=losses):
        """Steps over the batches; returns the weights."""
        for x, y in data:
            self.step(interface, opt, model, x, y, loss)
        return flat(model)


def skip_step(opt):
    """Counts a step that overflowed elsewhere."""
    for group in opt.param_groups:
        group["steps"] += 1


def step_in_phases(opt, evaluate, y=None, scaler=None, until=None):
    """One step by the explicit phases; ``evaluate()`` gives the per-sample losses, which phases at the same weights share.

    With ``y`` the losses are weighed by class where the method does so. ``until``: only so many phases.
    """
    weights = [None] * len(opt.phases)
    if y is not None and getattr(opt, "sharp_weights", None) is not None:
        pair = [opt.clean_weights, opt.sharp_weights]
        weights = pair + (pair if len(opt.phases) == 4 else pair[1:])
    at_w = None
    for number, (phase, weight) in enumerate(zip(opt.phases[:until], weights, strict=False)):
        if number or not isinstance(opt, (lf.GNM, lf.MomentumSAM)):  # whose first phase needs no gradient
            per_sample = evaluate() if at_w is None or opt.is_perturbed else at_w
            at_w = per_sample
            if number == 0 and getattr(opt, "mask", None) == "fisher":
                opt.refresh_mask(per_sample)
            mean = per_sample.mean() if weight is None else (weight.to(per_sample)[y] * per_sample).mean()
            (scaler.scale(mean) if scaler else mean).backward(retain_graph=number + 2 < len(opt.phases))
        getattr(opt, phase)(**({"scaler": scaler} if scaler and number == 0 else {}))
        opt.zero_grad()


ETA = 10
"""Classes with fewer of the ``COUNTS`` are tail."""


def tail_of(y):
    """Which samples are of tail classes."""
    return torch.tensor(COUNTS)[y] < ETA


def imb_sam_step(optimizer, model, x, y, factor=1):
    """One step as scripts for the authors' ImbSAM take it; ``factor`` is the tail's weight."""
    loss, tail = losses(model, x, y), tail_of(y)
    (loss[~tail].sum() / len(y)).backward(retain_graph=True)
    optimizer.first_step()
    (factor * loss[tail].sum() / len(y)).backward()
    optimizer.second_step()
    (factor * losses(model, x, y)[tail].sum() / len(y)).backward()
    optimizer.third_step()


_CC = {"class_counts": [50, 20, 2, 1], "scope": "all", "noise_ratio": 1e-2}

EVERY = {
    "SAM": Row("SAM", oracles.sam),
    "FocalSAM": Row("FocalSAM", oracles.focal_sam, {"class_counts": COUNTS, "gamma": 3.0, "lam": 0.5}),
    "ImbSAM": Row("ImbSAM", oracles.imb_sam, {"class_counts": COUNTS, "eta": 10}),
    "SSESAM": Row(
        "SSESAM", oracles.sse_sam, {"class_counts": COUNTS, "eta": 10, "tail_rho": 0.2, "switch_step": 5},
        passes=("w", "e", "e"), unperturbed={"rho": 0.0, "tail_rho": 0.0},
        counts_tried=True,
    ),
    "CCSAM": Row("CCSAM", oracles.cc_sam, _CC, passes=("w", *"eeee"), unperturbed={"noise_ratio": 0.0}, adaptive=False),
    "GNM": Row(
        "GNM", oracles.gnm, {"seed": SEED}, {"noise": noise, "loss_there": True},
        passes=("e",), adaptive=False, joined=True,
    ),
    "FriendlySAM": Row(
        "FriendlySAM", oracles.friendly_sam, {"sigma": 0.7, "lmbda": 0.6}, state=("grad_mean",), averages=True
    ),
    "MicroBatchSAM": Row(
        "MicroBatchSAM", oracles.micro_batch_sam, {"m": 5},
        passes=("w", "e") * 4, by_parts=True, indexed=True, joined=True,
    ),
    "SparseSAM": Row(
        "SparseSAM", oracles.sparse_sam, {"sparsity": 0.7, "refresh_every": 4, "num_samples": 6},
        by_parts=True, in_phases={"refresh_every": 1}, counts_tried=True, state=("mask",),
    ),
    "ESAM": Row(
        "ESAM", oracles.esam, {"seed": SEED}, {"mask": coordinates}, passes=("w", "e", "e"),
        unperturbed={"rho": 0.0, "gamma": 1.0}, in_phases={"gamma": 1.0}, by_parts=True, indexed=True,
    ),
    "LookSAM": Row(
        "LookSAM", oracles.look_sam, {"k": 3}, unperturbed={"rho": 0.0, "alpha": 0.0}, counts_tried=True,
        state=("grad_v",), joined=True,
    ),
    "GSAM": Row("GSAM", oracles.gsam, joined=True),
    "WSAM": Row("WSAM", oracles.wsam, joined=True),
    "MomentumSAM": Row(
        "MomentumSAM", oracles.momentum_sam, {"direction": "last_gradient"},
        passes=("w",), state=("last_gradient",), averages=True, joined=True,
    ),
    "TailMomentumSAM": Row(
        "TailMomentumSAM", oracles.tail_momentum_sam, {"class_counts": COUNTS, "gamma": 2.0, "lam": 0.7, "decay": 0.8},
        passes=("w",), state=("tail_mean",), averages=True, joined=True,
    ),
    "VaSSO": Row("VaSSO", oracles.vasso, {"theta": 0.3}, state=("ascent_mean",), averages=True),
}  # fmt: skip
"""Every method, one row each."""

ROWS = EVERY | {
    "ASAM": EVERY["SAM"].having(adaptive=True),
    "ASAM-eta": dataclasses.replace(EVERY["SAM"], groups=scaled_weights_only),
    "Unified": EVERY["SAM"].having(unified_lambda=0.3, adaptive=True),
    "Unified-1/t": EVERY["SAM"].having(unified_lambda="1/t"),
    "LE-SAM": EVERY["SAM"].having(loss_budget=0.05, total_steps=40),
    "Stable": EVERY["SAM"].having(renormalize=True),
    "MomentumSAM-m": EVERY["MomentumSAM"].having(direction="momentum"),
    "FocalSAM-1.1": EVERY["FocalSAM"].having(gamma=2.0, lam=1.1),
    "FocalASAM": EVERY["FocalSAM"].having(gamma=1.0, lam=0.8, adaptive=True),
    "ImbSAM-2": EVERY["ImbSAM"].having(eta=20, tail_weight=2.0, adaptive=True),
    "SSESAM-1": EVERY["SSESAM"].having(tail_rho=None, switch_step=None),
    "GNM-decay": EVERY["GNM"].having(dis_mul=2.0, decay_every=7),
    "FriendlyASAM": EVERY["FriendlySAM"].having(sigma=1.0, lmbda=0.9, adaptive=True),
    "ESAM-tensor": dataclasses.replace(
        EVERY["ESAM"].having(granularity="tensor"), others={"mask": tensors}
    ),
    "GSAM-lr": EVERY["GSAM"].having(alpha=0.2, rho_min=0.02, rho_max=0.2, adaptive=True),
    "WSAM-coupled": EVERY["WSAM"].having(decouple=False, gamma=0.6),
}  # fmt: skip
"""And their variants, for the formulas."""

PHASED = tuple(name for name, row in EVERY.items() if row.of("phases").make(network(), lr=0.1).phases)
DRIVEN = [(name, "closure") for name in EVERY] + [(name, "phases") for name in PHASED]

every = pytest.mark.parametrize("name", EVERY)
phased = pytest.mark.parametrize("name", PHASED)
driven = pytest.mark.parametrize(("name", "interface"), DRIVEN)
"""Every method in each of its interfaces."""
on_cpu = pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in lf.backends()], indirect=True)
"""The backends that take CPU tensors at full speed; test_every_backend.py has the others."""

BASES = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "maximize": (SGD, {"lr": 0.02, "momentum": 0.5, "maximize": True, "weight_decay": 1e-2}),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 1e-2}),
    "adam-amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95)}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "adagrad": (Adagrad, {"lr": 0.05}),
    "adadelta": (Adadelta, {"lr": 0.5}),
}
SOME = ("nesterov", "dampening", "adamw", "rmsprop")
"""One base for each kind: fused SGD, one that counts steps, fused Adam, unfused."""
KINDS = ("nesterov", "adamw", "rmsprop")
"""One for each way to step: fused SGD, fused Adam, by itself."""


def with_bases(*names):
    return pytest.mark.parametrize("base", names)


EACH_WAY = [(name, base, "closure") for name in EVERY for base in KINDS]
EACH_WAY += [(name, "nesterov", "phases") for name in PHASED]
each_way = pytest.mark.parametrize(("name", "base", "interface"), EACH_WAY)
"""Every method with each kind of base, and in both interfaces."""


@functools.cache
def expected(name, base, interface, steps):
    """The oracle's weights and losses over ``batches(steps=steps)``."""
    if interface == "phases" and not ROWS[name].in_phases:
        return expected(name, base, "closure", steps)
    return ROWS[name].of(interface).expected(*BASES[base], batches(steps=steps))
