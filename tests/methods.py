"""The rows of the methods' tests: methods, bases, and the ways to drive a step. A later method is one more row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

import ltsam_fast as lf

from . import oracles
from .oracles import COUNTS, losses

RHO = 0.1


def one_group(model):
    return [{"params": list(model.parameters())}]


def scaled_weights_only(model):
    """The official ASAM: |w| + eta for weights, biases as they are."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "adaptive": True, "eta": 0.01}, {"params": biases, "adaptive": False}]


def sam_phases(method, opt, model, x, y, loss=losses):
    loss(model, x, y).mean().backward()
    opt.first_step(zero_grad=True)
    loss(model, x, y).mean().backward()
    opt.second_step(zero_grad=True)


def focal_phases(method, opt, model, x, y, loss=losses):
    v = method.weights[1].to(x.dtype)[y]
    at_w = loss(model, x, y)
    ((1 - v) * at_w).mean().backward(retain_graph=True)
    opt.first_step()
    (v * at_w).mean().backward()
    opt.second_step()
    (v * loss(model, x, y)).mean().backward()
    opt.third_step()


@dataclass(frozen=True)
class Method:
    cls: type
    weights: tuple[torch.Tensor, torch.Tensor]
    """The oracle's class weights u and v."""
    phases: Callable[..., None]
    options: dict[str, Any] = field(default_factory=dict)
    """The constructor's own keywords."""
    groups: Callable[..., list[dict[str, Any]]] = one_group

    def make(self, model, base=SGD, params=None, /, **options):
        groups = self.groups(model) if params is None else params
        return self.cls(groups, base, **{"rho": RHO, **self.options, **options})

    def closure(self, opt, model, x, y, loss=losses, **more):
        return opt.step(lambda: loss(model, x, y), targets=y, **more)

    def drive(self, interface, opt, model, data):
        """Steps over the batches; returns the weights."""
        for x, y in data:
            if interface == "closure":
                self.closure(opt, model, x, y)
            else:
                self.phases(self, opt, model, x, y)
        return oracles.flat(model)

    def oracle(self, base, options, data, max_grad_norm=0.0):
        """The weights and the losses that an oracle gets."""

        def groups(model):
            adaptive = self.options.get("adaptive", False)
            return [{"rho": RHO, "adaptive": adaptive, **group} for group in self.groups(model)]

        return oracles.trajectory(groups, *self.weights, base, options, data, max_grad_norm)


def _focal(gamma, lam, **more):
    options = {"class_counts": COUNTS, "gamma": gamma, "lam": lam, **more}
    return Method(lf.FocalSAM, oracles.focal_weights(COUNTS, gamma, lam), focal_phases, options)


METHODS = {
    "SAM": Method(lf.SAM, oracles.sam_weights(), sam_phases),
    "ASAM": Method(lf.SAM, oracles.sam_weights(), sam_phases, {"adaptive": True}),
    "ASAM-eta": Method(lf.SAM, oracles.sam_weights(), sam_phases, groups=scaled_weights_only),
    "FocalSAM": _focal(3.0, 0.5),
    "FocalSAM-1.1": _focal(2.0, 1.1),
    "FocalASAM": _focal(1.0, 0.8, adaptive=True),
}
"""Every variant of every method."""
EACH = ("SAM", "FocalSAM")
"""One row for each class, for behaviour that does not depend on the formula."""
INTERFACES = ("closure", "phases")
on_cpu = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
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
