"""What Focal-SAM, ImbSAM and SSE-SAM share: class weights u and v, their three phases, and labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ltsam_fast.optim.batch import Batch
from ltsam_fast.optim.gradients import _gradients, _swap_gradients
from ltsam_fast.optim.sharing import Sharing
from ltsam_fast.shared import Weighting


class ClassWise(Sharing):
    r"""Base of the methods that weigh the classes: u in the clean loss, v in the sharp one.

    .. code-block:: text

        g_a(w) = grad (1/B) sum_j a[y_j] l_j(w)
        eps    = rho * g_v(w) / (|g_v(w)| + 1e-12)
        w     <- base_step(w, g_u(w) + g_v(w + eps))

    The first two backwards share a graph; where u or v is zero for every class its passes are not run at all.

    ``shared_backward=True`` (a keyword of these methods; needs ``model``) makes both gradients from one sweep: 2 forwards, 2
    backwards and a second product with each weight, 7 units instead of 8 where SAM takes 6, and little more than 6 where most
    weights are frozen. See :class:`ltsam_fast.optim.sharing.Sharing`.
    """

    phases = ("first_step", "second_step", "third_step")
    _kept = (*Sharing._kept, "clean_weights", "class_weights", "_used", "_open", "_pilot")

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

    _pilot: int | None = None
    """Which of u and v, nowhere near zero, can weigh the sweep that both share; ``None``: neither."""

    def _weigh(self, u: Tensor, v: Tensor, open_ended: bool = False) -> None:
        """Sets the class weights."""
        self.clean_weights, self.class_weights, self._open = u.double(), v.double(), open_ended
        sizes = [one.abs() for one in (self.clean_weights, self.class_weights)]
        least = 1e-3 * max(float(one.max()) for one in sizes)
        self._pilot = next((i for i, one in enumerate(sizes) if float(one.min()) > least), None)
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

    @property
    def _classes(self) -> int:
        if self.class_weights is None:
            raise ValueError(
                "class_counts must be given to the constructor for step(closure, targets); the phases need none"
            )
        return 2**62 if self._open else len(self.class_weights)

    def _evaluate(self, part: Batch) -> Tensor:
        return self._evaluate_for(part, self._parameters()[0]) if all(self._used) else part.evaluate()

    def _backward_both(self, losses: Tensor, u: Tensor, v: Tensor, clean: list[Tensor | None]) -> list[Tensor | None]:
        if self._sharing is None:
            return super()._backward_both(losses, u, v, clean)
        params = self._sharing.params
        if self._pilot is None:
            seeds = u.abs() + v.abs()
            found = self._sharing(losses, seeds, [Weighting.sparse(one / seeds) for one in (u, v)], native=False)
        elif self._pilot == 1:
            found = self._sharing(losses, v, (u / v,))
        else:
            sharp = _swap_gradients(params, clean)
            found = self._sharing(losses, u, (v / u,))
            clean = _swap_gradients(params, sharp)
        if found is None:
            return super()._backward_both(losses, u, v, clean)
        if self._pilot != 1:
            _swap_gradients(params, _sum(_gradients(params), found[-1]))
        return clean if self._pilot == 0 else _sum(clean, found[0])

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor | None]:
        chosen = labels.to(losses.device, torch.long, non_blocking=True)  # type: ignore[union-attr]
        if self._open:
            chosen = chosen.clamp(max=len(self.class_weights) - 1)  # type: ignore[arg-type]
        weights = []
        for name in ("clean_weights", "class_weights"):
            table = getattr(self, name).to(losses.device, non_blocking=True)
            setattr(self, name, table)
            weights.append(table[chosen].to(losses.dtype))
        u, v = (some if one else None for some, one in zip(weights, self._used, strict=True))
        return u, v


def _sum(grads: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients added up, where one may be missing."""
    return [a if b is None else b if a is None else a + b for a, b in zip(grads, more, strict=True)]
