"""m-SAM: every micro-batch climbs for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_count
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.batch import Batch, Scaling, check_takes_index, mean_loss
from ltsam_fast.optim.gradients import _swap_gradients


class MSAM(SharpnessAware):
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

    With ``ascent_sync=True`` the i-th micro-batches of all workers climb along their mean; all workers must have as many.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbations by the weights, as ASAM does.
        m: Samples in a micro-batch, >= 1.
        model: If given, running statistics of normalization layers see the unperturbed passes only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite, or ``m`` < 1.
        TypeError: ``base_optimizer`` is not a class.

    Source: Foret et al. 2021 (SAM), section 4.1, m-sharpness; Behdin et al., "mSAM" (arXiv 2302.09693), Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = MSAM(model.parameters(), torch.optim.SGD, rho=0.1, m=4, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> def closure(index=slice(None)):
    ...     return torch.nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")
    >>> loss = opt.step(closure)
    """

    _counts_passes = True
    _kept = (*SharpnessAware._kept, "m")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        m: int,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.m = check_count("m", m)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    def _check_climbs(self, number: int, device: torch.device) -> None:
        """Raises ValueError on all workers unless they climb as often: else averages of different parts would meet."""
        ends = torch.tensor([number, -number], device=device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, self._process_group)
        most, least = ends.tolist()
        if most != -least:
            raise ValueError(
                f"ascent_sync must be False unless all workers have as many parts of m = {self.m} samples, "
                f"got {-least} to {most}: leave it out, or give them batches of one size"
            )

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        check_takes_index(parts, "MSAM")
        params, _ = self._parameters()
        for part in parts:
            if part.size < 0:
                part.evaluate(at_w=False, graph=False)
        if self.ascent_sync and self._distributed:
            self._check_climbs(sum(-(-part.size // self.m) for part in parts), params[0].device)
        size = sum(part.size for part in parts)
        total: list[Tensor | None] = [None] * len(params)
        for part in parts:
            for first in range(0, part.size, self.m):
                past = min(first + self.m, part.size)
                numbers = torch.arange(first, past, device=params[0].device)
                if self._climbed:
                    self._come_back()
                with self._local():
                    losses = part.evaluate(numbers)
                    torch.autograd.backward(losses, scaling(torch.full_like(losses, 1 / len(losses))))
                self._climb(*scaling.signals)
                _swap_gradients(params, total)  # the next backward adds to what the others left
                with self._local(last=part is parts[-1] and past == part.size and not self._finds_unused):
                    losses = part.evaluate(numbers, at_w=False)
                    torch.autograd.backward(losses, scaling(torch.full_like(losses, 1 / size)))
                total = _swap_gradients(params, [None] * len(params))
        _swap_gradients(params, total)
        if self._finds_unused:  # DDP would take the gradients at w of other parts for some of the sum
            self._average(params)
        self._descend(*scaling.signals)
        return mean_loss(parts)
