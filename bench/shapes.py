"""Parameter shapes of the measured networks, so that no model zoo is needed."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


def resnet32(classes: int = 10) -> list[Shape]:
    """ResNet-32 for CIFAR (He et al. 2016, section 4.2), parameter-free shortcuts: 95 tensors, 0.46 M elements."""
    shapes: list[Shape] = [(16, 3, 3, 3), (16,), (16,)]
    width = 16
    for planes in (16, 32, 64):
        for _ in range(5):
            shapes += [(planes, width, 3, 3), (planes,), (planes,), (planes, planes, 3, 3), (planes,), (planes,)]
            width = planes
    return [*shapes, (classes, 64), (classes,)]


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50 for ImageNet (He et al. 2016, table 1): 161 tensors, 25.6 M elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, size in ((planes, width, 1), (planes, planes, 3), (4 * planes, planes, 1)):
                shapes += [(out, into, size, size), (out,), (out,)]
            if block == 0:
                shapes += [(4 * planes, width, 1, 1), (4 * planes,), (4 * planes,)]
            width = 4 * planes
    return [*shapes, (classes, width), (classes,)]


def vit_b16(classes: int = 1000) -> list[Shape]:
    """ViT-B/16 at 224 pixels (Dosovitskiy et al. 2021, table 1): 152 tensors, 86.6 M elements."""
    width, hidden = 768, 3072
    shapes: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(12):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    return [*shapes, (width,), (width,), (classes, width), (classes,)]


def tiny(count: int = 2000) -> list[Shape]:
    """Many small tensors: measures the overhead of a pass."""
    return [(16 + index % 17,) for index in range(count)]


SHAPES = {"resnet32": resnet32, "resnet50": resnet50, "vit_b16": vit_b16, "tiny": tiny}


def names() -> Iterator[str]:
    """Returns the networks, smallest first."""
    return iter(("resnet32", "resnet50", "vit_b16"))
