"""scikit-learn's digits: real images without a download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltsam_fast.data.images import DataError, Images, class_sizes
from ltsam_fast.data.longtail import longtail_counts, longtail_subset
from ltsam_fast.extras import needed

_TEST_PER_CLASS = 40
_VALIDATION_PER_CLASS = 30


@dataclass(frozen=True, repr=False)
class LongTailed:
    """A long-tailed training set and a balanced test set.

    Attributes:
        train_x: Training images, fp32, shape (N, 1, height, width).
        train_y: Their classes, int64, shape (N,).
        test_x: Test images, fp32, shape (M, 1, height, width).
        test_y: Their classes, int64, shape (M,).
        class_counts: Training images of each class.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_counts: list[int]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.train_x.shape[1:]))
        sizes = class_sizes(self.class_counts)
        return f"LongTailed({len(self.train_y)} training and {len(self.test_y)} test images of {shape}, {sizes})"


def digits(imbalance: float = 50, seed: int = 0, *, held_out: str = "test") -> LongTailed:
    """Returns a long-tailed subset of scikit-learn's digits, 8 x 8 pixels in 10 classes; nothing is downloaded.

    40 images of each class are the test set, the same for every seed. The training set is drawn from the others, with 134
    images of the digit 0 and fewer of each following digit. Pixels are scaled to [0, 1] and then standardised by mean and
    standard deviation of the training set.

    Args:
        imbalance: Most frequent over least frequent class, 1 to 134 (104 for validation).
        seed: Seed of the subset.
        held_out: ``"test"``; or ``"validation"``, for choosing hyperparameters without the test set: then ``test_x`` are 30
            of the other images of each class, and at most 104 images of the digit 0 are left for training.

    Raises:
        ValueError: ``imbalance`` or ``held_out`` is out of range.
        ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    if held_out not in ("test", "validation"):
        raise ValueError(f"held_out must be 'test' or 'validation', got {held_out!r}")
    pixels, y = _pixels_and_labels()
    x = pixels.float() / 16
    rest, test = _train_and_test(y)
    if held_out == "validation":
        test = rest[longtail_subset(y[rest], [_VALIDATION_PER_CLASS] * 10, seed)]
        rest = _without(rest, test)
    counts = longtail_counts(int(y[rest].bincount().min()), 10, imbalance)
    train = rest[longtail_subset(y[rest], counts, seed)]

    x = (x - x[train].mean()) / x[train].std()
    return LongTailed(x[train], y[train], x[test], y[test], counts)


def _without(indices: Tensor, excluded: Tensor) -> Tensor:
    return indices[~torch.isin(indices, excluded)]


def digit_images(split: str) -> Images:
    """Returns a split of the digits without a long tail: ``"test"``, 40 images of each class, or ``"train"``, the others.

    Pixels are 15 times those of scikit-learn, which are from 0 to 16.

    Raises:
        DataError: There is no such split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"digits: no split {split!r}, only 'train' and 'test'")
    pixels, labels = _pixels_and_labels()
    chosen = _train_and_test(labels)[split == "test"]
    return Images(pixels[chosen] * 15, labels[chosen], tuple("0123456789"))


def _pixels_and_labels() -> tuple[Tensor, Tensor]:
    """Returns all digits, uint8 from 0 to 16, shape (1797, 1, 8, 8), and their classes."""
    load_digits = needed("sklearn.datasets", "scikit-learn").load_digits
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 8, 8), torch.from_numpy(labels).long()


def _train_and_test(labels: Tensor) -> tuple[Tensor, Tensor]:
    test = longtail_subset(labels, [_TEST_PER_CLASS] * 10)
    return _without(torch.arange(len(labels)), test), test
