"""Climbing and coming back: perturbed weights, their backups, and the statistics that must not see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ltsam_fast import ops
from ltsam_fast.optim.fused import local_of
from ltsam_fast.optim.gradients import _NONE, Uninterrupted, _gradients, _same_items
from ltsam_fast.optim.workers import Worker
from ltsam_fast.table import TensorTable


class Climber(Worker):
    """Perturbs weights, and never leaves them perturbed."""

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Perturbs the weights along their present gradients; anew, where they are perturbed. Without a gradient they stay."""
        again = bool(self._climbed)
        params, groups = (self._climbed, self._climbed_groups) if again else self._parameters(ascent=True)
        if (self.ascent_sync or self._mixes) and self._distributed:
            self._average(self._parameters()[0] if self._mixes else params)  # all of them are kept for the mixture
        grads = self._aligned(params, _gradients(params))
        if not again and _NONE in map(type, grads):
            kept = [i for i, grad in enumerate(grads) if grad is not None]
            if not kept and all(grad is None for grad in _gradients(self._parameters()[0])):
                raise ValueError("no parameter has a gradient to climb along: call loss.backward() before this phase")
            params, groups, grads = ([items[i] for i in kept] for items in (params, groups, grads))  # type: ignore[assignment]
        whole = grads
        shards, grads = local_of(params, self._sharded), local_of(grads, self._sharded)
        options = self._ascent(params, grads, grad_scale, found_inf)
        adaptive, eta = self._hyper("adaptive"), self._hyper("eta")
        norm = self._norm(
            whole,
            params,
            kept_grads=options.get("means"),
            combination=options.get("combination"),
            adaptive=adaptive,
            eta=eta,
            groups=groups,
            found_inf=found_inf,
        )
        options = {
            "rho": self._hyper("rho"),
            "maximize": self._hyper("maximize"),
            "adaptive": adaptive,
            "eta": eta,
            "eps": self._hyper("norm_eps"),
        } | options

        def perturb(backups: list[Tensor]) -> None:
            if self._low_precision:
                options.update(stochastic=True, seed=options.get("seed", 0), step=self._taken)
            if "seed" in options:
                options["skipped"] = self._skipped_steps()
            ops.perturb_(
                shards,
                grads,
                None if again else backups,
                norm,
                groups=groups,
                grad_scale=grad_scale,
                found_inf=found_inf,
                original_params=backups if again else None,
                table=self._table("random_perturb_" if "seed" in options else "perturb_"),
                **options,
            )

        self._perturb(params, groups, perturb)

    def _perturb(self, params: list[Tensor], groups: list[int], perturb: Callable[[list[Tensor]], None]) -> None:
        """Has ``perturb(backups)`` keep and perturb the weights, and takes note of it."""
        with Uninterrupted():
            try:
                perturb(self._backups_for(params))
            except ValueError:  # perhaps a parameter changed its device or shape, and has a backup of the old kind
                if self._climbed:
                    raise
                self._backups.clear()
                self._backed_up = []
                perturb(self._backups_for(params))
            self._climbed, self._climbed_from, self._climbed_groups = params, self._backed_up_in, groups
            self._let_go_of_copies()
        self._freeze_statistics()

    def _ascent(
        self, params: list[Tensor], grads: list[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Any]:
        """Further arguments of :func:`ltsam_fast.ops.perturb_`, for methods that climb otherwise."""
        return {}

    def _backups_for(self, params: list[Tensor]) -> list[Tensor]:
        """Memory for the old weights, kept from step to step. Looking tensors up costs 60 ns each: not done twice."""
        dtypes = [param.dtype for param in params]  # after model.float() a backup in bfloat16 would round what it keeps
        if not _same_items(params, self._backed_up) or dtypes != self._backed_up_as:
            for param in params:
                if is_lazy(param):  # only where noise comes before the first forward pass
                    raise ValueError("params must be initialized, got a lazy module's: run the model on a batch first")
                if param not in self._backups or self._backups[param].dtype != param.dtype:
                    (shard,) = local_of([param], self._sharded)
                    self._backups[param] = torch.empty_like(shard, requires_grad=False)  # type: ignore[arg-type]
            self._backed_up, self._backed_up_in = params, [self._backups[param] for param in params]
            self._backed_up_as = dtypes
            self._low_precision = torch.bfloat16 in dtypes or torch.float16 in dtypes
        return self._backed_up_in

    def restore(self) -> None:
        """Puts the unperturbed weights back and starts over with the first phase: for use after an error of your own.

        Gradients that were kept from an earlier phase are dropped. Without perturbed weights nothing happens to weights.
        """
        with Uninterrupted():
            if self._climbed:
                self._put_back(self._climbed, self._climbed_from, self._table("restore_"))
            self._settle()

    def _put_back(self, params: list[Tensor], backups: list[Tensor], table: TensorTable | None = None) -> None:
        ops.restore_(local_of(params, self._sharded), backups, table=table)  # type: ignore[arg-type]
        self._let_go_of_copies()

    def _come_back(self) -> None:
        """Puts the unperturbed weights back in the middle of a step."""
        with Uninterrupted():
            self._put_back(self._climbed, self._climbed_from, self._table("restore_"))
            self._climbed, self._climbed_from = [], []
            self._thaw_statistics()

    def _settle(self) -> None:
        self._climbed, self._climbed_from, self._clean, self._phase = [], [], [], 0
        self._thaw_statistics()

    def _thaw_statistics(self) -> None:
        for owner, name, value in reversed(self._thawed):
            setattr(owner, name, value)
        self._thawed = []

    def _freeze_statistics(self) -> None:
        """Keeps running statistics of normalization layers from seeing the perturbed pass, if the model is known."""
        for module in self.model.modules() if self.model is not None else ():
            for name, value in _statistics(module) if module.training else ():
                # What is frozen already is another optimizer's to thaw: theirs may end before or after this one's step.
                if getattr(module, name) is not value:
                    self._thawed.append((module, name, getattr(module, name)))
                    setattr(module, name, value)

    def _keep_gradients(self) -> None:
        """Takes the gradients over, without a copy, to be added to those of the last phase."""
        params, _ = self._parameters()
        # A view may be one of DDP's buckets, which the next backward overwrites.
        self._clean = [g.clone() if g is not None and g._is_view() else g for g in _gradients(params)]
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        """zero_grad(), without torch's bookkeeping around it: on small networks that would be a tenth of a phase."""
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        if self._finds_unused:
            # DDP notes who has a gradient in local passes too, and fails where a noted one was cleared.
            self.model.reducer._reset_state()  # type: ignore[union-attr, operator]


def sign_of(group: dict[str, Any]) -> int:
    """-1 for a group that is maximized."""
    return -1 if group.get("maximize") else 1


def sign_of_all(groups: list[dict[str, Any]]) -> int:
    """-1 where all groups are maximized; raises ValueError where only some are."""
    signs = set(map(sign_of, groups))
    if len(signs) > 1:
        raise ValueError("maximize must be the same in all groups for ESAM: it selects samples by their loss")
    return min(signs)


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
