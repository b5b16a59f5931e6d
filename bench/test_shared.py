"""Times training steps with one backward pass for both gradients, against SAM's and against two backwards."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ltsam_fast as lf
from bench.measure import BASE, DEVICE, interleaved, machine, timed
from bench.test_end2end import COUNTS, NETWORKS

FOCAL = {"class_counts": COUNTS, "gamma": 3.0, "lam": 0.5}
IMPLEMENTATIONS = {
    "SAM": ("SAM", {}, False),
    "Focal-SAM, two backwards": ("FocalSAM", FOCAL, False),
    "Focal-SAM, shared": ("FocalSAM", FOCAL, True),
    "ImbSAM, two backwards": ("ImbSAM", {"class_counts": COUNTS, "eta": 1000}, False),
    "ImbSAM, shared": ("ImbSAM", {"class_counts": COUNTS, "eta": 1000}, True),
}


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of rank 8."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            base,
            nn.Linear(base.in_features, 8, False),
            nn.Linear(8, base.out_features, False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapter(nn.Module):
    """A frozen linear layer and a trained bottleneck of 16 dimensions."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.out_features, 16), nn.Linear(16, base.out_features)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


def _frozen(model, wrap, chosen):
    """Freezes the network, wraps the linear layers that ``chosen`` selects, and trains the last one."""
    model.requires_grad_(False)
    linear = [
        (m, name, child) for m in model.modules() for name, child in m.named_children() if type(child) is nn.Linear
    ]
    for parent, name, child in linear[:-1]:
        if chosen(child):
            setattr(parent, name, wrap(child))
    linear[-1][2].requires_grad_(True)
    return model


TRAINED = {
    "all": lambda model: model,
    "LoRA": lambda model: _frozen(model, LoRA, lambda _: True),
    "adapters": lambda model: _frozen(model, Adapter, lambda layer: layer.in_features > layer.out_features),
}


class Training:
    """Steps on one batch."""

    def __init__(self, network, trained, implementation, small):
        make, shape, _ = NETWORKS[network]
        torch.manual_seed(0)
        self.model = TRAINED[trained](make()).to(DEVICE)
        self.x = torch.randn(4 if small else shape[0], *shape[1:], device=DEVICE)
        shares = torch.tensor(COUNTS, dtype=torch.float)
        self.y = torch.multinomial(shares, len(self.x), replacement=True).to(DEVICE)
        method, options, shared = IMPLEMENTATIONS[implementation]
        options = {**options, "model": self.model, "shared_backward": True} if shared else options
        params = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = getattr(lf, method)(params, torch.optim.SGD, rho=0.05, **options, **{**BASE, "lr": 0.01})

    def losses(self):
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def __call__(self):
        return timed(lambda: self.optimizer.step(self.losses, targets=self.y))


def _peak(training):
    """Returns the peak memory of a step in MB, on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("network", ("small_vit", "vit_b16"))
def test_shared_backward(benchmark, network, trained, request):
    if network == "vit_b16" and DEVICE == "cpu":
        pytest.skip("a step takes minutes without a GPU")
    make = functools.partial(Training, network, trained, small=benchmark.disabled)
    trainings = {name: make(name) for name in IMPLEMENTATIONS}
    for training in trainings.values():
        training()  # the first step analyzes the network
    rounds = 1 if benchmark.disabled else 20 if DEVICE == "cuda" else 9
    times = dict(zip(trainings, interleaved(list(trainings.values()), rounds), strict=True))
    benchmark.pedantic(trainings["SAM"], rounds=1)
    if benchmark.disabled:
        return
    for name, seconds in times.items():
        ratio = statistics.median(mine / sam for mine, sam in zip(seconds, times["SAM"], strict=True))
        row = {"network": network, "trained": trained, "method": name, "ms": 1e3 * statistics.median(seconds)}
        row |= {"ratio_sam": ratio, **({"peak_mb": _peak(trainings[name])} if DEVICE == "cuda" else {})}
        benchmark.extra_info.setdefault("rows", []).append(row)
    benchmark.extra_info.update(machine(request), table="shared")
