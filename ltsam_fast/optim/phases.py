"""The explicit phases: a rule that is driven by the caller's backward passes, one gradient a phase."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltsam_fast.optim.closures import ClassWeights
from ltsam_fast.optim.dry_run import empty_answer
from ltsam_fast.optim.gradients import Gradient, State, Sum, gradients_of, own_memory, take_gradients
from ltsam_fast.optim.step import AtPerturbed, AtWeights, MicroBatch, Pause, Step

if TYPE_CHECKING:
    from ltsam_fast.optim.optimizer import SharpnessAware

_GIVEN = ClassWeights(torch.ones(1))
"""Stands for class weights: with the phases the caller weighs the losses."""


class NotInPhases(ValueError):
    """A rule asks for more than the gradients that the phases bring."""


class PhaseRun:
    """A rule between its phases.

    Attributes:
        step: The step.
        position: How many phases have been run.
        cleared: Whether the latest has cleared the gradients.
    """

    no_gradient = "no parameter has a gradient to ascend along: call loss.backward() before this phase"
    """What is wrong then."""
    evaluates = False
    """Whether it runs the passes itself: then a step without any gradient is an error, else torch's step that does nothing."""

    def __init__(self, optimizer: SharpnessAware, step: Step, inputs: dict[str, Any]) -> None:
        self.step, self.position = step, 0
        self.cleared = False
        self._optimizer = optimizer
        self._rule = optimizer.rule_of(step, **inputs)
        self._request: Any = None
        self._found: list[list[Tensor | None]] = []
        self.class_weights = _GIVEN, _GIVEN
        step.passes = self
        self.names = optimizer.phases

    def check_gradients(self) -> None:
        """Raises ValueError where the rule would ascend along the present gradients and there are none.

        The phase can be repeated then.
        """
        request = self._request
        if isinstance(request, AtWeights) and not request.last and len(self._found) + 1 == request.gradients:
            if all(param.grad is None for param in self.step._params):
                raise ValueError(self.no_gradient)

    def advance(self) -> bool:
        """Runs the next phase; returns whether it was the last one."""
        begins = self._request is None
        if begins:
            self._request = next(self._rule)
        self.position += 1
        request, answer = self._request, None
        if begins and isinstance(request, AtPerturbed):
            return False  # the rule perturbs before its first gradient
        if not isinstance(request, Pause):
            if isinstance(request, AtWeights):
                keeps = request.averaged or request.gradients > 1
            else:
                keeps = not request.last
            params, self.cleared = self.step._params, keeps
            self._found.append(own_memory(take_gradients(params)) if keeps else gradients_of(params))
            if keeps:
                self.step._workers.gradients_cleared()
            if len(self._found) < request.gradients:
                return False
            answer, self._found = self._answer(request, self._found), []
        try:
            self._request = self._rule.send(answer)
        except StopIteration:
            return True
        return False

    def _answer(self, request: Any, found: list[list[Tensor | None]]) -> Any:
        if isinstance(request, AtPerturbed):
            gradient = Gradient(found[0], next(self.step.gradient_numbers), True)
            if request.plus is None:
                return gradient
            request.plus.averaged = True  # type: ignore[attr-defined]
            return Sum(gradient, request.plus)  # type: ignore[arg-type]
        self.step.seen_unperturbed = True
        workers, optimizer = self.step._workers, self._optimizer
        average = workers.averages and (request.averaged or (optimizer.ascent_sync and request.gradients == 1))
        answers = [
            Gradient(workers.average(self.step._params, one) if average else one, number, average)
            for one, number in zip(found, self.step.gradient_numbers, strict=False)
        ]
        whole = answers[0] if len(answers) == 1 else answers
        return (whole, None) if request.squares else whole


class _CountedStep:
    """A step whose verbs do nothing and whose numbers are zeros: only the requests of the rule count."""

    def __init__(self, taken: int, base_steps: int) -> None:
        self.taken, self.number = taken, taken - base_steps

    def class_weights(self) -> tuple[ClassWeights, ClassWeights]:
        return _GIVEN, _GIVEN

    def micro_batches(self, size: int) -> Any:
        raise NotInPhases

    def state(self, name: str) -> State:
        return State([], name)

    def dots(self, first: Gradient, second: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        return _ZERO, _ZERO, _ZERO

    def known_state(self, *names: str) -> None:
        return None

    def lacks(self, name: str) -> bool:
        return False

    def __getattr__(self, verb: str) -> Any:
        return lambda *args, **options: None


_ZERO = torch.zeros(())


def count_phases(optimizer: SharpnessAware) -> int:
    """How many phases the next step has, found out by running its rule without doing anything; 0: it cannot be run so."""
    group = optimizer.param_groups[0]
    rule = optimizer.rule_of(_CountedStep(group["steps"], group["base_steps"]))  # type: ignore[arg-type]
    count, numbers = 0, itertools.count(1)
    answer: Any = None
    try:
        while True:
            request = rule.send(answer)
            if isinstance(request, AtPerturbed) and not count:
                count = 1  # the rule perturbs before its first gradient
            if not isinstance(request, (AtWeights, AtPerturbed, Pause)) or isinstance(
                getattr(request, "of", None), (MicroBatch, list)
            ):
                return 0
            count += request.gradients or 1
            answer = empty_answer(request, numbers)
    except StopIteration:
        return count
    except NotInPhases:
        return 0
