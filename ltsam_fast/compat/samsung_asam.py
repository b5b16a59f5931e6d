"""SamsungLabs/ASAM: its ASAM. Its SAM is davda54's class, around an optimizer."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from ltsam_fast import optim
from ltsam_fast.compat.published import Wrapper
from ltsam_fast.ops.checks import shown
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


class ASAM(Wrapper, optim.SAM):
    """The authors' ASAM: ``(optimizer, model, rho, eta)``, ``ascent_step`` and ``descent_step``.

    Parameters with "weight" in their name are scaled by |w| + eta, the others not at all.

    Args:
        optimizer: The optimizer that takes the step.
        model: Names the parameters.
        rho: Radius, >= 0.
        eta: Added to |w|, >= 0. ``opt.eta = x`` takes effect too.

    Source: SamsungLabs/ASAM, asam.py.
    """

    phase_names = ("ascent_step", "descent_step")
    pickled = (*optim.SAM.pickled, "scaled")

    def __init__(self, optimizer: Optimizer, model: torch.nn.Module, rho: float = 0.5, eta: float = 0.01) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, whose parameters' names count, got {shown(model)}")
        self.scaled = frozenset(param for name, param in model.named_parameters() if "weight" in name)
        super().__init__(*self._around(optimizer, eta=eta, norm_eps=1e-16), rho, adaptive=True)

    def rule(self, step: Step) -> Rule:
        """SAM's step, where only the parameters in ``scaled`` are scaled."""
        g = yield AtWeights()
        step.ascend(g, unscaled=frozenset(self.all_params()[0]) - self.scaled)
        g_p = yield AtPerturbed()
        step.descend(g_p)

    def ascent_step(self) -> None:
        """Ascends along the present gradients and clears them.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient.
        """
        self._advance("ascent_step", True)

    def descent_step(self) -> None:
        """Restores the weights, takes the optimizer's step with the present gradients, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("descent_step", True)
