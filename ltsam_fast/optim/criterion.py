"""The loss of ``step(forward, targets, loss=...)``: applied by the step, so that neither mean nor reduction is the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltsam_fast.losses import Loss

if TYPE_CHECKING:
    from ltsam_fast.optim.amp import LossScale
    from ltsam_fast.optim.closures import ClassWeights

_MEANS_BY_WEIGHT = (nn.CrossEntropyLoss, nn.NLLLoss)
"""Losses of torch whose mean divides by the weights of the labels."""


class Criterion:
    """Gives the loss of each sample, scaled such that their mean is what ``reduction="mean"`` gives for the whole batch.

    Args:
        loss: One of :mod:`ltsam_fast.losses`, a loss of torch, or any function of logits and targets that returns the losses of
            the samples, (B,). ``reduction`` does not matter: an attribute or keyword of that name is "none" for the call.
        labels: The targets of the step's parts.

    Raises:
        ValueError: ``loss`` is no function.
    """

    def __init__(self, loss: Callable[..., Any], labels: Sequence[Tensor]) -> None:
        if not callable(loss):
            raise ValueError(f"loss must be a function of logits and targets, got {loss!r}")
        self.loss, self._labels = loss, labels
        self._known = False
        self._mean_weight: Tensor | None = None

    def __call__(self, logits: Any, targets: Tensor) -> Tensor:
        """The losses, (B,), of these samples."""
        losses = self._each(logits, targets)
        weight = self.mean_weight()
        return losses if weight is None else losses / weight.to(losses, non_blocking=True)

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
