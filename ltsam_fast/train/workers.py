"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltsam_fast.train.config import ConfigError


@dataclass(frozen=True)
class Workers:
    """This process's number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def joined(self, share: Tensor) -> Tensor:
        """The shares of all processes, equally many rows each, in order."""
        if self.size == 1:
            return share
        parts = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(parts, share)
        return torch.cat(parts)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process what the first one has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in order; to all of them."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def replica(self, network: nn.Module) -> nn.Module:
        """The network as this process's copy of it, kept equal to the others' by DistributedDataParallel."""
        if self.size == 1:
            return network
        if self.device.type == "cuda":
            return DistributedDataParallel(network, [self.device])
        # A process group lives as long as what DDP leaves behind of itself, and gloo's threads abort a program that ends
        # while they let go of a tensor (pytorch/pytorch#190489): it gets a group of its own, and the default one ends.
        return DistributedDataParallel(network, process_group=dist.new_group())


@contextlib.contextmanager
def workers(device: str) -> Iterator[Workers]:
    """Joins the processes that torchrun started, gloo on the CPU and nccl on GPUs; alone without torchrun.

    Raises:
        ConfigError: The device is unknown or not there.
    """
    rank, size = place()
    here = device_of(device, int(os.environ.get("LOCAL_RANK", 0)) if size > 1 else None)
    joins = size > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Workers(rank, size, here)
    finally:
        if joins:
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's number, and how many torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return place()[0] == 0


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name, for a process of that number among those of its machine.

    Raises:
        ConfigError: It is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name!r} is not there: torch sees no GPU; use cpu or auto")
        number = device.index if local_rank is None else local_rank
        if number is not None:
            if number >= torch.cuda.device_count():
                raise ConfigError(f"device cuda:{number} is not there: torch sees {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(number)
            device = torch.device("cuda", number)
    elif device.type != "cpu":
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}")
    return device
