"""What ours is measured against: the fastest SAM and Focal-SAM from torch's own parts, and the strongest package there is."""

from __future__ import annotations

import importlib
from typing import Any

import torch


class Foreach(torch.optim.Optimizer):
    """SAM and Focal-SAM by torch._foreach_* and the base optimizer's fused kernel."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float, **base: Any) -> None:
        super().__init__(params, {"rho": rho})
        self.base = base_optimizer(self.param_groups, fused=True, **base)
        self.param_groups = self.base.param_groups
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.rho = rho

    @torch.no_grad()
    def climb(self) -> None:
        grads = [p.grad for p in self.params]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        self.old = [torch.empty_like(p) for p in self.params]
        torch._foreach_copy_(self.old, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        torch._foreach_copy_(self.params, self.old)
        self.base.step()
        self.base.zero_grad()


class SAM(Foreach):
    """The phases of SAM."""

    def first_step(self) -> None:
        self.climb()

    def second_step(self) -> None:
        self.descend()


class FocalSAM(Foreach):
    """The phases of Focal-SAM."""

    @torch.no_grad()
    def first_step(self) -> None:
        self.kept = [p.grad for p in self.params]
        self.base.zero_grad()

    def second_step(self) -> None:
        self.climb()

    @torch.no_grad()
    def third_step(self) -> None:
        torch._foreach_add_([p.grad for p in self.params], self.kept)
        self.descend()


def published(method: str) -> Any:
    """pytorch_optimizer's class of that name, or None."""
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), method, None)
    except ImportError:
        return None
