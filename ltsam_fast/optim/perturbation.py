"""Perturbed weights: backups, restoring them whatever happens, and the running statistics that must not see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ltsam_fast import ops
from ltsam_fast.lists import same_items
from ltsam_fast.optim.parallel import Single
from ltsam_fast.snapshot import ReadOnce
from ltsam_fast.table import TensorTable


class Perturbed(NamedTuple):
    """Parameters that are perturbed."""

    params: list[Tensor]
    backups: list[Tensor]
    """What this worker's shards of them were."""
    positions: list[int] | None
    """Their places among all parameters of the optimizer; None: these are all."""

    def at(self, chosen: list[int]) -> Perturbed:
        """Some of them."""
        places = range(len(self.params)) if self.positions is None else self.positions
        return Perturbed(
            [self.params[i] for i in chosen], [self.backups[i] for i in chosen], [places[i] for i in chosen]
        )


NOTHING = Perturbed([], [], [])
"""No parameters."""


class Perturbation:
    """Which weights are perturbed now, and what they were.

    Python may raise KeyboardInterrupt after any line. So what a pass is about to write is noted before it, and its table knows
    afterwards how far the pass had come (``TensorTable.launched``): :meth:`abandon` is right at any moment.
    """

    def __init__(self) -> None:
        self.now = NOTHING
        self.perturbing: tuple[Perturbed, TensorTable, int] | None = None
        """What a pass is about to perturb, its table, and the calls of it before."""
        self.updating: tuple[list[Tensor], TensorTable, int] | None = None
        """The parameters whose new values the base optimizer's pass is about to write, its table, and the calls before."""
        self._memory: dict[Tensor, Tensor] = {}
        self._backed_up: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.disabled: list[tuple[Any, str, Any]] = []
        """Attributes of modules that stand for running statistics, and what they were."""
        self.low_precision = False
        """Whether one of the weights that were backed up last has 16 bits."""

    def backups_for(self, params: list[Tensor], workers: Single) -> list[Tensor]:
        """Memory for the old weights, kept from step to step.

        Whether it still fits them is for the pass to say that fills it: if not, :meth:`forget_backups`.
        """
        known, backups = self._backed_up
        if same_items(params, known):
            return backups
        for param in params:
            if is_lazy(param):  # only where noise comes before the first forward pass
                raise ValueError("params must be initialized, got a lazy module's: run the model on a batch first")
            if param not in self._memory:
                (shard,) = workers.local([param])
                self._memory[param] = torch.empty_like(shard, requires_grad=False)
        self._backed_up = params, ReadOnce([self._memory[param] for param in params])  # nobody else has them
        self.low_precision = not {param.dtype for param in params}.isdisjoint((torch.bfloat16, torch.float16))
        return self._backed_up[1]

    @property
    def memory(self) -> list[Tensor]:
        """The backups that are kept."""
        return list(self._memory.values())

    def forget_backups(self) -> None:
        """Lets go of the memory: a parameter may have changed its device, shape or dtype."""
        self._memory.clear()
        self._backed_up = ([], [])

    def back_up(self, params: list[Tensor], positions: list[int], workers: Single) -> None:
        """Copies weights to their backups; the caller then may write anything into the weights."""
        if any(param in self._memory and self._memory[param].dtype != param.dtype for param in params):
            self.forget_backups()  # after model.float() one in bfloat16 would round what it keeps
        backups = self.backups_for(params, workers)
        ops.restore_(backups, workers.local(params))
        self.now = Perturbed(params, backups, positions)

    def sources_of(self, params: list[Tensor], workers: Single) -> list[Tensor]:
        """The unperturbed values of ``params``: a backup, or the weight itself."""
        if same_items(params, self.now.params):
            return self.now.backups
        old = dict(zip(self.now.params, self.now.backups, strict=True))
        return [old.get(param, shard) for param, shard in zip(params, workers.local(params), strict=True)]

    def restore(self, workers: Single) -> None:
        """Puts the unperturbed weights back in the middle of a step."""
        if self.now.params:
            ops.restore_(workers.local(self.now.params), self.now.backups, table=workers.tables["restore_"])
            self.now = NOTHING
            if workers.sharded:
                workers.reshard()
        self.enable_running_stats()

    def abandon(self, workers: Single) -> bool:
        """Puts the unperturbed weights back, whatever has happened.

        Returns:
            Whether there are new ones already, from the base optimizer's pass: then these stay.
        """
        if self.perturbing is not None:
            perturbed, table, calls = self.perturbing
            self.now = perturbed.at(table.launched() if table.calls > calls else [])
            self.perturbing = None
        stepped = False
        if self.updating is not None:
            params, table, calls = self.updating
            new = {params[i] for i in table.launched()} if table.calls > calls else set()
            self.now = self.now.at([i for i, param in enumerate(self.now.params) if param not in new])
            stepped, self.updating = bool(new), None
        if self.now.params:
            with torch.no_grad():  # one call of torch's, during which Python raises nothing
                torch._foreach_copy_(workers.local(self.now.params), self.now.backups)
            self.now = NOTHING
            if workers.sharded:
                workers.reshard()
        self.enable_running_stats()
        return stepped

    def discard(self) -> None:
        """Forgets about perturbations that the device has not made: weights are as they were before the step."""
        self.now, self.perturbing, self.updating = NOTHING, None, None
        self.enable_running_stats()

    def disable_running_stats(self, model: torch.nn.Module) -> None:
        """Keeps running statistics of normalization layers from seeing the perturbed pass."""
        for module in model.modules():
            for name, value in _statistics(module) if module.training else ():
                # What is disabled already is another optimizer's to enable: theirs may end before or after this one's step.
                if getattr(module, name) is not value:
                    self.disabled.append((module, name, getattr(module, name)))
                    setattr(module, name, value)

    def enable_running_stats(self) -> None:
        """Undoes :meth:`disable_running_stats`."""
        for owner, name, value in reversed(self.disabled):
            setattr(owner, name, value)
        self.disabled = []


def _statistics(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module that stand for its running statistics, and what they are while those must not change."""
    if isinstance(module, _BatchNorm):  # without tracking it normalizes by the batch and updates nothing
        yield "track_running_stats", False
    elif isinstance(module, _InstanceNorm):  # looks at its buffers only
        yield "running_mean", None
        yield "running_var", None
    vectors = ["_u", "_v"] if isinstance(module, _SpectralNorm) else []
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    for name in vectors + [hook.name + end for hook in hooks for end in ("_u", "_v")]:
        vector = getattr(module, name, None)  # power iteration changes it in place: let it have a copy
        if vector is not None and not hasattr(vector, "stands_in"):
            copy = vector.clone()
            copy.stands_in = True
            yield name, copy
