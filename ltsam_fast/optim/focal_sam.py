"""Focal-SAM: every class's sharpness counts, by how rare the class is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_factor
from ltsam_fast.optim.class_wise import ClassWise


class FocalSAM(ClassWise):
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
        **base_kwargs: Options of ``base_optimizer``; and ``shared_backward`` (False, True or "auto", with ``model``): the
            gradients at w from one backward sweep, see :class:`ltsam_fast.optim.sharing.Sharing`.

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
        gamma, lam = check_factor("gamma", gamma), check_factor("lam", lam)
        v = None if class_counts is None else ops.focal_weights(class_counts, gamma, lam)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)
        if v is not None:
            self._weigh(1 - v, v)
