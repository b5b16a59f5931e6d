"""Times the optimizer's work in a step: method x network x backend, in turns with the plain loop."""

from __future__ import annotations

import os
import statistics
from unittest import mock

import pytest
import torch

import ltsam_fast as lf
from bench import peers
from bench.measure import (
    BYTES,
    DEVICE,
    PEER,
    MemoryBandwidth,
    Step,
    WholeStep,
    facts,
    interleaved,
    machine,
    synchronize,
)
from bench.shapes import SHAPES, names
from ltsam_fast import ops
from ltsam_fast.ops import dispatch
from ltsam_fast.table import TensorTable

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[DEVICE]
NETWORKS = [*names(), "tiny"]
COMPILED = ("resnet32", "resnet50")
"""Networks for which torch.compile is measured, too; compiling takes long."""
OPTIONS = {
    "sse_sam": {"eta": 20},
    "micro_batch_sam": {"m": 4},
    "sparse_sam": {"mask": "dynamic", "refresh_every": 10**9},
}
MOVED = {
    "sam": 40,
    "asam": 44,
    "focal_sam": 44,
    "imb_sam": 44,
    "cc_sam": 24,
    "sse_sam": 60,
    "gnm": 32,
    "friendly_sam": 52,
    "micro_batch_sam": 80,
    "sparse_sam": 40,
    "esam": 40,
    "look_sam": 38,
    "gsam": 52,
    "wsam": 44,
    "vasso": 52,
}
"""Bytes moved per parameter and step, as far as known (for LookSAM the mean)."""


def launches(step):
    """Returns the number of kernels that a step launches on a GPU, or of calls of native code on the CPU."""
    if DEVICE == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
    with mock.patch.object(dispatch, "launch", wraps=dispatch.launch) as calls:
        step()
    return calls.call_count


def available():
    """Returns the backends to be timed; skips the test if there is none."""
    found = [backend for backend in BACKENDS if not lf.backend.why_not(backend)]
    if not found:
        pytest.skip(f"none of {', '.join(BACKENDS)} is available")
    return found


