"""Makes what a run consists of: images, network, loss, optimizer, generators of random numbers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ltsam_fast import data, models
from ltsam_fast.data.images import Listing
from ltsam_fast.data.readers import listing
from ltsam_fast.losses import Loss
from ltsam_fast.optim.capture import GraphStep, graph_step
from ltsam_fast.train import run_checkpoint
from ltsam_fast.train.config import Config, ConfigError
from ltsam_fast.train.distributed import Distributed
from ltsam_fast.train.loss_registry import COSINE_LOSSES, criterion
from ltsam_fast.train.method_registry import RunInfo, create

_PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """What a run consists of."""

    config: Config
    dist: Distributed
    train: data.Images
    test: data.Images
    counts: list[int]
    network: nn.Module
    """The network, without a wrapper."""
    model: nn.Module
    """The network, or its DistributedDataParallel."""
    forward: Callable[[Tensor], Tensor]
    """The model, or its compiled version."""
    loss: Loss
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    sampler_generator: torch.Generator
    augment_generator: torch.Generator
    train_transform: Callable[..., Tensor]
    test_transform: Callable[..., Tensor]
    graph: GraphStep | None
    """The captured training step, if the config asks for it."""
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """The number of steps per epoch."""
        return -(-len(self.train.labels) // self.config.batch_size)

    def autocast(self) -> torch.autocast:
        """Returns the context of forward passes."""
        return torch.autocast(self.dist.device.type, _PRECISIONS[self.config.amp], enabled=self.config.amp != "off")


def load_images(config: Config, progress: bool = False) -> tuple[data.Images, data.Images]:
    """Returns the images of a run, for training and test: :func:`subset` of :func:`list_images`."""
    return subset(config, list_images(config, progress))


def list_images(config: Config, progress: bool = False) -> tuple[Listing, Listing]:
    """Returns all training and all test images, which are not decoded yet.

    Args:
        config: The settings.
        progress: Show a progress bar while images are decoded.

    Raises:
        ConfigError: The two sets have different classes.
        DataError: Something is wrong with the files.
    """
    names = ("format", "images", "size", "cache", "classes", "skip_broken")
    options: dict[str, Any] = {name: getattr(config, name) for name in names} | {"progress": progress}
    try:
        train = listing(config.data, "train", **options)
        options["classes"] = len(train.classes)  # a list of test images may lack the last classes
        test = listing(config.test_data or config.data, "test", **options)
    except data.DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    if train.classes != test.classes:
        raise ConfigError(
            f"data: the {len(train.classes)} classes of the test images have other names than in training"
        )
    return train, test


def subset(config: Config, images: tuple[Listing, Listing]) -> tuple[data.Images, data.Images]:
    """Returns what the settings take of all images: the long-tailed subset, and what is tested on. Only these are decoded.

    With ``val`` that is held out of the training images before the subset is drawn, with ``val_share`` of the subset, of each
    class with two images at least one; no test image is looked at.

    Raises:
        ConfigError: There are not enough images.
        DataError: An image can't be read.
    """
    train, test = images
    classes, seed = len(train.classes), (config.data_seed + config.resample * config.seed) % 2**32
    try:
        if config.val is not None:
            train, test = _split(train, [config.val] * classes, seed)
        elif config.test_per_class is not None:
            test = test.take(data.longtail_subset(test.labels, [config.test_per_class] * classes, config.data_seed))
        if config.imbalance is not None:
            largest = config.n_max or min(train.counts())
            counts = data.longtail_counts(largest, classes, config.imbalance, config.profile)
            train = train.take(data.longtail_subset(train.labels, counts, seed))
        if config.val_share is not None:
            shares = [min(count - 1, max(1, round(config.val_share * count))) for count in train.counts()]
            train, test = _split(train, [max(0, share) for share in shares], seed)
    except ValueError as error:
        raise ConfigError(f"no such subset: {error}") from error
    return train.read(), test.read()


def _split(images: Listing, counts: list[int], seed: int) -> tuple[Listing, Listing]:
    """Returns the others, and ``counts[c]`` images of each class c."""
    held_out = data.longtail_subset(images.labels, counts, seed)
    rest = torch.ones(len(images), dtype=torch.bool).index_fill_(0, held_out, False).nonzero().flatten()
    return images.take(rest), images.take(held_out)


def test_images(config: Config, progress: bool) -> data.Images:
    """Returns the test images, whatever is held out of the training images."""
    _, test = list_images(config, progress)
    if config.test_per_class is not None:
        counts = [config.test_per_class] * len(test.classes)
        test = test.take(data.longtail_subset(test.labels, counts, config.data_seed))
    return test.read()


def prepare(
    config: Config, dist: Distributed, images: tuple[data.Images, data.Images] | None = None, progress: bool = False
) -> Run:
    """Returns the run before its first step; the same in every process except for random numbers.

    Raises:
        ConfigError: A setting does not fit.
        DataError: Something is wrong with the data.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.batch_size % dist.world_size:
        raise ConfigError(f"batch_size must be a multiple of the {dist.world_size} processes, got {config.batch_size}")
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel each
    if config.deterministic:  # cuBLAS reads it at its first use and raises without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    train, test = images or load_images(config, progress)
    counts = train.counts()
    if len(train.labels) < dist.world_size:
        raise ConfigError(f"data: {len(train.labels)} training images are too few for {dist.world_size} processes")
    run_checkpoint.seed_all(config.seed)
    network = network_of(config, train).to(dist.device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = dist.data_parallel(network)
    optimizer = _optimizer(config, _run_info(config, model, network, counts))
    loss = criterion(config, counts, dist.rank).to(dist.device)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=config.amp == "fp16")
    run_checkpoint.seed_all(config.seed + dist.rank)  # dropout must differ between processes
    return Run(
        config,
        dist,
        train,
        test,
        counts,
        network,
        model,
        torch.compile(model) if config.compile else model,
        loss,
        optimizer,
        LambdaLR(optimizer, config.factor),
        scaler,
        torch.Generator().manual_seed(config.seed),
        torch.Generator(dist.device).manual_seed(config.seed + dist.rank),
        data.Augment.for_training(train) if config.augment else data.Augment.for_testing(train),
        data.Augment.for_testing(train),
        _graph(config, dist, model, loss, optimizer, scaler) if config.graph else None,
    )


