"""The base optimizer's step from the unperturbed weights, fused or by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ltsam_fast.optim.ascent import Climber, sign_of
from ltsam_fast.optim.fused import FUSED, local_of
from ltsam_fast.optim.gradients import _NONE, Uninterrupted, _gradients, _same_items, check_all_dense
from ltsam_fast.weight_caches import clear_weight_caches


@contextlib.contextmanager
def no_hooks(*registered: dict[int, Any]) -> Iterator[None]:
    """Keeps hooks for all optimizers, and those in the dictionaries ``registered``, from being called."""
    registered = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *registered)
    kept = [dict(hooks) for hooks in registered]
    for hooks in registered:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(registered, kept, strict=True):
            hooks.update(before)


class Descender(Climber):
    """Restores the weights and steps with the gradients of all passes."""

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Restores the weights and takes the base optimizer's step with the present plus the kept gradients."""
        params, groups = self._parameters()
        grads = self._aligned(params, _gradients(params))
        if found_inf is not None and self._distributed:  # one worker's overflow is everybody's
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, self._process_group)
        extra = self._clean and self._aligned(params, self._clean) or None
        if extra and self._mixes:  # a gradient of the last pass decides whether a weight moves
            extra = [None if grad is None else kept for grad, kept in zip(grads, extra, strict=True)]
        with Uninterrupted():
            backups = self._climbed_from
            if not _same_items(params, self._climbed):
                old = dict(zip(self._climbed, self._climbed_from, strict=True))
                backups = [
                    old.get(param, shard) for param, shard in zip(params, local_of(params, self._sharded), strict=True)
                ]
            if _NONE in map(type, grads):
                stepping = self._restore_without_gradient(params, grads, extra)
                params, groups = [params[i] for i in stepping], [groups[i] for i in stepping]
                grads, backups = [grads[i] for i in stepping], [backups[i] for i in stepping]
                extra = [extra[i] for i in stepping] if extra else None
            mix = self._mix(grads, extra) if extra else None
            if extra and _NONE in map(type, grads):  # kept gradients that stand alone count in the norm too
                pairs = list(zip(grads, extra, strict=True))
                grads = [kept if grad is None else grad for grad, kept in pairs]
                extra = [None if grad is None else kept for grad, kept in pairs]
            norm = None
            if params and (self.max_grad_norm or found_inf is not None):
                norm = self._norm(grads, use=" of the step", kept_grads=extra, combination=mix, found_inf=found_inf)
            if type(self.base_optimizer) in FUSED:
                self._update(
                    self.base_optimizer,
                    params,
                    groups,
                    grads,
                    extra,
                    backups,
                    self.max_grad_norm,
                    norm,
                    mix,
                    grad_scale,
                    found_inf,
                    self._sharded,
                )
            else:
                self._base_step(params, groups, grads, extra, norm, mix, grad_scale, found_inf)
            self._let_go_of_copies()
            self._count_step()
            if found_inf is not None:
                skipped = self._skipped_steps()
                self._skipped = found_inf.detach().clone() if skipped is None else skipped.add_(found_inf)
            self._settle()
        # What torch's learning rate schedulers look for; one may have been given the base optimizer.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    _steps_beside = False
    """Whether the last two numbers of ``_mix`` are not zero."""

    def _create_base_state(self, params: list[Tensor], groups: list[int]) -> None:
        """The base optimizer's state before its first step; by itself it can only make it by stepping."""
        if type(self.base_optimizer) in FUSED:
            FUSED[type(self.base_optimizer)][2](self.param_groups, groups, params, [self.state[p] for p in params])
        else:
            self._base_step(params, groups, [param.grad for param in params], None, None, None, None, None)

    def _mix(self, grads: list[Tensor | None], kept: list[Tensor | None]) -> Tensor | None:
        """How the last pass's gradients and the kept ones become the step: four numbers as in ops.sgd_step_, or their sum."""
        return None

    def _restore_without_gradient(
        self, params: list[Tensor], grads: list[Tensor | None], extra: list[Tensor | None] | None
    ) -> list[int]:
        """Brings back weights that climbed and got no gradient since; returns the indices of those that step."""
        stepping = [i for i, g in enumerate(grads) if g is not None or (extra is not None and extra[i] is not None)]
        moving = {params[i] for i in stepping}
        back = [i for i, param in enumerate(self._climbed) if param not in moving]
        self._put_back([self._climbed[i] for i in back], [self._climbed_from[i] for i in back])
        return stepping

    def _base_step(
        self,
        params: list[Tensor],
        groups: list[int],
        grads: list[Tensor | None],
        extra: list[Tensor | None] | None,
        norm: Tensor | None,
        mix: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The step of an optimizer that has no fused pass. With a scaler it waits for the device to know the overflow."""
        check_all_dense(grads)
        self._put_back(self._climbed, self._climbed_from, self._table("restore_"))
        if found_inf is not None and bool(found_inf):
            return
        beside: list[Tensor] = []
        unscale = factor = 1.0 if grad_scale is None else 1 / grad_scale
        if mix is not None and extra is not None:
            pairs = [
                (g, torch.zeros_like(g) if e is None else e) for g, e in zip(grads, extra, strict=True) if g is not None
            ]
            if self._steps_beside:
                lrs = [
                    sign_of(group) * float(group["lr"]) * unscale
                    for group in map(self.param_groups.__getitem__, groups)
                ]
                beside = [(-lr * (mix[2] * g + mix[3] * e)).to(g) for lr, (g, e) in zip(lrs, pairs, strict=True)]
            grads, extra = [(mix[0] * g + mix[1] * e).to(g) for g, e in pairs], None
        if self.max_grad_norm and norm is not None:
            factor = factor * (self.max_grad_norm / (norm * factor + 1e-6)).clamp(max=1.0)
        for param, grad, kept in zip(params, grads, extra or [None] * len(params), strict=True):
            total = kept if grad is None else grad if kept is None else grad.add_(kept)
            param.grad = total if isinstance(factor, float) else total.mul_(factor.to(total))  # type: ignore[union-attr]
        for param in self._parameters()[0]:
            if not param.requires_grad:  # frozen since its last backward
                param.grad = None
        own = [{name: group[name] for name in self._base_only} for group in self.param_groups]
        # torch's optimizers take a state that is not empty for one of theirs.
        states = [state for state in self.state.values() if self._buffers]
        buffers = [{name: state.pop(name) for name in self._buffers if name in state} for state in states]
        try:
            for group in self.param_groups:
                group.update(self._base_only)
            with no_hooks():  # those for all optimizers have their turn around the whole step
                self.base_optimizer.step()
        finally:
            for group, values in zip(self.param_groups, own, strict=True):
                group.update(values)
            for state, values in zip(states, buffers, strict=True):
                state.update(values)
        if beside:
            torch._foreach_add_(params, beside)
        clear_weight_caches()
