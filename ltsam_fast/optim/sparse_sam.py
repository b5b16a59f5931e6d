"""Sparse SAM: perturb only the coordinates that matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_choice, check_count, check_factor, check_seed
from ltsam_fast.optim import masks
from ltsam_fast.optim.batch import Batch, Scaling
from ltsam_fast.optim.gradients import _gradients, check_all_dense
from ltsam_fast.optim.sam import SAM


class SparseSAM(SAM):
    r"""Sparse sharpness-aware minimization: a binary mask on the perturbation.

    .. code-block:: text

        eps = mask * rho * g / (|g| + 1e-12)      |g| of the whole gradient; (1 - sparsity) N coordinates have mask 1
        w  <- base_step(w, grad L(w + eps))

    The mask is renewed every ``refresh_every`` steps, before the perturbation, from step 0 on. "fisher": the coordinates
    with the largest empirical Fisher information, the mean of the squared gradients of ``num_samples`` single samples of the
    batch (a backward each; with ``ascent_sync=True`` of each worker's). "dynamic": at random at first; then ``drop_rate`` of
    the perturbed coordinates, those with the smallest gradients, are exchanged for as many others at random.

    Two forwards and two backwards a step; 40 bytes moved per fp32 parameter with SGD and momentum, and a bit for the mask.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        sparsity: Share of the coordinates, over all parameters together, that are not perturbed, in [0, 1).
        mask: "fisher" or "dynamic".
        refresh_every: Steps from one mask to the next, >= 1.
        drop_rate: Share that a "dynamic" mask exchanges, in [0, 1).
        total_steps: If given, ``drop_rate`` falls to 0 along a cosine over so many steps.
        num_samples: Samples for "fisher", >= 1; no more than the (first part of the) batch has.
        seed: Seed of the dynamic masks.
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: A number is out of its range, or ``mask`` is neither "fisher" nor "dynamic".
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: the first mask is there before the first step; a "dynamic" mask keeps its size, where
    the published one drops more coordinates than there are to take in at its default sparsity, and shrinks; samples for
    "fisher" come from the batch at hand, so that running statistics are not moved. With the phases a "fisher" mask needs
    ``refresh_mask(losses)``.

    Source: Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022
    (arXiv 2210.05177), Algorithms 1-3.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SparseSAM(model.parameters(), torch.optim.SGD, rho=0.1, sparsity=0.5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    _buffers = ("frozen",)
    _takes_shards = False
    _twice = True
    _kept = (
        *SAM._kept, "sparsity", "mask", "refresh_every", "drop_rate", "total_steps", "num_samples", "seed",
    )  # fmt: skip

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        sparsity: float = 0.5,
        mask: str = "fisher",
        refresh_every: int = 100,
        drop_rate: float = 0.5,
        total_steps: int | None = None,
        num_samples: int = 16,
        seed: int = 0,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        self.sparsity = check_factor("sparsity", sparsity, below=1.0)
        check_choice("mask", mask, ("fisher", "dynamic"))
        self.mask = mask
        self.refresh_every = check_count("refresh_every", refresh_every)
        self.drop_rate = check_factor("drop_rate", drop_rate, below=1.0)
        self.total_steps = None if total_steps is None else check_count("total_steps", total_steps)
        self.num_samples = check_count("num_samples", num_samples)
        self.seed = check_seed(seed)
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)

    def _forget(self) -> None:
        super()._forget()
        self._refreshed = False
        self._masks: list[tuple[Tensor, Tensor]] = []  # those that this step changed, and what they were
        self._begun: Tensor | None = None

    def _create_buffers(self, params: list[Tensor]) -> None:
        sizes = [param.numel() for param in params]
        everything = torch.ones(sum(sizes), dtype=torch.bool, device=params[0].device)
        for param, bits in zip(params, masks.to_bits(everything, sizes), strict=True):
            self.state[param].setdefault("frozen", bits)

    def _candidates(self) -> list[Tensor]:
        return [param for param in self._parameters(ascent=True)[0] if param.requires_grad]

    @torch.no_grad()
    def refresh_mask(self, losses: Tensor) -> None:
        """Makes a "fisher" mask from the per-sample losses of a forward pass at w, shape (B,), whose graph is kept."""
        self._set_fisher_mask(losses, torch.ones_like(losses))

    def _set_fisher_mask(self, losses: Tensor, scale: Tensor) -> None:
        scores = masks.fisher(losses, self._candidates(), scale, self.num_samples, self._everything())
        if self.ascent_sync and self._distributed:
            self._add_up([scores])
        self._keep(masks.largest(scores, self._count(scores)))

    def _count(self, scores: Tensor) -> int:
        """Coordinates that climb."""
        return int(len(scores) * (1 - self.sparsity))

    def _keep(self, moving: Tensor) -> None:
        params = self._candidates()
        for param, bits in zip(params, masks.to_bits(moving, [p.numel() for p in params]), strict=True):
            # In place, where CUDA graphs look for them.
            if "frozen" in self.state[param]:
                self._masks.append((self.state[param]["frozen"], self.state[param]["frozen"].clone()))
            self.state[param].setdefault("frozen", bits).copy_(bits)

    def _mask_now(self) -> Tensor:
        """True for the coordinates that climb, shape (N,)."""
        params = self._candidates()
        return masks.from_bits([self.state[p]["frozen"] for p in params], [p.numel() for p in params])

    def _set_dynamic_mask(self) -> None:
        params = self._candidates()
        check_all_dense(_gradients(params))
        device = params[0].device
        generator = torch.Generator(device).manual_seed(self.seed + 0x9E3779B9 * int(self._taken))
        size = sum(p.numel() for p in params)
        chance = torch.rand(size, dtype=torch.float32, generator=generator, device=device)
        count = self._count(chance)
        if not self._taken or any("frozen" not in self.state[param] for param in params):
            self._keep(masks.largest(chance, count))
            return
        rate = self.drop_rate
        if self.total_steps is not None:
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, self._taken / self.total_steps)))
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, _gradients(params), strict=True)]
        exchanged = min(int(rate * count), len(chance) - count)
        self._keep(masks.exchange(self._mask_now(), masks.joined(grads).abs(), chance, exchanged))

    def _examine(self, losses: Tensor, scaling: Scaling) -> None:
        if self.mask == "fisher" and self._due and not self._refreshed:  # of a batch in parts the first one serves
            self._set_fisher_mask(losses, scaling(torch.ones_like(losses)))
            self._refreshed = True

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        self._refreshed = False
        return super()._whole_step(parts, scaling)

    @property
    def _due(self) -> bool:
        params = self._candidates()
        if not params:
            return False
        if self._taken % self.refresh_every == 0 or any("frozen" not in self.state[param] for param in params):
            return True  # at a weight that was thawed, too
        return self._begins_anew()

    def _begins_anew(self) -> bool:
        """Whether the first mask of all was made from gradients that overflowed."""
        if self._begun is not None and not bool(self._begun):
            self._begun = None
        return self._begun is not None

    def _ascent(
        self, params: list[Tensor], grads: list[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Any]:
        if self.mask == "dynamic" and self._due:
            self._set_dynamic_mask()
        frozen = [self.state[param].get("frozen") for param in params]
        if any(bits is None for bits in frozen):
            raise ValueError('mask "fisher" needs per-sample losses: call refresh_mask(losses) before first_step()')
        return {"mask": frozen}

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if self._refreshed and (self._begun is not None or not self._masks):
            self._begun = found_inf
        super()._descend(grad_scale, found_inf)
        if found_inf is not None:
            for now, before in self._masks:
                now.copy_(torch.where(found_inf.bool(), before, now))
        self._masks = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for one in self.state.values():  # torch's load_state_dict turns the masks into floating point
            if "frozen" in one:
                one["frozen"] = one["frozen"].to(torch.uint8)
