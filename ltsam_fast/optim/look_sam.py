"""LookSAM: climb only every k-th step and reuse the part of the gradient that climbing adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_count, check_factor
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.fused import local_of
from ltsam_fast.optim.gradients import _gradients


class LookSAM(SharpnessAware):
    r"""Sharpness-aware minimization with a look ahead every k-th step.

    .. code-block:: text

        t = 0, k, 2k, ...:  eps = rho * g / (|g| + 1e-12),  g_s = grad L(w + eps)
                            g_v = g_s - <g_s, g> / |g|^2 * g
                            w  <- base_step(w, g_s)
        other steps:        w  <- base_step(w, g + alpha * |g| / |g_v| * g_v)

    Two forwards and two backwards every k-th step, else one; per fp32 parameter with SGD and momentum 64 bytes moved every
    k-th step, else 32. The decomposition is over the whole gradient, not tensor by tensor.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        k: Climb every k-th step, >= 1; 1 is SAM.
        alpha: Weight of the part that is reused, >= 0.
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` or ``alpha`` is negative or not finite, or ``k`` < 1.
        TypeError: ``base_optimizer`` is not a class.

    Source: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022 (arXiv 2203.02714),
    Algorithm 1.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = LookSAM(model.parameters(), torch.optim.SGD, rho=0.1, k=5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    _mixes = True
    _buffers = ("grad_v",)
    _kept = (*SharpnessAware._kept, "k", "alpha")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        k: int = 5,
        alpha: float = 0.7,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.k, self.alpha = check_count("k", k), check_factor("alpha", alpha)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    @property
    def _looks(self) -> bool:
        """Whether this step climbs."""
        return self._taken % self.k == 0

    @property
    def _one_pass(self) -> bool:  # type: ignore[override]
        return not self._looks

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor | None]:
        ones = torch.ones_like(losses)
        return (None, ones) if self._looks else (ones, None)

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        super()._climb(grad_scale, found_inf)
        if self.k > 1:
            self._keep_gradients()

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        params, _ = self._parameters()
        if self._clean:
            self._decompose(params, _gradients(params), self._clean, found_inf)
            self._clean = []
        elif not self._looks:
            self._clean = [self.state[param].get("grad_v") for param in params]
        super()._descend(grad_scale, found_inf)

    def _decompose(
        self, params: list[Tensor], sharp: list[Tensor | None], clean: list[Tensor | None], found_inf: Tensor | None
    ) -> None:
        """Keeps g_v, the part of g_s that is orthogonal to g."""
        chosen = [i for i, grad in enumerate(sharp) if grad is not None]
        for i in chosen:
            state = self.state[params[i]]
            if "grad_v" not in state:
                state["grad_v"] = torch.zeros_like(params[i], requires_grad=False)
        sharp, clean = [sharp[i] for i in chosen], [clean[i] for i in chosen]
        square_s, square, dot = self._dots(sharp, clean)
        if found_inf is not None:  # the last pass has not been looked at yet
            found_inf.masked_fill_(~square_s.isfinite(), 1.0)
        along = torch.where(square > 0, dot / square, torch.zeros_like(dot))
        mix = torch.stack([torch.ones_like(along), -along, torch.zeros_like(along), torch.zeros_like(along)])
        ops.combine_(
            local_of([self.state[params[i]]["grad_v"] for i in chosen], self._sharded), local_of(sharp, self._sharded),
            local_of(clean, self._sharded), mix, found_inf=found_inf,
            table=self._table("combine_"),
        )  # fmt: skip

    def _mix(self, grads: list[Tensor | None], kept: list[Tensor | None]) -> Tensor:
        square, square_v, _ = self._dots(grads, kept, " of the step")
        reused = torch.where(square_v > 0, self.alpha * (square / square_v).sqrt(), torch.zeros_like(square))
        nothing = torch.zeros_like(reused)
        return torch.stack([nothing + 1, reused, nothing, nothing])
