"""The published classes' import names and call signatures: a script changes its import line and nothing else.

==================================  ===========================================================================
published                           here
==================================  ===========================================================================
``from sam import SAM``             ``from ltsam_fast.compat import SAM`` (also in its ``(optimizer, model, rho)`` form)
``from focal_sam import FocalSAM``  ``from ltsam_fast.compat import FocalSAM``
``from imbsam import ImbSAM``       ``from ltsam_fast.compat import ImbSAM``
``from ssesam import SSESAM``       ``from ltsam_fast.compat import SSESAM``
``from vtab.gnm import GNM``        ``from ltsam_fast.compat import GNM``
==================================  ===========================================================================

Where results depend on it, the published behaviour is kept: the tail's weight of 2 in today's ImbSAM script, GNM's double
noise in epoch 0, 1e-16 added to the norm by ImbSAM and SSE-SAM. Not kept are defects: state that is lost on resume,
parameters that are never restored, restoring by subtraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import ltsam_fast
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.focal_sam import FocalSAM
from ltsam_fast.optim.gradients import _swap_gradients

__all__ = ["GNM", "SAM", "SSESAM", "FocalSAM", "ImbSAM"]


def _wrap(optimizer: Optimizer) -> tuple[list[dict[str, Any]], Callable[..., Optimizer]]:
    """Groups, and a base that is there already, for the methods' constructors."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    for group in optimizer.param_groups:
        group.setdefault("norm_eps", 1e-16)
    return optimizer.param_groups, lambda *_, **__: optimizer


class SAM(ltsam_fast.SAM):
    """The reference SAM ``(params, base_optimizer, rho, adaptive, **kwargs)``; also ``(optimizer, model, rho)``.

    Args:
        params: Parameters or groups; or an optimizer, then the next argument is the model, which is not looked at.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        adaptive: ASAM.
        **kwargs: Options of ``base_optimizer``.

    Source: davda54/sam, sam.py; cool-xuan/Imbalanced_SAM, imbsam.py.
    """

    def __init__(
        self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any
    ) -> None:
        self._wraps = isinstance(params, Optimizer)
        if self._wraps:
            params, base_optimizer = _wrap(params)
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)

    _kept = (*ltsam_fast.SAM._kept, "_wraps")

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Climbs. Around an optimizer gradients are always cleared."""
        super().first_step(zero_grad or self._wraps, scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """Goes back and steps. Around an optimizer gradients are always cleared."""
        super().second_step(zero_grad or self._wraps)


class ImbSAM(ltsam_fast.ImbSAM):
    """ImbSAM as published: ``(optimizer, model, rho)``, with three phases; the script weighs the losses.

    Args:
        optimizer: The optimizer that takes the step.
        model: Not looked at: the optimizer has the parameters.
        rho: Radius, in units of the weights, >= 0.
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
        params, base = _wrap(optimizer)
        super().__init__(params, base, rho, class_counts=class_counts, eta=eta, tail_weight=tail_weight)


class SSESAM(SharpnessAware):
    """SSE-SAM as published: ``compute_and_add_epsilon``, ``compute_grad_sum_and_restore_p``, ``update``, ``update_rho``.

    Args:
        optimizer: The optimizer that takes the step.
        model: Not looked at: the optimizer has the parameters.
        head_rho: The head's radius, >= 0, until the switch.
        tail_rho: The tail's radius, >= 0.
        gamma: The share of the epochs before the switch; 0: it never comes.
        total_epochs: Number of epochs.

    Source: Zemdalk/SSE-SAM, ssesam.py (MIT).
    """

    _phases = (
        "compute_and_add_epsilon", "compute_grad_sum_and_restore_p", "compute_and_add_epsilon",
        "compute_grad_sum_and_restore_p", "update",
    )  # fmt: skip
    _kept = (*SharpnessAware._kept, "rho_is", "gamma", "total_epochs", "epoch_count")

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module | None,
        head_rho: float,
        tail_rho: float,
        gamma: float = 0.0,
        total_epochs: int = 200,
    ) -> None:
        params, base = _wrap(optimizer)
        super().__init__(params, base, head_rho)
        self.rho_is = [head_rho, tail_rho]
        self.gamma, self.total_epochs, self.epoch_count = gamma, total_epochs, 0

    def _hyper(self, name: str) -> Any:
        values = super()._hyper(name)
        return (self._radius,) * len(values) if name == "rho" else values

    def _forget(self) -> None:
        super()._forget()
        self._radius = 0.0
        self._sum: list[Tensor | None] = []

    @torch.no_grad()
    def compute_and_add_epsilon(self, n_i: int) -> None:
        """Climbs along the present gradients, with the head's radius (0) or the tail's (1), and clears them."""
        self._radius = self.rho_is[n_i]
        self._run("compute_and_add_epsilon", self._climb)
        self._clear_gradients()

    @torch.no_grad()
    def compute_grad_sum_and_restore_p(self) -> None:
        """Takes the gradients over and goes back."""
        self._run("compute_grad_sum_and_restore_p", self._take_over)

    def _take_over(self, *signals: Tensor | None) -> None:
        params, _ = self._parameters()
        grads = _swap_gradients(params, [None] * len(params))
        if self._sum:
            grads = [b if a is None else a if b is None else b.add_(a) for a, b in zip(self._sum, grads, strict=True)]
        self._sum = grads
        self._come_back()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the base optimizer's step with the sum of the gradients."""
        self._run("update", self._step_with_sum)
        self._clear_gradients()

    def _step_with_sum(self, *signals: Tensor | None) -> None:
        _swap_gradients(self._parameters()[0], self._sum)
        self._sum = []
        self._descend(*signals)

    def update_rho(self) -> None:
        """Counts an epoch; after ``gamma * total_epochs`` of them the head's radius is 0."""
        self.epoch_count += 1
        if 0 < self.gamma < 1 and self.epoch_count >= self.gamma * self.total_epochs:
            self.rho_is[0] = 0.0


class GNM(ltsam_fast.GNM):
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

    def _halvings(self, epoch: int | None) -> int:
        # Rounded down, as published: in epoch 0 that is -1, and the noise has twice its size.
        return super()._halvings(epoch) if epoch is None else (epoch - 1) // int(self.decay_every or 1)
