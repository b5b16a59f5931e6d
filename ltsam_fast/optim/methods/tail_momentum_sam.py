"""An experiment: perturb along a running mean of Focal-SAM's sharp gradient, for one forward a step."""

from __future__ import annotations

from ltsam_fast.optim.gradients import Sum
from ltsam_fast.optim.methods.focal_sam import FocalSAM
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtWeights, Step


@registered("tail_momentum_sam", "Tail-Momentum-SAM")
class TailMomentumSAM(FocalSAM):
    r"""An experiment of this package's own: Focal-SAM at the base optimizer's number of forwards.

    .. code-block:: text

        v_c = lam * (1 - pi_c)^gamma,  u = 1 - v           as in Focal-SAM
        eps = rho * m_{t-1} / (|m_{t-1}| + 1e-12)          the first step has no m, and eps = 0
        g_u, g_v = grad (1/B) sum_j u_{y_j} l_j(w + eps),  grad (1/B) sum_j v_{y_j} l_j(w + eps)
        m_t = decay * m_{t-1} + (1 - decay) * g_v          m_1 = g_v
        w  <- base_step(w, g_u + g_v)

    What it does for accuracy has not been measured: no paper has it. It is to Focal-SAM what
    :class:`~ltsam_fast.MomentumSAM` is to SAM. One forward and two backwards a step, which share a sweep where the network
    is given as ``model``; 64 bytes moved per fp32 parameter with SGD and momentum. The loss returned is the one at w + eps. It
    has no phases.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = TailMomentumSAM(model.parameters(), torch.optim.SGD, rho=0.2, class_counts=[90, 10], lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    decay = option(0.9, "Decay of the mean.", ge=0, lt=1)

    buffers = ("tail_mean",)
    evaluates_at_w = False
    own_reductions = True
    phase_names = ()

    def rule(self, step: Step) -> Rule:
        u, v = step.class_weights()
        m = step.known_state("tail_mean")
        if m is not None:
            step.ascend(m)
        g_u, g_v = yield AtWeights(u, v, averaged=True, kept=2)
        if g_v is not None:
            step.keep("tail_mean", g_v if m is None else (1 - self.decay) * g_v + self.decay * m)
        step.descend(g_v if g_u is None else g_u if g_v is None else Sum(g_v, g_u))
