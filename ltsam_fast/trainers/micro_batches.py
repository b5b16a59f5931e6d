"""Stores the micro-batches of a step until it is taken; used by all trainers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ltsam_fast.optim import SharpnessAware

LABELS = ("labels", "label", "targets", "target")
"""Keys of the classes in a batch that is a mapping."""


def labels_of(batch: Any) -> Tensor | None:
    """Returns the classes in a batch: the second of a pair, or the first of :data:`LABELS` in a mapping; else ``None``.

    >>> labels_of({"pixel_values": torch.zeros(2, 3), "labels": torch.tensor([1, 0])})
    tensor([1, 0])
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None


def select(batch: Any, index: Tensor | None, sliced: Sequence[bool]) -> Any:
    """Returns the samples ``index``, 1-D, of the tensors in a batch; the batch itself for ``None``.

    Args:
        batch: The batch. Tensors may be in tuples, lists, mappings and dataclasses, beside numbers and strings.
        index: The samples' numbers.
        sliced: What :func:`sliced_in` says of each tensor, in order; the others are the same for all samples.

    Raises:
        TypeError: The batch holds something else.

    >>> batch = (torch.tensor([5, 6, 7]), torch.zeros(2))
    >>> select(batch, torch.tensor([2, 0]), sliced_in(batch, 3))
    (tensor([7, 5]), tensor([0., 0.]))
    """
    if index is None:
        return batch
    chosen = iter(sliced)
    return _map_tensors(lambda one: one[index.to(one.device)] if next(chosen) else one, batch)


def sliced_in(batch: Any, size: int) -> list[bool]:
    """Returns for each tensor in a batch whether its first dimension is the batch of this size.

    Raises:
        TypeError: The batch holds something that can't be sliced.
    """
    found: list[bool] = []

    def note(one: Tensor) -> Tensor:
        found.append(one.shape[:1] == (size,))
        return one

    _map_tensors(note, batch)
    return found


def _map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Returns the batch with what a function gives for each tensor, in order."""
    return tree_map(lambda one: _map_one(function, one), batch)


def _map_one(function: Callable[[Tensor], Any], one: Any) -> Any:
    """As _map_tensors(), for anything but tuples, lists and dicts."""
    if isinstance(one, Tensor):
        return function(one)
    if isinstance(one, Mapping):
        copied: Any = copy.copy(one) if isinstance(one, MutableMapping) else dict(one)
        for name, value in one.items():
            copied[name] = _map_tensors(function, value)
        return copied
    if dataclasses.is_dataclass(one):
        copied = copy.copy(one)
        for field in dataclasses.fields(one):
            value = _map_tensors(function, getattr(one, field.name))
            object.__setattr__(copied, field.name, value)  # it may be frozen
        return copied
    if one is None or isinstance(one, (str, bytes, Number)):
        return one
    raise TypeError(
        "batch must hold tensors, in tuples, lists, mappings or dataclasses, for a method that evaluates some of its samples, "
        f"got {type(one).__name__}: return one of these from the loader's collate_fn"
    )


class Layouts:
    """Which tensors of a trainer's batches have the samples along their first dimension: those as long as the labels.

    They are the same in every batch: a tensor that once had another length is not sliced where it happens to be as long.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[bool]] = {}  # by the number of tensors

    def of(self, batch: Any, size: int) -> list[bool] | None:
        """Returns for each tensor whether it is sliced; ``None`` if one that was sliced before has another length now.

        Raises:
            TypeError: The batch holds something that can't be sliced.
        """
        found = sliced_in(batch, size)
        if size == 1:
            return found  # whatever is as long is the same for all samples
        known = self._known.setdefault(len(found), found)
        return known if all(now for now, before in zip(found, known, strict=True) if before) else None


class _Cloning(TorchFunctionMode):
    """Makes deepcopy() clone tensors; torch's own copies the whole storage of a view and rejects tensors with a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        tensor, memo = args
        memo[id(tensor)] = copied = tensor.clone()
        return copied


def copy_of(batch: Any) -> Any:
    """Returns a deep copy of a batch, since a loader may reuse its memory.

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
            f"batch must be copied for gradient accumulation, got {type(batch).__name__}, which can't be ({error}): define "
            "__deepcopy__() for its content, or do not accumulate"
        ) from error


def check_per_sample(losses: Any, source: str) -> Tensor:
    """Returns the losses; raises ValueError, which names ``source``, unless their shape is (B,)."""
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{source} must return the per-sample losses, shape (B,), got {got}: use reduction='none'")
    return losses


class MicroBatches:
    """The micro-batches of one optimizer step.

    Args:
        losses: ``losses(batch)`` runs the forward pass and returns the per-sample losses, shape (B,).
        targets: ``targets(batch)`` returns the samples' classes, shape (B,), integer, or ``None``.
        layouts: What is known from the batches of earlier steps.

    Attributes:
        in_parts: Whether a step has evaluated some samples by themselves at the unperturbed weights.
    """

    def __init__(
        self,
        losses: Callable[[Any], Tensor],
        targets: Callable[[Any], Tensor | None] = labels_of,
        layouts: Layouts | None = None,
    ) -> None:
        self.losses, self.targets, self.layouts = losses, targets, layouts or Layouts()
        self.in_parts = False
        self._batches: list[Any] = []

    def add(self, batch: Any, last: bool) -> None:
        """Stores a micro-batch for the next step; copies it unless it is the ``last``, since loaders may overwrite it."""
        self._batches.append(batch if last else copy_of(batch))

    def step(self, optimizer: SharpnessAware, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Takes one step over the stored micro-batches and removes them, after an error too.

        Returns:
            The mean loss over their samples at the unperturbed weights, 0-d, detached.
        """
        batches, self._batches = self._batches, []
        targets = [self.targets(batch) for batch in batches]
        known = None if any(one is None for one in targets) else targets
        closures = [self._closure(optimizer, *pair) for pair in zip(batches, targets, strict=True)]
        return optimizer.step(closures, known, scaler)  # type: ignore[arg-type]

    def _closure(self, optimizer: SharpnessAware, batch: Any, targets: Tensor | None) -> Callable[..., Tensor]:
        """The losses of a micro-batch, or of some samples; every method may ask for these if the batch can be sliced."""
        size = len(targets) if isinstance(targets, Tensor) and targets.dim() else None
        try:
            sliced = None if size is None else self.layouts.of(batch, size)
        except TypeError:
            sliced = None

        def losses_of(index: Tensor | None = None) -> Tensor:
            self.in_parts |= index is not None and not optimizer.is_perturbed
            return self.losses(select(batch, index, sliced))  # type: ignore[arg-type]

        def if_needed(
            samples: Tensor | None = None,
        ) -> Tensor:  # not by the name of an index: only methods that need one ask
            nonlocal size
            if samples is not None:
                assert size is not None  # all samples have been evaluated
                return self.losses(select(batch, samples, sliced_in(batch, size)))
            losses = self.losses(batch)
            size = len(losses)
            return losses

        return if_needed if sliced is None else losses_of


def set_clipping(optimizer: SharpnessAware, max_norm: float, setting: str) -> None:
    """Sets the optimizer's ``max_grad_norm`` to a trainer's gradient clipping; 0: no change.

    Raises:
        ValueError: The optimizer has another ``max_grad_norm`` > 0.
    """
    if not max_norm:
        return
    if optimizer.max_grad_norm not in (0, max_norm):
        raise ValueError(
            f"{setting} must be the optimizer's max_grad_norm = {optimizer.max_grad_norm!r} or 0, got {max_norm!r}"
        )
    optimizer.max_grad_norm = float(max_norm)
