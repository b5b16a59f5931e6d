"""The base optimizer's step from the unperturbed weights: fused with restoring and summing, or by itself."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast import ops
from ltsam_fast.lists import entries, has_none, values_of
from ltsam_fast.ops.checks import number, plain, shown
from ltsam_fast.ops.dispatch import clear_weight_caches
from ltsam_fast.optim.amp import LossScale
from ltsam_fast.optim.gradients import check_all_dense
from ltsam_fast.optim.parallel import Single
from ltsam_fast.optim.perturbation import Perturbation
from ltsam_fast.reference.passes import decoupled_step, direction

Group = dict[str, Any]


@dataclass(slots=True)
class Update:
    """What a step does to the weights: ``base_step(w, c0 g + c1 h) - lr (c2 g + c3 h)``."""

    params: list[Tensor]
    groups: list[int]
    """The group of each parameter."""
    grads: list[Tensor | None]
    """g"""
    kept: list[Tensor | None] | None
    """h"""
    combination: Tensor | None
    """c, shape (4,); None: (1, 1, 0, 0)."""
    decoupled: bool
    """Whether c2 or c3 is not zero."""
    norm: Tensor | None
    """Norm of c0 g + c1 h, still scaled, where it is known."""
    max_norm: float
    """What it is clipped to; 0: it is not."""


class FusedStep:
    """SGD, Adam and AdamW: restoring, summing and updating are one pass."""

    def __init__(self, op: str, arguments: Callable[..., dict[str, Any]]) -> None:
        self._op, self._arguments = op, arguments

    def create_state(self, optimizer: Any, params: list[Tensor], groups: list[int]) -> None:
        """Makes the base optimizer's state as before its first step."""
        base = optimizer.base_optimizer
        self._arguments(base.param_groups, groups, params, values_of(base.state, params))

    def __call__(
        self, optimizer: Any, update: Update, perturbation: Perturbation, scaling: LossScale, workers: Single
    ) -> None:
        """Restores the weights and steps."""
        base, params, table = optimizer.base_optimizer, update.params, workers.tables[self._op]
        state = self._arguments(base.param_groups, update.groups, params, values_of(base.state, params))
        grads, kept, now = update.grads, update.kept, perturbation.now
        backups = now.backups if params is now.params else perturbation.sources_of(params, workers)
        perturbation.updating = params, table, table.calls
        if workers.sharded:
            params, grads, kept = workers.local(params), workers.local(grads), kept and workers.local(kept)
            state = {name: workers.local(values) for name, values in state.items()}
        state |= scaling.signals
        getattr(ops, self._op)(
            params,
            grads,
            backups=backups,
            kept_grads=kept,
            max_norm=0.0 if update.norm is None else update.max_norm,
            norm=update.norm,
            combination=update.combination,
            groups=update.groups if len(base.param_groups) > 1 else None,
            table=table,
            **state,
        )


class UnfusedStep:
    """Any other torch optimizer: it steps by itself on the restored weights."""

    def create_state(self, optimizer: Any, params: list[Tensor], groups: list[int]) -> None:
        """Makes the base optimizer's state by a step, with gradients that are 0: no optimizer tells what it is to be."""
        with optimizer.base_alone():
            call_step(optimizer.base_optimizer)

    def __call__(
        self, optimizer: Any, update: Update, perturbation: Perturbation, scaling: LossScale, workers: Single
    ) -> None:
        """Restores the weights and steps. With a scaler it waits for the device to know whether a pass has overflowed."""
        check_all_dense(update.grads)
        perturbation.restore(workers)
        if scaling.found_inf is not None and bool(scaling.found_inf):
            return
        totals, beside = _sum_up(update, optimizer.param_groups, scaling, workers)
        for param, total in zip(update.params, totals, strict=True):
            param.grad = total
        for param in optimizer.all_params()[0]:
            if not param.requires_grad:  # frozen since its last backward
                param.grad = None
        with optimizer.base_alone():
            call_step(optimizer.base_optimizer)
        if beside:
            torch._foreach_add_(workers.local(update.params), beside)
        clear_weight_caches()


