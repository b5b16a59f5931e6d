"""ImbSAM: sharpness of the tail only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ltsam_fast.ops.checks import check_factor, tail_of
from ltsam_fast.optim.class_wise import ClassWise


class ImbSAM(ClassWise):
    r"""Imbalanced sharpness-aware minimization: SAM for the classes with few samples, the plain loss for the others.

    .. code-block:: text

        T   = {c : n_c < eta}                     or tail_classes
        g_h = grad (1/B) sum_{y_j not in T} l_j(w)
        g_t = grad (t/B) sum_{y_j in T} l_j(w)    t = tail_weight
        eps = rho * g_t / (|g_t| + 1e-12)
        w  <- base_step(w, g_h + grad (t/B) sum_{y_j in T} l_j(w + eps))

    Two forwards and three backwards a step (the first two share a graph); 44 bytes moved per fp32 parameter with SGD and
    momentum, in three passes. A batch without tail, or without head, samples is a step like any other.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        class_counts: C numbers of training samples. Without them, and without ``tail_classes``, only the phases can be used,
            and the losses are weighed by the caller.
        eta: Classes with fewer samples than this are tail.
        tail_classes: The tail classes, instead of ``eta``; then the counts may be left out.
        tail_weight: ``t``: 1 in the paper and in the first release, 2 in today's published script (which
            ``ltsam_fast.compat.ImbSAM`` follows).
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``; and ``shared_backward`` (False, True or "auto", with ``model``): the
            gradients at w from one backward sweep, see :class:`ltsam_fast.optim.sharing.Sharing`.

    Raises:
        ValueError: ``rho``, ``class_counts``, ``eta`` or ``tail_weight`` is negative or not finite, or a tail class does not
            exist.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: restoring is a copy, not a subtraction; 1e-12 is added to the norm, not 1e-16; the
    tail's weight is 1.

    Source: Zhou et al., "ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition", ICCV 2023
    (arXiv 2308.07815).

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = ImbSAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], eta=20, lr=0.1)
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
        eta: float = 20,
        tail_classes: Any = None,
        tail_weight: float = 1.0,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        tail = tail_of(class_counts, eta, tail_classes)
        tail_weight = check_factor("tail_weight", tail_weight)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)
        if tail is not None:
            self._weigh(~tail, tail * tail_weight, open_ended=class_counts is None)
