"""SAM and, with ``adaptive=True``, ASAM; Unified SAM, LE-SAM and Stable SAM, which differ from it by a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import plain, shown
from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step

_LAMBDA = "a number in [0, 1], '1/t' or '1-1/t'"


def _check_lambda(name: str, value: Any) -> float | str:
    if value in ("1/t", "1-1/t") or 0 <= plain(value) <= 1:
        return value if isinstance(value, str) else plain(value)  # type: ignore[no-any-return]
    raise ValueError(f"{name} must be {_LAMBDA}, got {shown(value)}")


@registered("sam", "SAM")
@registered("asam", "ASAM", adaptive=True)
class SAM(SharpnessAware):
    r"""Sharpness-aware minimization: descend with the gradient taken where the loss is about worst nearby.

    .. code-block:: text

        g   = grad L(w)
        eps = rho * T g / (|T' g| + 1e-12)        T = T' = 1;  adaptive (ASAM): T = w^2, T' = |w|
        w  <- base_step(w, grad L(w + eps))

        unified_lambda, l:          eps = rho * (1 - l + l / |T' g|) * T g   (Unified SAM)
        loss_budget (LE-SAM):       rho_t = min(rho, b_t / |T' g|),  b_t = loss_budget * (1 + cos(pi t / total_steps)) / 2;
                                    radii of groups that differ are scaled alike, and the largest one keeps to the budget
        renormalize (Stable SAM):   w <- base_step(w, |g| / |g_p| * g_p),  g_p = grad L(w + eps)

    Two forwards and two backwards a step; 40 bytes moved per fp32 parameter with SGD and momentum, in three passes;
    with ``renormalize`` 48 in four. A group's ``eta`` > 0 makes ``|w|`` in T and T' ``|w| + eta``; the authors' code does so
    for weights and leaves biases unscaled: put those in a group with ``adaptive=False``. The norm is global over all groups,
    the radius may differ by group.

    Differences from the reference implementation: restoring is a copy into the same storage; parameters without a gradient
    in either pass are restored too; ``state_dict`` has the base optimizer's state.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
    (arXiv 2010.01412), Algorithm 1; Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600), Algorithm 1; Oikonomou and Loizou,
    "Sharpness-Aware Minimization: General Analysis and Improved Rates", ICLR 2025 (arXiv 2503.02225), Unified SAM; LE-SAM,
    ICML 2026 (arXiv 2605.10183); Stable SAM, JMLR 2025 (arXiv 2401.07250).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    >>> loss.shape
    torch.Size([])
    """

    unified_lambda = option(
        1.0,
        "Unified SAM: 1 normalizes the gradient, 0 does not; t counts the method's steps, from 1.",
        check=_check_lambda,
        accepts=_LAMBDA,
    )
    loss_budget = option(
        None,
        "LE-SAM: how much the loss may grow, to first order, at the start of ``total_steps``.",
        gt=0,
        optional=True,
    )
    renormalize = option(False, "Stable SAM: the step's gradient gets the norm of the one at w.")

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options["loss_budget"] is None:
            return
        if options["unified_lambda"] != 1:
            raise ValueError(
                f"unified_lambda must be 1 with loss_budget, which says how far to go, got {options['unified_lambda']!r}"
            )
        if options["total_steps"] is None:
            raise ValueError("total_steps must be given with loss_budget: the number of steps of the run, got None")

    @property
    def own_reductions(self) -> bool:  # type: ignore[override]
        """Whether workers do more in a step than averaging its last gradient."""
        return self.renormalize  # type: ignore[no-any-return]

    @property
    def host_only(self) -> str:  # type: ignore[override]
        """Why no CUDA graph can hold the step, if so."""
        if self.loss_budget is None and not isinstance(self.unified_lambda, str):
            return ""
        changes = "loss_budget" if self.loss_budget is not None else f"unified_lambda={self.unified_lambda!r}"
        return f"with {changes} every step is another"

    def rule(self, step: Step) -> Rule:
        g = yield AtWeights(averaged=self.renormalize)
        budget = self._budget(step.taken)
        step.ascend(g, rho=0.0 if budget == 0 else None, divisor=self._divisor(step, budget))
        g_p = yield AtPerturbed()
        if self.renormalize:
            pp, gg, _ = step.dots(g_p, g)
            g_p = torch.where(pp > 0, (gg / pp).sqrt(), torch.ones_like(pp)) * g_p
        step.descend(g_p)

    def _budget(self, taken: int) -> float | None:
        """b_t."""
        if self.loss_budget is None:
            return None
        return self.loss_budget * 0.5 * (1 + math.cos(math.pi * min(1.0, taken / self.total_steps)))  # type: ignore[no-any-return]

    def _divisor(self, step: Step, budget: float | None) -> Callable[[Tensor], Tensor] | None:
        """What the direction is divided by, of its norm; None: by its norm."""
        if budget:
            return lambda norm: torch.maximum(norm, self._radius(step) / budget * norm * norm)
        lmbda = {"1/t": 1 / (step.number + 1), "1-1/t": 1 - 1 / (step.number + 1)}.get(
            self.unified_lambda, self.unified_lambda
        )
        if lmbda == 1:
            return None

        def divisor(norm: Tensor) -> Tensor:
            size = torch.where(norm == 0, torch.ones_like(norm), norm)  # of a gradient of zeros it does not matter
            return 1 / (lmbda / size + (1 - lmbda)) + 0 * norm  # where the norm is not finite, neither is this

        return divisor

    def _radius(self, step: Step) -> float:
        """The largest radius of a group: where they differ, all are scaled alike."""
        return max(
            (radius for radius, group in zip(step.radii(), self.param_groups, strict=True) if group["perturb"]),
            default=0.0,
        )
