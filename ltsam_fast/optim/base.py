"""What all methods share: climbing and coming back, the base optimizer's step, state, and never leaving weights perturbed."""

from __future__ import annotations

import _signal  # the functions behind signal's, without the enums, which cost 5 us a call
import contextlib
import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ltsam_fast import ops
from ltsam_fast.optim.batch import Batch, Closure, Scaling, mean_loss
from ltsam_fast.optim.checks import is_number
from ltsam_fast.optim.fused import FUSED, Update, local_of
from ltsam_fast.table import Table


class SharpnessAware(Optimizer):
    """Base of the methods: a torch optimizer that evaluates gradients at perturbed weights and steps from the old ones.

    State and parameter groups are those of ``base_optimizer``, shared, so ``state_dict()`` holds all of it and learning
    rate schedulers take this optimizer itself. Each group may set ``rho``, ``adaptive``, ``eta`` (ASAM's constant, 0),
    ``norm_eps`` (added to the norm, 1e-12) and ``perturb`` (False leaves the group, and its share of the norm, out of the
    perturbation). ``taken`` counts the steps, those that a GradScaler's overflow ``skipped`` included.

    Weights in bfloat16 and float16 are perturbed with stochastic rounding: most of the perturbation is below their
    resolution and would vanish.

    Under DistributedDataParallel give it as ``model``. Workers then climb along their own gradients and only the last pass of
    a step is averaged, once, as in the SAM paper; ``ascent_sync=True`` (any method's keyword) averages the ascent gradient
    too. Methods that combine gradients of both passes (GSAM, WSAM, LookSAM) always do. With FSDP2 every pass is averaged, and
    norms run over all shards. With the phases ``model.no_sync()`` is the caller's business.

    SGD, Adam and AdamW run fused: restoring, adding up gradients and updating are one pass. Any other torch optimizer
    steps by itself on the restored weights.
    """

    _phases: tuple[str, ...] = ()
    """Names of the explicit phases, in the order in which they are to be called."""
    _own: tuple[str, ...] = ("rho", "adaptive", "eta", "norm_eps", "perturb", "taken", "skipped")
    """Options of a group that are not the base optimizer's."""
    _buffers: tuple[str, ...] = ()
    """Names of a parameter's state that is not the base optimizer's."""
    _takes_shards = True
    """Whether FSDP2's parameters will do."""
    _uncapturable = ""
    """Why a CUDA graph cannot hold the step, if so."""
    _mixes = False
    """Whether kept gradients are combined with the last pass's otherwise than by adding them."""
    _kept: tuple[str, ...] = ("base_optimizer", "model", "max_grad_norm", "ascent_sync", "_base_only")
    """Attributes that survive copying and pickling, besides those of torch."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise TypeError(f"base_optimizer must be a class such as torch.optim.SGD, got {base_optimizer!r}")
        if not is_number(max_grad_norm) or not 0 <= max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be a finite number >= 0 (0: no clipping), got {max_grad_norm!r}")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {model!r}")
        own = {
            "rho": rho,
            "adaptive": adaptive,
            "eta": 0.0,
            "norm_eps": 1e-12,
            "perturb": True,
            "taken": 0,
            "skipped": 0,
        }
        self.model = model
        self.max_grad_norm = max_grad_norm
        self.ascent_sync = ascent_sync
        # Where the base has an option of the same name (Adadelta's rho), it gets its own value back while it steps.
        defaults = base_optimizer([torch.zeros(1)], **base_kwargs).defaults
        self._base_only = {name: defaults[name] for name in own if name in defaults}
        self._forget()
        self._skipped: Tensor | None = None
        super().__init__(params, own)
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **own}
        self._sharded = any(hasattr(param, "_local_tensor") for param in self._parameters()[0])
        if self._sharded and not self._takes_shards:
            raise ValueError(
                f"params must not be sharded (FSDP2) for {type(self).__name__}: it needs whole gradients of single samples "
                "or classes; use DistributedDataParallel"
            )

    def _forget(self) -> None:
        """Sets up what lives within a step only."""
        self._phase = 0
        self._climbed: list[Tensor] = []  # the parameters that are perturbed now, and where their old values are
        self._climbed_from: list[Tensor] = []
        self._climbed_groups: list[int] = []
        self._clean: list[Tensor | None] = []  # gradients kept from an earlier phase, one for each parameter
        self._backups: dict[Tensor, Tensor] = {}
        self._backed_up: list[Tensor] = []
        self._backed_up_in: list[Tensor] = []
        self._backed_up_as: list[torch.dtype] = []
        self._low_precision = False
        self._scaling = Scaling(None, [])
        self._thawed: list[tuple[Any, str, Any]] = []  # what _freeze_statistics changed
        self._tables: dict[str, Table] = {}
        self._constants: dict[Any, Tensor] = {}
        self._update = Update()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; its ``rho``, ``eta`` and ``norm_eps`` must be finite and >= 0."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("rho", "eta", "norm_eps"):
            if not is_number(group[name]) or not 0 <= group[name] < math.inf:
                value = group[name]
                self.param_groups.pop()
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")

    # --- phases

    def _enter(self, phase: str) -> None:
        """Checks that ``phase`` is next."""
        expected = self._phases[self._phase]
        if phase != expected:
            raise ValueError(
                f"{phase}() was called where {expected}() is next: call {', '.join(f'{name}()' for name in self._phases)} "
                "in this order, each after its backward(), or restore() to start over"
            )

    def _run(
        self,
        phase: str,
        work: Callable[[Tensor | None, Tensor | None], None],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Does a phase's ``work(grad_scale, found_inf)`` in its turn; ``scaler`` is the first phase's, for all of the step.

        If it fails, by Ctrl-C too, weights that climbed come back.
        """
        self._enter(phase)
        following = (self._phase + 1) % len(self._phases)
        if self._phase == 0:
            self._scaling = Scaling(scaler, self._parameters()[0])
            self._call_hooks(_global_optimizer_pre_hooks, self._optimizer_step_pre_hooks)
        scaling = self._scaling
        scaling.check_scaled(self)
        try:
            work(*(scaling.signals if scaling.grad_scale is not None else self._signals()))
            self._phase = following
        except BaseException:
            if self._climbed:
                self.restore()
            raise
        if following == 0:
            scaling.report(self)
            if not self._within_step:
                self._call_hooks(_global_optimizer_post_hooks, self._optimizer_step_post_hooks)

    _step_supports_amp_scaling = True
    """Tells torch.amp.GradScaler.step() to set ``grad_scale`` and ``found_inf``, and to leave the gradients as they are."""
    _within_step = False

    def _signals(self) -> tuple[Tensor | None, Tensor | None]:
        """``grad_scale`` and ``found_inf`` as torch.amp.GradScaler.step(), or the caller, set them."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # without gradients torch's is the number 0
            found_inf = None if grad_scale is None else torch.zeros((), device=grad_scale.device)
        return grad_scale, found_inf

    def _ends(self, closure: Any) -> bool:
        """Whether step(closure) is how a GradScaler takes the last phase."""
        return closure is None and bool(self._phase) and self._phase == len(self._phases) - 1

    def _last_phase(self) -> Any:
        """The last phase as a step(), for torch.amp.GradScaler.step(optimizer)."""
        self._within_step = True  # torch calls the hooks around it
        try:
            return getattr(self, self._phases[-1])()
        finally:
            self._within_step = False

    def _call_hooks(self, *registered: dict[int, Callable[..., Any]]) -> None:
        """Calls the hooks that torch.optim calls around step(), which the phases together are."""
        for hooks in registered:
            for hook in list(hooks.values()):
                hook(self, (), {})

    def _parameters(self, ascent: bool = False) -> tuple[list[Tensor], list[int]]:
        """All parameters, or those that are to be perturbed, and the group of each."""
        params: list[Tensor] = []
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            if not ascent or group["perturb"]:
                params += group["params"]
                groups += [index] * len(group["params"])
        return params, groups

    def _table(self, op: str, use: str = "") -> Table:
        """The table of one op and use, kept from step to step."""
        key = op + use
        if key not in self._tables:
            self._tables[key] = Table(ops.OPS[op])
        return self._tables[key]

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Perturbs the weights along their present gradients; anew, where they are perturbed. Without a gradient they stay."""
        again = bool(self._climbed)
        params, groups = (self._climbed, self._climbed_groups) if again else self._parameters(ascent=True)
        grads = _gradients(params)
        if not again and _NONE in map(type, grads):
            kept = [i for i, grad in enumerate(grads) if grad is not None]
            if not kept and all(grad is None for grad in _gradients(self._parameters()[0])):
                raise ValueError("no parameter has a gradient to climb along: call loss.backward() before this phase")
            params, groups, grads = ([items[i] for i in kept] for items in (params, groups, grads))  # type: ignore[assignment]
        if (self.ascent_sync or self._mixes) and self._distributed:
            self._average(grads)
        shards, grads = local_of(params, self._sharded), local_of(grads, self._sharded)
        options = self._ascent(params, grads, grad_scale, found_inf)
        adaptive, eta = self._hyper("adaptive"), self._hyper("eta")
        norm = self._joined_norm(
            ops.grad_norm(
                grads,
                shards,
                extra=options.get("means"),
                mix=options.get("mix"),
                adaptive=adaptive,
                eta=eta,
                groups=groups,
                found_inf=found_inf,
                table=self._table("grad_norm"),
            )
        )
        options = {
            "rho": self._hyper("rho"),
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
                sources=backups if again else None,
                table=self._table("random_perturb_" if "seed" in options else "perturb_"),
                **options,
            )

        self._perturb(params, groups, perturb)

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
        self._freeze_statistics()

    def _ascent(
        self, params: list[Tensor], grads: list[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Any]:
        """Further arguments of :func:`ltsam_fast.ops.perturb_`, for methods that climb otherwise."""
        return {}

    def _constant(self, values: tuple[float, ...]) -> Tensor:
        """A small tensor for the ops, made once."""
        param = self.param_groups[0]["params"][0]
        key = (values, param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)
        if key not in self._constants:
            self._constants = {key: torch.tensor(values, device=param.device, dtype=key[2])}
        return self._constants[key]

    @property
    def _taken(self) -> int:
        """Steps taken so far."""
        return self.param_groups[0]["taken"]  # type: ignore[no-any-return]

    def _skipped_steps(self) -> Tensor | None:
        """How many of them overflowed, where the device counts; ``None``: no step had a scaler."""
        count, device = self.param_groups[0]["skipped"], self.param_groups[0]["params"][0].device
        if self._skipped is None and count:
            self._skipped = torch.tensor(float(count), device=device)
        return self._skipped

    def _note_skipped(self) -> None:
        """Brings the device's count to the groups, for a checkpoint."""
        if self._skipped is not None:
            for group in self.param_groups:
                group["skipped"] = int(self._skipped)

    def _hyper(self, name: str) -> Any:
        return tuple(group[name] for group in self.param_groups)

    def _backups_for(self, params: list[Tensor]) -> list[Tensor]:
        """Memory for the old weights, kept from step to step. Looking tensors up costs 60 ns each: not done twice."""
        dtypes = [param.dtype for param in params]  # after model.float() a backup in bfloat16 would round what it keeps
        if not _same_items(params, self._backed_up) or dtypes != self._backed_up_as:
            for param in params:
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

    def _put_back(self, params: list[Tensor], backups: list[Tensor], table: Table | None = None) -> None:
        ops.restore_(local_of(params, self._sharded), backups, table=table)  # type: ignore[arg-type]

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

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Restores the weights and takes the base optimizer's step with the present plus the kept gradients."""
        params, groups = self._parameters()
        grads = _gradients(params)
        if found_inf is not None and (self._distributed or self._sharded):  # one worker's overflow is everybody's
            group = self._shard_group if self._sharded else getattr(self.model, "process_group", None)
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group)
        extra = self._clean or None
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
                norm = self._joined_norm(
                    ops.grad_norm(
                        local_of(grads, self._sharded),
                        extra=extra and local_of(extra, self._sharded),
                        mix=mix,
                        found_inf=found_inf,
                        table=self._table("grad_norm", " of the step"),
                    )
                )
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
            for group in self.param_groups:
                group["taken"] += 1
            if found_inf is not None:
                skipped = self._skipped_steps()
                self._skipped = found_inf.detach().clone() if skipped is None else skipped.add_(found_inf)
            self._settle()
        self._opt_called = True  # what torch's learning rate schedulers look for

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
        self._put_back(self._climbed, self._climbed_from, self._table("restore_"))
        if found_inf is not None and bool(found_inf):
            return
        beside: list[Tensor] = []
        unscale = factor = 1.0 if grad_scale is None else 1 / grad_scale
        if mix is not None and extra is not None:
            pairs = [
                (g, torch.zeros_like(g) if e is None else e) for g, e in zip(grads, extra, strict=True) if g is not None
            ]
            lrs = [float(self.param_groups[group]["lr"]) * unscale for group in groups]
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
            self.base_optimizer.step()
        finally:
            for group, values in zip(self.param_groups, own, strict=True):
                group.update(values)
            for state, values in zip(states, buffers, strict=True):
                state.update(values)
        if beside:
            torch._foreach_add_(params, beside)

    def _freeze_statistics(self) -> None:
        """Keeps running statistics of normalization layers from seeing the perturbed pass, if the model is known."""
        for module in self.model.modules() if self.model is not None else ():
            # Batch norm without tracking normalizes by the batch and updates nothing. Instance norm looks at its buffers only.
            for kind, name, value in (
                (_BatchNorm, "track_running_stats", False),
                (_InstanceNorm, "running_mean", None),
                (_InstanceNorm, "running_var", None),
            ):
                # What is frozen already is another optimizer's to thaw: theirs may end before or after this one's step.
                if isinstance(module, kind) and module.training and getattr(module, name) is not value:
                    self._thawed.append((module, name, getattr(module, name)))
                    setattr(module, name, value)

    # --- one call for the whole step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        targets: Tensor | Sequence[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """One step of the method.

        Args:
            closure: Runs the forward pass alone and returns the per-sample losses, shape (B,), floating point, not
                detached. A sequence of closures is a batch in parts: their gradients add up to one step.
            targets: The samples' classes, shape (B,), integer; a sequence with a sequence of closures. Methods that do not
                look at classes need none.
            scaler: A GradScaler. If a gradient of either pass overflows, weights and base state stay as they were, which is
                decided on the device. Call ``scaler.update()`` yourself, once a step.

                With the phases, give it to the first one, and call neither its unscale_() nor its step().

        Returns:
            The mean loss at the unperturbed weights, 0-d, detached, on the losses' device.

        Raises:
            ValueError: There is no closure, or what it returns or ``targets`` do not fit. Whatever is raised, by the
                closure too, Ctrl-C included, the weights are the unperturbed ones afterwards.
        """
        closures = _as_list(closure)
        if self._ends(closure):
            return self._last_phase()
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("scaler.step(optimizer, closure) is not supported: call step(closure, scaler=scaler)")
        if not closures or not all(callable(one) for one in closures):
            raise ValueError(
                "closure must be given: step(closure), with a function that returns the per-sample losses (B,)"
            )
        if self._phase:
            self._enter("step")
        labels = self._check_targets(targets, len(closures))
        try:
            self._clear_gradients()
            scaling = Scaling(scaler, self._parameters()[0])
            loss = self._whole_step([Batch(*pair) for pair in zip(closures, labels, strict=True)], scaling)
            self._clear_gradients()
            scaling.report(self)
            return loss
        except BaseException:
            self.restore()
            self._clear_gradients()
            raise

    def _check_targets(self, targets: Any, closures: int) -> list[Tensor | None]:
        labels: list[Any] = [None] * closures if targets is None else _as_list(targets)
        if len(labels) != closures:
            raise ValueError(f"targets has {len(labels)} entries, but there are {closures} closures: give one each")
        return labels

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights (B,) of the samples in the clean and in the sharp loss; None where all are zero."""
        raise NotImplementedError

    _one_pass = False
    """Whether this step has no pass at perturbed weights."""

    def _put_aside(self, grads: list[Tensor | None]) -> None:
        """Keeps gradients at w for the step, and clears those in place; workers leave them there, to be averaged together."""
        if self._distributed and not self._mixes:
            _swap_gradients(self._parameters()[0], grads)
            return
        if any(grad is not None for grad in grads):
            self._clean = grads
        self._clear_gradients()

    def _backward_mean(self, parts: list[Batch], scaling: Scaling, last: bool = False) -> list[Tensor]:
        """The gradient of the mean loss, at the weights as they are, which pass for w; returns the losses, detached."""
        seen = []
        for part in parts:
            with self._local(last=last and part is parts[-1]):
                losses = part.evaluate()
                seen.append(losses.detach())
                share = 1 / len(losses) if len(parts) == 1 else 1.0  # of a batch in parts the size is known at its end
                torch.autograd.backward(losses, scaling(torch.full_like(losses, share)))
        if len(parts) > 1:
            grads = [param.grad for param in self._parameters()[0] if param.grad is not None]
            torch._foreach_mul_(grads, 1 / sum(part.size for part in parts))
        return seen

    def _examine(self, losses: Tensor, scaling: Scaling) -> None:
        """Looks at the losses at w before their graph is gone."""

    def _evaluate(self, part: Batch) -> Tensor:
        """The losses at w, whose graph the passes there share."""
        return part.evaluate()

    def _backward_both(self, losses: Tensor, u: Tensor, v: Tensor, clean: list[Tensor | None]) -> list[Tensor | None]:
        """Adds the gradient with weights v to those in place, and that with u to ``clean``, which it returns."""
        params, _ = self._parameters()
        sharp = _swap_gradients(params, clean)
        torch.autograd.backward(losses, u, retain_graph=True)
        clean = _swap_gradients(params, sharp)
        torch.autograd.backward(losses, v)
        return clean

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        """eps = rho g_v / |g_v|, direction g_u(w) + g_v(w + eps): the step of all methods with class weights u and v."""
        params, _ = self._parameters()
        clean: list[Tensor | None] = [None] * len(params)
        weights = []
        for part in parts:
            with self._local(last=self._one_pass and part is parts[-1]):
                losses = self._evaluate(part)
                count = len(losses) if len(parts) == 1 else 1  # of a batch in parts the size is known at its end
                self._examine(losses, scaling)
                u, v = self._cotangents(part.labels, losses)
                weights.append(v)
                if u is not None and v is not None:
                    clean = self._backward_both(losses, scaling(u / count), scaling(v / count), clean)
                elif u is not None:
                    sharp = _swap_gradients(params, clean)
                    torch.autograd.backward(losses, scaling(u / count))
                    clean = _swap_gradients(params, sharp)
                elif v is not None:
                    torch.autograd.backward(losses, scaling(v / count))
        size = sum(part.size for part in parts)
        if len(parts) > 1:
            torch._foreach_mul_([g for g in (*clean, *_gradients(params)) if g is not None], 1 / size)
        if all(v is None for v in weights):
            _swap_gradients(params, clean)
        else:
            self._climb(*scaling.signals)
            self._put_aside(clean)
            for part, v in zip(parts, weights, strict=True):
                with self._local(last=part is parts[-1]):
                    losses = part.evaluate(at_w=False)
                    torch.autograd.backward(losses, scaling(torch.zeros_like(losses) if v is None else v / size))
        self._descend(*scaling.signals)
        return mean_loss(parts)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the base optimizer's state; backups and kept gradients belong to a step and are not in it.

        Raises:
            ValueError: Between two phases, when a checkpoint would hold perturbed weights.
        """
        self._check_settled("state_dict")
        self._note_skipped()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. A plain base optimizer's state is taken too; what it lacks keeps its present value."""
        self._check_settled("load_state_dict")
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            groups = [
                saved if "perturb" in saved else {**saved, **{name: group[name] for name in self._own}}
                for saved, group in zip(groups, self.param_groups, strict=True)
            ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._skipped = None

    def _check_settled(self, name: str) -> None:
        if self._phase or self._climbed:
            raise ValueError(f"{name}() was called between two phases: finish the step, or call restore() first")

    def __getstate__(self) -> dict[str, Any]:
        self._check_settled("copy or pickle")
        self._note_skipped()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()
        self._skipped = None
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._sharded = any(hasattr(param, "_local_tensor") for param in self._parameters()[0])


class Uninterrupted:
    """Holds Ctrl-C back until weights, and the note of whether they are perturbed, agree again. About 1 us."""

    __slots__ = ("_handler", "_pending")

    def __enter__(self) -> None:
        self._pending: list[tuple[Any, ...]] = []
        self._handler = None
        if threading.current_thread() is threading.main_thread():  # no other thread runs Python's signal handlers
            handler = _signal.getsignal(_signal.SIGINT)
            if callable(handler):
                self._handler = handler
                _signal.signal(_signal.SIGINT, lambda *args: self._pending.append(args))

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            _signal.signal(_signal.SIGINT, self._handler)
            if self._pending:
                self._handler(*self._pending[0])


_NONE = type(None)  # `None in tensors` would compare element by element


def _same_items(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


_requires_grad = operator.attrgetter("requires_grad")
_grad = operator.attrgetter("grad")


def _gradients(params: list[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters that are not frozen. 50 ns each: with a comprehension it would be twice that."""
    if all(map(_requires_grad, params)):
        return list(map(_grad, params))
    return [param.grad if param.requires_grad else None for param in params]


def _swap_gradients(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Puts ``grads`` in place and returns what was there."""
    before = [param.grad for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return before


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
