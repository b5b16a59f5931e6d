"""Friendly SAM: the running mean of the gradient is left out of the perturbation."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_factor
from ltsam_fast.optim.fused import local_of
from ltsam_fast.optim.gradients import check_all_dense
from ltsam_fast.optim.sam import SAM


class FriendlySAM(SAM):
    r"""Friendly sharpness-aware minimization.

    .. code-block:: text

        d   = g_t - sigma * m_{t-1}                          g_t = grad L(w)
        eps = rho * d / (|d| + 1e-12)
        m_t = lmbda * m_{t-1} + (1 - lmbda) * g_t            m_1 = g_1; step 1 is plain SAM
        w  <- base_step(w, grad L(w + eps))

    Two forwards and two backwards a step; 52 bytes moved per fp32 parameter with SGD and momentum, in three passes: the mean
    is subtracted in the norm's and updated in the perturbation's.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        sigma: How much of the mean is left out, >= 0.
        lmbda: Decay of the mean, in [0, 1).
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` or ``sigma`` is negative or not finite, or ``lmbda`` is not in [0, 1).
        TypeError: ``base_optimizer`` is not a class.

    Source: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024 (arXiv 2403.12350), Algorithm 1, with the mean of
    the steps before, as in the authors' code (for sigma = 1 the direction is the same).

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    _buffers = ("grad_mean",)
    _published = MappingProxyType({"momentum": "grad_mean"})
    _kept = (*SAM._kept, "sigma", "lmbda")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.sigma = check_factor("sigma", sigma)
        self.lmbda = check_factor("lmbda", lmbda, below=1.0)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    def _forget(self) -> None:
        super()._forget()
        self._begun: tuple[Tensor, list[Tensor]] | None = None
        self._means: list[tuple[Tensor, Tensor]] = []  # those that this step changed, and what they were

    def _begins_anew(self) -> bool:
        if self._begun is not None and not bool(self._begun[0]):
            self._begun = None
        return self._begun is not None

    def _ascent(
        self, params: list[Tensor], grads: list[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Any]:
        if self._begins_anew():  # with means that began in a step that overflowed
            for param in self._begun[1]:  # type: ignore[index]
                self.state[param].pop("grad_mean", None)
        self._begun = None
        # Before the first step a mean is zeros that a checkpoint asked for.
        means = [self.state[param].get("grad_mean") if self._taken else None for param in params]
        means = local_of(means, self._sharded)
        beginning = [i for i, mean in enumerate(means) if mean is None]
        check_all_dense(grads[i] for i in beginning)
        for i in beginning:  # climbs without a mean, which then is the gradient
            scale = 1.0 if grad_scale is None else (1 / grad_scale).to(grads[i])
            mean = self.state[params[i]]["grad_mean"] = torch.zeros_like(params[i], requires_grad=False)
            local_of([mean], self._sharded)[0].copy_(grads[i] * scale)  # type: ignore[union-attr, operator, arg-type]
        if found_inf is not None:  # a later pass may overflow
            self._means = [(mean, mean.clone()) for mean in means if mean is not None]
        if beginning and found_inf is not None:
            self._begun = (found_inf, [params[i] for i in beginning])
        mix = self._constant((1.0, -self.sigma, 0.0, 0.0))
        if grad_scale is not None:  # the mean is of unscaled gradients
            mix = mix * torch.stack([torch.ones_like(grad_scale), grad_scale, grad_scale, grad_scale]).to(mix)
        return {"means": means, "combination": mix, "decay": self.lmbda}

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        super()._descend(grad_scale, found_inf)
        if self._means:
            means, before = (list(tensors) for tensors in zip(*self._means, strict=True))
            self._means = []
            # The old means become the new ones unless the step was skipped, and then are those to be kept.
            whole = self._constant((1.0, 0.0, 0.0, 0.0))
            ops.combine_(before, means, [None] * len(means), whole, found_inf=found_inf)
            ops.restore_(means, before)
