"""GNM: Gaussian noise in place of an ascent gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_count, check_factor, check_seed
from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.batch import Batch, Scaling, mean_loss
from ltsam_fast.optim.fused import begin_of, local_of
from ltsam_fast.optim.sam import SAM


class GNM(SharpnessAware):
    r"""Gaussian neighborhood minimization: descend with the gradient at weights with a little noise.

    .. code-block:: text

        e   = clamp(N(0, (1/3)^2), -clip, clip) * rho * dis_mul       for each weight
        w  <- base_step(w, grad L(w + e))

    One forward and one backward a step; 36 bytes moved per fp32 parameter with SGD and momentum, in two passes. The noise is
    made inside the pass by a counter-based generator: the same for a seed on every backend, and nothing of it is stored.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Must be False: the noise does not look at the weights.
        dis_mul: Factor of the noise, >= 0.
        clip: Bound of the noise before it is multiplied, >= 0.
        decay_every: Halve the noise each time so many steps were taken, or so many epochs, where ``first_step`` is told the
            epoch, counted from 1; ``None``: never (the poster's equations).
        seed: Seed of the noise, in [0, 2^53).
        model: Taken for the sake of one signature. Running statistics see the only pass there is, at the noisy weights.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho``, ``dis_mul`` or ``clip`` is negative or not finite, ``decay_every`` is not positive, or
            ``adaptive`` is set. From the first step: a lazy module's weights are not there yet.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: parameters without a gradient come back too; epoch 0 does not have twice the noise
    (in ``ltsam_fast.compat.GNM`` it has). The loss returned is the one at w + e, for there is no other.

    Source: GNM-PT, "Gaussian Neighborhood Minimization Prompt Tuning", NeurIPS 2024 (arXiv 2410.21042), eqs. 1-3 of its poster.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = GNM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    phases = ("first_step", "second_step")
    _kept = (*SharpnessAware._kept, "dis_mul", "clip", "decay_every", "seed")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        dis_mul: float = 0.1,
        clip: float = 1.0,
        decay_every: int | None = None,
        seed: int = 0,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.dis_mul, self.clip = check_factor("dis_mul", dis_mul), check_factor("clip", clip)
        self.decay_every = None if decay_every is None else check_count("decay_every", decay_every)
        self.seed = check_seed(seed)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["adaptive"]:
            raise ValueError("adaptive must be False for GNM: its noise does not look at the weights")

    def _halvings(self, epoch: int | None) -> int:
        if self.decay_every is None:
            return 0
        return (self._taken if epoch is None else max(0, epoch - 1)) // self.decay_every

    def _add_noise(self, epoch: int | None = None) -> None:
        params, groups = self._parameters(ascent=True)
        moving = [i for i, param in enumerate(params) if param.requires_grad]
        params, groups = [params[i] for i in moving], [groups[i] for i in moving]
        factor = self.dis_mul * 0.5 ** self._halvings(epoch)
        amplitude = tuple(rho * factor for rho in self._hyper("rho"))

        offsets = [begin_of(param) for param in params] if self._sharded else None

        def perturb(backups: list[Tensor]) -> None:
            ops.gaussian_perturb_(
                local_of(params, self._sharded), backups, amplitude=amplitude, clip=self.clip, seed=self.seed,
                step=self._taken, skipped=self._skipped_steps(), offsets=offsets, groups=groups,
                table=self._table("gaussian_perturb_"),
            )  # fmt: skip

        self._perturb(params, groups, perturb)

    @torch.no_grad()
    def first_step(
        self, epoch: int | None = None, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Adds the noise. Then evaluate the loss and call ``backward()``.

        Args:
            epoch: Counts for ``decay_every``, from 1.
            zero_grad: Also clear the gradients.
            scaler: The GradScaler that scales the loss, for the whole step: see :meth:`SharpnessAware.step`.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("first_step", lambda *_: self._add_noise(epoch), scaler)
        if zero_grad:
            self._clear_gradients()

    second_step = SAM.second_step

    def _freeze_statistics(self) -> None:
        """The pass at noisy weights is the only one."""

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        self._add_noise()
        self._backward_mean(parts, scaling, last=True)
        self._descend(*scaling.signals)
        return mean_loss(parts)
