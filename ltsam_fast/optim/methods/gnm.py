"""GNM: Gaussian noise in place of an ascent gradient."""

from __future__ import annotations

from typing import Any

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, Step


@registered("gnm", "GNM")
class GNM(SharpnessAware):
    r"""Gaussian neighborhood minimization: descend with the gradient at weights with a little noise.

    .. code-block:: text

        e   = clamp(N(0, (1/3)^2), -clip, clip) * rho * dis_mul       for each weight
        w  <- base_step(w, grad L(w + e))

    One forward and one backward a step; 32 bytes moved per fp32 parameter with SGD and momentum, in two passes. The noise is
    made inside the pass by a counter-based generator: the same for a seed on every backend, and nothing of it is stored.

    Differences from the published code: parameters without a gradient are restored too; epoch 0 does not have twice the noise
    (in ``ltsam_fast.compat.GNM`` it has). The loss returned is the one at w + e, for there is no other.

    Source: GNM-PT, "Gaussian Neighborhood Minimization Prompt Tuning", NeurIPS 2024 (arXiv 2410.21042), eqs. 1-3 of its poster.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = GNM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    dis_mul = option(0.1, "Factor of the noise.", ge=0)
    clip = option(1.0, "Bound of the noise before it is multiplied.", ge=0)
    decay_every = option(
        None,
        "Halve the noise each time so many steps were taken, or so many epochs, where ``first_step`` is told the epoch, "
        "counted from 1; None: never (the poster's equations).",
        ge=1,
        integer=True,
        optional=True,
    )
    seed = option(0, "Seed of the noise.", ge=0, lt=2**53, integer=True)

    evaluates_at_w = False

    def check_group(self, group: dict[str, Any]) -> None:
        if group["adaptive"]:
            raise ValueError("adaptive must be False for GNM: its noise does not look at the weights")

    def halvings(self, number: int, epoch: int | None) -> int:
        """How often the noise has been halved by the step ``number``, or in this epoch."""
        if self.decay_every is None:
            return 0
        return (number if epoch is None else max(0, epoch - 1)) // self.decay_every

    def rule(self, step: Step, epoch: int | None = None) -> Rule:
        factor = self.dis_mul * 0.5 ** self.halvings(step.number, epoch)
        step.add_noise(factor, self.clip, self.seed)
        g = yield AtPerturbed()
        step.descend(g)

    def first_step(self, epoch: int | None = None, zero_grad: bool = False, **options: Any) -> None:  # type: ignore[override]
        """Adds the noise. Then evaluate the loss and call ``backward()``.

        Args:
            epoch: Counts for ``decay_every``, from 1.
            zero_grad: Also clear the gradients.
            **options: As for :meth:`SharpnessAware.first_step`.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("first_step", zero_grad, epoch=epoch, **options)
