"""Friendly SAM: the running mean of the gradient is left out of the perturbation."""

from __future__ import annotations

from types import MappingProxyType

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("friendly_sam", "Friendly SAM")
class FriendlySAM(SharpnessAware):
    r"""Friendly sharpness-aware minimization.

    .. code-block:: text

        d   = g_t - sigma * m_{t-1}                          g_t = grad L(w)
        eps = rho * d / (|d| + 1e-12)
        m_t = lmbda * m_{t-1} + (1 - lmbda) * g_t            m_1 = g_1; step 1 is plain SAM
        w  <- base_step(w, grad L(w + eps))

    Two forwards and two backwards a step; 52 bytes moved per fp32 parameter with SGD and momentum, in three passes: the mean
    is subtracted in the norm's and updated in the perturbation's.

    Source: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024 (arXiv 2403.12350), Algorithm 1, with the mean of
    the steps before, as in the authors' code (for sigma = 1 the direction is the same).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    sigma = option(1.0, "How much of the mean is left out.", ge=0)
    lmbda = option(0.9, "Decay of the mean.", ge=0, lt=1)

    buffers = ("grad_mean",)
    published_state = MappingProxyType({"momentum": "grad_mean"})

    def rule(self, step: Step) -> Rule:
        g, m = (yield AtWeights()), step.state("grad_mean")
        step.ascend(g - self.sigma * m, ema=(m, self.lmbda))
        g_p = yield AtPerturbed()
        step.descend(g_p)
