"""Lists the image files of a split with their classes, from a tree of folders or a text list."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ltsam_fast.data.images import DataError

SPLITS = ("train", "val", "test")
_LINE = re.compile(r"(.*[^ \t])[ \t]+([0-9]{1,9})", re.DOTALL)
"""A path of any characters, and a label."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class FileList:
    """The image files of a split, the class of each, and the names of the classes."""

    paths: list[Path]
    labels: list[int]
    classes: tuple[str, ...]


def tree(source: Path, split: str) -> FileList:
    """Lists a tree ``[split/]class/**/image``; classes are the folders in alphabetical order.

    Raises:
        DataError: There is no such split, a class has no image, or the splits have different classes.
    """
    root = source / split
    if not root.is_dir():
        others = [name for name in SPLITS if (source / name).is_dir()]
        if others:
            raise DataError(f"{source}: no folder {split!r} here, only {', '.join(others)}")
        root = _single_split(source, split)
    classes = _class_folders(root)
    # The index of a class is that of its folder, so the training set must have the same folders.
    reference = source / "train"
    if root.parent == source and reference.is_dir() and (expected := _class_folders(reference)) != classes:
        different = sorted(set(expected) ^ set(classes))
        raise DataError(f"{root}: its classes are not those of {reference}; one of them lacks {different[0]!r}")
    found = FileList([], [], classes)
    for label, name in enumerate(classes):
        members = sorted(_images_below(root / name))
        if not members:
            raise DataError(f"{root / name}: no image in this class's folder")
        found.paths.extend(members)
        found.labels.extend([label] * len(members))
    return found


def _class_folders(root: Path) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root}: no class folders here")
    return tuple(names)


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (
            Path(parent, name)
            for name in names
            if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")
        )


def text_list(source: Path, split: str, images: Path | None, classes: int | None) -> FileList:
    """Reads a list with one ``path label`` per line; ``source`` is the list, or a folder with a list for each split.

    Without ``classes`` their number follows from the largest label, and each class must have an image.

    Raises:
        DataError: There is no list, a line is malformed, or a class has no image.
    """
    path = source
    if source.is_dir():
        found = lists(source, split)
        if len(found) != 1:
            names = ", ".join(one.name for one in found) or "none"
            raise DataError(f"{source}: needs one .txt with {split!r} in its name, found {names}")
        path = found[0]
    else:
        _single_split(source, split)
    root = path.parent if images is None else images
    result = FileList([], [], ())
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{path}, line {number}: expected 'path label', got {line[:80]!r}")
        image = root / match[1]
        if not os.path.isfile(image):  # also False for an invalid path
            raise DataError(f"{path}, line {number}: no such file: {str(image)!r}")
        label = int(match[2])
        if classes is not None and label >= classes:
            raise DataError(f"{path}, line {number}: the label must lie in [0, {classes}), got {label}")
        result.paths.append(image)
        result.labels.append(label)
    if not result.paths:
        raise DataError(f"{path}: no image in this list")
    if classes is None:
        present = sorted(set(result.labels))
        for expected, label in enumerate(present):
            if label != expected:
                raise DataError(f"{path}: no image of class {expected}, but of {present[-1]}; or give classes=")
        classes = len(present)
    return FileList(result.paths, result.labels, tuple(str(label) for label in range(classes)))


def lists(folder: Path, split: str) -> list[Path]:
    """Returns the text files of ``folder`` with the word ``split`` in their name, as in ``ImageNet_LT_train.txt``."""
    return sorted(path for path in folder.glob("*.txt") if split in _words(path))


def _lines(path: Path) -> Iterator[str]:
    r"""Yields the stripped lines; only "\n" ends a line, since names may contain other separators of str.splitlines()."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            yield line.strip(b" \t\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not a text file in UTF-8: {error}") from error


def _single_split(source: Path, split: str) -> Path:
    """Returns ``source`` if it may be that split: a test set must not be read from the training set's files."""
    if split != "train" and split not in _words(source):
        raise DataError(f"{source}: is one split, and its name doesn't say that it is {split!r}")
    return source


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", path.stem.lower())


def file_states(files: FileList) -> list[str]:
    """Returns a line with name, size and modification time of each file, for the fingerprint of a cache.

    Raises:
        DataError: A file does not exist.
    """
    result = []
    for path in files.paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a file")
        result.append(f"{path}\t{status.st_size}\t{status.st_mtime_ns}")
    return result
