"""The base optimizers' steps, fused: torch's own state and options, handed to :mod:`ltsam_fast.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.ops.checks import number
from ltsam_fast.table import TensorTable

Tensors = Sequence[Tensor | None]


def _buffers(name: str, states: list[dict[str, Any]], params: list[Tensor], wanted: list[bool]) -> Tensors:
    """A buffer of each parameter's kind where wanted: what the state has, else zeros."""
    buffers = [state.get(name) if want else None for state, want in zip(states, wanted, strict=True)]
    for i, buffer in enumerate(buffers):
        if buffer is None and wanted[i]:
            buffers[i] = states[i][name] = torch.zeros_like(params[i], requires_grad=False)
    return buffers


def _step_count(state: dict[str, Any], param: Tensor) -> Tensor:
    """The number of steps taken, on the parameter's device, where the pass reads it and counts it up."""
    count = state.get("step")
    if not isinstance(count, Tensor) or count.device != param.device or count.dtype != torch.float32:
        count = state["step"] = torch.as_tensor(
            0.0 if count is None else count, dtype=torch.float32, device=param.device
        )
    return count


def _options(groups: list[dict[str, Any]], *names: str) -> dict[str, tuple[float, ...]]:
    """Hyperparameters, one value a group."""
    return {name: tuple(number(group[name]) for group in groups) for name in names}


def _sgd(groups: list[dict[str, Any]], group_of: list[int], params: list[Tensor], states: list[Any]) -> dict[str, Any]:
    """State and options of torch.optim.SGD."""
    momentum = [group["momentum"] != 0 for group in groups]
    damped = [group["momentum"] != 0 and group["dampening"] != 0 for group in groups]
    state: dict[str, Any] = {}
    if any(momentum):
        state["momentum_buffers"] = _buffers("momentum_buffer", states, params, [momentum[g] for g in group_of])
    if any(damped):
        state["steps"] = [
            _steps_of_sgd(state, param) if damped[group] else None
            for state, param, group in zip(states, params, group_of, strict=True)
        ]
    return state | _options(groups, "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def _steps_of_sgd(state: dict[str, Any], param: Tensor) -> Tensor:
    """Dampening starts with a tensor's second step, so steps must be counted; torch's SGD only knows a buffer is there."""
    known = "step" in state
    count = _step_count(state, param)
    if not known and bool(state["momentum_buffer"].any()):
        count.fill_(1.0)  # a checkpoint of torch's SGD
    return count


def _adam(groups: list[dict[str, Any]], group_of: list[int], params: list[Tensor], states: list[Any]) -> dict[str, Any]:
    """State and options of torch.optim.Adam and AdamW."""
    everywhere = [True] * len(params)
    state: dict[str, Any] = {
        "steps": [_step_count(state, param) for state, param in zip(states, params, strict=True)],
        "exp_avgs": _buffers("exp_avg", states, params, everywhere),
        "exp_avg_sqs": _buffers("exp_avg_sq", states, params, everywhere),
    }
    if any(group["amsgrad"] for group in groups):
        amsgrad = [bool(groups[group]["amsgrad"]) for group in group_of]
        state["max_exp_avg_sqs"] = _buffers("max_exp_avg_sq", states, params, amsgrad)
    for i in (0, 1):
        state[f"beta{i + 1}"] = tuple(number(group["betas"][i]) for group in groups)
    state["decoupled"] = tuple(float(group.get("decoupled_weight_decay", False)) for group in groups)
    return state | _options(groups, "lr", "eps", "weight_decay", "maximize")


FUSED: dict[type, tuple[str, Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    torch.optim.SGD: ("sgd_step_", ops.sgd_step_, _sgd),
    torch.optim.Adam: ("adam_step_", ops.adam_step_, _adam),
    torch.optim.AdamW: ("adam_step_", ops.adam_step_, _adam),
}
"""Base optimizers that have a pass of their own. Subclasses may compute something else: they step by themselves."""


def local_of(tensors: list[Any], sharded: bool) -> list[Any]:
    """This worker's shards of FSDP2's tensors; other tensors are themselves."""
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors] if sharded else tensors


def begin_of(tensor: Any) -> int:
    """The element number, in the whole tensor, that this worker's shard begins at."""
    if not hasattr(tensor, "_local_tensor"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if math.prod(shape) and tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"params must be sharded along their first dimension, got {tensor.placements}")
    return int(offset[0] * math.prod(tensor.shape[1:])) if offset else 0


class Update:
    """Restore, sum and update, with the table that the pass uses again and again."""

    def __init__(self) -> None:
        self._table: TensorTable | None = None

    def __call__(
        self,
        base: torch.optim.Optimizer,
        params: list[Tensor],
        group_of: list[int],
        grads: Tensors,
        extra: Tensors | None,
        backups: list[Tensor],
        max_norm: float,
        norm: Tensor | None,
        mix: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        sharded: bool,
    ) -> None:
        """Steps ``params`` of groups ``group_of`` from ``backups`` with ``grads + extra``."""
        name, op, arguments = FUSED[type(base)]
        if self._table is None or self._table.op.name != name:
            self._table = TensorTable(ops.OPS[name])
        state = arguments(base.param_groups, group_of, params, [base.state[param] for param in params])
        if sharded:
            state = {key: local_of(value, True) if isinstance(value, list) else value for key, value in state.items()}
        op(
            local_of(params, sharded),
            local_of(grads, sharded),  # type: ignore[arg-type]
            backups=backups,
            kept_grads=extra and local_of(extra, sharded),  # type: ignore[arg-type]
            max_norm=max_norm if norm is not None else 0.0,
            norm=norm,
            combination=mix,
            groups=group_of,
            grad_scale=grad_scale,
            found_inf=found_inf,
            table=self._table,
            **state,
        )
