"""Momentum-SAM: perturb along what is known before the step, and take one gradient only."""

from __future__ import annotations

from typing import Any

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, Step

MOMENTA = ("momentum_buffer", "exp_avg")
"""What base optimizers call their momentum."""


@registered("momentum_sam", "Momentum-SAM")
class MomentumSAM(SharpnessAware):
    r"""Sharpness-aware minimization for the price of the base optimizer: one forward and one backward a step.

    .. code-block:: text

        "momentum":       eps = -rho * m / (|m| + 1e-12)       m: the base optimizer's momentum, of the steps before
        "last_gradient":  eps =  rho * g / (|g| + 1e-12)       g: the gradient that the step before took
        w  <- base_step(w, grad L(w + eps))

    Momentum: SGD's and Muon's ``momentum_buffer``, Adam's and its kin's ``exp_avg``, as it is, weight decay in it included.
    The first step, which has none, is the base optimizer's. Note the sign, which is the authors': w + eps lies where the base
    optimizer is going, as in Nesterov's method; a negative ``rho`` goes the other way. The authors' radii are larger than
    SAM's: 3 for SGD, where SAM's was 0.2.

    One forward and one backward; per fp32 parameter with SGD and momentum 40 bytes moved in three passes, 52 in four along the
    last gradient, which is kept. ``adaptive`` scales as in ASAM.

    Differences from the published code: weights are perturbed within a step alone, so that nothing is to be done before an
    evaluation or a checkpoint; any number of groups; any base optimizer with momentum. The loss returned is the one at w + eps,
    for there is no other.

    Source: Becker, Altrock and Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", NeurIPS 2025
    (arXiv 2401.12033), Algorithm 1, and its code's sign; "last_gradient": Jiang et al., S2-SAM, NeurIPS 2024, and AsyncSAM
    (arXiv 2503.11147).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = MomentumSAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.1, momentum=0.9)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    rho = option(
        0.05, "Radius of the perturbation, in units of the weights; a negative one turns it round.", per_group=True
    )
    direction = option("momentum", "What is perturbed along.", choices=("momentum", "last_gradient"))

    evaluates_at_w = False

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of a parameter's state that is the method's own."""
        return ("last_gradient",) if self.direction == "last_gradient" else ()

    def check_group(self, group: dict[str, Any]) -> None:
        if group["direction"] == "last_gradient" or not (group["perturb"] and group["rho"]):
            return
        if not (group["momentum"] if "momentum" in group else "betas" in group):
            base = type(self.base_optimizer).__name__
            raise ValueError(
                f"direction must be 'last_gradient' with {base} without momentum, got 'momentum': else give it one, "
                "such as momentum=0.9"
            )

    def rule(self, step: Step) -> Rule:
        uphill = self.direction == "last_gradient"
        d = step.known_state(*self.buffers or MOMENTA)
        if d is not None:
            step.ascend(d, downhill=not uphill)
        g = yield AtPerturbed()
        if uphill:
            step.keep("last_gradient", g)
        step.descend(g)
