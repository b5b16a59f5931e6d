"""Several workers: what is local to one, what is averaged, and what is summed over the shards of the parameters."""

from __future__ import annotations

import contextlib
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

    def _local(self, last: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keeps a pass, forward and backward, from averaging gradients over the workers, unless it is a step's last one."""
        if last or not self._distributed:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[union-attr, operator]

    def _joined_norm(self, norm: Tensor) -> Tensor:
        """The norm over all shards of the parameters, from this worker's."""
        return self._joined(norm.square()).sqrt() if self._sharded else norm

    def _dots(self, grads: list[Tensor | None], other: list[Tensor | None], use: str = "") -> Tensor:
        """The inner products of two gradients: g.g, h.h and g.h."""
        pair = local_of(grads, self._sharded), local_of(other, self._sharded)
        return self._joined(ops.grad_dots(*pair, table=self._table("grad_dots", use)))

    def _joined(self, sums: Tensor) -> Tensor:
        """Sums over all shards of the parameters, from this worker's."""
        if self._sharded:
            torch.distributed.all_reduce(sums, group=self._shard_group)
        return sums

    @property
    def _shard_group(self) -> Any:
        return self.param_groups[0]["params"][0].device_mesh.get_group()

    def _average(self, grads: list[Tensor | None]) -> None:
        """Averages gradients over the workers, in place; gradients that some lack must be lacking everywhere."""
        group = getattr(self.model, "process_group", None)
        there = [grad for grad in grads if grad is not None]
        torch._foreach_div_(there, torch.distributed.get_world_size(group))
        for work in [torch.distributed.all_reduce(grad, group=group, async_op=True) for grad in there]:
            work.wait()  # type: ignore[union-attr]
