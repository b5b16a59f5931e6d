"""A whole training step, forwards, backwards and the optimizer's phases, captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ltsam_fast.backend import backend_for
from ltsam_fast.ops.checks import shown
from ltsam_fast.optim.base_step import FUSED, is_fused, step_without_hooks
from ltsam_fast.optim.closures import parts_of
from ltsam_fast.optim.dry_run import Outline, outline
from ltsam_fast.optim.optimizer import SharpnessAware
from ltsam_fast.optim.options import COUNTS
from ltsam_fast.optim.parallel import Single, workers_of
from ltsam_fast.optim.trace import Trace

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

    ``step(x, y, weights=(u, v))`` weighs the samples, see :meth:`SharpnessAware.step`.

    The first ``warmup`` steps of a kind run as usual, and count: they create what a step keeps. The next one is captured.
    Numbers in ``param_groups`` may change at any time, by schedulers too; they reach the graph before each replay: the method's
    rule is run once more, without tensors. What a step decides by them (LookSAM's every k-th, SSE-SAM's switch), another value
    of an option that groups share, another batch size, frozen parameters or ``model.eval()`` make another kind of step, with a
    graph of its own. Loading a checkpoint, into the optimizer or by moving the model, starts over.

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
    """Steps that launch the same kernels on the same memory.

    Attributes:
        key: What tells them from others.
        seen: How many were taken before the capture.
        asked: Bytes that the last of these asked its trace for.
    """

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self.seen = 0
        self.asked = 0
        self.trace = Trace()
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
        self._take_step = step_without_hooks(type(optimizer))
        self._dry_workers = Single()
        self._kinds: dict[tuple[torch.Size, ...], list[_Kind]] = {}
        self._addresses: tuple[int, ...] = ()
        # What is loaded lies elsewhere than what the graphs update.
        optimizer.register_load_state_dict_post_hook(lambda _: self._kinds.clear())

    def __call__(self, *batch: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Takes one training step."""
        self._check_batch(batch)
        optimizer, size = self.optimizer, len(batch[-1])
        if weights is not None:
            batch = (*batch, *optimizer.checked_weights(weights, 1))
        optimizer._call_hooks(_global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks)
        planned = self._plan(size, weights is not None)
        kind = self._kind_of(tuple(one.shape for one in batch), (*self._structure(), *planned.key))
        if kind.replay is None and kind.seen < self.warmup:
            loss = self._eager(kind, batch)
        else:
            if kind.replay is None:
                self._capture(kind, batch, planned)
            loss = self._replay(kind, batch, planned)
        optimizer._call_hooks(_global_optimizer_post_hooks, optimizer._optimizer_step_post_hooks)
        return loss

    def _plan(self, size: int, weighed: bool) -> Outline:
        """What the step will do."""
        optimizer = self.optimizer
        if optimizer._running is not None:
            optimizer._check_turn("step")
        # What depends on the last step's overflow, and what the host would fill, is settled before.
        optimizer.skipped.drop_doubtful()
        optimizer.skipped.count(optimizer.param_groups, optimizer.all_params()[0])
        return outline(optimizer, size, self.scaler is not None, self._dry_workers, weighed)

    def _kind_of(self, shapes: tuple[torch.Size, ...], key: tuple[Any, ...]) -> _Kind:
        """The steps with this key; as of now, if there are none yet."""
        if (addresses := self._lie_at()) != self._addresses:
            self._kinds.clear()
            self._addresses = addresses
        kinds = self._kinds.setdefault(shapes, [])
        kind = next((kind for kind in kinds if kind.key == key), None)
        if kind is None:
            if len(kinds) == _KINDS and not any(one.replay for one in kinds):
                warnings.warn(
                    f"graph_step has seen {_KINDS} kinds of steps, none of them often enough to be captured: something in the "
                    "optimizer's options or in the loss changes with every step",
                    stacklevel=3,
                )
            if len(kinds) == _KINDS:
                kinds.remove(next((one for one in kinds if not one.replay), kinds[0]))
            kinds.append(kind := _Kind(key))
        return kind

    def _step(self, batch: Sequence[Tensor]) -> Tensor:
        count = len(self._expected)
        *inputs, targets = batch[:count]
        weights = [tuple(pair) for pair in batch[count:]] or None

        def closure(index: Tensor | None = None) -> Tensor:
            x, y = (inputs, targets) if index is None else ([one[index] for one in inputs], targets[index])
            with self._autocast():
                return self.loss_fn(self.model(*x), y)

        self.optimizer.captures = True
        try:
            loss = self._take_step(self.optimizer, closure, targets, self.scaler, weights=weights)
        finally:
            self.optimizer.captures = False
        if self.scaler is not None:
            self.scaler.update()
        return loss  # type: ignore[no-any-return]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        # A cast weight that outlives the pass would be the unperturbed one.
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def _eager(self, kind: _Kind, batch: Sequence[Tensor]) -> Tensor:
        """An ordinary step, which shows how much memory a trace takes."""
        trace = Trace()
        with self._machine.aside(), trace.recording():
            loss = self._step([one.to(self.device, non_blocking=True) for one in batch])
        kind.asked = trace.asked
        kind.seen += 1
        return loss

    def _capture(self, kind: _Kind, batch: Sequence[Tensor], planned: Outline) -> None:
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        before = [dict(group) for group in groups]
        # What the host fills must lie outside the graph's memory: there a replay writes over it.
        batch = [one.to(self.device, copy=True) for one in batch]
        trace = Trace(self._machine.space(kind.asked))
        # Tables of its own, with scratch memory and copies of its own, which live as long as the graph.
        workers, optimizer._workers = optimizer._workers, Single(optimizer.model)
        try:
            with trace.recording():
                kind.replay, kind.loss = self._machine.capture(lambda: self._step(batch))
            if not trace.agrees(planned.calls):
                kind.replay = None
                raise RuntimeError("its rule takes other passes, or with other hyperparameters, than without tensors")
        except Exception as error:
            # Nothing ran, so no weight is perturbed, whatever the host believes. Restoring may have failed half-way.
            optimizer.discard_step()
            kind.seen = 0
            self._machine = Machine(self.device)  # a stream and memory that the failed capture has not seen
            raise RuntimeError(
                f"{type(optimizer).__name__}'s step with this model and loss cannot be captured in a CUDA graph, "
                f"call optimizer.step() instead: {_what_failed(error)}"
            ) from error
        finally:
            optimizer._workers = workers
            for group, values in zip(groups, before, strict=True):  # replays count
                group.update(values)
        kind.trace, kind.batch = trace, batch
        trace.upload()
        # A graph knows addresses only: what lies there must stay, though the optimizer may let go of it.
        kind.alive = optimizer.kept_memory()

    def _replay(self, kind: _Kind, batch: Sequence[Tensor], planned: Outline) -> Tensor:
        optimizer = self.optimizer
        for own, given in zip(kind.batch, batch, strict=True):
            own.copy_(given, non_blocking=True)
        kind.trace.update(planned.calls)
        kind.replay()  # type: ignore[misc]
        group = optimizer.param_groups[0]
        optimizer.count_step(group["steps"], group["base_steps"])
        optimizer._opt_called = optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        return kind.loss.clone()  # type: ignore[union-attr]

    def _check_batch(self, batch: Sequence[Tensor]) -> None:
        if len(batch) < 2 or not all(isinstance(one, Tensor) for one in batch):
            raise ValueError(f"batch must be inputs and targets, tensors, got {[type(one).__name__ for one in batch]}")
        kinds = [(one.dim(), one.dtype) for one in batch]
        if kinds != getattr(self, "_expected", kinds):
            raise ValueError(f"batch must have dimensions and dtypes of example_batch, {self._expected}, got {kinds}")

    def _lie_at(self) -> tuple[int, ...]:
        params, _ = self.optimizer.all_params()
        return (*(param.data_ptr() for param in params), *(buffer.data_ptr() for buffer in self.model.buffers()))

    def _structure(self) -> tuple[Any, ...]:
        """What decides which kernels run, besides the rule: of the groups' numbers, whether they are zero."""
        optimizer, options = self.optimizer, self.optimizer.options
        numbers = [
            bool(value) if name not in options or options[name].per_group else value
            for group in optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", *COUNTS)
        ]
        return (
            tuple(module.training for module in self.model.modules()),
            tuple(_facts(self.loss_fn)),
            tuple(param.requires_grad for param in optimizer.all_params()[0]),
            tuple(numbers),
            optimizer.skipped.memory is None,
        )


