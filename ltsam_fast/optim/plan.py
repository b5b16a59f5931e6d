"""How a request is answered: which passes are run, on which samples, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltsam_fast.optim.base_step import sign_of
from ltsam_fast.optim.class_perturbation import ClassGradients, ClassPasses
from ltsam_fast.optim.closures import Closure, Part
from ltsam_fast.optim.gradients import (
    Combination,
    Gradient,
    Sum,
    gradients_of,
    swap_gradients,
    take_gradients,
)
from ltsam_fast.optim.masks import fisher
from ltsam_fast.optim.perturbation import same_items
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

if TYPE_CHECKING:
    from ltsam_fast.optim.optimizer import SharpnessAware

Tensors = list[Tensor | None]


class Passes:
    """Answers a rule's requests by running closures forward and backward, as the methods were published.

    Args:
        optimizer: The optimizer whose step it is.
        step: The step.
        closures: The batch, in one or more parts.
        labels: The classes of each part's samples, or None.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        step: Step,
        closures: Sequence[Closure],
        labels: Sequence[Tensor | None],
    ) -> None:
        self._optimizer, self._step, self._scaling = optimizer, step, step.scaling
        self._params, self._workers = step._params, step._workers
        self.parts = [Part(*pair, self._params) for pair in zip(closures, labels, strict=True)]
        self._totals: Tensors = []  # of the micro-batches so far
        self._by_class: ClassPasses | None = None
        self.class_weights = optimizer.weights_now
        """The class weights u and v of the method, if it has any."""
        step.passes = self

    def __call__(self, request: Any) -> Any:
        """Answers a request."""
        return getattr(self, _ANSWERS[type(request)])(request)

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

    def at_weights(self, request: AtWeights) -> Any:
        """Gradients at w, for one or more weightings of the samples."""
        parts = self.parts if request.of is None else [request.of.part]
        index = None if request.of is None else request.of.index
        optimizer, workers = self._optimizer, self._workers
        found: list[Tensors | None] = [None] * request.gradients
        squares, shared = None, None
        if request.gradients == 2 and optimizer.param_groups[0]["shared_backward"] and None not in request.weights:
            shared = self._shared(self._params)
        for part in parts:
            with workers.backward(request.last and part is parts[-1]) if workers.averages else _NOTHING:
                with shared.record_outputs() if shared else _NOTHING:
                    with optimizer.graphs.reusable() if optimizer.several_gradients else _NOTHING:
                        losses = part.evaluate(index)
                if optimizer.several_gradients:
                    optimizer.graphs.check(losses)
                # Of a batch in parts the size is known at its end.
                divisor = len(losses) if len(parts) == 1 else 1
                seeds = part.seeds(request.weights, losses, divisor, self._scaling)
                if request.squares and part is parts[0]:
                    squares = self._squares(losses, request.squares)
                if shared is not None and self._sweep(shared, losses, seeds, found):
                    continue
                chosen = [k for k, seed in enumerate(seeds) if seed is not None]
                for k in chosen:
                    if (before := found[k]) is not None:
                        swap_gradients(self._params, before)
                    torch.autograd.backward(losses, seeds[k], retain_graph=k != chosen[-1])
                    found[k] = take_gradients(self._params)
                    if workers.finds_unused:
                        workers.gradients_cleared()
        if len(parts) > 1:
            torch._foreach_mul_([g for one in found for g in one or () if g is not None], 1 / self.size)
        self._step.seen_unperturbed = True
        averaged = request.last or not workers.averages
        if not averaged and (request.averaged or (optimizer.ascent_sync and request.gradients == 1)):
            found = [one and workers.average(self._params, one) for one in found]
            averaged = True
        numbers = self._step.gradient_numbers
        answer = [None if one is None else Gradient(one, next(numbers), averaged) for one in found]
        whole = answer[0] if len(answer) == 1 else answer
        return (whole, squares) if request.squares else whole

    def _shared(self, params: list[Tensor]) -> SharedBackward | None:
        """What makes several gradients from one backward sweep, if the optimizer is told so."""
        optimizer = self._optimizer
        mode = optimizer.param_groups[0]["shared_backward"]
        if not mode:
            return None
        shared = optimizer.sharing
        if shared is None or shared.mode != mode or not same_items(shared.params, params):
            optimizer.check_options(optimizer.param_groups[0])
            shared = optimizer.sharing = SharedBackward(optimizer.model, params, mode)  # type: ignore[arg-type]
        return shared

    def _sweep(
        self, shared: SharedBackward, losses: Tensor, seeds: list[Tensor | None], found: list[Tensors | None]
    ) -> bool:
        """Adds both gradients from one sweep, if that can be."""
        u, v = seeds
        assert u is not None and v is not None
        pilot = self._optimizer.pilot  # type: ignore[attr-defined]
        if pilot is None:
            both = u.abs() + v.abs()
            made = shared(losses, both, [Weighting.sparse(one / both) for one in (u, v)], native=False)
        else:
            made = shared(losses, seeds[pilot], (seeds[1 - pilot] / seeds[pilot],))  # type: ignore[arg-type, operator]
            if made is not None:
                made.insert(pilot, take_gradients(self._params))
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

    def at_perturbed(self, request: AtPerturbed) -> Combination | None:
        """The gradient at the perturbed weights."""
        weights, plus, workers = request.weights, request.plus, self._workers
        if weights and weights[0] is None:
            return plus
        micro = request.of if isinstance(request.of, MicroBatch) else None
        parts = self.parts if micro is None else [micro.part]
        indices = [None] * len(parts) if request.of is None else [micro.index] if micro else request.of
        first = not self._step.seen_unperturbed  # the step's only pass: its losses are what the step returns
        last = request.last if micro is None else micro.last
        # With find_unused_parameters DDP only averages what the last pass has used, and not what lay there before it.
        averaging = last and not (workers.finds_unused and (request.accumulate or plus is not None))
        together = plus if workers.averages and last else None  # averaged with the gradient there, at once
        if request.accumulate and self._totals:
            swap_gradients(self._params, self._totals)
        elif together is not None:
            swap_gradients(self._params, together.tensors)  # type: ignore[attr-defined]
        if request.of is None or request.accumulate:
            size = 1 if first and len(parts) > 1 else self.size  # of a batch in parts the size is known at its end
        else:
            size = sum(map(len, indices))  # type: ignore[arg-type]
        for part, index in zip(parts, indices, strict=True):  # type: ignore[arg-type]
            with workers.backward(averaging and part is parts[-1]) if workers.averages else _NOTHING:
                losses = part.evaluate(index, at_w=first)
                (seed,) = part.seeds(weights, losses, size if size > 0 else len(losses), self._scaling)
                torch.autograd.backward(losses, seed)
        tensors = gradients_of(self._params) if last else take_gradients(self._params)
        if not last and workers.finds_unused:
            workers.gradients_cleared()
        if first and len(parts) > 1:
            torch._foreach_mul_([grad for grad in tensors if grad is not None], 1 / self.size)
        if request.accumulate:
            self._totals = tensors
        gradient = Gradient(tensors, next(self._step.gradient_numbers), averaging or not workers.averages)
        return gradient if plus is None or together is not None else Sum(gradient, plus)  # type: ignore[arg-type]

    def loss_increase(self, request: LossIncrease) -> list[Tensor]:
        """How much worse each sample's loss is at the perturbed weights."""
        signs = set(map(sign_of, self._optimizer.param_groups))
        if len(signs) > 1:
            name = type(self._optimizer).__name__
            raise ValueError(f"maximize must be the same in all groups for {name}: it selects samples by their loss")
        found = []
        for part in self.parts:
            with self._workers.backward(last=False):
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
