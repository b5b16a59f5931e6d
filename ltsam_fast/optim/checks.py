"""Checks of the methods' own arguments."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ltsam_fast import ops


def plain(value: Any) -> Any:
    """A real number, numpy's too, as one of Python's, which every checkpoint takes; NaN for what is none, truth values too."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return math.nan
    return int(value) if isinstance(value, Integral) else float(value)


def number(value: Any) -> float:
    """An option's value, which may be a tensor, as a number."""
    return value if isinstance(value, float) else float(value)


def check_factor(name: str, value: Any, below: float = math.inf) -> float:
    """The number ``value``; raises ValueError unless it is one in [0, below)."""
    found = plain(value)
    if not 0 <= found < below:
        wanted = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return found  # type: ignore[no-any-return]


def check_model(model: Any) -> None:
    """Raises TypeError unless ``model`` is a module or None, ValueError if DDP has an option that is for one pass a step."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {model!r}")
    ddp = getattr(model, "_orig_mod", model)  # torch.compile's module holds it there
    if not isinstance(ddp, DistributedDataParallel):
        return
    for option, given, instead in (
        ("static_graph", ddp.static_graph, "find_unused_parameters=True"),
        ("mixed_precision", ddp.mixed_precision, "torch.autocast in the closure"),
        ("delay_all_reduce_named_params", bool(ddp._delay_all_reduce_params), "DDP's buckets"),
    ):
        if given:
            raise ValueError(
                f"model must not be DistributedDataParallel with {option}={given}, which is for one pass a step: "
                f"leave it out, and use {instead}"
            )


def check_share(name: str, value: Any) -> float:
    """The number ``value``; raises ValueError unless it is one in (0, 1]."""
    found = plain(value)
    if not 0 < found <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    return found  # type: ignore[no-any-return]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """The integer ``value``; raises ValueError unless it is one >= ``least``."""
    found = plain(value)
    if not isinstance(found, int) or found < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return found


def check_seed(seed: Any) -> int:
    """The integer ``seed``; raises ValueError unless it is one that the generators take."""
    found = plain(seed)
    if not isinstance(found, int) or not 0 <= found < 2**53:
        raise ValueError(f"seed must be an integer in [0, 2^53), got {seed!r}")
    return found


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def tail_of(class_counts: Any, eta: float, tail_classes: Any) -> Tensor | None:
    """Which classes are tail, shape (C,), bool: those with fewer than ``eta`` samples, or those that are named.

    Without ``class_counts`` the last entry stands for all classes beyond the last one that is named.

    Raises:
        ValueError: ``class_counts`` or ``eta`` is negative or not finite, or a tail class does not exist.
    """
    found = plain(eta)
    if not 0 <= found < math.inf:
        raise ValueError(f"eta must be a finite number of samples >= 0, got {eta!r}")
    if class_counts is None and tail_classes is None:
        return None
    classes = None
    if class_counts is not None:
        ops.focal_weights(class_counts)  # checks the counts
        counts = torch.as_tensor(class_counts, dtype=torch.float64).cpu()
        if tail_classes is None:
            return counts < found
        classes = len(counts)
    chosen = torch.as_tensor(tail_classes, dtype=torch.long).reshape(-1).cpu()
    last = int(chosen.max()) if len(chosen) else -1
    if len(chosen) and (int(chosen.min()) < 0 or (classes is not None and last >= classes)):
        raise ValueError(f"tail_classes must lie in [0, {'C' if classes is None else classes}), got {tail_classes!r}")
    return torch.zeros(last + 2 if classes is None else classes, dtype=torch.bool).index_fill(0, chosen, True)


def check_shared_backward(value: Any) -> bool | str:
    """The value; raises ValueError unless it is True, False or "auto"."""
    if not (isinstance(value, bool) or value == "auto"):
        raise ValueError(f'shared_backward must be True, False or "auto", got {value!r}')
    return value


def check_tail_classes(name: str, value: Any) -> list[int]:
    """The numbers of classes as a list; raises ValueError for what are none."""
    try:
        return torch.as_tensor(value, dtype=torch.long).reshape(-1).tolist()  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers of classes, got {value!r}") from error
