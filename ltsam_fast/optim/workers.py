"""Several workers: what is local to one, what is averaged, and what is summed over the shards of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.fused import local_of
from ltsam_fast.optim.state import Stateful


class Worker(Stateful):
    """One of several workers under DistributedDataParallel or FSDP2, or the only one."""

    @property
    def _distributed(self) -> bool:
        """Whether the model is one of several workers'."""
        return hasattr(self.model, "no_sync") and torch.distributed.is_initialized()

    @property
    def _finds_unused(self) -> bool:
        """Whether a worker may lack gradients that others have."""
        return getattr(self.model, "find_unused_parameters", False) and self._distributed

    @property
    def _process_group(self) -> Any:
        """The workers that share the model; ``None``: all."""
        return getattr(self.model, "process_group", None)

    def _check_join(self, scaled: bool) -> None:
        """Raises ValueError in DDP's join() if workers without further inputs could not follow the step.

        They take part in DDP's own reductions only, and once for each forward pass of the others.
        """
        if not getattr(getattr(self.model, "_join_config", None), "enable", False):
            return
        reasons = {type(self).__name__: self._mixes or self._counts_passes, "ascent_sync=True": self.ascent_sync}
        for reason, so in (reasons | {"scaler": scaled}).items():
            if so:
                raise ValueError(
                    f"model.join() must not be enabled with {reason}: workers that have joined could not follow the step; "
                    "give all workers as many batches, with model.join(enable=False)"
                )

    def _local(self, last: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keeps a pass, forward and backward, from averaging gradients over the workers, unless it is a step's last one."""
        if last or not self._distributed:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[union-attr, operator]

    def _norm(
        self,
        grads: list[Tensor | None],
        params: list[Tensor] | None = None,
        use: str = "",
        *,
        kept_grads: list[Tensor | None] | None = None,
        groups: list[int] | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The norm of whole gradients as by :func:`ltsam_fast.ops.grad_norm`, whose arguments these are.

        Of shards the squares are summed over the workers that have the others; an overflow in one of them is everybody's.
        """
        if not self._sharded:
            table = self._table("grad_norm", use)
            return ops.grad_norm(
                grads, params, kept_grads=kept_grads, groups=groups, found_inf=found_inf, table=table, **options
            )
        squares = []
        for number, (where, chosen) in enumerate(_by_mesh(grads)):
            norm = ops.grad_norm(
                _shards(grads, chosen),
                params and _shards(params, chosen),
                kept_grads=kept_grads and _shards(kept_grads, chosen),
                groups=groups and [groups[i] for i in chosen],
                found_inf=found_inf,
                table=self._table("grad_norm", f"{use} {number}"),
                **options,
            )
            squares.append(_summed(norm.square(), where))
        norm = torch.stack(squares).sum().sqrt()
        if found_inf is not None:
            found_inf.masked_fill_(~norm.isfinite(), 1.0)
        return norm

    def _dots(self, grads: list[Tensor | None], other: list[Tensor | None], use: str = "") -> Tensor:
        """The inner products of two gradients: g.g, h.h and g.h."""
        if not self._sharded:
            return ops.grad_dots(grads, other, table=self._table("grad_dots", use))
        sums = []
        for number, (where, chosen) in enumerate(_by_mesh(grads)):
            table = self._table("grad_dots", f"{use} {number}")
            sums.append(_summed(ops.grad_dots(_shards(grads, chosen), _shards(other, chosen), table=table), where))
        return torch.stack(sums).sum(0)

    def _aligned(self, params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients laid out over the workers as their parameters are: tensor parallelism leaves some as partial sums."""
        if not self._sharded:
            return grads
        return [_laid_out(grad, param) for param, grad in zip(params, grads, strict=True)]

    def _let_go_of_copies(self) -> None:
        """Has FSDP2 gather the weights anew, where it still holds what they were, as after a forward without backward."""
        if self._sharded and self.model is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _average(self, params: list[Tensor]) -> None:
        """Averages the gradients of ``params`` over the workers, as DDP does.

        A gradient that a worker lacks counts as zero there. With DDP's ``find_unused_parameters`` one that all workers lack
        stays lacking; the workers that lack any wait for the device to know which.
        """
        if not self._finds_unused and all(param.grad is None for param in self._parameters()[0]):
            return  # an error, which the climb names
        params = [param for param in params if param.requires_grad]
        lacking = [i for i, param in enumerate(params) if param.grad is None]
        for i in lacking:
            params[i].grad = torch.zeros_like(params[i], requires_grad=False)
        grads = [param.grad for param in params if param.grad is not None]
        if not grads or any(grad.layout != torch.strided for grad in grads):  # the ops refuse sparse ones by name
            return
        torch._foreach_div_(grads, torch.distributed.get_world_size(self._process_group))
        if not self._finds_unused:
            self._add_up(grads)
            return
        owners = grads[0].new_ones(len(grads))
        for i in lacking:
            owners[i] = 0
        self._add_up([*grads, owners])
        for i, count in enumerate(owners.tolist() if lacking else ()):
            if not count:
                params[i].grad = None

    def _add_up(self, tensors: list[Tensor]) -> None:
        """Sums dense tensors over the workers, in place: one all-reduce for each kind of them."""
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        joined = [torch.cat([tensor.flatten() for tensor in some]) for some in kinds.values()]
        works = [torch.distributed.all_reduce(one, group=self._process_group, async_op=True) for one in joined]
        for some, one, work in zip(kinds.values(), joined, works, strict=True):
            work.wait()  # type: ignore[union-attr]
            sums = one.split([tensor.numel() for tensor in some])
            torch._foreach_copy_(some, [total.view_as(tensor) for total, tensor in zip(sums, some, strict=True)])


def _by_mesh(tensors: list[Tensor | None]) -> list[tuple[Any, list[int]]]:
    """Numbers of the tensors that are cut over the same workers, with their mesh and its dimensions that cut them.

    Dimensions of a mesh that hold replicas (HSDP) must not be summed over. Tensors that are not cut stand under ``None``.
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


def _shards(tensors: Sequence[Any], chosen: list[int]) -> list[Any]:
    return local_of([tensors[i] for i in chosen], sharded=True)


def _summed(sums: Tensor, where: Any) -> Tensor:
    """Sums over the workers that share a mesh's tensors. With weights offloaded to the CPU the mesh still is of devices."""
    if where is None:
        return sums
    mesh, dimensions = where
    there = sums.to(mesh.device_type)
    for dimension in dimensions:
        torch.distributed.all_reduce(there, group=mesh.get_group(dimension))
    return there.to(sums.device)
