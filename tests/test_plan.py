"""Which passes a step runs."""

import pytest
import torch

from .method_rows import EVERY, every, phased
from .oracles import batches, losses, network


def passes_of(row, interface="closure", steps=1, **options):
    """For each step a string: "w" and "e" for its evaluations at w and at w + eps."""
    model, seen = network(), []
    opt = row.make(model, lr=0.1, **options)

    def loss(model, x, y):
        assert torch.is_grad_enabled() or row.method == "ESAM"  # which looks at the losses at w + eps
        seen[-1] += "e" if opt.is_perturbed else "w"
        return losses(model, x, y)

    for x, y in batches(steps=steps):
        seen.append("")
        row.step(interface, opt, model, x, y, loss)
        assert all(p.grad is None for p in model.parameters())
    return seen


@every
def test_a_step_evaluates_as_often_as_its_method_says(name):
    assert passes_of(EVERY[name]) == ["".join(EVERY[name].passes)]


@phased
def test_the_phases_need_the_same_passes(name):
    row = EVERY[name].of("phases")
    assert passes_of(row, "phases", steps=3) == passes_of(row, steps=3)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("ImbSAM", {"eta": 0}, ["w"] * 3),
        ("FocalSAM", {"lam": 0.0}, ["w"] * 3),
        ("FocalSAM", {"gamma": 0.0, "lam": 1.0}, ["we"] * 3),
        ("SSESAM", {"switch_step": 1}, ["wee", "we", "we"]),
        ("LookSAM", {"k": 2}, ["we", "w", "we"]),
        ("MSAM", {"m": 16}, ["we"] * 3),
    ],
)
def test_what_is_weighed_with_zero_or_not_due_is_not_run(name, options, passes):
    assert passes_of(EVERY[name], steps=3, **options) == passes
