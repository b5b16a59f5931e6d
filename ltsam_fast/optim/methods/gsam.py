"""GSAM: also keep the gap between the perturbed and the plain loss small."""

from __future__ import annotations

from typing import Any

import torch

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("gsam", "GSAM")
class GSAM(SharpnessAware):
    r"""Surrogate-gap guided sharpness-aware minimization.

    .. code-block:: text

        eps = rho_t * g / (|g| + 1e-12)                      g = grad L(w),  g_p = grad L(w + eps)
        rho_t = rho_min + (rho_max - rho_min) clamp((lr - lr_min) / (lr_max - lr_min), 0, 1), or rho
        w  <- base_step(w, g_p - alpha * (g - <g, g_p> / |g_p|^2 * g_p))

    Two forwards and two backwards a step; 52 bytes moved per fp32 parameter with SGD and momentum, in four passes, the
    decomposition being part of the update. ``alpha=0`` is SAM.

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022 (arXiv 2203.08065),
    Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = GSAM(model.parameters(), torch.optim.SGD, alpha=0.2, rho_min=0.02, rho_max=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    alpha = option(0.4, "How much of the part of g that g_p does not have is left out.", ge=0)
    rho_min = option(None, "With ``rho_max``: the radius at ``lr_min``.", ge=0, optional=True)
    rho_max = option(None, "The radius at ``lr_max``, the largest learning rate of the schedule.", ge=0, optional=True)
    lr_min = option(0.0, "The least learning rate of the schedule.", ge=0)

    own_reductions = True

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        low, high = options["rho_min"], options["rho_max"]
        if (low is None) != (high is None):
            raise ValueError(f"rho_min and rho_max must both be given, or neither, got {low!r} and {high!r}")
        if low is not None and options["rho_schedule"] != "constant":
            raise ValueError(
                f"rho_schedule must be 'constant' with rho_min and rho_max, which are one, got {options['rho_schedule']!r}"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        if group["lr_max"] is not None and group["lr_max"] <= group["lr_min"]:
            raise ValueError(f"lr_max must be > lr_min = {group['lr_min']}, got {group['lr_max']!r}")

    def rule(self, step: Step) -> Rule:
        g = yield AtWeights(averaged=True)
        step.ascend(g, rho=None if self.rho_max is None else list(map(self.radius, self.param_groups)))
        g_p = yield AtPerturbed()
        pp, _, gp = step.dots(g_p, g)
        along = torch.where(pp > 0, self.alpha * gp / pp, torch.zeros_like(gp))
        step.descend((1 + along) * g_p - self.alpha * g)

    def radius(self, group: dict[str, Any]) -> float:
        """rho_t: moves with the group's learning rate from ``rho_min`` to ``rho_max``."""
        return self.rho_min + (self.rho_max - self.rho_min) * self.lr_share(group, self.lr_min)  # type: ignore[no-any-return]

    @property
    def follows_lr(self) -> bool:
        """Whether radii move with the learning rate."""
        return self.rho_max is not None or super().follows_lr
