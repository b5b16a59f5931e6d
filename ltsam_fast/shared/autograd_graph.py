"""Autograd's graph, read from a loss down to the parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Node = Any
"""A node of autograd's graph. torch keeps one Python object for a node only while somebody holds it."""


class AutogradGraph:
    """The nodes that lead from ``losses`` to ``params``, in an order that is the same for equal structures.

    Attributes:
        nodes: The nodes, the losses' first.
        number: The place of each node in ``nodes``.
        children: For each node the places of those that its edges lead to; -1 where no parameter is below.
        parents: How many nodes have an edge to each.
        leaf: For each node the index of the parameter it accumulates, or -1.
        structure: Equal for graphs of the same nodes, edges and parameters; sizes don't matter.
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
        self.reentrant = "CheckpointFunctionBackward" in names
        children = [tuple(-1 if child is None else self.number[child] for child in below) for below in edges]
        self.structure = hash((tuple(names), tuple(children), tuple(self.leaf)))
        leads = self._leading(children)
        self.children = [tuple(c if c >= 0 and leads[c] else -1 for c in below) for below in children]
        self.parents = [0] * len(self.nodes)
        for below in self.children:
            for number in set(below) - {-1}:
                self.parents[number] += 1

    def _leading(self, children: list[tuple[int, ...]]) -> list[bool]:
        """Whether a parameter is below each node."""
        above: list[list[int]] = [[] for _ in self.nodes]
        for parent, below in enumerate(children):
            for child in below:
                if child >= 0:
                    above[child].append(parent)
        leads = [leaf >= 0 for leaf in self.leaf]
        stack = [number for number, leading in enumerate(leads) if leading]
        while stack:
            for number in above[stack.pop()]:
                if not leads[number]:
                    leads[number] = True
                    stack.append(number)
        return leads

    def below(self, number: int, without: int = -1) -> set[int]:
        """The places of a node and of all that its edges lead to, not by way of ``without``."""
        found = {without} - {-1}
        stack = [number]
        while stack:
            if (one := stack.pop()) >= 0 and one not in found:
                found.add(one)
                stack += self.children[one]
        return found - {without}

    def leaves(self, number: int) -> list[int]:
        """The indices of the parameters below a node, ascending."""
        return sorted(self.leaf[one] for one in self.below(number) if self.leaf[one] >= 0)
