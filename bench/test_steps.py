"""Optimizer work of a whole step: method x network x backend, with the plain loop in the same run."""

from __future__ import annotations

import statistics

import pytest
import torch

import ltsam_fast as lf
from bench.measure import BYTES, Step, interleaved, roof
from bench.shapes import SHAPES, names

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[DEVICE]
NETWORKS = list(names())


@pytest.fixture(scope="session")
def measured_roof():
    return roof(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", list(BYTES))
def test_step(benchmark, method, network, backend, request):
    if reason := lf.backend.why_not(backend):
        pytest.skip(f"{backend}: {reason}")
    benchmark.group = f"{method}, {network}"
    shapes = SHAPES[network]()
    ours, plain = (Step(method, implementation, shapes, DEVICE) for implementation in (backend, "plain"))
    for _ in range(2):
        ours(), plain()
    # No figure for a wrong result.
    for mine, other in zip(ours.params, plain.params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if benchmark.disabled:
        benchmark.pedantic(ours, rounds=1)
        return
    rounds = 200 if ours.elements < 1e6 else 20
    times = interleaved([ours, plain], rounds)
    benchmark.pedantic(ours, rounds=5)
    fused, loop = (statistics.median(column) for column in times)
    bandwidth = request.getfixturevalue("measured_roof")
    moved = BYTES[method] * ours.elements
    benchmark.extra_info.update(
        method=method,
        network=network,
        backend=backend,
        tensors=len(shapes),
        elements=ours.elements,
        bytes=moved,
        fused_ms=1e3 * fused,
        plain_ms=1e3 * loop,
        ratio=loop / fused,
        gb_per_s=moved / fused / 1e9,
        roof_gb_per_s=bandwidth / 1e9,
        share_of_roof=moved / fused / bandwidth,
        ratio_at_roof=loop / (moved / bandwidth),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    )
