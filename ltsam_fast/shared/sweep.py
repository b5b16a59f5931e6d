"""One backward sweep, several weightings of the samples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ltsam_fast.shared.examine import Boundary, Examination, Pending, Plan, Watch, refuse_by_type
from ltsam_fast.shared.graph import Graph
from ltsam_fast.shared.layout import Layout
from ltsam_fast.shared.refusal import NotShared

_LOG = logging.getLogger("ltsam_fast")
STRUCTURES = 32
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

    Memory: a scaled copy of one gradient at a time, besides the results.
    """

    def __init__(self, model: torch.nn.Module, params: Sequence[Tensor], mode: bool | str = True) -> None:
        self.model, self.params, self.mode = model, list(params), mode
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._watch: Watch | None = None
        self._wants_watch = True
        self._refused = False
        self._wait, self._waited = 0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward pass: learns which nodes are the modules' outputs, if the next backward will be examined.

        Raises:
            NotShared: A module, such as batch norm in training, is known to mix samples, and ``mode`` is True.
        """
        if self._wants_watch and not self._refused:
            self._judge(lambda: refuse_by_type(self.model, self.params))
        if self._refused or not self._wants_watch:
            yield
            return
        self._watch = Watch(self.model)
        try:
            yield
        finally:
            self._watch.close()

    def __call__(
        self, losses: Tensor, seeds: Tensor, factors: Sequence[Tensor], native: bool = True
    ) -> list[list[Tensor | None]] | None:
        """Runs the sweep.

        Args:
            losses: Losses of the samples, shape (B,), with their graph, which is gone afterwards.
            seeds: Weights (B,) of the sweep itself, none of them zero.
            factors: K weightings (B,), relative to ``seeds``.
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
        graph = Graph(losses, params)
        plan = self._judge(lambda: self._plan(graph, losses, params))
        if plan is None:
            return None
        return _Sweep(graph, plan, params, seeds, factors).run(losses, native, self.params)

    def _judge(self, examine: Callable[[], Any]) -> Any:
        """What ``examine`` returns; where it finds that the network does not qualify, the error, or one log line."""
        try:
            return examine()
        except NotShared as error:
            if self.mode is True:
                raise
            self._refused = True
            _LOG.warning("shared_backward: two backward passes instead of one: %s", error)
            return None

    def _plan(self, graph: Graph, losses: Tensor, params: list[Tensor]) -> Plan | None:
        training = tuple(module.training for module in self.model.modules())
        key = (graph.structure, hash(training))
        if key in self._plans:
            return self._plans[key]
        watch, self._watch = self._watch, None
        self._wants_watch = True
        if watch is None:  # seen for the first time without its modules: the next one will be watched
            return None
        if self._wait:
            self._wait -= 1
            return None
        if len(self._plans) >= STRUCTURES:
            raise NotShared(f"the graph of the model has had {STRUCTURES} structures so far, so it is another one each step")
        try:
            self._plans[key] = Examination(self.model, graph, losses, params, watch).plan()
        except Pending:  # without a gradient nothing can be seen, and nothing is lost: look again 1, 2, 4, ... steps later
            self._wait, self._waited = self._waited, min(2 * self._waited + 1, 255)
            return None
        self._wants_watch = False
        return self._plans[key]


class _Sweep:
    """One run: hooks at the boundaries form the products for all factors while gradients pass."""

    def __init__(
        self, graph: Graph, plan: Plan, params: list[Tensor], seeds: Tensor, factors: Sequence[Tensor]
    ) -> None:
        self.graph, self.plan, self.params, self.seeds = graph, plan, params, seeds
        self.factors = [factor.to(seeds) for factor in factors]
        self.found: list[dict[int, Tensor]] = [{} for _ in factors]
        self._rows: dict[Any, Tensor] = {}

    def run(self, losses: Tensor, native: bool, wanted: list[Tensor]) -> list[list[Tensor | None]]:
        nodes = self.graph.nodes
        hooks = [nodes[one.node].register_prehook(self._hook(one)) for one in self.plan.boundaries]
        try:
            if native:
                torch.autograd.backward(losses, self.seeds)
            else:  # down to the lowest uses of parameters, and no products but theirs
                ends = [one for one in self.plan.boundaries if one.lowest or not one.apart]
                edges = [edge for one in ends for edge in self._edges(one)]
                torch.autograd.grad(losses, edges, self.seeds, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        place = {id(param): i for i, param in enumerate(self.params)}
        return [self._owned([found.get(place.get(id(param), -1)) for param in wanted], wanted) for found in self.found]

    def _edges(self, boundary: Boundary) -> list[GradientEdge]:
        edges = self.graph.nodes[boundary.node].next_functions
        return [GradientEdge(*edges[i]) for i in boundary.edges]

    def _hook(self, boundary: Boundary) -> Any:
        node = self.graph.nodes[boundary.node]
        leaves = [self.params[i] for i in boundary.leaves]
        inside = False

        def products(grads: tuple[Tensor | None, ...]) -> None:
            nonlocal inside
            if inside:  # autograd runs this node within the call below
                return
            inside = True
            try:
                for k in range(len(self.factors)):
                    outputs, given = self._below(node, boundary, grads, k)
                    if not outputs:
                        continue
                    parts = torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
                    for leaf, part in zip(boundary.leaves, parts, strict=True):
                        if part is not None:
                            mine = self.found[k].get(leaf)
                            self.found[k][leaf] = part if mine is None else mine + part
            finally:
                inside = False

        return products

    def _below(
        self, node: Any, boundary: Boundary, grads: tuple[Tensor | None, ...], k: int
    ) -> tuple[list[GradientEdge], list[Tensor]]:
        """Where to start from towards the parameters, and with which gradients."""
        scaled = [None if g is None else self._scaled(g, k, boundary.layouts[i]) for i, g in enumerate(grads)]
        if boundary.apart:
            there = [(GradientEdge(node, i), g) for i, g in enumerate(scaled) if g is not None]
        else:  # a parameter is used further below too: this node alone may run
            results = node(*scaled)
            results = results if isinstance(results, tuple) else (results,)
            there = []
            for i in boundary.edges:
                if results[i] is not None:
                    child, output = node.next_functions[i]
                    meta = child._input_metadata[output]  # what autograd fits to it: a parameter may be broadcast
                    there.append((GradientEdge(child, output), results[i].sum_to_size(meta.shape).to(meta.dtype)))
        return [edge for edge, _ in there], [grad for _, grad in there]

    def _scaled(self, grad: Tensor, k: int, layout: Layout) -> Tensor:
        key = (k, layout, grad.shape)
        if key not in self._rows:
            self._rows[key] = layout.rows(self.factors[k], grad)
        # Rounded once, at the end: a factor of 16 bits would weigh all of a sample's rows wrongly.
        return (grad * self._rows[key].to(torch.promote_types(grad.dtype, torch.float32))).to(grad.dtype)

    def _owned(self, grads: list[Tensor | None], params: list[Tensor]) -> list[Tensor | None]:
        """Gradients in memory of their own, laid out like the parameters, as autograd leaves them in ``grad``."""
        users = Counter(grad.untyped_storage().data_ptr() for grad in grads if grad is not None)
        for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if grad is None:
                continue
            memory = grad.untyped_storage()
            alone = users[memory.data_ptr()] == 1 and memory.nbytes() == grad.nbytes
            if not alone or grad.stride() != param.stride() or grad.dtype != param.dtype:
                grads[i] = torch.empty_like(param, requires_grad=False).copy_(grad)
        return grads
