"""Weights of the classes in a method's losses."""

from __future__ import annotations

import torch
from torch import Tensor


class ClassWeights:
    """Weights of the classes in one loss.

    Args:
        values: Shape (C,), not all zero.
        open_ended: Whether the last entry stands for all further classes.
    """

    def __init__(self, values: Tensor, open_ended: bool = False) -> None:
        self.values, self.open_ended = values.double(), open_ended

    def of(self, labels: Tensor, losses: Tensor) -> Tensor:
        """The weights of samples with these labels, shape (B,), in the losses' dtype and on their device."""
        self.values = self.values.to(losses.device, non_blocking=True)
        chosen = labels.to(losses.device, torch.long, non_blocking=True)
        if self.open_ended:
            chosen = chosen.clamp(max=len(self.values) - 1)
        return self.values[chosen].to(losses.dtype)


def pilot_of(u: Tensor, v: Tensor) -> int | None:
    """Which of two vectors of weights is nowhere near zero, so that it can weigh a sweep that both share; None: neither."""
    sizes = [one.abs() for one in (u, v)]
    least = 1e-3 * max(float(one.max()) for one in sizes)
    return next((i for i, one in enumerate(sizes) if float(one.min()) > least), None)
