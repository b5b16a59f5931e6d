"""Decodes images once, in parallel, into memory or into a memory-mapped file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltsam_fast.data.files import FileList, file_states
from ltsam_fast.data.images import DataError
from ltsam_fast.extras import needed, progress_bar

_BLOCK = 1024
"""Images per block; at most one block of decoded images waits in memory."""
_CHECKED_BYTES = 1 << 30
"""Bytes of a cache that are compared with checksums: evenly spaced images of larger caches."""
_PATIENCE = 1800.0
"""Seconds for which a cache is waited for while the process that has it decodes nothing: torch.distributed's timeout."""
_VERSION = 3
"""Version of the cache; increase it with every change of the pixels or of the files."""
_16_BITS = ("PNG", "PPM", "TIFF", "JPEG2000")
"""Formats with a known largest value of 16-bit grey."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Numbers of TIFF tags."""

Pixels = np.ndarray[Any, Any]


Broken = dict[int, str]
"""The reason why an image can't be read, with its path, by the image's index."""


def in_memory(
    files: FileList, indices: Sequence[int], size: int | None, progress: bool, skip_broken: bool
) -> tuple[Tensor, Broken]:
    """Returns the decoded images at ``indices``, uint8, shape (N, 3, height, width), without those that can't be read."""
    result: Tensor | None = None
    broken: Broken = {}
    count = 0
    for image in _decoded(files.paths, indices, size, progress, broken if skip_broken else None):
        if result is None:
            result = torch.empty((len(indices), *image.shape), dtype=torch.uint8)
        result[count] = torch.from_numpy(image)
        count += 1
    if result is None:
        raise DataError(next(iter(broken.values()), "no image is asked for"))
    return (result[:count].clone() if broken else result), broken


def cached(
    files: FileList, size: int | None, progress: bool, skip_broken: bool, cache: Path, name: str
) -> tuple[Tensor, Broken]:
    """Returns the images mapped from ``cache/name``, which is rebuilt if it is missing, damaged or out of date.

    It lacks images that can't be read. The folder is written under a temporary name and renamed at the end; a lock admits one
    process at a time.
    """
    fingerprint = hashlib.sha256(
        "\n".join([f"{_VERSION} {size}", *file_states(files)]).encode("utf-8", "surrogateescape")
    ).hexdigest()
    folder = cache / name
    with _lock(folder):
        found = _mapped(folder, fingerprint)
        if found is None:
            broken: Broken = {}
            indices = range(len(files.paths))
            images = _decoded(files.paths, indices, size, progress, broken if skip_broken else None)
            _build(folder, fingerprint, images, broken)
            found = _mapped(folder, fingerprint)
    if found is None:
        raise DataError(f"{folder}: the cache differs from what has just been written to it; is the disk sound?")
    if found[1] and not skip_broken:
        raise _unreadable(next(iter(found[1].values())))
    return found


def _lock(folder: Path) -> Any:
    """A context in which no other process writes the cache; raises DataError if one that does so stands still."""
    filelock = needed("filelock", "filelock")
    path, pixels = folder.with_name(f"{folder.name}.lock"), _partial(folder) / "pixels"

    def size() -> int:
        with contextlib.suppress(FileNotFoundError):
            return pixels.stat().st_size
        return 0

    folder.parent.mkdir(parents=True, exist_ok=True)
    before = size()
    while True:
        try:
            return filelock.FileLock(path).acquire(timeout=_PATIENCE)
        except filelock.Timeout:
            now = size()
            if now == before:
                raise DataError(
                    f"{path}: the process that has it has decoded nothing for {_PATIENCE:g} s: end it, then repeat the command"
                ) from None
            before = now


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _unreadable(reason: str) -> DataError:
    return DataError(f"{reason}; skip_broken leaves such images out")


def _build(folder: Path, fingerprint: str, images: Iterator[Pixels], broken: Broken) -> None:
    partial = _partial(folder)
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    shape: tuple[int, ...] = ()
    checksums = []
    with (partial / "pixels").open("wb") as file:
        for image in images:
            file.write(image.data)
            checksums.append(zlib.crc32(image.data))
            shape = image.shape
        file.flush()
        os.fsync(file.fileno())
    if not checksums:
        raise DataError(next(iter(broken.values())))
    about = {"fingerprint": fingerprint, "shape": [len(checksums), *shape], "crc32": checksums, "broken": broken}
    (partial / "about.json").write_text(json.dumps(about))
    partial.rename(folder)


