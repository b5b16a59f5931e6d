"""Networks: ResNets for CIFAR, a small ViT and a small CNN; :func:`create` also makes those of timm and torchvision."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltsam_fast.ops.checks import plain, shown
from ltsam_fast.optim.options import did_you_mean


class NormedLinear(nn.Module):
    """A classifier whose outputs are the cosines between the features and each class's weight.

    Losses for it multiply the cosines by a scale (LDAM's ``s``, 30 as published).

    Args:
        in_features: Length of the features.
        out_features: Number of classes.

    Source: Cao et al. 2019 (LDAM, arXiv 1906.07413), section 3.2: normalized features and weights.

    >>> NormedLinear(8, 3)(torch.randn(5, 8)).abs().max() <= 1
    tensor(True)
    """

    keeps_samples_apart = True
    """Each row of the output depends on its own row of the input only, see :class:`ltsam_fast.CCSAM`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(F.normalize(torch.empty(out_features, in_features).uniform_(-1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the cosines, shape (B, out_features), of the features x, shape (B, in_features)."""
        return F.linear(F.normalize(x), F.normalize(self.weight))

    def extra_repr(self) -> str:
        """Returns what ``print`` shows of the module."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _head(features: int, num_classes: int, cosine: bool) -> nn.Module:
    return NormedLinear(features, num_classes) if cosine else nn.Linear(features, num_classes)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut without weights.

    If the block halves the image and doubles the channels, the shortcut takes every second pixel and pads channels with zeros
    on both sides ("option A").
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Returns shape (B, channels, height / stride, width / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added or self.stride > 1:
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A ResNet of depth 6 n + 2 for small images: see :func:`resnet`."""

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, cosine_head: bool = False) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 for a whole n >= 1 (20, 32, 44, 56, ...), got {depth!r}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, before = [], 16
        for stage, channels in enumerate((16, 32, 64)):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(before, channels, 2 if stage and not index else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _head(64, num_classes, cosine_head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Returns the input of the classifier, shape (B, 64), for images x, shape (B, in_channels, height, width)."""
        return self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, shape (B, num_classes), of images x, shape (B, in_channels, height, width)."""
        return self.head(self.features(x))


def resnet(num_classes: int, in_channels: int = 3, cosine_head: bool = False, *, depth: int = 32) -> ResNet:
    """Returns a ResNet for small images: three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        cosine_head: End in :class:`NormedLinear`, as LDAM's networks do.
        depth: Layers with weights: 6 n + 2.

    Raises:
        ValueError: ``depth`` is not of this form.

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2, with option A shortcuts; Kaiming initialization as in Cao et al.
    2019, the network of the published CIFAR-LT results.

    >>> resnet(10, depth=20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return ResNet(depth, num_classes, in_channels, cosine_head)


def resnet32(num_classes: int, in_channels: int = 3, cosine_head: bool = False) -> ResNet:
    """Returns the ResNet-32 of CIFAR-LT: :func:`resnet` with 5 blocks per stage, 0.46 M parameters.

    >>> sum(p.numel() for p in resnet32(10).parameters())
    464154
    """
    return resnet(num_classes, in_channels, cosine_head, depth=32)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns shape (B, tokens, dim), as x has."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm transformer block with an MLP of four times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Returns shape (B, tokens, dim), as x has."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer: see :func:`small_vit`."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        in_channels: int,
        cosine_head: bool,
    ) -> None:
        super().__init__()
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch must divide image_size = {image_size}, got {patch!r}")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads!r}")
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = _head(dim, num_classes, cosine_head)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Returns the input of the classifier, shape (B, dim), for images x, shape (B, in_channels, size, size)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.norm(self.blocks(tokens))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, shape (B, num_classes), of images x, shape (B, in_channels, size, size)."""
        return self.head(self.features(x))


def small_vit(
    num_classes: int,
    image_size: int,
    patch: int = 4,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    *,
    in_channels: int = 3,
    cosine_head: bool = False,
) -> ViT:
    """Returns a small vision transformer: class token, learned positions, pre-norm blocks; 2.7 M parameters by default.

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        patch: Height and width of a patch; divides ``image_size``.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Heads of the attention; divides ``dim``.
        in_channels: Channels of the images.
        cosine_head: End in :class:`NormedLinear`.

    Raises:
        ValueError: ``patch`` does not divide ``image_size``, or ``heads`` not ``dim``.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1.

    >>> small_vit(10, 32, depth=1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return ViT(num_classes, image_size, patch, dim, depth, heads, in_channels, cosine_head)


def small_cnn(
    num_classes: int = 10, in_channels: int = 1, image_size: int = 8, *, cosine_head: bool = False
) -> nn.Sequential:
    """Returns a small convolutional network: 24 k parameters for the digits, 8 x 8 pixels in 10 classes.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 2 pixels.
        cosine_head: End in :class:`NormedLinear`.

    >>> small_cnn()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (image_size // 2) ** 2, 36),
        nn.ReLU(),
        _head(36, num_classes, cosine_head),
    )


def _square(image_shape: tuple[int, int, int]) -> int:
    _, height, width = image_shape
    if height != width:
        raise ValueError(f"image_shape must be square for this model, got {image_shape}")
    return height


def _default_patch(size: int) -> int:
    """Returns the patch size for about 8 x 8 patches (4 pixels for CIFAR): the largest divisor of ``size`` up to size / 8."""
    return max(patch for patch in range(1, max(1, size // 8) + 1) if size % patch == 0)


Factory = Callable[[int, tuple[int, int, int], bool], nn.Module]


def _resnet_of(depth: int) -> Factory:
    return lambda classes, shape, cosine: resnet(classes, shape[0], cosine, depth=depth)


_OWN: dict[str, Factory] = {
    **{f"resnet{depth}": _resnet_of(depth) for depth in (8, 20, 32, 44, 56, 110)},
    "small_cnn": lambda classes, shape, cosine: small_cnn(classes, shape[0], _square(shape), cosine_head=cosine),
    "small_vit": lambda classes, shape, cosine: small_vit(
        classes, _square(shape), _default_patch(_square(shape)), in_channels=shape[0], cosine_head=cosine
    ),
}


def names() -> tuple[str, ...]:
    """Returns the names of this module's networks for :func:`create`; others are ``timm/...`` and ``torchvision/...``.

    >>> "resnet32" in names()
    True
    """
    return tuple(_OWN)


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """A context in which torch's default dtype is float32, so that random weights do not depend on the user's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_float32()
def create(name: str, num_classes: int, image_shape: tuple[int, int, int], *, cosine_head: bool = False) -> nn.Module:
    """Returns a new network by its name, in float32.

    Args:
        name: One of :func:`names`, or ``"timm/<name>"`` or ``"torchvision/<name>"`` where that package is installed.
        num_classes: Number of classes.
        image_shape: Channels, height and width of the images.
        cosine_head: End in :class:`NormedLinear`; this module's own networks only.

    Raises:
        ValueError: There is no such network, or it does not accept such images.
        ModuleNotFoundError: Its package is not installed.

    >>> create("small_cnn", 10, (1, 8, 8))(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """
    if not plain(num_classes) >= 1:
        raise ValueError(f"num_classes must be a whole number >= 1, got {shown(num_classes)}")
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be channels, height and width, got {shown(image_shape)}")
    if name in _OWN:
        return _OWN[name](num_classes, image_shape, cosine_head)
    package, _, inner = str(name).partition("/")
    if package not in _OTHERS or not inner:
        raise ValueError(
            f"there is no model {name!r}{did_you_mean(name, _OWN)} There are {', '.join(_OWN)}, 'timm/<name>' and "
            "'torchvision/<name>'"
        )
    if cosine_head:
        raise ValueError(f"cosine_head must be False for {name!r}: only {', '.join(_OWN)} have one")
    try:
        found = importlib.import_module(package if package == "timm" else "torchvision.models")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name!r} needs {package}: pip install {package}", name=error.name) from error
    return _OTHERS[package](found, inner, num_classes, image_shape)


def _timm(timm: Any, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"name: timm has no model {name!r}; timm.list_models() lists them")
    try:
        usual = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part of the name after the dot
        raise ValueError(f"name: timm has no model {name!r}: {error}") from error
    # Transformers have a fixed image size; convolutional networks take any size and have no such argument.
    size = {"img_size": image_shape[1:]} if usual is not None and usual.fixed_input_size else {}
    return timm.create_model(name, num_classes=num_classes, in_chans=image_shape[0], **size)


def _torchvision(models: Any, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    if name not in models.list_models(module=models):
        raise ValueError(f"name: torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    if image_shape[0] != 3:
        raise ValueError(f"image_shape must have 3 channels for torchvision's models, got {image_shape}")
    return models.get_model(name, weights=None, num_classes=num_classes)


_OTHERS: dict[str, Callable[[Any, str, int, tuple[int, int, int]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def classifier(model: nn.Module) -> nn.Module:
    """Returns the last linear or cosine layer of a network, which CC-SAM calls its head.

    Raises:
        ValueError: There is none.

    >>> classifier(resnet32(10))
    Linear(in_features=64, out_features=10, bias=True)
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | NormedLinear)]
    if not layers:
        raise ValueError(f"model must have a linear layer, got {type(model).__name__} without one")
    return layers[-1]
