"""Products at nodes where parameters are used: forms a weighting's gradient there, and counts multiplications."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ltsam_fast.shared.layout import Layout

LINEAR = {"AddmmBackward0": ("mat1", 0, 2), "MmBackward0": ("self", -1, 1)}
"""Nodes of matrix products: the attribute of the saved input, and the indices of the edges to bias and weight."""

Contribution = tuple[GradientEdge, Tensor]
"""An edge towards parameters, and the gradient along it."""


class Weighting:
    """Weights (B,) of the samples, relative to the seeds of the backward pass.

    Args:
        weights: The weights.
        indices: Indices of the samples with nonzero weights, int64, if these are few; ``None``: all samples.
    """

    def __init__(self, weights: Tensor, indices: Tensor | None = None) -> None:
        self.weights, self.indices = weights, indices
        self._cache: dict[Any, Tensor] = {}

    @classmethod
    def sparse(cls, weights: Tensor) -> Weighting:
        """Returns a weighting with many zeros. They are found on the CPU only: other devices would synchronize."""
        return cls(weights, weights.nonzero().flatten() if weights.device.type == "cpu" else None)

    def rows(self, layout: Layout, like: Tensor) -> Tensor:
        """Returns the weights of the rows of ``like``, broadcastable to it."""
        key = (layout, like.dim(), like.shape[layout.dim])
        if key not in self._cache:
            self._cache[key] = layout.rows(self.weights, like)
        return self._cache[key]

    def scaled(self, grad: Tensor, layout: Layout) -> Tensor:
        """Returns ``grad`` with its rows scaled. Weights stay float32: rounded to 16 bits they would bias a sample."""
        rows = self.rows(layout, grad)
        return (grad * rows.to(torch.promote_types(grad.dtype, torch.float32))).to(grad.dtype)

    def nonzero_rows(self, layout: Layout, like: Tensor) -> Tensor | None:
        """Returns the indices of the rows of ``like`` with nonzero weights, or ``None`` for all."""
        if self.indices is None:
            return None
        key = ("rows", layout, like.shape[0])
        if key not in self._cache:
            marks = torch.zeros(len(self.weights), dtype=torch.float32, device=like.device).index_fill_(
                0, self.indices, 1.0
            )
            # The number of rows is known on the host, so nothing waits for the device.
            size = len(self.indices) * (like.shape[0] // len(self.weights))
            self._cache[key] = layout.rows(marks, like[:, :1]).flatten().topk(size, sorted=False).indices
        return self._cache[key]


def is_linear(node: Any, edges: tuple[int, ...], layouts: tuple[Layout | None, ...]) -> bool:
    """Returns whether a node is a matrix product that :func:`linear` handles."""
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
    """Returns the gradients of a product's weight, x^T (a * delta) with the narrower factor scaled, and of its bias, a^T delta.

    Args:
        node: The node of the product.
        edges: The edges whose gradients are wanted.
        layout: The samples of the rows.
        grad: delta, shape (N, out).
        weighting: a.
    """
    name, bias, weight = LINEAR[node.name()]
    found = []
    rows = weighting.rows(layout, grad)
    x = getattr(node, f"_saved_{name}") if weight in edges else None
    if (index := weighting.nonzero_rows(layout, grad)) is not None:
        rows, grad = rows.index_select(0, index), grad.index_select(0, index)
        x = None if x is None else x.index_select(0, index)
    wide = rows.to(torch.promote_types(grad.dtype, torch.float32))
    if x is not None:
        if x.shape[1] < grad.shape[1]:  # scale the narrower factor
            product = (x * wide).to(x.dtype).t() @ grad
        else:
            product = ((grad * wide).to(grad.dtype).t() @ x).t()
        found.append((GradientEdge(*node.next_functions[weight]), product))
    if bias in edges:
        total = torch.mv(grad.to(wide.dtype).t(), wide.flatten())
        found.append((GradientEdge(*node.next_functions[bias]), total.to(grad.dtype)))
    return found


def at_node(node: Any, grads: list[Tensor | None]) -> list[Contribution]:
    """Returns contributions from which autograd starts at the node itself."""
    return [(GradientEdge(node, i), grad) for i, grad in enumerate(grads) if grad is not None]


def call_node(node: Any, edges: tuple[int, ...], grads: list[Tensor | None]) -> list[Contribution]:
    """Calls the node alone, for a parameter that is also used elsewhere below; returns the gradients along its edges."""
    results = node(*grads)
    results = results if isinstance(results, tuple) else (results,)
    found = []
    for i in edges:
        if results[i] is not None:
            child, output = node.next_functions[i]
            meta = _meta(node, i)  # a parameter may be broadcast: autograd sums its gradient to this shape
            found.append((GradientEdge(child, output), results[i].sum_to_size(meta.shape).to(meta.dtype)))
    return found


def at_leaf(edge: GradientEdge, grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the parameter and its gradient, if the edge leads to it directly or by a transposition."""
    node: Any = edge.node
    if node.name() == "TBackward0":
        node, grad = node.next_functions[0][0], grad.t()
    return (node.variable, grad) if hasattr(node, "variable") and node.variable.dtype == grad.dtype else None


def _meta(node: Any, edge: int) -> Any:
    child, output = node.next_functions[edge]
    return child._input_metadata[output]


def products_exceed(root: Tensor, count: float) -> bool:
    """Whether a backward from ``root`` multiplies by elements of weights more often than ``count``, on the way to activations.

    Counted are products of matrices, and convolutions with weights that are trained.
    """
    seen: set[Any] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count -= _products(node)
        if count < 0:
            return True
        stack += [child for child, _ in node.next_functions]
    return False


def _products(node: Any) -> int:
    name, below = node.name(), node.next_functions
    if name in LINEAR:
        activations = LINEAR[name][2] - 1  # before the weight
        known = below[activations][0] is not None
        return math.prod(node._input_metadata[0].shape) * _meta(node, activations).shape[1] if known else 0
    weight = _weight_below(below[1][0]) if name in ("ConvolutionBackward0", "LinearBackward0") else None
    return 0 if weight is None else math.prod(node._input_metadata[0].shape) * weight.shape[1:].numel()


def _weight_below(node: Any) -> Tensor | None:
    """The tensor that gets the gradient at a node, laid out or cast otherwise."""
    while node is not None and node.name() in _REARRANGED:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


_REARRANGED = frozenset(f"{name}Backward0" for name in ("T", "Transpose", "Permute", "View", "ToCopy", "Unsqueeze"))
