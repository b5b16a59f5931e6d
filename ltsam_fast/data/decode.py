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
_VERSION = 2
"""Version of the decoding; increase it with every change of the pixels."""
_16_BITS = ("PNG", "PPM", "TIFF", "JPEG2000")
"""Formats with a known largest value of 16-bit grey."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Numbers of TIFF tags."""

Pixels = np.ndarray[Any, Any]


def in_memory(files: FileList, size: int | None, progress: bool) -> Tensor:
    """Returns the decoded images, uint8, shape (N, 3, height, width)."""
    result: Tensor | None = None
    for index, image in enumerate(_decoded(files.paths, size, progress)):
        if result is None:
            result = torch.empty((len(files.paths), *image.shape), dtype=torch.uint8)
        result[index] = torch.from_numpy(image)
    assert result is not None  # a list is never empty
    return result


def cached(files: FileList, size: int | None, progress: bool, cache: Path, name: str) -> Tensor:
    """Returns the decoded images mapped from ``cache/name``, which is rebuilt if it is missing, damaged or out of date.

    The folder is written under a temporary name and renamed at the end; a lock admits one process at a time.
    """
    filelock = needed("filelock", "filelock")
    cache.mkdir(parents=True, exist_ok=True)
    fingerprint = hashlib.sha256(
        "\n".join([f"{_VERSION} {size}", *file_states(files)]).encode("utf-8", "surrogateescape")
    ).hexdigest()
    folder = cache / name
    with filelock.FileLock(cache / f"{name}.lock"):
        pixels = _mapped(folder, fingerprint)
        if pixels is None:
            _build(folder, fingerprint, _decoded(files.paths, size, progress))
            pixels = _mapped(folder, fingerprint)
    if pixels is None:
        raise DataError(f"{folder}: the cache differs from what has just been written to it; is the disk sound?")
    return pixels


def _build(folder: Path, fingerprint: str, images: Iterator[Pixels]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
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
    about = {"fingerprint": fingerprint, "shape": [len(checksums), *shape], "crc32": checksums}
    (partial / "about.json").write_text(json.dumps(about))
    partial.rename(folder)


def _mapped(folder: Path, fingerprint: str) -> Tensor | None:
    """Returns the images in ``folder``, or None if they are others, too few or damaged."""
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
    return pixels if intact else None


def _decoded(paths: Sequence[Path], size: int | None, progress: bool) -> Iterator[Pixels]:
    """Yields the images in order: uint8, shape (3, height, width), all of one size."""
    image_module = needed("PIL.Image", "pillow")
    first: Pixels | None = None
    with progress_bar(progress, len(paths), "decoding", "image") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(paths), _BLOCK):
            block = paths[begin : begin + _BLOCK]
            for path, image in zip(block, pool.map(lambda path: _decode(image_module, path, size), block), strict=True):
                first = image if first is None else first
                if image.shape != first.shape:
                    raise DataError(
                        f"{path}: {_extent(image)} pixels where {paths[0]} has {_extent(first)}; "
                        f"give size= to resize all images"
                    )
                yield image
                bar.update()


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
