"""Keke921/GNM-PT."""

from __future__ import annotations

from typing import Any

from ltsam_fast import optim


class GNM(optim.GNM):
    """GNM as published: ``(config, params, base_optimizer, rho, adaptive, **kwargs)`` and ``first_step(epoch)``.

    Args:
        config: Has ``dis_mul`` and ``loss.GCL.reweight_epoch``.
        params: Parameters or groups.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Not looked at, as published.
        **kwargs: Options of ``base_optimizer``.

    Source: Keke921/GNM-PT, vtab/gnm.py (MIT).
    """

    def __init__(
        self, config: Any, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any
    ) -> None:
        every = config.loss.GCL.reweight_epoch
        super().__init__(params, base_optimizer, rho, dis_mul=config.dis_mul, decay_every=every, **kwargs)

    def halvings(self, number: int, epoch: int | None) -> int:
        """As published it is rounded down: in epoch 0 that is -1, and the noise has twice its size."""
        return super().halvings(number, epoch) if epoch is None else (epoch - 1) // (self.decay_every or 1)
