"""The oracles once more, on every backend that runs here, the Triton interpreter and a GPU included."""

from __future__ import annotations

import pytest
import torch

from .method_rows import BASES, EVERY, ROWS, expected
from .oracles import STEPS, batches, network, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "base"),
    [
        *(
            (name, "nesterov")
            for name in (*EVERY, "ASAM", "MomentumSAM-m", "Unified", "Unified-1/t", "LE-SAM", "Stable")
        ),
        *((name, "adamw") for name in ("SAM", "FocalSAM", "MomentumSAM-m")),
    ],
)
def test_steps_agree_with_the_oracle(name, base, dtype, backend, device):
    steps = (
        4 if backend == "triton" and device == "cpu" else STEPS
    )  # the interpreter takes a tenth of a second for each
    row, (kind, options) = ROWS[name], BASES[base]
    model = network(dtype).to(device)
    data = [(x.to(device), y.to(device)) for x, y in batches(dtype, steps)]
    weights = row.drive("closure", row.make(model, kind, **options), model, data)
    assert relative_error(weights.cpu(), expected(name, base, "closure", steps)[0]) < TOLERANCE[dtype]
