"""Numbers as options: any real one is taken and kept as one of Python's; what is none, truth values too, is refused by name."""

import inspect
import io
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import ltsam_fast as lf

from .method_rows import EVERY
from .oracles import batches, flat, network

GROUP = ("rho", "eta", "norm_eps")
COUNTED = (
    "k", "m", "refresh_every", "num_samples", "seed", "decay_every", "total_steps", "switch_step", "eta",
)  # fmt: skip
"""Options that count; the others are shares."""
NOT = ("self", "params", "base_optimizer", "class_counts", "model", "base_kwargs", "scope", "head", "mask", "granularity",
       "tail_classes", "adaptive", "decouple", "shared_backward", "ascent_sync")  # fmt: skip


def options():
    """Method and option, for all numbers in the constructors."""
    for name, row in EVERY.items():
        for option in inspect.signature(row.cls).parameters:
            if option not in NOT:
                yield name, option


def make(name, option, value):
    pair = {"rho_min": 0.1, "rho_max": 0.2} if option in ("rho_min", "rho_max") else {}
    model = network()
    return EVERY[name].make(model, SGD, **{**pair, option: value, "lr": 0.1}), model


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_real_numbers_are_numbers(name, option):
    value, ends = 4 if option in COUNTED else 0.5, []
    kinds = (np.int64, np.int8, np.uint16) if option in COUNTED else (np.float32, np.float16, np.float64, Fraction)
    for kind in (type(value), *kinds):
        opt, model = make(name, option, kind(value))
        EVERY[name].drive("closure", opt, model, batches(steps=2))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file, weights_only=True))
        kept = opt.param_groups[0]["rho"] if option == "rho" else getattr(opt, option, value)
        assert type(kept) in (int, float) and kept == value
        ends.append(flat(model))
    assert all(torch.equal(one, ends[0]) for one in ends)


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_what_is_no_number_is_refused_by_name(name, option):
    for value in (True, False, np.True_, "0.5", Decimal("0.5"), 0.5j, float("nan"), torch.tensor(0.5), [1]):
        with pytest.raises(ValueError, match=f"^{option} must be .*, got"):
            make(name, option, value)


@pytest.mark.parametrize("option", [*GROUP, "lr_max"])
def test_options_of_groups(option):
    opt = lf.GSAM([nn.Parameter(torch.zeros(2))], SGD, rho_min=0.1, rho_max=0.2, lr=0.1)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], option: np.float32(0.5)})
    assert type(opt.param_groups[1][option]) is float
    for value in (True, "a", torch.tensor(0.5)):
        with pytest.raises(ValueError, match=f"{option} must be"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], option: value})
    assert len(opt.param_groups) == 2
