"""SSE-SAM: sharpness of head and tail apart, later of the tail alone."""

from __future__ import annotations

from torch import Tensor

from ltsam_fast.optim.class_wise import TailWise
from ltsam_fast.optim.optimizer import Rule
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("sse_sam", "SSE-SAM")
class SSESAM(TailWise):
    r"""Stage-wise saddle-escaping sharpness-aware minimization.

    .. code-block:: text

        head, tail losses: (1/B) sum of l_j over n_{y_j} >= eta, and over n_{y_j} < eta
        stage 1:  eps_h = rho * g_h / (|g_h| + 1e-12),  eps_t = tail_rho * g_t / (|g_t| + 1e-12)
                  w <- base_step(w, g_h(w + eps_h) + g_t(w + eps_t))
        stage 2:  w <- base_step(w, g_h(w) + g_t(w + eps_t))

    Stage 1 takes three forwards and four backwards (the published code four and four), 60 bytes moved per fp32 parameter
    with SGD and momentum; stage 2 two and three, 44 bytes.

    Differences from the published code: both ascent gradients come from one forward; restoring is a copy; 1e-12 is added to
    the norm, not 1e-16; stage 2 does not run the head's idle perturbation. ``ltsam_fast.compat.SSESAM`` has its calls.

    Source: "SSE-SAM: Balancing Head and Tail Classes Gradually through Stage-Wise SAM", AAAI 2025 (arXiv 2412.13715).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SSESAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], eta=20, switch_step=70, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    eta = option(100, "Classes with fewer samples than this are tail.", ge=0)
    tail_rho = option(None, "The tail's radius in both stages; None: each group's ``rho``.", ge=0, optional=True)
    switch_step = option(
        None,
        "The number of steps of stage 1 (the published recipe: 0.7 of all); None: stage 2 never comes.",
        ge=0,
        integer=True,
        optional=True,
    )
    weight_options = ("class_counts", "eta")
    phases_are_fixed = False

    def make_class_weights(self) -> tuple[Tensor, Tensor] | None:
        tail = self.tail_of_steps()
        return None if tail is None else (~tail, tail)

    def rule(self, step: Step) -> Rule:
        head, tail = step.class_weights()
        first_stage = self.switch_step is None or step.number < self.switch_step
        g_h, g_t = yield AtWeights(head, tail, kept=0 if first_stage else 1)
        if first_stage:
            step.ascend(g_h)
            g_h = yield AtPerturbed(head, last=False)
        step.ascend(g_t, rho=self.tail_rho)
        g_p = yield AtPerturbed(tail, plus=g_h)
        step.descend(g_p)

    def fourth_step(self) -> None:
        """Stage 1's last phase: steps with the gradients at both perturbed weights, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("fourth_step", True)
