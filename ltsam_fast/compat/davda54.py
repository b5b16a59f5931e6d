"""davda54/sam, and the SAM of SamsungLabs/ASAM, cool-xuan/Imbalanced_SAM, Zemdalk/SSE-SAM and nblt/F-SAM."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import GradientsThere, Wrapper


class SAM(GradientsThere, Wrapper, optim.SAM):
    """The published SAM: ``(params, base_optimizer, rho, adaptive, **kwargs)``, or ``(optimizer, model, rho, eta)``.

    Args:
        params: Parameters or groups; or an optimizer, then the next argument is the model, which is not looked at.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        adaptive: ASAM. Around an optimizer a number in this place is Samsung's ``eta``, which SAM does not look at.
        optimizer: The optimizer by its name; with ``model`` and maybe ``eta``.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        TypeError: Arguments of both forms are mixed.

    Source: davda54/sam, sam.py; cool-xuan/Imbalanced_SAM, imbsam.py; SamsungLabs/ASAM, asam.py.
    """

    pickled = (*optim.SAM.pickled, "wraps")

    def __init__(
        self,
        params: Any = None,
        base_optimizer: Any = None,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self.wraps = optimizer is not None or isinstance(params, Optimizer)
        if self.wraps:
            both = optimizer is not None and (params is not None or base_optimizer is not None)
            if both or kwargs.keys() - {"model", "eta"} or (base_optimizer is not None and "model" in kwargs):
                raise TypeError(
                    f"around an optimizer SAM takes optimizer, model, rho and eta, got also {sorted(kwargs)}"
                )
            adaptive, kwargs = adaptive is True, {}
            params, base_optimizer = self._around(params if optimizer is None else optimizer, norm_eps=1e-16)
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Ascends. Around an optimizer gradients are always cleared."""
        super().first_step(zero_grad or self.wraps, scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and steps. Around an optimizer gradients are always cleared."""
        super().second_step(zero_grad or self.wraps)

    def ascent_step(self) -> None:
        """Samsung's name of the first step."""
        self.first_step(zero_grad=True)

    def descent_step(self) -> None:
        """Samsung's name of the second step."""
        self.second_step(zero_grad=True)
