"""A whole training step, forwards, backwards and the optimizer's phases, captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from ltsam_fast import reference
from ltsam_fast.backend import backend_for
from ltsam_fast.live import Trace, live_options
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.descent import no_hooks
from ltsam_fast.optim.fused import FUSED

Loss = Callable[[Any, Tensor], Tensor]


def graph_step(
    model: torch.nn.Module,
    loss_fn: Loss,
    optimizer: SharpnessAware,
    example_batch: Sequence[Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    warmup: int = 3,
) -> GraphStep:
    """Returns a training step ``step(*batch)`` that replays a CUDA graph: one launch in place of thousands.

    .. code-block:: python

        step = lf.graph_step(model, functools.partial(F.cross_entropy, reduction="none"), opt, (x, y))
        for x, y in loader:
            loss = step(x, y)
        scheduler.step()

    The first ``warmup`` steps of a kind run as usual, and count: they create what a step keeps. The next one is captured.
    Numbers in ``param_groups`` may change at any time, by schedulers too; they reach the graph before each replay. What a step
    decides by them (LookSAM's every k-th, SSE-SAM's switch), another batch size, frozen parameters or ``model.eval()`` make
    another kind of step, with a graph of its own. Loading a checkpoint, into the optimizer or by moving the model, starts over.

    Args:
        model: On a CUDA device. ``model(*inputs)`` and its backward must not wait for the device nor depend on the host.
        loss_fn: ``loss_fn(outputs, targets)`` gives the per-sample losses, shape (B,): use ``reduction="none"``.
        optimizer: A method of this package on SGD, Adam or AdamW; not CC-SAM, which looks up the batch's classes on the host.
        example_batch: Inputs, then targets (B,), int64: the shapes and dtypes to be expected. Of other sizes each gets a graph.
        scaler: A GradScaler; its ``update()`` is part of the step, so do not call it.
        autocast: ``torch.bfloat16`` or ``torch.float16``: the forward runs under autocast.
        warmup: Steps of each kind before the capture, >= 1.

    Returns:
        A :class:`GraphStep`. Called with a batch, on any device, it returns the mean loss at the unperturbed weights, 0-d, on
        the model's device, without waiting for it.

    Raises:
        TypeError: ``optimizer`` is not one of this package.
        ValueError: ``model`` is not on a CUDA device, or the optimizer's method, base or backend cannot be captured.
        RuntimeError: From a step: the model, loss or method did what a CUDA graph cannot hold. Weights are as they were.
    """
    return GraphStep(model, loss_fn, optimizer, example_batch, scaler, autocast, warmup)


class _Kind:
    """Steps that launch the same kernels on the same memory."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seen = 0
        self.batch: list[Tensor] = []
        self.loss: Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.alive: list[Any] = []


