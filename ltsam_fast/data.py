"""Long-tailed data: how many samples each class keeps, which ones, and how results are reported by class frequency."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TEST_PER_CLASS = 40
_VALIDATION_PER_CLASS = 30


def longtail_counts(n_max: int, classes: int, imbalance: float, profile: str = "exp") -> list[int]:
    """Returns how many training samples each class keeps, the most frequent class first.

    .. code-block:: text

        exp:   n_c = floor(n_max * (1 / imbalance)^(c / (classes - 1)))
        step:  n_c = n_max in the first floor(classes / 2) classes, floor(n_max / imbalance) in the others

    Truncated, not rounded, so the lists are those of the published CIFAR-LT.

    Args:
        n_max: Samples in the most frequent class.
        classes: Number of classes, >= 2.
        imbalance: Most frequent over least frequent, from 1 to ``n_max``.
        profile: ``"exp"`` or ``"step"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Cui et al., "Class-Balanced Loss", CVPR 2019 (arXiv 1901.05555), section 5.1; Cao et al., "Learning Imbalanced
    Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019 (arXiv 1906.07413), section 4.

    >>> longtail_counts(5000, 10, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    n_max = _whole("n_max", n_max, least=1)
    classes = _whole("classes", classes, least=2)
    if not 1 <= imbalance <= n_max:
        raise ValueError(
            f"imbalance must be from 1 to n_max = {n_max}, which leaves a sample to every class, got {imbalance!r}"
        )
    # The order of operations is the published one: n_max / imbalance ** x may round differently, and is then truncated.
    if profile == "exp":
        return [int(n_max * (1 / imbalance) ** (c / (classes - 1))) for c in range(classes)]
    if profile == "step":
        return [n_max] * (classes // 2) + [int(n_max * (1 / imbalance))] * (classes - classes // 2)
    raise ValueError(f"profile must be 'exp' or 'step', got {profile!r}")


def longtail_subset(
    labels: Tensor | Sequence[int] | np.ndarray[Any, Any], counts: Sequence[int], seed: int = 0
) -> Tensor:
    """Returns the indices of ``counts[c]`` samples of each class c, drawn at random.

    For c = 0, 1, ...: the indices of class c are shuffled by one ``numpy.random.RandomState(seed)``, and the first
    ``counts[c]`` are taken. With the counts of :func:`longtail_counts` and seed 0 these are the published CIFAR-LT subsets.

    Args:
        labels: Class of each sample, shape (N,), integers in [0, len(counts)).
        counts: Number of samples to take of each class, >= 0.
        seed: Seed of the shuffle.

    Returns:
        LongTensor, shape (sum(counts),), class by class.

    Raises:
        ValueError: ``labels`` is no list of classes, or a class has fewer samples than it should keep.

    Source: Cao et al. 2019, as for :func:`longtail_counts`: the dataset in the authors' code.

    >>> longtail_subset([0, 1, 0, 1, 0], [2, 1]).shape
    torch.Size([3])
    """
    y = _integers("labels", labels)
    wanted = _class_counts("counts", counts)
    if len(y) and not 0 <= y.min() <= y.max() < len(wanted):
        raise ValueError(f"labels must lie in [0, {len(wanted)}), one entry of counts each, got {y.min()}..{y.max()}")
    random = np.random.RandomState(seed)
    chosen = []
    for c, count in enumerate(wanted):
        members = np.flatnonzero(y == c)
        if len(members) < count:
            raise ValueError(f"counts[{c}] must be at most {len(members)}, the samples that class {c} has, got {count}")
        random.shuffle(members)
        chosen.append(members[:count])
    return torch.from_numpy(np.concatenate(chosen))


def shot_split(class_counts: Sequence[int] | Tensor, many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Returns which classes have many, a medium number of, and few training samples.

    Args:
        class_counts: Training samples of each class, shape (C,).
        many: Classes with more than this many samples are ``"many"``.
        few: Classes with less than this many samples are ``"few"``; the rest, both thresholds included, is ``"medium"``.

    Returns:
        Keys ``"many"``, ``"medium"``, ``"few"``; values LongTensors of class indices, ascending, perhaps empty.

    Raises:
        ValueError: A count is negative, or ``few`` exceeds ``many``.

    Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019 (arXiv 1904.05160); the thresholds
    are strict as in Kang et al., "Decoupling Representation and Classifier", ICLR 2020 (arXiv 1910.09217).

    >>> shot_split([500, 100, 20, 19])
    {'many': tensor([0]), 'medium': tensor([1, 2]), 'few': tensor([3])}
    """
    if not 0 <= few <= many:
        raise ValueError(f"few must be from 0 to many = {many!r}, got {few!r}")
    counts = torch.tensor(_class_counts("class_counts", class_counts))
    groups = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return {name: members.nonzero().flatten() for name, members in groups.items()}


@dataclass(frozen=True)
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


def digits(imbalance: float = 50, seed: int = 0, *, held_out: str = "test") -> LongTailed:
    """Returns scikit-learn's digits, 8 x 8 pixels in 10 classes, with a long tail; nothing is downloaded.

    40 images of each class are the test set, the same ones whatever the seed. The training set is drawn from the others,
    with 134 images of the digit 0 and ever fewer of the following ones. Pixels are scaled to [0, 1] and then standardised
    by mean and standard deviation of the training set.

    Args:
        imbalance: Most frequent over least frequent class, 1 to 134 (104 for validation).
        seed: Seed of the draw.
        held_out: ``"test"``; or ``"validation"``, for choosing hyperparameters without a look at the test set: then
            ``test_x`` are 30 images of each class that are drawn from the others too, and training has 104 zeros at most.

    Raises:
        ValueError: ``imbalance`` or ``held_out`` is out of range.
        ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    if held_out not in ("test", "validation"):
        raise ValueError(f"held_out must be 'test' or 'validation', got {held_out!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        message = "ltsam_fast.data.digits needs scikit-learn: pip install 'ltsam_fast[demo]'"
        raise ModuleNotFoundError(message, name="sklearn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()

    test = longtail_subset(y, [_TEST_PER_CLASS] * 10)
    rest = _without(torch.arange(len(y)), test)
    if held_out == "validation":
        test = rest[longtail_subset(y[rest], [_VALIDATION_PER_CLASS] * 10, seed)]
        rest = _without(rest, test)
    counts = longtail_counts(int(y[rest].bincount().min()), 10, imbalance)
    train = rest[longtail_subset(y[rest], counts, seed)]

    x = (x - x[train].mean()) / x[train].std()
    return LongTailed(x[train], y[train], x[test], y[test], counts)


def _without(indices: Tensor, taken: Tensor) -> Tensor:
    return indices[~torch.isin(indices, taken)]


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return number


def _integers(name: str, values: Any) -> np.ndarray[Any, Any]:
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise ValueError(f"{name} must be whole numbers in one dimension, got {array.dtype} of shape {array.shape}")
    return array


def _class_counts(name: str, counts: Any) -> list[int]:
    numbers: list[int] = _integers(name, counts).tolist()
    if not numbers or min(numbers) < 0:
        raise ValueError(f"{name} must be one number >= 0 for each class, got {numbers}")
    return numbers
