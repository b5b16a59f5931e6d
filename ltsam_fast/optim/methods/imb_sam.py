"""ImbSAM: sharpness of the tail only."""

from __future__ import annotations

from torch import Tensor

from ltsam_fast.ops.checks import check_tail_classes
from ltsam_fast.optim.class_wise import TailWise
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("imb_sam", "ImbSAM")
class ImbSAM(TailWise):
    r"""Imbalanced sharpness-aware minimization: SAM for the classes with few samples, the plain loss for the others.

    .. code-block:: text

        T   = {c : n_c < eta}                     or tail_classes
        g_h = grad (1/B) sum_{y_j not in T} l_j(w)
        g_t = grad (t/B) sum_{y_j in T} l_j(w)    t = tail_weight
        eps = rho * g_t / (|g_t| + 1e-12)
        w  <- base_step(w, g_h + grad (t/B) sum_{y_j in T} l_j(w + eps))

    Two forwards and three backwards a step (the first two share a graph); 44 bytes moved per fp32 parameter with SGD and
    momentum, in three passes. A batch without tail, or without head, samples is a step like any other.

    Differences from the published code: restoring is a copy, not a subtraction; 1e-12 is added to the norm, not 1e-16; the
    tail's weight is 1.

    Source: Zhou et al., "ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition", ICCV 2023
    (arXiv 2308.07815).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = ImbSAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], eta=20, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    eta = option(20, "Classes with fewer samples than this are tail.", ge=0)
    tail_classes = option(
        None,
        "The tail classes, instead of ``eta``; then the counts may be left out.",
        check=check_tail_classes,
        accepts="numbers of classes",
        optional=True,
    )
    tail_weight = option(
        1.0,
        "``t``: 1 in the paper and in the first release, 2 in today's published script (which ``ltsam_fast.compat.ImbSAM`` "
        "follows).",
        ge=0,
    )
    weight_options = ("class_counts", "eta", "tail_classes", "tail_weight")

    @property
    def open_ended(self) -> bool:  # type: ignore[override]
        return self.class_counts is None and self.class_weights is None

    def make_class_weights(self) -> tuple[Tensor, Tensor] | None:
        tail = self.tail_of_steps()
        return None if tail is None else (~tail, tail * self.tail_weight)

    def rule(self, step: Step) -> Rule:
        head, tail = step.class_weights()
        g_h, g_t = yield AtWeights(head, tail, kept=1)
        step.ascend(g_t)
        g_p = yield AtPerturbed(tail, plus=g_h)
        step.descend(g_p)
