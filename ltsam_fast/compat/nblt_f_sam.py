"""nblt/F-SAM."""

from __future__ import annotations

from typing import Any

from ltsam_fast import optim
from ltsam_fast.compat.published import GradientsThere


class FriendlySAM(GradientsThere, optim.FriendlySAM):
    """F-SAM as published: ``(params, base_optimizer, rho, sigma, lmbda, adaptive, **kwargs)``, phases and ``step(closure)``.

    Args:
        params: Parameters or groups.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        sigma: How much of the gradient's running mean is left out, >= 0.
        lmbda: Decay of the mean, in [0, 1).
        adaptive: Scale the perturbation by the weights, as ASAM does.
        **kwargs: Options of ``base_optimizer``.

    Source: nblt/F-SAM, utils.py.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rho: float = 0.05,
        sigma: float = 1,
        lmbda: float = 0.9,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, adaptive, sigma=sigma, lmbda=lmbda, **kwargs)
