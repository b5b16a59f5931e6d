"""Measures a perturbation after rounding: weights in 16 bits, and fp32 weights under autocast."""

from __future__ import annotations

import pytest
import torch

from bench.measure import DEVICE, machine
from ltsam_fast import ops

WEIGHTS = 25_000_000
"""As many as in ResNet-50; the more weights, the smaller the perturbation of each."""
DRAWS = 256
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32 (autocast)": torch.float32}


def moved(w, g, rho, dtype, **options):
    """Returns the rounded perturbation of weights of a dtype."""
    stored = w.to(dtype)
    before = stored.double()
    ops.perturb_([stored], [g], None, g.norm(), rho=rho, **options)
    return stored.double() - before


def alike(actual, wanted):
    """Returns the cosine to the wanted perturbation, and the length along it in units of its norm."""
    along = (actual @ wanted) / wanted.norm()
    return {"cosine": (along / actual.norm()).item(), "length": (along / wanted.norm()).item()}


@pytest.mark.parametrize("name", DTYPES)
def test_perturbation_that_is_left(benchmark, name, request):
    """Rounding to nearest loses most of it, stochastic rounding keeps its mean, fp32 weights keep it."""
    count = WEIGHTS if not benchmark.disabled else 10_000
    generator = torch.Generator().manual_seed(0)
    w, g = ((scale * torch.randn(count, generator=generator)).to(DEVICE) for scale in (0.05, 1.0))
    wanted = 0.05 * g.double() / g.double().norm()
    benchmark.group = "16 bits"
    benchmark.pedantic(moved, (w, g, 0.05, DTYPES[name]), rounds=1)
    rows = [{"weights": name, "rounding": "to nearest", **alike(moved(w, g, 0.05, DTYPES[name]), wanted)}]
    if DTYPES[name] != torch.float32:
        # A hundredth of the weights, with the perturbation that they have among all, is enough for the mean.
        few, share = slice(0, count // 100), 0.05 * g[: count // 100].norm().item() / g.norm().item()
        mean = torch.zeros_like(wanted[few])
        for step in range(DRAWS):
            one = moved(w[few], g[few], share, DTYPES[name], stochastic=True, seed=1, step=step)
            mean += one / DRAWS
        rows.append({"weights": name, "rounding": "random, one step", **alike(one, wanted[few])})
        rows.append({"weights": name, "rounding": f"random, mean of {DRAWS} steps", **alike(mean, wanted[few])})
        assert abs(rows[-1]["length"] - 1) < (0.05 if not benchmark.disabled else 0.5)
    else:
        assert rows[0]["cosine"] > 0.99
    if not benchmark.disabled:
        benchmark.extra_info.update(machine(request), table="16 bits", rows=rows)
