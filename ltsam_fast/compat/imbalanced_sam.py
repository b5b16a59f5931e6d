"""cool-xuan/Imbalanced_SAM: its ImbSAM. Its SAM is davda54's class, around an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import Wrapper


class ImbSAM(Wrapper, optim.ImbSAM):
    """ImbSAM as published: ``(optimizer, model, rho)``, with three phases; the script weighs the losses.

    Args:
        optimizer: The optimizer that takes the step.
        model: Not looked at: the optimizer has the parameters.
        rho: Radius, in units of the weights, >= 0. ``opt.rho = x`` takes effect too.
        class_counts: If given, ``step(closure, targets)`` works too, with a tail weight of 2 as in today's script.
        eta: Classes with fewer samples than this are tail.
        tail_weight: The tail's weight in ``step(closure, targets)``.

    Source: cool-xuan/Imbalanced_SAM, imbsam.py and utils/trainval.py.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module | None = None,
        rho: float = 0.05,
        *,
        class_counts: Any = None,
        eta: float = 20,
        tail_weight: float = 2.0,
    ) -> None:
        own = {"class_counts": class_counts, "eta": eta, "tail_weight": tail_weight}
        super().__init__(*self._around(optimizer, norm_eps=1e-16), rho, **own)
