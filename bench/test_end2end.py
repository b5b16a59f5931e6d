"""Times whole training steps: network x method x implementation, in turns."""

from __future__ import annotations

import contextlib
import functools
import statistics

import pytest
import torch
import torch.nn.functional as F

import ltsam_fast as lf
from bench.measure import BASE, DEVICE, interleaved, machine, timed
from ltsam_fast import models, ops, plain

RATE = BASE | {"lr": 1e-3}  # with 0.1, rounding alone makes weights differ by 0.2 of their change in five steps
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
losses_of = functools.partial(F.cross_entropy, reduction="none")
NETWORKS = {
    "resnet32": (lambda: models.create("resnet32", 10, (3, 32, 32)), (64, 3, 32, 32), None),
    "small_vit": (lambda: models.small_vit(10, 32, patch=4, dim=192, depth=6, heads=3), (64, 3, 32, 32), None),
    "vit_b16": (
        lambda: models.small_vit(10, 224, patch=16, dim=768, depth=12, heads=12),
        (64, 3, 224, 224),
        torch.bfloat16,
    ),
}
"""Network, shape of a batch, dtype of autocast."""


class Training:
    """Steps of one implementation on a batch."""

    def __init__(self, network, method, implementation, small=False):
        make, shape, self.autocast = NETWORKS[network]
        torch.manual_seed(0)
        self.model = make().to(DEVICE)
        self.x = torch.randn(2 if small else shape[0], *shape[1:], device=DEVICE)
        self.y = torch.randint(0, 10, (len(self.x),), device=DEVICE)
        self.v = ops.focal_weights(COUNTS, 3.0, 0.5).float().to(DEVICE)
        params = self.model.parameters()
        if implementation == "reference":
            self.run = {"SGD": self.sgd, "SAM": self.plain_sam, "FocalSAM": self.plain_focal_sam}[method]
            cls = getattr(plain, method, None)
            self.optimizer = cls(params, torch.optim.SGD, rho=0.2, **RATE) if cls else torch.optim.SGD(params, **RATE)
            return
        # Focal-SAM with lam = 0 is SGD, with one pass.
        options = {"FocalSAM": {"class_counts": COUNTS, "gamma": 3.0}, "SGD": {"class_counts": COUNTS, "lam": 0.0}}
        cls = lf.SAM if method == "SAM" else lf.FocalSAM
        self.optimizer = cls(params, torch.optim.SGD, rho=0.2, **options.get(method, {}), **RATE)
        if implementation == "graph":
            step = lf.graph_step(self.model, losses_of, self.optimizer, (self.x, self.y), autocast=self.autocast)
            self.run = lambda: step(self.x, self.y)
        else:
            self.run = lambda: self.optimizer.step(self.losses, targets=self.y)

    def losses(self):
        autocast = torch.autocast(DEVICE, self.autocast) if self.autocast else contextlib.nullcontext()
        with autocast:
            return losses_of(self.model(self.x), self.y)

    def sgd(self):
        self.optimizer.zero_grad()
        self.losses().mean().backward()
        self.optimizer.step()

    def plain_sam(self):
        self.losses().mean().backward()
        self.optimizer.first_step(zero_grad=True)
        self.losses().mean().backward()
        self.optimizer.second_step(zero_grad=True)

    def plain_focal_sam(self):
        losses, v = self.losses(), self.v[self.y]
        ((1 - v) * losses).mean().backward(retain_graph=True)
        self.optimizer.first_step()
        (v * losses).mean().backward()
        self.optimizer.second_step()
        (v * self.losses()).mean().backward()
        self.optimizer.third_step()

    def __call__(self):
        return timed(self.run)

    def weights(self):
        """Returns all weights, concatenated."""
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()


def assert_same_steps(trainings, start):
    """Checks the results before they are timed: the same steps must have changed the weights alike."""
    reference, *others = (training.weights() - start for training in trainings)
    for training, moved in zip(trainings[1:], others, strict=True):
        difference = float((moved - reference).norm() / reference.norm())
        limit = 0.05 if training.autocast is None else 0.3  # 16 bits round the gradients of the two losses differently
        assert difference < limit, (
            f"weights differ by {difference:.3f} of their change, but should by less than {limit}"
        )


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(benchmark, network, request):
    """The plain implementation, the fused one, and the fused one captured in a CUDA graph."""
    if network == "vit_b16" and DEVICE == "cpu":
        pytest.skip("a step takes minutes without a GPU")
    implementations = ["reference", "fused", *(["graph"] if DEVICE == "cuda" else [])]
    names = [(method, one) for method in ("SGD", "SAM", "FocalSAM") for one in implementations]
    trainings = [Training(network, *name, small=benchmark.disabled) for name in names]
    start = trainings[0].weights().clone()
    for training in trainings * (5 if DEVICE == "cuda" else 1):  # graphs are captured in the fourth step
        training()
    for first in range(0, len(trainings), len(implementations)):
        assert_same_steps(trainings[first : first + len(implementations)], start)
    rounds = 1 if benchmark.disabled else 20 if DEVICE == "cuda" else 5
    times = dict(zip(names, map(statistics.median, interleaved(trainings, rounds)), strict=True))
    benchmark.pedantic(trainings[-1], rounds=1)
    if benchmark.disabled:
        return
    for (method, implementation), seconds in times.items():
        row = {"network": network, "method": method, "implementation": implementation, "ms": 1e3 * seconds}
        row |= {
            "ratio_reference": times[method, "reference"] / seconds,
            "ratio_sgd": times["SGD", "reference"] / seconds,
        }
        benchmark.extra_info.setdefault("rows", []).append(row)
    benchmark.extra_info.update(machine(request), table="whole")
