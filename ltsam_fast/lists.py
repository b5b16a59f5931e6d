"""What a step does to lists of as many objects as there are parameters: natively a few ns an object, else defined here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor

from ltsam_fast.snapshot import native

Function = TypeVar("Function", bound=Callable[..., Any])
DEFINITIONS: dict[str, Callable[..., Any]] = {}


def _natively(definition: Function) -> Function:
    """The core's function of this name, where there is a core."""
    DEFINITIONS[definition.__name__] = definition
    return getattr(native(), definition.__name__, definition)


@_natively
def has_none(items: Sequence[Any]) -> bool:
    """Whether one of them is None."""
    return NoneType in map(type, items)


@_natively
def same_items(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists have the same objects."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


@_natively
def has_views(tensors: list[Tensor | None]) -> bool:
    """Whether one of them is a view of another tensor."""
    return any(tensor is not None and tensor._base is not None for tensor in tensors)


@_natively
def gradients_of(params: list[Tensor]) -> list[Tensor | None]:
    """The gradients in place, of parameters that are not frozen."""
    return [param.grad if param.requires_grad else None for param in params]


@_natively
def clear_gradients(params: Sequence[Tensor]) -> None:
    """Clears the gradients in place."""
    for param in params:
        param.grad = None


@_natively
def values_of(of: dict[Any, Any], keys: list[Any]) -> list[Any]:
    """Values of a dict."""
    return [of[key] for key in keys]


@_natively
def entries(dicts: list[dict[str, Any]], name: str) -> list[Any]:
    """What each has under a name, or None."""
    return [one.get(name) for one in dicts]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for one in value for tensor in tensors_in(one)]
