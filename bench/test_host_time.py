"""Times the phases on tensors of four elements, in turns with the plain loop and torch's SGD: what is left is host time."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.measure import BASE, DEVICE, PHASES, Step, interleaved, machine, timed


class FusedSGD:
    """One step of torch's own SGD in its fastest form, with the weights and gradients of another optimizer's step."""

    def __init__(self, step):
        self.params, self.grads = step.params, step.grads[0]
        self.optimizer = torch.optim.SGD(self.params, fused=True, **BASE)

    def __call__(self):
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad.clone()
        return timed(self.optimizer.step)


@pytest.mark.parametrize("tensors", [95, 2000])
@pytest.mark.parametrize("method", list(PHASES))
def test_host_time(benchmark, method, tensors, request):
    """The default backend's phases."""
    benchmark.group = f"host time, {method}"
    ours, plain = (Step(method, name, [(4,)] * tensors) for name in (DEVICE, "plain"))
    steps = [ours, plain, FusedSGD(Step(method, DEVICE, [(4,)] * tensors))]
    for step in steps * 2:
        step()
    benchmark.pedantic(ours, rounds=1 if benchmark.disabled else 5)
    if benchmark.disabled:
        return
    columns = interleaved(steps, 40000 // tensors)
    host, loop, sgd = (1e6 * statistics.median(column) for column in columns)
    row = {"method": method, "tensors": tensors, "host_us": host, "plain_us": loop, "torch_sgd_us": sgd}
    row |= {"ratio": loop / host, "ratio_torch_sgd": host / sgd}
    benchmark.extra_info.update(machine(request), table="host", **row)
