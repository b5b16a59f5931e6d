"""Reads autograd's graph from a loss to the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Node = Any
"""A node of autograd's graph. torch returns the same Python object for a node only while a reference to it exists."""


def leaves(root: Tensor) -> dict[int, Tensor] | None:
    """The tensors that would get gradients, by id; None where a checkpoint with ``use_reentrant=True`` may hide some."""
    found, seen, stack = {}, set(), [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == _REENTRANT:
            return None
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [child for child, _ in node.next_functions]
    return found


def reaches(root: Tensor, params: list[Tensor]) -> bool:
    """Whether all parameters are in the graph, for certain."""
    found = leaves(root)
    return found is not None and found.keys() >= {*map(id, params)}


def reaches_others(root: Tensor, params: Iterable[Tensor]) -> bool:
    """Whether parameters of somebody else are in the graph, as far as that can be seen."""
    own = {*map(id, params)}
    return any(isinstance(one, nn.Parameter) and key not in own for key, one in (leaves(root) or {}).items())


_REENTRANT = "CheckpointFunctionBackward"


class AutogradGraph:
    """The nodes between ``losses`` and ``params``, in an order that depends on the structure alone.

    Methods take and return the nodes' indices.

    Attributes:
        nodes: The nodes; the first is that of the losses.
        number: The index of each node in ``nodes``.
        children: For each node the indices of the next functions, one per edge; -1 where no parameter is below.
        parents: For each node the number of nodes with an edge to it.
        leaf: For each node the index of the parameter that it accumulates, or -1.
        structure: A hash, equal for graphs with the same nodes, edges and parameters; sizes do not matter.
        reentrant: Whether a checkpoint with ``use_reentrant=True`` hides a part of the graph.
    """

    def __init__(self, losses: Tensor, params: list[Tensor]) -> None:
        index = {id(param): i for i, param in enumerate(params)}
        self.nodes: list[Node] = []
        self.number: dict[Node, int] = {}
        self.leaf: list[int] = []
        edges: list[tuple[Node, ...]] = []
        names: list[str] = []
        stack = [losses.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in self.number:
                continue
            self.number[node] = len(self.nodes)
            self.nodes.append(node)
            edges.append(tuple(child for child, _ in node.next_functions))
            names.append(node.name())
            self.leaf.append(index.get(id(node.variable), -1) if hasattr(node, "variable") else -1)
            stack += edges[-1]
        self.reentrant = _REENTRANT in names
        children = [tuple(-1 if child is None else self.number[child] for child in below) for below in edges]
        self.structure = hash((tuple(names), tuple(children), tuple(self.leaf)))
        has_params = self._has_params(children)
        self.children = [tuple(c if c >= 0 and has_params[c] else -1 for c in below) for below in children]
        self.parents = [0] * len(self.nodes)
        for below in self.children:
            for number in set(below) - {-1}:
                self.parents[number] += 1

    def _has_params(self, children: list[tuple[int, ...]]) -> list[bool]:
        """Returns for each node whether a parameter is below it."""
        above: list[list[int]] = [[] for _ in self.nodes]
        for parent, below in enumerate(children):
            for child in below:
                if child >= 0:
                    above[child].append(parent)
        found = [leaf >= 0 for leaf in self.leaf]
        stack = [number for number, one in enumerate(found) if one]
        while stack:
            for number in above[stack.pop()]:
                if not found[number]:
                    found[number] = True
                    stack.append(number)
        return found

    def below(self, number: int, without: int = -1) -> set[int]:
        """Returns the indices of a node and its descendants, except paths through ``without``."""
        found = {without} - {-1}
        stack = [number]
        while stack:
            if (one := stack.pop()) >= 0 and one not in found:
                found.add(one)
                stack += self.children[one]
        return found - {without}

    def leaves(self, number: int) -> list[int]:
        """Returns the indices of the parameters below a node, ascending."""
        return sorted(self.leaf[one] for one in self.below(number) if self.leaf[one] >= 0)