def base_step_of(base: Optimizer) -> FusedStep | UnfusedStep:
    """How a base optimizer steps. Subclasses of the fused ones may compute something else: they step by themselves."""
    return FUSED.get(type(base)) or UnfusedStep()


def is_fused(base: Optimizer) -> bool:
    """Whether the base optimizer's step is a pass of this package."""
    return type(base) in FUSED


def call_step(base: Optimizer) -> None:
    """``base.step()`` without the hooks for all optimizers: they have their turn around the whole step."""
    step = step_without_hooks(type(base))
    for hook in list(base._optimizer_step_pre_hooks.values()):
        hook(base, (), {})
    step(base)
    for hook in list(base._optimizer_step_post_hooks.values()):
        hook(base, (), {})


def step_without_hooks(kind: type[Optimizer]) -> Callable[..., Any]:
    """The function ``step`` of a class, without torch's wrapper that calls hooks around it."""
    step: Any = kind.step
    while getattr(step, "hooked", False):  # what wraps the wrapper says so too
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def sign_of(group: Group) -> int:
    """-1 for a group whose loss is maximized."""
    return -1 if group.get("maximize") else 1


def check_base(kind: type) -> None:
    """Raises TypeError for what is no optimizer, ValueError for one that can't step with the gradients of a method."""
    if not issubclass(kind, Optimizer):
        raise TypeError(f"base_optimizer must be a class such as torch.optim.SGD, got {shown(kind)}")
    if issubclass(kind, torch.optim.SparseAdam):
        raise ValueError("base_optimizer must not be SparseAdam, which needs sparse gradients: use torch.optim.Adam")
    try:
        inspect.signature(kind.step).bind(None)
    except TypeError:
        raise ValueError(
            f"base_optimizer must step without a closure, which {kind.__name__} needs: use torch.optim.SGD or AdamW"
        ) from None


def check_base_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of a base optimizer that are out of range; torch accepts some of these."""
    for name, (low, below) in _RANGES.items():
        value = options.get(name)
        if value is None or isinstance(value, (Tensor, tuple, list)):
            continue
        if not low <= plain(value) < below or plain(value) == -math.inf:
            wanted = "a finite number" if below == math.inf else "a number"
            ends = "" if low == -math.inf else f" >= {low:g}" if below == math.inf else f" in [{low:g}, {below:g})"
            raise ValueError(f"{name} must be {wanted}{ends}, got {shown(value)}")
    betas = options.get("betas", (0.0, 0.0))
    good = isinstance(betas, (tuple, list)) and len(betas) > 1
    if not good or not all(isinstance(one, Tensor) or 0 <= plain(one) < 1 for one in betas):
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {shown(betas)}")


_RANGES = {
    "lr": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "dampening": (-math.inf, math.inf),
    "eps": (0.0, math.inf),
}


def _sum_up(
    update: Update, groups: list[Group], scaling: LossScale, workers: Single
) -> tuple[list[Tensor], list[Tensor]]:
    """The unscaled and clipped gradient that the base optimizer gets, and the decoupled step besides, as in fused passes."""
    grads, c, scale = update.grads, update.combination, scaling.grad_scale
    others: list[Any] = update.kept or [None] * len(grads)
    totals: list[Any] = [other if grad is None else grad for grad, other in zip(grads, others, strict=True)]
    params, sums = workers.local(update.params), workers.local(totals)
    pairs = list(zip(workers.local(grads), workers.local(others), strict=True))
    if c is None and scale is None and update.norm is None:
        for total, (grad, other) in zip(sums, pairs, strict=True):
            if grad is not None and other is not None:
                total.add_(other)
        return totals, []
    beside: list[Any] = []
    if update.decoupled:
        own = [groups[i] for i in update.groups]
        beside = [
            -decoupled_step(param, number(group["lr"]), pair, sign_of(group) < 0, scale, c)
            for param, group, pair in zip(params, own, pairs, strict=True)
        ]
    for param, total, pair in zip(params, sums, pairs, strict=True):
        total.copy_(direction(param, pair, False, update.max_norm, update.norm, scale, c))
    return totals, beside


def _buffers(
    name: str, states: list[Group], params: list[Tensor], groups: list[int], wanted: list[bool]
) -> list[Tensor | None]:
    """A buffer of each parameter's kind in the groups where it is wanted: what the state has, else zeros."""
    buffers: list[Tensor | None] = entries(states, name)
    if not all(wanted):
        buffers = [buffer if wanted[group] else None for buffer, group in zip(buffers, groups, strict=True)]
    if has_none(buffers):
        for i, buffer in enumerate(buffers):
            if buffer is None and wanted[groups[i]]:
                buffers[i] = states[i][name] = torch.zeros_like(params[i], requires_grad=False)
    return buffers


