"""Runs one backward pass for several weightings of the samples."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.shared.not_shared import NotShared
from ltsam_fast.shared.products import Contribution, Weighting, at_leaf, at_node, call_node, linear
from ltsam_fast.shared.qualify import (
    OutputRecorder,
    ParameterUse,
    Qualification,
    Undetermined,
    check_hooks,
    check_module_types,
)

_LOG = logging.getLogger("ltsam_fast")
MAX_STRUCTURES = 32
"""The most structures of a graph that are analyzed, once each."""


class SharedBackward:
    r"""Gradients :math:`\sum_j a_j \nabla \ell_j` for several weightings a of the samples from one backward pass.

    .. code-block:: text

        delta_j          gradient of sample j's loss at a use of a parameter: one backward pass, with seeds s_j
        g_a            = sum over uses of  (product of the use)(a_j / s_j * delta_j)

    If a network does not mix samples, a weight on sample j's loss scales the sample's rows of every gradient of activations
    and changes nothing else. So the backward pass runs once, and each weighting costs only the gradients of weights. These
    are computed by autograd's own nodes; no types of layers are assumed.

    The first batch of each graph structure is analyzed: two backward passes with different seeds show which sample each row
    of each gradient belongs to. They draw no random numbers and leave ``grad``, weights and running statistics as they are.

    Args:
        model: The network.
        params: The parameters whose gradients are wanted.

    Memory: besides the results a scaled copy of one gradient at a time; the analysis retains the graph, as two backwards do.

    >>> model = torch.nn.Linear(3, 2)
    >>> shared = SharedBackward(model, model.parameters())
    >>> with shared.record_outputs():
    ...     losses = model(torch.randn(4, 3)).square().sum(1)
    >>> weight, bias = shared(losses, torch.ones(4), [torch.tensor([0.0, 1.0, 0.0, 2.0])], native=False)[0]
    >>> weight.shape, bias.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """

    def __init__(self, model: torch.nn.Module, params: Iterable[Tensor]) -> None:
        self.model, self.params = model, list(params)
        self._plans: dict[tuple[Any, ...], tuple[ParameterUse, ...]] = {}
        self._recorder: OutputRecorder | None = None
        self._record_next = True
        self._steps_to_wait, self._last_wait = 0, 0

    def check(self) -> None:
        """Looks at parameters' hooks and, if the next backward is analyzed, at modules.

        Raises:
            NotShared: One is known not to qualify, such as batch norm in training, which mixes samples.
        """
        if self._record_next:
            check_module_types(self.model, self.params)
        else:
            check_hooks(self.model, self.params)

    @contextmanager
    def record_outputs(self) -> Iterator[None]:
        """A context for the forward pass: records the modules' outputs if the next backward is analyzed.

        Raises:
            NotShared: A module mixes samples, such as batch norm in training.
        """
        if not self._record_next:
            yield
            return
        self.check()
        self._recorder = OutputRecorder(self.model)
        try:
            yield
        finally:
            self._recorder.close()

    def __call__(
        self, losses: Tensor, seeds: Tensor, factors: Sequence[Tensor | Weighting], native: bool = True
    ) -> list[list[Tensor | None]] | None:
        """Runs the backward pass.

        Args:
            losses: Losses of the samples, shape (B,), with their graph, which is freed.
            seeds: Weights (B,) of the backward pass itself, none of them zero.
            factors: K weightings (B,), relative to ``seeds``; a :class:`Weighting` may name the samples with nonzero weights.
            native: Whether to add the gradient with weights ``seeds`` to the parameters' ``grad``, too.

        Returns:
            For each factor a gradient for each parameter. ``None`` if nothing was done: this structure of the graph is not
            analyzed yet.

        Raises:
            NotShared: The network does not qualify.
        """
        if len(losses) < 2 or losses.grad_fn is None:
            return None
        params = [param for param in self.params if param.requires_grad]
        graph = AutogradGraph(losses, params)
        uses = self._uses(graph, losses, params)
        if uses is None:
            return None
        weightings = [one if isinstance(one, Weighting) else Weighting(one.to(seeds)) for one in factors]
        backward = _BackwardPass(graph, uses, params, seeds, weightings)
        backward.run(losses, native)
        return [_owned(found, self.params) for found in backward.grads]

    def _uses(self, graph: AutogradGraph, losses: Tensor, params: list[Tensor]) -> tuple[ParameterUse, ...] | None:
        recorder, self._recorder = self._recorder, None
        key = (graph.structure, hash(tuple(module.training for module in self.model.modules())))
        if key in self._plans:
            if all(use.fits(graph, len(losses)) for use in self._plans[key]):
                return self._plans[key]
            del self._plans[key]  # sizes have changed such that samples may lie elsewhere
        if self._steps_to_wait:
            self._steps_to_wait -= 1
            return None
        if recorder is None:  # record the next forward
            self._record_next = True
            return None
        if len(self._plans) >= MAX_STRUCTURES:
            raise NotShared(
                f"the model's graph changes from step to step: it has had {MAX_STRUCTURES} structures so far"
            )
        try:
            self._plans[key] = Qualification(self.model, graph, losses, params, recorder).uses()
        except Undetermined as error:  # try again 1, 3, 7, ... steps later
            self._steps_to_wait = self._last_wait = min(2 * self._last_wait + 1, 255)
            if self._last_wait == 7:
                _LOG.warning("plan: a backward pass for each gradient, as long as none reaches %s", error)
        self._record_next = False
        return self._plans.get(key)


class _BackwardPass:
    """One backward pass: hooks at the parameters' uses form the gradients of all weightings."""

    def __init__(
        self,
        graph: AutogradGraph,
        uses: Sequence[ParameterUse],
        params: list[Tensor],
        seeds: Tensor,
        weightings: Sequence[Weighting],
    ) -> None:
        self.graph, self.uses, self.params, self.seeds, self.weightings = graph, uses, params, seeds, weightings
        self.grads: list[dict[int, Tensor]] = [{} for _ in weightings]

    def run(self, losses: Tensor, native: bool) -> None:
        """Fills ``grads``: for each weighting the gradients by the parameters' ids."""
        nodes = self.graph.nodes
        hooks = [nodes[use.node].register_prehook(self._hook(use)) for use in self.uses]
        try:
            if native:
                torch.autograd.backward(losses, self.seeds)
            else:  # stop at the lowest uses
                ends = [use for use in self.uses if use.lowest or use.kind == "call_node"]
                edges = [edge for use in ends for edge in self._edges(use)]
                torch.autograd.grad(losses, edges, self.seeds, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()

    def _edges(self, use: ParameterUse) -> list[GradientEdge]:
        """Returns edges for which autograd has to run the node."""
        below = self.graph.nodes[use.node].next_functions
        if not use.edges:  # a recomputed module
            return [get_gradient_edge(self.params[i]) for i in use.leaves[:1]]
        return [GradientEdge(*below[i]) for i in use.edges]

    def _hook(self, use: ParameterUse) -> Any:
        node = self.graph.nodes[use.node]
        leaves = [self.params[i] for i in use.leaves]
        running = False

        def add_products(grads: tuple[Tensor | None, ...]) -> None:
            nonlocal running
            if running:  # autograd runs this node inside _add
                return
            running = True
            try:
                for weighting, found in zip(self.weightings, self.grads, strict=True):
                    self._add(found, leaves, self._contributions(node, use, grads, weighting))
            finally:
                running = False

        return add_products

    def _contributions(
        self, node: Any, use: ParameterUse, grads: tuple[Tensor | None, ...], weighting: Weighting
    ) -> list[Contribution]:
        if use.kind == "linear":
            return [] if grads[0] is None else linear(node, use.edges, use.layouts[0], grads[0], weighting)
        pairs = itertools.zip_longest(grads, use.layouts)  # the last outputs may have had no gradients
        scaled = [None if grad is None else weighting.scaled(grad, layout) for grad, layout in pairs]
        return at_node(node, scaled) if use.kind == "at_node" else call_node(node, use.edges, scaled)

    def _add(self, found: dict[int, Tensor], leaves: list[Tensor], contributions: list[Contribution]) -> None:
        """Propagates contributions to the parameters and adds them up."""
        at_params, rest = [], []
        for edge, grad in contributions:
            if (pair := at_leaf(edge, grad)) is None:
                rest.append((edge, grad))
            else:
                at_params.append(pair)
        if rest:
            edges, grads = zip(*rest, strict=True)
            results = torch.autograd.grad(edges, leaves, grads, retain_graph=True, allow_unused=True)
            at_params += [(leaf, grad) for leaf, grad in zip(leaves, results, strict=True) if grad is not None]
        for leaf, grad in at_params:
            total = found.get(id(leaf))
            found[id(leaf)] = grad if total is None else total + grad


def _owned(found: dict[int, Tensor], params: list[Tensor]) -> list[Tensor | None]:
    """Returns gradients with storage of their own and the parameters' strides, as autograd leaves them in ``grad``."""
    grads = [found.get(id(param)) for param in params]
    users = Counter(grad.untyped_storage().data_ptr() for grad in grads if grad is not None)
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad is None:
            continue
        storage = grad.untyped_storage()
        owned = users[storage.data_ptr()] == 1 and storage.nbytes() == grad.nbytes
        if not owned or grad.stride() != param.stride() or grad.dtype != param.dtype:
            grads[i] = torch.empty_like(param, requires_grad=False).copy_(grad)
    return grads
