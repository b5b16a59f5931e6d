"""The hyperparameters of one run of a step, as rows, and where a captured graph reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ltsam_fast.ops import dispatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ltsam_fast.launch_args import Op

Call = tuple[str, "NDArray[np.float64]"]
"""A pass: the name of its op, and its hyperparameters, one row for each group."""


class Trace:
    """What one run of a step asks the ops for; a graph replays the kernels it saw, with the arguments they had.

    While it is :meth:`recording`, the ops tell :meth:`rows` about hyperparameters and :meth:`place` about all that kernels read
    of the host's. :meth:`update` brings other hyperparameters to the device before a replay, with one copy for each array that
    changed.

    Args:
        memory: Bytes on the device for all that, when a graph is captured. It is taken before the capture, outside the graph's
            pool: a replay writes over whatever else lies in the pool. A trace that only looks on counts in ``asked`` how many
            bytes such a step takes.

    Attributes:
        calls: The passes that have hyperparameters, in their order.
        asked: Bytes that were asked for.
    """

    def __init__(self, memory: Tensor | None = None) -> None:
        self.calls: list[Call] = []
        self.asked = 0
        self._memory = memory
        self._placed: list[tuple[NDArray[Any], Tensor]] = []

    def rows(self, op: Op, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hyperparameters of a pass, as this trace keeps them."""
        if op.hyper:
            rows = rows.copy()
            self.calls.append((op.name, rows))
        return rows

    def place(self, array: NDArray[Any]) -> Any:
        """An array of 8-byte numbers where a captured kernel reads it; else the array itself."""
        begin, self.asked = self.asked, self.asked + array.nbytes
        if self._memory is None:
            return array
        if self.asked > len(self._memory):
            raise RuntimeError(
                f"the captured step reads more than the {len(self._memory)} bytes that the step before it read"
            )
        dtype = torch.float64 if array.dtype == np.float64 else torch.int64
        place = self._memory[begin : self.asked].view(dtype).view(array.shape)
        self._placed.append((array, place))
        return place

    def upload(self) -> None:
        """Fills all places, after the capture."""
        for array, place in self._placed:
            _copy(array, place)

    def update(self, calls: list[Call]) -> None:
        """Makes hyperparameters those of ``calls``, which are of the same passes."""
        for (_, rows), (_, now) in zip(self.calls, calls, strict=True):
            if rows.tobytes() != now.tobytes():
                rows[...] = now
                for array, place in self._placed:
                    if array is rows:
                        _copy(array, place)

    def agrees(self, calls: list[Call]) -> bool:
        """Whether these are the passes, with the hyperparameters."""
        return [(name, rows.tolist()) for name, rows in self.calls] == [(name, rows.tolist()) for name, rows in calls]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Has the ops ask this trace."""
        token = dispatch.tracer.set(self)
        try:
            yield
        finally:
            dispatch.tracer.reset(token)


def _copy(array: NDArray[Any], place: Tensor) -> None:
    host = torch.from_numpy(array)
    # Pinned memory from torch's own cache, which does not give it away before the copy has been made.
    place.copy_(host.pin_memory() if place.is_cuda else host, non_blocking=True)
