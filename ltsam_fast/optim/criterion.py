"""The loss of ``step(forward, targets, loss=...)``: applied by the step, so that neither mean nor reduction is the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltsam_fast.losses import Loss

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

    def mean_weight(self) -> Tensor | None:
        """What the mean of the samples' losses is to be divided by, 0-d: the mean of their weights; None: nothing."""
        if not self._known:
            self._known, self._mean_weight = True, self._weight_of_a_mean()
        return self._mean_weight

    def _each(self, logits: Any, targets: Tensor) -> Any:
        loss: Any = self.loss
        if isinstance(loss, Loss):
            return loss.per_sample(logits, targets)
        if isinstance(logits, Tensor):
            targets = targets.to(logits.device, non_blocking=True)
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
