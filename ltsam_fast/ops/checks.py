"""Checks of arguments: the ops' and the optimizers'. Each error names the argument, its value and the remedy."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ltsam_fast.launch_args import DTYPES, Op, accumulator
from ltsam_fast.reference.arithmetic import of_group
from ltsam_fast.snapshot import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ltsam_fast.ops.dispatch import Hyper, Tensors


def plain(value: Any) -> Any:
    """A real number, numpy's too, as one of Python's, which every checkpoint takes; NaN for what is none, truth values too."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return math.nan
    return int(value) if isinstance(value, Integral) else float(value)


def shown(value: Any) -> str:
    """A value in a message: on one line, however many it takes by itself."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def number(value: Any) -> float:
    """An option's value, which may be a tensor, as a number; live numbers stay live."""
    return value if isinstance(value, float) else float(value)


def check_factor(name: str, value: Any, below: float = math.inf) -> float:
    """The number ``value``; raises ValueError unless it is one in [0, below)."""
    found = plain(value)
    if not 0 <= found < below:
        wanted = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return found  # type: ignore[no-any-return]


def check_model(model: Any) -> None:
    """Raises TypeError unless ``model`` is a module or None, ValueError if DDP has an option that is for one pass a step."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {shown(model)}")
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


def check_params(name: str, params: Any, groups: str = "") -> None:
    """Raises TypeError for what are no parameters, nor ``groups`` of them, and has none in it; the rest is left to torch."""
    if isinstance(params, (torch.nn.Module, Mapping, str)) or not isinstance(params, (Tensor, Iterable)):
        raise TypeError(f"{name} must be parameters{groups}, such as model.parameters(), got {shown(params)}")


def check_trained(model: torch.nn.Module | None, params: list[Tensor]) -> None:
    """Raises ValueError if a network is given that has weights to train, but none of ``params``."""
    trained = {id(param) for param in (model.parameters() if model is not None else ()) if param.requires_grad}
    if trained and trained.isdisjoint(map(id, params)):
        raise ValueError(
            f"model must be the network whose parameters the optimizer has, got one with none of them, {shown(model)}: make "
            "the optimizer with its parameters(), once it is what closures evaluate"
        )


def tail_of(class_counts: Any, eta: float, tail_classes: Any) -> Tensor | None:
    """Which classes are tail, shape (C,), bool: those with fewer than ``eta`` samples, or those that are named.

    Without ``class_counts`` the last entry stands for all classes beyond the last one that is named.

    Raises:
        ValueError: ``class_counts`` or ``eta`` is negative or not finite, or a tail class does not exist.
    """
    found = plain(eta)
    if not 0 <= found < math.inf:
        raise ValueError(f"eta must be a finite number of samples >= 0, got {shown(eta)}")
    if class_counts is None and tail_classes is None:
        return None
    classes = None
    if class_counts is not None:
        counts = check_counts(class_counts).cpu()
        if tail_classes is None:
            return counts < found
        classes = len(counts)
    chosen = class_numbers("tail_classes", tail_classes)
    last = int(chosen.max()) if len(chosen) else -1
    if len(chosen) and (int(chosen.min()) < 0 or (classes is not None and last >= classes)):
        raise ValueError(
            f"tail_classes must lie in [0, {'C' if classes is None else classes}), got {shown(tail_classes)}"
        )
    return torch.zeros(last + 2 if classes is None else classes, dtype=torch.bool).index_fill(0, chosen, True)


def class_numbers(name: str, value: Any) -> Tensor:
    """The numbers of classes, 1-D, int64, on the CPU; raises ValueError for what are none, as a mask or parts of one."""
    try:
        found = torch.as_tensor(value).reshape(-1).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers of classes, got {shown(value)}") from error
    if len(found) and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex()):
        remedy = ": give torch.as_tensor(mask).nonzero()" if found.dtype == torch.bool else ""
        raise ValueError(f"{name} must be numbers of classes, got {shown(value)}{remedy}")
    return found.long()


def check_tail_classes(name: str, value: Any) -> list[int]:
    """The numbers of classes as a list; raises ValueError for what are none."""
    return class_numbers(name, value).tolist()  # type: ignore[no-any-return]


_ENDS = {
    "momentum": 1.0,
    "beta1": 1.0,
    "beta2": 1.0,
    "probability": np.nextafter(1.0, 2.0),
    "seed": 2.0**53,
    "step": 2.0**32,
}


@functools.cache
def _ranges(hyper: tuple[str, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each hyperparameter the lowest value, and the one that all must be below."""
    lowest = [-np.inf if name in ("dampening", "rho") else 0.0 for name in hyper]
    return np.array(lowest), np.array([_ENDS.get(name, np.inf) for name in hyper])


