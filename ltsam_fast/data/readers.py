"""One door to all data sets: what ``source`` is decides who reads it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from ltsam_fast.data import cifar, files
from ltsam_fast.data.decode import cached, in_memory
from ltsam_fast.data.embedded import digit_images
from ltsam_fast.data.images import DataError, Images
from ltsam_fast.data.longtail import whole

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
) -> Images:
    """Reads one split of a data set into memory, its images decoded once to uint8.

    ========== ==================================================================================================
    format     ``source``
    ========== ==================================================================================================
    digits     ``"digits"``: scikit-learn's, 8 x 8 pixels; splits train and test
    cifar10    the folder ``cifar-10-batches-py`` or the one it lies in; splits train and test
    cifar100   the folder ``cifar-100-python`` or the one it lies in; splits train and test; the fine labels
    folder     ``source/split/class/**/image``, or ``source/class/**/image`` for a split by itself
    list       a text file of lines ``path label`` as of ImageNet-LT, Places-LT and iNaturalist; or a folder with
               one for each split, whose names hold the word, as in ``ImageNet_LT_train.txt``
    ========== ==================================================================================================

    A folder or a list of one split is taken as it is for ``split="train"``; any other split must be in its name.

    Image files become RGB, 8 bits: grey and palettes are spelled out, grey of 16 bits is scaled, transparency is left out (as
    by torchvision's ``ImageFolder``), of several frames the first one counts. Unlike there, images are turned the way that
    their EXIF orientation says, with and without ``cache``. Pixels without a known largest value (32 bits, floating point,
    signed) are an error.

    Args:
        source: See above.
        split: ``"train"``, ``"test"``, ``"val"`` or the name of another folder.
        format: One of the above, or ``"auto"``: found out from ``source``.
        images: The folder that the paths of a list start from (default: the list's own).
        size: Cuts the centre out of each image, as large a square as there is, and brings it to this many pixels on each
            side. Needed where the images of a folder or list differ in size.
        cache: A folder for decoded images, made if need be: they are decoded once and from then on mapped, not read. It is
            made again when names, sizes or times of the files change, or when it is damaged.
        classes: The number of classes there must be. A list can't tell it where the last ones have no image.
        progress: Show a progress bar while images are decoded.

    Raises:
        DataError: A file is missing or not what it should be.
        ValueError: An argument is none of those accepted.
        ModuleNotFoundError: Pillow, scikit-learn or tqdm is needed and not installed.

    >>> digits = load("digits", "test")
    >>> tuple(digits.pixels.shape), digits.counts()
    ((400, 1, 8, 8), [40, 40, 40, 40, 40, 40, 40, 40, 40, 40])
    """
    if format not in (*FORMATS, "auto"):
        raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}, got {format!r}")
    if size is not None:
        whole("size", size, least=1)
    if classes is not None:
        whole("classes", classes, least=2)
    path = Path(source)
    chosen = _format(source, split) if format == "auto" else format
    if chosen in ("digits", "cifar10", "cifar100"):
        for name, value in (("size", size), ("images", images)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None for {chosen}, whose images have one size and place, got {value!r}"
                )
        result = digit_images(split) if chosen == "digits" else cifar.read(path, chosen, split)
        _check_classes(path, len(result.classes), classes)
        return result
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if chosen == "folder" and not path.is_dir():
        raise DataError(f"{path}: not a folder")
    if chosen == "folder":
        found = files.tree(path, split)
    else:
        found = files.text_list(path, split, None if images is None else Path(images), classes)
    _check_classes(path, len(found.classes), classes)
    if cache is None:
        pixels = in_memory(found, size, progress)
    else:
        key = hashlib.sha256(f"{path.resolve()}\n{split}\n{images}\n{size}".encode()).hexdigest()[:12]
        pixels = cached(found, size, progress, Path(cache), f"{path.stem}-{split}-{key}")
    return Images(pixels, torch.tensor(found.labels), found.classes)


def _format(source: str | os.PathLike[str], split: str) -> str:
    path = Path(source)
    if os.fspath(source) == "digits":
        return "digits"
    if not path.exists():
        raise DataError(f"{path}: no such file or folder, nor the word 'digits'")
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
