"""Whether a network's samples stay apart, and where its parameters are used: found out on a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.shared.layout import Layout, Sample, distinct_seeds
from ltsam_fast.shared.not_shared import NotShared
from ltsam_fast.shared.products import is_linear

MAX_ROUNDS = 3
"""Pairs of sweeps at most."""


class Undetermined(Exception):
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


class OutputRecorder:
    """Notes during a forward pass which nodes are modules' outputs, and what runs within activation checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[Any, str] = {}
        """Names of the modules, those within before those around them, by nodes that depend on the samples."""
        self._calls: list[tuple[nn.Module, list[Any]]] = []
        self._checkpoints: dict[Any, set[nn.Module]] = {}
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
            if region := _current_checkpoint():
                self._checkpoints.setdefault(region, set()).add(module)

        return note

    def recomputed(self) -> dict[nn.Module, list[Any]]:
        """The smallest modules with all that an activation checkpoint computes anew, and their outputs' nodes.

        Raises:
            NotShared: There is no such module.
        """
        units: dict[nn.Module, list[Any]] = {}
        for inside in self._checkpoints.values():
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


def _current_checkpoint() -> Any:
    """What tells the activation checkpoint that runs now from others, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "") else None


def check_module_types(model: nn.Module, params: list[Tensor]) -> None:
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


class Qualification:
    """Two sweeps over the graph of one batch, which is kept, and what they show."""

    def __init__(
        self, model: nn.Module, graph: AutogradGraph, losses: Tensor, params: list[Tensor], recorder: OutputRecorder
    ) -> None:
        if graph.reentrant:
            raise NotShared(
                "torch.utils.checkpoint with use_reentrant=True hides what it runs: use use_reentrant=False, "
                "or shared_backward=False"
            )
        self.model, self.graph, self.params, self.recorder = model, graph, params, recorder
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.inner_nodes = [
            i for i, leaf in enumerate(graph.leaf) if leaf < 0 and any(c >= 0 for c in graph.children[i])
        ]
        self.samples: dict[tuple[int, int], Sample] = {}
        self.layouts: dict[int, dict[int, list[Layout]]] = {}
        """For each node and output what fits; an output without a gradient is not there."""
        self.seeds, units = distinct_seeds(len(losses)), torch.ones(len(losses), dtype=torch.float64)
        with _nonzero_params(model):
            for _ in range(
                MAX_ROUNDS
            ):  # where few elements have a gradient, noise is put into the others, and more is seen below
                known = self.layouts
                self.layouts, self.zero_grad_nodes = {}, set[int]()
                self._backward(losses, units, known, self._store)
                self._backward(losses, self.seeds, known, self._compare)
                if not self.zero_grad_nodes and all(
                    len(some) < 2 for found in self.layouts.values() for some in found.values()
                ):
                    break
        self.samples.clear()

    def _backward(self, losses: Tensor, seeds: Tensor, known: dict[int, dict[int, list[Layout]]], look: Any) -> None:
        def hook(number: int) -> Any:
            def visit(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
                for i, grad in enumerate(grads):
                    if grad is not None:
                        look(number, i, grad)
                layouts = known.get(number, {})
                return tuple(_fill_zeros(grad, seeds, layouts.get(i, [])) for i, grad in enumerate(grads))

            return visit

        hooks = [self.graph.nodes[number].register_prehook(hook(number)) for number in self.inner_nodes]
        try:
            torch.autograd.grad(losses, self.params, seeds.to(losses), retain_graph=True, allow_unused=True)
        finally:
            for one in hooks:
                one.remove()

    def _store(self, number: int, output: int, grad: Tensor) -> None:
        self.samples[number, output] = Sample(grad)

    def _compare(self, number: int, output: int, grad: Tensor) -> None:
        sample = self.samples[number, output]
        if len(sample):
            self.layouts.setdefault(number, {})[output] = sample.layouts(grad, self.seeds)
        elif grad.dim():
            self.zero_grad_nodes.add(number)

    def _separate(self, number: int) -> bool:
        """Whether samples stay apart at a node: each output has a layout."""
        found = self.layouts.get(number)
        return bool(found) and all(found.values())  # type: ignore[union-attr]

    def plan(self) -> Plan:
        """The uses of all parameters.

        Raises:
            NotShared: Samples mix, or a use cannot be followed.
            Undetermined: A use has no gradient yet, or too little to tell its layout.
        """
        uses = self._uses()
        found = self._recomputed()
        recomputed = {leaf for unit in found for leaf in unit.leaves}
        found += [self._boundary(*use) for use in uses if not self._leaves(*use) <= recomputed]
        nodes = {one.node for one in found}
        return Plan(tuple(replace(one, lowest=not (self.graph.below(one.node) - {one.node}) & nodes) for one in found))

    def _uses(self) -> list[tuple[int, tuple[int, ...]]]:
        """The nodes where samples, which stay apart down to there, meet parameters, and the edges that lead to these."""
        found, seen, stack = [], {0}, [0]
        while stack:
            number = stack.pop()
            edges = []
            for i, child in enumerate(self.graph.children[number]):
                if child < 0:
                    continue
                if child in self.zero_grad_nodes:
                    raise self._undetermined(child)
                if not self._separate(child):
                    self._check_parameters_only(number, child)
                    edges.append(i)
                elif child not in seen:
                    seen.add(child)
                    stack.append(child)
            if edges:
                found.append((number, tuple(edges)))
        return found

    def _undetermined(self, number: int) -> Undetermined:
        return Undetermined(self.names[id(self.params[self.graph.leaves(number)[0]])])

    def _leaves(self, number: int, edges: tuple[int, ...]) -> set[int]:
        return {leaf for i in edges for leaf in self.graph.leaves(self.graph.children[number][i])}

    def _check_parameters_only(self, number: int, child: int) -> None:
        """Raises NotShared if what an edge leads to is no function of parameters alone, so that samples mix at its node."""
        for one in sorted(self.graph.below(child)):
            if name := self.recorder.outputs.get(self.graph.nodes[one]):
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
            raise self._undetermined(number)  # too few elements have a gradient to tell
        return tuple(found[i][0] if i in found else None for i in range(max(found) + 1))

    def _recomputed(self) -> list[Boundary]:
        """Modules that are computed anew in the backward, each as one use: every use in it would mean another time."""
        units = self.recorder.recomputed()
        inner = {other for module in units for other in module.modules() if other is not module}
        found = []
        for module, nodes in units.items():
            indices = [index for node in nodes if self._separate(index := self.graph.number.get(node, -1))]
            if indices and module not in inner:
                found.append(self._unit(max(indices, key=lambda one: len(self.graph.below(one))), module))
        return [unit for unit in found if unit.leaves]

    def _unit(self, number: int, module: nn.Module) -> Boundary:
        graph, own = self.graph, {id(param) for param in module.parameters()}
        leaves = {i for i in graph.leaves(number) if id(self.params[i]) in own}
        for place in graph.below(0, without=number):
            if graph.leaf[place] in leaves:
                name = self.names[id(self.params[graph.leaf[place]])]
                raise NotShared(f"{name}, of an activation checkpoint, is used outside too; use shared_backward=False")
        return Boundary(number, (), tuple(sorted(leaves)), self._layouts(number), "whole", False)


def _fill_zeros(grad: Tensor | None, seeds: Tensor, layouts: list[Layout]) -> Tensor | None:
    """A gradient of known layout with noise, of the rows' seeds, where it is zero."""
    if grad is None or len(layouts) != 1 or not (missing := grad == 0).any():
        return grad
    rows = layouts[0].rows(seeds.to(grad), grad)
    size = (grad / rows).abs_().max()
    generator = torch.Generator().manual_seed(grad.numel())
    noise = torch.randn(grad.shape, dtype=torch.float32, generator=generator).to(grad)
    return torch.where(missing, noise.mul_(rows).mul_(size), grad)


@contextmanager
def _nonzero_params(model: nn.Module) -> Iterator[None]:
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
