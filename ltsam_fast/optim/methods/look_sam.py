"""LookSAM: sharpness-aware every k-th step only."""

from __future__ import annotations

import torch

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("look_sam", "LookSAM")
class LookSAM(SharpnessAware):
    r"""Sharpness-aware minimization with a look ahead every k-th step.

    .. code-block:: text

        t = 0, k, 2k, ...:  eps = rho * g / (|g| + 1e-12),  g_s = grad L(w + eps)
                            g_v = g_s - <g_s, g> / |g|^2 * g
                            w  <- base_step(w, g_s)
        other steps:        w  <- base_step(w, g + alpha * |g| / |g_v| * g_v)

    Two forwards and two backwards every k-th step, else one; per fp32 parameter with SGD and momentum 64 bytes moved every
    k-th step, else 32. The decomposition is over the whole gradient, not tensor by tensor.

    Source: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022 (arXiv 2203.02714),
    Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = LookSAM(model.parameters(), torch.optim.SGD, rho=0.1, k=5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    k = option(5, "Perturb every k-th step; 1 is SAM.", ge=1, integer=True)
    alpha = option(0.7, "Weight of the part that is reused.", ge=0)

    buffers = ("grad_v",)
    own_reductions = True
    phases_are_fixed = False

    def rule(self, step: Step) -> Rule:
        if step.number % self.k:
            g = yield AtWeights(averaged=True, last=True)
            g_v = step.state("grad_v")
            gg, vv, _ = step.dots(g, g_v)
            reused = torch.where(vv > 0, self.alpha * (gg / vv).sqrt(), torch.zeros_like(gg))
            step.descend(g + reused * g_v)
            return
        g = yield AtWeights(averaged=True)
        step.ascend(g)
        g_s = yield AtPerturbed()
        if self.k > 1:
            _, gg, gs = step.dots(g_s, g)
            step.keep("grad_v", g_s - torch.where(gg > 0, gs / gg, torch.zeros_like(gs)) * g)
        step.descend(g_s)
