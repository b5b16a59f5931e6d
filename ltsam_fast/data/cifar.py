"""Reads CIFAR-10 and CIFAR-100 in Krizhevsky's Python version: pickles, without executing code in them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltsam_fast.data.images import DataError, Images

_SHAPE = (3, 32, 32)
_CODES = ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8")


@dataclass(frozen=True)
class Layout:
    """The names of files and entries of a version of CIFAR."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str
    classes: int

    def files(self) -> tuple[str, ...]:
        """Returns the names of all files."""
        return (*self.train, *self.test, self.meta)


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
        10,
    ),
    "cifar100": Layout("cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names", 100),
}


def folder_of(source: Path, layout: Layout) -> Path | None:
    """Returns the folder with the files of ``layout``: ``source``, or the archive's folder in it; else None."""
    for folder in (source, source / layout.folder):
        # Other data sets may have folders called "train" and "test" as CIFAR-100 has files: so check for files.
        if (
            folder.name == layout.folder
            and folder.is_dir()
            or any((folder / name).is_file() for name in layout.files())
        ):
            return folder
    return None


def read(source: Path, format: str, split: str) -> Images:
    """Reads one split of CIFAR.

    Raises:
        DataError: A file is missing or malformed.
    """
    layout = LAYOUTS[format]
    folder = folder_of(source, layout)
    if folder is None:
        raise DataError(f"{source}: no {layout.folder} here, nor one of its files")
    if split not in ("train", "test"):
        raise DataError(f"{folder}: no split {split!r}, only 'train' and 'test'")
    names = _names(folder / layout.meta, layout)
    batches = [_batch(folder / name, layout) for name in (layout.train if split == "train" else layout.test)]
    pixels, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), names)


def _names(path: Path, layout: Layout) -> tuple[str, ...]:
    names = _entry(_unpickled(path), layout.names, path)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{path}: {layout.names!r} must be a list of names")
    if len(names) != layout.classes:
        raise DataError(f"{path}: {layout.names!r} must name {layout.classes} classes, got {len(names)}")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _batch(path: Path, layout: Layout) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    content = _unpickled(path)
    pixels, labels = _entry(content, "data", path), _entry(content, layout.labels, path)
    size = int(np.prod(_SHAPE))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != size:
        got = f"{pixels.dtype} of shape {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{path}: 'data' must be uint8 of shape (N, {size}), got {got}")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{path}: {layout.labels!r} must be a list of {len(pixels)} classes, one for each image")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < layout.classes:
            raise DataError(f"{path}: the label of image {index} must lie in [0, {layout.classes}), got {label!r}")
    return pixels.reshape(-1, *_SHAPE), np.array(labels, dtype=np.int64)


def _entry(content: Any, key: str, path: Path) -> Any:
    found = content if isinstance(content, dict) else {}
    for name in (key.encode(), key):  # keys are bytes in pickles of Python 2
        if name in found:
            return found[name]
    raise DataError(f"{path}: no {key!r} in this pickle")


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # a broken pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a pickle of arrays, bytes, lists and numbers: {reason}") from error
    if not isinstance(content, dict):
        return content
    return {key: getattr(value, "array", value) for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    """An unpickler that can load arrays of integers but call nothing else; a pickle may name any function.

    NumPy's names resolve to the stubs below, so that NumPy gets no unchecked input. Stubs are created for each file, because a
    pickle may set attributes of them.
    """

    def __init__(self, file: Any, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._stubs = _stubs()

    def find_class(self, module: str, name: str) -> Any:
        # numpy.core is called numpy._core since NumPy 2
        found = self._stubs.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found


def _stubs() -> dict[tuple[str, str], Callable[..., Any]]:
    """Returns stubs for the names in pickled NumPy arrays, of any version of NumPy and any protocol."""

    class DType:
        def __init__(self, code: Any, *_: Any) -> None:
            self.code = code.decode() if isinstance(code, bytes) else code
            self.order: Any = "|"

        def __setstate__(self, state: Any) -> None:
            self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    class Array:
        array: np.ndarray[Any, Any]

        def __init__(self, *_: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            _, shape, dtype, fortran, content = state
            self.array = from_bytes(content, dtype, shape, "F" if fortran else "C").array

    def from_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
        if not isinstance(dtype, DType) or dtype.code not in _CODES or dtype.order not in ("|", "<", ">"):
            raise pickle.UnpicklingError("an array is not of whole numbers")
        result = Array()
        values = np.frombuffer(content, dtype.order + dtype.code).reshape(shape, order=order)
        result.array = np.array(values, dtype=dtype.code, order="C")  # a copy: writable, in this machine's byte order
        return result

    return {
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy.core.numeric", "_frombuffer"): from_bytes,
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }
