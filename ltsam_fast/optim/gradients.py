"""Gradients as a rule sees them: one tensor for each parameter, combined lazily, so that a pass over memory adds them up."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.table import check_dense

Factor = float | Tensor
"""A number, or one on the device, 0-d."""


class Combination:
    """A sum of factors times gradients, at most two different ones: ``(1 + a) * g_p - alpha * g``."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Gradient, Factor]) -> None:
        self.terms = terms

    def __rmul__(self, factor: Factor) -> Combination:
        return Combination({gradient: factor * own for gradient, own in self.terms.items()})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Has ``tensor * gradient`` come here at once: torch would try to multiply first."""
        if function is Tensor.mul:
            factor, combination = arguments
            return combination.__rmul__(factor)
        return NotImplemented

    def __add__(self, other: Combination) -> Combination:
        terms = dict(self.terms)
        for gradient, factor in other.terms.items():
            terms[gradient] = terms[gradient] + factor if gradient in terms else factor
        if len(terms) > 2:
            raise ValueError(f"a combination has two gradients at most, got {len(terms)}")
        return Combination(terms)

    def __sub__(self, other: Combination) -> Combination:
        return self + -1.0 * other


class Gradient(Combination):
    """A gradient: a tensor, or None, for each parameter of the optimizer.

    Attributes:
        tensors: The tensors, in the order of the groups.
        number: Which pass of the step it is from; -1: none, it is state.
        averaged: Whether it is the mean over all workers already.
    """

    __slots__ = ("averaged", "number", "tensors")

    def __init__(self, tensors: list[Tensor | None], number: int, averaged: bool = True) -> None:
        self.tensors, self.number, self.averaged = tensors, number, averaged

    @property
    def terms(self) -> dict[Gradient, Factor]:  # type: ignore[override]
        """Itself."""
        return {self: 1.0}


class State(Gradient):
    """State of a method: a tensor for each parameter, kept from step to step under ``name``; None where there is none yet."""

    __slots__ = ("name",)

    def __init__(self, tensors: list[Tensor | None], name: str) -> None:
        super().__init__(tensors, number=-1)
        self.name = name


class Sum(Combination):
    """The plain sum of a gradient and one of an earlier pass: a parameter moves if it has either."""

    __slots__ = ("last", "before")

    def __init__(self, last: Gradient, before: Gradient) -> None:
        self.last, self.before = last, before

    @property
    def terms(self) -> dict[Gradient, Factor]:  # type: ignore[override]
        """Both, once."""
        return {self.last: 1.0, self.before: 1.0}


_requires_grad = operator.attrgetter("requires_grad")
_grad = operator.attrgetter("grad")


def all_missing(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of them are None."""
    return {*map(type, tensors)} <= {NoneType}


def gradients_of(params: list[Tensor]) -> list[Tensor | None]:
    """The gradients in place, of parameters that are not frozen."""
    if all(map(_requires_grad, params)):
        return list(map(_grad, params))
    return [param.grad if param.requires_grad else None for param in params]


def swap_gradients(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Puts ``grads`` in place and returns what was there."""
    before = list(map(_grad, params))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return before


def take_gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients, as :func:`gradients_of` does, and clears them in place."""
    grads = list(map(_grad, params))
    if not all(map(_requires_grad, params)):
        grads = gradients_of(params)
    for param in params:
        param.grad = None
    return grads


def own_memory(grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients, with copies of views: a view may be one of DDP's buckets, which the next backward overwrites."""
    return [grad.clone() if grad is not None and grad._is_view() else grad for grad in grads]


def add_scaled(totals: list[Tensor | None], grads: list[Tensor | None], factor: float) -> list[Tensor | None]:
    """``totals + factor * grads``, in place where there is a total; a missing gradient is zero."""
    both = [(a, b) for a, b in zip(totals, grads, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both], alpha=factor)
    return [factor * b if a is None and b is not None else a for a, b in zip(totals, grads, strict=True)]


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
        before = swap_gradients(self._all, [None] * len(self._all))
        try:
            torch.autograd.backward(self._losses, weights, retain_graph)
        finally:
            found = swap_gradients(self._all, before)
        return found[: len(self._params)]
