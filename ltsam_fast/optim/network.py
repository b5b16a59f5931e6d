"""What is known of the network that closures evaluate: whether it mixes samples, and what of it stays as it is at w."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ltsam_fast.lists import same_items
from ltsam_fast.optim.classes_at_once import ClassesAtOnce, Refused
from ltsam_fast.optim.probe import Evaluate, check_separable, looks_again
from ltsam_fast.optim.unchanged import UnchangedResults
from ltsam_fast.shared import NotShared, SharedBackward

_LOG = logging.getLogger("ltsam_fast")


class Network:
    """Finds out, for each kind of pass, which of the exact ways around the published passes a network allows.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._separable: dict[Any, bool] = {}
        self._uses: Counter[Any] = Counter()
        self._mixing: set[Any] = set()
        self._shared: SharedBackward | None = None
        self._unchanged: UnchangedResults | None = None
        self._fixed: tuple[list[Tensor], bool] = ([], False)
        self._refused: set[Any] = set()
        self.small: set[Any] = set()
        """Kinds of passes in which a backward for each gradient takes less time than one sweep for two."""
        self._at_once: Counter[Any] = Counter()
        self._logged = False

    def mode(self) -> int:
        """A number for the modules, by type, and whether they are in training."""
        return hash(tuple([(type(module), module.training) for module in self.model.modules()]))

    def trains_others(self, params: list[Tensor]) -> bool:
        """Whether weights that are not among ``params`` get gradients, which the published passes leave there."""
        own = set(map(id, params))
        return any(param.requires_grad and id(param) not in own for param in self.model.parameters())

    def is_separable(
        self,
        kind: Any,
        evaluate: Evaluate,
        size: int,
        params: Sequence[Tensor],
        others: Callable[[], list[nn.Module]],
        required: bool,
    ) -> bool:
        """Whether samples can be evaluated in sub-batches.

        Args:
            kind: The kind of pass: its 1st, 2nd, 4th, 8th, ... is compared with what it is in two parts.
            evaluate: Runs the pass for some of its samples.
            size: The number of all.
            params: The weights.
            others: Gives further modules that the pass calls, as far as they are known.
            required: Whether samples that mix are an error.

        Raises:
            NotShared: They do, and are.
        """
        if not self._separable.get(kind, True) or size < 2 or any(map(is_lazy, self.model.parameters())):
            return False
        self._uses[kind] += 1
        if kind not in self._separable or looks_again(self._uses[kind]):
            try:
                check_separable(self.model, evaluate, size, params, others())
                self._separable[kind] = True
            except NotShared as error:
                self.refuse(error, required)
                self._separable[kind] = False
        return self._separable[kind]

    def shared(self, mode: int, params: list[Tensor]) -> SharedBackward | None:
        """What makes several gradients from one backward sweep; None where samples mix."""
        if mode in self._mixing:
            return None
        if self._shared is None or not same_items(self._shared.params, params):
            self._shared = SharedBackward(self.model, params)
        return self._shared

    def attempt(self, mode: int, required: bool, attempt: Callable[[], Any]) -> Any:
        """The result of something with :meth:`shared`; None, from now on, if that finds that samples mix.

        Raises:
            NotShared: They do, and ``required`` says that this is an error.
        """
        try:
            return attempt()
        except NotShared as error:
            self.refuse(error, required)
            self._mixing.add(mode)
            return None

    def refuse(self, error: NotShared, required: bool) -> None:
        """Raises the error if that is required; else the log says so, once."""
        if required:
            raise error
        if not self._logged:
            self._logged = True
            _LOG.warning("plan: passes are run as published: %s", error)

    def at_once(self, kind: Any, params: Sequence[Tensor], closure: Callable[..., Any]) -> ClassesAtOnce | None:
        """What evaluates several classes in one pass of this kind; None if that has been refused."""
        if kind in self._refused:
            return None
        try:
            return ClassesAtOnce(self.model, params, closure)
        except Refused as error:
            self.refuse_at_once(kind, error)
            return None

    def checks_at_once(self, kind: Any) -> bool:
        """Whether this pass of several classes, the 1st, 2nd, 4th, 8th, ... of its kind, is compared with a class alone."""
        self._at_once[kind] += 1
        return looks_again(self._at_once[kind])

    def refuse_at_once(self, kind: Any, error: Refused) -> None:
        """Has classes evaluated one after the other in passes of this kind from now on; the log says why, once."""
        if not self._refused:
            _LOG.info("plan: classes are evaluated one after the other: %s", error)
        self._refused.add(kind)

    def unchanged(self, perturbed: list[Tensor]) -> UnchangedResults | None:
        """What keeps results that no perturbed weight has a part in; None if every weight is perturbed."""
        if not same_items(self._fixed[0], perturbed):
            own = set(map(id, perturbed))
            fixed = bool(perturbed) and any(id(param) not in own for param in self.model.parameters())
            self._fixed = perturbed, fixed and not isinstance(self.model, nn.DataParallel)
            self._unchanged = UnchangedResults(self.model, perturbed) if self._fixed[1] else None
        return self._unchanged
