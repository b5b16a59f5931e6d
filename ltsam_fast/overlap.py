"""Whether tensors of a table share memory that is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ltsam_fast.snapshot import ADDRESS, DTYPE, LAYOUT, NOT_DENSE, NUMEL, native

if TYPE_CHECKING:
    from numpy.typing import NDArray

ITEM_SIZES = np.array([4, 8, 2, 2, 1])  # of DTYPES and BITMAP


def find_overlap(
    snapshot: NDArray[np.int64], lists: tuple[Any, ...], written: tuple[bool, ...]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two tensors, each as (role, position), that share memory which one of them writes; ``None`` if there are none."""
    core = native()
    if core is not None and not core.may_overlap(snapshot, written):
        return None
    start, size, holes = _extents(snapshot, lists)
    writes = np.array(written)
    # Elements are read before they are written, so a role that is only read may be the tensor's first role itself.
    itself = (snapshot[:, 1:, [ADDRESS, DTYPE]] == snapshot[:, :1, [ADDRESS, DTYPE]]).all(axis=-1)
    size[:, 1:][itself & ~writes[1:]] = 0
    start, size = start.ravel(), size.ravel()
    order = np.argsort(start, kind="stable")
    order = order[size[order] > 0]
    reach = np.maximum.accumulate(start[order] + size[order])
    if not (start[order[1:]] < reach[:-1]).any():
        return None
    columns = len(written)
    before: list[int] = []
    for here in order.tolist():
        before = [other for other in before if start[other] + size[other] > start[here]]
        for other in before:
            if not (writes[here % columns] or writes[other % columns]):
                continue
            if not holes.flat[[here, other]].any() or _share_elements(
                *(lists[i % columns][i // columns] for i in (here, other))
            ):
                return (other % columns, other // columns), (here % columns, here // columns)
        before.append(here)
    return None


def find_meeting(
    snapshot: NDArray[np.int64], lists: tuple[Any, ...], written: tuple[bool, ...], signals: dict[str, torch.Tensor]
) -> tuple[str, tuple[int, int]] | None:
    """The name of a signal and the tensor, as (role, position), with which it shares memory that is written, or ``None``."""
    core = native()
    ranges = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in signals.values()]
    if core is not None and not core.may_meet(snapshot, written, ranges):
        return None
    start, size, holes = _extents(snapshot, lists)
    for (name, signal), (begin, end) in zip(signals.items(), ranges, strict=True):
        for index, role in np.argwhere((start < end) & (start + size > begin) & (size > 0) & written).tolist():
            if not holes[index, role] or _share_elements(lists[role][index], signal):
                return name, (role, index)
    return None


def _extents(
    snapshot: NDArray[np.int64], lists: tuple[Any, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Where the tensors begin, how many bytes they reach, and which of them have holes."""
    size = snapshot[..., NUMEL] * ITEM_SIZES[snapshot[..., DTYPE]]
    holes = snapshot[..., LAYOUT] == NOT_DENSE
    for index, role in np.argwhere(holes).tolist():
        size[index, role] = _reach(lists[role][index])
    return snapshot[..., ADDRESS], size, holes


def elements_share_memory(tensor: torch.Tensor) -> bool:
    """Whether two elements of one tensor lie at one place, as in an expanded one."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each dimension begins beyond the end of those before
    places = np.zeros(1, np.int64)
    for stride, size in dims:
        places = np.unique(places[:, None] + np.arange(size) * stride)
    return len(places) < tensor.numel()


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _share_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors meet, or one only lies in the holes of the other."""
    arrays = [
        np.asarray(
            SimpleNamespace(  # no element is looked at, so this serves device memory too
                __array_interface__={
                    "version": 3,
                    "data": (tensor.data_ptr(), True),
                    "shape": tuple(tensor.shape),
                    "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
                    "typestr": f"|V{tensor.element_size()}",
                }
            )
        )
        for tensor in (one, other)
    ]
    return bool(np.shares_memory(arrays[0], arrays[1]))
