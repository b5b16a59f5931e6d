"""juntang-zhuang/GSAM: its GSAM. Its schedulers are in :mod:`ltsam_fast.compat.schedulers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import ForwardBackward, Wrapper
from ltsam_fast.ops.checks import check_factor


class GSAM(ForwardBackward, Wrapper, optim.GSAM):
    """GSAM as published in PyTorch: around an optimizer, with a schedule of the radius.

    Args:
        params: Not looked at: the optimizer has the parameters.
        base_optimizer: The optimizer that takes the step.
        model: The network. Running statistics see the unperturbed pass only.
        gsam_alpha: How much of the part of the clean gradient that the perturbed one does not have is left out, >= 0.
        rho_scheduler: Its ``step()`` returns the radius; called once here, and by ``update_rho_t()``.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        perturb_eps: Added to the norm, >= 0.
        **kwargs: Not looked at, as published.

    Source: juntang-zhuang/GSAM, gsam/gsam.py (MIT).
    """

    pickled = (*optim.GSAM.pickled, "rho_scheduler")

    forward_backward_func: Callable[[], Any] | None = None
    """What :meth:`set_closure` made."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        model: torch.nn.Module,
        gsam_alpha: float,
        rho_scheduler: Any,
        adaptive: bool = False,
        perturb_eps: float = 1e-12,
        **kwargs: Any,
    ) -> None:
        alpha, norm_eps = check_factor("gsam_alpha", gsam_alpha), check_factor("perturb_eps", perturb_eps)
        super().__init__(*self._around(base_optimizer, norm_eps=norm_eps), adaptive=adaptive, alpha=alpha, model=model)
        self.rho_scheduler = rho_scheduler
        self.update_rho_t()

    @property
    def rho_t(self) -> float:
        """The radius; setting it sets that of all groups."""
        return self.rho  # type: ignore[no-any-return]

    @rho_t.setter
    def rho_t(self, value: float) -> None:
        self.rho = value

    def update_rho_t(self) -> float:
        """Takes the schedule's next radius, and returns it."""
        self.rho = float(self.rho_scheduler.step())
        return self.rho_t

    def set_closure(self, loss_fn: Any, inputs: Any, targets: Any, **kwargs: Any) -> None:
        """Sets the batch, and the loss ``loss_fn(model(inputs), targets, **kwargs)``, a scalar, for the next steps."""

        def forward_backward() -> tuple[Any, Tensor]:
            outputs = self.model(inputs)  # type: ignore[misc]
            loss = loss_fn(outputs, targets, **kwargs)
            loss.backward()
            return outputs, loss.detach().clone()

        self.forward_backward_func = forward_backward

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs forward and backward and returns (outputs, loss); ``None``: what :meth:`set_closure` has set.

        Returns:
            What it returned at the unperturbed weights.

        Raises:
            ValueError: Neither is there, or it left no gradient.
        """
        if closure is None and self._is_torchs_own_call():
            return self._torchs_own_call()
        run = closure or self.forward_backward_func
        if run is None:
            raise ValueError("closure must be given, or set_closure(loss_fn, inputs, targets) be called, before step()")

        def at_weights() -> Any:
            self._clear_gradients()
            return run()

        result, _ = self._run(at_weights, run)
        return result
