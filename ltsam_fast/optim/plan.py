"""How a request is answered: which passes are run, on which samples, and what they share.

The published methods evaluate the whole batch for every gradient. With ``plan="auto"`` a step runs, of what gives the same
gradients to rounding, what costs least:

1. A sample whose weight is zero is not evaluated.
2. Two weightings with no sample in common are two sub-batches.
3. Two that have samples in common share one backward sweep (:mod:`ltsam_fast.shared`), where products take most of the time.
4. A backward that only an ascent needs covers the perturbed weights only.
5. What no perturbed weight has a part in is not computed again at w + eps (:mod:`ltsam_fast.optim.unchanged`).
6. At radius 0 there is no second pass.

For 1 to 3 samples must not mix in the network, which :mod:`ltsam_fast.optim.network` finds out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ltsam_fast.optim.base_step import sign_of
from ltsam_fast.optim.class_perturbation import ClassGradients, ClassPasses
from ltsam_fast.optim.closures import SAMPLE_WEIGHTS, Closure, Part, Weights, pilot_of
from ltsam_fast.optim.gradients import (
    Combination,
    Gradient,
    Sum,
    gradients_of,
    swap_gradients,
    take_gradients,
)
from ltsam_fast.optim.masks import fisher
from ltsam_fast.optim.step import (
    AtClassPerturbed,
    AtPerturbed,
    AtWeights,
    ByClass,
    LossIncrease,
    MicroBatch,
    Step,
)
from ltsam_fast.shared import SharedBackward, Weighting
from ltsam_fast.shared.autograd_graph import reaches, reaches_others
from ltsam_fast.shared.products import products_exceed

if TYPE_CHECKING:
    from ltsam_fast.optim.criterion import Criterion
    from ltsam_fast.optim.optimizer import SharpnessAware

Tensors = list[Tensor | None]
LEAST_WORK = 2.5e6
"""Multiplications by each weight tensor, and CPU thread, from which on sharing a sweep takes less time than it costs."""


class Job(NamedTuple):
    """A forward pass over some samples of a part, None for all, and which of the gradients asked for it gives."""

    samples: Tensor | None
    gradients: Sequence[int]


class Passes:
    """Answers a rule's requests by running closures forward and backward.

    Args:
        optimizer: The optimizer whose step it is.
        step: The step.
        closures: The batch, in one or more parts.
        labels: The classes of each part's samples, or None.
        criterion: Makes losses of what closures return, if these are no losses.
        weights: For each part the caller's weights of its samples, u and v, shape (2, B), if there are such.
    """

    no_gradient = (
        "closure must return losses that depend on the optimizer's parameters, got some that depend on none of them: make the "
        "optimizer with the parameters() of the network that closure evaluates"
    )
    """See :class:`ltsam_fast.optim.phases.PhaseRun`."""
    evaluates = True

    def __init__(
        self,
        optimizer: SharpnessAware,
        step: Step,
        closures: Sequence[Closure],
        labels: Sequence[Tensor | None],
        criterion: Criterion | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        self._optimizer, self._step, self._scaling = optimizer, step, step.scaling
        self._params, self._workers = step._params, step._workers
        of_samples: Sequence[Tensor | None] = weights or [None] * len(closures)
        each = zip(closures, labels, of_samples, strict=True)
        self.parts = [Part(closure, one, self._params, self._scaling, criterion, own) for closure, one, own in each]
        self._totals: Tensors = []  # of the micro-batches so far
        self._by_class: ClassPasses | None = None
        self._at_w: dict[Any, Gradient] = {}  # whole gradients, by their class weights
        self.class_weights = optimizer.weights_now if weights is None else SAMPLE_WEIGHTS
        """The weights u and v, of the method's classes or of the samples, if there are any."""
        self.network = optimizer.network
        """What is known of the network; None: passes are run as published."""
        self.required = optimizer.plan == "require"
        self.mode = 0 if self.network is None else self.network.mode()
        self.trains_others = self.network is not None and self.network.trains_others(self._params)
        """Whether the network trains weights of another optimizer, which may step with what the passes leave there."""
        self._ascent = self._ascent_params()
        published = optimizer.plan == "published" or self.trains_others
        step.skips_zero_radius = not (published or optimizer.captures or self._workers.joins)
        self.unchanged = None
        if self.network is not None and len(self.parts) == 1 and not self._workers.sharded:
            self.unchanged = self.network.unchanged(optimizer.ascent_params())
        step.passes = self

    def __call__(self, request: Any) -> Any:
        """Answers a request."""
        return getattr(self, _ANSWERS[type(request)])(request)

    def end(self) -> None:
        """Lets go of what the step has kept."""
        self._by_class = None  # which refers to this
        if self.unchanged is not None:
            self.unchanged.forget()

    def mean_loss(self) -> Tensor:
        """The mean loss at w over all samples, 0-d."""
        return torch.stack([part.total for part in self.parts]).sum() / self.size

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """The batch in micro-batches."""
        for part in self.parts:
            if part.size < 0:
                part.evaluate(at_w=False, graph=False)
        if self._optimizer.ascent_sync and self._workers.averages:
            number = sum(-(-part.size // size) for part in self.parts)
            self._workers.check_equal(
                number,
                self._params[0].device,
                f"ascent_sync must be False unless all workers have as many parts of m = {size} samples, "
                "got {least} to {most}: leave it out, or give them batches of one size",
            )
        for part in self.parts:
            for first in range(0, part.size, size):
                past = min(first + size, part.size)
                index = torch.arange(first, past, device=self._params[0].device)
                yield MicroBatch(part, index, part is self.parts[-1] and past == part.size)

    @property
    def size(self) -> int:
        """The number of samples in all parts."""
        return sum(part.size for part in self.parts)

    # --- which samples

    def fetch_labels(self) -> None:
        """Has labels, or weights, on the CPU. If they are on a device, all are fetched at once, and that waits for it."""
        if self.parts[0].host_labels is None:
            labels: list[Any] = [part.weighed_by for part in self.parts]
            if labels[0].device.type != "cpu":
                labels = list(torch.cat(labels, -1).cpu().split([one.shape[-1] for one in labels], -1))
            for part, one in zip(self.parts, labels, strict=True):
                part.host_labels = one

    @property
    def _chooses(self) -> bool:
        """Whether samples may be left out: a CUDA graph's passes are fixed, and some workers need as many as the others."""
        fixed = self._optimizer.captures or self._workers.sharded or self._workers.joins
        return self.network is not None and not fixed

    def are_separable(self, part: Part) -> bool:
        """Whether a part's samples can be evaluated in sub-batches."""
        if part.separable is None:
            part.separable = self._chooses and part.takes_index and self._has_separable(part)
        return part.separable

    def _has_separable(self, part: Part) -> bool:
        def evaluate(index: Tensor | None) -> Tensor:
            with self._workers.backward(last=False), torch.enable_grad():
                return part.evaluate(index, at_w=False)

        kind = self.mode, part.kind
        return self.network.is_separable(kind, evaluate, part.size, self._params, part.modules, self.required)  # type: ignore[union-attr]

    def _jobs(self, part: Part, weights: Sequence[Weights | None]) -> list[Job]:
        """The forward passes for some gradients at w, which have all samples in them: the step returns the mean loss."""
        asked = [k for k, one in enumerate(weights) if one is not None]
        whole = Job(None, asked if weights else [0])
        if not self._chooses or all(one is None or one.everywhere for one in weights):
            return [whole]
        self.fetch_labels()
        asked = [k for k in asked if bool(part.mask(weights[k]).any())]  # type: ignore[arg-type]
        if len(asked) != 2:
            return [Job(None, asked)] if asked else [whole]
        u, v = (weights[k] for k in asked)
        if bool((part.mask(u) & part.mask(v)).any()) or not self.are_separable(part):  # type: ignore[arg-type]
            return [Job(None, asked)]
        return [Job(part.index(v, others=True), asked[:1]), Job(part.index(v), asked[1:])]  # type: ignore[arg-type]

    # --- gradients at w

    def at_weights(self, request: AtWeights) -> Any:
        """Gradients at w, for one or more weightings of the samples."""
        micro = request.of
        parts = self.parts if micro is None else [micro.part]
        workers = self._workers
        found: list[Tensors | None] = [None] * request.gradients
        squares = None
        for part in parts:
            jobs = self._jobs(part, request.weights) if micro is None else [Job(micro.index, [0])]
            for job in jobs:
                shared = self._shared_by_two(part) if len(job.gradients) == 2 else None
                with workers.backward(request.last and part is parts[-1]) if workers.averages else _NOTHING:
                    losses = self._evaluate_at_w(part, job, request, shared)
                    roots = part.logit_gradients
                    if roots is None:
                        # Of a batch in parts the size is known at its end.
                        divisor = 1 if len(parts) > 1 else len(losses) if micro is not None else part.size
                        seeds = part.seeds(request.weights, losses, divisor, job.samples)
                        if request.squares and part is parts[0]:
                            squares = self._squares(losses, request.squares)
                        if shared is not None and not self.trains_others and self._pays(part, losses):
                            if self._sweep(shared, losses, seeds, self._pilot(part), found):
                                continue
                        roots = [(losses, seed) for seed in seeds]
                    self._differentiate(roots, job.gradients, request.kept, found)
        if len(parts) > 1:
            torch._foreach_mul_([g for one in found for g in one or () if g is not None], 1 / self.size)
        self._step.seen_unperturbed = True
        return self._answer(request, found, squares)

    def _evaluate_at_w(self, part: Part, job: Job, request: AtWeights, shared: Any) -> Tensor:
        """A forward pass at w, whose losses may be differentiated several times."""
        optimizer = self._optimizer
        if self.unchanged is not None and request.of is not None:
            self.unchanged.forget()
        # Kept with its graph only where no backward goes through that before the pass at w + eps does.
        keeps_graph = self._ascent is not None and shared is None and all(k >= request.kept for k in job.gradients)
        weighted: Callable[..., Any] | None = None
        by_class = self.class_weights is not SAMPLE_WEIGHTS
        if len(job.gradients) == 2 and part.criterion is not None and by_class:
            factor = 1 / part.size if len(self.parts) == 1 else 1.0
            weights: Any = request.weights
            both = functools.partial(part.criterion.weighted, weights=weights, factor=factor, scaling=self._scaling)

            def weighted(logits: Tensor, labels: Any) -> Any:
                return None if shared is not None and self._pays(part, logits) else both(logits, labels)

        with (
            shared.record_outputs() if shared else _NOTHING,
            _NOTHING if request.last else self.recording(part, keeps_graph),
        ):
            losses = part.evaluate(job.samples, weighted=weighted)
        root = losses if part.logit_gradients is None else part.logit_gradients[0][0]
        if optimizer.several_gradients:
            optimizer.graphs.check(root)
        self.look_for_others(root, shared is not None)
        return losses

    def look_for_others(self, root: Tensor, shares: bool) -> None:
        """Takes the published passes where losses depend on weights of another optimizer, which may not be the network's."""
        stays = self._step.skips_zero_radius and not any(self._step.radii())
        if not self.trains_others and (shares or stays or self._ascent is not None):
            if reaches_others(root, self._params):
                self.trains_others, self._ascent, self._step.skips_zero_radius = True, None, False
                if self.unchanged is not None:
                    self.unchanged.forget()

    def _differentiate(
        self, roots: Sequence[tuple[Tensor, Any]], gradients: Sequence[int], kept: int, found: list[Tensors | None]
    ) -> None:
        """Adds gradients to those found so far, in a backward each from its root."""
        ascent = self._ascent
        if ascent is not None and not reaches(roots[0][0], ascent):
            ascent = None  # what hides them has to be run as a whole
            if self.unchanged is not None:
                self.unchanged.forget()
        for k in gradients:
            if (before := found[k]) is not None:
                swap_gradients(self._params, before)
            inputs = ascent if k >= kept else None
            torch.autograd.backward(*roots[k], retain_graph=k != gradients[-1], inputs=inputs)
            found[k] = take_gradients(self._params)
            if self._workers.finds_unused:
                self._workers.gradients_cleared()

    def _answer(self, request: AtWeights, found: list[Tensors | None], squares: Tensor | None) -> Any:
        """The gradients as the rule gets them."""
        optimizer, workers = self._optimizer, self._workers
        if workers.averages:  # other workers may have such samples
            for k, weights in enumerate(request.weights):
                if weights is not None and found[k] is None and (k < request.kept or optimizer.ascent_sync):
                    found[k] = self._nothing()
        averaged = request.last or not workers.averages
        if not averaged and (request.averaged or (optimizer.ascent_sync and request.gradients == 1)):
            found = [one and workers.average(self._params, one) for one in found]
            averaged = True
        numbers = self._step.gradient_numbers
        answer = [None if one is None else Gradient(one, next(numbers), averaged) for one in found]
        if request.of is None:
            for k, gradient in enumerate(answer):
                if workers.averages and gradient is None and request.weights[k] is not None:
                    gradient = Gradient(self._nothing(), 0, False)
                if gradient is not None and (k < request.kept or self._ascent is None):
                    self._at_w[request.weights[k] if request.weights else None] = gradient
        whole = answer[0] if len(answer) == 1 else answer
        return (whole, squares) if request.squares else whole

    def _nothing(self) -> Tensors:
        """What a worker without samples has to give to an average."""
        if self._workers.finds_unused:
            return [None] * len(self._params)
        return [torch.zeros_like(p, requires_grad=False) if p.requires_grad else None for p in self._params]

    def _ascent_params(self) -> list[Tensor] | None:
        """The weights that gradients for an ascent are taken of; None: of all."""
        optimizer = self._optimizer
        groups = [group for group in optimizer.param_groups if group["perturb"]]
        if optimizer.plan == "published" or self.trains_others or self._workers.sharded:
            return None
        if len(groups) == len(optimizer.param_groups) or not any(group["rho"] for group in groups):
            return None
        return optimizer.ascent_params() or None

    def shared(self, params: list[Tensor]) -> SharedBackward | None:
        """What makes several gradients from one backward sweep, if the network is known and does not mix samples."""
        if self.network is None or self.trains_others:
            return None
        shared = self.network.shared(self.mode, params)
        if shared is not None:
            self.attempt(shared.check)
            shared = self.network.shared(self.mode, params)
        return shared

    def _shared_by_two(self, part: Part) -> SharedBackward | None:
        """As :meth:`shared`, for two gradients, where that takes less time than a backward for each."""
        if self.network is None or self.required:
            return self.shared(self._params)
        # On a GPU the hooks of a sweep take longer on the host than a second backward does; in a graph they take nothing.
        if self._kind(part) in self.network.small or self._params[0].is_cuda and not self._optimizer.captures:
            return None
        return self.shared(self._params)

    def _pays(self, part: Part, root: Tensor) -> bool:
        """Whether the sweep from ``root`` has so much to multiply that sharing it takes less time."""
        if self.required or root.is_cuda:
            return True
        if products_exceed(root, LEAST_WORK * torch.get_num_threads() * len(self._params)):
            return True
        self.network.small.add(self._kind(part))  # type: ignore[union-attr]
        return False

    def _kind(self, part: Part) -> Any:
        return self.mode, part.kind, part.size

    def attempt(self, attempt: Callable[[], Any]) -> Any:
        """What something with :meth:`shared` gives; None, from now on, if it finds that samples mix."""
        assert self.network is not None
        return self.network.attempt(self.mode, self.required, attempt)

    def _pilot(self, part: Part) -> int | None:
        """Which of u and v can weigh a sweep that both share; None: neither."""
        if self.class_weights is not SAMPLE_WEIGHTS:
            return self._optimizer.pilot  # type: ignore[attr-defined, no-any-return]
        return None if part.host_labels is None else pilot_of(*part.host_labels)

    def _sweep(
        self,
        shared: SharedBackward,
        losses: Tensor,
        seeds: list[Tensor | None],
        pilot: int | None,
        found: list[Tensors | None],
    ) -> bool:
        """Adds both gradients from one sweep, if that can be."""
        u, v = seeds
        assert u is not None and v is not None

        def sweep() -> Any:
            if pilot is None:
                both = u.abs() + v.abs()
                both = both.masked_fill(both == 0, 1.0)  # of a sample that counts in neither
                return shared(losses, both, [Weighting.sparse(one / both) for one in (u, v)], native=False)
            weights, others = (u, v)[pilot], (u, v)[1 - pilot]
            made = shared(losses, weights, (others / weights,))
            if made is not None:
                made.insert(pilot, take_gradients(self._params))
            return made

        made = self.attempt(sweep)
        if made is None:
            return False
        for k in (0, 1):
            before = found[k]
            found[k] = made[k] if before is None else _sum(before, made[k])
        return True

    def _squares(self, losses: Tensor, samples: int) -> Tensor | None:
        """The sums of the squared gradients of single samples, (N,), fp32, over the parameters that may be perturbed."""
        scale = self._scaling(torch.ones_like(losses))
        params, others = self._optimizer.ascent_params(), self._optimizer.all_weights()
        if not params:
            return None
        scores = fisher(losses, params, scale, samples, others)
        if self._optimizer.ascent_sync:
            self._workers.add_up([scores])
        return scores

    # --- the gradient at w + eps

    def at_perturbed(self, request: AtPerturbed) -> Combination | None:
        """The gradient at the perturbed weights."""
        weights, plus, workers = request.weights, request.plus, self._workers
        if weights and weights[0] is None:
            return plus
        first = not self._step.seen_unperturbed  # the step's only pass: its losses are what the step returns
        if not first and request.of is None and self._step.stays:
            known = self._at_w.get(weights[0] if weights else None)
            if known is not None:
                return known if plus is None else Sum(known, plus)  # type: ignore[arg-type]
        micro = request.of if isinstance(request.of, MicroBatch) else None
        last = request.last if micro is None else micro.last
        pairs = self._samples(request, last)
        if not pairs:
            if plus is None and workers.averages:
                return Gradient(self._nothing(), next(self._step.gradient_numbers), False)
            return plus
        # With find_unused_parameters DDP only averages what the last pass has used, and not what lay there before it.
        averaging = last and not (workers.finds_unused and (request.accumulate or plus is not None))
        together = plus if workers.averages and last else None  # averaged with the gradient there, at once
        if request.accumulate and self._totals:
            swap_gradients(self._params, self._totals)
        elif together is not None:
            swap_gradients(self._params, together.tensors)  # type: ignore[attr-defined]
        if request.of is None or request.accumulate:
            size = 1 if first and len(pairs) > 1 else self.size  # of a batch in parts the size is known at its end
        else:
            size = sum(len(index) for _, index in pairs)  # type: ignore[arg-type, misc]
        for part, index in pairs:
            with workers.backward(averaging and part is pairs[-1][0]) if workers.averages else _NOTHING:
                with self.reusing():
                    losses = part.evaluate(index, at_w=first)
                (seed,) = part.seeds(weights, losses, size if size > 0 else len(losses), index)
                torch.autograd.backward(losses, seed)
        tensors = gradients_of(self._params) if last else take_gradients(self._params)
        if not last and workers.finds_unused:
            workers.gradients_cleared()
        if first and len(pairs) > 1:
            torch._foreach_mul_([grad for grad in tensors if grad is not None], 1 / self.size)
        if request.accumulate:
            self._totals = tensors
        gradient = Gradient(tensors, next(self._step.gradient_numbers), averaging or not workers.averages)
        return gradient if plus is None or together is not None else Sum(gradient, plus)  # type: ignore[arg-type]

    def _samples(self, request: AtPerturbed, last: bool) -> list[tuple[Part, Tensor | None]]:
        """The parts to be evaluated at w + eps, and which of their samples; None: all."""
        if isinstance(request.of, MicroBatch):
            return [(request.of.part, request.of.index)]
        if request.of is not None:
            return list(zip(self.parts, request.of, strict=True))
        whole: list[tuple[Part, Tensor | None]] = [(part, None) for part in self.parts]
        v = request.weights[0] if request.weights else None
        if v is None or v.everywhere or not self._chooses or not self._step.seen_unperturbed:
            return whole
        self.fetch_labels()
        pairs: list[tuple[Part, Tensor | None]] = []
        for part in self.parts:
            mask, index = part.mask(v), None
            if not bool(mask.any()):
                if not (self._workers.averages and last and part is self.parts[-1]):
                    continue
                # Of weight zero: the other workers wait.
                index = torch.zeros(1, dtype=torch.long, device=part.weighed_by.device)  # type: ignore[union-attr]
            elif not bool(mask.all()):
                index = part.index(v)
            pairs.append((part, index if index is None or self.are_separable(part) else None))
        # Where no sample has weight the step is one with a gradient of zeros, and not none.
        return whole if last and not pairs and request.plus is None else pairs

    # --- what stays as it is

    def recording(self, part: Part, keeps_graph: bool) -> Any:
        """Around a forward pass at w: see :class:`ltsam_fast.optim.unchanged.UnchangedResults`."""
        return _NOTHING if self.unchanged is None else self.unchanged.recording((self.mode, part.kind), keeps_graph)

    def reusing(self) -> Any:
        """Around a forward pass at w + eps."""
        return _NOTHING if self.unchanged is None else self.unchanged.reusing(self._have_moved)

    def _have_moved(self) -> bool:
        """Whether weights differ from those at w: after an overflow, say, they do not."""
        now = self._step.perturbed
        pairs = zip(self._workers.local(now.params), now.backups, strict=True)
        return any(not torch.equal(param, backup) for param, backup in pairs) or not now.params

    def loss_increase(self, request: LossIncrease) -> list[Tensor]:
        """How much worse each sample's loss is at the perturbed weights."""
        signs = set(map(sign_of, self._optimizer.param_groups))
        if len(signs) > 1:
            name = type(self._optimizer).__name__
            raise ValueError(f"maximize must be the same in all groups for {name}: it selects samples by their loss")
        found = []
        for part in self.parts:
            with self._workers.backward(last=False), self.reusing():
                losses = part.evaluate(at_w=False, graph=False)
            found.append((losses - part.losses) * min(signs))  # type: ignore[operator]
        return found

    def by_class(self, request: ByClass) -> tuple[Gradient, ClassGradients]:
        """The gradient of the mean loss, and of each class's."""
        self._by_class = ClassPasses(self, request)
        return self._by_class.at_weights()

    def at_class_perturbed(self, request: AtClassPerturbed) -> Gradient:
        """The gradient with each sample at its class's weights, added to that of the mean loss."""
        assert self._by_class is not None
        return self._by_class.at_perturbed(request.share)


_NOTHING = contextlib.nullcontext()
_ANSWERS = {
    AtWeights: "at_weights",
    AtPerturbed: "at_perturbed",
    LossIncrease: "loss_increase",
    ByClass: "by_class",
    AtClassPerturbed: "at_class_perturbed",
}


def _sum(grads: Tensors, more: Tensors) -> Tensors:
    """Gradients added up, where one may be missing."""
    return [a if b is None else b if a is None else a + b for a, b in zip(grads, more, strict=True)]
