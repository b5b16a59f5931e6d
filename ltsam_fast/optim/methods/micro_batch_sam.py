"""m-SAM: every micro-batch has a perturbation of its own."""

from __future__ import annotations

from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("micro_batch_sam", "micro-batch SAM")
class MicroBatchSAM(SharpnessAware):
    r"""m-sharpness-aware minimization: a perturbation for each micro-batch of m samples, one step with the mean gradient.

    .. code-block:: text

        for each micro-batch i of m samples (the last may be smaller):
            eps_i = rho * g_i / (|g_i| + 1e-12)              g_i = grad of its mean loss at w
        w <- base_step(w, sum_i (m_i / B) * grad of its mean loss at w + eps_i)

    Two forwards and two backwards for each micro-batch, which is two of each for the whole batch; per fp32 parameter with SGD
    and momentum 28 bytes moved for each micro-batch and 24 for the step.

    The closure takes an index: ``closure(index)`` returns the losses of the samples with these numbers, a 1-D LongTensor. The
    micro-batches are the method's definition: batch norm normalizes by each of them.
    Without ``targets`` it is first called without index and without gradients, to see how many samples there are.

    With ``ascent_sync=True`` the i-th micro-batches of all workers ascend along their mean; all workers must have as many.

    Source: Foret et al. 2021 (SAM), section 4.1, m-sharpness; Behdin et al., "mSAM" (arXiv 2302.09693), Algorithm 1.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = MicroBatchSAM(model.parameters(), torch.optim.SGD, rho=0.1, m=4, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> def closure(index=slice(None)):
    ...     return torch.nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")
    >>> loss = opt.step(closure)
    """

    m = option(32, "Samples in a micro-batch.", ge=1, integer=True)

    evaluates_at_w = False
    own_reductions = True
    needs_index = True

    def rule(self, step: Step) -> Rule:
        for part in step.micro_batches(self.m):
            g = yield AtWeights(of=part)
            step.ascend(g)
            g_p = yield AtPerturbed(of=part, accumulate=True)
            if not part.last:
                step.restore()
        step.descend(g_p)
