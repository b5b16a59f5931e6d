"""Reads address, size, dtype, device and layout of many tensors: in native code about 20 ns a tensor, in Python 300."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ltsam_fast.launch_args import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITMAP = len(DTYPES)  # the code of uint8, which serves as a map of bits

ADDRESS, NUMEL, DTYPE, DEVICE, SHAPE, LAYOUT = range(6)
COLUMNS = 6
ABSENT = -1  # "device" of a role that a tensor does not have
NEVER_READ = -2
CONTIGUOUS, NOT_DENSE = 0, 1  # layouts; anything else is a hash of strides that leave no holes
# Not dense is also what begins at an address that is no multiple of its elements' size: neither can be taken as it is.
DEVICE_TYPES = {1: "cpu", 2: "cuda"}  # DLPack's numbers

SAME, MOVED, CHANGED, REFRESHED = range(4)

Reader = Callable[[tuple[Any, ...], "NDArray[np.int64]", tuple[bool, ...], "NDArray[np.int64] | None"], int]
_READER: Reader | None = None


class ReadOnce(list[Any]):
    """A list of tensors, or None, that is not changed and of which tables read once: for callers that let nobody move them."""

    __slots__ = ("rows",)

    def __init__(self, tensors: Iterable[torch.Tensor | None]) -> None:
        super().__init__(tensors)
        self.rows: NDArray[np.int64] | None = None
        """What was read, (T, COLUMNS)."""


@functools.cache
def native() -> Any:
    """The C++ core, or ``None``."""
    try:
        return importlib.import_module("ltsam_fast._cpu")
    except ImportError:
        return None


def reader() -> Reader:
    """What fills a snapshot: native code where torch publishes DLPack's exchange table, else Python."""
    global _READER
    if _READER is None:
        _READER = read_in_python
        api, core = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), native()
        if api is not None and core is not None and core.can_snapshot(api):
            _READER = functools.partial(core.snapshot, api)
    return _READER


def read_in_python(
    lists: tuple[Any, ...], out: NDArray[np.int64], written: tuple[bool, ...] = (), pointers: Any = None
) -> int:
    """Fills ``out`` (T, R, COLUMNS) and says what differs from what was there: SAME, MOVED or CHANGED."""
    fresh = np.zeros_like(out)
    fresh[..., DEVICE] = ABSENT
    for role, tensors in enumerate(lists):
        once = isinstance(tensors, ReadOnce)
        if once and tensors.rows is not None:
            fresh[:, role] = tensors.rows
            continue
        for index, tensor in enumerate(tensors or ()):
            if tensor is not None:
                fresh[index, role] = _describe(tensor)
        if once:
            tensors.rows = fresh[:, role].copy()
    differs = fresh != out
    out[...] = fresh
    return CHANGED if differs[..., NUMEL:].any() else MOVED if differs.any() else SAME


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether ops take such tensors at all."""
    return tensor.dtype in DTYPES and tensor.layout == torch.strided and tensor.device.type in DEVICE_TYPES.values()


def _code(dtype: torch.dtype) -> int:
    return BITMAP if dtype == torch.uint8 else DTYPES.index(dtype) if dtype in DTYPES else -1


def _describe(tensor: torch.Tensor) -> tuple[int, ...]:
    kind = {name: number for number, name in DEVICE_TYPES.items()}[tensor.device.type]
    layout = CONTIGUOUS
    if not tensor.is_contiguous():
        reach = 1
        dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
        for stride, size in sorted(dims):
            reach = reach * size if stride == reach else 0
        layout = hash(tuple(dims)) | 2 if reach == tensor.numel() else NOT_DENSE
    if tensor.data_ptr() % tensor.element_size():
        layout = NOT_DENSE
    return (
        tensor.data_ptr(),
        tensor.numel(),
        _code(tensor.dtype),
        kind << 16 | (tensor.device.index or 0),
        hash(tuple(tensor.shape)),
        layout,
    )


def device_of(code: int) -> torch.device:
    """The device that a snapshot names."""
    kind = DEVICE_TYPES[code >> 16]
    return torch.device(kind) if kind == "cpu" else torch.device(kind, code & 0xFFFF)
