"""Focal-SAM: every class's sharpness counts, by how rare the class is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.optim.class_wise import ClassWise
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("focal_sam", "Focal-SAM")
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

    Differences from the published code: restoring is a copy into the same storage; a gradient kept by the first phase is
    used even if the last pass has none for that parameter; ``state_dict`` has the base optimizer's state; the loss returned
    is the one at w.

    Source: "Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification", ICML 2025 (arXiv 2505.01660),
    Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = FocalSAM(model.parameters(), torch.optim.SGD, rho=0.2, class_counts=[90, 10], gamma=3.0, lam=0.5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)

    A gamma for each class (CA-Focal-SAM), weights of one's own for the classes, and for the samples:

    >>> opt = FocalSAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], gamma=[1.0, 2.0], lr=0.1)
    >>> opt.sharp_weights
    tensor([0.0500, 0.4050], dtype=torch.float64)
    >>> opt = FocalSAM(model.parameters(), torch.optim.SGD, class_weights=([1.0, 0.5], [0.0, 0.5]), lr=0.1)
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    >>> u, v = torch.rand(8), torch.rand(8)
    >>> loss = opt.step(lambda: model(x).square().sum(1), weights=(u, v))
    """

    gamma = option(1.0, "Focus on the tail; of each class its own, as in CA-Focal-SAM.", ge=0, per_class=True)
    lam = option(
        0.5, "Weight of the sharpness; may exceed 1, then rare classes' clean weight is negative, as published.", ge=0
    )
    weight_options = ("class_counts", "gamma", "lam")

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        gamma, counts = options["gamma"], options["class_counts"]
        if isinstance(gamma, tuple) and counts is not None and len(gamma) != len(counts):
            raise ValueError(f"gamma must be a number, or one for each of the {len(counts)} classes, got {gamma}")

    def make_class_weights(self) -> tuple[Tensor, Tensor] | None:
        if self.class_counts is None:
            return None
        v = ops.focal_weights(self.class_counts, self.gamma, self.lam)
        return 1 - v, v

    def rule(self, step: Step) -> Rule:
        u, v = step.class_weights()
        g_u, g_v = yield AtWeights(u, v, kept=1)
        step.ascend(g_v)
        g_p = yield AtPerturbed(v, plus=g_u)
        step.descend(g_p)