def checked_rows(op: Op, columns: list[Any]) -> NDArray[np.float64]:
    """Hyperparameters, each a number or a sequence with one per group, as rows (groups, columns)."""
    count = max((1, *(len(value) for value in columns if isinstance(value, Sequence))))
    for name, value in zip(op.hyper, columns, strict=True):
        if isinstance(value, Sequence) and len(value) != count:
            raise ValueError(f"{name} has {len(value)} values, but there are {count} groups: give one per group")
        for one in value if isinstance(value, Sequence) else (value,):
            if not isinstance(one, Real):  # a tensor's value could change and would still be found in the cache of rows
                raise TypeError(f"{name} must be a number, or a sequence with one per group, got {shown(value)}")
    rows = np.array([[v[row] if isinstance(v, Sequence) else v for v in columns] for row in range(count)], np.float64)
    low, below = _ranges(op.hyper)
    good = (rows >= low) & (rows < below) & (rows > -np.inf)
    if not good.all():
        row, column = np.argwhere(~good)[0]
        wanted = f" in [{low[column]:g}, {below[column]:g})" if below[column] < np.inf else f" >= {low[column]:g}"
        wanted = "" if low[column] == -np.inf else wanted
        raise ValueError(f"{op.hyper[column]} must be a finite number{wanted}, got {rows[row, column]}")
    return rows


def check_groups(groups: Sequence[int] | None, tensors: int, rows: int) -> None:
    """Raises ValueError unless ``groups`` names one of ``rows`` groups for each tensor."""
    if groups is None:
        if rows > 1:
            raise ValueError(f"groups must say to which of the {rows} groups each tensor belongs, got None")
    elif len(groups) != tensors:
        raise ValueError(f"groups has {len(groups)} entries, but there are {tensors} tensors: give one per tensor")
    elif len(groups) and min(groups) < 0:
        raise ValueError(f"groups must be numbers >= 0, got {min(groups)}")
    elif rows > 1 and len(groups) and max(groups) >= rows:
        raise ValueError(f"groups must lie in [0, {rows}), got {min(groups)}...{max(groups)}")


def check_offsets(offsets: Sequence[int], params: Sequence[Tensor]) -> None:
    """Raises ValueError unless each weight can begin at its offset."""
    if len(offsets) != len(params):
        raise ValueError(f"offsets has {len(offsets)} entries, but params has {len(params)}: give one per weight")
    for i, (offset, param) in enumerate(zip(offsets, params, strict=True)):
        if not isinstance(offset, int) or not 0 <= offset < 2**40:
            raise ValueError(f"offsets[{i}] must be a whole number in [0, 2^40), got {offset!r}")
        if offset % 4 and not param.is_contiguous():
            raise ValueError(f"params[{i}] must be contiguous to begin at element {offset}: make it so")


def check_momentum_buffers(buffers: Tensors | None, momentum: Hyper, groups: Sequence[int] | None) -> None:
    """Raises ValueError unless each weight with momentum has a buffer."""
    gaps = None if buffers is None else [i for i, buffer in enumerate(buffers) if buffer is None]
    if gaps == [] or not _any(momentum):
        return
    if gaps is None:
        raise ValueError(f"momentum_buffers must be given with momentum {momentum}: one tensor of zeros per weight")
    if isinstance(momentum, Sequence):
        check_groups(groups, len(buffers or ()), len(momentum))
    for i in gaps:
        value = of_group(momentum, groups, i)
        if value:
            raise ValueError(f"momentum_buffers[{i}] is None, but its momentum is {value}: give a tensor of zeros")


