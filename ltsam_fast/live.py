"""Numbers that a captured step reads anew before each replay, and the decisions that were taken on them.

A CUDA graph replays the kernels it saw, with the arguments they had. Learning rates change, steps are counted: so while a step
is traced its hyperparameters are :class:`Live` numbers. What is computed from one is live too, all the way into the tables of
hyperparameters that kernels read from device memory; and what the step decides by one, by comparing it, is noted as a guard:
the trace stands for another step only if all its guards hold there.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltsam_fast.launch_args import Op
from ltsam_fast.ops import dispatch
from ltsam_fast.ops.checks import checked_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Live(float):
    """A number that can be read again. Arithmetic keeps it live; comparing or converting it adds a guard to the trace."""

    read: Callable[[], Any]
    trace: Trace

    def __new__(cls, read: Callable[[], Any], trace: Trace) -> Live:
        """Reads it for the first time."""
        self = super().__new__(cls, read())
        self.read, self.trace = read, trace
        return self

    def __reduce__(self) -> Any:  # a copy is a plain number
        return float, (float.__float__(self),)

    def __bool__(self) -> bool:
        return bool(self.trace.decide(bool, self))

    def __float__(self) -> float:
        return float(self.trace.decide(_plain, self))

    def __int__(self) -> int:
        return int(self.trace.decide(int, self))

    __trunc__ = __index__ = __int__
    __hash__ = float.__hash__


def _plain(value: Any) -> float:
    return float.__float__(value) if isinstance(value, Live) else float(value)


def _values(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(argument.read() if isinstance(argument, Live) else argument for argument in arguments)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Live, *others: Any) -> Any:
        return Live(lambda: function(*_values((self, *others))), self.trace)

    return method


def _decision(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Live, *others: Any) -> Any:
        return self.trace.decide(function, self, *others)

    return method


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Live, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(Live, f"__r{_name}__", _arithmetic(_swapped(getattr(operator, _name))))
for _name in ("neg", "abs"):
    setattr(Live, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Live, f"__{_name}__", _decision(getattr(operator, _name)))


class Watched(NamedTuple):
    """Hyperparameters of one pass: where they come from, and the rows that kernels read."""

    op: Op
    columns: list[Any]
    rows: NDArray[np.float64]


class Trace:
    """What one run of a step read and decided.

    While it is being :meth:`recorded <recording>` the ops ask :meth:`rows` and :meth:`place` for what kernels read of the
    host's; :meth:`refresh` brings it up to date before a replay, with one copy for each array that changed.

    Args:
        space: Bytes on the device for all that, when a graph is captured. It is taken before the capture, outside the graph's
            pool: a replay writes over whatever else lies in the pool. A trace that only looks on counts in ``asked`` how many
            bytes such a step takes.
    """

    def __init__(self, space: Tensor | None = None) -> None:
        self.asked = 0
        self._space = space
        self.held: dict[tuple[int, str], Any] = {}
        """What the options are while live numbers stand in for them."""
        self._guards: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = []
        self._watched: list[Watched] = []
        self._placed: list[tuple[NDArray[Any], Tensor]] = []

    def decide(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Evaluates ``function`` and notes the outcome."""
        outcome = function(*_values(arguments))
        self._guards.append((function, arguments, outcome))
        return outcome

    def holds(self) -> bool:
        """Whether everything would be decided as it was."""
        return all(function(*_values(arguments)) == outcome for function, arguments, outcome in self._guards)

    def rows(self, op: Op, columns: list[Any]) -> NDArray[np.float64]:
        """Hyperparameters as rows, of which those that are live will follow."""
        rows = checked_rows(op, [_now(column) for column in columns])
        if any(isinstance(value, Live) for column in columns for value in _as_tuple(column)):
            self._watched.append(Watched(op, columns, rows))
        return rows

    def place(self, array: NDArray[Any]) -> Any:
        """An array of 8-byte numbers where a captured kernel reads it; else the array itself."""
        begin, self.asked = self.asked, self.asked + array.nbytes
        if self._space is None:
            return array
        if self.asked > len(self._space):
            raise RuntimeError(
                f"the captured step reads more than the {len(self._space)} bytes that the step before it read"
            )
        dtype = torch.float64 if array.dtype == np.float64 else torch.int64
        place = self._space[begin : self.asked].view(dtype).view(array.shape)
        self._placed.append((array, place))
        return place

    def refresh(self, everything: bool = False) -> None:
        """Reads all live numbers again and brings to the device what changed, or everything."""
        changed = set()
        for watched in self._watched:
            now = checked_rows(watched.op, [_now(column) for column in watched.columns])
            if not np.array_equal(now, watched.rows):
                watched.rows[...] = now
                changed.add(id(watched.rows))
        for array, place in self._placed:
            if everything or id(array) in changed:
                host = torch.from_numpy(array)
                # Pinned memory from torch's own cache, which does not give it away before the copy has been made.
                place.copy_(host.pin_memory() if place.is_cuda else host, non_blocking=True)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Has the ops keep their hyperparameters here."""
        before, dispatch.tracer = dispatch.tracer, self
        try:
            yield
        finally:
            dispatch.tracer = before


def _as_tuple(column: Any) -> tuple[Any, ...]:
    return column if isinstance(column, tuple) else (column,)


def _now(column: Any) -> Any:
    return tuple(_values(column)) if isinstance(column, tuple) else _values((column,))[0]


@contextlib.contextmanager
def live_options(groups: list[dict[str, Any]], trace: Trace) -> Iterator[None]:
    """Makes every number in the parameter groups live for a while. Numbers that the step counts up stay counted up."""
    before = [{key: value for key, value in group.items() if key != "params" and _is_live(value)} for group in groups]
    trace.held = {(id(group), key): old[key] for group, old in zip(groups, before, strict=True) for key in old}
    placed = [{key: _lifted(group, key, trace) for key in old} for group, old in zip(groups, before, strict=True)]
    try:
        for group, live in zip(groups, placed, strict=True):
            group.update(live)
        yield
    finally:
        trace.held = {}
        for group, old, new in zip(groups, before, placed, strict=True):
            for key, value in old.items():
                now = group[key]
                group[key] = value if now is new[key] else type(value)(_plain(now))


def _is_live(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_live, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lifted(group: dict[str, Any], key: str, trace: Trace) -> Any:
    def read() -> Any:
        return trace.held[id(group), key] if trace.held else group[key]

    if isinstance(read(), tuple):
        return tuple(Live(lambda i=i: read()[i], trace) for i in range(len(read())))  # type: ignore[misc]
    return Live(read, trace)
