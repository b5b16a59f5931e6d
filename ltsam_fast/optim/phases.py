"""The explicit phases: their order, torch's hooks around them, and its contract with GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ltsam_fast.optim.batch import Scaling
from ltsam_fast.optim.descent import Descender
from ltsam_fast.optim.fused import local_of


class Phased(Descender):
    """Runs phases in their order, with hooks and scaler."""

    def _enter(self, phase: str) -> None:
        """Checks that ``phase`` is next."""
        expected = self.phases[self._phase]
        if phase != expected:
            raise ValueError(
                f"{phase}() was called where {expected}() is next: call {', '.join(f'{name}()' for name in self.phases)} "
                "in this order, each after its backward(), or restore() to start over"
            )

    def _run(
        self,
        phase: str,
        work: Callable[[Tensor | None, Tensor | None], None],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Does a phase's ``work(grad_scale, found_inf)`` in its turn; ``scaler`` is the first phase's, for all of the step.

        If it fails, by Ctrl-C too, weights that climbed come back.
        """
        self._enter(phase)
        following = (self._phase + 1) % len(self.phases)
        if self._phase == 0:
            self._scaling = Scaling(scaler, self._parameters()[0])
            self._call_hooks(_global_optimizer_pre_hooks, self._optimizer_step_pre_hooks)
        scaling = self._scaling
        scaling.check_scaled(self)
        try:
            signals = scaling.signals if scaling.grad_scale is not None else self._signals()
            self._check_join(signals[1] is not None)
            work(*signals)
            self._phase = following
        except BaseException:
            if self._climbed:
                self.restore()
            raise
        if following == 0:
            scaling.report(self)
            if not self._within_step:
                self._call_hooks(_global_optimizer_post_hooks, self._optimizer_step_post_hooks)

    _step_supports_amp_scaling = True
    """Tells torch.amp.GradScaler.step() to set ``grad_scale`` and ``found_inf``, and to leave the gradients as they are."""
    _within_step = False

    def _patch_step_function(self) -> None:
        """Where torch wraps step(): keeps that and the phases out of torch.compile's graphs, which break there once."""
        super()._patch_step_function()  # type: ignore[misc]
        cls = type(self)
        for name in ("step", *self.phases):
            function = getattr(cls, name)
            if not hasattr(function, "_torchdynamo_disable"):
                setattr(cls, name, torch.compiler.disable(function))

    def _signals(self) -> tuple[Tensor | None, Tensor | None]:
        """``grad_scale`` and ``found_inf`` as torch.amp.GradScaler.step(), or the caller, set them."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # without gradients torch's is the number 0
            found_inf = None if grad_scale is None else torch.zeros((), dtype=torch.float32, device=grad_scale.device)
        return grad_scale, found_inf

    def _ends(self, closure: Any) -> bool:
        """Whether step(closure) is one of torch's own: a GradScaler takes the last phase, or a checkpoint wants state."""
        if closure is not None:
            return False
        return self._phase == len(self.phases) - 1 if self._phase else self._asks_for_state()

    def _asks_for_state(self) -> bool:
        """Whether torch.distributed.checkpoint calls step() with learning rate 0 and gradients of zeros, to see the state."""
        if any(bool(group.get("lr", 0.0)) for group in self.param_groups):
            return False
        params = [param for param in self._parameters()[0] if param.requires_grad]
        grads = [param.grad for param in params]
        return bool(grads) and not any(grad is None or bool(grad.any()) for grad in local_of(grads, self._sharded))

    def _create_state(self) -> None:
        """Makes the state that the steps would make, for a checkpoint to be loaded into."""
        params, groups = self._parameters()
        moving = [i for i, param in enumerate(params) if param.requires_grad]
        params, groups = [params[i] for i in moving], [groups[i] for i in moving]
        self._create_buffers(params)
        self._create_base_state(params, groups)

    def _last_phase(self) -> Any:
        """step() as torch itself calls it."""
        if not self._phase:
            return self._create_state()
        self._within_step = True  # torch calls the hooks around it
        try:
            return getattr(self, self.phases[-1])()
        finally:
            self._within_step = False

    def _call_hooks(self, *registered: dict[int, Callable[..., Any]]) -> None:
        """Calls the hooks that torch.optim calls around step(), which the phases together are."""
        for hooks in registered:
            for hook in list(hooks.values()):
                hook(self, (), {})
