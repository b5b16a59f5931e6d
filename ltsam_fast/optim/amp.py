"""Mixed precision: a GradScaler's scale, overflow, and the state that an overflow takes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ltsam_fast import ops
from ltsam_fast.ops.checks import shown


class LossScale:
    """What a GradScaler means for a step: losses are scaled up, and an overflow in any pass skips the whole update.

    Attributes:
        signals: ``grad_scale`` and ``found_inf``, one-element tensors, as keywords of the ops; empty without a scaler. Their
            names are attributes too: not zero once a pass has overflowed, and what the gradients are too large by; or None.
    """

    def __init__(self, scaler: Any = None, params: list[Tensor] | None = None) -> None:
        if scaler is not None and not hasattr(scaler, "is_enabled"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {shown(scaler)}")
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.set_signals(None, None)
        if self._scaler is not None and params:
            found_inf = torch.zeros((), dtype=torch.float32, device=params[0].device)
            self._scaler.scale(found_inf)  # makes the scale, if this is its first use
            self.set_signals(self._scaler._get_scale_async(), found_inf)

    def set_signals(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Sets both."""
        self.grad_scale, self.found_inf = grad_scale, found_inf
        pairs = {"grad_scale": grad_scale, "found_inf": found_inf}
        self.signals = {name: value for name, value in pairs.items() if value is not None}

    def with_signals_of(self, optimizer: Any) -> LossScale:
        """One with the signals that torch.amp.GradScaler.step(), or the caller, has set as attributes of the optimizer."""
        if self._scaler is not None:
            return self
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # without gradients torch's is the number 0
            found_inf = None if grad_scale is None else torch.zeros((), dtype=torch.float32, device=grad_scale.device)
        scaling = LossScale()
        scaling.set_signals(grad_scale, found_inf)
        return scaling

    def __call__(self, weights: Tensor) -> Tensor:
        """The weights of a loss, scaled up."""
        return weights if self._scaler is None else self._scaler.scale(weights)

    def note(self, number: Tensor) -> None:
        """Takes note of an overflow: of a sum over gradients that is not finite."""
        if self.found_inf is not None:
            self.found_inf.masked_fill_(~number.isfinite(), 1.0)

    def check_updated(self, optimizer: Optimizer) -> None:
        """Raises ValueError if the scaler has not been updated since the latest step."""
        if self._scaler is not None and self._scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED:
            raise ValueError("scaler.update() must be called after each step, and was not after the latest")

    def check_closure(self, losses: Tensor) -> None:
        """Raises ValueError if a closure has returned scaler.scale(losses)."""
        if self.grad_scale is None or (node := losses.grad_fn) is None or node.name() != "MulBackward0":
            return
        if node._saved_other is self.grad_scale:  # type: ignore[attr-defined]
            raise ValueError(
                "closure must return the losses as they are, got scaler.scale(losses): step(scaler=) scales them"
            )

    def check_scaled(self, optimizer: Optimizer) -> None:
        """Raises ValueError if the gradients were unscaled already."""
        if self._scaler is not None and self._scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED:
            raise ValueError(
                "scaler.unscale_(optimizer) must not be called: gradients are unscaled inside the passes; "
                "to clip them, give the optimizer max_grad_norm"
            )

    def report(self, optimizer: Optimizer) -> None:
        """Tells the scaler what scaler.step() would have found, for its update()."""
        if self._scaler is None or self.found_inf is None:
            return
        record = self._scaler._per_optimizer_states[id(optimizer)]
        record["found_inf_per_device"] = {self.found_inf.device: self.found_inf}
        record["stage"] = OptState.STEPPED


NO_SCALE = LossScale()
"""That of a step without a scaler."""


class SkippedSteps:
    """How many steps overflowed, counted on the device, and the state that such a step must not leave behind."""

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._changed: list[tuple[Tensor, Tensor]] = []
        self._created: list[tuple[dict[str, Any], str]] = []
        self.waiting = False
        """Whether there is state that the end of the step decides about."""
        self._doubtful: tuple[Tensor, list[tuple[dict[str, Any], str]]] | None = None

    def count(self, groups: list[dict[str, Any]], params: list[Tensor]) -> Tensor | None:
        """The number of skipped steps, where the device counts it; None: no step had a scaler."""
        so_far = groups[0]["skipped_steps"]
        if self._count is None and so_far:
            self._count = torch.tensor(float(so_far), dtype=torch.float32, device=params[0].device)
        return self._count

    @property
    def memory(self) -> Tensor | None:
        """Where the device counts, if it does yet."""
        return self._count

    def write(self, groups: list[dict[str, Any]]) -> None:
        """Brings the number to the groups, for a checkpoint."""
        if self._count is not None:
            for group in groups:
                group["skipped_steps"] = int(self._count)

    def before_change(self, tensors: list[Tensor], scaling: LossScale | None) -> None:
        """Keeps copies of state that is about to change: a later pass may overflow. None: the scale is not known yet."""
        if scaling is None or scaling.signals:
            self._changed += [(tensor, tensor.clone()) for tensor in tensors]
            self.waiting = True

    def created(self, entries: list[tuple[dict[str, Any], str]], scaling: LossScale | None) -> None:
        """Takes note of state that this step has begun: one that overflows has not begun it. None as above."""
        if scaling is None or scaling.signals:
            self._created += entries
            self.waiting = True

    def drop_doubtful(self) -> bool:
        """Drops state that was begun in a step which overflowed; returns whether it did. Waits for the device to know."""
        if self._doubtful is None:
            return False
        (found_inf, entries), self._doubtful = self._doubtful, None
        if not bool(found_inf):
            return False
        for state, name in entries:
            state.pop(name, None)
        return True

    def end_step(self, scaling: LossScale, groups: list[dict[str, Any]], params: list[Tensor]) -> None:
        """Counts the step if it overflowed, and takes its changes back then. The device decides."""
        found_inf = scaling.found_inf
        if found_inf is None:
            self.abandon_step()
            return
        count = self.count(groups, params)
        self._count = found_inf.detach().clone() if count is None else count.add_(found_inf)
        floating = [pair for pair in self._changed if pair[0].is_floating_point()]
        if floating:
            now, before = (list(tensors) for tensors in zip(*floating, strict=True))
            # What is now becomes what is to be kept, unless the step was skipped.
            whole = torch.zeros(4, dtype=torch.float64, device=params[0].device)
            whole[0].fill_(1.0)
            ops.combine_(before, now, [None] * len(now), whole, found_inf=found_inf)
            ops.restore_(now, before)
        for tensor, old in self._changed:
            if not tensor.is_floating_point():
                tensor.copy_(torch.where(found_inf.to(tensor.device).bool(), old, tensor))
        if self._created:
            self._doubtful = found_inf, self._created
        self.abandon_step()

    def abandon_step(self) -> None:
        """Forgets about what a step has changed and begun."""
        self._changed, self._created, self.waiting = [], [], False
