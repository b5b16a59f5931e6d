"""Reads any supported data set with :func:`load`."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ltsam_fast.data import cifar, files
from ltsam_fast.data.decode import cached, in_memory
from ltsam_fast.data.embedded import digit_images
from ltsam_fast.data.images import DataError, Images, Listing
from ltsam_fast.data.longtail import check_integer

_LOG = logging.getLogger("ltsam_fast")
FORMATS = ("digits", "cifar10", "cifar100", "folder", "list")


def load(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    format: str = "auto",
    images: str | os.PathLike[str] | None = None,
    size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    classes: int | None = None,
    progress: bool = False,
    skip_broken: bool = False,
) -> Images:
    """Reads one split of a data set into memory, with images decoded to uint8.

    ========== ==================================================================================================
    format     ``source``
    ========== ==================================================================================================
    digits     ``"digits"``: scikit-learn's, 8 x 8 pixels; splits train and test
    cifar10    the folder ``cifar-10-batches-py`` or its parent; splits train and test
    cifar100   the folder ``cifar-100-python`` or its parent; splits train and test; the fine labels
    folder     ``source/split/class/**/image``, or ``source/class/**/image`` for a single split
    list       a text file of lines ``path label`` as of ImageNet-LT, Places-LT and iNaturalist; or a folder with
               one for each split, with the split in its name, as in ``ImageNet_LT_train.txt``
    ========== ==================================================================================================

    A folder or a list of a single split is read for ``split="train"``; any other split must be in its name.

    Image files become RGB with 8 bits: grey and palettes are converted, 16-bit grey is scaled, transparency is dropped (as by
    torchvision's ``ImageFolder``), and only the first of several frames is read. Unlike there, images are rotated by their EXIF
    orientation. Pixels without a known largest value (32 bits, floating point, signed) are an error.

    Args:
        source: See above.
        split: ``"train"``, ``"test"``, ``"val"`` or the name of another folder.
        format: One of the above, or ``"auto"``: detected from ``source``.
        images: The folder that the paths in a list are relative to (default: the list's own).
        size: Height and width in pixels to which the centre square of each image is resized. Needed if the images of a folder
            or list differ in size.
        cache: A folder for decoded images, created if missing: they are decoded once and memory-mapped afterwards. It is
            rebuilt if names, sizes or times of the files change, or if it is damaged.
        classes: The number of classes, to be checked. Needed for a list in which the last classes have no image.
        progress: Show a progress bar while images are decoded.
        skip_broken: Leave image files out that can't be read: they are listed in ``left_out``, and a warning is logged.

    Raises:
        DataError: A file is missing or malformed, or no image of a class can be read.
        ValueError: An argument is not accepted.
        ModuleNotFoundError: Pillow, scikit-learn or rich is needed and not installed.

    >>> digits = load("digits", "test")
    >>> tuple(digits.pixels.shape), digits.counts()
    ((400, 1, 8, 8), [40, 40, 40, 40, 40, 40, 40, 40, 40, 40])
    """
    options = {"format": format, "images": images, "size": size, "cache": cache, "classes": classes}
    return listing(source, split, **options, progress=progress, skip_broken=skip_broken).read()  # type: ignore[arg-type]


def listing(
    source: str | os.PathLike[str],
    split: str,
    *,
    format: str,
    images: str | os.PathLike[str] | None,
    size: int | None,
    cache: str | os.PathLike[str] | None,
    classes: int | None,
    progress: bool,
    skip_broken: bool,
) -> Listing:
    """Returns what :func:`load` reads before it is decoded; with a cache, all images of the split are decoded into it.

    Raises:
        DataError: As :func:`load`.
        ValueError: As :func:`load`.
        ModuleNotFoundError: As :func:`load`.
    """
    if format not in (*FORMATS, "auto"):
        raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}, got {format!r}")
    if size is not None:
        check_integer("size", size, low=1)
    if classes is not None:
        check_integer("classes", classes, low=2)
    path = Path(source)
    kind = _format(source, split) if format == "auto" else format
    if kind in ("digits", "cifar10", "cifar100"):
        for name, value in (("size", size), ("images", images)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None for {kind}, whose images have a fixed size and path, got {value!r}"
                )
        result = digit_images(split) if kind == "digits" else cifar.read(path, kind, split)
        _check_classes(path, len(result.classes), classes)
        return Listing(result.labels, result.classes, lambda chosen: result if chosen is None else result.take(chosen))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if kind == "folder" and not path.is_dir():
        raise DataError(f"{path}: not a folder")
    if kind == "folder":
        found = files.tree(path, split)
    else:
        found = files.text_list(path, split, None if images is None else Path(images), classes)
    _check_classes(path, len(found.classes), classes)
    labels = torch.tensor(found.labels)

    def decode(chosen: Tensor | None) -> Images:
        indices = torch.arange(len(labels)) if chosen is None else chosen
        if cache is None:
            pixels, broken = in_memory(found, indices.tolist(), size, progress, skip_broken)
        else:
            key = hashlib.sha256(f"{path.resolve()}\n{split}\n{images}\n{size}".encode()).hexdigest()[:12]
            pixels, broken = cached(found, size, progress, skip_broken, Path(cache), f"{path.stem}-{split}-{key}")
        absent = torch.tensor(sorted(broken), dtype=torch.int64)
        good = ~torch.isin(indices, absent)
        kept, left_out = indices[good], tuple(broken[index] for index in indices[~good].tolist())
        if cache is not None and chosen is not None:
            pixels = pixels[kept - torch.searchsorted(absent, kept)]
        if left_out:
            _LOG.warning(
                "images of %s that can't be read are left out: %d, the first is %s", path, len(left_out), left_out[0]
            )
        for label in sorted(set(labels[indices].tolist()) - set(labels[kept].tolist())):
            raise DataError(f"{path}: no image of class {found.classes[label]!r} can be read")
        return Images(pixels, labels[kept], found.classes, left_out)

    return Listing(labels, found.classes, decode)


def _format(source: str | os.PathLike[str], split: str) -> str:
    path = Path(source)
    if os.fspath(source) == "digits":
        return "digits"
    if not path.exists():
        raise DataError(f"{path}: no such file or folder, and not the word 'digits'")
    if path.is_file():
        return "list"
    versions = [name for name, layout in cifar.LAYOUTS.items() if cifar.folder_of(path, layout)]
    if len(versions) > 1:
        raise DataError(f"{path}: has both CIFAR-10 and CIFAR-100; give format= {versions[0]!r} or {versions[1]!r}")
    if versions:
        return versions[0]
    tree = any((path / name).is_dir() for name in (*files.SPLITS, split))
    return "list" if not tree and files.lists(path, split) else "folder"


def _check_classes(path: Path, found: int, wanted: int | None) -> None:
    if found < 2:
        raise DataError(f"{path}: has {found} class, at least 2 are needed")
    if wanted is not None and found != wanted:
        raise DataError(f"{path}: has {found} classes, not {wanted}")
