"""Gradients by the list, of hidden weights too, and sections that Ctrl-C does not cut in two."""

from __future__ import annotations

import _signal  # the functions behind signal's, without the enums, which cost 5 us a call
import contextlib
import itertools
import operator
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.table import check_dense


class Uninterrupted:
    """Holds Ctrl-C back until weights, and the note of whether they are perturbed, agree again. About 1 us."""

    __slots__ = ("_handler", "_pending")

    def __enter__(self) -> None:
        self._pending: list[tuple[Any, ...]] = []
        self._handler = None
        if threading.current_thread() is threading.main_thread():  # no other thread runs Python's signal handlers
            handler = _signal.getsignal(_signal.SIGINT)
            if callable(handler):
                self._handler = handler
                _signal.signal(_signal.SIGINT, lambda *args: self._pending.append(args))

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            _signal.signal(_signal.SIGINT, self._handler)
            if self._pending:
                self._handler(*self._pending[0])


_NONE = type(None)  # `None in tensors` would compare element by element


def _same_items(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


_requires_grad = operator.attrgetter("requires_grad")
_grad = operator.attrgetter("grad")


def _gradients(params: list[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters that are not frozen. 50 ns each: with a comprehension it would be twice that."""
    if all(map(_requires_grad, params)):
        return list(map(_grad, params))
    return [param.grad if param.requires_grad else None for param in params]


def _swap_gradients(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Puts ``grads`` in place and returns what was there."""
    before = [param.grad for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return before


@contextlib.contextmanager
def gradients_aside(params: list[Tensor]) -> Iterator[None]:
    """Keeps gradients out of reach while a closure runs: it may begin with zero_grad(), as torch's documentation has it."""
    kept = list(map(_grad, params))
    empty = all(map(operator.is_, kept, itertools.repeat(None)))
    if not empty:
        _swap_gradients(params, [None] * len(params))
    try:
        yield
    finally:  # what the closure left, such as by another optimizer's step, is not this step's
        if not empty or {*map(type, map(_grad, params))} - {_NONE}:
            _swap_gradients(params, kept)


def check_all_dense(grads: Iterable[Tensor | None]) -> None:
    """Raises ValueError for a sparse gradient, where no op would before torch does."""
    for i, grad in enumerate(grads):
        if grad is not None:
            check_dense(f"grads[{i}]", grad)


class Differentiable:
    """Losses whose gradients are wanted one weighting after the other, those of weights in reentrant checkpoints included.

    ``torch.autograd.grad`` does not see what a ``torch.utils.checkpoint`` with ``use_reentrant=True`` runs; ``backward`` does.

    Args:
        losses: (B,), with their graph.
        params: T weights.
        others: Further weights that the losses may depend on: their ``grad`` stays as it is too.
    """

    def __init__(self, losses: Tensor, params: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
        self._losses, self._params = losses, list(params)
        self._all = list(dict.fromkeys((*self._params, *others))) if AutogradGraph(losses, []).reentrant else None

    def gradients(self, weights: Tensor, retain_graph: bool = True) -> list[Tensor | None]:
        """The gradients of ``sum_j weights_j losses_j``; None for a weight that they don't depend on."""
        if self._all is None:
            return list(torch.autograd.grad(self._losses, self._params, weights, retain_graph, allow_unused=True))
        before = _swap_gradients(self._all, [None] * len(self._all))
        try:
            torch.autograd.backward(self._losses, weights, retain_graph)
        finally:
            found = _swap_gradients(self._all, before)
        return found[: len(self._params)]
