"""Lightning: derive from :class:`SharpnessAwareModule` and write ``training_losses``."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    message = "ltsam_fast.trainers.lightning needs Lightning: pip install 'ltsam_fast[lightning]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ltsam_fast.optim import SharpnessAware
from ltsam_fast.trainers.micro_batches import Layouts, MicroBatches, check_per_sample, labels_of, set_clipping


class SharpnessAwareModule(LightningModule):
    r"""A LightningModule for the methods: write ``training_losses`` in place of ``training_step``.

    Optimization is automatic, and these settings of the Trainer apply: ``accumulate_grad_batches`` (one perturbation for the
    whole step, weighted by samples), ``gradient_clip_val`` (becomes ``max_grad_norm``; clipping by value is an error),
    ``precision`` with its GradScaler, schedulers, checkpoints, DDP (``optimizer.model`` becomes the wrapped model: see
    :class:`~ltsam_fast.optim.SharpnessAware`). So its ``plan`` applies, see :mod:`ltsam_fast.trainers`; ``plan="require"``
    needs ``model=self`` as well. Any other torch optimizer trains with the mean of the losses.

    The loss that Lightning shows is the mean at the unperturbed weights, as with any optimizer: the ``loss`` in ``outputs``,
    and what ``training_losses`` logs, once per batch. ``training_loss`` is the mean over the last step's micro-batches, 0-d.
    Everything else in ``training_losses``, such as updates of metrics, runs in every pass.

    With gradient accumulation every micro-batch of a step but the last is copied, since a loader may reuse its memory, and
    each has one forward more, without gradients, since Lightning needs its loss before the step. That forward is also
    needed by GNM, MomentumSAM and MicroBatchSAM, which never evaluate the whole batch at the unperturbed weights, by
    ``on_before_backward``, by an overridden ``training_step``, and where ``training_losses`` logs and the optimizer's
    ``plan`` evaluates sub-batches.

    An overridden ``training_step`` must return the result of ``super().training_step(batch, batch_idx)``, alone or as
    ``"loss"`` in a dict; it runs in every pass. If it returns ``None``, the batch is skipped, as with any optimizer.

    ``on_before_zero_grad``, ``on_before_backward`` (with a loss that has no graph), ``optimizer_zero_grad`` and
    ``optimizer_step`` are called as usual. After a step there are no gradients; hooks that need them are an error.

    Raises:
        ValueError: Before a step, for strategies other than a single device and DDP, clipping by value, a
            ``gradient_clip_val`` other than the optimizer's ``max_grad_norm``, manual optimization, a ``training_step`` that
            does not call this one, an ``optimizer_step`` that bypasses Lightning's optimizer, and if
            ``on_after_backward``, ``on_before_optimizer_step`` (of callbacks, too), ``backward`` or
            ``configure_gradient_clipping`` is overridden.
        TypeError: A batch that must be copied can't be.

    >>> import ltsam_fast as lf
    >>> class Classifier(SharpnessAwareModule):  # was: LightningModule
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Linear(3, 2)
    ...     def training_losses(self, batch, batch_idx):  # was: training_step, which returned the mean
    ...         x, y = batch
    ...         return torch.nn.functional.cross_entropy(self.net(x), y, reduction="none")
    ...     def configure_optimizers(self):
    ...         return lf.FocalSAM(self.parameters(), torch.optim.SGD, rho=0.2, class_counts=[90, 10], lr=0.1)
    >>> Classifier().training_targets((torch.zeros(2, 3), torch.tensor([1, 0])))
    tensor([1, 0])
    """

    training_loss: Tensor | None = None
    bookkeeping = frozenset(("_loss_known", "_logs"))
    """Attributes that are not the forward pass's: a look at the network, which puts its back, leaves them."""
    _current_fx_name: str | None  # an attribute of Lightning
    _losses_at_w: list[Tensor]
    """The per-sample losses of the step's micro-batches at the unperturbed weights."""
    _micro_batches: MicroBatches | None = None
    _layouts: Layouts | None = None
    """What is known of the batches, from step to step."""
    _in_parts = False
    """Whether the optimizer has evaluated sub-batches at the unperturbed weights."""
    _logs = False
    """Whether the losses are logged."""
    _in_pass = False
    """Whether the optimizer calls training_step."""
    _in_closure = False
    """Whether Lightning's closure runs inside a step."""
    _in_step = False
    """Whether the optimizer runs its passes."""
    _batch_stored = False
    """Whether training_step has stored the batch for which Lightning calls backward()."""
    _loss_known = False
    """Whether the loss of the current batch is known and logged."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wraps an overridden optimizer_step so that its ``optimizer.step(closure)`` takes the step."""
        super().__init_subclass__(**kwargs)
        owner = next(one for one in cls.__mro__ if "optimizer_step" in vars(one))
        if owner is cls or not issubclass(owner, SharpnessAwareModule):
            cls.optimizer_step = _with_passes(vars(owner)["optimizer_step"])  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Wraps an optimizer_step that is set on the instance, too."""
        wrapped = types.MethodType(_with_passes(lambda _, *rest: value(*rest)), self)
        super().__setattr__(name, wrapped if name == "optimizer_step" else value)

    def training_losses(self, batch: Any, batch_idx: int) -> Tensor:
        """Runs the forward pass and returns the per-sample losses, shape (B,), of a batch or some of its samples."""
        raise NotImplementedError("define training_losses(batch, batch_idx), which returns the per-sample losses (B,)")

    def training_targets(self, batch: Any) -> Tensor | None:
        """Returns the samples' classes, shape (B,), integer: by default the second of a pair, or ``batch["labels"]``."""
        return labels_of(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Stores the batch for the step; in the optimizer's passes, returns the losses."""
        if self._in_pass:
            return self.training_losses(batch, batch_idx)
        self._check_automatic()
        method, trainer = self._method, self.trainer
        if not isinstance(method, SharpnessAware) or trainer.fit_loop._skip_backward:
            return self.training_losses(batch, batch_idx).mean()
        self._check(method)
        if self._micro_batches is None or batch_idx % trainer.accumulate_grad_batches == 0:
            # Batches of an interrupted step, if there are any, are dropped.
            self._layouts = self._layouts or Layouts()
            self._micro_batches = MicroBatches(self._losses, lambda one: self.training_targets(one[0]), self._layouts)
            self._losses_at_w = []
        self._micro_batches.add((batch, batch_idx), last=self._in_closure)
        self._batch_stored = True
        self._loss_known = (
            trainer.accumulate_grad_batches > 1
            or not self._in_closure
            or not method.evaluates_at_w
            or (self._logs and self._in_parts)
            or self._own_training_step
            or any(_overrides(owner, "on_before_backward", parent) for owner, parent in self._owners())
        )
        return self._loss_before_step(batch, batch_idx) if self._loss_known else torch.zeros((), device=self.device)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; in the optimizer's passes only once per batch, at the unperturbed weights."""
        self._logs |= self._current_fx_name == "training_step"
        if not (self._in_pass and self._loss_known):
            super().log(*args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Does nothing for the methods of this package, which run their own backward passes."""
        self._check_automatic()
        if not isinstance(self._method, SharpnessAware):
            super().backward(loss, *args, **kwargs)
        elif not self._batch_stored:
            raise ValueError(
                "training_step() must call super().training_step(batch, batch_idx): write training_losses(), which returns "
                "the per-sample losses, instead"
            )
        self._batch_stored = False

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:  # type: ignore[override]
        """As Lightning's; an error in manual optimization."""
        self._check_automatic()
        return super().optimizers(use_pl_optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Takes one step of the method over the stored micro-batches."""
        if not isinstance(self._method, SharpnessAware):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        self._run_step(optimizer_closure)

    def _run_step(self, closure: Any = None) -> None:
        """Replaces optimizer.step() during a step: runs Lightning's closure, then the method's passes."""
        trainer, method = self.trainer, self._method
        model = trainer.model
        loss: Any = None
        self._in_closure = True
        try:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():  # type: ignore[operator]
                if closure is not None:
                    loss = closure()  # Lightning's bookkeeping, and training_step, which stores the batch
        finally:
            self._in_closure = False
        # Weight averaging ends with forwards for batch norm; training_step may skip batches.
        if trainer.fit_loop._skip_backward or self._micro_batches is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss_known, micro_batches, self._micro_batches = self._loss_known, self._micro_batches, None
        self._in_step = True
        try:
            self.training_loss = micro_batches.step(method, scaler)
        finally:
            self._in_step = False
            self._in_parts |= micro_batches.in_parts
        if loss_known:
            self.training_loss = torch.cat(self._losses_at_w).mean()
        else:
            loss.data = self.training_loss  # the loss in Lightning's outputs
        if scaler is not None:
            scaler.update()

    def _check_automatic(self) -> None:
        if not self.automatic_optimization and any(isinstance(one, SharpnessAware) for one in self.trainer.optimizers):
            raise ValueError(
                "automatic_optimization must be True: the optimizer's passes are run by optimizer_step(); in a plain "
                "LightningModule, optimizer.step(closure) may be called by hand"
            )

    def _check(self, method: SharpnessAware) -> None:
        trainer = self.trainer
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"strategy must be a single device or DDP, got {type(trainer.strategy).__name__}")
        for owner, parent in self._owners():
            for name, remedy in _REFUSED[parent].items():
                if _overrides(owner, name, parent):
                    raise ValueError(
                        f"{name}() must not be overridden, but {type(owner).__name__} does: gradients exist "
                        f"only inside {type(method).__name__}'s update; {remedy}"
                    )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "gradient_clip_algorithm must be 'norm', which is done inside the update, got "
                f"{trainer.gradient_clip_algorithm!r}"
            )
        set_clipping(method, trainer.gradient_clip_val or 0.0, "gradient_clip_val")
        method.model = trainer.model  # type: ignore[assignment]

    def _owners(self) -> list[tuple[Any, type]]:
        """Returns the objects whose hooks Lightning calls, with the class that defines the hooks."""
        return [(self, SharpnessAwareModule), *((one, Callback) for one in self.trainer.callbacks)]  # type: ignore[attr-defined]

    def _loss_before_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean loss without changing buffers and random states."""
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        kind = self.device.type
        with torch.no_grad(), torch.random.fork_rng([] if kind == "cpu" else [self.device], device_type=kind):
            losses = check_per_sample(self.training_losses(batch, batch_idx), "training_losses()")
            for buffer, value in before:
                buffer.copy_(value)
        self._losses_at_w.append(losses)
        return losses.mean()

    @property
    def _method(self) -> Any:
        return self.trainer.optimizers[0]

    @property
    def _own_training_step(self) -> bool:
        return _overrides(self, "training_step", SharpnessAwareModule)

    def _losses(self, micro_batch: tuple[Any, int]) -> Tensor:
        hook, self._current_fx_name = self._current_fx_name, "training_step"  # the hook for which Lightning logs
        self._in_pass, own = True, self._own_training_step
        try:
            losses = self.trainer.strategy.training_step(*micro_batch)
        finally:
            self._in_pass, self._current_fx_name = False, hook
        if own and isinstance(losses, Mapping):
            losses = losses["loss"]
        self._loss_known = True  # a step's first pass is at the unperturbed weights
        return check_per_sample(losses, "training_step()" if own else "training_losses()")


_NO_GRADIENTS = {
    "on_after_backward": "on_train_batch_end comes after every step",
    "on_before_optimizer_step": "on_train_batch_start comes before every step, on_train_batch_end after it",
}
_REFUSED = {
    SharpnessAwareModule: {
        "backward": "what the loss needs belongs in training_losses",
        "configure_gradient_clipping": "clip with the Trainer's gradient_clip_val or the optimizer's max_grad_norm",
        **_NO_GRADIENTS,
    },
    Callback: _NO_GRADIENTS,
}
"""Hooks that need gradients, and their replacements."""


def _with_passes(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def check(*_: Any) -> None:
            if not self._in_step:
                raise ValueError(
                    "optimizer_step() must call optimizer.step(closure), got a call of optimizer.optimizer.step()"
                )

        if not isinstance(self._method, SharpnessAware):
            own(self, epoch, batch_idx, optimizer, optimizer_closure)
            return
        optimizer.step = self._run_step
        checking = self._method.register_step_pre_hook(check)
        try:
            own(self, epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            checking.remove()
            vars(optimizer).pop("step", None)

    return optimizer_step


def _overrides(owner: Any, name: str, parent: type) -> bool:
    return getattr(getattr(owner, name), "__func__", None) is not getattr(parent, name)