def assert_alike(steps):
    """Checks the results before they are timed."""
    for other in steps[1:]:
        for mine, its in zip(steps[0].params, other.params, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", list(BYTES))
def test_step(benchmark, method, network, request):
    """Phases against the plain loop, torch's foreach and fused parts, and the peer; rounds in turns."""
    backends = available()
    benchmark.group = f"{method}, {network}"
    shapes = SHAPES[network]()[:: 10 if benchmark.disabled else 1]
    others = ["plain", "foreach", *([PEER] if peers.published(method) else [])]
    if network in COMPILED and not benchmark.disabled:
        others.append("compiled")
    steps = [Step(method, name, shapes) for name in (*backends, *others)]
    for step in steps * 2:
        step()
    assert_alike(steps)
    if benchmark.disabled:
        benchmark.pedantic(steps[0], rounds=1)
        return
    small_network = steps[0].elements < 1e6
    # The bandwidth of a shared machine drifts, so it is timed in the same rounds.
    memory = None if small_network else MemoryBandwidth()
    # The plain loop takes long for 2000 tensors.
    rounds = 200 if small_network and DEVICE == "cpu" else 20
    times = interleaved([*steps, *(memory.steps if memory else [])], rounds)
    benchmark.pedantic(steps[0], rounds=5)
    seconds = dict(zip((*backends, *others), map(statistics.median, times[: len(steps)]), strict=True))
    bandwidth = memory.bandwidth(times[len(steps) :]) if memory else None
    for backend in backends:
        ours = seconds[backend]
        row = facts(request, steps[0].elements, BYTES[method] * steps[0].elements, ours, bandwidth)
        for name in others:
            row |= {f"{name}_ms": 1e3 * seconds[name], f"ratio_{name}": seconds[name] / ours}
        small = Step(method, backend, [(4,)] * len(shapes))
        host = statistics.median(interleaved([small], 50 if DEVICE == "cpu" else 20)[0])
        row |= {"method": method, "network": network, "backend": backend, "tensors": len(shapes)}
        row |= {"launches": launches(small), "host_us": 1e6 * host, "ratio": row["ratio_plain"]}
        row["ratio_at_bandwidth"] = seconds["plain"] / (row["bytes"] / (1e9 * row["bandwidth_gb_per_s"]))
        benchmark.extra_info.setdefault("rows", []).append(row)
    benchmark.extra_info.update(machine(request), table="phases")


@pytest.mark.parametrize("network", ("resnet32", "vit_b16"))
@pytest.mark.parametrize("method", lf.list_methods())
def test_methods(benchmark, method, network, request):
    """The optimizer's work in a step of every method against the backend torch; autograd's time is left out."""
    backends = available()
    benchmark.group = f"methods, {network}"
    shapes = SHAPES[network]() if not benchmark.disabled else [(7, 3), (5,), (4, 7), (4,)]
    steps = [WholeStep(method, OPTIONS.get(method, {}), name, shapes) for name in (*backends, "torch")]
    for step in steps:
        step()
    assert_alike(steps)
    if benchmark.disabled:
        benchmark.pedantic(steps[0], rounds=1)
        return
    times = [statistics.median(column) for column in interleaved(steps, 30 if steps[0].elements < 1e6 else 3)]
    benchmark.pedantic(steps[0], rounds=2)
    for backend, ours in zip(backends, times, strict=False):
        moved = MOVED[method] * steps[0].elements if method in MOVED else None
        row = facts(request, steps[0].elements, moved, ours)
        row |= {"method": method, "network": network, "backend": backend, "torch_ms": 1e3 * times[-1]}
        benchmark.extra_info.setdefault("rows", []).append(row | {"ratio": times[-1] / ours})
    benchmark.extra_info.update(machine(request), table="methods")


@pytest.mark.parametrize("tensors", [1, 10, 100, 1000, 2000, 4000])
def test_growth_in_tensors(benchmark, tensors, request):
    """Times the norm of many tiny tensors, for its overhead."""
    grads = [torch.randn(16 + i % 17, device=DEVICE) for i in range(tensors)]
    grow(benchmark, request, "T", tensors, grads)


@pytest.mark.parametrize("power", range(10, 28, 2))
def test_growth_in_elements(benchmark, power, request):
    """Times the norm of one tensor."""
    grow(
        benchmark, request, "N", 2**power, [torch.randn(2 ** (power if not benchmark.disabled else 10), device=DEVICE)]
    )


PASSES = {
    "norm": (4, lambda w, g, b, m: ops.grad_norm([g])),
    "perturb": (16, lambda w, g, b, m: ops.perturb_([w], [g], [b], torch.ones((), device=DEVICE), rho=0.05)),
    "step": (20, lambda w, g, b, m: ops.sgd_step_([w], [g], momentum_buffers=[m], backups=[b], lr=0.0, momentum=0.9)),
}


@pytest.mark.parametrize("name", PASSES)
def test_billion(benchmark, name, request):
    """Times each pass over one tensor of a billion elements, if there is enough memory."""
    elements = 10**9 if not benchmark.disabled else 1000
    if DEVICE == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 4.5 * 4 * elements:
        pytest.skip(
            f"four tensors of {elements:.0e} elements need {18 * elements / 1e9:.0f} GB, free are {free / 1e9:.0f}"
        )
    w, g, b, m = (torch.full((elements,), 0.01, device=DEVICE) for _ in range(4))
    moved, run = PASSES[name]
    benchmark.group = "one tensor"

    def once():
        run(w, g, b, m)
        synchronize()

    benchmark.pedantic(once, rounds=1 if benchmark.disabled else 5, warmup_rounds=1)
    if not benchmark.disabled:
        row = facts(request, elements, moved * elements, benchmark.stats.stats.median)
        benchmark.extra_info.update(row, table="one tensor", **{"pass": name})


def grow(benchmark, request, what, size, grads):
    table = TensorTable(ops.OPS["grad_norm"])
    benchmark.group = f"norm against {what}"

    def run():
        ops.grad_norm(grads, table=table)
        synchronize()

    benchmark.pedantic(run, rounds=1 if benchmark.disabled else 50, warmup_rounds=2)
    if not benchmark.disabled:
        row = {"against": what, "size": size, "us": 1e6 * benchmark.stats.stats.median}
        benchmark.extra_info.update(machine(request), table="growth", **row)
