"""Compiled models whose losses are differentiated more than once.

A graph made by torch.compile may give its saved tensors' memory away during the backward. torch refuses to differentiate such
a graph again; without that (``torch._functorch.config.donated_buffer``) its graphs can be differentiated as often as any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


class CompiledGraphs:
    """What an optimizer knows of the graphs in its closures."""

    def __init__(self) -> None:
        self._compiled = 0  # graphs when the closure's were looked at

    @contextlib.contextmanager
    def reusable(self) -> Iterator[None]:
        """Has torch.compile, if it is at work in here, make graphs that can be differentiated again. About 3 us."""
        from torch._functorch import config

        before = config.donated_buffer
        config.donated_buffer = False
        try:
            yield
        finally:
            config.donated_buffer = before

    def check(self, losses: Tensor) -> None:
        """Raises ValueError if a graph that was compiled elsewhere can be differentiated only once.

        With the setting above torch itself would not notice any more. Looked at only after something was compiled.
        """
        from torch._dynamo.utils import counters

        compiled = counters["stats"]["unique_graphs"]
        if compiled == self._compiled:
            return
        seen, nodes = set(), [losses.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if getattr(getattr(getattr(node, "_forward_cls", None), "metadata", None), "bw_donated_idxs", None):
                raise ValueError(
                    "closure must not use a graph of torch.compile that can be differentiated only once: set "
                    "torch._functorch.config.donated_buffer = False before the model's first forward pass, "
                    "or let that be in step()"
                )
            nodes += [following for following, _ in node.next_functions]
        self._compiled = compiled
