"""How a weighting's gradient is formed where a parameter meets the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ltsam_fast.shared.layout import Layout

LINEAR = {"AddmmBackward0": ("mat1", 0, 2), "MmBackward0": ("self", -1, 1)}
"""A product of rows with a weight: its saved input, and which of its edges lead to bias and weight."""

Contribution = tuple[GradientEdge, Tensor]
"""An edge towards parameters, and the gradient that goes there."""


class Weighting:
    """Weights (B,) of the samples, relative to the sweep's, spread over the rows of a gradient.

    Args:
        weights: The weights.
        members: The numbers of the samples whose weight is not zero, int64, if they are few; ``None``: any.
    """

    def __init__(self, weights: Tensor, members: Tensor | None = None) -> None:
        self.weights, self.members = weights, members
        self._known: dict[Any, Tensor] = {}

    @classmethod
    def sparse(cls, weights: Tensor) -> Weighting:
        """Weights of which many are zero. Which ones is looked up on the CPU only: another device would be waited for."""
        members = weights.nonzero().flatten() if weights.device.type == "cpu" else None
        return cls(weights, members)

    def rows(self, layout: Layout, like: Tensor) -> Tensor:
        """The weights of the rows of ``like``, broadcastable to it."""
        key = (layout, like.dim(), like.shape[layout.dim])
        if key not in self._known:
            self._known[key] = layout.rows(self.weights, like)
        return self._known[key]

    def scaled(self, grad: Tensor, layout: Layout) -> Tensor:
        """The gradient with its rows scaled, rounded once: a weight of 16 bits would weigh all of a sample's rows wrongly."""
        rows = self.rows(layout, grad)
        return (grad * rows.to(torch.promote_types(grad.dtype, torch.float32))).to(grad.dtype)

    def chosen(self, layout: Layout, like: Tensor) -> Tensor | None:
        """The numbers of the rows of ``like`` that count, or ``None`` for all."""
        if self.members is None:
            return None
        key = ("rows", layout, like.shape[0])
        if key not in self._known:
            marks = torch.zeros(len(self.weights), dtype=torch.float32, device=like.device).index_fill_(
                0, self.members, 1.0
            )
            # how many there are is known here, so the device is not waited for
            size = len(self.members) * (like.shape[0] // len(self.weights))
            self._known[key] = layout.rows(marks, like[:, :1]).flatten().topk(size, sorted=False).indices
        return self._known[key]


def is_linear(node: Any, edges: tuple[int, ...], layouts: tuple[Layout | None, ...]) -> bool:
    """Whether a node is a plain product of rows with a weight, which :func:`linear` knows."""
    if node.name() not in LINEAR or layouts[0] is None or layouts[0].dim:
        return False
    _, bias, weight = LINEAR[node.name()]
    if (
        not set(edges) <= {bias, weight}
        or getattr(node, "_saved_alpha", 1) != 1
        or getattr(node, "_saved_beta", 1) != 1
    ):
        return False
    return bias not in edges or len(_meta(node, bias).shape) == 1


def linear(node: Any, edges: tuple[int, ...], layout: Layout, grad: Tensor, weighting: Weighting) -> list[Contribution]:
    """The contributions of rows x times a weight plus a bias: x^T (a * delta), the narrower side scaled; and a^T delta.

    Args:
        node: The product's node.
        edges: Those of its edges that are wanted.
        layout: Whose rows are which.
        grad: delta, shape (N, out).
        weighting: a.
    """
    name, bias, weight = LINEAR[node.name()]
    found = []
    rows = weighting.rows(layout, grad)
    x = getattr(node, f"_saved_{name}") if weight in edges else None
    if (chosen := weighting.chosen(layout, grad)) is not None:
        rows, grad = rows.index_select(0, chosen), grad.index_select(0, chosen)
        x = None if x is None else x.index_select(0, chosen)
    wide = rows.to(torch.promote_types(grad.dtype, torch.float32))
    if x is not None:
        if x.shape[1] < grad.shape[1]:  # the narrow side first: up to four times as fast as last
            product = (x * wide).to(x.dtype).t() @ grad
        else:
            product = ((grad * wide).to(grad.dtype).t() @ x).t()
        found.append((GradientEdge(*node.next_functions[weight]), product))
    if bias in edges:
        total = torch.mv(grad.to(wide.dtype).t(), wide.flatten())
        found.append((GradientEdge(*node.next_functions[bias]), total.to(grad.dtype)))
    return found


def from_whole(node: Any, grads: list[Tensor | None]) -> list[Contribution]:
    """Where autograd starts at the node itself, which does only what is asked for."""
    return [(GradientEdge(node, i), grad) for i, grad in enumerate(grads) if grad is not None]


def through(node: Any, edges: tuple[int, ...], grads: list[Tensor | None]) -> list[Contribution]:
    """Where a parameter is used further below too, and the node alone may run."""
    results = node(*grads)
    results = results if isinstance(results, tuple) else (results,)
    found = []
    for i in edges:
        if results[i] is not None:
            child, output = node.next_functions[i]
            meta = _meta(node, i)  # what autograd fits to it: a parameter may be broadcast
            found.append((GradientEdge(child, output), results[i].sum_to_size(meta.shape).to(meta.dtype)))
    return found


def at_leaf(edge: GradientEdge, grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """The parameter and its gradient, where at most a transposition is in between."""
    node: Any = edge.node
    if node.name() == "TBackward0":
        node, grad = node.next_functions[0][0], grad.t()
    return (node.variable, grad) if hasattr(node, "variable") and node.variable.dtype == grad.dtype else None


def _meta(node: Any, edge: int) -> Any:
    child, output = node.next_functions[edge]
    return child._input_metadata[output]
