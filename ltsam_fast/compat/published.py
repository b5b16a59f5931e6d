"""What published classes have in common: they wrap an optimizer, and their ``step`` runs closures that call ``backward()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast.ops.checks import shown
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.optim.base_step import check_base
from ltsam_fast.optim.phases import PhaseRun


class Wrapper(SharpnessAware):
    """Base of the classes that are published as wrappers of an optimizer."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that takes the step."""
        return self.base_optimizer

    def _around(self, optimizer: Optimizer, **options: Any) -> tuple[list[dict[str, Any]], Callable[..., Optimizer]]:
        """``params`` and ``base_optimizer`` of the constructor, for an optimizer that is there already.

        Args:
            optimizer: The optimizer. Its groups get the method's options when these have been checked.
            **options: Options of the groups that are no keywords of the constructor.
        """
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SharpnessAware):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, such as SGD, got {shown(optimizer)}")
        check_base(type(optimizer))
        self.base_optimizer = optimizer
        # An earlier wrapper may have left options of this name, and Adadelta has a rho of its own.
        given = {name for name, one in self.options.items() if one.keyword}
        groups = [
            {name: value for name, value in group.items() if name not in given} | options
            for group in optimizer.param_groups
        ]

        def base(complete: list[dict[str, Any]], **_: Any) -> Optimizer:
            for group in complete:
                self.check_group_options(group)
            for group, one in zip(optimizer.param_groups, complete, strict=True):
                group.update(one)
            return optimizer

        return groups, base


class ForwardBackward(SharpnessAware):
    """Base of the classes whose ``step`` runs closures that call ``backward()``: they are the passes between its phases."""

    def _run(self, *passes: Callable[[], Any] | None, **inputs: Any) -> list[Any]:
        """One step. If it fails, the weights are the unperturbed ones, and gradients are cleared.

        Args:
            *passes: What runs before each phase, forward and backward; None: its gradients are there.
            **inputs: The rule's.

        Returns:
            What the passes returned.
        """
        if self._running is not None:
            self._check_turn("step")
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "scaler.step(optimizer, ...) is not supported here: use the phases, or ltsam_fast's own class"
            )
        step, results = self._begin(None), []
        phases = PhaseRun(self, step, inputs)
        try:
            for left, run in enumerate(passes, 1 - len(passes)):
                if run is not None:
                    with self._workers.backward(last=not left), torch.enable_grad():
                        results.append(run())
                    self._check_pass(results[-1])
                phases.advance()
                if left:
                    self._clear_gradients()
        except BaseException:
            self._abandon(step)
            self._clear_gradients()
            raise
        return results

    def _check_pass(self, result: Any) -> None:
        """Raises ValueError for a closure that is not a published one."""
        if isinstance(result, Tensor) and result.dim() == 1 and len(result) > 1:
            raise ValueError(
                f"closure must call backward() and return a scalar, got {tuple(result.shape)}: per-sample losses are for "
                "ltsam_fast's own classes, such as ltsam_fast.SAM"
            )
        if not self._has_gradient():
            raise ValueError(
                "closure must call backward(), but left no gradient; one that returns per-sample losses is for ltsam_fast.SAM"
            )

    def _has_gradient(self) -> bool:
        return any(param.grad is not None for param in self.all_params()[0])


class GradientsThere(ForwardBackward):
    """Base of the classes with davda54's ``step``: the gradients at w are there when it is called."""

    @torch.no_grad()
    def step(self, closure: Any = None, targets: Any = None, scaler: Any = None) -> Any:  # type: ignore[override]
        """The published step: ascends along the gradients that are there, runs ``closure``, restores the weights and steps.

        Args:
            closure: Runs forward and backward. What it returns, detached, is returned.
            targets: Must be None: it belongs to closures that return per-sample losses.
            scaler: Must be None, too.

        Raises:
            ValueError: There is no gradient to ascend along, ``closure`` does not call ``backward()``, or it returns per-sample
                losses: that is what :class:`ltsam_fast.SAM` takes. The weights are the unperturbed ones afterwards.
        """
        if closure is None and self._is_torchs_own_call():
            return self._torchs_own_call()
        if not callable(closure) or targets is not None or scaler is not None:
            raise ValueError(
                "closure must be given alone: step(closure), with a function that calls backward(); per-sample losses, targets "
                "and a scaler are for ltsam_fast's own classes, such as ltsam_fast.SAM"
            )
        if self._running is None and not self._has_gradient():
            raise ValueError(
                "no parameter has a gradient: call backward() before step(closure), as the published script does; a closure "
                "that returns per-sample losses is for ltsam_fast.SAM, which needs no gradient"
            )
        (loss,) = self._run(None, closure)
        return detached(loss)


def detached(loss: Any) -> Any:
    """What a closure returned, without its graph."""
    return loss.detach() if isinstance(loss, Tensor) else loss
