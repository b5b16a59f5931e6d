"""Finds out on a batch whether a network mixes samples, and where it uses its parameters."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.shared.layout import Layout, SampledElements, distinct_seeds
from ltsam_fast.shared.not_shared import REMEDY, NotShared
from ltsam_fast.shared.products import is_linear

MAX_ROUNDS = 3
"""The most pairs of backward passes."""


class Undetermined(Exception):
    """The use of a parameter, which the message names, has no gradient yet, so its layout cannot be determined."""


@dataclass(frozen=True)
class ParameterUse:
    """A node whose inputs are the samples' activations and a function of parameters alone.

    Attributes:
        node: The index of the node in the graph.
        edges: The edges to parameters; none for a recomputed module.
        leaves: Indices of the parameters below these edges.
        layouts: For each output of the node the layout of its gradient; None: it has no gradient.
        kind: The function of ``products`` that forms the gradient: "linear", "at_node" or "call_node".
        lowest: Whether no other use is below.
    """

    node: int
    edges: tuple[int, ...]
    leaves: tuple[int, ...]
    layouts: tuple[Any, ...]
    kind: str
    lowest: bool

    def fits(self, graph: AutogradGraph, batch: int) -> bool:
        """Whether gradients at the node, in this graph, can have these layouts."""
        shapes = [one.shape for one in graph.nodes[self.node]._input_metadata]
        return all(
            layout is None or layout.fits(shape, batch) for layout, shape in zip(self.layouts, shapes, strict=False)
        )


class OutputRecorder:
    """Records during a forward pass which nodes are outputs of modules, and which modules run in activation checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[Any, str] = {}
        """The name of the innermost module for each node that depends on the samples."""
        self._calls: list[tuple[nn.Module, list[Any]]] = []
        self._checkpoints: dict[Any, set[nn.Module]] = {}
        self._hooks = [
            module.register_forward_hook(self._hook(name, module), with_kwargs=True)
            for name, module in eager_modules(model)
        ]

    def _hook(self, name: str, module: nn.Module) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not any(_is_activation(one) for one in (*args, *kwargs.values())):
                return  # a function of parameters alone, such as a table of relative positions
            outputs = output if isinstance(output, (tuple, list)) else [output]
            nodes = [one.grad_fn for one in outputs if isinstance(one, Tensor) and one.grad_fn is not None]
            for node in nodes:
                self.outputs.setdefault(node, f"{name or 'model'} ({type(module).__name__})")
            self._calls.append((module, nodes))
            if running := current_checkpoint():
                self._checkpoints.setdefault(running, set()).add(module)

        return record

    def recomputed(self) -> dict[nn.Module, list[Any]]:
        """Returns the smallest modules that contain an activation checkpoint each, and the nodes of their outputs.

        Raises:
            NotShared: There is no such module.
        """
        found: dict[nn.Module, list[Any]] = {}
        for inside in self._checkpoints.values():
            containers = [module for module, _ in self._calls if inside <= set(module.modules())]
            if not containers:
                kind = type(next(iter(inside))).__name__
                raise NotShared(f"an activation checkpoint with {kind} is in no module; {REMEDY}")
            smallest = min(containers, key=lambda one: len(list(one.modules())))
            found[smallest] = [node for module, nodes in self._calls if module is smallest for node in nodes]
        return found

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()


def eager_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields names and modules, but not compiled ones and those in them: a hook would have them compiled again."""
    if not is_compiled(module):
        yield name, module
        for child, inner in module.named_children():
            yield from eager_modules(inner, f"{name}.{child}" if name else child)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run what torch.compile, or torch.jit, has made of it."""
    if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks either
        return True
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, nn.Parameter)


def current_checkpoint() -> Any:
    """Returns an object that identifies the activation checkpoint that is running, or None."""
    if _top_hooks is None:
        return _running_call_of(_CHECKPOINT)
    hooks = _top_hooks(True)
    return hooks[0] if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "") else None


_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.6 and 2.7
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__


def _running_call_of(code: types.CodeType) -> types.FrameType | None:
    """The innermost call of torch's checkpoint function that is under way and not of the reentrant kind."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and (frame.f_code is not code or frame.f_locals["use_reentrant"]):
        frame = frame.f_back
    return frame


def check_batch_norm(model: nn.Module) -> None:
    """Raises NotShared for batch norm that normalizes by the batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise NotShared(
                f"{name} ({type(module).__name__}) normalizes by the batch and so mixes samples: "
                f"put it in eval mode, or {REMEDY}"
            )


