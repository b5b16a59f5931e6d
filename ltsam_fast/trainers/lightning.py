"""Lightning: a module whose optimizer may be any method of the package."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    message = "ltsam_fast.trainers.lightning needs Lightning: pip install 'ltsam_fast[lightning]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.trainers.parts import Parts, labels_of, set_clipping


class SharpnessAwareModule(LightningModule):
    r"""A LightningModule for the methods: write ``training_losses`` in place of ``training_step``.

    Optimization is Lightning's automatic one, so the Trainer's settings hold: ``accumulate_grad_batches`` (one perturbation
    for the whole step, weighted by samples), ``gradient_clip_val`` (becomes ``max_grad_norm``; clipping by value is refused),
    ``precision`` with its GradScaler, schedulers, checkpoints, DDP (``optimizer.model`` becomes the wrapped model: see
    :class:`~ltsam_fast.optim.base.SharpnessAware`). Any other torch optimizer trains with the mean of the losses.

    ``on_before_optimizer_step`` comes before the passes, so there are no gradients to look at yet, and the ``loss`` in
    ``outputs`` is a placeholder: ``training_loss`` is the mean loss of the last step at the unperturbed weights, 0-d, to be
    logged in ``on_train_batch_end``, say. ``training_losses`` runs in every pass, so what it logs is the last pass's.

    Raises:
        ValueError: At a step, for strategies other than a single device and DDP, for clipping by value, for a
            ``gradient_clip_val`` that contradicts the optimizer's ``max_grad_norm``, and for manual optimization.

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
    _parts: Parts | None = None
    _in_pass = False

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
        if not isinstance(self._method, SharpnessAware):
            return self.training_losses(batch, batch_idx).mean()
        if not self.automatic_optimization:
            raise ValueError("automatic_optimization must be True: the optimizer's passes are run by optimizer_step()")
        if self._parts is None:
            self._parts = Parts(self._losses, lambda part: self.training_targets(part[0]))
        self._parts.add((batch, batch_idx))
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Leaves the backward passes to the optimizer, if it has several."""
        if not isinstance(self._method, SharpnessAware):
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Begins a step, with the batch that training_step has just kept; an interrupted one may have left others."""
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self._parts is not None:
            self._parts.begin_with_last()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips, unless the optimizer does so inside its update."""
        if not isinstance(self._method, SharpnessAware):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Takes one step of the method over the batches kept."""
        trainer, method = self.trainer, self._method
        if not isinstance(method, SharpnessAware):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        self._check(method)
        model = trainer.model
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():  # type: ignore[operator]
            optimizer_closure()  # Lightning's bookkeeping, and training_step, which keeps the batch
        for owner in trainer.callbacks:  # type: ignore[attr-defined]
            owner.on_before_optimizer_step(trainer, self, method)
        self.on_before_optimizer_step(method)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        assert self._parts is not None  # training_step was just called
        self.training_loss = self._parts.step(method, scaler)
        if scaler is not None:
            scaler.update()

    def _check(self, method: SharpnessAware) -> None:
        trainer = self.trainer
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"strategy must be a single device or DDP, got {type(trainer.strategy).__name__}")
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "gradient_clip_algorithm must be 'norm', which is done inside the update, got "
                f"{trainer.gradient_clip_algorithm!r}"
            )
        set_clipping(method, trainer.gradient_clip_val or 0.0, "gradient_clip_val")
        method.model = trainer.model  # type: ignore[arg-type]

    @property
    def _method(self) -> Any:
        return self.trainer.optimizers[0]

    def _losses(self, part: tuple[Any, int]) -> Tensor:
        self._in_pass = True
        try:
            return self.trainer.strategy.training_step(*part)  # type: ignore[return-value]
        finally:
            self._in_pass = False
