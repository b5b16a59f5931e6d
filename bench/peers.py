"""What this package is compared with: SAM and Focal-SAM by torch._foreach_* and torch.compile, and pytorch_optimizer."""

from __future__ import annotations

import importlib
from typing import Any

import torch

Tensors = list[torch.Tensor]


def ascend(params: Tensors, grads: Tensors, old: Tensors, rho: float) -> None:
    """Saves the weights and perturbs them along the gradients."""
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_copy_(old, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm + 1e-12)))


def descend(params: Tensors, grads: Tensors, kept: Tensors, old: Tensors, buffers: Tensors, options: Any) -> None:
    """Restores the weights, adds up gradients and takes SGD's step with momentum; torch.compile fuses it."""
    torch._foreach_copy_(params, old)
    if kept:
        grads = torch._foreach_add(grads, kept)
    grads = torch._foreach_add(grads, params, alpha=options["weight_decay"])
    torch._foreach_mul_(buffers, options["momentum"])
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(params, buffers, alpha=-options["lr"])


class Foreach(torch.optim.Optimizer):
    """SAM and Focal-SAM by torch._foreach_* and the base optimizer's fused kernel."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float, **base: Any) -> None:
        super().__init__(params, {"rho": rho})
        self.base = base_optimizer(self.param_groups, fused=True, **base)
        self.param_groups = self.base.param_groups
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.rho, self.kept = rho, []

    def gradients(self) -> Tensors:
        grads = [p.grad for p in self.params]
        self.base.zero_grad()
        return grads

    @torch.no_grad()
    def ascend(self) -> None:
        self.old = [torch.empty_like(p) for p in self.params]
        ascend(self.params, self.gradients(), self.old, self.rho)

    @torch.no_grad()
    def descend(self) -> None:
        torch._foreach_copy_(self.params, self.old)
        if self.kept:
            torch._foreach_add_([p.grad for p in self.params], self.kept)
        self.base.step()
        self.base.zero_grad()


class Compiled(Foreach):
    """The same by torch.compile, which fuses the descent into C++ or Triton code."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float, **base: Any) -> None:
        super().__init__(params, base_optimizer, rho, **base)
        self.options = base
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.old = [torch.empty_like(p) for p in self.params]
        self.weights = [p.detach() for p in self.params]
        # Compiled for each network: shapes are fixed, and a cache for many networks would overflow.
        self.compiled = [torch.compile(one, dynamic=False) for one in (ascend, descend)]

    @torch.no_grad()
    def ascend(self) -> None:
        self.compiled[0](self.weights, self.gradients(), self.old, self.rho)

    @torch.no_grad()
    def descend(self) -> None:
        self.compiled[1](self.weights, self.gradients(), self.kept, self.old, self.buffers, self.options)


class SAM:
    """The phases of SAM."""

    def first_step(self) -> None:
        self.ascend()

    def second_step(self) -> None:
        self.descend()


class FocalSAM:
    """The phases of Focal-SAM."""

    def first_step(self) -> None:
        self.kept = self.gradients()

    def second_step(self) -> None:
        self.ascend()

    def third_step(self) -> None:
        self.descend()


def with_engine(engine: type, phases: type) -> Any:
    """Returns a method's phases, run by :class:`Foreach` or :class:`Compiled`."""
    return type(f"{engine.__name__}{phases.__name__}", (phases, engine), {})


def published(method: str) -> Any:
    """Returns pytorch_optimizer's class of that name, or None."""
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), method, None)
    except ImportError:
        return None
