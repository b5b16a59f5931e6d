"""What Focal-SAM, ImbSAM and SSE-SAM share: class weights u and v, their three phases, and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.batch import Closure


class ClassWise(SharpnessAware):
    r"""Base of the methods that weigh the classes: u in the clean loss, v in the sharp one.

    .. code-block:: text

        g_a(w) = grad (1/B) sum_j a[y_j] l_j(w)
        eps    = rho * g_v(w) / (|g_v(w)| + 1e-12)
        w     <- base_step(w, g_u(w) + g_v(w + eps))

    The first two backwards share a graph; where u or v is zero for every class its passes are not run at all.
    """

    _phases = ("first_step", "second_step", "third_step")
    _kept = (*SharpnessAware._kept, "clean_weights", "class_weights", "_used", "_open")

    clean_weights: Tensor | None = None
    """u, shape (C,), float64."""
    class_weights: Tensor | None = None
    """v, shape (C,), float64."""

    _twice = True
    _used = (True, True)

    @property
    def _one_pass(self) -> bool:  # type: ignore[override]
        return not self._used[1]

    _open = False
    """Whether the last entries of u and v stand for all further classes."""

    def _weigh(self, u: Tensor, v: Tensor, open_ended: bool = False) -> None:
        """Sets the class weights."""
        self.clean_weights, self.class_weights, self._open = u.double(), v.double(), open_ended
        self._used = (bool(u.any()), bool(v.any()))

    @torch.no_grad()
    def first_step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Keeps the gradients of the clean loss, sum_j u l_j / B, and clears them.

        Args:
            scaler: The GradScaler that scaled the losses, for the whole step: see :meth:`SharpnessAware.step`.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("first_step", lambda *_: self._keep_gradients(), scaler)

    @torch.no_grad()
    def second_step(self) -> None:
        """Climbs along the gradients of the sharp loss, sum_j v l_j / B, and clears them.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient.
        """
        self._run("second_step", self._climb)
        self._clear_gradients()

    @torch.no_grad()
    def third_step(self) -> None:
        """Goes back to w and steps with the kept gradients plus those of the sharp loss at w + eps, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("third_step", self._descend)
        self._clear_gradients()

    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        targets: Tensor | Sequence[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """One step: see :meth:`SharpnessAware.step`. ``targets`` must be given and lie in [0, C)."""
        if self._ends(closure):
            return super().step()
        if self.class_weights is None:
            raise ValueError(
                "class_counts must be given to the constructor for step(closure, targets); the phases need none"
            )
        if targets is None:
            raise ValueError("targets must be given: step(closure, targets=y) with the samples' classes, shape (B,)")
        return super().step(closure, targets, scaler)

    def _check_targets(self, targets: Any, closures: int) -> list[Tensor | None]:
        labels = super()._check_targets(targets, closures)
        for label in labels:
            rows = len(label) if isinstance(label, Tensor) and label.dim() else 0
            ops.check_targets(label, rows, 2**62 if self._open else len(self.class_weights))  # type: ignore[arg-type]
        return labels

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor | None]:
        chosen = labels.to(losses.device, torch.long)  # type: ignore[union-attr]
        if self._open:
            chosen = chosen.clamp(max=len(self.class_weights) - 1)  # type: ignore[arg-type]
        weights = []
        for name in ("clean_weights", "class_weights"):
            table = getattr(self, name).to(losses.device)
            setattr(self, name, table)
            weights.append(table[chosen].to(losses.dtype))
        u, v = (some if one else None for some, one in zip(weights, self._used, strict=True))
        return u, v