def _mapped(folder: Path, fingerprint: str) -> tuple[Tensor, Broken] | None:
    """Returns the images in ``folder``, and those it lacks; or None if they are others, too few or damaged."""
    try:
        about = json.loads((folder / "about.json").read_text())
        length = (folder / "pixels").stat().st_size
    except (OSError, ValueError):  # no cache, or a damaged one: rebuild it
        return None
    if not isinstance(about, dict) or about.get("fingerprint") != fingerprint:
        return None
    shape, checksums = about["shape"], about["crc32"]
    if length != int(np.prod(shape)):
        return None
    # A private mapping: writes to the images never change the file.
    pixels = torch.from_file(str(folder / "pixels"), shared=False, size=length, dtype=torch.uint8).reshape(shape)
    step = -(-length // _CHECKED_BYTES)
    intact = all(zlib.crc32(pixels[i].numpy().data) == checksums[i] for i in range(0, len(pixels), step))
    return (pixels, {int(index): reason for index, reason in about["broken"].items()}) if intact else None


def _decoded(
    paths: Sequence[Path], indices: Sequence[int], size: int | None, progress: bool, broken: Broken | None
) -> Iterator[Pixels]:
    """Yields the images at ``indices`` in order: uint8, shape (3, height, width), all of one size.

    Those that can't be read are entered in ``broken`` and left out; without it the first one is an error.
    """
    image_module = needed("PIL.Image", "pillow")
    first: tuple[Path, Pixels] | None = None

    def decoded(index: int) -> Pixels | DataError:
        try:
            return _decode(image_module, paths[index], size)
        except DataError as error:
            return error

    with progress_bar(progress, len(indices), "decoding") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(indices), _BLOCK):
            block = indices[begin : begin + _BLOCK]
            for index, image in zip(block, pool.map(decoded, block), strict=True):
                advance()
                if isinstance(image, DataError):
                    if broken is None:
                        raise _unreadable(str(image))
                    broken[index] = str(image)
                    continue
                first = first or (paths[index], image)
                if image.shape != first[1].shape:
                    raise DataError(
                        f"{paths[index]}: {_extent(image)} pixels where {first[0]} has {_extent(first[1])}; "
                        f"give size= to resize all images"
                    )
                yield image


def _decode(image_module: Any, path: Path, size: int | None) -> Pixels:
    try:
        # Pillow maps some TIFFs into memory if it opens the file itself, and then rotates them wrongly.
        with path.open("rb") as file, image_module.open(file) as image:
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))  # JPEGs may be decoded at a half, a quarter, ... of their size
            image.load()
            with contextlib.suppress(Exception):  # ignore a broken EXIF block
                needed("PIL.ImageOps", "pillow").exif_transpose(image, in_place=True)
            picture = _with_8_bits(image_module, image, path).convert("RGB")
            if size is not None:
                picture = _resized(picture, size, image_module.Resampling.BILINEAR)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # each format's decoder raises other errors
        raise DataError(f"{path}: not a readable image: {' '.join(str(error).split())}") from error
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _with_8_bits(image_module: Any, image: Any, path: Path) -> Any:
    """Returns the image with 16-bit grey scaled to 8 bits; Pillow's convert() would clip it at 255."""
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    is_16_bit = mode.startswith("I;16") or (
        mode == "I" and image.format in ("PNG", "PPM")
    )  # Pillow's modes of 16-bit grey
    if (
        (is_16_bit and image.format not in _16_BITS)
        or (mode in ("I", "F") and not is_16_bit)
        or set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}  # signed
    ):
        raise DataError(
            f"{path}: no scale to 8 bits is known for its pixels (mode {mode!r}): save it as grey of 8 or 16 bits, or as RGB"
        )
    if not is_16_bit:
        return image.convert("LA") if mode == "La" else image  # the only way from La to RGB
    top = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(image).astype(np.int64)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        values = top - values
    return image_module.fromarray(((255 * values + top // 2) // top).astype(np.uint8))


def _resized(picture: Any, size: int, resampling: Any) -> Any:
    """Returns the picture's centre square, resized to size x size."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), resampling, box=(left, top, left + side, top + side))


def _extent(image: Pixels) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"
