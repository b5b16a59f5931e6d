"""Focal-SAM: every class's sharpness counts, by how rare the class is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.base import Closure, SharpnessAware


class FocalSAM(SharpnessAware):
    r"""Focal sharpness-aware minimization for long-tailed data.

    .. code-block:: text

        v_c = lam * (1 - pi_c)^gamma              pi_c: the class's share of the training set
        g_u = grad (1/B) sum_j (1 - v_{y_j}) l_j(w)
        g_v = grad (1/B) sum_j v_{y_j} l_j(w)
        eps = rho * g_v / (|g_v| + 1e-12)
        w  <- base_step(w, g_u + grad (1/B) sum_j v_{y_j} l_j(w + eps))

    Two forwards and three backwards a step (the first two share a graph); 44 bytes moved per fp32 parameter with SGD and
    momentum, in three passes. ``gamma=0, lam=1`` is SAM.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        class_counts: C numbers of training samples. Without them only the phases can be used, and the losses are weighed by
            the caller.
        gamma: Focus on the tail, >= 0.
        lam: Weight of the sharpness, >= 0; may exceed 1, then rare classes' clean weight is negative, as published.
        model: If given, running statistics of normalization layers see the unperturbed pass only; else every pass
            updates them, as in published code.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho``, ``class_counts``, ``gamma`` or ``lam`` is negative or not finite.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: restoring is a copy into the same storage; a gradient kept by the first phase is
    used even if the last pass has none for that parameter; ``state_dict`` has the base optimizer's state; the loss returned
    is the one at w.

    Source: "Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification", ICML 2025 (arXiv 2505.01660),
    Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = FocalSAM(model.parameters(), torch.optim.SGD, rho=0.2, class_counts=[90, 10], gamma=3.0, lam=0.5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    _phases = ("first_step", "second_step", "third_step")
    _kept = (*SharpnessAware._kept, "class_weights")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        class_counts: Any = None,
        gamma: float = 1.0,
        lam: float = 0.5,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        # With counts of 1 and 0 gamma and lam are checked even where the caller weighs the losses.
        weights = ops.focal_weights([1, 0] if class_counts is None else class_counts, gamma, lam)
        self.class_weights = None if class_counts is None else weights
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    @torch.no_grad()
    def first_step(self) -> None:
        """Keeps the gradients of the clean loss, sum_j (1 - v) l_j / B, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("first_step", self._keep_gradients)

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
            ops.check_targets(label, rows, len(self.class_weights))  # type: ignore[arg-type]
        return labels

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.class_weights = self.class_weights.to(losses.device)  # type: ignore[union-attr]
        v = weights[labels.to(losses.device, torch.long)].to(losses.dtype)  # type: ignore[union-attr]
        return 1 - v, v
