"""GSAM: also keep the gap between the perturbed and the plain loss small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_factor, number
from ltsam_fast.optim.sam import TwoGradients


class GSAM(TwoGradients):
    r"""Surrogate-gap guided sharpness-aware minimization.

    .. code-block:: text

        eps = rho_t * g / (|g| + 1e-12)                      g = grad L(w),  g_p = grad L(w + eps)
        rho_t = rho_min + (rho_max - rho_min) clamp((lr - lr_min) / (lr_max - lr_min), 0, 1), or rho
        w  <- base_step(w, g_p - alpha * (g - <g, g_p> / |g_p|^2 * g_p))

    Two forwards and two backwards a step; 52 bytes moved per fp32 parameter with SGD and momentum, in four passes, the
    decomposition being part of the update. ``alpha=0`` is SAM.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0; not looked at when it is tied to the learning rate.
        adaptive: Scale the perturbation by the weights, as ASAM does (w^2 with the norm of |w| g, the PyTorch port's form).
        alpha: How much of the part of g that g_p does not have is left out, >= 0.
        rho_min: With ``rho_max``: the radius at ``lr_min``.
        rho_max: The radius at ``lr_max``, the largest learning rate of the schedule: a group's option ``lr_max``, if it has
            one; else its ``max_lr``, which ``OneCycleLR`` sets; else the largest of its ``initial_lr``, which all schedulers
            set, and its rates in the steps so far.
        lr_min: The least learning rate of the schedule.
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: A number is negative or not finite, only one of ``rho_min`` and ``rho_max`` is given, or a group's
            ``lr_max`` is not above ``lr_min``.
        TypeError: ``base_optimizer`` is not a class.

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022 (arXiv 2203.08065),
    Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = GSAM(model.parameters(), torch.optim.SGD, alpha=0.2, rho_min=0.02, rho_max=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    _kept = (*TwoGradients._kept, "alpha", "rho_min", "rho_max", "lr_min")
    _own = (*TwoGradients._own, "lr_max", "lr_seen")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        alpha: float = 0.4,
        rho_min: float | None = None,
        rho_max: float | None = None,
        lr_min: float = 0.0,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        if (rho_min is None) != (rho_max is None):
            raise ValueError(f"rho_min and rho_max must both be given, or neither, got {rho_min!r} and {rho_max!r}")
        self.alpha, self.lr_min = check_factor("alpha", alpha), check_factor("lr_min", lr_min)
        self.rho_min = None if rho_min is None else check_factor("rho_min", rho_min)
        self.rho_max = None if rho_max is None else check_factor("rho_max", rho_max)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)
        self.defaults |= {"lr_max": None, "lr_seen": 0.0}
        for group in self.param_groups:
            group |= {name: group.get(name, self.defaults[name]) for name in ("lr_max", "lr_seen")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; its ``lr_max`` must be above ``lr_min``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if (top := group.get("lr_max")) is not None:
            try:
                group["lr_max"] = check_factor("lr_max", top)
                if group["lr_max"] <= self.lr_min:
                    raise ValueError(f"lr_max must be > lr_min = {self.lr_min}, got {top!r}")
            except ValueError:
                self.param_groups.pop()
                raise

    def _hyper(self, name: str) -> Any:
        if name != "rho" or self.rho_min is None or self.rho_max is None:
            return super()._hyper(name)
        radii = []
        for group in self.param_groups:
            lr, top = number(group["lr"]), group["lr_max"]
            if top is None and (top := group.get("max_lr")) is None:
                top = max(number(group.get("initial_lr", 0.0)), group["lr_seen"], lr)
            reach = number(top) - self.lr_min
            share = (lr - self.lr_min) / reach if reach > 0 else 1.0
            # The order of arguments keeps the share: in a captured step it is a number that lives on.
            radii.append(self.rho_min + (self.rho_max - self.rho_min) * max(min(share, 1.0), 0.0))
        return tuple(radii)

    def _count_step(self) -> None:
        super()._count_step()
        for group in self.param_groups if self.rho_min is not None else ():
            group["lr_seen"] = max(group["lr_seen"], number(group["lr"]))

    def _mix(self, grads: list[Tensor | None], kept: list[Tensor | None]) -> Tensor:
        square, _, dot = self._dots(grads, kept)
        along = torch.where(square > 0, self.alpha * dot / square, torch.zeros_like(dot))
        nothing = torch.zeros_like(along)
        return torch.stack([1 + along, nothing - self.alpha, nothing, nothing])