def check_module_types(model: nn.Module, params: list[Tensor]) -> None:
    """Raises NotShared for modules and parameters that are known not to qualify."""
    check_batch_norm(model)
    names = {id(param): name for name, param in model.named_parameters()}
    for param in params:
        if id(param) not in names:
            raise NotShared(
                f"a parameter of shape {tuple(param.shape)} is not one of model's: give the whole network as model"
            )
    check_hooks(model, params)


def is_hooked(param: Tensor) -> bool:
    """Whether something else than autograd sees a parameter's gradients, and may change them."""
    return bool(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None))


def check_hooks(model: nn.Module, params: list[Tensor]) -> None:
    """Raises NotShared for parameters with hooks, and for sharded ones."""
    for param in params:
        if is_hooked(param) or hasattr(param, "_local_tensor"):
            kind = "sharded" if hasattr(param, "_local_tensor") else "hooked"
            name = next((name for name, one in model.named_parameters() if one is param), "a parameter")
            raise NotShared(f"{name} is {kind}: its gradient is not autograd's alone; {REMEDY}")


class Qualification:
    """Runs two backward passes through the graph of one batch, which is retained, and compares their gradients.

    The second has other seeds. A node does not mix samples if each row of its gradient is scaled by the seed of one sample.
    """

    def __init__(
        self, model: nn.Module, graph: AutogradGraph, losses: Tensor, params: list[Tensor], recorder: OutputRecorder
    ) -> None:
        if graph.reentrant:
            raise NotShared(
                "torch.utils.checkpoint with use_reentrant=True hides what it runs: use use_reentrant=False, "
                f"or {REMEDY}"
            )
        self.model, self.graph, self.params, self.recorder = model, graph, params, recorder
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.inner_nodes = [
            i for i, leaf in enumerate(graph.leaf) if leaf < 0 and any(c >= 0 for c in graph.children[i])
        ]
        self.elements: dict[tuple[int, int], SampledElements] = {}
        self.layouts: dict[int, dict[int, list[Layout]]] = {}
        """For each node and output the possible layouts; outputs without a gradient are missing."""
        self.seeds, units = distinct_seeds(len(losses)), torch.ones(len(losses), dtype=torch.float64)
        with _nonzero_params(model):
            for _ in range(MAX_ROUNDS):
                # Zeros in a gradient of known layout become noise, so that more gradients below are not zero.
                known = self.layouts
                self.layouts, self.zero_grad_nodes = {}, set[int]()
                self._backward(losses, units, known, self._store)
                self._backward(losses, self.seeds, known, self._compare)
                if not self.zero_grad_nodes and all(
                    len(some) < 2 for found in self.layouts.values() for some in found.values()
                ):
                    break
        self.elements.clear()

    def _backward(self, losses: Tensor, seeds: Tensor, known: dict[int, dict[int, list[Layout]]], visit: Any) -> None:
        def hook(number: int) -> Any:
            def prehook(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
                for i, grad in enumerate(grads):
                    if grad is not None:
                        visit(number, i, grad)
                layouts = known.get(number, {})
                return tuple(_fill_zeros(grad, seeds, layouts.get(i, [])) for i, grad in enumerate(grads))

            return prehook

        hooks = [self.graph.nodes[number].register_prehook(hook(number)) for number in self.inner_nodes]
        before = [param.grad for param in self.params]
        for param in self.params:
            param.grad = None
        try:
            torch.autograd.grad(losses, self.params, seeds.to(losses), retain_graph=True, allow_unused=True)
        finally:
            for one in hooks:
                one.remove()
            hidden = any(param.grad is not None for param in self.params)
            for param, grad in zip(self.params, before, strict=True):
                param.grad = grad
        if hidden:
            raise NotShared(f"a function in the forward pass calls backward() in its own; {REMEDY}")

    def _store(self, number: int, output: int, grad: Tensor) -> None:
        self.elements[number, output] = SampledElements(grad)

    def _compare(self, number: int, output: int, grad: Tensor) -> None:
        elements = self.elements[number, output]
        if len(elements):
            self.layouts.setdefault(number, {})[output] = elements.layouts(grad, self.seeds)
        elif grad.dim():
            self.zero_grad_nodes.add(number)

    def _is_separate(self, number: int) -> bool:
        """Whether the gradients of a node do not mix samples: each has a layout."""
        found = self.layouts.get(number)
        return bool(found) and all(found.values())  # type: ignore[union-attr]

    def uses(self) -> tuple[ParameterUse, ...]:
        """Returns the uses of all parameters.

        Raises:
            NotShared: Samples are mixed, or a use is not supported.
            Undetermined: A use has no gradient yet, or too few nonzero elements to determine its layout.
        """
        nodes_and_edges = self._nodes_and_edges()
        uses = self._recomputed()
        recomputed = {leaf for use in uses for leaf in use.leaves}
        uses += [self._use(*one) for one in nodes_and_edges if not self._leaves(*one) <= recomputed]
        nodes = {use.node for use in uses}
        return tuple(replace(use, lowest=not (self.graph.below(use.node) - {use.node}) & nodes) for use in uses)

    def _nodes_and_edges(self) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the nodes that have samples, not mixed so far, and parameters as inputs, with the edges to the parameters."""
        found, seen, stack = [], {0}, [0]
        while stack:
            number = stack.pop()
            edges = []
            for i, child in enumerate(self.graph.children[number]):
                if child < 0:
                    continue
                if child in self.zero_grad_nodes:
                    raise self._undetermined(child)
                if not self._is_separate(child):
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
        """Raises NotShared if the child depends on samples, too, so that the node mixes samples."""
        for one in sorted(self.graph.below(child)):
            if name := self.recorder.outputs.get(self.graph.nodes[one]):
                raise NotShared(f"samples mix after {name}, at {self.graph.nodes[number].name()}; {REMEDY}")

    def _use(self, number: int, edges: tuple[int, ...]) -> ParameterUse:
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
            return ParameterUse(number, edges, leaves, layouts, "linear", False)
        if shared and not callable(graph.nodes[number]):
            raise NotShared(
                f"{self.names[id(self.params[leaves[0]])]} is used twice, once by {graph.nodes[number].name()}, which runs "
                f"as a whole only; {REMEDY}"
            )
        return ParameterUse(number, edges, leaves, layouts, "call_node" if shared else "at_node", False)

    def _layouts(self, number: int) -> tuple[Any, ...]:
        found = self.layouts[number]
        if any(len(some) > 1 for some in found.values()):
            raise self._undetermined(number)  # too few nonzero elements
        return tuple(found[i][0] if i in found else None for i in range(max(found) + 1))

    def _recomputed(self) -> list[ParameterUse]:
        """Returns a use for each module that the backward recomputes: uses inside it would recompute it once each."""
        recomputed = self.recorder.recomputed()
        inner = {other for module in recomputed for other in module.modules() if other is not module}
        uses = []
        for module, nodes in recomputed.items():
            indices = [index for node in nodes if self._is_separate(index := self.graph.number.get(node, -1))]
            if indices and module not in inner:
                uses.append(self._recomputed_use(max(indices, key=lambda one: len(self.graph.below(one))), module))
        return [use for use in uses if use.leaves]

    def _recomputed_use(self, number: int, module: nn.Module) -> ParameterUse:
        graph, own = self.graph, {id(param) for param in module.parameters()}
        leaves = {i for i in graph.leaves(number) if id(self.params[i]) in own}
        for index in graph.below(0, without=number):
            if graph.leaf[index] in leaves:
                name = self.names[id(self.params[graph.leaf[index]])]
                raise NotShared(f"{name}, of an activation checkpoint, is used outside too; {REMEDY}")
        return ParameterUse(number, (), tuple(sorted(leaves)), self._layouts(number), "at_node", False)


def _fill_zeros(grad: Tensor | None, seeds: Tensor, layouts: list[Layout]) -> Tensor | None:
    """Returns a gradient of known layout with noise in place of its zeros, scaled by the rows' seeds."""
    if grad is None or len(layouts) != 1 or not (missing := grad == 0).any():
        return grad
    rows = layouts[0].rows(seeds.to(grad), grad)
    size = (grad / rows).abs_().max()
    generator = torch.Generator().manual_seed(grad.numel())
    noise = torch.randn(grad.shape, dtype=torch.float32, generator=generator).to(grad)
    return torch.where(missing, noise.mul_(rows).mul_(size), grad)


@contextmanager
def _nonzero_params(model: nn.Module) -> Iterator[None]:
    """A context that puts noise into parameters that are all zero, as in new adapters: gradients through them would be zero.

    Writes go through ``data``: autograd's graph reads the same memory, and its version counters do not change.
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
