"""Long-tailed subsets, and the split of classes by their number of samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltsam_fast.ops.checks import plain, shown


def longtail_counts(n_max: int, classes: int, imbalance: float, profile: str = "exp") -> list[int]:
    """Returns the number of training samples of each class, the most frequent class first.

    .. code-block:: text

        exp:   n_c = floor(n_max * (1 / imbalance)^(c / (classes - 1)))
        step:  n_c = n_max in the first floor(classes / 2) classes, floor(n_max / imbalance) in the others

    Numbers are truncated, not rounded, as in the published CIFAR-LT.

    Args:
        n_max: Samples in the most frequent class.
        classes: Number of classes, >= 2.
        imbalance: Ratio of the most to the least frequent class, from 1 to ``n_max``.
        profile: ``"exp"`` or ``"step"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Cui et al., "Class-Balanced Loss", CVPR 2019 (arXiv 1901.05555), section 5.1; Cao et al., "Learning Imbalanced
    Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019 (arXiv 1906.07413), section 4.

    >>> longtail_counts(5000, 10, 100)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    n_max = check_integer("n_max", n_max, low=1)
    classes = check_integer("classes", classes, low=2)
    if not 1 <= plain(imbalance) <= n_max:
        raise ValueError(
            f"imbalance must be from 1 to n_max = {n_max}, which leaves a sample to every class, got {imbalance!r}"
        )
    # The published order of operations: n_max / imbalance ** x may round differently before it is truncated.
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
        ValueError: ``labels`` is not a list of classes, or a class has fewer samples than asked for.

    Source: Cao et al. 2019, as for :func:`longtail_counts`: the dataset in the authors' code.

    >>> longtail_subset([0, 1, 0, 1, 0], [2, 1]).shape
    torch.Size([3])
    """
    seed = check_integer("seed", seed, low=0, below=2**32)
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
    """Returns the classes with many, a medium number of, and few training samples.

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
    if not 0 <= plain(few) <= plain(many):
        raise ValueError(f"few must be from 0 to many = {many!r}, got {few!r}")
    counts = torch.tensor(_class_counts("class_counts", class_counts))
    groups = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return {name: members.nonzero().flatten() for name, members in groups.items()}


def shot_limits(class_counts: Sequence[int] | Tensor) -> tuple[int, int] | None:
    """Returns ``many`` and ``few`` with which :func:`shot_split` leaves no group empty, and a third of the sizes in each.

    None: the classes have fewer than three sizes.

    >>> shot_limits([500, 300, 100, 50, 20, 10])
    (100, 50)
    """
    sizes = sorted(set(_class_counts("class_counts", class_counts)))
    third = len(sizes) // 3
    return (sizes[-1 - third], sizes[third]) if third else None


def check_integer(name: str, value: Any, low: int, below: float = math.inf) -> int:
    """Returns ``value`` as an int; raises ValueError unless it is an integer >= ``low`` and less than ``below``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number < below:
        wanted = f">= {low}" if below == math.inf else f"in [{low}, {below})"
        raise ValueError(f"{name} must be a whole number {wanted}, got {shown(value)}")
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
