"""What methods share that may take several gradients from one backward sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_shared_backward
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.batch import Batch
from ltsam_fast.optim.gradients import _same_items
from ltsam_fast.shared import SharedBackward


class Sharing(SharpnessAware):
    """Base of the methods with the keyword ``shared_backward``: False, or with ``model`` True or "auto".

    With True a network that mixes samples, such as by batch norm in training, is an error that names the module, raised by the
    first step before anything has changed; with "auto" it gets one log line, and a backward for each gradient. ``step()`` only:
    with the phases the backwards are the caller's. See :class:`ltsam_fast.shared.SharedBackward`.
    """

    _kept = (*SharpnessAware._kept, "shared_backward")

    def __init__(
        self, *args: Any, model: torch.nn.Module | None = None, shared_backward: bool | str = False, **kwargs: Any
    ) -> None:
        check_shared_backward(shared_backward, model)
        self.shared_backward = shared_backward
        super().__init__(*args, model=model, **kwargs)

    def _forget(self) -> None:
        super()._forget()
        self._sharing: SharedBackward | None = None

    def _evaluate_for(self, part: Batch, params: list[Tensor]) -> Tensor:
        """The losses at w, for a sweep that is to be shared by gradients of ``params``."""
        if not self.shared_backward:
            return part.evaluate()
        if self._sharing is None or not _same_items(self._sharing.params, params):
            self._sharing = SharedBackward(self.model, params, self.shared_backward)  # type: ignore[arg-type]
        with self._sharing.watching():
            return part.evaluate()