def _step_count(state: Group, param: Tensor) -> Tensor:
    """The number of steps taken, on the parameter's device, where the pass reads it and counts it up."""
    count = state.get("step")
    if not isinstance(count, Tensor) or count.device != param.device or count.dtype != torch.float32:
        count = state["step"] = torch.as_tensor(
            0.0 if count is None else count, dtype=torch.float32, device=param.device
        )
    return count


def _options(groups: list[Group], *names: str) -> dict[str, list[float]]:
    """Hyperparameters, one value a group."""
    return {
        name: [value if isinstance(value := group[name], (int, float)) else number(value) for group in groups]
        for name in names
    }


def _sgd(groups: list[Group], group_of: list[int], params: list[Tensor], states: list[Any]) -> dict[str, Any]:
    """State and options of torch.optim.SGD."""
    momentum = [group["momentum"] != 0 for group in groups]
    damped = [group["momentum"] != 0 and group["dampening"] != 0 for group in groups]
    state: dict[str, Any] = {}
    if any(momentum):
        state["momentum_buffers"] = _buffers("momentum_buffer", states, params, group_of, momentum)
    if any(damped):
        state["steps"] = [
            _steps_of_sgd(state, param) if damped[group] else None
            for state, param, group in zip(states, params, group_of, strict=True)
        ]
    return state | _options(groups, "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def _steps_of_sgd(state: Group, param: Tensor) -> Tensor:
    """Dampening starts with a tensor's second step, so steps must be counted; torch's SGD only knows a buffer is there."""
    known = "step" in state
    count = _step_count(state, param)
    if not known and bool(state["momentum_buffer"].any()):
        count.fill_(1.0)  # a checkpoint of torch's SGD
    return count


def _adam(
    groups: list[Group], group_of: list[int], params: list[Tensor], states: list[Any], decoupled: bool = False
) -> dict[str, Any]:
    """State and options of torch.optim.Adam and AdamW, whose groups do not say in torch 2.6 whether the decay is decoupled."""
    everywhere = [True] * len(groups)
    state: dict[str, Any] = {
        "steps": [_step_count(state, param) for state, param in zip(states, params, strict=True)],
        "exp_avgs": _buffers("exp_avg", states, params, group_of, everywhere),
        "exp_avg_sqs": _buffers("exp_avg_sq", states, params, group_of, everywhere),
    }
    if any(group["amsgrad"] for group in groups):
        amsgrad = [bool(group["amsgrad"]) for group in groups]
        state["max_exp_avg_sqs"] = _buffers("max_exp_avg_sq", states, params, group_of, amsgrad)
    for i in (0, 1):
        state[f"beta{i + 1}"] = [number(group["betas"][i]) for group in groups]
    state["decoupled"] = [float(group.get("decoupled_weight_decay", decoupled)) for group in groups]
    return state | _options(groups, "lr", "eps", "weight_decay", "maximize")


FUSED = {
    torch.optim.SGD: FusedStep("sgd_step_", _sgd),
    torch.optim.Adam: FusedStep("adam_step_", _adam),
    torch.optim.AdamW: FusedStep("adam_step_", functools.partial(_adam, decoupled=True)),
}
