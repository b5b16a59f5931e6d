"""The published loops, which benchmarks and the demo compare with, take the steps of the optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ltsam_fast as lf
from ltsam_fast import plain

COUNTS = [40, 12, 5, 3]
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ROWS = [
    ("SAM", {}),
    ("SAM", {"adaptive": True}),
    ("FocalSAM", {"class_counts": COUNTS, "gamma": 3.0, "lam": 0.7}),
    ("ImbSAM", {"class_counts": COUNTS, "eta": 6}),
    ("SSESAM", {"class_counts": COUNTS, "eta": 6}),
    ("SSESAM", {"class_counts": COUNTS, "eta": 6, "switch_step": 2}),
    ("CCSAM", {"class_counts": COUNTS, "noise_ratio": 0.05}),
    ("CCSAM", {"class_counts": COUNTS, "noise_ratio": 0.01, "scope": "all"}),
    ("GNM", {"rho": 0.0}),  # with noise, which each draws in its own way, they differ
    ("FriendlySAM", {}),
    ("GSAM", {}),
]


def trained(module, name, options, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)).double()
    options = {"rho": 0.3, **options} | ({"head": model[-1]} if name == "CCSAM" else {})
    groups = [{"params": model[1].parameters(), "rho": options["rho"] / 3}, {"params": model[0].parameters()}]
    groups.append({"params": model[-1].parameters(), "perturb": name == "CCSAM"})
    optimizer = getattr(module, name)(groups, torch.optim.SGD, **options, **BASE)
    start, y = copy.deepcopy(model), torch.arange(12) % 4
    for x in torch.randn(steps, 12, 6, dtype=torch.double):
        optimizer.step(
            lambda index=slice(None), x=x: F.cross_entropy(model(x[index]), y[index], reduction="none"), targets=y
        )
    moved = [(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    return torch.cat(moved).detach()


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_published_loops_take_the_same_steps(name, options):
    published, ours = trained(plain, name, options), trained(lf, name, options)
    torch.testing.assert_close(published, ours, rtol=1e-6, atol=1e-9)
    unperturbed = trained(plain, name, {"rho": 0.0} | {k: v for k, v in options.items() if k != "rho"})
    if name not in ("CCSAM", "GNM"):
        assert (published - unperturbed).norm() > 1e-3 * published.norm()


def test_published_noise_is_that_of_gnm():
    w = nn.Parameter(torch.zeros(20_000))
    optimizer = plain.GNM([w], torch.optim.SGD, rho=2.0, lr=0.0)
    seen = []
    optimizer.step(lambda: (seen.append(w.detach().clone()), w.sum()[None])[1])
    assert abs(float(seen[0].std()) - 0.2 / 3) < 2e-3 and float(seen[0].abs().max()) <= 0.2001
    assert not w.any()