class GraphStep:
    """What :func:`graph_step` returns."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Loss,
        optimizer: SharpnessAware,
        example_batch: Sequence[Tensor],
        scaler: Any,
        autocast: torch.dtype | None,
        warmup: int,
    ) -> None:
        device = _check(model, optimizer, warmup)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.autocast, self.warmup, self.device = autocast, warmup, device
        self._machine = Machine(device)
        self._check_batch(example_batch)
        self._expected = [(one.dim(), one.dtype) for one in example_batch]
        self._kinds: dict[Any, list[_Kind]] = {}
        self._addresses: tuple[int, ...] = ()
        # What is loaded lies elsewhere than what the graphs update.
        optimizer.register_load_state_dict_post_hook(lambda _: self._kinds.clear())

    def __call__(self, *batch: Tensor) -> Tensor:
        """Takes one training step."""
        self._check_batch(batch)
        if (addresses := self._lie_at()) != self._addresses:
            self._kinds.clear()
            self._addresses = addresses
        kinds = self._kinds.setdefault((tuple(one.shape for one in batch), self._structure()), [])
        kind = next((kind for kind in kinds if kind.trace.holds()), None)
        if kind is None or kind.seen < self.warmup:
            return self._eager(batch, kinds, kind)
        if kind.replay is None:
            self._capture(kind, batch)
        return self._replay(kind, batch)

    def _step(self, batch: Sequence[Tensor]) -> Tensor:
        *inputs, targets = batch

        def closure(index: Tensor | None = None) -> Tensor:
            x, y = (inputs, targets) if index is None else ([one[index] for one in inputs], targets[index])
            with self._autocast():
                return self.loss_fn(self.model(*x), y)

        loss = self.optimizer.step(closure, targets=targets, scaler=self.scaler)
        if self.scaler is not None:
            self.scaler.update()
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        # A cast weight that outlives the pass would be the unperturbed one.
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def _eager(self, batch: Sequence[Tensor], kinds: list[_Kind], kind: _Kind | None) -> Tensor:
        """An ordinary step, which shows what it decides by numbers that may change."""
        trace = Trace()
        with self._machine.aside(), live_options(self.optimizer.param_groups, trace), trace.recording():
            loss = self._step([one.to(self.device, non_blocking=True) for one in batch])
        if kind is None:
            kinds.append(kind := _Kind(trace))
            del kinds[:-_KINDS]
        kind.trace = trace
        kind.seen += 1
        return loss

    def _capture(self, kind: _Kind, batch: Sequence[Tensor]) -> None:
        groups = self.optimizer.param_groups
        taken = [group["taken"] for group in groups]
        kind.batch = [one.to(self.device, copy=True) for one in batch]
        kind.trace = trace = Trace(capturing=True)
        for parts in self._parts():
            for part in parts:  # what a backend uploaded before would be its own to let go of
                part.cache.clear()
        try:
            own = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
            # Hooks are called at each replay: they must not be captured.
            with no_hooks(*own), live_options(groups, trace), trace.recording():
                kind.replay, kind.loss = self._machine.capture(lambda: self._step(kind.batch))
        except Exception as error:
            self.optimizer._forget()  # nothing ran, so no weight is perturbed, whatever the host believes
            raise RuntimeError(
                f"{type(self.optimizer).__name__}'s step with this model and loss cannot be captured in a CUDA graph, "
                f"call optimizer.step() instead: {error}"
            ) from error
        finally:
            for group, count in zip(groups, taken, strict=True):  # replays count
                group["taken"] = count
        trace.refresh(everything=True)
        # A graph knows addresses only: what lies there must stay, though the optimizer may let go of it.
        kind.alive = self._parts() + list(self.optimizer._backups.values())

    def _parts(self) -> list[Any]:
        tables = (*self.optimizer._tables.values(), self.optimizer._update._table)
        return [list(table.parts) for table in tables if table]

    def _replay(self, kind: _Kind, batch: Sequence[Tensor]) -> Tensor:
        optimizer = self.optimizer
        optimizer._call_hooks(torch_optimizer._global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks)
        for own, given in zip(kind.batch, batch, strict=True):
            own.copy_(given, non_blocking=True)
        kind.trace.refresh()
        kind.replay()  # type: ignore[misc]
        optimizer._count_step()
        optimizer._opt_called = True
        optimizer._call_hooks(torch_optimizer._global_optimizer_post_hooks, optimizer._optimizer_step_post_hooks)
        return kind.loss.clone()  # type: ignore[union-attr]

    def _check_batch(self, batch: Sequence[Tensor]) -> None:
        if len(batch) < 2 or not all(isinstance(one, Tensor) for one in batch):
            raise ValueError(f"batch must be inputs and targets, tensors, got {[type(one).__name__ for one in batch]}")
        kinds = [(one.dim(), one.dtype) for one in batch]
        if kinds != getattr(self, "_expected", kinds):
            raise ValueError(f"batch must have dimensions and dtypes of example_batch, {self._expected}, got {kinds}")

    def _lie_at(self) -> tuple[int, ...]:
        params, _ = self.optimizer._parameters()
        return (*(param.data_ptr() for param in params), *(buffer.data_ptr() for buffer in self.model.buffers()))

    def _structure(self) -> tuple[Any, ...]:
        """What decides which kernels run, besides the numbers in the parameter groups."""
        optimizer = self.optimizer
        fixed = [getattr(optimizer, name) for name in optimizer._kept]
        fixed += [value for group in optimizer.param_groups for value in group.values()]
        return (
            tuple(module.training for module in self.model.modules()),
            tuple(param.requires_grad for param in optimizer._parameters()[0]),
            tuple(value for value in fixed if value is None or isinstance(value, (bool, str))),
            tuple(value for value in fixed[: len(optimizer._kept)] if isinstance(value, (int, float))),
        )


_KINDS = 32
"""Kinds of steps of one batch size that are told apart; a method that never repeats itself would make ever more."""


class Machine:
    """What is asked of CUDA."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the stream that graphs are captured on, where autograd then finds its nodes."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Captures ``work``; returns what replays it, and its result, which every replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        # Graphs run one after the other, so they may share memory. Other threads (a loader's) may go on using CUDA.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


def _check(model: torch.nn.Module, optimizer: SharpnessAware, warmup: int) -> torch.device:
    """Refuses what cannot be captured; returns the device."""
    if not isinstance(optimizer, SharpnessAware):
        raise TypeError(f"optimizer must be a method of ltsam_fast, got {type(optimizer).__name__}")
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"warmup must be a whole number >= 1, got {warmup!r}")
    name = type(optimizer).__name__
    devices = {param.device for param in (*model.parameters(), *optimizer._parameters()[0])}
    if len(devices) != 1 or next(iter(devices)).type != Machine.device_type:
        raise ValueError(
            f"model must be on one CUDA device, got {sorted(map(str, devices))}: move it there, or call optimizer.step()"
        )
    (device,) = devices
    if optimizer._uncapturable:
        raise ValueError(f"optimizer must not be {name}: {optimizer._uncapturable}; call optimizer.step() instead")
    if type(optimizer.base_optimizer) not in FUSED:
        raise ValueError(
            f"optimizer must be built on {', '.join(one.__name__ for one in FUSED)}, whose step is fused, got "
            f"{type(optimizer.base_optimizer).__name__}"
        )
    if any(isinstance(value, Tensor) for group in optimizer.param_groups for value in group.values()):
        raise ValueError("optimizer must have numbers as options, not tensors: they are read anew before each replay")
    if optimizer._distributed or optimizer._sharded:
        raise ValueError("optimizer must not be one of several workers': call optimizer.step() under DDP and FSDP2")
    if backend_for(device) is reference:
        raise ValueError("backend must be a fused one for graph_step: the torch backend would bake its numbers in")
    return device
