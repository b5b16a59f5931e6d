"""Rows with weights of their own: a module that computes each sample with the weights of the sample's class, in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ltsam_fast.lists import tensors_in
from ltsam_fast.shared.autograd_graph import AutogradGraph
from ltsam_fast.shared.layout import SampledElements, distinct_seeds
from ltsam_fast.shared.qualify import current_checkpoint, eager_modules


def owner_of(params: Sequence[Tensor], root: nn.Module | None) -> nn.Module | None:
    """The innermost module of ``root`` whose weights that require gradients are just ``params``, if there is one."""
    wanted = {id(param) for param in params}
    found = None
    for _, module in eager_modules(root) if root is not None else ():
        if weights_of(module) == wanted:
            found = module
    return found


def weights_of(module: nn.Module) -> set[int]:
    """The ids of a module's weights that require gradients."""
    return {id(param) for param in module.parameters() if param.requires_grad}


class _Readers(TorchFunctionMode):
    """Notes whether functions get weights elsewhere than in their module, even if no gradient tells of it.

    Attributes:
        inside: Whether the module runs now.
        found: Whether there was such a function.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.ids = {id(param) for param in params}
        self.inside = self.found = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.inside and not self.ids.isdisjoint(map(id, tensors_in((args, kwargs)))):
            # Not what tells of a weight's kind alone, nor zero_grad().
            self.found |= bool(tensors_in(result)) or getattr(function, "__name__", "").startswith("_foreach")
        return result


_BY_ROW = (
    *(
        nn.Sequential,
        nn.Identity,
        nn.Linear,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.Dropout,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
    ),
    *(nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish),
)
"""Modules that compute each row of their input by itself, whatever the rows are."""


def by_row_alone(module: nn.Module) -> bool:
    """Whether a module is known to compute each row by itself; gradients would not show what is detached or zero.

    Known are plain modules of torch, without hooks, and those that say so by ``keeps_samples_apart = True``.
    """
    return all(
        (type(one) in _BY_ROW or getattr(one, "keeps_samples_apart", False))
        and not (one._forward_pre_hooks or one._forward_hooks)
        for one in module.modules()
    )


class Head:
    """A module whose forward pass may take each row with other weights, where samples stay apart from its input on.

    Args:
        module: The module, called once in a forward pass, with one tensor, whose first dimension is the samples'.
        params: Its weights that require gradients.

    Attributes:
        in_checkpoint: Whether the watched pass called it in an activation checkpoint.
    """

    def __init__(self, module: nn.Module, params: list[Tensor]) -> None:
        self.module, self.params = module, params
        self.in_checkpoint = False
        self._readers = _Readers(params)
        self._calls: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def watched(self, compiled: bool) -> Iterator[None]:
        """Around a forward pass: notes what the module is given and gives, and who else has its weights.

        Args:
            compiled: Whether something may be compiled, and so would be anew if functions were looked at.
        """
        self._calls = []
        self._readers = readers = _Readers(self.params)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            readers.inside = True
            if torch._C._are_functorch_transforms_active() or current_checkpoint():
                return None  # what is saved in a checkpoint is to be saved again by its recomputation
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
                if not args[0].requires_grad:  # of a frozen backbone, or the network's own input: to be looked at too
                    return (args[0].detach().requires_grad_().clone(),), kwargs
            return None

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            readers.inside = False
            readers.found |= weights_of(self.module) != readers.ids  # functional_call gives it others
            self._calls.append((*args, kwargs, output))
            self.in_checkpoint = current_checkpoint() is not None

        hooks = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            with contextlib.nullcontext() if compiled else readers:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def keeps_apart(self, losses: Tensor) -> bool:
        """Whether the watched pass gave each loss from its own row of the module's input, and used the weights there alone."""
        calls, self._calls = self._calls, []
        if len(calls) != 1 or len(calls[0]) != 3 or self._readers.found:
            return False
        x, keywords, out = calls[0]
        if keywords or not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return False
        if not x.requires_grad or not out.requires_grad or x.shape[:1] != losses.shape or out.shape[:1] != losses.shape:
            return False
        graph = AutogradGraph(losses, self.params)
        elsewhere = graph.below(0, without=graph.number.get(out.grad_fn, -1))
        if x.grad_fn in graph.number:
            elsewhere |= graph.below(graph.number[x.grad_fn])
        if any(graph.leaf[one] >= 0 for one in elsewhere) or graph.reentrant:
            return False
        seeds = distinct_seeds(len(losses))
        grads = [
            torch.autograd.grad(losses, x, some.to(losses), retain_graph=True, materialize_grads=True)[0]
            for some in (torch.ones_like(seeds), seeds)
        ]
        sample = SampledElements(grads[0])  # gradients of zeros alone show nothing
        return len(sample) > 0 and any(one.dim == 0 and one.outer == 1 for one in sample.layouts(grads[1], seeds))

    @contextlib.contextmanager
    def by_row(self, rows: Sequence[Tensor], weights: Sequence[list[Tensor]]) -> Iterator[None]:
        """The module with ``weights[k]`` for the ``rows[k]`` of its input, in this forward pass and its backward.

        Args:
            rows: K int64 tensors, which have each row once.
            weights: K values for each of ``params``, which get the gradients.
        """
        forward, own = self.module.forward, self.module.__dict__.get("forward")
        places = {id(param): f"module.{name}" for name, param in self.module.named_parameters()}
        calling = Calling(self.module)
        back = torch.cat(list(rows)).argsort()

        def by_row(x: Tensor) -> Tensor:
            outputs = []
            with own_weights(self.module):
                for some, values in zip(rows, weights, strict=True):
                    there = {places[id(p)]: Instead.apply(p, v) for p, v in zip(self.params, values, strict=True)}
                    outputs.append(torch.func.functional_call(calling, there, (forward, x.index_select(0, some))))
            return torch.cat(outputs).index_select(0, back)

        self.module.forward = by_row
        try:
            yield
        finally:
            if own is None:
                del self.module.forward
            else:
                self.module.forward = own


@contextlib.contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Around ``functional_call``, which Ctrl-C may stop while it exchanges weights: puts the module's own back."""
    own = [(one._parameters, dict(one._parameters)) for one in module.modules()]
    try:
        yield
    finally:
        for now, before in own:
            now.update(before)


class Calling(nn.Module):
    """Calls a function with a module as a child, whose weights ``functional_call`` exchanges."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Any, *args: Any) -> Any:
        """Returns what the function does."""
        return function(*args)


class Instead(torch.autograd.Function):
    """Another value in place of a weight, or values (K, ...): the weight gets the gradient, in sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the value."""
        ctx.shape = weight.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Returns the weight's gradient."""
        return grad.sum_to_size(ctx.shape), None
