"""The result of every reader, the images of one split in memory; and the error for data that can't be read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HASHED_BYTES = 1 << 30


class DataError(ValueError):
    """Data that can't be read; the message is one line with the file and the reason."""


def class_sizes(counts: list[int]) -> str:
    """Returns how many classes there are, and their smallest and largest number of images, in words."""
    return f"{len(counts)} classes of {min(counts, default=0)} to {max(counts, default=0)}"


@dataclass(frozen=True, repr=False)
class Images:
    """The decoded images of one split.

    Attributes:
        pixels: uint8, shape (N, channels, height, width); perhaps mapped from a file.
        labels: The class of each image, int64, shape (N,).
        classes: The name of each class.
        left_out: A line for each image that could not be read, with its path and the reason.

    Raises:
        TypeError: ``pixels`` is not uint8, or ``labels`` is not int64.
        ValueError: The shapes don't fit, or a label names no class.

    >>> images = Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("cat", "dog"))
    >>> images
    Images(3 images of 1 x 8 x 8, 2 classes of 1 to 2)
    >>> images.counts()
    [2, 1]
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype, dims in (("pixels", torch.uint8, 4), ("labels", torch.int64, 1)):
            tensor = getattr(self, name)
            if tensor.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor.ndim != dims:
                raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
        if len(self.pixels) != len(self.labels):
            raise ValueError(f"labels must be one for each of {len(self.pixels)} images, got {len(self.labels)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise ValueError(f"labels must lie in [0, {len(self.classes)}), one for each class, got {low}..{high}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.pixels.shape[1:]))
        return f"Images({len(self)} images of {shape}, {class_sizes(self.counts())})"

    def take(self, indices: Tensor) -> Images:
        """Returns a copy of the images at ``indices``, a LongTensor, in their order."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def counts(self) -> list[int]:
        """Returns the number of images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and class names; above 1 GiB of pixels only the middle rows of every image."""
        height, size = self.pixels.shape[2], self.pixels.nbytes
        rows = height if size <= _HASHED_BYTES else max(1, height * _HASHED_BYTES // size)
        middle = self.pixels[:, :, (height - rows) // 2 :][:, :, :rows]
        found = hashlib.sha256(repr((tuple(self.pixels.shape), self.labels.tolist(), self.classes)).encode())
        for block in middle.split(1024):
            found.update(block.cpu().contiguous().numpy())
        return found.hexdigest()


@dataclass(frozen=True)
class Listing:
    """The images of one split before they are decoded.

    Attributes:
        labels: The class of each image, int64, shape (N,).
        classes: The name of each class.
        decode: Returns the images at indices of the split, None for all.
        indices: Those of the images in the split; None: all.
    """

    labels: Tensor
    classes: tuple[str, ...]
    decode: Callable[[Tensor | None], Images]
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> Listing:
        """Returns a part of the listing."""
        indices = chosen if self.indices is None else self.indices[chosen]
        return replace(self, labels=self.labels[chosen], indices=indices)

    def counts(self) -> list[int]:
        """Returns the number of images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()

    def read(self) -> Images:
        """Decodes the images.

        Raises:
            DataError: One can't be read.
        """
        return self.decode(self.indices)
