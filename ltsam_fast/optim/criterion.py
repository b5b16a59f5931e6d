"""The loss of ``step(forward, targets, loss=...)``: applied by the step, so that neither mean nor reduction is the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltsam_fast.losses import Loss
from ltsam_fast.ops.checks import check_labels, check_range, shown

if TYPE_CHECKING:
    from ltsam_fast.optim.amp import LossScale
    from ltsam_fast.optim.closures import ClassWeights

_MEANS_BY_WEIGHT = (nn.CrossEntropyLoss, nn.NLLLoss)
"""Losses of torch whose mean divides by the weights of the labels."""
_BY_CLASS = (nn.functional.cross_entropy, nn.functional.nll_loss)
"""Functions of torch that take logits (B, C)."""


class Criterion:
    """Gives the loss of each sample, scaled such that their mean is what ``reduction="mean"`` gives for the whole batch.

    Args:
        loss: One of :mod:`ltsam_fast.losses`, a loss of torch, or any function of logits and targets that returns the losses of
            the samples, (B,). ``reduction`` does not matter: an attribute or keyword of that name is "none" for the call.
        labels: The targets of the step's parts.
        classes: For how many classes the method has weights; None: it has none.

    Raises:
        ValueError: ``loss`` is no function, or ``labels`` are not the kind of targets that it takes.
    """

    def __init__(self, loss: Callable[..., Any], labels: Sequence[Tensor], classes: int | None = None) -> None:
        if not callable(loss) or isinstance(loss, type):
            raise ValueError(f"loss must be a function of logits and targets, or a loss's instance, got {shown(loss)}")
        self.loss, self._labels, self._classes = loss, labels, classes
        self._by_class = isinstance(loss, (Loss, *_MEANS_BY_WEIGHT)) or loss in _BY_CLASS
        if self._by_class:
            for one in labels:
                if one.dim() == 1:  # else they may be probabilities, or labels of pixels
                    check_labels(one, len(one))
        self._known = False
        self._mean_weight: Tensor | None = None

    def __call__(self, logits: Any, targets: Tensor) -> Tensor:
        """The losses, (B,), of these samples."""
        losses = self._each(logits, targets)
        weight = self.mean_weight()
        return losses if weight is None else losses / weight.to(losses, non_blocking=True)

    def check_logits(self, logits: Any) -> None:
        """Raises ValueError unless these can be logits of the targets, and the method has weights for all their classes."""
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        if shape == () or (self._by_class and (shape is None or len(shape) < 2)):
            got = type(logits).__name__ if shape is None else shape
            raise ValueError(
                f"closure must return logits, shape (B, C), where step() is given loss=, got {got}: leave the loss to step()"
            )
        if self._classes is not None and shape and len(shape) == 2 and shape[1] > self._classes:
            raise ValueError(
                f"class_counts, or class_weights, has {self._classes} entries, but the model's outputs have {shape[1]} "
                "classes: give one per class"
            )
        if shape and len(shape) == 2 and self._by_class:
            ignored = getattr(self.loss, "ignore_index", None)  # a function has a mean of its own over the others
            for one in self._labels:
                if one.dim() == 1:
                    check_range(one if ignored is None else one[one != ignored], shape[1])

    def weighted(
        self,
        logits: Any,
        targets: Tensor,
        weights: tuple[ClassWeights, ClassWeights],
        factor: float,
        scaling: LossScale,
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The losses, without a graph, and the logits' gradients for two weightings of the classes, from one pass.

        Args:
            logits: (B, C)
            targets: (B,)
            weights: The weightings.
            factor: What gradients are multiplied by, besides the number of these samples.
            scaling: And what else.

        Returns:
            None where the loss has no such pass.
        """
        if not isinstance(self.loss, Loss) or not isinstance(logits, Tensor) or logits.dim() != 2:
            return None
        mean = self.mean_weight()
        vectors = []
        for one in weights:
            vector = scaling(one.vector(logits.shape[1], logits.device) * (factor * len(logits)))
            vectors.append(vector if mean is None else vector / mean.to(vector, non_blocking=True))
        found = self.loss.weighted(logits, targets, *vectors)
        if found is None:
            return None
        losses, *gradients = found
        return losses if mean is None else losses / mean.to(losses, non_blocking=True), gradients

    def mean_weight(self) -> Tensor | None:
        """What the mean of the samples' losses is to be divided by, 0-d: the mean of their weights; None: nothing."""
        if not self._known:
            self._known, self._mean_weight = True, self._weight_of_a_mean()
        return self._mean_weight

    def _each(self, logits: Any, targets: Tensor) -> Any:
        loss: Any = self.loss
        if isinstance(logits, Tensor):
            targets = targets.to(logits.device, non_blocking=True)
        if isinstance(loss, Loss):
            return loss.per_sample(logits, targets)
        reduction = getattr(loss, "reduction", None)
        if not isinstance(reduction, str):
            return loss(logits, targets, **({"reduction": "none"} if _takes_reduction(loss) else {}))
        loss.reduction = "none"
        try:
            return loss(logits, targets)
        finally:
            loss.reduction = reduction

    def _weight_of_a_mean(self) -> Tensor | None:
        loss: Any = self.loss
        if isinstance(loss, Loss):
            weight, ignored = loss.weight, None
        elif isinstance(loss, _MEANS_BY_WEIGHT) and not self._labels[0].is_floating_point():
            weight, ignored = loss.weight, loss.ignore_index
        else:
            return None
        if weight is None and ignored is None:
            return None
        labels = torch.cat([one.long() for one in self._labels])
        counted = torch.ones(len(labels), device=labels.device) if ignored is None else (labels != ignored).float()
        if weight is not None:
            counted = counted * weight.to(labels.device, non_blocking=True)[labels * counted.long()]
        return counted.mean()


def _takes_reduction(loss: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a function without a signature
        return False
