"""A step without tensors: its rule and verbs run as ever, and tell which passes the step takes, with which hyperparameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ltsam_fast.optim.amp import NO_SCALE, LossScale
from ltsam_fast.optim.closures import SAMPLE_WEIGHTS, Weights
from ltsam_fast.optim.gradients import Combination, Gradient, State, Sum
from ltsam_fast.optim.parallel import Single
from ltsam_fast.optim.perturbation import Perturbation
from ltsam_fast.optim.step import AtPerturbed, AtWeights, LossIncrease, MicroBatch, Request, Step
from ltsam_fast.optim.trace import Call, Trace

if TYPE_CHECKING:
    from ltsam_fast.optim.optimizer import SharpnessAware


class Outline(NamedTuple):
    """What a step will do.

    Attributes:
        key: What the rule asked for and the verbs that it called, with all that these depend on but numbers in ``calls``. Steps
            with equal keys take the same passes over the same memory.
        calls: Each pass that has hyperparameters, with these.
    """

    key: tuple[Any, ...]
    calls: list[Call]


def outline(optimizer: SharpnessAware, size: int, scaled: bool, workers: Single, weighed: bool = False) -> Outline:
    """Runs the rule of the next step, captured, of ``size`` samples, and changes nothing: no tensor is read or written.

    The verbs are those of a step, called on empty lists of tensors: what they would launch finds nothing to do. Norms and inner
    products are dummies; gradients are asked for and not evaluated.

    Args:
        optimizer: Its rule, its options and the number of its steps count.
        size: Samples in the batch.
        scaled: Whether the step has a GradScaler.
        workers: A single worker whose tables are for dry runs alone.
        weighed: Whether the caller weighs the samples.

    Raises:
        ValueError: An option is out of its range.
    """
    scaling = NO_SCALE
    if scaled:
        scaling = LossScale()
        scaling.set_signals(torch.ones(()), torch.zeros(()))
    step = _DryStep(optimizer, scaling, size, workers, weighed)
    trace = Trace()
    captures, optimizer.captures = optimizer.captures, True
    try:
        with torch.no_grad(), trace.recording(), contextlib.suppress(StopIteration):
            rule, answer = optimizer.rule_of(step), None
            while True:
                request = rule.send(answer)
                step.note(type(request), [getattr(request, name) for name in getattr(request, "__slots__", ())])
                answer = empty_answer(request, step.gradient_numbers, size)
    finally:
        optimizer.captures = captures
    return Outline((*step.notes, *((name, rows.shape) for name, rows in trace.calls)), trace.calls)


def empty_answer(request: Request, numbers: Iterator[int], size: int = 0) -> Any:
    """An answer to a request, of gradients without tensors, with the next of the ``numbers``."""
    if isinstance(request, AtWeights):
        found = [None if one is None else Gradient([], next(numbers)) for one in request.weights or (1,)]
        answer = found[0] if len(found) == 1 else found
        return (answer, torch.zeros(1)) if request.squares else answer
    if isinstance(request, AtPerturbed):
        if request.weights and request.weights[0] is None:
            return request.plus
        gradient = Gradient([], next(numbers))
        return gradient if request.plus is None else Sum(gradient, request.plus)  # type: ignore[arg-type]
    return [torch.zeros(size)] if isinstance(request, LossIncrease) else None


class _DryStep(Step):
    """A step without parameters, whose verbs note what rows of hyperparameters do not show."""

    def __init__(
        self, optimizer: SharpnessAware, scaling: LossScale, size: int, workers: Single, weighed: bool
    ) -> None:
        super().__init__(optimizer, scaling, [], [])
        self._weighed = weighed
        self._all = optimizer.all_params()[0]
        self._size, self._workers = size, workers
        self._perturbation = _Unchanged()
        self._perturbation.low_precision = optimizer._perturbation.low_precision
        self.notes: list[Any] = []

    def note(self, *values: Any) -> None:
        """Notes what a verb or a request is, and what it is about."""
        self.notes.append(_several(values))

    def class_weights(self) -> tuple[Weights | None, Weights | None]:
        if self._weighed:
            return SAMPLE_WEIGHTS
        self._optimizer.classes()  # brings the weights up to date
        return self._optimizer.weights_now  # type: ignore[no-any-return]

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        for first in range(0, self._size, size):
            past = min(first + size, self._size)
            yield MicroBatch(None, range(first, past), past == self._size)  # type: ignore[arg-type]

    def state(self, name: str) -> State:
        self.note("state", name, bool(self.number), self._present(name))
        return State([], name)

    def known_state(self, *names: str) -> State | None:
        name = next((name for name in names if any(self._present(name))), None)
        self.note("known_state", name, name and self._present(name))
        return None if name is None else State([], name)

    def lacks(self, name: str) -> bool:
        found = super().lacks(name)
        self.note("lacks", name, found)
        return found

    def dots(self, first: Gradient, second: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        self.note("dots", first, second)
        return _DOTS

    def ascend(self, direction: Combination | None, **options: Any) -> None:
        ema = options.get("ema")
        self.note(
            "ascend",
            *map(options.get, ("mask", "by_tensor", "begins_included", "unscaled", "downhill")),
            ema and ema[0],
        )
        super().ascend(direction, **options)

    def keep(self, name: str, value: Combination) -> None:
        self.note("keep", name, self._present(name))
        super().keep(name, value)

    def set_mask(self, name: str, make: Callable[..., Tensor], *arguments: Any) -> None:
        self.note("set_mask", name, arguments)

    def restore(self) -> None:
        self.note("restore")

    def finish(self) -> None:
        """The step is not taken."""

    def _present(self, name: str) -> tuple[bool, ...]:
        """Which parameters have state ``name``: it would be begun for the others."""
        state = self._optimizer.state
        return tuple([name in state.get(param, ()) for param in self._all])

    def _split(self, direction: Combination, decoupled: Combination | None = None) -> Any:
        latest, other, combination = super()._split(direction, decoupled)
        self.note("of", latest, other, decoupled is None)
        return latest, other, combination

    def _coefficients(self, factors: list[Any], gradients: tuple[Gradient | None, ...]) -> Tensor:
        self.note("coefficients", tuple(map(float, factors)))
        return _COEFFICIENTS

    def _ascending(self, tensors: list[Tensor | None] | None) -> list[int]:
        return []

    def _drawn(self, positions: list[int] | None, probability: float, seed: int) -> list[int]:
        self.note("drawn", probability, seed, self.number)
        return []


class _Unchanged(Perturbation):
    """Of no weights; modules stay as they are."""

    def disable_running_stats(self, model: torch.nn.Module) -> None:
        """The pass after this is not evaluated."""


_DOTS = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(1.0)
"""Different, so that what a rule makes of them shows."""
_COEFFICIENTS = torch.ones(4)


def _plain(value: Any) -> Any:
    """A value without its tensors, to be compared."""
    how = _PLAIN.get(type(value))
    return value if how is None else how(value)


def _several(values: Any) -> Any:
    return tuple([_plain(value) for value in values])


_PLAIN: dict[type, Callable[[Any], Any]] = {
    Gradient: lambda value: value.number,
    State: lambda value: value.name,
    Sum: lambda value: (value.last.number, value.before.number),
    Combination: lambda value: _several(value.terms),
    MicroBatch: lambda value: (value.index, value.last),
    Tensor: lambda value: tuple(value.shape),
    list: _several,
    tuple: _several,
}
