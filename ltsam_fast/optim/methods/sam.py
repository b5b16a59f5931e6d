"""SAM and, with ``adaptive=True``, ASAM."""

from __future__ import annotations

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("sam", "SAM")
@registered("asam", "ASAM", adaptive=True)
class SAM(SharpnessAware):
    r"""Sharpness-aware minimization: descend with the gradient taken where the loss is about worst nearby.

    .. code-block:: text

        g   = grad L(w)
        eps = rho * T g / (|T' g| + 1e-12)        T = T' = 1;  adaptive (ASAM): T = w^2, T' = |w|
        w  <- base_step(w, grad L(w + eps))

    Two forwards and two backwards a step; 40 bytes moved per fp32 parameter with SGD and momentum, in three passes. A group's
    ``eta`` > 0 makes ``|w|`` in T and T' ``|w| + eta``; the authors' code does so for weights and leaves biases unscaled: put
    those in a group with ``adaptive=False``. The norm is global over all groups, the radius may differ by group.

    Differences from the reference implementation: restoring is a copy into the same storage; parameters without a gradient
    in either pass are restored too; ``state_dict`` has the base optimizer's state.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
    (arXiv 2010.01412), Algorithm 1; Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600), Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    >>> loss.shape
    torch.Size([])
    """

    def rule(self, step: Step) -> Rule:
        step.ascend((yield AtWeights()))  # not kept: the second pass needs its memory
        g_p = yield AtPerturbed()
        step.descend(g_p)
