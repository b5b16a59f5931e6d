"""The oracles once more, on every backend that runs here, the Triton interpreter and a GPU included."""

from __future__ import annotations

import pytest
import torch

from . import family
from .methods import BASES, METHODS
from .oracles import batches, flat, network, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("base", ["nesterov", "adamw"])
@pytest.mark.parametrize("name", ["SAM", "ASAM", "FocalSAM"])
def test_25_steps_agree_with_the_oracle(name, base, dtype, backend, device):
    method, (kind, options) = METHODS[name], BASES[base]
    model = network(dtype).to(device)
    data = [(x.to(device), y.to(device)) for x, y in batches(dtype)]
    assert len(data) == 25
    weights = method.drive("closure", method.make(model, kind, **options), model, data)
    assert relative_error(weights.cpu(), method.oracle(kind, options, batches())[0].cpu()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", family.EACH)
def test_25_steps_of_the_family_agree_with_their_oracles(name, backend, device):
    row, (kind, options) = family.ROWS[name], BASES["nesterov"]
    for dtype in TOLERANCE:
        model = network(dtype).to(device)
        family.drive(row.make(model, kind, **options), model, [(x.to(device), y.to(device)) for x, y in batches(dtype)])
        expected, _ = family.expected(name, "nesterov")
        assert relative_error(flat(model).cpu(), expected) < TOLERANCE[dtype]
