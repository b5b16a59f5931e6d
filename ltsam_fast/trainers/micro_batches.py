"""What the trainers share: the micro-batches of a step, kept until it is taken."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ltsam_fast.optim import SharpnessAware

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

    Tensors are taken where they lie in tuples, lists, mappings and dataclasses. Those without dimensions, numbers and strings
    are the same for all samples.

    Raises:
        TypeError: The batch holds something else.

    >>> select((torch.tensor([5, 6, 7]), 3), torch.tensor([2, 0]))
    (tensor([7, 5]), 3)
    """
    return batch if index is None else tree_map(lambda one: _select_one(one, index), batch)


def _select_one(one: Any, index: Tensor) -> Any:
    """As select(), for what is no tuple, list or dict."""
    if isinstance(one, Tensor):
        return one[index.to(one.device)] if one.dim() else one
    if isinstance(one, Mapping):
        made: Any = copy.copy(one) if isinstance(one, MutableMapping) else dict(one)
        for name, value in one.items():
            made[name] = select(value, index)
        return made
    if dataclasses.is_dataclass(one):
        made = copy.copy(one)
        for field in dataclasses.fields(one):
            object.__setattr__(made, field.name, select(getattr(one, field.name), index))  # it may be frozen
        return made
    if one is None or isinstance(one, (str, bytes, Number)):
        return one
    raise TypeError(
        "batch must hold tensors, in tuples, lists, mappings or dataclasses, for a method that looks at some of its samples, "
        f"got {type(one).__name__}: return one of these from the loader's collate_fn"
    )


class _Cloning(TorchFunctionMode):
    """deepcopy() clones tensors: torch's own copies all the memory that a view is part of, and refuses what has a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        tensor, memo = args
        memo[id(tensor)] = copied = tensor.clone()
        return copied


def copy_of(batch: Any) -> Any:
    """A copy of a batch with all that it holds, for a loader may use its memory again.

    Raises:
        TypeError: Something in the batch can't be copied.

    >>> x = torch.zeros(2)
    >>> kept = copy_of({"x": (x,)})
    >>> _ = x.fill_(1)
    >>> kept
    {'x': (tensor([0., 0.]),)}
    """
    try:
        with _Cloning():
            return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"batch must be copied to be kept for accumulated gradients, got {type(batch).__name__}, which can't be "
            f"({error}): give what is in it __deepcopy__(), or do not accumulate"
        ) from error


def check_per_sample(losses: Any, source: str) -> Tensor:
    """Returns the losses; raises ValueError, with their ``source``, unless their shape is (B,)."""
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{source} must return the per-sample losses, shape (B,), got {got}: use reduction='none'")
    return losses


class MicroBatches:
    """The micro-batches of one optimizer step.

    Args:
        losses: ``losses(batch)`` runs the forward pass and returns the per-sample losses, shape (B,).
        targets: ``targets(batch)`` returns the samples' classes, shape (B,), integer, or ``None`` if it knows none.
    """

    def __init__(self, losses: Callable[[Any], Tensor], targets: Callable[[Any], Tensor | None] = labels_of) -> None:
        self.losses, self.targets = losses, targets
        self._batches: list[Any] = []

    def add(self, batch: Any, last: bool) -> None:
        """Keeps a micro-batch for the step to come: the ``last`` one as it is, others as copies: loaders may overwrite them."""
        self._batches.append(batch if last else copy_of(batch))

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