_KINDS = 32
"""Kinds of steps of one batch size that are told apart. A method that never repeats itself would make ever more: those that
are not captured go first."""


def _what_failed(error: BaseException) -> str:
    """What went wrong first, and last: after a capture that failed cleaning up fails too."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    return ", then: ".join(
        dict.fromkeys(str(one).partition("\n")[0] for one in (first, error))
    )  # CUDA's have many lines


def _facts(value: Any, depth: int = 3) -> Iterator[Any]:
    """What a loss depends on, as far as that can be seen: a graph reads these tensors, and was made with these numbers.

    Looked at are modules, tensors and plain values; also those that a function refers to, that a partial or a method is bound
    to, and that a callable object has.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        yield value
    elif isinstance(value, Tensor):
        yield value.data_ptr(), value.dtype, value.shape
    elif isinstance(value, torch.nn.Module):
        for module in value.modules():
            tensors = (*module._buffers.values(), *module._parameters.values())
            for one in (*vars(module).values(), *tensors):
                yield from _facts(one, 0)
    elif depth:
        for one in parts_of(value):
            yield from _facts(one, depth - 1)


class Machine:
    """What is asked of CUDA."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the stream that graphs are captured on, where autograd then finds its nodes."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def space(self, size: int) -> Tensor:
        """Bytes outside the graphs' memory."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Captures ``work``; returns what replays it, and its result, which every replay overwrites."""
        if not self._graphs:  # memory of graphs that are gone is not theirs any more
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph waits for the current device, and leaves its stream current if the capture cannot be ended.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            _nothing_collected(),
        ):
            # Graphs run one after the other, so they may share memory. Other threads (a loader's) may go on using CUDA.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        self._graphs.add(graph)
        return graph.replay, result


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keeps Python's garbage collector out of a capture, which ends when memory or another graph is given back to CUDA."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check(model: torch.nn.Module, optimizer: SharpnessAware, warmup: int) -> torch.device:
    """Refuses what cannot be captured; returns the device."""
    if not isinstance(optimizer, SharpnessAware):
        raise TypeError(f"optimizer must be a method of ltsam_fast, got {type(optimizer).__name__}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"warmup must be a whole number >= 1, got {warmup!r}")
    name = type(optimizer).__name__
    devices = {param.device for param in (*model.parameters(), *optimizer.all_params()[0])}
    if len(devices) != 1 or next(iter(devices)).type != Machine.device_type:
        raise ValueError(
            f"model must be on one CUDA device, got {sorted(map(str, devices))}: move it there, or call optimizer.step()"
        )
    (device,) = devices
    if optimizer.host_only:
        raise ValueError(f"optimizer must not be {name}: {optimizer.host_only}; call optimizer.step() instead")
    if not is_fused(optimizer.base_optimizer):
        raise ValueError(
            f"optimizer must be built on {', '.join(one.__name__ for one in FUSED)}, whose step is fused, got "
            f"{type(optimizer.base_optimizer).__name__}"
        )
    if any(isinstance(value, Tensor) for group in optimizer.param_groups for value in group.values()):
        raise ValueError("optimizer must have numbers as options, not tensors: they are read anew before each replay")
    if type(workers_of(optimizer.model, optimizer._sharded)) is not Single:
        raise ValueError("optimizer must not be one of several workers': call optimizer.step() under DDP and FSDP2")
    if not backend_for(device).CAPTURABLE:
        raise ValueError("backend must be a fused one for graph_step: the torch backend would bake its numbers in")
    return device
