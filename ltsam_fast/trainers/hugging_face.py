"""Hugging Face's Trainer, for image and sequence classifiers, with or without PEFT."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    message = "ltsam_fast.trainers.hugging_face needs transformers: pip install 'ltsam_fast[hugging-face]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ltsam_fast.ops.checks import shown
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.optim.registry import method_named
from ltsam_fast.trainers.accelerate import AcceleratedStep
from ltsam_fast.trainers.micro_batches import check_per_sample, set_clipping


class SharpnessAwareTrainer(Trainer):
    r"""Hugging Face's Trainer with any method of the package.

    .. code-block:: python

        trainer = SharpnessAwareTrainer(                              # was: Trainer
            model=model, args=args, train_dataset=dataset,
            method="focal_sam", method_options={"rho": 0.05, "class_counts": counts},
        )

    The base optimizer is the one that ``args.optim`` names, with its learning rate, betas and weight decay.

    These settings of the Trainer apply: ``gradient_accumulation_steps`` (one perturbation for the whole step, weighted by
    samples), ``max_grad_norm`` (default 1.0; clipped inside the update, so ``grad_norm`` is not logged), ``fp16`` with its
    GradScaler, ``bf16``, schedulers, checkpoints, DDP, ``label_smoothing_factor``.

    The per-sample losses are computed from ``outputs.logits``, shape (B, C), and the labels, named by ``args.label_names``.
    The model's ``problem_type``, given or inferred as transformers does, decides which loss: cross entropy (with
    ``label_smoothing_factor``), the mean squared error or the binary cross entropy over the C outputs. If the model returns a
    ``loss``, it must be the mean of these, and no class label may be -100, which that mean would leave out. This is checked in
    every pass: on a CPU, and in the first step, before anything changes; on other devices after the step, when the Trainer
    synchronizes.

    For other losses, such as those of tokens or with class weights, give ``compute_loss_func(outputs, labels,
    num_items_in_batch)``. It must return the per-sample losses, shape (B,), and not use ``num_items_in_batch``, which is
    ``None`` in training; in evaluation the Trainer takes their mean. ``compute_loss``, which returns a mean, must not be
    overridden.

    ``optimizer.model`` is the model as the Trainer wraps it, so the optimizer's ``plan`` applies, see
    :mod:`ltsam_fast.trainers`.

    All micro-batches of an accumulated step but the last are copied, since a loader may reuse its memory. There are no
    gradients when callbacks' ``on_optimizer_step`` is called.

    Args:
        *args: Arguments of the Trainer.
        method: A class of this package, or a name of :func:`ltsam_fast.list_methods`. ``None``: the optimizer of
            ``optimizers`` or ``optimizer_cls_and_kwargs``; if it is not one of this package, the Trainer trains as usual.
        method_options: Keywords of ``method``: its options, such as ``rho``, and further ones of the base optimizer.
        **kwargs: Keywords of the Trainer.

    Raises:
        TypeError: ``method`` is not a class of this package.
        ValueError: There is no method of this name, or it is given with ``optimizers`` or ``optimizer_cls_and_kwargs``. Before
            the first step: ``method_options`` has another value than ``args``, ``max_grad_norm`` differs from the optimizer's,
            the model is sharded, labels are not found, the per-sample losses are not known, ``compute_loss`` or a callback's
            ``on_pre_optimizer_step`` is overridden, or ``training_step`` does not call this one. At any step: the model's loss
            is not the mean of the losses, or a label is -100.
    """

    def __init__(
        self,
        *args: Any,
        method: type[SharpnessAware] | str | None = None,
        method_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer_cls_and_kwargs: Any = None
        super().__init__(*args, **kwargs)
        if isinstance(method, str):
            named = method_named(method)
            method, method_options = named.cls, named.options_with(method_options or {})
        if method is not None and not (isinstance(method, type) and issubclass(method, SharpnessAware)):
            raise TypeError(f"method must be a class such as ltsam_fast.SAM, got {method!r}")
        if method is not None and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise ValueError("method must be None where optimizers or optimizer_cls_and_kwargs are given")
        self.method, self.method_options = method, method_options or {}
        self._reset()

    def _reset(self) -> None:
        self._step: AcceleratedStep | None = None
        self._step_taken = False
        """Whether training_step has taken the step for which the Trainer calls optimizer.step()."""
        self._before_first_step = True
        """Whether no step has been taken yet."""
        self._checks: list[tuple[Tensor, Callable[[], str]]] = []
        """Checks to evaluate after the step: a 0-d tensor that is true for an error, and the message."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Creates ``method`` around the optimizer that ``args.optim`` names."""
        if self.optimizer is not None or self.method is None:
            return super().create_optimizer(model)
        base, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
        options = {name: value for name, value in options.items() if name not in ("fused", "foreach")}
        own = dict(self.method_options)
        for name, value in {"model": None, "weight_decay": self.args.weight_decay, **options}.items():
            if name in own and own[name] != value:
                whose = "the Trainer has its own" if name == "model" else f"args has {value!r}"
                raise ValueError(f"{name} must be left out of method_options, for {whose}; got {shown(own[name])}")
        plan = own.pop("plan", None)
        self.optimizer_cls_and_kwargs = (self.method, {"base_optimizer": base, **own, **options})
        method = super().create_optimizer(model)
        method.model = model or self.model  # the Trainer takes the keyword "model" for the parameters
        if plan is not None:  # "require" needs the model
            method.plan = plan
        return method

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Creates the scheduler, and replaces the prepared optimizer's step(): ``training_step`` takes the steps."""
        method = getattr(self.optimizer, "optimizer", None)
        if isinstance(method, SharpnessAware):
            set_clipping(method, self.args.max_grad_norm or 0.0, "max_grad_norm")
            self.optimizer.step = types.MethodType(lambda *_: self._check_step_taken(), self.optimizer)
        self._reset()
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Stores the batch; takes the optimizer's step with the last one of an accumulation."""
        if not isinstance(getattr(self.optimizer, "optimizer", None), SharpnessAware):
            return super().training_step(model, inputs, num_items_in_batch)
        self._check_hooks()
        model.train()
        if self._step is None or self._step.method.model is not model:
            self._step = AcceleratedStep(self.accelerator, model, self.optimizer, self._losses, self._labels)
        loss = self._step(dict(self._prepare_inputs(inputs)))
        if loss is not None:
            self._step_taken, self._before_first_step = True, False
            checks, self._checks = self._checks, []
            for wrong, message in checks:
                _raise_if(wrong, message)
        return torch.zeros((), device=self.args.device) if loss is None else loss.to(self.args.device)

    def _check_hooks(self) -> None:
        if getattr(self.compute_loss, "__func__", None) is not Trainer.compute_loss:
            raise ValueError(
                f"compute_loss must not be overridden, but {type(self).__name__} does: it returns a mean; "
                "give compute_loss_func(outputs, labels, num_items_in_batch), which returns the per-sample losses, shape (B,)"
            )
        for one in self.callback_handler.callbacks:
            hook = getattr(one.on_pre_optimizer_step, "__func__", None)
            if hook is not TrainerCallback.on_pre_optimizer_step:
                raise ValueError(
                    f"on_pre_optimizer_step() must not be overridden, but {type(one).__name__} does: gradients exist "
                    "only inside the optimizer's update; on_step_begin comes before every step, on_step_end after it"
                )

    def _check_step_taken(self) -> None:
        """Replaces the accelerated optimizer's step(), which training_step has taken already."""
        if not self._step_taken:
            raise ValueError(
                "training_step() must call super().training_step(model, inputs, num_items_in_batch), which takes the steps"
            )
        self._step_taken = False

    def _labels(self, inputs: dict[str, Any]) -> Tensor:
        name = self.label_names[0] if len(self.label_names) == 1 else None
        if name not in inputs:
            raise ValueError(
                f"args.label_names must be the one name that the labels have among {sorted(inputs)}, got {self.label_names}"
            )
        return inputs[name]  # type: ignore[index]

    def _losses(self, inputs: dict[str, Any]) -> Tensor:
        labels, model = self._labels(inputs), self.optimizer.optimizer.model
        own = self.compute_loss_func is None and self.label_smoother is None  # as in the Trainer
        if not (own and _accepts(self.model, self.label_names[0])):
            inputs = {name: one for name, one in inputs.items() if one is not labels}
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
            if self.compute_loss_func is not None:
                try:
                    losses = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
                except TypeError as error:
                    if "None" not in str(error):
                        raise
                    raise ValueError(
                        f"compute_loss_func must not use num_items_in_batch, which is None ({error}): return the "
                        "per-sample losses, shape (B,)"
                    ) from error
                return check_per_sample(losses, "compute_loss_func")
            losses = self._losses_of(outputs, labels)
        if own and outputs.get("loss") is not None:
            mean, theirs = losses.detach().mean(), outputs["loss"].detach().mean()
            tolerance = max(1e-5, 4 * torch.finfo(theirs.dtype).eps)  # rounding errors
            self._check(
                ~torch.isclose(mean.to(theirs), theirs, rtol=tolerance, atol=tolerance, equal_nan=True),
                lambda: f"{_GIVE}: the model's own loss is {float(theirs):.6g}, not their mean, {float(mean):.6g}",
            )
        return losses

    def _check(self, wrong: Tensor, message: Callable[[], str]) -> None:
        if self._before_first_step or wrong.device.type == "cpu":
            _raise_if(wrong, message)
        else:  # without a synchronization
            self._checks.append((wrong, message))

    def _losses_of(self, outputs: Any, labels: Tensor) -> Tensor:
        """Returns the per-sample losses whose mean transformers' classifiers return."""
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = type(outputs).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(f"{_GIVE} where the model does not return logits of shape (B, C), got {got}")
        config = getattr(self.model, "config", None)
        problem, count = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
        if problem is None and count is not None:
            single = labels.dtype in (torch.long, torch.int)
            problem = "regression" if count == 1 else "single_label" if single else "multi_label_classification"
        if problem in ("regression", "multi_label_classification"):
            if self.label_smoother is not None:
                raise ValueError(
                    f"label_smoothing_factor must be 0 with problem_type {problem!r}, got {self.args.label_smoothing_factor!r}"
                )
            loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
            return loss(logits, labels.view_as(logits), reduction="none").mean(1)
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        classes = labels if labels.is_floating_point() else labels.flatten()
        if not labels.is_floating_point():
            self._check((labels == _IGNORED).any(), lambda: _NO_IGNORED)
        return F.cross_entropy(logits, classes, reduction="none", label_smoothing=smoothing)

    def _clip_grad_norm(self, model: Any) -> Any:
        return None if self._step is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return None if self._step is not None else super()._get_grad_norm(model, grad_norm=grad_norm)


_GIVE = "compute_loss_func must be given, with the per-sample losses, shape (B,)"
_IGNORED = -100
_NO_IGNORED = (
    f"labels must be classes, got {_IGNORED} (ignore_index), which the mean over samples would count: leave these samples "
    "out of the batches, or give compute_loss_func"
)


def _raise_if(wrong: Tensor, message: Callable[[], str]) -> None:
    if wrong:
        raise ValueError(message())


def _accepts(model: Any, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)
