"""What a rule asks for and what it may do: requests for gradients, and the verbs of a step.

A method's rule is a generator. It yields requests, receives the gradients, and calls verbs on the step it is given::

    def rule(self, step):
        g = yield AtWeights()            # the gradient of the mean loss at w
        step.ascend(g)                   # w + eps,  eps = rho g / |g|
        g_p = yield AtPerturbed()        # the gradient there
        step.descend(g_p)                # w <- base_step(w, g_p)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.lists import has_none
from ltsam_fast.optim.base_step import UnfusedStep, Update
from ltsam_fast.optim.gradients import (
    Combination,
    Gradient,
    State,
    Sum,
    all_missing,
    check_all_dense,
)
from ltsam_fast.optim.parallel import first_element
from ltsam_fast.optim.perturbation import NOTHING, Perturbed
from ltsam_fast.snapshot import ReadOnce

if TYPE_CHECKING:
    from ltsam_fast.optim.amp import LossScale
    from ltsam_fast.optim.class_perturbation import ClassGradients
    from ltsam_fast.optim.closures import Weights
    from ltsam_fast.optim.optimizer import SharpnessAware


class AtWeights:
    """A request for gradients at w.

    Answered by one :class:`Gradient`, or by one for each of several weightings; None where all weights are zero.

    Args:
        weights: For each gradient the weights of classes or samples; without any it is the gradient of the mean loss.
        of: A micro-batch: its samples only.
        averaged: The gradient is a part of the step's direction, and not of the ascent's alone: workers average it, and it
            is taken away from ``.grad``.
        last: The step has no pass after this one.
        kept: How many of several gradients, from the first on, are a part of the step's direction. The others, and a single
            one that is not ``averaged`` or ``last``, are for an ascent alone: of weights that are not perturbed they are not
            needed.
        squares: Besides, the squared gradients of so many single samples are asked for, summed up; the answer then is a
            pair. None in their place: the caller of the phases has seen to it.
    """

    __slots__ = ("averaged", "gradients", "kept", "last", "of", "squares", "weights")

    def __init__(
        self,
        *weights: Weights | None,
        of: MicroBatch | None = None,
        averaged: bool = False,
        last: bool = False,
        kept: int = 0,
        squares: int = 0,
    ) -> None:
        self.weights, self.of, self.averaged, self.last, self.squares = weights, of, averaged, last, squares
        self.kept = max(kept, 1 if averaged or last else 0)
        self.gradients = len(weights) or 1
        """How many gradients are asked for."""


class AtPerturbed:
    """A request for the gradient at the perturbed weights, answered by a :class:`Gradient` or a sum.

    Args:
        weights: Weights of classes or samples; without, it is the gradient of the mean loss.
        plus: A gradient at w that is to be added: workers average the sum, once.
        of: A micro-batch, or for each part of the batch the numbers of samples that count: their mean loss.
        accumulate: The gradient is added to those of the micro-batches before, as terms of the whole batch's mean loss.
        last: Whether it is the step's last pass, which workers average.
    """

    __slots__ = ("accumulate", "last", "of", "plus", "weights")
    gradients = 1

    def __init__(
        self,
        *weights: Weights | None,
        plus: Combination | None = None,
        of: MicroBatch | Sequence[Tensor] | None = None,
        accumulate: bool = False,
        last: bool = True,
    ) -> None:
        self.weights, self.plus, self.of, self.accumulate, self.last = weights, plus, of, accumulate, last


class LossIncrease:
    """A request for l_j(w + eps) - l_j(w), shape (B,) for each part of the batch; negative where the loss is maximized."""

    gradients = 1


class ByClass:
    """A request for the gradient at w of ``share`` times the mean loss, and of each class's mean loss.

    Answered by a pair: that :class:`Gradient`, and :class:`ltsam_fast.optim.class_perturbation.ClassGradients`, which are of
    the parameters at the positions ``scope``. Without any, or with share 1, there are no classes in these.
    """

    gradients = 1

    def __init__(self, share: float, scope: list[int]) -> None:
        self.share, self.scope = share, scope


class AtClassPerturbed:
    """A request for the gradient of ``share`` times the mean loss, each sample at the perturbed weights of its class.

    Answered by its sum with the gradient of :class:`ByClass`.
    """

    gradients = 1

    def __init__(self, share: float) -> None:
        self.share = share


class Pause:
    """Waits for the next phase, which brings no gradient."""

    gradients = 0


Request = AtWeights | AtPerturbed | LossIncrease | ByClass | AtClassPerturbed | Pause


class MicroBatch:
    """Samples of one part of the batch: their numbers ``index`` (m,), int64; ``last``: none follow."""

    __slots__ = ("index", "last", "part")

    def __init__(self, part: Any, index: Tensor, last: bool) -> None:
        self.part, self.index, self.last = part, index, last


class Step:
    """One step of an optimizer: the verbs that a rule may use.

    Attributes:
        number: How many steps of the method were taken before.
        taken: How many steps were taken before, those of the base optimizer alone included.
    """

    def __init__(self, optimizer: SharpnessAware, scaling: LossScale, params: list[Tensor], groups: list[int]) -> None:
        self._optimizer, self.scaling = optimizer, scaling
        self._params, self._groups = params, groups
        self._perturbation, self._workers = optimizer._perturbation, optimizer._workers
        self.passes: Any = None
        self._finished = self._alone = False
        self.averaged_unscaled = False
        """Whether gradients went into a running mean without a known scale."""
        self.gradient_numbers = itertools.count(1)
        """Numbers for the gradients of the step's passes, in their order."""
        self.seen_unperturbed = False
        """Whether a pass at w has updated running statistics."""
        self.skips_zero_radius = False
        """Whether an ascent by radius 0 is none, so that a gradient at w serves for w + eps."""
        self.stays = False
        """Whether the latest ascent was such a one."""
        group = optimizer.param_groups[0]
        self.taken, self._base_steps = group["steps"], group["base_steps"]
        self.number: int = self.taken - self._base_steps
        self.rho_factors = optimizer.rho_factors(self.taken)
        """What the groups' radii are multiplied by; None: by nothing."""

    @property
    def is_perturbed(self) -> bool:
        """Whether weights are perturbed now."""
        return bool(self._perturbation.now.params)

    @property
    def perturbed(self) -> Perturbed:
        """The weights that are perturbed now."""
        return self._perturbation.now

    # --- what a rule may ask

    def class_weights(self) -> tuple[Weights | None, Weights | None]:
        """The weights u and v, of the method's classes or the caller's of the samples; None where all are zero."""
        return self.passes.class_weights  # type: ignore[no-any-return]

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """The batch in micro-batches of ``size`` samples, the last of which may be smaller."""
        return self.passes.micro_batches(size)  # type: ignore[no-any-return]

    def state(self, name: str) -> State:
        """State of the method, kept from step to step: a tensor for each parameter, None where there is none yet."""
        optimizer = self._optimizer
        optimizer.skipped.drop_doubtful()
        # Before the first step there may be zeros that a checkpoint asked for.
        found = [optimizer.state[param].get(name) if self.number else None for param in self._params]
        return State(found, name)

    def known_state(self, *names: str) -> State | None:
        """State under the first of these names that any parameter has, the base optimizer's too; None where none has."""
        self._optimizer.skipped.drop_doubtful()
        state = self._optimizer.state
        for name in names:
            found = [state.get(param, {}).get(name) for param in self._params]
            if not all_missing(found):
                return State(found, name)
        return None

    def lacks(self, name: str) -> bool:
        """Whether a parameter that may be perturbed has no state ``name`` yet."""
        self._optimizer.skipped.drop_doubtful()
        return any(name not in self._optimizer.state[param] for param in self._optimizer.ascent_params())

    def dots(self, first: Gradient, second: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        """``<a, a>, <b, b>, <a, b>`` over all parameters, 0-d, on the device; of tensors that ``a`` has."""
        a, b = first.tensors, second.tensors
        if has_none(a):
            chosen = [i for i, tensor in enumerate(a) if tensor is not None]
            a, b = [a[i] for i in chosen], [b[i] for i in chosen]
        dots = self._workers.dots(a, b, f" {first.number} {second.number}")
        if self.scaling.signals:
            self.scaling.note(dots[0])
        if (scale := self.scaling.grad_scale) is not None:
            x, y = (torch.ones_like(scale) if one.number < 0 else 1 / scale for one in (first, second))
            dots = dots * torch.stack([x * x, y * y, x * y]).to(dots)
        return dots.unbind()  # type: ignore[return-value]

    # --- what a rule may do

    def ascend(
        self,
        direction: Combination | None,
        *,
        rho: float | Sequence[float] | None = None,
        ema: tuple[State, float] | None = None,
        mask: str | None = None,
        probability: float = 1.0,
        by_tensor: bool = False,
        seed: int = 0,
        begins_included: bool = False,
        unscaled: frozenset[Tensor] = frozenset(),
        divisor: Callable[[Tensor], Tensor] | None = None,
        downhill: bool = False,
    ) -> None:
        """Perturbs the weights: ``w + rho T d / (|T' d| + norm_eps)``, with the groups' ``adaptive`` scaling T.

        Weights that are perturbed already are perturbed anew, from w. None as direction does nothing.

        Args:
            direction: ``d``, over all parameters; a tensor that has none stays.
            rho: The radius, or one for each group; None: the groups' ``rho``. All are multiplied by the schedule's factor.
            ema: A state m and its decay: m <- decay m + (1 - decay) g, with the direction's gradient g; m begins as g.
            begins_included: Whether a mean that begins counts in the direction; else the ascent is along the gradient there.
            mask: Name of a state with bits of elements that stay.
            probability: Share of the elements that move, drawn at random.
            by_tensor: Draw whole tensors; the others are left out of the norm, too.
            seed: Seed of the draws.
            unscaled: Parameters that ``adaptive`` does not scale.
            divisor: What the direction is divided by, of its norm |T' d|, 0-d; None: that norm.
            downhill: ``w - rho T d / |T' d|``, whether the loss is minimized or maximized: the direction has that sign in it.
                A negative radius turns any direction round.

        Raises:
            ValueError: No parameter has a gradient.
        """
        optimizer, perturbation, workers = self._optimizer, self._perturbation, self._workers
        groups = optimizer.param_groups
        radii = self.radii(rho)
        self.stays = False
        if self.skips_zero_radius and ema is None and not self.is_perturbed:
            self.stays = not any(radius for radius, group in zip(radii, groups, strict=True) if group["perturb"])
        if self.stays:
            self._disable_running_stats()
        if direction is None or self.stays:
            return
        gradient, _, combination = self._split(direction)
        tensors = gradient.tensors
        if workers.averages and not gradient.averaged and optimizer.ascent_sync:
            tensors = workers.average(self._params, tensors)
        positions, now = self._ascending(tensors), perturbation.now
        again = bool(now.params)
        if again:
            again = now.positions is None or (positions is not None and {*positions} <= {*now.positions})
            if again:
                positions = now.positions
            else:  # some move that have not before
                perturbation.restore(workers)
        if by_tensor:
            positions = self._drawn(positions, probability, seed)
            probability = 1.0
        params, group_of, grads = self._params, self._groups, tensors
        if positions is not None:
            params, group_of, grads = (_at(items, positions) for items in (params, group_of, grads))
        whole, shards = grads, params
        if workers.sharded:
            whole = workers.redistributed(params, grads)
            shards, grads = workers.local(params), workers.local(whole)
        else:
            whole = grads = ReadOnce(grads)  # by the norm, and the perturbation that follows at once
        options: dict[str, Any] = {
            "rho": [abs(radius) for radius in radii],
            "maximize": [
                (downhill or bool(group.get("maximize", False))) != (radius < 0)
                for group, radius in zip(groups, radii, strict=True)
            ],
            "adaptive": [group["adaptive"] for group in groups],
            "eta": [group[optimizer.asam_constant] for group in groups],
            "eps": [group["norm_eps"] for group in groups],
        }
        if unscaled:  # each group counts for two: its parameters that are scaled, and the others
            group_of = [2 * group + (param in unscaled) for param, group in zip(params, group_of, strict=True)]
            for name, values in options.items():
                options[name] = [half for one in values for half in (one, one and name != "adaptive" and one)]
        options["groups"] = group_of if unscaled or len(groups) > 1 else None
        if probability != 1.0:
            options["probability"] = probability
        if ema is not None:
            means = _at(ema[0].tensors, positions) if positions is not None else list(ema[0].tensors)
            options["means"] = self._means(params, grads, means, ema[0].name, begins_included)
            options["decay"] = ema[1]
        if mask is not None:
            options["mask"] = [optimizer.state[param].get(mask) for param in params]
        norm = workers.norm(
            whole,
            perturbation.now.backups if again else params,
            kept_grads=options.get("means"),
            combination=combination,
            adaptive=options["adaptive"],
            eta=options["eta"],
            groups=options["groups"],
            found_inf=self.scaling.found_inf,
        )
        options |= self.scaling.signals
        if gradient.number < 0:
            options.pop("grad_scale", None)
        if divisor is not None:
            scale = options.get("grad_scale")
            norm = divisor(norm) if scale is None else divisor(norm / scale.to(norm)) * scale.to(norm)
        options["grads"], options["norm"], options["combination"] = grads, norm, combination
        self._perturb(ops.perturb_, params, shards, positions, options, seed)

    def radii(self, rho: float | Sequence[float] | None = None) -> list[float]:
        """The radius of each group: ``rho``, or the groups' own, times the schedule's factor."""
        groups = self._optimizer.param_groups
        if rho is None:
            radii = [group["rho"] for group in groups]
        else:
            radii = list(rho) if isinstance(rho, Sequence) else [rho] * len(groups)
        if self.rho_factors is None:
            return radii
        return [radius * factor for radius, factor in zip(radii, self.rho_factors, strict=True)]

    def add_noise(self, factor: float, clip: float, seed: int) -> None:
        """Perturbs the weights by noise ``clamp(N(0, 1/9), -clip, clip)`` times ``factor`` and each group's radius."""
        workers, optimizer = self._workers, self._optimizer
        positions = [i for i in self._ascending(None) if self._params[i].requires_grad]
        params = _at(self._params, positions)

        arguments = {
            "amplitude": [radius * factor for radius in self.radii()],
            "clip": clip,
            "seed": seed,
            "step": self.number,
            "skipped": optimizer.skipped.count(optimizer.param_groups, params),
            "offsets": [first_element(param) for param in params] if workers.sharded else None,
            "groups": _at(self._groups, positions),
        }
        self._perturb(ops.gaussian_perturb_, params, workers.local(params), positions, arguments)

    def ascend_by_class(self, gradients: ClassGradients, scales: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Turns each class's gradients G_kt into perturbed weights of the class's own, ``w_t + s_kt G_kt``.

        Args:
            gradients: The answer to :class:`ByClass`, overwritten.
            scales: ``scales(norms, weight_norm, size)`` gives s, shape (K, T), from the norms of all G_kt, shape (K, T),
                float64, the joint norm of the weights and their number.
        """
        gradients.perturb(scales, self.scaling)

    def keep(self, name: str, value: Combination) -> None:
        """Makes ``value`` the state ``name`` of the parameters that its latest gradient has."""
        optimizer, workers = self._optimizer, self._workers
        gradient, other, combination = self._split(value)
        if combination is None:
            combination = self._optimizer.constant((1.0, float(other is not None), 0.0, 0.0))
        chosen = [i for i, tensor in enumerate(gradient.tensors) if tensor is not None]
        params, grads = _at(self._params, chosen), _at(gradient.tensors, chosen)
        check_all_dense(grads)
        missing = [i for i, param in enumerate(params) if name not in optimizer.state[param]]
        for i in missing:
            optimizer.state[params[i]][name] = torch.zeros_like(params[i], requires_grad=False)
        out = workers.local([optimizer.state[param][name] for param in params])
        optimizer.skipped.before_change(out, self.scaling)
        optimizer.skipped.created([(optimizer.state[params[i]], name) for i in missing], self.scaling)
        if self.scaling.grad_scale is not None:  # state is of gradients that are not scaled
            combination = combination / self.scaling.grad_scale.to(combination)
        ops.combine_(
            out,
            workers.local(grads),
            [None] * len(out) if other is None else workers.local(_at(other.tensors, chosen)),
            combination,
            found_inf=self.scaling.found_inf,
            table=workers.tables["combine_"],
        )

    def set_mask(self, name: str, make: Callable[..., Tensor], *arguments: Any) -> None:
        """Keeps which elements move, ``make(*arguments)``: a bool for each element of the parameters that may be perturbed.

        Not kept are bools, but a bit for each element that stays, in the order of memory.
        """
        if self._optimizer.ascent_params():
            self._optimizer.set_mask(name, make(*arguments))

    def restore(self) -> None:
        """Puts the unperturbed weights back in the middle of a step."""
        self._perturbation.restore(self._workers)

    def descend(
        self, direction: Combination | None, *, decoupled: Combination | None = None, alone: bool = False
    ) -> None:
        """Restores the weights and steps: ``w <- base_step(w, direction) - lr decoupled``; the step ends with it.

        A parameter moves if the latest gradient has a tensor for it; with a plain sum, if either has. None moves nothing.
        ``alone``: it is a step of the base optimizer alone.
        """
        moves = direction is not None
        if direction is None:
            direction = Gradient([None] * len(self._params), 0)
        optimizer, workers, scaling = self._optimizer, self._workers, self.scaling
        gradient, other, combination = self._split(direction, decoupled)
        params, groups, grads = self._params, self._groups, gradient.tensors
        kept = None if other is None else other.tensors
        if workers.averages:
            grads = self._averaged(gradient)
            kept = None if other is None else self._averaged(other)
            workers.share_overflow(scaling.found_inf)
        if workers.sharded:
            grads = workers.redistributed(params, grads)
            kept = kept and workers.redistributed(params, kept)
        if has_none(grads):
            if moves and self.passes.evaluates and all_missing(grads) and all_missing(kept or ()):
                raise ValueError(self.passes.no_gradient)
            if kept and combination is not None:
                kept = [None if grad is None else one for grad, one in zip(grads, kept, strict=True)]
            params, groups, grads, kept = self._only_with_gradient(params, groups, grads, kept)
        norm, max_norm = None, optimizer.param_groups[0]["max_grad_norm"]
        if max_norm or scaling.signals:
            norm = workers.norm(
                grads, use=" of the step", kept_grads=kept, combination=combination, found_inf=scaling.found_inf
            )
        update = Update(params, groups, grads, kept, combination, decoupled is not None, norm, max_norm)
        self._alone = alone
        fused = not alone or optimizer.captures or scaling.signals or any(param.is_cuda for param in params)
        base_step = optimizer.base_step if fused else UnfusedStep()
        base_step(optimizer, update, self._perturbation, scaling, workers)
        self.finish()
        self._perturbation.now, self._perturbation.updating = NOTHING, None
        if workers.sharded:
            workers.reshard()

    # --- the rest is the engine's

    def finish(self) -> None:
        """Counts the step; called again, after an interrupt, it does nothing more."""
        optimizer = self._optimizer
        optimizer.count_step(self.taken, self._base_steps)
        if self._finished:
            return
        self._finished = True
        if self.scaling.signals or optimizer.skipped.waiting:
            if self._alone:  # not one of the method
                optimizer.skipped.abandon_step()
            else:
                optimizer.skipped.end_step(self.scaling, optimizer.param_groups, self._params)
        if self._perturbation.disabled:
            self._perturbation.enable_running_stats()
        # What torch's learning rate schedulers look for; one may have been given the base optimizer.
        optimizer._opt_called = optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    def _split(
        self, direction: Combination, decoupled: Combination | None = None
    ) -> tuple[Gradient, Gradient | None, Tensor]:
        """The latest gradient of a combination, the other one, and their coefficients; None for a plain sum."""
        if decoupled is None:
            if isinstance(direction, Gradient):
                return direction, None, None  # type: ignore[return-value]
            if isinstance(direction, Sum):
                return direction.last, direction.before, None  # type: ignore[return-value]
        terms, beside = direction.terms, {} if decoupled is None else decoupled.terms
        latest, *others = sorted({*terms, *beside}, key=lambda one: -one.number)
        other = others[0] if others else None
        factors = [part.get(one, 0.0) for part in (terms, beside) for one in (latest, other)]  # type: ignore[arg-type]
        return latest, other, self._coefficients(factors, (latest, other) * 2)

    def _coefficients(self, factors: list[Any], gradients: tuple[Gradient | None, ...]) -> Tensor:
        known = next((factor for factor in factors if isinstance(factor, Tensor)), None)
        if known is None:
            coefficients = self._optimizer.constant(tuple(map(float, factors)))
        else:
            nothing = torch.zeros_like(known)
            coefficients = torch.stack(
                [
                    factor if isinstance(factor, Tensor) else nothing + factor if factor else nothing
                    for factor in factors
                ]
            )
        kinds = {one.number < 0 for one in gradients if one is not None}
        if (scale := self.scaling.grad_scale) is not None and len(kinds) == 2:
            one = torch.ones_like(scale)  # of state that is not scaled
            scales = [scale if gradient is not None and gradient.number < 0 else one for gradient in gradients]
            coefficients = coefficients * torch.stack(scales).to(coefficients)
        return coefficients

    def _averaged(self, gradient: Gradient) -> list[Tensor | None]:
        if gradient.averaged:
            return gradient.tensors
        return self._workers.average(self._params, gradient.tensors)

    def _ascending(self, tensors: list[Tensor | None] | None) -> Any:
        """The positions of the parameters in a group with ``perturb``; of those with a tensor, then None stands for all."""
        groups = self._optimizer.param_groups
        excluded = {i for i, group in enumerate(groups) if not group["perturb"]}
        if tensors is None:
            return [i for i, group in enumerate(self._groups) if group not in excluded]
        if not excluded and not has_none(tensors):
            return None
        chosen = [i for i, group in enumerate(self._groups) if group not in excluded and tensors[i] is not None]
        if not chosen and all_missing(tensors):
            raise ValueError(self.passes.no_gradient)
        return chosen

    def _drawn(self, positions: list[int] | None, probability: float, seed: int) -> list[int]:
        """Some of the parameters, at random."""
        candidates = self._ascending(None)
        generator = torch.Generator().manual_seed(seed + 0x9E3779B9 * self.number)
        drawn = torch.rand(len(candidates), dtype=torch.float32, generator=generator) < probability
        moving = {i for i, one in zip(candidates, drawn.tolist(), strict=True) if one}
        return [i for i in (range(len(self._params)) if positions is None else positions) if i in moving]

    def _means(
        self, params: list[Tensor], grads: list[Any], means: list[Tensor | None], name: str, included: bool
    ) -> list[Tensor | None]:
        """Means as the pass takes them: None where they begin, as the gradient, unless that is to be included."""
        optimizer, workers, scale = self._optimizer, self._workers, self.scaling.grad_scale
        beginning = [i for i, mean in enumerate(means) if mean is None]
        self.averaged_unscaled = scale is None
        check_all_dense(grads[i] for i in beginning)
        for i in beginning:
            inverse = 1.0 if scale is None else (1 / scale).to(grads[i])
            mean = optimizer.state[params[i]][name] = torch.zeros_like(params[i], requires_grad=False)
            workers.local([mean])[0].copy_(grads[i] * inverse)
            if included:
                means[i] = mean
        means = workers.local(means)
        optimizer.skipped.before_change([mean for mean in means if mean is not None], self.scaling)
        optimizer.skipped.created([(optimizer.state[params[i]], name) for i in beginning], self.scaling)
        return means

    def _perturb(
        self,
        op: Callable[..., None],
        params: list[Tensor],
        shards: list[Tensor],
        positions: list[int] | None,
        arguments: dict[str, Any],
        seed: int = 0,
    ) -> None:
        """Runs a pass that perturbs, from what the weights were if they are perturbed already; adds to its ``arguments``."""
        perturbation, workers, optimizer = self._perturbation, self._workers, self._optimizer
        again = bool(perturbation.now.params)
        for last in (again, True):
            backups = perturbation.backups_for(params, workers)
            drawn: dict[str, Any] = {}
            if op is ops.perturb_ and (perturbation.low_precision or "probability" in arguments):
                drawn = {"seed": seed if "probability" in arguments else 0, "stochastic": perturbation.low_precision}
                drawn |= {"step": self.number, "skipped": optimizer.skipped.count(optimizer.param_groups, params)}
            table = workers.tables["random_perturb_" if drawn else op.__name__]
            if not again:
                perturbation.perturbing = Perturbed(params, backups, positions), table, table.calls
            arguments["original_params"], arguments["backups"] = (backups, None) if again else (None, backups)
            try:
                op(shards, table=table, **arguments, **drawn)
                break
            except ValueError:  # perhaps a parameter is of another device, shape or dtype now than its backup
                if last:
                    raise
                perturbation.forget_backups()
        if perturbation.perturbing is not None:
            perturbation.now, perturbation.perturbing = perturbation.perturbing[0], None
        if workers.sharded:
            workers.reshard()
        self._disable_running_stats()

    def _disable_running_stats(self) -> None:
        """Keeps running statistics from the passes to come, if the network is known."""
        model = self._optimizer._model
        if model is not None and self.seen_unperturbed and self._optimizer.protects_running_stats:
            self._perturbation.disable_running_stats(model)

    def _only_with_gradient(
        self, params: list[Tensor], groups: list[int], grads: list[Tensor | None], kept: list[Tensor | None] | None
    ) -> tuple[list[Tensor], list[int], list[Tensor | None], list[Tensor | None] | None]:
        """The parameters that step; those that were perturbed and have no gradient since are restored."""
        stepping = [i for i, grad in enumerate(grads) if grad is not None or (kept is not None and kept[i] is not None)]
        moving = {params[i] for i in stepping}
        now = self._perturbation.now
        back = now.at([i for i, param in enumerate(now.params) if param not in moving])
        ops.restore_(self._workers.local(back.params), back.backups)
        grads, kept = _at(grads, stepping), None if kept is None else _at(kept, stepping)
        if kept is not None:  # a kept gradient that stands alone takes the first place, and counts in the norm
            pairs = list(zip(grads, kept, strict=True))
            grads = [one if grad is None else grad for grad, one in pairs]
            kept = [None if grad is None else one for grad, one in pairs]
        return _at(params, stepping), _at(groups, stepping), grads, kept


def _at(items: list[Any], positions: list[int] | None) -> list[Any]:
    return items if positions is None else [items[i] for i in positions]
