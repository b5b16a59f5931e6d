"""Drives the explicit phases of any method that has them."""

from .family import EVERY
from .oracles import network

PHASED = tuple(name for name, row in EVERY.items() if row.make(network(), lr=0.1).phases)
"""The methods that have phases in their first step."""


def step_in_phases(opt, losses):
    """One step, with one and the same loss before each phase; ``losses()`` gives the per-sample losses."""
    for number, phase in enumerate(opt.phases):
        if number or type(opt).__name__ != "GNM":  # whose first phase needs no gradient
            loss = losses()
            if number == 0 and getattr(opt, "mask", None) == "fisher":
                opt.refresh_mask(loss)
            loss.mean().backward()
        getattr(opt, phase)()
        opt.zero_grad()
