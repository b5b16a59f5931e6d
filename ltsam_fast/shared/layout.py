"""Which sample each row of a gradient belongs to, found out by comparing two backward sweeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED = 4096
"""Elements of each gradient that are compared."""
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Relative difference up to which gradients agree; 1e-2 for 16 bits.

Seeds are powers of two, so only atomics leave any."""


@dataclass(frozen=True)
class Layout:
    """Along dimension ``dim`` of size outer * B * inner, index i belongs to sample (i // inner) % B; -1: what B leaves."""

    dim: int
    outer: int
    inner: int

    def rows(self, weights: Tensor, like: Tensor) -> Tensor:
        """Weights (B,) of the samples as a tensor that broadcasts over ``like``."""
        size, batch = like.shape[self.dim], len(weights)
        inner = size // (batch * self.outer) if self.inner < 0 else self.inner
        outer = size // (batch * inner) if self.outer < 0 else self.outer
        if outer * batch * inner != size:
            raise ValueError(
                f"closure's batch of {batch} samples does not divide a gradient of shape {tuple(like.shape)}"
            )
        if inner > 1:
            weights = weights.repeat_interleave(inner, output_size=batch * inner)
        if outer > 1:
            weights = weights.repeat(outer)
        return weights.view([-1 if d == self.dim else 1 for d in range(like.dim())])


class Sample:
    """Some elements of a gradient that are not zero, and where they lie: at random, the same ones every time."""

    def __init__(self, grad: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        flat = grad.reshape(-1)
        places = torch.randint(max(len(flat), 1), (min(2 * SAMPLED, len(flat)),), generator=generator)
        places = places[(flat[places.to(grad.device)] != 0).cpu()]
        if 2 * len(places) < min(SAMPLED, len(flat)):  # most elements are zero: all that are not, or as many of them
            places = flat.nonzero().flatten().cpu()
            if len(places) > SAMPLED:
                places = places[torch.randint(len(places), (SAMPLED,), generator=generator)]
        self.shape, self.dtype = grad.shape, grad.dtype
        self.places = torch.unravel_index(places, grad.shape) if grad.dim() else ()
        self.values = self._of(grad)

    def _of(self, grad: Tensor) -> Tensor:
        return grad[tuple(one.to(grad.device) for one in self.places)].double().cpu().reshape(-1)

    def __len__(self) -> int:
        return len(self.values) if self.shape else 0

    def layouts(self, grad: Tensor, seeds: Tensor) -> list[Layout]:
        """The layouts by which ``grad`` is this gradient, one of unit seeds, with its rows scaled by ``seeds`` (B,)."""
        found, other = [], self._of(grad)
        tolerance = TOLERANCE.get(self.dtype, 1e-2) * float(other.norm())
        batch = len(seeds)
        for dim, size in enumerate(self.shape):
            for inner in range(size // batch, 0, -1):
                if size % (batch * inner):
                    continue
                scales = seeds[self.places[dim] // inner % batch]
                if float((other - scales * self.values).norm()) <= tolerance:
                    outer = size // (batch * inner)
                    found.append(
                        Layout(dim, 1 if outer == 1 else -1 if inner == 1 else outer, -1 if outer == 1 else inner)
                    )
        return found


def distinct_seeds(batch: int) -> Tensor:
    """Seeds (B,), float64, powers of two: scaling by them is exact, so rows agree to the last bit."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return 2.0 ** (order % 7 - 3).double()
