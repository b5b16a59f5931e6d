"""What all methods share: groups with options, a whole step or its phases, hooks, checkpoints, copies."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ltsam_fast.lists import clear_gradients, same_items
from ltsam_fast.ops.checks import (
    SKIP,
    check_is_tensor,
    check_model,
    check_params,
    check_sample_weights,
    check_targets,
    check_trained,
    number,
    shown,
)
from ltsam_fast.ops.dispatch import OPS, clear_weight_caches
from ltsam_fast.optim.amp import NO_SCALE, LossScale, SkippedSteps
from ltsam_fast.optim.base_step import base_step_of, check_base, check_base_options
from ltsam_fast.optim.checkpoints import VERSION, completed, restore_numbers
from ltsam_fast.optim.closures import Closure, CompiledGraphs, check_own_samples, check_takes_index, explained
from ltsam_fast.optim.criterion import Criterion
from ltsam_fast.optim.masks import to_bits
from ltsam_fast.optim.network import Network
from ltsam_fast.optim.options import COUNTS, Configurable, check_class_counts, check_spelling, did_you_mean, option
from ltsam_fast.optim.parallel import Single, is_sharded, local_shards, workers_of
from ltsam_fast.optim.perturbation import Perturbation
from ltsam_fast.optim.phases import PhaseRun, count_phases
from ltsam_fast.optim.plan import Passes
from ltsam_fast.optim.schedules import (
    ACTIVE,
    SCHEDULES,
    check_active,
    check_schedule,
    check_schedules,
    factor,
    is_active,
)
from ltsam_fast.optim.step import AtWeights, Request, Step
from ltsam_fast.snapshot import is_readable
from ltsam_fast.table import TensorTable

Rule = Generator[Request, Any, None]

_NOTHING = contextlib.nullcontext()
_CONSTANTS = 64
_SIGNALS = ("grad_scale", "found_inf")
_NAMES = ("first_step", "second_step", "third_step", "fourth_step")


class SharpnessAware(Configurable, Optimizer):
    """Base of the methods: a torch optimizer that evaluates gradients at perturbed weights and steps from the old ones.

    A method is a subclass with options and a :meth:`rule`. State and parameter groups are those of ``base_optimizer``, shared,
    so ``state_dict()`` holds all of it and learning rate schedulers take this optimizer itself. Options are entries of the
    groups, and attributes. ``steps`` counts all steps; ``base_steps`` those in which the method was not active; and
    ``skipped_steps`` those of the method that a GradScaler's overflow skipped.

    ``active`` says which steps perturb the weights. The others are the base optimizer's own, of the mean loss: one forward and
    one backward, on the CPU its own ``step()``, bit for bit; elsewhere, and with a GradScaler, one fused pass. With the phases
    such a step has one, see :attr:`phases`. Options of a method that count steps count those in which it is active.

    Each group may set ``rho``, ``adaptive``, ``eta`` (ASAM's constant, 0), ``norm_eps`` (added to the norm, 1e-12) and
    ``perturb`` (False leaves the group, and its share of the norm, out of the perturbation). All other options must be the same
    in all groups.

    Give the network as ``model``, and running statistics of normalization layers see the unperturbed pass only; else every pass
    updates them, as in published code. ``step()`` then also leaves out what it does not need, see
    :mod:`ltsam_fast.optim.plan`; the network is looked at in the first step, and in the 2nd, 4th, 8th, ... again. Weights of
    another optimizer keep the gradients that the published passes leave there.

    Weights in bfloat16 and float16 are perturbed with stochastic rounding: most of the perturbation is below their
    resolution and would vanish.

    Under DistributedDataParallel give it as ``model``. Workers then ascend along their own gradients and only the last pass of
    a step is averaged, once, as in the SAM paper; ``ascent_sync=True`` averages the ascent gradient too. Methods that combine
    gradients of both passes (GSAM, WSAM, LookSAM) always do. A gradient that a worker lacks counts as zero; with DDP's
    ``find_unused_parameters=True`` a weight that no worker uses is left out of the step. In DDP's ``join()`` a step that has
    all-reduces of its own is refused. With the phases ``model.no_sync()`` is the caller's business.

    With FSDP2 every backward's gradients are averaged, and norms run over all shards once, replicas of them or not. Give the
    root as ``model`` here too: after an exception, or an evaluation, it may hold gathered copies of other weights, which the
    step then lets go of.

    SGD, Adam and AdamW run fused: restoring, adding up gradients and updating are one pass. Any other torch optimizer
    steps by itself on the restored weights.

    Raises:
        ValueError: An option is out of its range, or one of the base optimizer is wrong.
        TypeError: ``base_optimizer`` is not a class, or neither it nor the method has an option of this name.
    """

    _running: PhaseRun | None
    _phases: tuple[str, ...] | None
    _stepping: bool
    _network: Network | None
    _checked_names: list[str]
    _checked_values: list[list[Any]]
    _workers: Single
    _perturbation: Perturbation
    _checked_params: list[Tensor] = []  # noqa: RUF012  (never changed in place)
    _params_of_one_group: tuple[list[Tensor], list[int]] = ([], [])

    rho = option(0.05, "Radius of the perturbation, in units of the weights.", ge=0, per_group=True)
    adaptive = option(False, "Scale the perturbation by the weights, as ASAM does.", per_group=True)
    class_counts = option(
        None,
        "Numbers of training samples, one per class. Class-wise methods need them for ``step(closure, targets)``, the others "
        "ignore them.",
        check=check_class_counts,
        accepts="a list of finite numbers >= 0, not all 0",
        optional=True,
    )
    max_grad_norm = option(0.0, "Clip the final gradient to this norm, inside the update; 0: do not.", ge=0)
    ascent_sync = option(False, "Under DDP, ascend along the mean of all workers' gradients.")
    plan = option(
        "auto",
        'How ``step(closure)`` gets its gradients. "auto": the same gradients, to rounding, at the least cost, see '
        ':mod:`ltsam_fast.optim.plan`; "published": by the published passes; "require": as "auto", but sweeps are always '
        "shared, and a network that mixes samples is an error that names the module.",
        choices=("auto", "published", "require"),
    )
    active = option(
        "all",
        "Which steps perturb the weights, counted from 0; a share is that at the end of ``total_steps``. A function, which is "
        "not in checkpoints, must depend on the step's number alone.",
        check=check_active,
        accepts=ACTIVE,
    )
    rho_schedule = option(
        "constant",
        'What all radii are multiplied by in step t of T = ``total_steps``: "linear", t / T; "quadratic", (t / T)^2; "cosine", '
        '(1 + cos(pi t / T)) / 2; "lr", the learning rate over the largest one, see ``lr_max``; a function gives the factor of '
        "step t, and is not in checkpoints.",
        check=check_schedule,
        accepts=f"one of {', '.join(map(repr, SCHEDULES))} or a function",
    )
    total_steps = option(
        None, "The number of steps of the run, where a schedule needs it.", ge=1, integer=True, optional=True
    )
    lr_max = option(
        None,
        "The largest learning rate of the schedule; None: ``max_lr``, which ``OneCycleLR`` sets, else the largest of "
        "``initial_lr``, which all schedulers set, and the rates in the steps so far.",
        gt=0,
        optional=True,
        per_group=True,
        keyword=False,
    )
    lr_seen = option(0.0, "The largest learning rate so far.", ge=0, per_group=True, keyword=False, counted=True)
    eta = option(0.0, "ASAM's constant: ``|w|`` becomes ``|w| + eta``.", ge=0, per_group=True, keyword=False)
    norm_eps = option(1e-12, "Added to the norm of the gradient.", ge=0, per_group=True, keyword=False)
    perturb = option(True, "Whether the group is perturbed.", per_group=True, keyword=False)

    weights_now: Any = None
    """The class weights u and v, None where all are zero, of methods that have any; :meth:`classes` brings them up to date."""
    takes_weights = False
    """Whether ``step(closure, weights=(u, v))`` is to be had."""
    asam_constant = "eta"
    """The option with ASAM's constant."""
    buffers: tuple[str, ...] = ()
    """Names of a parameter's state that is the method's own."""
    published_state: Mapping[str, str] = MappingProxyType({})
    """What published classes call some of it."""
    several_gradients = False
    """Whether losses are differentiated more than once."""
    whole_gradients = False
    """Whether the rule needs the gradients of single samples or classes of whole parameters."""
    evaluates_at_w = True
    """Whether a step evaluates the whole batch at the unperturbed weights, and so knows its loss there."""
    needs_index = False
    """Whether closures are called with parts of a batch."""
    own_reductions = False
    """Whether workers do more in a step than averaging its last gradient."""
    host_only = ""
    """Why the host has to look at the batch, if so: then no CUDA graph can hold the step."""
    phases_are_fixed = True
    """Whether every step has the same phases."""
    protects_running_stats = True
    """Whether running statistics see the unperturbed pass only."""
    phase_names: tuple[str, ...] = _NAMES
    """What the phases are called."""
    captures = False
    """Whether the step is to be held by a CUDA graph: then its passes must not depend on the batch."""
    pickled: tuple[str, ...] = ("base_optimizer", "_model", "_base_only")
    """Attributes that survive copying and pickling, besides torch's."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer] | None = None,  # needed; None is answered in one line
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        if base_optimizer is None:
            example = f"{type(self).__name__}(params, torch.optim.SGD, lr=0.1)"
            raise TypeError(f"base_optimizer must be given, the class that takes the step: {example}")
        if isinstance(base_optimizer, (Optimizer, torch.nn.Module)) or not callable(base_optimizer):
            raise TypeError(
                f"base_optimizer must be a class such as torch.optim.SGD, got {type(base_optimizer).__name__} "
                f"{shown(base_optimizer)}"
            )
        if isinstance(base_optimizer, type):
            check_base(base_optimizer)
        given = {"rho": rho, "adaptive": adaptive, **base_kwargs}
        own = {
            name: given.pop(name) if one.keyword and name in given else one.default
            for name, one in self.options.items()
        }
        self._check_names(base_optimizer, given)
        check_base_options(given)
        # Those of a group are checked with the group, which may have its own.
        own |= {name: one.check(name, own[name]) for name, one in self.options.items() if not one.per_group}
        self._sharded = False
        self.model = model
        self.check_options(own)
        own |= COUNTS
        self.base_optimizer = base_optimizer(_with_options(params, own), **given)
        check_base(type(self.base_optimizer))
        # Where the base has an option of the same name (Adadelta's rho), it gets its own value back while it steps.
        defaults = self.base_optimizer.defaults
        self._base_only = {name: defaults[name] for name in own if name in defaults}
        self._reset_step_state()
        super().__init__(self.base_optimizer.param_groups, own)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **own}
        self.resolve_options()
        self._follow_base()

    def _check_names(self, base: Callable[..., Optimizer], given: Mapping[str, Any]) -> None:
        """Raises TypeError if the base optimizer has no option of a name that the method has not taken."""
        parameters = inspect.signature(base).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return  # the base says so itself
        theirs = [one.name for one in parameters][1:]
        for name in given:
            if name in theirs:
                continue
            cls = type(self).__name__
            if name in self.options:
                raise TypeError(
                    f"{name} is an option of parameter groups, not of {cls}: {{'params': ..., {name!r}: ...}}"
                )
            own = [*(option for option, one in self.options.items() if one.keyword), "model"]
            raise TypeError(
                f"{cls} has no option {name!r}{did_you_mean(name, [*own, *theirs])} It takes {', '.join(own)}; "
                f"{getattr(base, '__name__', 'base_optimizer')} takes {', '.join(theirs)}"
            )

    # --- what a method writes

    def rule(self, step: Step) -> Rule:
        """What a step of the method does: see :mod:`ltsam_fast.optim.step`."""
        raise NotImplementedError

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError if options, which are in their ranges, do not go together."""
        check_schedules(options)
        if options["plan"] == "require" and self.model is None:
            raise ValueError("model must be given with plan='require': the network that closures evaluate, got None")

    def resolve_options(self) -> None:
        """Is called once the groups are there: an option that names parameters then becomes their places in the groups."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError if a group of parameters will not do."""

    def classes(self) -> int | None:
        """Below which number the samples' classes must lie; None: they are not looked at."""
        return None

    def end_step(self) -> None:
        """Is called when a step has been counted."""

    # --- a whole step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        targets: Tensor | Sequence[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        loss: Callable[..., Tensor] | None = None,
        weights: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """One step of the method.

        Args:
            closure: Runs the forward pass alone and returns the per-sample losses, shape (B,), floating point, not
                detached. A sequence of closures is a batch in parts: their gradients add up to one step. Let it take the
                numbers of the samples wanted, ``closure(index=slice(None))``, 1-D int64, and those that a step does not
                need are not evaluated; some methods cannot do without.
            targets: The samples' classes, shape (B,), integer; a sequence with a sequence of closures. Methods that are told
                class counts need them, each less than C; the others do not look at them.
            scaler: A GradScaler. If a gradient of either pass overflows, weights and base state stay as they were, which is
                decided on the device. Call ``scaler.update()`` yourself, once a step.

                With the phases, give it to the first one, and call neither its unscale_() nor its step().
            loss: If given, the closure returns logits, (B, C), and the step applies this to them and ``targets``: one of
                :mod:`ltsam_fast.losses`, of torch, or a function that returns the losses of the samples. Whatever its
                ``reduction``, the step takes the mean, with class weights divided by theirs over the batch, as torch's.
            weights: For Focal-SAM, ImbSAM and SSE-SAM: weights of the samples, (u, v), in place of those of their classes. The
                clean loss is (1/B) sum_j u_j l_j, the sharp one (1/B) sum_j v_j l_j. Two tensors of shape (B,), floating point,
                on one device, finite, v >= 0; a sequence of pairs with a sequence of closures. No gradient flows to them. On
                the CPU they are read without waiting for the device. ``targets`` then are for ``loss`` alone.

        Returns:
            The mean loss at the unperturbed weights, 0-d, detached, on the losses' device. ``weights`` do not count in it.

        Raises:
            ValueError: There is no closure, or what it returns, ``targets`` or ``weights`` do not fit. Whatever is raised, by
                the closure too, Ctrl-C included, the weights are the unperturbed ones afterwards.
        """
        if closure is None and self._is_torchs_own_call():
            return self._torchs_own_call()  # type: ignore[no-any-return]
        closures: list[Any] = (
            list(closure) if isinstance(closure, (list, tuple)) else [] if closure is None else [closure]
        )
        if any(getattr(self, name, None) is not None for name in _SIGNALS):
            self._forget_signals()
            raise ValueError("scaler.step(optimizer, closure) is not supported: call step(closure, scaler=scaler)")
        if not closures or not all(map(callable, closures)):
            raise ValueError(
                "closure must be given: step(closure), with a function that returns the per-sample losses (B,), or a list of "
                "such functions"
            )
        if self._running is not None:
            self._check_turn("step")
        if self._stepping:
            raise ValueError("step() was called by a closure of the same step: call it when that has ended")
        given = None if weights is None else self.checked_weights(weights, len(closures))
        classes = self.classes() if given is None else None
        labels: list[Any] = [None] * len(closures)
        if targets is not None or loss is not None or classes is not None:
            labels = self._check_targets(targets, len(closures), classes)
        check_own_samples(closures, labels)
        criterion = None if loss is None else Criterion(loss, labels, classes)
        self._clear_gradients()
        buffers = self._buffers_at_first_step()
        step = self._begin(scaler)
        passes = Passes(self, step, closures, labels, criterion, given)
        if self.needs_index:
            check_takes_index(passes.parts, type(self).__name__)
        try:
            self._stepping = True
            rule = self.rule_of(step)
            request = next(rule)
            with contextlib.suppress(StopIteration), self.graphs.reusable() if self.several_gradients else _NOTHING:
                while True:
                    request = rule.send(passes(request))
            self._clear_gradients()
            mean = passes.mean_loss()
            if scaler is not None:
                step.scaling.report(self)
            return mean
        except BaseException as error:
            self._abandon(step)
            self._clear_gradients()
            for buffer, value in buffers:
                buffer.copy_(value)
            if isinstance(error, RuntimeError) and (better := explained(error)) is not error:
                raise better from error
            raise
        finally:
            self._stepping = False
            passes.end()
            step.passes = None  # else a cycle would keep the batch, and what it refers to, for a while

    # --- the phases, which come from the rule

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the explicit phases of the next step, in order; none where their number depends on the batch."""
        if self._phases is None or not self.phases_are_fixed or self.active != "all":
            self._phases = self.phase_names[: count_phases(self)]
        return self._phases

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """The first phase: takes the present gradients as the rule's first.

        Args:
            zero_grad: Also clear the gradients.
            scaler: The GradScaler that scaled the loss, for the whole step: see :meth:`step`.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient to ascend along.
        """
        self._advance("first_step", zero_grad, scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """The second phase: takes the present gradients as the rule's next; in most methods the weights are updated.

        Args:
            zero_grad: Also clear the gradients.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("second_step", zero_grad)

    @property
    def is_perturbed(self) -> bool:
        """Whether weights are perturbed now: between two phases, or while a closure is evaluated at w + eps."""
        return bool(self._perturbation.now.params)

    def restore(self) -> None:
        """Puts the unperturbed weights back and starts over with the first phase: for use after an error of your own.

        Gradients that were kept from an earlier phase are dropped. Without perturbed weights nothing happens to weights.
        """
        self._abandon(None if self._running is None else self._running.step)

    def _advance(self, phase: str, zero_grad: bool = False, scaler: Any = None, **inputs: Any) -> None:
        """Runs a phase in its turn, without gradients, which no phase of a method has to see to.

        ``scaler`` is the first phase's, for all of the step, and ``inputs`` are the rule's.
        """
        enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # as torch.no_grad(), in less time
            self._run_phase(phase, zero_grad, scaler, inputs)
        finally:
            torch._C._set_grad_enabled(enabled)

    def _run_phase(self, phase: str, zero_grad: bool, scaler: Any, inputs: dict[str, Any]) -> None:
        self._check_turn(phase)
        run = self._running
        if run is None:
            if not self._within_step:
                self._call_hooks(_global_optimizer_pre_hooks, self._optimizer_step_pre_hooks)
            step = self._begin(scaler)
            run = PhaseRun(self, step, inputs)
        run.check_gradients()
        scaling = run.step.scaling
        scaling.check_scaled(self)
        try:
            if any(getattr(self, name, None) is not None for name in _SIGNALS):
                if run.step.averaged_unscaled and scaling.grad_scale is None:
                    raise ValueError(
                        f"scaler must be given to first_step(scaler=scaler) too: {type(self).__name__} averages gradients there"
                    )
                scaling = run.step.scaling = scaling.with_signals_of(self)
            if self._workers.averages:
                self._check_join(bool(scaling.signals))
            self._running = run
            finished = run.advance()
        except BaseException:
            self._abandon(run.step)
            raise
        if finished:
            self._running = run.step.passes = None
            scaling.report(self)
            if not self._within_step:
                self._call_hooks(self._optimizer_step_post_hooks, _global_optimizer_post_hooks)
        if zero_grad and not run.cleared:
            self._clear_gradients()

    def _check_turn(self, phase: str) -> None:
        """Raises ValueError unless ``phase`` is next."""
        position = 0 if self._running is None else self._running.position
        if position < len(self.phase_names) and self.phase_names[position] == phase and (position or self.phases):
            return
        names = self.phases or self._running and self.phase_names[: position + 1]
        if not names:
            raise ValueError(
                f"{phase}() was called, but {type(self).__name__} has no phases, for its passes depend on the batch: call "
                "step(closure)"
            )
        expected = self.phase_names[position]
        raise ValueError(
            f"{phase}() was called where {expected}() is next: call {', '.join(f'{name}()' for name in names)} "
            "in this order, each after its backward(), or restore() to start over"
        )

    # --- how torch itself calls

    _step_supports_amp_scaling = True
    """Tells torch.amp.GradScaler.step() to set ``grad_scale`` and ``found_inf``, and to leave the gradients as they are."""
    _within_step = False

    def _patch_step_function(self) -> None:
        """Where torch wraps step(): keeps that and the phases out of torch.compile's graphs, which break there once."""
        super()._patch_step_function()  # type: ignore[misc]
        cls = type(self)
        for name in ("step", *self.phase_names):
            function = getattr(cls, name, None)
            if function is not None and not hasattr(function, "_torchdynamo_disable"):
                setattr(cls, name, torch.compiler.disable(function))

    def _is_torchs_own_call(self) -> bool:
        """Whether step() is one of torch's own: a GradScaler takes the last phase, or a checkpoint wants state."""
        if self._running is not None:
            return self._running.position == len(self._running.names) - 1
        if getattr(self, "grad_scale", None) is not None and len(self.phases) == 1:
            return True
        return self._asks_for_state()

    def _torchs_own_call(self) -> Any:
        if self._running is None and getattr(self, "grad_scale", None) is None:
            return self._create_state()
        self._within_step = True  # torch calls the hooks around it
        try:
            return getattr(self, self.phase_names[0 if self._running is None else self._running.position])()
        except BaseException:
            self._forget_signals()
            raise
        finally:
            self._within_step = False

    def _asks_for_state(self) -> bool:
        """Whether torch.distributed.checkpoint calls step() with learning rate 0 and gradients of zeros, to see the state."""
        if any(bool(group.get("lr", 0.0)) for group in self.param_groups):
            return False
        params = [param for param in self.all_params()[0] if param.requires_grad]
        grads = local_shards([param.grad for param in params])
        return bool(grads) and not any(grad is None or bool(grad.any()) for grad in grads)

    def _create_state(self) -> None:
        """Makes the state that the steps would make, for a checkpoint to be loaded into."""
        moving = [(param, group) for param, group in zip(*self.all_params(), strict=True) if param.requires_grad]
        params, groups = [param for param, _ in moving], [group for _, group in moving]
        self.create_buffers(params)
        self.base_step.create_state(self, params, groups)

    def create_buffers(self, params: list[Tensor]) -> None:
        """Makes the method's own state, where it is missing."""
        for param in params:
            for name in self.buffers:
                self.state[param].setdefault(name, torch.zeros_like(param, requires_grad=False))

    def _call_hooks(self, *registered: dict[int, Callable[..., Any]]) -> None:
        """Calls the hooks that torch.optim calls around step(), which the phases together are."""
        for hooks in registered:
            for hook in list(hooks.values()):
                hook(self, (), {})

    # --- what a step needs of the optimizer

    def rule_of(self, step: Step, **inputs: Any) -> Rule:
        """What a step does: the method's rule, where it is active, or the base optimizer's step."""
        return self.rule(step, **inputs) if self.is_active(step.taken) else _base_rule(step)

    def is_active(self, taken: int) -> bool:
        """Whether the step after ``taken`` others is one of the method."""
        return is_active(self.active, taken, self.total_steps)

    def rho_factors(self, taken: int) -> list[float] | None:
        """What the radius of each group is multiplied by in the step after ``taken`` others; None: by nothing."""
        schedule = self.rho_schedule
        if schedule == "constant":
            return None
        if schedule == "lr":
            return [self.lr_share(group) for group in self.param_groups]
        return [factor(schedule, taken, self.total_steps)] * len(self.param_groups)

    def lr_share(self, group: dict[str, Any], least: float = 0.0) -> float:
        """Where a group's learning rate is between ``least`` and the schedule's largest, in [0, 1]."""
        lr, top = number(group["lr"]), group["lr_max"]
        if top is None and (top := group.get("max_lr")) is None:
            top = max(number(group.get("initial_lr", 0.0)), group["lr_seen"], lr)
        reach = number(top) - least
        return min(max((lr - least) / reach if reach > 0 else 1.0, 0.0), 1.0)

    def _begin(self, scaler: Any) -> Step:
        """A step that begins now, with the workers that there are now."""
        values = [[group[name] for name in self._checked_names] for group in self.param_groups]
        if values != self._checked_values:
            for group in self.param_groups:
                self.check_group_options(group)
            self._check_equal_options()
            self._checked_values = values
        if self._may_average and not self._workers.averages:  # torch.distributed may have been initialized since
            self._workers = workers_of(self._model, self._sharded)
        first = self.param_groups[0]
        if first["steps"] == first["total_steps"]:
            warnings.warn(
                f"total_steps = {self.total_steps} steps have been taken, and here is one more: it counts steps, not epochs",
                stacklevel=2,
            )
        params, groups = self.all_params()
        self._check_params(params)
        scaling = NO_SCALE if scaler is None else LossScale(scaler, params)
        scaling.check_updated(self)
        if self._workers.averages:
            self._check_join(bool(scaling.signals))
        clear_weight_caches()
        return Step(self, scaling, params, groups)

    def _check_params(self, params: list[Tensor]) -> None:
        """Raises ValueError, before a step has changed any, if weights share memory or the network has none of them.

        An op knows of the memory that it writes.
        """
        if same_items(params, self._checked_params) or any(
            map(is_lazy, params)
        ):  # those of lazy modules have no memory yet
            return
        check_trained(self._model, params)
        local = self._workers.local(params)
        if all(is_readable(one) for one in local):
            TensorTable(OPS["restore_"]).bind((local, local))
        self._checked_params = params

    def _abandon(self, step: Step | None) -> None:
        """Ends a step that failed: puts weights back, unless there are new ones already. A further Ctrl-C does not keep it."""
        while True:
            try:
                if self._perturbation.abandon(self._workers) and step is not None:
                    step.finish()
                if step is not None:
                    step.passes = None
                    self._workers.abandon()
                self._running = None
                self.skipped.abandon_step()
                self._forget_signals()
                return
            except KeyboardInterrupt:
                continue

    def _forget_signals(self) -> None:
        """Removes what torch's GradScaler sets for its call of step(), and leaves there after an exception."""
        for name in _SIGNALS:
            vars(self).pop(name, None)

    def all_params(self) -> tuple[list[Tensor], list[int]]:
        """All parameters, and the group of each, in lists that are not to be changed."""
        single = len(self.param_groups) == 1
        if single and same_items(self.param_groups[0]["params"], self._params_of_one_group[0]):
            return self._params_of_one_group
        params: list[Tensor] = []
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            params += group["params"]
            groups += [index] * len(group["params"])
        if single:
            self._params_of_one_group = params, groups
        return params, groups

    def ascent_params(self) -> list[Tensor]:
        """The parameters that may be perturbed."""
        groups = [group for group in self.param_groups if group["perturb"]]
        return [param for group in groups for param in group["params"] if param.requires_grad]

    @property
    def network(self) -> Network | None:
        """What is known of the network; None if it is not given, or passes are to be as published."""
        if self._model is None or self.plan == "published":
            return None
        if self._network is None or self._network.model is not self._model:
            self._network = Network(self._model)
        return self._network

    def all_weights(self) -> list[Tensor]:
        """All weights that are known: a loss may depend on some that are not to be stepped."""
        return [*self.all_params()[0], *(self.model.parameters() if self.model is not None else ())]

    def values(self, name: str) -> tuple[Any, ...]:
        """An entry of each group; None where a group has none of this name."""
        return tuple([group.get(name) for group in self.param_groups])

    def constant(self, values: tuple[float, ...]) -> Tensor:
        """A small tensor for the ops, made once: that waits for the device."""
        param = next(param for group in self.param_groups for param in group["params"])  # the first groups may be empty
        key = (values, param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)
        if key not in self._constants:
            if len(self._constants) == _CONSTANTS:  # their numbers change all the time
                del self._constants[next(iter(self._constants))]
            self._constants[key] = torch.tensor(values, device=param.device, dtype=key[2])
        return self._constants[key]

    def set_mask(self, name: str, moving: Tensor) -> None:
        """Keeps bits of the elements that stay as state of the parameters that may be perturbed; ``moving`` is (N,), bool."""
        self.skipped.drop_doubtful()
        params = self.ascent_params()
        for param, bits in zip(params, to_bits(moving, [param.numel() for param in params]), strict=True):
            state = self.state[param]
            if name in state:  # in place, where CUDA graphs look for them
                self.skipped.before_change([state[name]], None)
                state[name].copy_(bits)
            else:
                state[name] = bits
                self.skipped.created([(state, name)], None)

    def count_step(self, taken: int, base_steps: int) -> None:
        """Counts the step after ``taken`` others, ``base_steps`` of which were the base optimizer's; a captured graph's too."""
        base_steps += not self.is_active(taken)
        for group in self.param_groups:
            group["steps"], group["base_steps"] = taken + 1, base_steps
            if self.follows_lr:
                group["lr_seen"] = max(group["lr_seen"], number(group["lr"]))
        self.end_step()

    @property
    def follows_lr(self) -> bool:
        """Whether radii move with the learning rate."""
        return self.rho_schedule == "lr"

    def kept_memory(self) -> list[Any]:
        """What steps read and write besides weights and state: a captured graph goes on using it."""
        return [
            *self._perturbation.memory,
            *self._constants.values(),
            self.skipped.memory,
            self.weights_now,
        ]

    def discard_step(self) -> None:
        """Forgets about a step that the device has not taken, in a CUDA graph that could not be captured."""
        self._perturbation.discard()
        self.skipped.abandon_step()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        """zero_grad() without torch's bookkeeping around it."""
        for group in self.param_groups:
            clear_gradients(group["params"])
        if self._workers.finds_unused:
            self._workers.gradients_cleared()

    def _check_join(self, scaled: bool) -> None:
        name = type(self).__name__
        self._workers.check_join({name: self.own_reductions, "ascent_sync=True": self.ascent_sync, "scaler": scaled})

    def _buffers_at_first_step(self) -> list[tuple[Tensor, Tensor]]:
        """The network's buffers with copies: a closure that turns out to be wrong has updated running statistics."""
        first = self._model is not None and not self.param_groups[0]["steps"]
        return [(buffer, buffer.clone()) for buffer in self._model.buffers()] if first else []  # type: ignore[union-attr]

    def checked_weights(self, weights: Any, closures: int) -> list[Tensor]:
        """The caller's weights of the samples: a tensor (2, B) for each closure; raises ValueError if they do not fit."""
        if not self.takes_weights:
            raise ValueError(
                f"weights must be left out: {type(self).__name__} does not tell a clean from a sharp loss; multiply the losses "
                "by yours in the closure"
            )
        return check_sample_weights(weights, closures, {param.device for param in self.all_params()[0]})

    def _check_targets(self, targets: Any, closures: int, classes: int | None) -> list[Tensor | None]:
        if targets is None:
            raise ValueError("targets must be given: step(closure, targets=y) with the samples' classes, shape (B,)")
        labels: list[Any] = list(targets) if isinstance(targets, (list, tuple)) else [targets]
        if labels and not any(isinstance(label, Tensor) for label in labels):
            check_is_tensor(labels[0] if len(labels) == closures else targets)
        if len(labels) != closures:
            raise ValueError(f"targets has {len(labels)} entries, but there are {closures} closures: give one each")
        for label in labels:
            check_is_tensor(label)
            if not label.dim():
                raise ValueError(f"targets must have shape (B,), one label per sample, got {label!r} of shape ()")
            if not len(label):
                raise ValueError(f"targets have shape {tuple(label.shape)}, of a batch without samples: {SKIP}")
            if classes is not None:
                check_targets(label, classes)
        return labels

    @contextlib.contextmanager
    def base_alone(self) -> Iterator[None]:
        """Around the base optimizer's own step: its options are its own, and so is the state that it sees."""
        own = [{name: group[name] for name in self._base_only} for group in self.param_groups]
        # torch's optimizers take a state that is not empty for one of theirs.
        states = [state for state in self.state.values() if self.buffers]
        buffers = [{name: state.pop(name) for name in self.buffers if name in state} for state in states]
        try:
            for group in self.param_groups:
                group.update(self._base_only)
            yield
        finally:
            for group, values in zip(self.param_groups, own, strict=True):
                group.update(values)
            for state, values in zip(states, buffers, strict=True):
                state.update(values)

    # --- groups, checkpoints, copies

    @property
    def model(self) -> torch.nn.Module | None:
        """What the closures evaluate, if it is known; trainers set it when they have wrapped it."""
        return self._model

    @model.setter
    def model(self, model: torch.nn.Module | None) -> None:
        check_model(model)
        self._model, self._may_average = model, hasattr(model, "no_sync")
        self._workers = workers_of(model, self._sharded)
        self._checked_params = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; options that it does not set are the defaults, or those of the other groups."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be {{'params': ..., option: value}}, got {shown(param_group)}")
        check_params("params", param_group.get("params", []))
        first = self.param_groups[0] if getattr(self, "param_groups", None) else {}
        for name in (*COUNTS, *(name for name, one in self.options.items() if not one.per_group)):
            if name in first:
                param_group.setdefault(name, first[name])
        check_spelling(param_group, {*self.options, *self.base_optimizer.defaults})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group_options(group)
            self._check_equal_options()
            if any(map(is_sharded, group["params"])):
                if self.whole_gradients:
                    raise ValueError(
                        f"params must not be sharded (FSDP2) for {type(self).__name__}: it needs whole gradients of single "
                        "samples or classes; use DistributedDataParallel"
                    )
                self._sharded = True
                self._workers = workers_of(self._model, True)
        except ValueError:
            self.param_groups.pop()
            raise

    def check_group_options(self, group: dict[str, Any]) -> None:
        """Makes a group's options plain numbers; raises ValueError if one will not do."""
        group |= {name: one.check(name, group[name]) for name, one in self.options.items()}
        check_base_options(group)
        if group.get("maximize") and "maximize" not in self.base_optimizer.defaults:
            raise ValueError(f"maximize must be left out: {type(self.base_optimizer).__name__} only minimizes")
        self.check_options(group)
        self.check_group(group)

    def _check_equal_options(self) -> None:
        """Raises ValueError if groups differ in an option of the whole optimizer."""
        first, *others = self.param_groups
        for name, one in self.options.items():
            if not one.per_group and any(group[name] != first[name] for group in others):
                raise ValueError(f"{name} must be the same in all groups, got {list(self.values(name))}")

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the base optimizer's state, and the format's ``version``.

        Backups and kept gradients belong to a step and are not in it.

        Raises:
            ValueError: Between two phases, when a checkpoint would hold perturbed weights.
        """
        self._check_between_steps("state_dict")
        self.skipped.write(self.param_groups)
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for name in ("active", "rho_schedule"):
                if callable(group.get(name)):  # code is the script's; it stays what it is where this is loaded
                    del group[name]
        return {**saved, "version": VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. What a plain base optimizer's checkpoint lacks keeps its present value.

        One of a published wrapper is taken too: its ``rho`` and ``adaptive`` count, what lives within a step is dropped, and
        the base optimizer's state, if it is missing, starts afresh, with a warning.

        Raises:
            ValueError: It does not fit. Whatever is raised, the optimizer is as it was.
        """
        self._check_between_steps("load_state_dict")
        before = [(one, dict(vars(one))) for one in (self, self.base_optimizer)]
        try:
            whole = completed(self, state_dict)
            super().load_state_dict(whole)
            restore_numbers(self, whole)
        except BaseException:
            for one, attributes in before:
                vars(one).clear()
                vars(one).update(attributes)
            raise

    def _check_between_steps(self, name: str) -> None:
        if self._running is not None or self._perturbation.now.params:
            raise ValueError(f"{name}() was called between two phases: finish the step, or call restore() first")

    def _base_state(self) -> dict[Any, Any]:
        """The state without parameters that have buffers of the method only: torch's optimizers take those for theirs."""
        return {
            key: state
            for key, state in self.state.items()
            if not isinstance(state, dict) or not {*state} <= {*self.buffers}
        }

    def _reset_step_state(self) -> None:
        """Sets up what is not kept in copies and checkpoints."""
        self._running = self._phases = None
        self._stepping = False
        self._perturbation = Perturbation()
        self.skipped = SkippedSteps()
        self._constants: dict[Any, Tensor] = {}
        self.graphs = CompiledGraphs()
        self._checked_names = [name for name, one in self.options.items() if not one.counted]
        self._checked_values = []
        self._network = None
        self.row_wise_head: Any = None
        self.base_step = base_step_of(self.base_optimizer)
        self.model = self._model  # and with it the workers that there are

    def __getstate__(self) -> dict[str, Any]:
        self._check_between_steps("copy or pickle")
        self.skipped.write(self.param_groups)
        base = object.__new__(type(self.base_optimizer))
        vars(base).update(vars(self.base_optimizer), state=self._base_state())
        kept = {name: getattr(self, name) for name in self.pickled} | {"base_optimizer": base}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._sharded = any(map(is_sharded, self.all_params()[0]))
        self._reset_step_state()
        self.base_optimizer.__setstate__({"state": self._base_state(), "param_groups": self.param_groups})
        self.base_optimizer.state = self.state
        self._follow_base()

    def _follow_base(self) -> None:
        """Goes on sharing groups and state where the base optimizer loads a checkpoint by itself."""
        if vars(self).get("_followed") is self.base_optimizer:
            return
        self._followed, me = self.base_optimizer, weakref.ref(self)

        def share(base: Optimizer) -> None:
            optimizer = me()
            if optimizer is None:
                return
            if len(base.param_groups) == len(optimizer.param_groups):
                for group, now in zip(base.param_groups, optimizer.param_groups, strict=True):
                    for name in now.keys() - group.keys():
                        group[name] = now[name]
            optimizer.restore()
            optimizer.__setstate__({"state": base.state, "param_groups": base.param_groups})
            for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
                hook(optimizer)

        self.base_optimizer.register_load_state_dict_post_hook(share)


def _base_rule(step: Step) -> Rule:
    """The base optimizer's step."""
    g = yield AtWeights(averaged=True, last=True)
    step.descend(g, alone=True)


def _with_options(params: Any, own: dict[str, Any]) -> Any:
    """The parameters in groups, each with the options ``own`` unless it has its own; what is no such thing is left to torch."""
    if isinstance(params, Tensor):
        return params
    check_params("params", params, ", or a list of groups of them")
    params = list(params)
    if not params:
        raise ValueError(
            "params is an empty parameter list: a generator, as of model.parameters(), can be read once only"
        )
    if not isinstance(params[0], dict):
        params = [{"params": params}]
    for place, group in enumerate(params):
        if not isinstance(group, dict):
            continue  # left to torch
        if "params" not in group:
            raise ValueError(f"params[{place}] must have 'params', the group's parameters, got {shown(group)}")
        check_params(f"params[{place}]['params']", group["params"])
    return [{**own, **group} if isinstance(group, dict) else group for group in params]
