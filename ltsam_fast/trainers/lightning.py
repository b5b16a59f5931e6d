"""Lightning: a module whose optimizer may be any method of the package."""

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

from ltsam_fast.optim import GNM, MSAM
from ltsam_fast.optim.optimizer import SharpnessAware
from ltsam_fast.trainers.parts import Parts, check_per_sample, labels_of, set_clipping


class SharpnessAwareModule(LightningModule):
    r"""A LightningModule for the methods: write ``training_losses`` in place of ``training_step``.

    Optimization is Lightning's automatic one, so the Trainer's settings hold: ``accumulate_grad_batches`` (one perturbation
    for the whole step, weighted by samples), ``gradient_clip_val`` (becomes ``max_grad_norm``; clipping by value is refused),
    ``precision`` with its GradScaler, schedulers, checkpoints, DDP (``optimizer.model`` becomes the wrapped model: see
    :class:`~ltsam_fast.optim.base.SharpnessAware`). Any other torch optimizer trains with the mean of the losses.

    What Lightning shows and uses is the mean loss at the unperturbed weights, as with any optimizer: the ``loss`` in
    ``outputs``, and what ``training_losses`` logs, once a batch. ``training_loss`` is that of the last step's batches
    together, 0-d. Other things that ``training_losses`` does, such as updating metrics, happen in every pass.

    Gradient accumulation costs more here than elsewhere: every micro-batch but the last of a step is copied, for a loader may
    use its memory again, and each has a forward without gradients, for its loss must be known before the step. GNM and m-SAM,
    which have no pass with the whole batch at the unperturbed weights, ``on_before_backward`` and a ``training_step`` of one's
    own cost that forward too.

    A ``training_step`` of one's own must return what ``super().training_step(batch, batch_idx)`` does, alone or as ``"loss"``
    in a dict; it runs in every pass. Where it returns ``None``, the batch is left out, as with any optimizer.

    ``on_before_zero_grad``, ``on_before_backward`` (with a loss that has no graph), ``optimizer_zero_grad`` and
    ``optimizer_step`` are called as ever; a step's gradients are gone when it is over. Hooks that need them are refused.

    Raises:
        ValueError: Before a step, for strategies other than a single device and DDP, for clipping by value, for a
            ``gradient_clip_val`` that contradicts the optimizer's ``max_grad_norm``, for manual optimization, for a
            ``training_step`` that does not call this one, for an ``optimizer_step`` that steps past Lightning's optimizer, for
            ``on_after_backward`` and ``on_before_optimizer_step``, the callbacks' too, and for ``backward`` and
            ``configure_gradient_clipping`` of one's own.
        TypeError: A batch that has to be kept can't be copied.

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
    _current_fx_name: str | None  # Lightning's
    _seen: list[Tensor]
    """The per-sample losses of the step's batches at the unperturbed weights."""
    _parts: Parts | None = None
    _in_pass = False
    _stepping = False
    _passing = False
    """Whether the optimizer runs its passes."""
    _kept = False
    """Whether training_step has kept the batch that Lightning is about to go backward from."""
    _known = False
    """Whether the loss of the present batch is known, and what is to be logged of it is logged."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lets an optimizer_step of one's own take the step by ``optimizer.step(closure)``, as Lightning's does."""
        super().__init_subclass__(**kwargs)
        owner = next(one for one in cls.__mro__ if "optimizer_step" in vars(one))
        if owner is cls or not issubclass(owner, SharpnessAwareModule):
            cls.optimizer_step = _with_passes(vars(owner)["optimizer_step"])  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Lets an optimizer_step that is set on the instance take the step, too."""
        taking = types.MethodType(_with_passes(lambda _, *rest: value(*rest)), self)
        super().__setattr__(name, taking if name == "optimizer_step" else value)

    def training_losses(self, batch: Any, batch_idx: int) -> Tensor:
        """The per-sample losses, shape (B,), of a batch or of some of its samples; the forward pass alone."""
        raise NotImplementedError("define training_losses(batch, batch_idx), which returns the per-sample losses (B,)")

    def training_targets(self, batch: Any) -> Tensor | None:
        """The samples' classes, shape (B,), integer: by default the second of a pair, or ``batch["labels"]``."""
        return labels_of(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keeps the batch for the optimizer; in the optimizer's passes, the losses."""
        if self._in_pass:
            return self.training_losses(batch, batch_idx)
        self._check_automatic()
        method, trainer = self._method, self.trainer
        if not isinstance(method, SharpnessAware) or trainer.fit_loop._skip_backward:
            return self.training_losses(batch, batch_idx).mean()
        self._check(method)
        if self._parts is None or batch_idx % trainer.accumulate_grad_batches == 0:  # an interrupted step left some
            self._parts, self._seen = Parts(self._losses, lambda part: self.training_targets(part[0])), []
        self._parts.add((batch, batch_idx), last=self._stepping)
        self._kept = True
        self._known = (
            trainer.accumulate_grad_batches > 1
            or not self._stepping
            or isinstance(method, (GNM, MSAM))
            or self._own_training_step
            or any(_overrides(owner, "on_before_backward", parent) for owner, parent in self._owners())
        )
        return self._look(batch, batch_idx) if self._known else torch.zeros((), device=self.device)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; in the optimizer's passes, only once a batch, at the unperturbed weights."""
        if not (self._in_pass and self._known):
            super().log(*args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Leaves the backward passes to the optimizer, if it has several."""
        self._check_automatic()
        if not isinstance(self._method, SharpnessAware):
            super().backward(loss, *args, **kwargs)
        elif not self._kept:
            raise ValueError(
                "training_step() must call super().training_step(batch, batch_idx): write training_losses(), which returns "
                "the per-sample losses, instead"
            )
        self._kept = False

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:  # type: ignore[override]
        """As Lightning's; refused in manual optimization."""
        self._check_automatic()
        return super().optimizers(use_pl_optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Takes one step of the method over the batches kept."""
        if not isinstance(self._method, SharpnessAware):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        self._take(optimizer_closure)

    def _take(self, closure: Any = None) -> None:
        """What optimizer.step() is while a step is taken: Lightning's closure, and the method's passes."""
        trainer, method = self.trainer, self._method
        model = trainer.model
        shown: Any = None
        self._stepping = True
        try:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():  # type: ignore[operator]
                if closure is not None:
                    shown = closure()  # Lightning's bookkeeping, and training_step, which keeps the batch
        finally:
            self._stepping = False
        # Weight averaging ends with forwards, for batch norm; training_step may leave batches out.
        if trainer.fit_loop._skip_backward or self._parts is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        known, parts, self._parts = self._known, self._parts, None
        self._passing = True
        try:
            parts.step(method, scaler)
        finally:
            self._passing = False
        self.training_loss = torch.cat(self._seen).detach().mean()
        if not known:
            shown.data = self.training_loss  # this is the loss in Lightning's outputs
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
                        f"inside {type(method).__name__}'s update only; {remedy}"
                    )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "gradient_clip_algorithm must be 'norm', which is done inside the update, got "
                f"{trainer.gradient_clip_algorithm!r}"
            )
        set_clipping(method, trainer.gradient_clip_val or 0.0, "gradient_clip_val")
        method.model = trainer.model  # type: ignore[assignment]

    def _owners(self) -> list[tuple[Any, type]]:
        """Whose hooks Lightning calls, and the class that has them to be overridden."""
        return [(self, SharpnessAwareModule), *((one, Callback) for one in self.trainer.callbacks)]  # type: ignore[attr-defined]

    def _look(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss before the step; buffers and random numbers stay as they were."""
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        kind = self.device.type
        with torch.no_grad(), torch.random.fork_rng([] if kind == "cpu" else [self.device], device_type=kind):
            losses = check_per_sample(self.training_losses(batch, batch_idx), "training_losses()")
            for buffer, value in before:
                buffer.copy_(value)
        self._seen.append(losses)
        return losses.mean()

    @property
    def _method(self) -> Any:
        return self.trainer.optimizers[0]

    @property
    def _own_training_step(self) -> bool:
        return _overrides(self, "training_step", SharpnessAwareModule)

    def _losses(self, part: tuple[Any, int]) -> Tensor:
        hook, self._current_fx_name = self._current_fx_name, "training_step"  # under which everything is logged
        self._in_pass, own = True, self._own_training_step
        try:
            losses = self.trainer.strategy.training_step(*part)
        finally:
            self._in_pass, self._current_fx_name = False, hook
        if own and isinstance(losses, Mapping):
            losses = losses["loss"]
        losses = check_per_sample(losses, "training_step()" if own else "training_losses()")
        if not self._known:  # a step's first pass is at the unperturbed weights
            self._known = True
            self._seen.append(losses.detach())
        return losses


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
"""Hooks that need the gradients, and what to do instead."""


def _with_passes(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def check(*_: Any) -> None:
            if not self._passing:
                raise ValueError(
                    "optimizer_step() must call optimizer.step(closure), got a call of optimizer.optimizer.step()"
                )

        if not isinstance(self._method, SharpnessAware):
            own(self, epoch, batch_idx, optimizer, optimizer_closure)
            return
        optimizer.step = self._take
        checking = self._method.register_step_pre_hook(check)
        try:
            own(self, epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            checking.remove()
            vars(optimizer).pop("step", None)

    return optimizer_step


def _overrides(owner: Any, name: str, parent: type) -> bool:
    return getattr(getattr(owner, name), "__func__", None) is not getattr(parent, name)
