"""SAM and Focal-SAM as usually implemented: a Python loop over the parameters, with small torch calls for each.

Demo and benchmarks compare the fused optimizers with these classes, and tests use them as a reference. For training use
:mod:`ltsam_fast.optim`. Every parameter costs a norm, a clone, a multiplication, an addition and an assignment; the base
optimizer has torch's default implementation.

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
    """Perturbs and restores the weights, and holds the base optimizer."""

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
        # One list for both, so that schedulers change the base optimizer's learning rate.
        self.param_groups = self.base_optimizer.param_groups
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
    """SAM, or ASAM with ``adaptive=True``, with the phases of the common PyTorch implementations.

    Args:
        params: Parameters or groups, as for any torch optimizer; floating point, any device. A group may have its own
            ``rho`` and ``adaptive``; the norm is one for all groups.
        base_optimizer: The class of the base optimizer, e.g. ``torch.optim.SGD``.
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
        """Perturbs the weights along the current gradients."""
        self._perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and takes the base optimizer's step with the current gradients."""
        self._restore()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Takes both phases; ``closure`` runs forward and backward at the perturbed weights."""
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class FocalSAM(_Plain):
    """Focal-SAM with the three phases of the published code; the caller weights the losses.

    Let v be the sample weights of the sharp loss (:func:`ltsam_fast.ops.focal_weights` of their classes). Call backward on
    mean((1 - v) * losses) before the first phase, on mean(v * losses) before the second and, at the perturbed weights, before
    the third.

    Args:
        params: Parameters or groups, as for :class:`SAM`.
        base_optimizer: The class of the base optimizer, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, finite and >= 0.
        adaptive: Scale the perturbation by the weights.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite.
    """

    @torch.no_grad()
    def first_step(self) -> None:
        """Stores a clone of the clean loss's gradients and clears them."""
        params = [p for group in self.param_groups for p in group["params"]]
        self._clean_grads = [(p, p.grad.clone()) for p in params if p.grad is not None]
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Perturbs the weights along the sharp loss's gradients and clears them."""
        self._perturb()
        self.zero_grad()

    @torch.no_grad()
    def third_step(self) -> None:
        """Restores the weights, adds the stored gradients to the current ones, takes the base's step and clears them."""
        self._restore()
        for p, grad in self._clean_grads:
            p.grad = grad if p.grad is None else p.grad + grad
        self.base_optimizer.step()
        self.zero_grad()
