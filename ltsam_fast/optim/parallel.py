"""Workers: which gradients are averaged, when, and what is summed over the shards of the parameters.

:func:`workers_of` chooses :class:`Single`, :class:`Replicated` (DistributedDataParallel) or :class:`Sharded` (FSDP2).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.gradients import all_missing
from ltsam_fast.table import TensorTable

Tensors = list[Tensor | None]


class _Tables(dict[str, TensorTable]):
    """The tables of the ops, kept from step to step; a key is an op's name, a space and a use where it has several."""

    def __missing__(self, key: str) -> TensorTable:
        table = self[key] = TensorTable(ops.OPS[key.partition(" ")[0]], exact=True)
        return table


class Single:
    """The only worker."""

    averages = False
    """Whether gradients are to be averaged over workers."""
    sharded = False
    """Whether parameters are shards of larger ones."""
    finds_unused = False
    """Whether a worker may lack gradients that others have."""
    joins = False
    """Whether DDP's join() is around: workers that have joined take part in all that belongs to a forward pass, and no more."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.tables = _Tables()

    def backward(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a pass, forward and backward: keeps it from averaging gradients unless it is the step's last one."""
        return _NOTHING

    def local(self, tensors: list[Any]) -> list[Any]:
        """This worker's shards; other tensors are themselves."""
        return tensors

    def redistributed(self, params: list[Tensor], grads: Tensors) -> Tensors:
        """Gradients laid out over the workers as their parameters are."""
        return grads

    def norm(self, grads: Tensors, params: list[Tensor] | None = None, use: str = "", **options: Any) -> Tensor:
        """The norm of whole gradients as by :func:`ltsam_fast.ops.grad_norm`, whose arguments these are."""
        return ops.grad_norm(grads, params, table=self.tables["grad_norm" + use], **options)

    def dots(self, grads: Tensors, other: Tensors, use: str = "") -> Tensor:
        """The inner products of two gradients as by :func:`ltsam_fast.ops.grad_dots`."""
        return ops.grad_dots(grads, other, table=self.tables["grad_dots" + use])

    def average(self, params: list[Tensor], grads: Tensors) -> Tensors:
        """Gradients averaged over the workers."""
        return grads

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sums dense tensors over the workers, in place."""

    def share_overflow(self, found_inf: Tensor | None) -> None:
        """Makes one worker's overflow everybody's."""

    def gradients_cleared(self) -> None:
        """Is told when gradients were taken away between two backward passes."""

    def reshard(self) -> None:
        """Has copies of weights, that were gathered before these changed, gathered anew."""

    def abandon(self) -> None:
        """Is told when an exception has cut off a pass."""

    def check_join(self, reasons: dict[str, Any]) -> None:
        """Raises ValueError in DDP's join() if one of ``reasons`` holds: workers that have joined could not follow the step."""

    def check_equal(self, number: int, device: torch.device, message: str) -> None:
        """Raises ValueError on all workers unless ``number`` is the same on all; ``message`` has {least} and {most}."""


