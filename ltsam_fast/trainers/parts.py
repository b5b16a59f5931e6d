"""What the trainers share: the micro-batches of a step, kept until it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ltsam_fast.optim.base import SharpnessAware

LABELS = ("labels", "label", "targets", "target")
"""Where a batch that is a mapping has its classes."""


def labels_of(batch: Any) -> Tensor | None:
    """The classes in a batch: the second of a pair, or the first of :data:`LABELS` in a mapping; ``None`` if in neither.

    >>> labels_of({"pixel_values": torch.zeros(2, 3), "labels": torch.tensor([1, 0])})
    tensor([1, 0])
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None


def select(batch: Any, index: Tensor | None) -> Any:
    """The samples ``index``, 1-D, of every tensor in a batch; ``None``: the batch itself.

    Tensors are taken where they lie in tuples, lists and dicts. Those without dimensions are the same for all samples.

    >>> select((torch.tensor([5, 6, 7]), 3), torch.tensor([2, 0]))
    (tensor([7, 5]), 3)
    """
    if index is None:
        return batch
    return tree_map_only(Tensor, lambda one: one[index.to(one.device)] if one.dim() else one, batch)


class Parts:
    """The micro-batches of one optimizer step.

    Args:
        losses: ``losses(batch)`` runs the forward pass and returns the per-sample losses, shape (B,).
        targets: ``targets(batch)`` returns the samples' classes, shape (B,), integer, or ``None`` if it knows none.
    """

    def __init__(self, losses: Callable[[Any], Tensor], targets: Callable[[Any], Tensor | None] = labels_of) -> None:
        self.losses, self.targets = losses, targets
        self._batches: list[Any] = []

    def add(self, batch: Any) -> None:
        """Keeps a micro-batch for the step to come."""
        self._batches.append(batch)

    def begin_with_last(self) -> None:
        """Forgets all micro-batches but the last one kept."""
        self._batches = self._batches[-1:]

    def step(self, optimizer: SharpnessAware, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Takes one step over the micro-batches kept, and forgets them, whatever happens.

        Returns:
            The mean loss over their samples at the unperturbed weights, 0-d, detached.
        """
        batches, self._batches = self._batches, []
        targets = [self.targets(batch) for batch in batches]
        known = None if any(one is None for one in targets) else targets
        return optimizer.step([self._closure(batch) for batch in batches], known, scaler)  # type: ignore[arg-type]

    def _closure(self, batch: Any) -> Callable[..., Tensor]:
        return lambda index=None: self.losses(select(batch, index))


def set_clipping(optimizer: SharpnessAware, max_norm: float, setting: str) -> None:
    """Passes a trainer's gradient clipping on to the optimizer, which clips inside its update; 0: leaves it as it is.

    Raises:
        ValueError: The optimizer has a ``max_grad_norm`` of its own, and it is another one.
    """
    if not max_norm:
        return
    if optimizer.max_grad_norm not in (0, max_norm):
        raise ValueError(
            f"{setting} must be the optimizer's max_grad_norm = {optimizer.max_grad_norm!r} or 0, got {max_norm!r}"
        )
    optimizer.max_grad_norm = float(max_norm)
