"""Times forward and backward of each loss: loss x shape x implementation, in turns."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F

import ltsam_fast as lf
from bench.measure import DEVICE, facts, interleaved, machine, timed
from bench.test_steps import BACKENDS
from ltsam_fast import losses

SHAPES = ((64, 10), (256, 10), (64, 100), (128, 100), (256, 1000), (64, 8142))
LOSSES = ("CrossEntropy", "LogitAdjusted", "BalancedSoftmax", "LDAM", "VS", "ClassBalanced", "Focal", "GCL")


def plain(name, n):
    """Returns the loss as in published code, by torch's functions; its constants are computed before."""
    priors, rarity, margins = (n / n.sum()).log(), n.log().max() - n.log(), n**-0.25
    margins = 0.5 * margins / margins.max()
    scale, rarity = (n / n.max()) ** 0.3, 0.5 * rarity / rarity.max()
    weights, logs = losses.deferred_reweighting(1, n, 0).to(n), n.log()

    def focal(z, y):
        ce = F.cross_entropy(z, y, reduction="none")
        return (1 - torch.exp(-ce)) * ce

    def ldam(z, y):
        return F.cross_entropy(30 * (z - F.one_hot(y, len(n)) * margins[y][:, None]), y, reduction="none")

    def gcl(z, y):
        noise = torch.randn_like(z).div_(3).clamp_(-1, 1).abs_()
        return F.cross_entropy(30 * (z - noise * rarity), y, reduction="none")

    return {
        "CrossEntropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
        "LogitAdjusted": lambda z, y: F.cross_entropy(z + priors, y, reduction="none"),
        "BalancedSoftmax": lambda z, y: F.cross_entropy(z + logs, y, reduction="none"),
        "LDAM": ldam,
        "VS": lambda z, y: F.cross_entropy(z * scale + priors, y, reduction="none"),
        "ClassBalanced": lambda z, y: F.cross_entropy(z, y, weights, reduction="none"),
        "Focal": focal,
        "GCL": gcl,
    }[name]


class Call:
    """One implementation's forward and backward on fp32 logits."""

    def __init__(self, name, implementation, shape):
        rows, classes = shape
        generator = torch.Generator().manual_seed(0)
        n = torch.linspace(1000, 2, classes).round()
        self.z = torch.rand(shape, generator=generator).to(DEVICE).requires_grad_()
        self.y = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
        self.backend = None if implementation in ("plain", "automatic") else implementation
        mine = getattr(losses, name)(n, reduction="none").to(DEVICE)
        self.loss = plain(name, n.to(DEVICE)) if implementation == "plain" else mine

    def run(self):
        """Returns the losses and the gradient of their mean."""
        if self.backend is None:
            return self.both()
        with lf.use_backend(self.backend):
            return self.both()

    def both(self):
        found = self.loss(self.z, self.y)
        return found, torch.autograd.grad(found.mean(), self.z)[0]

    def __call__(self):
        return timed(self.run)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(benchmark, name, shape, request):
    """The loss as it is, each backend, torch among them, and the published formula (of plain cross entropy: torch's own)."""
    backends = [backend for backend in BACKENDS if not lf.backend.why_not(backend)]
    if not backends:
        pytest.skip(f"none of {', '.join(BACKENDS)} is available")
    names = ["automatic", *backends, "torch", "plain"]
    calls = [Call(name, implementation, shape) for implementation in names]
    benchmark.group = f"{name}, {shape[0]} x {shape[1]}"
    results = [call.run() for call in calls]
    # Check the results before they are timed. The plain formula draws other noise.
    for other in results[1 : -1 if name == "GCL" else None]:
        for mine, its in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    if benchmark.disabled:
        benchmark.pedantic(calls[0], rounds=1)
        return
    times = [statistics.median(column) for column in interleaved(calls, 300 if shape[1] < 100 else 30)]
    benchmark.pedantic(calls[0], rounds=5)
    for implementation, seconds in zip(names, times, strict=True):
        # Logits are read by both passes, the gradient is written.
        moved = 12 * shape[0] * shape[1]
        row = facts(request, shape[0] * shape[1], moved, seconds) | {
            "loss": name,
            "shape": f"{shape[0]} x {shape[1]}",
            "implementation": implementation,
            "call_us": 1e6 * seconds,
            "ratio_plain": times[-1] / seconds,
            "ratio_torch": times[-2] / seconds,
        }
        benchmark.extra_info.setdefault("rows", []).append(row)
    benchmark.extra_info.update(machine(request), table="losses")
