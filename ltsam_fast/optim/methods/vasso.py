"""VaSSO: ascend along a running mean of the gradient."""

from __future__ import annotations

from types import MappingProxyType

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("vasso", "VaSSO")
class VaSSO(SharpnessAware):
    r"""Variance-suppressed sharpness-aware optimization: ascend along a running mean of the gradient.

    .. code-block:: text

        d_t = (1 - theta) * d_{t-1} + theta * g_t            g_t = grad L(w);  d_1 = g_1
        eps = rho * d_t / (|d_t| + 1e-12)
        w  <- base_step(w, grad L(w + eps))

    Two forwards and two backwards a step; 52 bytes moved per fp32 parameter with SGD and momentum, in three passes: the mean
    is added in the norm's and updated in the perturbation's. ``theta=1`` is SAM.

    Differences from the published code: 1e-12 is added to the norm, not 1e-7; restoring is a copy into the same storage.

    Source: Li and Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression", NeurIPS 2023
    (arXiv 2309.15639), Algorithm 1; d_1 as in the authors' code.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = VaSSO(model.parameters(), torch.optim.SGD, rho=0.1, theta=0.4, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    theta = option(0.4, "How much of the present gradient the direction takes in.", ge=0, le=1)

    buffers = ("ascent_mean",)
    published_state = MappingProxyType({"ema": "ascent_mean"})

    def rule(self, step: Step) -> Rule:
        g, d = (yield AtWeights()), step.state("ascent_mean")
        step.ascend(self.theta * g + (1 - self.theta) * d, ema=(d, 1 - self.theta), begins_included=True)
        g_p = yield AtPerturbed()
        step.descend(g_p)