class Replicated(Single):
    """One of DistributedDataParallel's workers, each of which has all parameters.

    Gradients taken at w are each worker's own, as in the SAM paper; the step's last backward averages, once.
    """

    averages = True

    @property
    def finds_unused(self) -> bool:  # type: ignore[override]
        return getattr(self.model, "find_unused_parameters", False)

    @property
    def joins(self) -> bool:  # type: ignore[override]
        return getattr(getattr(self.model, "_join_config", None), "enable", False)

    @property
    def _group(self) -> Any:
        """The workers that share the model; None: all."""
        return getattr(self.model, "process_group", None)

    def backward(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return _NOTHING if last else self.model.no_sync()  # type: ignore[union-attr, operator]

    def average(self, params: list[Tensor], grads: Tensors) -> Tensors:
        """Gradients averaged over the workers, as DDP does it.

        A gradient that a worker lacks counts as zero there. With DDP's ``find_unused_parameters`` one that all workers lack
        stays lacking; the workers that lack any wait for the device to know which.
        """
        if not self.finds_unused and all_missing(grads):
            return grads  # an error, which the ascent names
        chosen = [i for i, param in enumerate(params) if param.requires_grad]
        lacking = [i for i in chosen if grads[i] is None]
        grads = list(grads)
        for i in lacking:
            grads[i] = torch.zeros_like(params[i], requires_grad=False)
        mine = [grads[i] for i in chosen]
        if not mine or any(grad.layout != torch.strided for grad in mine):  # type: ignore[union-attr]
            return grads  # the ops refuse sparse ones by name
        torch._foreach_div_(mine, torch.distributed.get_world_size(self._group))  # type: ignore[arg-type]
        if not self.finds_unused:
            self.add_up(mine)  # type: ignore[arg-type]
            return grads
        owners = mine[0].new_ones(len(grads))  # type: ignore[union-attr]
        for i in lacking:
            owners[i] = 0
        self.add_up([*mine, owners])  # type: ignore[list-item]
        for i, count in enumerate(owners.tolist() if lacking else ()):
            if not count:
                grads[i] = None
        return grads

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sums dense tensors over the workers, in place: one all-reduce for each kind of them."""
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        joined = [torch.cat([tensor.flatten() for tensor in some]) for some in kinds.values()]
        works = [torch.distributed.all_reduce(one, group=self._group, async_op=True) for one in joined]
        for some, one, work in zip(kinds.values(), joined, works, strict=True):
            work.wait()  # type: ignore[union-attr]
            sums = one.split([tensor.numel() for tensor in some])
            torch._foreach_copy_(some, [total.view_as(tensor) for total, tensor in zip(sums, some, strict=True)])

    def share_overflow(self, found_inf: Tensor | None) -> None:
        if found_inf is not None:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, self._group)

    def gradients_cleared(self) -> None:
        if self.finds_unused:
            # DDP notes who has a gradient in local passes too, and fails where a noted one was cleared.
            self.model.reducer._reset_state()  # type: ignore[union-attr, operator]

    def abandon(self) -> None:
        # Else DDP goes on expecting gradients: those of the next step's own pass, which it would average.
        if (reducer := getattr(self.model, "reducer", None)) is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # it may be averaging gradients that are dropped
            reducer._reset_state()

    def check_join(self, reasons: dict[str, Any]) -> None:
        # Joined workers take part in DDP's own reductions only, and once for each forward pass of the others.
        if not self.joins:
            return
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"model.join() must not be enabled with {reason}: workers that have joined could not follow the step; "
                    "give all workers as many batches, with model.join(enable=False)"
                )

    def check_equal(self, number: int, device: torch.device, message: str) -> None:
        ends = torch.tensor([number, -number], device=device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, self._group)
        most, least = ends.tolist()
        if most != -least:
            raise ValueError(message.format(least=-least, most=most))


class Sharded(Single):
    """One of FSDP2's workers, each of which has a shard of every parameter; every backward averages by itself."""

    sharded = True

    def local(self, tensors: list[Any]) -> list[Any]:
        return local_shards(tensors)

    def redistributed(self, params: list[Tensor], grads: Tensors) -> Tensors:
        """Gradients laid out over the workers as their parameters are: tensor parallelism leaves some as partial sums."""
        return [_laid_out(grad, param) for param, grad in zip(params, grads, strict=True)]

    def norm(self, grads: Tensors, params: list[Tensor] | None = None, use: str = "", **options: Any) -> Tensor:
        """As :meth:`Single.norm`. Squares are summed over the workers that have the other shards."""
        groups, kept = options.pop("groups", None), options.pop("kept_grads", None)
        squares = []
        for number, (mesh, chosen) in enumerate(_by_mesh(grads)):
            norm = ops.grad_norm(
                _chosen(grads, chosen),
                params and _chosen(params, chosen),
                kept_grads=kept and _chosen(kept, chosen),
                groups=groups and [groups[i] for i in chosen],
                table=self.tables[f"grad_norm{use} {number}"],
                **options,
            )
            squares.append(_summed(norm.square(), mesh))
        norm = torch.stack(squares).sum().sqrt()
        if (found_inf := options.get("found_inf")) is not None:  # in one shard: everybody's
            found_inf.masked_fill_(~norm.isfinite(), 1.0)
        return norm

    def dots(self, grads: Tensors, other: Tensors, use: str = "") -> Tensor:
        sums = []
        for number, (mesh, chosen) in enumerate(_by_mesh(grads)):
            table = self.tables[f"grad_dots{use} {number}"]
            sums.append(_summed(ops.grad_dots(_chosen(grads, chosen), _chosen(other, chosen), table=table), mesh))
        return torch.stack(sums).sum(0)

    def reshard(self) -> None:
        """Has FSDP2 gather the weights anew where it holds older copies, as after a forward without backward."""
        for module in self._wrapped():
            module.reshard()

    def abandon(self) -> None:
        """Has FSDP2 forget a pass that an exception cut off; within a forward it would go on using that pass's weights."""
        for module in self._wrapped():
            # There is no such method before torch 2.13; below the root it is refused; the other workers may be gone.
            with contextlib.suppress(AttributeError, RuntimeError):
                module.reset_iter_state()
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None:
                    group._training_state = type(group._training_state).IDLE
                    for one in group.fsdp_params:
                        one.unsharded_accumulated_grad = None
                        if hasattr(one, "_unsharded_param"):
                            one._unsharded_param.grad = None
            module.reshard()

    def _wrapped(self) -> list[Any]:
        if self.model is None:
            return []
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]


