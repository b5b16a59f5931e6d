"""Whether a network's samples stay apart, and where its parameters are used: found out on a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltsam_fast.shared.graph import Graph
from ltsam_fast.shared.layout import Layout, Sample, distinct_seeds
from ltsam_fast.shared.products import is_linear
from ltsam_fast.shared.refusal import NotShared

ROUNDS = 3
"""Pairs of sweeps at most."""


class Pending(Exception):
    """No gradient reaches a use of a parameter yet, which is named, so its layout cannot be seen."""


@dataclass(frozen=True)
class Boundary:
    """A node where a parameter, or what is made of parameters alone, meets the samples.

    Attributes:
        node: Its place in the graph.
        edges: The edges that lead to parameters.
        leaves: Indices of the parameters there.
        layouts: For each of its outputs which rows are whose; None: no gradient comes in there.
        rule: How products are formed there, see ``products``: "linear", "whole" or "through".
        lowest: No other boundary is below.
    """

    node: int
    edges: tuple[int, ...]
    leaves: tuple[int, ...]
    layouts: tuple[Any, ...]
    rule: str
    lowest: bool


@dataclass(frozen=True)
class Plan:
    """What a sweep through one structure of a network does."""

    boundaries: tuple[Boundary, ...]


class Watch:
    """Notes during a forward pass which nodes are modules' outputs, and what runs within activation checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[Any, str] = {}
        """Names of the modules, those within before those around them, by nodes that depend on the samples."""
        self._calls: list[tuple[nn.Module, list[Any]]] = []
        self._regions: dict[Any, set[nn.Module]] = {}
        self._hooks = [
            module.register_forward_hook(self._hook(name, module), with_kwargs=True)
            for name, module in eager_modules(model)
        ]

    def _hook(self, name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not any(_is_data(one) for one in (*args, *kwargs.values())):
                return  # made of parameters alone, such as a table of relative positions
            outputs = output if isinstance(output, (tuple, list)) else [output]
            found = [one.grad_fn for one in outputs if isinstance(one, Tensor) and one.grad_fn is not None]
            for node in found:
                self.outputs.setdefault(node, f"{name or 'model'} ({type(module).__name__})")
            self._calls.append((module, found))
            if region := _checkpoint():
                self._regions.setdefault(region, set()).add(module)

        return note

    def recomputed(self) -> dict[nn.Module, list[Any]]:
        """The smallest modules with all that an activation checkpoint computes anew, and their outputs' nodes.

        Raises:
            NotShared: There is no such module.
        """
        units: dict[nn.Module, list[Any]] = {}
        for inside in self._regions.values():
            around = [module for module, _ in self._calls if inside <= set(module.modules())]
            if not around:
                kind = type(next(iter(inside))).__name__
                raise NotShared(f"an activation checkpoint with {kind} is in no module; use shared_backward=False")
            unit = min(around, key=lambda one: len(list(one.modules())))
            units[unit] = [node for module, nodes in self._calls if module is unit for node in nodes]
        return units

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()


def eager_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, down to those that torch.compile took over: hooks would have them compiled again."""
    if getattr(module, "_compiled_call_impl", None) is None and not hasattr(module, "_orig_mod"):
        yield name, module
        for child, inner in module.named_children():
            yield from eager_modules(inner, f"{name}.{child}" if name else child)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


def _checkpoint() -> Any:
    """What tells the activation checkpoint that runs now from others, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "") else None