def _optimizer(config: Config, info: RunInfo) -> Optimizer:
    """Returns the optimizer. In a graph the base optimizer alone is a method that is never active."""
    if config.graph and config.method == "sgd":
        config = config.model_copy(update={"method": "sam", "options": {**config.options, "active": 0.0}})
    return create(config, info)


def _graph(
    config: Config, dist: Distributed, model: nn.Module, loss: Loss, optimizer: Any, scaler: torch.amp.GradScaler
) -> GraphStep:
    example = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)  # its dimensions and dtypes count
    autocast = None if config.amp == "off" else _PRECISIONS[config.amp]
    try:
        return graph_step(model, functools.partial(_losses, loss), optimizer, example, scaler=scaler, autocast=autocast)
    except ValueError as error:
        raise ConfigError(f"graph: {error}") from error


def _losses(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    return loss(logits, y, batch=None if loss.weight is None else y)


def _run_info(config: Config, model: nn.Module, network: nn.Module, counts: list[int]) -> RunInfo:
    per_epoch = -(-sum(counts) // config.batch_size)
    return RunInfo(model, network, counts, per_epoch, per_epoch * config.epochs)


def check(config: Config, train: data.Images) -> None:
    """Raises ConfigError unless network, loss and method can be made for these images."""
    network, counts = network_of(config, train), train.counts()
    criterion(config, counts)
    _optimizer(config, _run_info(config, network, network, counts))


def network_of(config: Config, train: data.Images) -> nn.Module:
    """Returns a new network for these images.

    Raises:
        ConfigError: There is no such network, or it does not accept such images.
    """
    cosine = config.loss in COSINE_LOSSES if config.cosine_head is None else config.cosine_head
    channels, height, width = train.pixels.shape[1:]
    try:
        return models.create(config.model, len(train.classes), (channels, height, width), cosine_head=cosine)
    except ValueError as error:
        raise ConfigError(f"model {config.model}: {error}") from error
