"""dydjw9/Efficient_SAM."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import ForwardBackward, Wrapper
from ltsam_fast.optim.base_step import sign_of
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


class ESAM(ForwardBackward, Wrapper):
    """ESAM as published: ``opt.paras = [inputs, targets, loss_fct, model, defined_backward]``, ``opt.step()``.

    At the end of a step each parameter tensor with a gradient is frozen with probability 1 - beta, by ``random.random()``,
    until the next ascent, but never all of them. The samples whose loss rises more than the int(gamma B)-th most are kept, or
    the first if there is none; with gamma >= 0.99 all are. Every pass updates running statistics.

    Args:
        params: Not looked at: the optimizer has the parameters.
        base_optimizer: The optimizer that takes the step.
        rho: Radius, in units of the weights, >= 0; it is divided by ``beta``.
        beta: Share of the tensors that are perturbed, in (0, 1].
        gamma: Share of the samples that are kept, in (0, 1].
        adaptive: Scale the perturbation by the weights, as ASAM does.
        **kwargs: Not looked at, as published.

    Tensors that the caller froze stay frozen, unlike in the published class.

    Source: dydjw9/Efficient_SAM, utils/Esam.py.
    """

    beta, gamma = optim.ESAM.beta, optim.ESAM.gamma
    pickled = (*optim.SharpnessAware.pickled, "frozen")

    paras: Any = None
    """Inputs, targets, the loss, which returns per-sample losses (B,), the network, and ``defined_backward(loss)``."""
    returnthings: Any = None
    """Predictions and per-sample losses (B,) at w, of the last step."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        self.frozen: list[Tensor] = []
        super().__init__(*self._around(base_optimizer, norm_eps=1e-7), rho, adaptive, beta=beta, gamma=gamma)

    def rule(self, step: Step) -> Rule:
        """SAM's step with the radius rho / beta."""
        g = yield AtWeights()
        step.ascend(g, rho=[group["rho"] / self.beta for group in self.param_groups])
        g_p = yield AtPerturbed()
        step.descend(g_p)

    def end_step(self) -> None:
        """Freezes some tensors till the next ascent, which leaves out what has no gradient."""
        moving = [param for param in self.all_params()[0] if param.grad is not None and param.requires_grad]
        frozen = [param for param in moving if random.random() > self.beta]
        self.frozen = frozen[: len(moving) - 1]  # without any the next backward could not be
        for param in self.frozen:
            param.requires_grad_(False)

    def _unfreeze(self) -> None:
        for param in self.frozen:
            param.requires_grad_(True)
        self.frozen = []

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """As :meth:`SharpnessAware.first_step`; for the pass that follows no tensor is frozen."""
        super().first_step(zero_grad, scaler)
        self._unfreeze()

    @torch.no_grad()
    def step(self) -> Any:  # type: ignore[override]
        """One step with ``paras``; leaves predictions and losses at w in ``returnthings``.

        Raises:
            ValueError: ``paras`` is not set, or the loss is not per sample.
        """
        if self._is_torchs_own_call():
            return self._torchs_own_call()
        if self.paras is None:
            raise ValueError("paras must be set before step(): [inputs, targets, loss_fct, model, defined_backward]")
        inputs, targets, loss_fct, model, defined_backward = self.paras

        def at_weights() -> None:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                predictions = model(inputs)
                losses = loss_fct(predictions, targets)
                if losses.shape != (len(targets),):
                    raise ValueError(
                        f"loss_fct must return the per-sample losses, shape (B,), got {tuple(losses.shape)}"
                    )
                defined_backward(losses.mean())
            self.returnthings = predictions, losses.detach().clone()

        def at_perturbed() -> None:
            self._unfreeze()
            with torch.no_grad():
                chosen = self._chosen(loss_fct(model(inputs), targets) - self.returnthings[1])
            defined_backward(loss_fct(model(inputs[chosen]), targets[chosen]).mean())

        self._run(at_weights, at_perturbed)
        self._clear_gradients()

    def _chosen(self, increase: Tensor) -> Any:
        """The index of the samples that are kept, by how much their losses (B,) have risen."""
        if self.gamma >= 0.99:
            return slice(None)
        signs = set(map(sign_of, self.param_groups))
        if len(signs) > 1:
            raise ValueError("maximize must be the same in all groups for ESAM: it selects samples by their loss")
        increase = min(signs) * increase
        largest = increase.topk(max(1, int(len(increase) * self.gamma)))
        chosen = increase > largest.values[-1]
        return chosen if bool(chosen.any()) else largest.indices[:1]
