"""intelligent-machine-learning/dlrover, atorch: its WeightedSAM, and helpers for running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import ForwardBackward, Wrapper, detached
from ltsam_fast.ops.checks import check_factor
from ltsam_fast.optim.gradients import Combination, Gradient
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


class WeightedSAM(ForwardBackward, Wrapper, optim.WSAM):
    """WSAM as published: ``(model, base_optimizer, rho, gamma, ...)``, phases and ``step(closure)``.

    Args:
        model: The network. Running statistics see the unperturbed pass only.
        base_optimizer: The optimizer that takes the step.
        rho: Radius, in units of the weights, >= 0.
        gamma: Weight of the sharpness, in [0, 1); its ``alpha`` = gamma / (1 - gamma) is in the groups, unless the base
            optimizer has an option of this name.
        sam_eps: Added to the norm, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        decouple: The sharpness takes a step of its own.
        max_norm: Clip the gradients of both passes to this norm, each; ``None``: do not.
        **kwargs: Not looked at, as published.

    Raises:
        ValueError: A number is out of its range; in a step, groups differ in ``alpha``.

    Source: intelligent-machine-learning/dlrover, atorch/optimizers/wsam.py. An older version's defaults were gamma=0.88 and
    max_norm=1.0.
    """

    pickled = (*optim.WSAM.pickled, "max_norm")

    def __init__(
        self,
        model: torch.nn.Module,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        sam_eps: float = 1e-12,
        adaptive: bool = False,
        decouple: bool = True,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        norm_eps = check_factor("sam_eps", sam_eps)
        self.max_norm = None if max_norm is None else check_factor("max_norm", max_norm)
        around = self._around(base_optimizer, norm_eps=norm_eps)
        super().__init__(*around, rho, adaptive, gamma=gamma, decouple=decouple, model=model)
        if "alpha" not in base_optimizer.defaults:
            for group in self.param_groups:
                group["alpha"] = gamma / (1 - gamma)

    @property
    def _alpha(self) -> float:
        """Weight of the sharpness, as the groups have it."""
        usual = self.gamma / (1 - self.gamma)
        theirs = "alpha" in self.base_optimizer.defaults
        alphas = {usual if theirs else float(group.get("alpha", usual)) for group in self.param_groups}
        if len(alphas) > 1:
            raise ValueError(f"alpha must be the same in all groups, got {sorted(alphas)}")
        return alphas.pop()

    def rule(self, step: Step) -> Rule:
        """WSAM's step with the groups' ``alpha`` and both gradients clipped."""
        a = self._alpha
        g = yield AtWeights(averaged=True)
        step.ascend(g)
        g_p = yield AtPerturbed()
        if self.max_norm is not None:
            g, g_p = _clipped(step, g, self.max_norm), _clipped(step, g_p, self.max_norm)
        if self.decouple:
            step.descend(g, decoupled=a * (g_p - g))
        else:
            step.descend((1 - a) * g + a * g_p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs forward and backward, and is called twice. As published, gradients that are there already count: the
                first call adds to them.

        Returns:
            What it returned at the unperturbed weights, detached.

        Raises:
            ValueError: There is no closure, it returns per-sample losses, or it left no gradient.
        """
        if closure is None and self._is_torchs_own_call():
            return self._torchs_own_call()
        if not callable(closure):
            raise ValueError("closure must be given: step(closure), with a function that calls backward()")
        loss, _ = self._run(closure, closure)
        return detached(loss)


def _clipped(step: Step, gradient: Gradient, max_norm: float) -> Combination:
    """A gradient, clipped to ``max_norm`` over all parameters."""
    square, *_ = step.dots(gradient, gradient)
    return (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0) * gradient  # type: ignore[return-value]


def disable_running_stats(model: torch.nn.Module) -> None:
    """Keeps batch norm's running statistics as they are, until :func:`enable_running_stats`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not hasattr(module, "backup_momentum"):
            module.backup_momentum = module.momentum  # type: ignore[assignment]
            module.momentum = 0.0


def enable_running_stats(model: torch.nn.Module) -> None:
    """Undoes :func:`disable_running_stats`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and hasattr(module, "backup_momentum"):
            module.momentum = module.backup_momentum  # type: ignore[assignment]
            del module.backup_momentum