_NOTHING = contextlib.nullcontext()


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is one of FSDP2's."""
    return hasattr(param, "_local_tensor")


def local_shards(tensors: list[Any]) -> list[Any]:
    """This worker's shards of FSDP2's tensors; other tensors are themselves."""
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]


def first_element(tensor: Any) -> int:
    """The element number, in the whole tensor, that this worker's shard begins at."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if math.prod(shape) and tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"params must be sharded along their first dimension, got {tensor.placements}")
    return int(offset[0] * math.prod(tensor.shape[1:])) if offset else 0


def workers_of(model: torch.nn.Module | None, sharded: bool) -> Single:
    """What this process is: a single worker, or one of several."""
    if _is_replicated(model):
        return Replicated(model)
    return Sharded(model) if sharded else Single(model)


def _is_replicated(model: torch.nn.Module | None) -> bool:
    return model is not None and hasattr(model, "no_sync") and torch.distributed.is_initialized()


def _by_mesh(tensors: Tensors) -> list[tuple[Any, list[int]]]:
    """Numbers of the tensors that are cut over the same workers, with their mesh and its dimensions that cut them.

    Dimensions of a mesh that hold replicas (HSDP) must not be summed over. Tensors that are not cut stand under None.
    """
    found: dict[Any, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if hasattr(tensor, "placements"):
            cut = tuple(dim for dim, one in enumerate(tensor.placements) if not one.is_replicate())  # type: ignore[union-attr]
            found.setdefault((tensor.device_mesh, cut) if cut else None, []).append(number)  # type: ignore[union-attr]
        else:
            found.setdefault(None, []).append(number)
    return list(found.items()) or [(None, [])]


def _laid_out(grad: Any, param: Any) -> Any:
    if hasattr(grad, "placements") and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def _chosen(tensors: list[Any], chosen: list[int]) -> list[Any]:
    return local_shards([tensors[i] for i in chosen])


def _summed(sums: Tensor, mesh_and_dimensions: Any) -> Tensor:
    """Sums over the workers that share a mesh's tensors. With weights offloaded to the CPU the mesh still is of devices."""
    if mesh_and_dimensions is None:
        return sums
    mesh, dimensions = mesh_and_dimensions
    there = sums.to(mesh.device_type)
    for dimension in dimensions:
        torch.distributed.all_reduce(there, group=mesh.get_group(dimension))
    return there.to(sums.device)
