"""ESAM: perturb some of the weights, and descend with some of the samples."""

from __future__ import annotations

import math

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, LossIncrease, Step


@registered("esam", "ESAM")
class ESAM(SharpnessAware):
    r"""Efficient sharpness-aware minimization: stochastic weight perturbation and sharpness-sensitive data selection.

    .. code-block:: text

        eps = (rho / beta) * b * g / (|g| + 1e-12)           b ~ Bernoulli(beta) for each coordinate, g = grad L(w)
        S   = the ceil(gamma * B) samples with the largest l_j(w + eps) - l_j(w)
        w  <- base_step(w, grad of the mean loss of S at w + eps)

    A forward and backward for the batch, a forward without gradients, and a forward and backward for the samples selected; 40
    bytes moved per fp32 parameter with SGD and momentum, in three passes. The coordinates are drawn inside the perturbation,
    by a counter-based generator; the selection stays on the device.

    The closure takes an index: ``closure(index)`` returns the losses of the samples with these numbers, a 1-D LongTensor. The
    last pass is of the selected samples alone by definition: batch norm normalizes by these.

    Differences from the published code: exactly ceil(gamma B) samples are kept, never none; 1e-12 is added to the norm, not
    1e-7.

    Source: Du et al., "Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks", ICLR 2022
    (arXiv 2110.03141), Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = ESAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> def closure(index=slice(None)):
    ...     return torch.nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")
    >>> loss = opt.step(closure)
    """

    beta = option(0.6, "Share of the weights that are perturbed.", gt=0, le=1)
    gamma = option(0.5, "Share of the samples that are kept; 1 saves the forward without gradients.", gt=0, le=1)
    granularity = option(
        "element",
        '"element": a draw for each coordinate, as in the paper; "tensor": for each parameter tensor, as in the published '
        "code, where the others are left out of the norm too.",
        choices=("element", "tensor"),
    )
    seed = option(0, "Seed of the draws.", ge=0, lt=2**53, integer=True)

    phases_are_fixed = False

    @property
    def needs_index(self) -> bool:  # type: ignore[override]
        return self.gamma < 1  # type: ignore[no-any-return]

    def rule(self, step: Step) -> Rule:
        g = yield AtWeights()
        rho = [group["rho"] / self.beta for group in self.param_groups]
        step.ascend(g, rho=rho, probability=self.beta, by_tensor=self.granularity == "tensor", seed=self.seed)
        chosen = None
        if self.gamma < 1:
            increase = yield LossIncrease()
            chosen = [one.topk(math.ceil(self.gamma * len(one))).indices for one in increase]
        g_p = yield AtPerturbed(of=chosen)
        step.descend(g_p)
