"""Times the phases on tensors of four elements, in turns with the plain loop: what is left is the host's time."""

from __future__ import annotations

import statistics

import pytest

from bench.measure import DEVICE, PHASES, Step, interleaved, machine


@pytest.mark.parametrize("tensors", [95, 2000])
@pytest.mark.parametrize("method", list(PHASES))
def test_host_time(benchmark, method, tensors, request):
    """The default backend's phases."""
    benchmark.group = f"host time, {method}"
    steps = [Step(method, name, [(4,)] * tensors) for name in (DEVICE, "plain")]
    for step in steps * 2:
        step()
    benchmark.pedantic(steps[0], rounds=1 if benchmark.disabled else 5)
    if benchmark.disabled:
        return
    ours, plain = (1e6 * statistics.median(column) for column in interleaved(steps, 40000 // tensors))
    row = {"method": method, "tensors": tensors, "host_us": ours, "plain_us": plain, "ratio": plain / ours}
    benchmark.extra_info.update(machine(request), table="host", **row)
