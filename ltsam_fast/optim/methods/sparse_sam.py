"""Sparse SAM: perturb only the coordinates that matter."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.optim import masks
from ltsam_fast.optim.gradients import Gradient, check_all_dense
from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtPerturbed, AtWeights, Step


@registered("sparse_sam", "sparse SAM")
class SparseSAM(SharpnessAware):
    r"""Sparse sharpness-aware minimization: a binary mask on the perturbation.

    .. code-block:: text

        eps = mask * rho * g / (|g| + 1e-12)      |g| of the whole gradient; (1 - sparsity) N coordinates have mask 1
        w  <- base_step(w, grad L(w + eps))

    The mask is renewed every ``refresh_every`` steps, before the perturbation, from step 0 on. "fisher": the coordinates
    with the largest empirical Fisher information, the mean of the squared gradients of ``num_samples`` single samples of the
    batch (a backward each; with ``ascent_sync=True`` of each worker's). "dynamic": at random at first; then ``drop_rate`` of
    the perturbed coordinates, those with the smallest gradients, are exchanged for as many others at random.

    Two forwards and two backwards a step; 40 bytes moved per fp32 parameter with SGD and momentum, and a bit for the mask.

    Differences from the published code: the first mask is there before the first step; a "dynamic" mask keeps its size, where
    the published one drops more coordinates than there are to take in at its default sparsity, and shrinks; samples for
    "fisher" come from the batch at hand, so that no further batch is read. With the phases a "fisher" mask needs
    ``refresh_mask(losses)``.

    Source: Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022
    (arXiv 2210.05177), Algorithms 1-3.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SparseSAM(model.parameters(), torch.optim.SGD, rho=0.1, sparsity=0.5, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
    """

    sparsity = option(
        0.5, "Share of the coordinates, over all parameters together, that are not perturbed.", ge=0, lt=1
    )
    mask = option("fisher", "How coordinates are chosen.", choices=("fisher", "dynamic"))
    refresh_every = option(100, "Steps from one mask to the next.", ge=1, integer=True)
    drop_rate = option(
        0.5,
        'Share that a "dynamic" mask exchanges; given ``total_steps``, it falls to 0 along a cosine over so many steps.',
        ge=0,
        lt=1,
    )
    num_samples = option(
        16, 'Samples for "fisher"; no more than the (first part of the) batch has.', ge=1, integer=True
    )
    seed = option(0, "Seed of the dynamic masks.", ge=0, lt=2**53, integer=True)

    buffers = ("mask",)
    published_state = MappingProxyType({"frozen": "mask"})
    whole_gradients = True
    several_gradients = True

    def rule(self, step: Step) -> Rule:
        due = step.lacks("mask") or step.number % self.refresh_every == 0
        if due and self.mask == "fisher":
            g, fisher = yield AtWeights(squares=self.num_samples)
            if fisher is not None:
                step.set_mask("mask", masks.largest, fisher, self._count(fisher))
            elif step.lacks("mask"):
                raise ValueError('mask "fisher" needs per-sample losses: call refresh_mask(losses) before first_step()')
        else:
            g = yield AtWeights()
            if due:
                step.set_mask("mask", self._exchanged, g, step.number)
        step.ascend(g, mask="mask")
        g_p = yield AtPerturbed()
        step.descend(g_p)

    @torch.no_grad()
    def refresh_mask(self, losses: Tensor) -> None:
        """Makes a "fisher" mask from the per-sample losses of a forward pass at w, shape (B,), whose graph is kept."""
        scores = masks.fisher(
            losses, self.ascent_params(), torch.ones_like(losses), self.num_samples, self.all_weights()
        )
        self.set_mask("mask", masks.largest(scores, self._count(scores)))

    def _count(self, scores: Tensor) -> int:
        """Coordinates that are perturbed."""
        return int(len(scores) * (1 - self.sparsity))

    def _exchanged(self, g: Gradient, number: int) -> Tensor:
        """A "dynamic" mask: the first one at random, a later one with some coordinates exchanged."""
        chosen = {param: grad for param, grad in zip(self.all_params()[0], g.tensors, strict=True)}
        params = self.ascent_params()
        check_all_dense(chosen[param] for param in params)
        size, device = sum(param.numel() for param in params), params[0].device
        generator = torch.Generator(device).manual_seed(self.seed + 0x9E3779B9 * number)
        draws = torch.rand(size, dtype=torch.float32, generator=generator, device=device)
        count = self._count(draws)
        if not number or any("mask" not in self.state[param] for param in params):
            return masks.largest(draws, count)
        rate = self.drop_rate
        if self.total_steps is not None:
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, number / self.total_steps)))
        grads = [torch.zeros_like(param) if chosen[param] is None else chosen[param] for param in params]
        now = masks.from_bits([self.state[param]["mask"] for param in params], [param.numel() for param in params])
        return masks.exchange(now, masks.joined(grads).abs(), draws, min(int(rate * count), size - count))  # type: ignore[arg-type]

    def create_buffers(self, params: list[Tensor]) -> None:
        sizes = [param.numel() for param in params]
        everything = torch.ones(sum(sizes), dtype=torch.bool, device=params[0].device)
        for param, bits in zip(params, masks.to_bits(everything, sizes), strict=True):
            self.state[param].setdefault("mask", bits)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for one in self.state.values():  # torch's load_state_dict turns the masks into floating point
            if "mask" in one:
                one["mask"] = one["mask"].to(torch.uint8)
