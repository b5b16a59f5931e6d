"""rollovd/LookSAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import optim
from ltsam_fast.compat.published import ForwardBackward
from ltsam_fast.optim.gradients import own_memory
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


class LookSAM(ForwardBackward, optim.LookSAM):
    """LookSAM as published by rollovd: ``step(t, samples, targets)``, after a ``backward()`` of the caller's.

    The decomposition is tensor by tensor; where a gradient is zero, so is its direction. Every pass updates running statistics.

    Args:
        k: Perturb every k-th step, >= 1.
        alpha: Weight of the part that is reused, >= 0. ``opt.alpha = x`` and ``opt.k = x`` take effect too.
        model: The network, with the parameters.
        base_optimizer: The class that takes the step.
        criterion: ``criterion(model(samples), targets)`` is the loss, a scalar.
        rho: Radius, in units of the weights, >= 0.
        **kwargs: Options of ``base_optimizer``.

    Source: rollovd/LookSAM, looksam.py.
    """

    phases = ()  # type: ignore[assignment]
    own_reductions = False
    protects_running_stats = False
    pickled = (*optim.LookSAM.pickled, "criterion")

    def __init__(
        self,
        k: int,
        alpha: float,
        model: torch.nn.Module,
        base_optimizer: Any,
        criterion: Callable[[Any, Any], Tensor],
        rho: float = 0.05,
        **kwargs: Any,
    ) -> None:
        self.criterion = criterion
        params = [{"params": model.parameters(), "norm_eps": 1e-8}]
        super().__init__(params, base_optimizer, rho, k=k, alpha=alpha, model=model, **kwargs)

    def rule(self, step: Step, looks: bool = True, adds: bool = False) -> Rule:
        """``looks``: whether it is a k-th step; ``adds``: whether its second pass adds to the gradient at w."""
        g = yield AtWeights()
        g.tensors, g.averaged = own_memory(g.tensors), True  # the caller's backward() has averaged it, in DDP's buckets
        if not looks:
            for grad, grad_v in zip(g.tensors, step.state("grad_v").tensors, strict=True):
                if grad is not None and grad_v is not None:
                    grad.add_(grad_v * (self.alpha * grad.norm() / (grad_v.norm() + 1e-8)))
            step.descend(g)
            return
        step.ascend(g)
        g_s = yield AtPerturbed(plus=g if adds else None)
        there = g_s.last if adds else g_s
        for param, s, grad in zip(self.all_params()[0], there.tensors, g.tensors, strict=True):
            if s is not None and grad is not None:
                s = s + grad if adds else s
                self.state[param]["grad_v"] = s - _share(s, grad) * grad
        step.descend(g_s)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        t: int | None = None,
        samples: Any = None,
        targets: Any = None,
        zero_sam_grad: bool = True,
        zero_grad: bool = True,
    ) -> Any:
        """One step with the gradients that are there.

        Args:
            t: The number of the step, from 0: multiples of k perturb.
            samples: The batch, for the pass at the perturbed weights.
            targets: Its targets.
            zero_sam_grad: Clear the gradients before that pass; else it adds to them.
            zero_grad: Clear the gradients at the end.

        Raises:
            ValueError: There is no gradient, or the first step of all does not perturb.
        """
        if t is None and self._is_torchs_own_call():
            return self._torchs_own_call()
        if t is None:
            raise ValueError("t must be given: step(t, samples, targets), with the number of the step")
        if not self._has_gradient():
            raise ValueError("no parameter has a gradient: call backward() before step(t, samples, targets)")
        looks = t % self.k == 0
        if not looks and not any("grad_v" in state for state in self.state.values()):
            raise ValueError(
                f"t must be a multiple of k = {self.k} in the first step, got {t}: nothing is there to be reused"
            )

        def at_perturbed() -> None:
            self.criterion(self.model(samples), targets).backward()  # type: ignore[misc]

        self._run(*(None, at_perturbed) if looks else (None,), looks=looks, adds=not zero_sam_grad)
        if zero_grad:
            self._clear_gradients()


def _share(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / |b|^2, 0-d; 0 where b is zero."""
    square = (b * b).sum()
    return torch.where(square > 0, (a * b).sum() / square, torch.zeros_like(square))
