"""SAM and, with ``adaptive=True``, ASAM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltsam_fast.optim.base import SharpnessAware


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization: descend with the gradient taken where the loss is about worst nearby.

    .. code-block:: text

        g   = grad L(w)
        eps = rho * T g / (|T' g| + 1e-12)        T = T' = 1;  adaptive (ASAM): T = w^2, T' = |w|
        w  <- base_step(w, grad L(w + eps))

    Two forwards and two backwards a step; 40 bytes moved per fp32 parameter with SGD and momentum, in three passes.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0. The norm is global over all groups, the radius may differ by group.
        adaptive: ASAM. With a group's ``eta`` > 0 its ``|w|`` becomes ``|w| + eta``; the authors' code does so for weights
            and leaves biases unscaled: put those in a group with ``adaptive=False``.
        model: If given, running statistics of normalization layers see the unperturbed pass only; else every pass
            updates them, as in published code.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite, or an option of the base optimizer is wrong.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the reference implementation: restoring is a copy into the same storage; parameters without a gradient
    in either pass come back too; ``state_dict`` has the base optimizer's state.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
    (arXiv 2010.01412), Algorithm 1; Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600), Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    >>> loss.shape
    torch.Size([])
    """

    phases = ("first_step", "second_step")

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Climbs along the present gradients: w <- w + eps. Then evaluate the loss again and call ``backward()``.

        Args:
            zero_grad: Also clear the gradients.
            scaler: The GradScaler that scaled the loss, for the whole step: see :meth:`SharpnessAware.step`.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient.
        """
        self._run("first_step", self._climb, scaler)
        if zero_grad:
            self._clear_gradients()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Goes back to w and takes the base optimizer's step with the present gradients.

        Args:
            zero_grad: Also clear the gradients.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("second_step", self._descend)
        if zero_grad:
            self._clear_gradients()

    def _cotangents(self, labels: Any, losses: Tensor) -> tuple[None, Tensor]:
        return None, torch.ones_like(losses)


class TwoGradients(SAM):
    """Base of the methods that combine the gradients at w and at w + eps into one step: see ``_mix``."""

    _mixes = True

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        super()._climb(grad_scale, found_inf)
        self._keep_gradients()
