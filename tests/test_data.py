"""Long-tail profiles, subsets and shot groups against the published protocol."""

from __future__ import annotations

import pytest
import torch

from ltsam_fast.data import digits, longtail_counts, longtail_subset, shot_split

TOTALS = {  # Cao et al. 2019: samples in CIFAR-10-LT and CIFAR-100-LT by imbalance
    10: (20431, 19573),
    50: (13996, 12608),
    100: (12406, 10847),
    200: (11203, 9502),
}


@pytest.mark.parametrize("imbalance", TOTALS)
def test_counts_are_the_published_ones(imbalance):
    assert sum(longtail_counts(5000, 10, imbalance)) == TOTALS[imbalance][0]
    assert sum(longtail_counts(500, 100, imbalance)) == TOTALS[imbalance][1]


@pytest.mark.parametrize("imbalance", TOTALS)
@pytest.mark.parametrize("classes", [10, 100])
def test_counts_of_every_class_are_the_published_ones(classes, imbalance):
    """Both forms of the formula, as different authors write it."""
    largest, factor = 50000 // classes, {10: 0.1, 50: 0.02, 100: 0.01, 200: 0.005}[imbalance]
    counts = longtail_counts(largest, classes, imbalance)
    assert counts == [int(largest * factor ** (c / (classes - 1.0))) for c in range(classes)]
    assert counts == [int(largest / imbalance ** (c / (classes - 1.0))) for c in range(classes)]


def test_cifar_lists_and_groups_that_papers_print():
    assert longtail_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    counts = longtail_counts(500, 100, 100)
    assert counts[69] == 20 and counts[-1] == 5 and longtail_counts(500, 100, 200)[-1] == 2
    assert [len(group) for group in shot_split(counts).values()] == [35, 35, 30]


def test_step_profile():
    assert longtail_counts(5000, 10, 100, "step") == [5000] * 5 + [50] * 5


def test_subset_has_the_counts_and_repeats():
    labels = torch.arange(300) % 3
    chosen = longtail_subset(labels, [100, 20, 0], seed=1)
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [100, 20, 0]
    assert len(set(chosen.tolist())) == 120
    assert torch.equal(chosen, longtail_subset(labels, [100, 20, 0], seed=1))
    assert not torch.equal(chosen, longtail_subset(labels, [100, 20, 0], seed=2))


def test_shot_groups_at_their_edges():
    groups = shot_split([101, 100, 20, 19])
    assert {name: classes.tolist() for name, classes in groups.items()} == {"many": [0], "medium": [1, 2], "few": [3]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longtail_counts(0, 10, 100), "n_max"),
        (lambda: longtail_counts(10, 10, 0.5), "imbalance"),
        (lambda: longtail_counts(10, 10, 10, "linear"), "profile"),
        (lambda: longtail_subset([0, 0, 1], [2, 2]), r"counts\[1\]"),
        (lambda: shot_split([1], many=5, few=9), "few"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_digits_are_long_tailed_and_the_test_set_is_apart():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = digits(imbalance=50, seed=3)
    assert torch.bincount(data.train_y).tolist() == data.class_counts
    assert data.class_counts == longtail_counts(data.class_counts[0], 10, 50)
    assert torch.bincount(data.test_y).tolist() == [40] * 10
    seen = {tuple(image.flatten().tolist()) for image in data.train_x}
    assert not any(tuple(image.flatten().tolist()) in seen for image in data.test_x)


def test_a_data_set_is_shown_in_one_line():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    shown = "LongTailed(371 training and 400 test images of 1 x 8 x 8, 10 classes of 2 to 134)"
    assert repr(digits()) == shown
