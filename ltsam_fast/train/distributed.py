"""The processes of a run: one, or those that torchrun started, by torch.distributed."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltsam_fast.backend import backend_for
from ltsam_fast.train.config import ConfigError


@dataclass(frozen=True)
class Distributed:
    """Rank, world size and device of this process, and the collectives that a run needs; no-ops for a single process."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, which have equal shapes, concatenated by rank."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.cat(gathered)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the tensors of rank 0 to every process."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the values of all processes by rank."""
        found: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Returns the network, wrapped in DistributedDataParallel if there are several processes."""
        if self.world_size == 1:
            return network
        if self.device.type == "cuda":
            return DistributedDataParallel(network, [self.device])
        # DDP keeps its process group alive, and gloo's threads abort a program that ends while they free a tensor
        # (pytorch/pytorch#190489). So DDP gets a group of its own, and the default group is destroyed.
        group = _within_timeout(lambda: dist.new_group(timeout=timeout()))
        return DistributedDataParallel(network, process_group=group)


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[Distributed]:
    """Initializes the process group that torchrun started, gloo on the CPU and nccl on GPUs; without torchrun there is none.

    Raises:
        ConfigError: The device is unknown or not available.
    """
    rank, world_size = rank_and_world_size()
    device = device_of(device_name, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else None)
    initializes = world_size > 1 and not dist.is_initialized()
    if initializes:
        backend = "nccl" if device.type == "cuda" else "gloo"
        _within_timeout(lambda: dist.init_process_group(backend, timeout=timeout()))
    try:
        yield Distributed(rank, world_size, device)
    finally:
        if initializes:
            dist.destroy_process_group()


def _within_timeout(call: Callable[[], Any]) -> Any:
    """Returns what a call that makes a process group returns; raises RuntimeError if it takes longer than it may.

    Its messages to the store, which is in process 0 or torchrun, have no timeout of their own, and no signal ends them: they
    are sent by a thread, which is left behind. The call's own timeouts, of which two may follow each other, come first.
    """
    limit = 2 * (timeout() or dist.default_pg_timeout).total_seconds()
    returned: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # raised where the call was asked for
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if raised:
        raise raised[0]
    if not returned:
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RuntimeError(f"no answer from {address} within {limit:g} s, twice the timeout, see LTSAM_TIMEOUT")
    return returned[0]


def timeout() -> datetime.timedelta | None:
    """Returns how long a process waits for another before it fails, ``LTSAM_TIMEOUT`` in seconds; None: torch's default.

    Raises:
        ConfigError: It is not a number > 0.
    """
    text = os.environ.get("LTSAM_TIMEOUT")
    if text is None:
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if (seconds := float(text)) > 0:
            return datetime.timedelta(seconds=seconds)
    raise ConfigError(f"LTSAM_TIMEOUT must be a number of seconds > 0, got {text!r}")


def rank_and_world_size() -> tuple[int, int]:
    """Returns rank and world size from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero() -> bool:
    """Returns whether this is the process that prints and writes files."""
    return rank_and_world_size()[0] == 0


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """Returns the device of that name, for a process with that local rank.

    Raises:
        ConfigError: It is unknown or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name!r} is not available: torch sees no GPU; use cpu or auto")
        number = device.index if local_rank is None else local_rank
        if number is not None:
            if number >= torch.cuda.device_count():
                raise ConfigError(f"device cuda:{number} is not available: torch sees {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(number)
            device = torch.device("cuda", number)
    elif device.type != "cpu":
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}")
    try:
        backend_for(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return device


def machine(device: torch.device, threads: int | None = None) -> str:
    """Returns the name of what is computed on, such as "AMD EPYC, 1 thread"; with torch's number of threads by default."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = threads or torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