def _any(value: Hyper) -> bool:
    return any(value) if isinstance(value, Sequence) else bool(value)


def check_clipping(max_norm: Hyper, norm: Tensor | None) -> None:
    """Raises ValueError if gradients are to be clipped and their norm is not given."""
    if norm is None and _any(max_norm):
        raise ValueError(f"norm must be given with max_norm {max_norm}: the gradient's, from grad_norm()")


def check_counts(class_counts: Any) -> Tensor:
    """``class_counts`` as float64, shape (C,). Raises ValueError unless they are finite and >= 0, and one is >= 1."""
    try:
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "give a list in the order of the labels"
        if isinstance(class_counts, Mapping):
            remedy = "give a list in the order of the labels, [class_counts[c] for c in range(C)]"
        raise ValueError(
            f"class_counts must be numbers of samples, one per class, got {shown(class_counts)}: {remedy}"
        ) from error
    if counts.dim() != 1 or not len(counts) or not bool(((counts >= 0) & counts.isfinite()).all()) or counts.sum() == 0:
        raise ValueError(
            f"class_counts must be a list of finite numbers >= 0, one per class and not all 0, got {shown(class_counts)}"
        )
    if bool((counts < 1).all()):
        raise ValueError(
            f"class_counts must be numbers of samples, got shares of them, {shown(class_counts)}: multiply by the number of all"
        )
    return counts


def check_class_weights(name: str, value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The weights u and v of C classes; raises ValueError unless they are finite, v is >= 0, and not all are 0."""
    try:
        pair = torch.stack([torch.as_tensor(one, dtype=torch.float64, device="cpu").detach() for one in value])
        good = (
            pair.dim() == 2 and len(pair) == 2 and bool(pair.isfinite().all() and (pair[1] >= 0).all() and pair.any())
        )
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        got = " ".join(repr(value).split())  # a tensor has many lines
        raise ValueError(
            f"{name} must be a pair (u, v) of lists, a finite number per class in each, those of v >= 0, not all 0, got {got}"
        )
    u, v = pair.tolist()
    return tuple(u), tuple(v)


def check_sample_weights(weights: Any, parts: int, devices: Collection[torch.device]) -> list[Tensor]:
    """The weights u and v of each part's samples as a tensor, shape (2, B). On a GPU their values are not looked at.

    Args:
        weights: A pair of tensors, shape (B,), floating point; for a batch in parts a list of pairs.
        parts: The number of parts.
        devices: Where they may lie, besides the CPU.

    Raises:
        ValueError: They are something else, not finite, or v is negative.
    """
    pairs = [weights] if parts == 1 and _is_pair(weights) else weights
    if not isinstance(pairs, (list, tuple)) or len(pairs) != parts or not all(map(_is_pair, pairs)):
        wanted = "a pair (u, v) of tensors, shape (B,)" + (f", for each of the {parts} closures" if parts > 1 else "")
        raise ValueError(f"weights must be {wanted}, got {shown(_outline(weights))}")
    for u, v in pairs:
        for one in (u, v):
            if one.shape != u.shape or one.dim() != 1 or not len(one) or one.device != u.device:
                raise ValueError(
                    f"weights must be u and v of one shape (B,), a number per sample, on one device, got {_outline((u, v))}"
                )
            if not one.is_floating_point():
                raise ValueError(f"weights must be floating point, got {one.dtype}: give weights.float()")
            if one.requires_grad:
                raise ValueError("weights require a gradient, but none flows to them: give weights.detach()")
            if one.device.type != "cpu" and one.device not in devices:
                raise ValueError(
                    f"weights must be on the cpu or with the parameters, got {one.device}: move them there"
                )
        if u.is_cpu and not bool(u.isfinite().all() and v.isfinite().all() and (v >= 0).all()):
            raise ValueError(
                "weights must be finite, and those of the sharp loss >= 0, got u in [{:g}, {:g}] and v in [{:g}, {:g}]".format(
                    *(end.item() for one in (u, v) for end in one.aminmax())
                )
            )
    return [torch.stack([u, v]) for u, v in pairs]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(one, Tensor) for one in value)


def _outline(value: Any) -> Any:
    """What ``value`` is, without its numbers."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} on {value.device}"
    return [_outline(one) for one in value] if isinstance(value, (list, tuple)) else type(value).__name__


def check_loss_numbers(label_smoothing: Any, gamma: Any, seed: Any) -> None:
    """Raises ValueError unless these numbers make a loss."""
    for name, value, last in (("label_smoothing", label_smoothing, 1.0), ("gamma", gamma, float("inf"))):
        if not isinstance(value, (int, float)) or not 0 <= value <= last or value == float("inf"):
            wanted = "in [0, 1]" if last == 1 else ">= 0"
            raise ValueError(f"{name} must be a finite number {wanted}, got {shown(value)}")
    if gamma and label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing} and gamma {gamma}: the focal loss has no smoothed form")
    if not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ValueError(f"seed must be an integer in [0, 2^53), got {shown(seed)}")


REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: Any) -> None:
    """Raises ValueError unless this is the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {shown(reduction)}")


def class_vector(name: str, vector: Any, logits: Tensor) -> Tensor | None:
    """A vector of classes as backends take it: on the logits' device, in the dtype of sums."""
    if vector is None:
        return None
    classes = logits.shape[1]
    if not isinstance(vector, Tensor) or vector.shape != (classes,):
        got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{name} must be a tensor of shape ({classes},), one number per class, got {got}")
    if vector.requires_grad:
        raise ValueError(f"{name} requires a gradient, but none flows to it: give {name}.detach()")
    return vector.to(logits.device, accumulator(logits), non_blocking=True).contiguous()


def check_logits(logits: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and targets as contiguous int64 on their device."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] == 0:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must have shape (B, C) with C > 0, got {shape}")
    if logits.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"logits has dtype {logits.dtype}: accepted are {accepted}")
    check_labels(targets, logits.shape[0])
    if targets.dtype != torch.int64 or targets.device != logits.device:
        targets = targets.to(logits.device, torch.int64, non_blocking=True)
    return logits, targets.contiguous()


SKIP = "skip it, or give the loader drop_last=True"
"""What to do with a batch that has no samples."""


def check_labels(targets: Any, rows: int) -> None:
    """Raises ValueError unless ``targets`` are ``rows`` integers."""
    check_is_tensor(targets)
    integers = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    if not integers or targets.shape != (rows,):
        remedy = "" if integers else ": give targets.long()"
        raise ValueError(
            f"targets must be a 1-D integer tensor of {rows} labels, one per sample, got {tuple(targets.shape)}, "
            f"{targets.dtype}{remedy}"
        )


def check_is_tensor(targets: Any) -> None:
    """Raises ValueError for a list or an array of labels, and for what is none."""
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"targets must be a tensor of the samples' classes, shape (B,), integer, got {type(targets).__name__} "
            f"{shown(targets)}: give torch.as_tensor(targets)"
        )


def check_targets(targets: Tensor, classes: int) -> None:
    """Raises ValueError unless ``targets`` are labels in [0, classes). On a GPU the range is not looked at."""
    check_labels(targets, len(targets) if targets.dim() else 0)
    check_range(targets, classes)


def check_range(targets: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in [0, classes). On a GPU that would wait for the device: nobody looks."""
    if not targets.is_cpu:
        return
    core = native()
    if core is not None and targets.dtype == torch.int64 and targets.is_contiguous():
        if core.are_labels(targets.data_ptr(), targets.shape[0], classes):
            return
    if not len(targets):
        return
    low, high = map(int, targets.aminmax())
    if not 0 <= low <= high < classes:
        if low < 0:
            remedy = (
                "drop these samples, or, in methods that take weights=(u, v), give them a label in range and weight 0"
            )
        else:
            remedy = "give one class count, and one output of the model, per class"
        raise ValueError(f"targets must lie in [0, {classes}), got {low}...{high}: {remedy}")
