"""What a step is given: closures with their labels, and a scaler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ltsam_fast.optim.compiled import CompiledGraphs
from ltsam_fast.optim.gradients import gradients_aside
from ltsam_fast.weight_caches import clear_weight_caches

Closure = Callable[..., Tensor]

_PUBLISHED = "a closure that calls backward() itself, as in scripts for the published SAM, is for ltsam_fast.compat.SAM"


def mean_loss(parts: list[Batch]) -> Tensor:
    """The mean loss at w over all samples, 0-d."""
    return torch.stack([part.total for part in parts]).sum() / sum(part.size for part in parts)


class Batch:
    """A closure with its labels: the batch, or one of the parts that it comes in.

    Attributes: ``size``, the number of samples (-1 until known), and ``total``, the sum of the losses seen at w.
    """

    def __init__(
        self, closure: Closure, labels: Tensor | None, params: list[Tensor], graphs: CompiledGraphs | None = None
    ) -> None:
        self.closure, self.labels, self._params, self._graphs = closure, labels, params, graphs
        self.size = -1 if labels is None else len(labels)
        self.total: Any = 0

    def evaluate(self, index: Tensor | None = None, *, at_w: bool = True, graph: bool = True) -> Tensor:
        """The closure's per-sample losses, checked.

        Args:
            index: The numbers of the samples wanted, 1-D; ``None``: all.
            at_w: The weights are not perturbed: these losses count for what the step returns.
            graph: The losses are to be differentiated.
        """
        if index is None and self.size >= 0 and _needs_index(self.closure):
            index = torch.arange(self.size, device=self.labels.device if self.labels is not None else None)
        clear_weight_caches()  # of an evaluation without gradients, too
        with gradients_aside(self._params), torch.set_grad_enabled(graph):
            try:
                losses = self.closure() if index is None else self.closure(index)
            except RuntimeError as error:
                if graph or "does not require grad" not in str(error):
                    raise
                raise ValueError(f"closure must run without gradients too: {_PUBLISHED}") from error
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"closure must return the per-sample losses, shape (B,), got {shape}: use reduction='none'; {_PUBLISHED}"
            )
        if graph and not losses.requires_grad:
            raise ValueError("closure must return losses that depend on the parameters, got a detached tensor")
        if self._graphs is not None and at_w:
            self._graphs.check(losses)
        if index is not None:
            if len(losses) != len(index):
                raise ValueError(f"closure returned {len(losses)} losses for an index of {len(index)} samples")
        elif self.size < 0:
            self.size = len(losses)
        elif len(losses) != self.size:
            if at_w:
                raise ValueError(
                    f"targets has {self.size} entries, but closure returned {len(losses)} losses: give one each"
                )
            raise ValueError(f"closure returned {len(losses)} losses at the perturbed weights, but {self.size} before")
        if at_w:
            self.total = self.total + losses.detach().sum()
        return losses


class Scaling:
    """What a GradScaler means for a step: losses are scaled up, and an overflow in any pass skips the whole update."""

    def __init__(self, scaler: Any, params: list[Tensor]) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        if self._scaler is not None and params:
            self.found_inf = torch.zeros((), dtype=torch.float32, device=params[0].device)
            self._scaler.scale(self.found_inf)  # makes the scale, if this is its first use
            self.grad_scale = self._scaler._get_scale_async()

    @property
    def signals(self) -> tuple[Tensor | None, Tensor | None]:
        """``grad_scale`` and ``found_inf`` as the ops take them."""
        return self.grad_scale, self.found_inf

    def __call__(self, weights: Tensor) -> Tensor:
        """The weights of a loss, scaled up."""
        return weights if self._scaler is None else self._scaler.scale(weights)

    def check_scaled(self, optimizer: Optimizer) -> None:
        """Raises ValueError if the gradients were unscaled already."""
        if self._scaler is not None and self._scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED:
            raise ValueError(
                "scaler.unscale_(optimizer) must not be called: gradients are unscaled inside the passes; "
                "to clip them, give the optimizer max_grad_norm"
            )

    def report(self, optimizer: Optimizer) -> None:
        """Tells the scaler what scaler.step() would have found, for its update()."""
        if self._scaler is None or self.found_inf is None:
            return
        record = self._scaler._per_optimizer_states[id(optimizer)]
        record["found_inf_per_device"] = {self.found_inf.device: self.found_inf}
        record["stage"] = OptState.STEPPED


def _needs_index(closure: Closure) -> bool:
    """Whether a closure can only be called with an index."""
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def check_takes_index(parts: list[Batch], method: str) -> None:
    """Raises ValueError unless every closure can be called with an index."""
    for part in parts:
        try:
            inspect.signature(part.closure).bind(torch.zeros(0))
        except TypeError:
            raise ValueError(
                f"closure must take an index, for {method} evaluates parts of the batch: "
                f"def closure(index=slice(None)), with the losses of x[index]; {_PUBLISHED}"
            ) from None
        except ValueError:  # a callable without a signature
            continue
        if part.labels is None and _needs_index(part.closure):
            raise ValueError(
                "closure must give index a default, or targets must be given: else the batch's size is unknown"
            )