def refuse_by_type(model: nn.Module, params: list[Tensor]) -> None:
    """Raises NotShared for what is known not to qualify."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise NotShared(
                f"{name} ({type(module).__name__}) normalizes by the batch and so mixes samples: "
                "put it in eval mode, or use shared_backward=False"
            )
    names = {id(param): name for name, param in model.named_parameters()}
    for param in params:
        if id(param) not in names:
            raise NotShared(
                f"a parameter of shape {tuple(param.shape)} is not one of model's: give the whole network as model"
            )
        if (
            param._backward_hooks
            or getattr(param, "_post_accumulate_grad_hooks", None)
            or hasattr(param, "_local_tensor")
        ):
            kind = "sharded" if hasattr(param, "_local_tensor") else "hooked"
            raise NotShared(
                f"{names[id(param)]} is {kind}: its gradient is not autograd's alone; use shared_backward=False"
            )


class Examination:
    """Two sweeps over the graph of one batch, which is kept, and what they show."""

    def __init__(self, model: nn.Module, graph: Graph, losses: Tensor, params: list[Tensor], watch: Watch) -> None:
        if graph.reentrant:
            raise NotShared(
                "torch.utils.checkpoint with use_reentrant=True hides what it runs: use use_reentrant=False, "
                "or shared_backward=False"
            )
        self.model, self.graph, self.params, self.watch = model, graph, params, watch
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.leading = [i for i, leaf in enumerate(graph.leaf) if leaf < 0 and any(c >= 0 for c in graph.children[i])]
        self.samples: dict[tuple[int, int], Sample] = {}
        self.layouts: dict[int, dict[int, list[Layout]]] = {}
        """For each node and output what fits; an output without a gradient is not there."""
        self.seeds, units = distinct_seeds(len(losses)), torch.ones(len(losses), dtype=torch.float64)
        with _without_zeros(model):
            for _ in range(
                ROUNDS
            ):  # where few elements have a gradient, noise is put into the others, and more is seen below
                known = self.layouts
                self.layouts, self.silent = {}, set[int]()
                self._sweep(losses, units, known, self._remember)
                self._sweep(losses, self.seeds, known, self._compare)
                if not self.silent and all(len(some) < 2 for found in self.layouts.values() for some in found.values()):
                    break
        self.samples.clear()

    def _sweep(self, losses: Tensor, seeds: Tensor, known: dict[int, dict[int, list[Layout]]], look: Any) -> None:
        def hook(number: int) -> Any:
            def visit(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
                for i, grad in enumerate(grads):
                    if grad is not None:
                        look(number, i, grad)
                layouts = known.get(number, {})
                return tuple(_dense(grad, seeds, layouts.get(i, [])) for i, grad in enumerate(grads))

            return visit

        hooks = [self.graph.nodes[number].register_prehook(hook(number)) for number in self.leading]
        try:
            torch.autograd.grad(losses, self.params, seeds.to(losses), retain_graph=True, allow_unused=True)
        finally:
            for one in hooks:
                one.remove()

    def _remember(self, number: int, output: int, grad: Tensor) -> None:
        self.samples[number, output] = Sample(grad)

    def _compare(self, number: int, output: int, grad: Tensor) -> None:
        sample = self.samples[number, output]
        if len(sample):
            self.layouts.setdefault(number, {})[output] = sample.layouts(grad, self.seeds)
        elif grad.dim():
            self.silent.add(number)

    def _apart(self, number: int) -> bool:
        """Whether samples stay apart at a node: each output has a layout."""
        found = self.layouts.get(number)
        return bool(found) and all(found.values())  # type: ignore[union-attr]

    def plan(self) -> Plan:
        """The uses of all parameters.

        Raises:
            NotShared: Samples mix, or a use cannot be followed.
            Pending: A use has no gradient yet, or too little to tell its layout.
        """
        uses = self._uses()
        found = self._recomputed()
        recomputed = {leaf for unit in found for leaf in unit.leaves}
        found += [self._boundary(*use) for use in uses if not self._leaves(*use) <= recomputed]
        places = {one.node for one in found}
        return Plan(tuple(replace(one, lowest=not (self.graph.below(one.node) - {one.node}) & places) for one in found))

    def _uses(self) -> list[tuple[int, tuple[int, ...]]]:
        """The nodes where samples, which stay apart down to there, meet parameters, and the edges that lead to these."""
        found, seen, waiting = [], {0}, [0]
        while waiting:
            number = waiting.pop()
            edges = []
            for i, child in enumerate(self.graph.children[number]):
                if child < 0:
                    continue
                if child in self.silent:
                    raise self._pending(child)
                if not self._apart(child):
                    self._check_parameters_only(number, child)
                    edges.append(i)
                elif child not in seen:
                    seen.add(child)
                    waiting.append(child)
            if edges:
                found.append((number, tuple(edges)))
        return found

    def _pending(self, number: int) -> Pending:
        return Pending(self.names[id(self.params[self.graph.leaves(number)[0]])])

    def _leaves(self, number: int, edges: tuple[int, ...]) -> set[int]:
        return {leaf for i in edges for leaf in self.graph.leaves(self.graph.children[number][i])}

    def _check_parameters_only(self, number: int, child: int) -> None:
        """Raises NotShared if what an edge leads to is no function of parameters alone, so that samples mix at its node."""
        for one in sorted(self.graph.below(child)):
            if name := self.watch.outputs.get(self.graph.nodes[one]):
                raise NotShared(
                    f"samples mix after {name}, at {self.graph.nodes[number].name()}; use shared_backward=False"
                )

    def _boundary(self, number: int, edges: tuple[int, ...]) -> Boundary:
        graph = self.graph
        children = [graph.children[number][i] for i in edges]
        below = set().union(*(graph.below(child) for child in children))
        others = [child for i, child in enumerate(graph.children[number]) if child >= 0 and i not in edges]
        shared = any(graph.parents[one] > 1 for one in below) and bool(
            below & set().union(*map(graph.below, others), set())
        )
        leaves = tuple(sorted(graph.leaf[one] for one in below if graph.leaf[one] >= 0))
        layouts = self._layouts(number)
        if is_linear(graph.nodes[number], edges, layouts):
            return Boundary(number, edges, leaves, layouts, "linear", False)
        if shared and not callable(graph.nodes[number]):
            raise NotShared(
                f"{self.names[id(self.params[leaves[0]])]} is used twice, once by {graph.nodes[number].name()}, which runs "
                "as a whole only; use shared_backward=False"
            )
        return Boundary(number, edges, leaves, layouts, "through" if shared else "whole", False)

    def _layouts(self, number: int) -> tuple[Any, ...]:
        found = self.layouts[number]
        if any(len(some) > 1 for some in found.values()):
            raise self._pending(number)  # too few elements have a gradient to tell
        return tuple(found[i][0] if i in found else None for i in range(max(found) + 1))

    def _recomputed(self) -> list[Boundary]:
        """Modules that are computed anew in the backward, each as one use: every use in it would mean another time."""
        units = self.watch.recomputed()
        inner = {other for module in units for other in module.modules() if other is not module}
        found = []
        for module, nodes in units.items():
            places = [place for node in nodes if self._apart(place := self.graph.number.get(node, -1))]
            if places and module not in inner:
                found.append(self._unit(max(places, key=lambda one: len(self.graph.below(one))), module))
        return [unit for unit in found if unit.leaves]

    def _unit(self, number: int, module: nn.Module) -> Boundary:
        graph, own = self.graph, {id(param) for param in module.parameters()}
        leaves = {i for i in graph.leaves(number) if id(self.params[i]) in own}
        for place in graph.below(0, without=number):
            if graph.leaf[place] in leaves:
                name = self.names[id(self.params[graph.leaf[place]])]
                raise NotShared(f"{name}, of an activation checkpoint, is used outside too; use shared_backward=False")
        return Boundary(number, (), tuple(sorted(leaves)), self._layouts(number), "whole", False)


def _dense(grad: Tensor | None, seeds: Tensor, layouts: list[Layout]) -> Tensor | None:
    """A gradient of known layout with noise, of the rows' seeds, where it is zero."""
    if grad is None or len(layouts) != 1 or not (missing := grad == 0).any():
        return grad
    rows = layouts[0].rows(seeds.to(grad), grad)
    size = (grad / rows).abs_().max()
    generator = torch.Generator().manual_seed(grad.numel())
    noise = torch.randn(grad.shape, dtype=torch.float32, generator=generator).to(grad)
    return torch.where(missing, noise.mul_(rows).mul_(size), grad)


@contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Fills parameters that are all zero, as of fresh adapters, with noise: a backward through zeros would show nothing.

    autograd's graph holds the same memory; ``data`` leaves its version as it is.
    """
    zeros = [param for param in model.parameters() if param.is_floating_point() and not param.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for param in zeros:
            param.data.copy_(torch.randn(param.shape, dtype=torch.float32, generator=generator))
        yield
    finally:
        for param in zeros:
            param.data.zero_()
