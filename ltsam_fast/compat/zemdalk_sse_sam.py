"""Zemdalk/SSE-SAM: its SSESAM. Its ImbSAM is cool-xuan's class, its SAM davda54's, around an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ltsam_fast.compat.published import Wrapper
from ltsam_fast.ops.checks import check_factor
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Pause, Step


class SSESAM(Wrapper):
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

    phase_names = (
        "compute_and_add_epsilon", "compute_grad_sum_and_restore_p", "compute_and_add_epsilon",
        "compute_grad_sum_and_restore_p", "update",
    )  # fmt: skip
    pickled = (*SharpnessAware.pickled, "rho_is", "gamma", "total_epochs", "epoch_count")
    rho = None
    """Published as ``rho_is``: the head's radius and the tail's."""
    n_i = 0
    """Which of them is next."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module | None,
        head_rho: float,
        tail_rho: float,
        gamma: float = 0.0,
        total_epochs: int = 200,
    ) -> None:
        self.rho_is = [check_factor("head_rho", head_rho), check_factor("tail_rho", tail_rho)]
        self.gamma, self.total_epochs, self.epoch_count = gamma, total_epochs, 0
        super().__init__(*self._around(optimizer, norm_eps=1e-16), head_rho)

    def rule(self, step: Step) -> Rule:
        """Adds up the gradients at two perturbed weights."""
        g = yield AtWeights()
        step.ascend(g, rho=self.rho_is[self.n_i])
        first = yield AtPerturbed(last=False)
        step.restore()
        g = yield AtWeights()
        step.ascend(g, rho=self.rho_is[self.n_i])
        both = yield AtPerturbed(plus=first)
        step.restore()
        yield Pause()
        step.descend(both)

    def compute_and_add_epsilon(self, n_i: int, scaler: torch.amp.GradScaler | None = None) -> None:
        """Ascends along the present gradients, and clears them.

        Args:
            n_i: With the head's radius (0) or the tail's (1).
            scaler: With the first phase: the GradScaler that scaled the losses, see :meth:`SharpnessAware.step`.
        """
        self.n_i = n_i
        self._advance("compute_and_add_epsilon", True, scaler)

    def compute_grad_sum_and_restore_p(self) -> None:
        """Takes the gradients over and restores the weights."""
        self._advance("compute_grad_sum_and_restore_p", True)

    def update(self) -> None:
        """Takes the base optimizer's step with the sum of the gradients."""
        self._advance("update", True)

    def update_rho(self) -> None:
        """Counts an epoch; after ``gamma * total_epochs`` of them the head's radius is 0."""
        self.epoch_count += 1
        if 0 < self.gamma < 1 and self.epoch_count >= self.gamma * self.total_epochs:
            self.rho_is[0] = 0.0

    @torch.no_grad()
    def step(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """Is for torch's own calls, which ask for the state or end the last phase."""
        if not self._is_torchs_own_call():
            raise ValueError(f"step() is not to be had: call {', '.join(f'{name}()' for name in self.phases)}")
        return self._torchs_own_call()
