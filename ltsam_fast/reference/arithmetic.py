"""What the definitions share: precision, absent tensors, hyperparameters of groups, and how results are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the precision of the arithmetic."""
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()


def entry(tensors: Tensors | None, index: int) -> Tensor | None:
    """One of a list's tensors, which may be absent."""
    return None if tensors is None else tensors[index]


def of_group(value: Any, groups: Sequence[int] | None, index: int) -> Any:
    """The hyperparameter of a tensor: one value for all, or one for each group."""
    if not isinstance(value, Sequence):
        return value
    return value[groups[index] if groups and len(value) > 1 else 0]


def gradient(like: Tensor, *gradients: Tensor | None) -> Tensor:
    """The sum of the gradients that are there."""
    total = torch.zeros_like(wide(like))
    for one in gradients:
        if one is not None:
            total = total + wide(one)
    return total


def combined(
    like: Tensor, g: Tensor | None, other: Tensor | None, combination: Tensor | None, first: int = 0
) -> Tensor:
    """c[first] g + c[first + 1] other; without a combination the sum."""
    if combination is None:
        return gradient(like, g, other)
    c = combination.to(like.device, wide(like).dtype)
    zeros = torch.zeros_like(wide(like))
    parts = [zeros if one is None else wide(one) for one in (g, other)]
    return c[first] * parts[0] + c[first + 1] * parts[1]


def number(signal: Tensor, like: Tensor) -> Tensor:
    """A tensor of one element as a number where ``like`` is, in its precision."""
    return signal.detach().reshape(()).to(like.device, wide(like).dtype)


def skip(found_inf: Tensor | None) -> bool:
    """Whether the update is to be skipped."""
    return found_inf is not None and bool(found_inf != 0)


def write(*results: tuple[Tensor | None, Tensor | None]) -> None:
    """Fills tensors with results, in one call of torch: an interrupt finds all of them written or none."""
    present = [(to, result) for to, result in results if to is not None and result is not None]
    if present:
        torch._foreach_copy_([to for to, _ in present], [result for _, result in present])
