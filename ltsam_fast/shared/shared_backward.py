"""One backward sweep, several weightings of the samples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.shared.not_shared import NotShared
from ltsam_fast.shared.products import Contribution, Weighting, at_leaf, from_whole, linear, through
from ltsam_fast.shared.qualify import Boundary, OutputRecorder, Plan, Qualification, Undetermined, check_module_types

_LOG = logging.getLogger("ltsam_fast")
MAX_STRUCTURES = 32
"""So many structures of a network are examined, each once."""


class SharedBackward:
    r"""Gradients :math:`\sum_j a_j \nabla \ell_j` for several weightings a of the samples from one backward sweep.

    .. code-block:: text

        delta_j          gradient of sample j's loss where a parameter is used: one sweep, with seeds s_j
        g_a            = sum over uses of  (product of the use)(a_j / s_j * delta_j)

    Where samples don't mix, weighting sample j's loss scales its rows of every gradient inside the network and does nothing
    else. So a sweep is paid once, and a weighting costs the products with the weights only. Products are those of autograd's
    own nodes, whatever these are; nothing is known about layers.

    What a network has to satisfy is found out, not assumed: on the first batch, and on the first of every further structure,
    two sweeps with different seeds show which sample each row of each gradient belongs to. They draw no random numbers and
    leave ``grad``, weights and running statistics as they are.

    Args:
        model: The network.
        params: Its parameters that count.
        mode: True: a network that does not qualify is an error; "auto": it gets one log line, and ``None`` from ``__call__``.

    Memory: a scaled copy of one gradient at a time, besides the results; examining keeps the graph, as two backwards do.

    >>> model = torch.nn.Linear(3, 2)
    >>> shared = SharedBackward(model, model.parameters())
    >>> with shared.record_outputs():
    ...     losses = model(torch.randn(4, 3)).square().sum(1)
    >>> weight, bias = shared(losses, torch.ones(4), [torch.tensor([0.0, 1.0, 0.0, 2.0])], native=False)[0]
    >>> weight.shape, bias.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """

    def __init__(self, model: torch.nn.Module, params: Iterable[Tensor], mode: bool | str = True) -> None:
        self.model, self.params, self.mode = model, list(params), mode
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._recorder: OutputRecorder | None = None
        self._record_next = True
        self._refused = False
        self._steps_to_wait, self._last_wait = 0, 0

    @contextmanager
    def record_outputs(self) -> Iterator[None]:
        """Around the forward pass: learns which nodes are the modules' outputs, if the next backward will be examined.

        Raises:
            NotShared: A module, such as batch norm in training, is known to mix samples, and ``mode`` is True.
        """
        if self._record_next and not self._refused:
            self._or_refuse(lambda: check_module_types(self.model, self.params))
        if self._refused or not self._record_next:
            yield
            return
        self._recorder = OutputRecorder(self.model)
        try:
            yield
        finally:
            self._recorder.close()

    def __call__(
        self, losses: Tensor, seeds: Tensor, factors: Sequence[Tensor | Weighting], native: bool = True
    ) -> list[list[Tensor | None]] | None:
        """Runs the sweep.

        Args:
            losses: Losses of the samples, shape (B,), with their graph, which is gone afterwards.
            seeds: Weights (B,) of the sweep itself, none of them zero.
            factors: K weightings (B,), relative to ``seeds``; a :class:`Weighting` may name the few samples it is about.
            native: Whether the gradient with weights ``seeds`` is wanted too; it is added to the parameters' ``grad``.

        Returns:
            For each factor a gradient for each parameter; or ``None``, when nothing was done: the network does not qualify,
            or nothing is known of this structure yet.

        Raises:
            NotShared: The network does not qualify, and ``mode`` is True.
        """
        if self._refused or len(losses) < 2 or losses.grad_fn is None:
            return None
        params = [param for param in self.params if param.requires_grad]
        graph = AutogradGraph(losses, params)
        plan = self._or_refuse(lambda: self._plan(graph, losses, params))
        if plan is None:
            return None
        weightings = [one if isinstance(one, Weighting) else Weighting(one.to(seeds)) for one in factors]
        backward = _BackwardPass(graph, plan, params, seeds, weightings)
        backward.run(losses, native)
        return [_owned(found, self.params) for found in backward.grads]

    def _or_refuse(self, qualify: Callable[[], Any]) -> Any:
        """What ``qualify`` returns; where it finds that the network does not qualify, the error, or one log line."""
        try:
            return qualify()
        except NotShared as error:
            if self.mode is True:
                raise
            self._refused = True
            _LOG.warning("shared_backward: two backward passes instead of one: %s", error)
            return None

    def _plan(self, graph: AutogradGraph, losses: Tensor, params: list[Tensor]) -> Plan | None:
        recorder, self._recorder = self._recorder, None
        key = (graph.structure, hash(tuple(module.training for module in self.model.modules())))
        if key in self._plans:
            return self._plans[key]
        if self._steps_to_wait:
            self._steps_to_wait -= 1
            return None
        if recorder is None:  # its modules are not known: the next forward will be watched
            self._record_next = True
            return None
        if len(self._plans) >= MAX_STRUCTURES:
            raise NotShared(
                f"the model's graph is another one each step: it has had {MAX_STRUCTURES} structures so far"
            )
        try:
            self._plans[key] = Qualification(self.model, graph, losses, params, recorder).plan()
        except Undetermined as error:  # nothing can be seen, and nothing is lost: look again 1, 3, 7, ... steps later
            self._steps_to_wait = self._last_wait = min(2 * self._last_wait + 1, 255)
            if self._last_wait == 7:
                _LOG.warning("shared_backward: two backward passes as long as no gradient reaches %s", error)
        self._record_next = False
        return self._plans.get(key)


class _BackwardPass:
    """One run: hooks at the boundaries form the products for all factors while gradients pass."""

    def __init__(
        self, graph: AutogradGraph, plan: Plan, params: list[Tensor], seeds: Tensor, weightings: Sequence[Weighting]
    ) -> None:
        self.graph, self.plan, self.params, self.seeds, self.weightings = graph, plan, params, seeds, weightings
        self.grads: list[dict[int, Tensor]] = [{} for _ in weightings]

    def run(self, losses: Tensor, native: bool) -> None:
        """The sweep: fills ``found``, for each weighting the gradients by the parameters' ids."""
        nodes = self.graph.nodes
        hooks = [nodes[one.node].register_prehook(self._hook(one)) for one in self.plan.boundaries]
        try:
            if native:
                torch.autograd.backward(losses, self.seeds)
            else:  # down to the lowest uses of parameters, and no products but theirs
                ends = [one for one in self.plan.boundaries if one.lowest or one.rule == "through"]
                edges = [edge for one in ends for edge in self._edges(one)]
                torch.autograd.grad(losses, edges, self.seeds, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()

    def _edges(self, boundary: Boundary) -> list[GradientEdge]:
        """Edges that make a sweep which goes down to them run the boundary's node."""
        below = self.graph.nodes[boundary.node].next_functions
        if not boundary.edges:  # a recomputed module
            return [get_gradient_edge(self.params[i]) for i in boundary.leaves[:1]]
        return [GradientEdge(*below[i]) for i in boundary.edges]

    def _hook(self, boundary: Boundary) -> Any:
        node = self.graph.nodes[boundary.node]
        leaves = [self.params[i] for i in boundary.leaves]
        inside = False

        def products(grads: tuple[Tensor | None, ...]) -> None:
            nonlocal inside
            if inside:  # autograd runs this node within _add
                return
            inside = True
            try:
                for weighting, found in zip(self.weightings, self.grads, strict=True):
                    self._add(found, leaves, self._contributions(node, boundary, grads, weighting))
            finally:
                inside = False

        return products

    def _contributions(
        self, node: Any, boundary: Boundary, grads: tuple[Tensor | None, ...], weighting: Weighting
    ) -> list[Contribution]:
        if boundary.rule == "linear":
            return [] if grads[0] is None else linear(node, boundary.edges, boundary.layouts[0], grads[0], weighting)
        pairs = zip(grads, boundary.layouts, strict=False)
        scaled = [None if grad is None else weighting.scaled(grad, layout) for grad, layout in pairs]
        return from_whole(node, scaled) if boundary.rule == "whole" else through(node, boundary.edges, scaled)

    def _add(self, found: dict[int, Tensor], leaves: list[Tensor], contributions: list[Contribution]) -> None:
        """Brings contributions down to the parameters and adds them up there."""
        at_params, rest = [], []
        for edge, grad in contributions:
            if (pair := at_leaf(edge, grad)) is None:
                rest.append((edge, grad))
            else:
                at_params.append(pair)
        if rest:
            edges, grads = zip(*rest, strict=True)
            parts = torch.autograd.grad(edges, leaves, grads, retain_graph=True, allow_unused=True)
            at_params += [(leaf, part) for leaf, part in zip(leaves, parts, strict=True) if part is not None]
        for leaf, part in at_params:
            mine = found.get(id(leaf))
            found[id(leaf)] = part if mine is None else mine + part


def _owned(found: dict[int, Tensor], params: list[Tensor]) -> list[Tensor | None]:
    """Gradients in memory of their own, laid out like the parameters, as autograd leaves them in ``grad``."""
    grads = [found.get(id(param)) for param in params]
    users = Counter(grad.untyped_storage().data_ptr() for grad in grads if grad is not None)
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad is None:
            continue
        memory = grad.untyped_storage()
        alone = users[memory.data_ptr()] == 1 and memory.nbytes() == grad.nbytes
        if not alone or grad.stride() != param.stride() or grad.dtype != param.dtype:
            grads[i] = torch.empty_like(param, requires_grad=False).copy_(grad)
    return grads
