"""SAM and Focal-SAM the way most people run them today: a Python loop over the parameters, one small torch call at a time.

This is what the fused optimizers are measured against, in the demo and in the benchmarks, and an oracle in their tests. It
was written from the published rules and reads like them; :mod:`ltsam_fast.optim` is for use. Every parameter tensor costs a
norm, a clone, a multiplication, an addition and an assignment, and the base optimizer comes as torch makes it by default.

Sources: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021 (arXiv 2010.01412),
Algorithm 1; Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600), here with eta = 0; "Focal-SAM: Focal Sharpness-Aware
Minimization for Long-Tailed Classification", ICML 2025 (arXiv 2505.01660), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Plain(Optimizer):
    """Climbing, coming back, and the base optimizer's step."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = (
            self.base_optimizer.param_groups
        )  # one list, so that schedulers reach the base's learning rate
        self._backups: list[tuple[Tensor, Tensor]] = []

    def _perturb(self) -> None:
        """w <- w + eps,  eps = rho T g / (|T' g| + 1e-12);  T = T' = 1, adaptive: T = w^2, T' = |w|."""
        norms = [
            (p.abs() * p.grad if group["adaptive"] else p.grad).norm(p=2)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.stack([one.to(norms[0].device) for one in norms]).norm(p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._backups.append((p, p.data.clone()))
                step = p.pow(2) * p.grad if group["adaptive"] else p.grad
                p.add_(step * scale.to(p))

    def _restore(self) -> None:
        for p, backup in self._backups:
            p.data = backup
        self._backups = []


class SAM(_Plain):
    """SAM, and ASAM with ``adaptive=True``, with the phases of the common PyTorch ports.

    Args:
        params: Parameters or groups, as for any torch optimizer; floating point, any device. A group may have its own
            ``rho`` and ``adaptive``; the norm is one for all groups.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, finite and >= 0.
        adaptive: Scale the perturbation by the weights.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite.

    >>> w = torch.nn.Parameter(torch.tensor([3.0]))
    >>> opt = SAM([w], torch.optim.SGD, rho=1.0, lr=0.5)
    >>> (w**2 / 2).sum().backward()
    >>> opt.first_step(zero_grad=True)
    >>> (w**2 / 2).sum().backward()  # the gradient at w + eps = 4
    >>> opt.second_step(zero_grad=True)
    >>> w.item()
    1.0
    """

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climbs along the present gradients."""
        self._perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Goes back and takes the base optimizer's step with the present gradients."""
        self._restore()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Both phases, with a closure that does forward and backward in between."""
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class FocalSAM(_Plain):
    """Focal-SAM with the three phases of the published code; the caller weighs the losses.

    With v the sharp loss's weights of the samples (:func:`ltsam_fast.ops.focal_weights` of their classes): backward of
    mean((1 - v) * losses) comes before the first phase, of mean(v * losses) before the second and, at the perturbed weights,
    before the third.

    Args:
        params: Parameters or groups, as for :class:`SAM`.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, finite and >= 0.
        adaptive: Scale the perturbation by the weights.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite.
    """

    @torch.no_grad()
    def first_step(self) -> None:
        """Keeps a clone of the clean loss's gradients and clears them."""
        params = [p for group in self.param_groups for p in group["params"]]
        self._kept = [(p, p.grad.clone()) for p in params if p.grad is not None]
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Climbs along the sharp loss's gradients and clears them."""
        self._perturb()
        self.zero_grad()

    @torch.no_grad()
    def third_step(self) -> None:
        """Goes back, adds the kept gradients to the present ones, takes the base optimizer's step and clears them."""
        self._restore()
        for p, kept in self._kept:
            p.grad = kept if p.grad is None else p.grad + kept
        self.base_optimizer.step()
        self.zero_grad()
