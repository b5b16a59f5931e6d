"""Augments and normalizes batches of uint8 images on their device; draws the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ltsam_fast.data.images import Images
from ltsam_fast.data.longtail import check_integer

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Augment:
    """Crops, flips and normalizes a batch of uint8 images on the device they are on.

    .. code-block:: text

        x <- a random window of x padded with crop_padding zeros on each side        drawn for each image
        x <- x mirrored left to right, with probability 1/2                          drawn for each image
        x <- RandAugment(x)                                                          drawn for each image
        x <- (x / 255 - mean) / std

    Args:
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, > 0, in the same scale.
        crop_padding: Pixels of zeros on each side before a window of the original size is cropped; 0: no crop.
        flip: Mirror half of the images.
        randaugment: ``(operations, magnitude)`` of RandAugment, by torchvision.

    Raises:
        ValueError: An argument is out of its range.
        ModuleNotFoundError: ``randaugment`` is given and torchvision is not installed.

    Source: Krizhevsky, CIFAR's crop and flip as in He et al. 2016 (arXiv 1512.03385), section 4.2; Cubuk et al. 2020,
    RandAugment (arXiv 1909.13719).

    >>> augment = Augment((0.5,), (0.25,), crop_padding=1)
    >>> augment(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_padding: int = 0,
        flip: bool = False,
        randaugment: tuple[int, int] | None = None,
    ) -> None:
        if len(mean) != len(std) or not len(mean) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be one number per channel, std > 0, got {mean!r} and {std!r}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_padding = check_integer("crop_padding", crop_padding, low=0)
        self.flip = flip
        self.randaugment = randaugment
        self._random_ops = None
        if randaugment is not None:
            operations, magnitude = randaugment
            self._random_ops = _transforms().RandAugment(check_integer("randaugment", operations, low=1), magnitude)
        # x / 255 / std - mean / std, as one product and one sum
        spread = torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * spread)).float().reshape(-1, 1, 1)
        self._shift = (-torch.tensor(mean, dtype=torch.float64) / spread).float().reshape(-1, 1, 1)

    @classmethod
    def for_training(cls, images: Images, *, randaugment: tuple[int, int] | None = None) -> Augment:
        """Returns the usual augmentation for such images: crop and flip for colour images, neither for one channel (digits).

        Statistics are CIFAR's for 32 x 32 colour images, ImageNet's for other colour images, else those of ``images``.
        """
        colour = images.pixels.shape[1] == 3
        padding = min(images.pixels.shape[2:]) // 8 if colour else 0  # 4 pixels for CIFAR
        return cls(*_statistics(images), crop_padding=padding, flip=colour, randaugment=randaugment)

    @classmethod
    def for_testing(cls, images: Images) -> Augment:
        """Returns the same normalization without augmentation. ``images`` is the training set here, too."""
        return cls(*_statistics(images))

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the network's input.

        Args:
            pixels: uint8, shape (B, channels, height, width).
            generator: Generator of all random numbers, on any device; default: that of the device of ``pixels``.

        Returns:
            fp32, same shape and device.

        Raises:
            TypeError: ``pixels`` is not uint8.
            ValueError: ``pixels`` has another number of channels than ``mean``.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be torch.uint8, got {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[1] != len(self.mean):
            raise ValueError(f"pixels must have shape (B, {len(self.mean)}, height, width), got {tuple(pixels.shape)}")
        if self.crop_padding or self.flip:
            pixels = self._crop_and_flip(pixels, generator)
        if self._random_ops is not None:
            pixels = self._random_augment(pixels, generator)
        if self._scale.device != pixels.device:
            self._scale, self._shift = self._scale.to(pixels.device), self._shift.to(pixels.device)
        return torch.addcmul(self._shift, pixels.float(), self._scale)

    def _crop_and_flip(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        batch, channels, height, width = pixels.shape
        padding, device = self.crop_padding, pixels.device
        drawn_on = device if generator is None else generator.device
        offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator, device=drawn_on)
        mirrored = torch.randint(2, (batch, 1), generator=generator, device=drawn_on) * int(self.flip)
        offsets, mirrored = offsets.to(device, non_blocking=True), mirrored.to(device, non_blocking=True)
        rows = torch.arange(height, device=device) + offsets[0]
        columns = torch.arange(width, device=device)
        columns = torch.where(mirrored.bool(), width - 1 - columns, columns) + offsets[1]
        source = (rows * (width + 2 * padding)).unsqueeze(2) + columns.unsqueeze(1)  # (B, height, width)
        padded = F.pad(pixels, (padding,) * 4).flatten(2)
        return padded.gather(2, source.reshape(batch, 1, -1).expand(-1, channels, -1)).reshape(pixels.shape)

    def _random_augment(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Applies RandAugment image by image, as torchvision needs it; torchvision draws from torch's global random state."""
        assert self._random_ops is not None
        drawn_on = pixels.device if generator is None else generator.device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=drawn_on))
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            return torch.stack([self._random_ops(image) for image in pixels])


def _transforms():  # type: ignore[no-untyped-def]  # torchvision may not be installed
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "randaugment needs torchvision: pip install torchvision", name="torchvision"
        ) from error
    return v2


def _statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels, *extent = images.pixels.shape[1:]
    if channels == 3:
        return (CIFAR_MEAN, CIFAR_STD) if extent == [32, 32] else (IMAGENET_MEAN, IMAGENET_STD)
    histogram = torch.zeros(channels, 256, dtype=torch.float64)
    for block in images.pixels.split(4096):
        for channel in range(channels):
            histogram[channel] += block[:, channel].flatten().bincount(minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    frequency = histogram / histogram.sum(1, keepdim=True)
    mean = frequency @ values
    std = (frequency @ values.square() - mean.square()).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def batches(n: int, batch_size: int, *, generator: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """Yields the indices of an epoch's batches, from a random permutation of n samples.

    Args:
        n: Number of samples.
        batch_size: Samples per batch; the last batch may have fewer.
        generator: Generator of the permutation, which is drawn at the first batch.
        drop_last: Leave out an incomplete last batch.

    Yields:
        LongTensors on the generator's device.

    Raises:
        ValueError: ``n`` or ``batch_size`` is less than 1.

    >>> [len(batch) for batch in batches(10, 4, generator=torch.Generator().manual_seed(0))]
    [4, 4, 2]
    """
    check_integer("n", n, low=1)
    check_integer("batch_size", batch_size, low=1)
    for batch in torch.randperm(n, generator=generator, device=generator.device).split(batch_size):
        if len(batch) == batch_size or not drop_last:
            yield batch
