"""Hugging Face's Trainer, for image and sequence classifiers, with or without PEFT."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from transformers import Trainer
except ModuleNotFoundError as error:
    message = "ltsam_fast.trainers.hugging_face needs transformers: pip install 'ltsam_fast[hugging-face]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.trainers.accelerate import AcceleratedStep
from ltsam_fast.trainers.parts import set_clipping


class SharpnessAwareTrainer(Trainer):
    r"""Hugging Face's Trainer with any method of the package.

    .. code-block:: python

        trainer = SharpnessAwareTrainer(                              # was: Trainer
            model=model, args=args, train_dataset=dataset,
            method=lf.FocalSAM, method_options={"rho": 0.05, "class_counts": counts},
        )

    The base optimizer is the one that ``args.optim`` names, with its learning rate, betas and weight decay.

    The Trainer's settings hold: ``gradient_accumulation_steps`` (one perturbation for the whole step, weighted by samples),
    ``max_grad_norm`` (1.0 by default, as ever; clipped inside the update, so no ``grad_norm`` is logged), ``fp16`` with its
    GradScaler, ``bf16``, schedulers, checkpoints, DDP, ``label_smoothing_factor``.

    The losses are the cross entropy of ``outputs.logits``, shape (B, C), and the labels, named by ``args.label_names``.
    ``compute_loss_func(outputs, labels, num_items_in_batch)``, if given, must return the per-sample losses, shape (B,);
    in evaluation the Trainer takes their mean.

    Args:
        *args: The Trainer's.
        method: One of the package's classes. ``None``: what ``optimizers`` or ``optimizer_cls_and_kwargs`` give; if that is
            none of the package's, the Trainer trains as ever.
        method_options: The method's own keywords.
        **kwargs: The Trainer's.

    Raises:
        TypeError: ``method`` is no class of the package.
        ValueError: ``method`` together with ``optimizers`` or ``optimizer_cls_and_kwargs``; when training, a ``max_grad_norm``
            that contradicts the optimizer's, a model that is sharded, or labels that cannot be found.
    """

    def __init__(
        self,
        *args: Any,
        method: type[SharpnessAware] | None = None,
        method_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer_cls_and_kwargs: Any = None
        super().__init__(*args, **kwargs)
        if method is not None and not (isinstance(method, type) and issubclass(method, SharpnessAware)):
            raise TypeError(f"method must be a class such as ltsam_fast.SAM, got {method!r}")
        if method is not None and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise ValueError("method must be None where optimizers or optimizer_cls_and_kwargs are given")
        self.method, self.method_options = method, method_options or {}
        self._taking: AcceleratedStep | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the optimizer, of ``method`` around the one that ``args.optim`` names."""
        if self.optimizer is None and self.method is not None:
            base, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            options = {name: value for name, value in options.items() if name not in ("fused", "foreach")}
            self.optimizer_cls_and_kwargs = (self.method, {"base_optimizer": base, **self.method_options, **options})
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the scheduler. By now the optimizer is the accelerator's: ``training_step`` takes its steps."""
        method = getattr(self.optimizer, "optimizer", None)
        if isinstance(method, SharpnessAware):
            set_clipping(method, self.args.max_grad_norm or 0.0, "max_grad_norm")
            self.optimizer.step = types.MethodType(_taken_already, self.optimizer)
        self._taking = None
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keeps the batch; with the last of an accumulation, takes the optimizer's step."""
        if not isinstance(getattr(self.optimizer, "optimizer", None), SharpnessAware):
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if self._taking is None or self._taking.method.model is not model:
            self._taking = AcceleratedStep(self.accelerator, model, self.optimizer, self._losses, self._labels)
        loss = self._taking(dict(self._prepare_inputs(inputs)))
        return torch.zeros((), device=self.args.device) if loss is None else loss.to(self.args.device)

    def _labels(self, inputs: dict[str, Any]) -> Tensor:
        name = self.label_names[0] if len(self.label_names) == 1 else None
        if name not in inputs:
            raise ValueError(
                f"args.label_names must be the one name that the labels have among {sorted(inputs)}, got {self.label_names}"
            )
        return inputs[name]  # type: ignore[index]

    def _losses(self, inputs: dict[str, Any]) -> Tensor:
        labels = self._labels(inputs)
        with self.compute_loss_context_manager():
            outputs = self.optimizer.optimizer.model(**{name: one for name, one in inputs.items() if one is not labels})
            if self.compute_loss_func is not None:
                return self.compute_loss_func(outputs, labels, num_items_in_batch=None)
            smoothing = self.args.label_smoothing_factor
            return F.cross_entropy(outputs["logits"], labels, reduction="none", label_smoothing=smoothing)

    def _clip_grad_norm(self, model: Any) -> Any:
        return None if self._taking is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return None if self._taking is not None else super()._get_grad_norm(model, grad_norm=grad_norm)


def _taken_already(optimizer: Any, closure: Any = None) -> None:
    """In place of the accelerated optimizer's step(): training_step has taken it."""
