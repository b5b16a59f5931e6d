"""Batches on the device: crop, flip and normalization against a loop over images; every draw from the generator."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from ltsam_fast.data import Augment, Images, batches, load


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pictures(seed, shape):
    """Without zeros, which only padding has."""
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator(seed))


@pytest.mark.parametrize("shape", [(5, 3, 9, 12), (1, 1, 8, 8), (0, 3, 4, 4)])
def test_normalization(seed, shape):
    pixels = pictures(seed, shape)
    mean, std = [0.3, 0.5, 0.7][: shape[1]], [0.2, 0.3, 0.4][: shape[1]]
    column = lambda values: torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)  # noqa: E731
    got = Augment(mean, std)(pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (pixels.double() / 255 - column(mean)) / column(std), rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_each_image_is_a_window_of_itself(seed, padding, flip):
    """Every result is one of the windows there are, and over many images every offset and both sides come up."""
    batch, height, width = 600, 5, 7
    pixels = pictures(seed, (1, 3, height, width)).expand(batch, -1, -1, -1)
    augment = Augment([0.0] * 3, [1 / 255] * 3, crop_padding=padding, flip=flip)
    got = augment(pixels, generator(seed)).round().to(torch.uint8)
    windows = {}
    for mirrored in {False, flip}:
        # Mirrored or not, the window is cut from the padded image: mirroring comes after the crop.
        padded = F.pad(pixels[0], (padding,) * 4)
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                window = padded[:, top : top + height, left : left + width]
                window = window.flip(2) if mirrored else window
                windows[tuple(window.flatten().tolist())] = (mirrored, top, left)
    seen = {}
    for image in got:
        key = windows[tuple(image.flatten().tolist())]
        seen[key] = seen.get(key, 0) + 1
    offsets = 2 * padding + 1
    assert {key[1] for key in seen} == {key[2] for key in seen} == set(range(offsets))
    if flip:
        assert 200 < sum(count for key, count in seen.items() if key[0]) < 400
    for axis in (1, 2):
        for offset in range(offsets):
            count = sum(count for key, count in seen.items() if key[axis] == offset)
            assert abs(count - batch / offsets) < 6 * (batch / offsets) ** 0.5 + 1e-9 or offsets == 1


def test_draws_come_from_the_generator_alone(seed):
    pixels = pictures(seed, (16, 3, 8, 8))
    augment = Augment([0.5] * 3, [0.5] * 3, crop_padding=2, flip=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment(pixels, generator(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, augment(pixels, generator(3)))
    assert not torch.equal(first, augment(pixels, generator(4)))
    assert not torch.equal(augment(pixels), augment(pixels))


def test_the_batch_itself_stays(seed):
    pixels = pictures(seed, (4, 3, 8, 8))
    before = pixels.clone()
    Augment([0.5] * 3, [0.5] * 3, crop_padding=2, flip=True)(pixels)
    assert torch.equal(pixels, before)


def images(shape, seed=0):
    return Images(pictures(seed, shape), torch.zeros(shape[0], dtype=torch.long), ("a",))


@pytest.mark.parametrize(
    ("shape", "mean", "padding", "flip"),
    [((4, 3, 32, 32), 0.4914, 4, True), ((4, 3, 64, 64), 0.485, 8, True), ((4, 3, 224, 224), 0.485, 28, True)],
)
def test_usual_settings(shape, mean, padding, flip):
    training, testing = Augment.for_training(images(shape)), Augment.for_testing(images(shape))
    assert training.mean == testing.mean and training.mean[0] == mean and training.std == testing.std
    assert (training.crop_padding, training.flip) == (padding, flip)
    assert (testing.crop_padding, testing.flip) == (0, False)


@pytest.mark.parametrize("channels", [1, 2])
def test_statistics_of_the_set_itself(channels, seed):
    training_set = images((5000, channels, 3, 3), seed)
    augment = Augment.for_training(training_set)
    assert (augment.crop_padding, augment.flip) == (0, False)
    values = training_set.pixels.double() / 255
    torch.testing.assert_close(torch.tensor(augment.mean).double(), values.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(augment.std).double(), values.std((0, 2, 3), correction=0))


def test_digits_as_the_reader_and_as_the_tensor_set_gives_them():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from ltsam_fast.data import digits

    train, test, tensors = load("digits", "train"), load("digits", "test"), digits(imbalance=1)
    assert test.counts() == [40] * 10 and len(train) + len(test) == 1797
    assert test.labels.tolist() == tensors.test_y.tolist()
    normalized = Augment.for_testing(train)(test.pixels)
    # The same images up to the statistics, which differ in the training sets' samples.
    assert torch.corrcoef(torch.stack([normalized.flatten(), tensors.test_x.flatten()]).double())[0, 1] > 0.999999


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Augment([0.5], [0.0]), ValueError, "std > 0"),
        (lambda: Augment([0.5], [0.5, 0.5]), ValueError, "one number per channel"),
        (
            lambda: Augment([0.5], [0.5], crop_padding=-1),
            ValueError,
            "crop_padding must be a whole number >= 0, got -1",
        ),
        (lambda: Augment([0.5], [0.5])(torch.zeros(2, 1, 4, 4)), TypeError, "pixels must be torch.uint8"),
        (lambda: Augment([0.5], [0.5])(torch.zeros(2, 3, 4, 4).byte()), ValueError, r"shape \(B, 1, height, width\)"),
        (lambda: list(batches(0, 4, generator=generator(0))), ValueError, "n must be"),
        (lambda: list(batches(4, 0, generator=generator(0))), ValueError, "batch_size must be"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("n", "size", "drop", "lengths"), [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (3, 9, True, [])]
)
def test_batches_are_a_permutation(n, size, drop, lengths, seed):
    got = list(batches(n, size, generator=generator(seed), drop_last=drop))
    assert [len(batch) for batch in got] == lengths
    flat = torch.cat([*got, torch.empty(0, dtype=torch.long)]).tolist()
    assert len(set(flat)) == len(flat) == sum(lengths) and set(flat) <= set(range(n))
    again = list(batches(n, size, generator=generator(seed), drop_last=drop))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_randaugment_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ModuleNotFoundError, match="randaugment needs torchvision"):
        Augment([0.5], [0.5], randaugment=(2, 9))


def test_randaugment_sees_each_image_and_draws_from_the_generator(monkeypatch, seed):
    """A stand-in for torchvision, which draws from torch's global state as torchvision does."""

    class RandAugment:
        def __init__(self, num_ops, magnitude):
            assert (num_ops, magnitude) == (2, 9)

        def __call__(self, image):
            assert image.dtype == torch.uint8 and image.ndim == 3
            return image + torch.randint(100, (1,)).byte()

    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    modules = [types.ModuleType(name) for name in names]
    modules[0].transforms, modules[1].v2, modules[2].RandAugment = modules[1], modules[2], RandAugment
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    augment, pixels = Augment([0.0], [1 / 255], randaugment=(2, 9)), torch.zeros(32, 1, 2, 2, dtype=torch.uint8)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    got = augment(pixels, generator(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(got[:, 0, 0, 0].unique()) > 5
    assert torch.equal(got, augment(pixels, generator(seed)))
