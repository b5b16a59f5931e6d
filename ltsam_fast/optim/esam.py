"""ESAM: perturb some of the weights, and descend with some of the samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_choice, check_seed, check_share
from ltsam_fast.optim.ascent import sign_of_all
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.batch import Batch, Scaling, check_takes_index, mean_loss


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

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        beta: Share of the weights that are perturbed, in (0, 1].
        gamma: Share of the samples that are kept, in (0, 1]; 1 saves the forward without gradients.
        granularity: "element": a draw for each coordinate, as in the paper; "tensor": for each parameter tensor, as in the
            published code, where the others are left out of the norm too.
        seed: Seed of the draws, in [0, 2^53).
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite, a share is not in (0, 1], or ``granularity`` is unknown.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: exactly ceil(gamma B) samples are kept, never none; 1e-12 is added to the norm, not
    1e-7.

    Source: Du et al., "Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks", ICLR 2022
    (arXiv 2110.03141), Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = ESAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> def closure(index=slice(None)):
    ...     return torch.nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")
    >>> loss = opt.step(closure)
    """

    _kept = (*SharpnessAware._kept, "beta", "gamma", "granularity", "seed")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        beta: float = 0.6,
        gamma: float = 0.5,
        granularity: str = "element",
        seed: int = 0,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.beta, self.gamma = check_share("beta", beta), check_share("gamma", gamma)
        check_choice("granularity", granularity, ("element", "tensor"))
        self.granularity, self.seed = granularity, check_seed(seed)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    def _parameters(self, ascent: bool = False) -> tuple[list[Tensor], list[int]]:
        params, groups = super()._parameters(ascent)
        if ascent and self.granularity == "tensor":
            generator = torch.Generator().manual_seed(self.seed + 0x9E3779B9 * int(self._taken))
            drawn = (torch.rand(len(params), dtype=torch.float32, generator=generator) < self.beta).tolist()
            params = [param for param, one in zip(params, drawn, strict=True) if one]
            groups = [group for group, one in zip(groups, drawn, strict=True) if one]
        return params, groups

    def _ascent(
        self, params: list[Tensor], grads: list[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"rho": tuple(rho / self.beta for rho in self._hyper("rho"))}
        if self.granularity == "element" and self.beta < 1:
            options |= {"probability": self.beta, "seed": self.seed, "step": self._taken}
        return options

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        sign = sign_of_all(self.param_groups)
        if self.gamma < 1:
            check_takes_index(parts, "ESAM")
        before = self._backward_mean(parts, scaling)
        self._climb(*scaling.signals)
        self._clear_gradients()
        indices: list[Tensor | None] = [None] * len(parts)
        if self.gamma < 1:
            for i, part in enumerate(parts):
                with self._local():
                    rise = (part.evaluate(at_w=False, graph=False) - before[i]) * sign
                indices[i] = rise.topk(math.ceil(self.gamma * part.size)).indices
        size = sum(part.size if index is None else len(index) for part, index in zip(parts, indices, strict=True))
        for part, index in zip(parts, indices, strict=True):
            with self._local(last=part is parts[-1]):
                losses = part.evaluate(index, at_w=False)
                torch.autograd.backward(losses, scaling(torch.full_like(losses, 1 / size)))
        self._descend(*scaling.signals)
        return mean_loss(parts)
