"""Finds which sample each row of a gradient belongs to, by comparing two backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ELEMENTS = 4096
"""The number of elements of each gradient that are compared."""
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
"""The largest relative difference between equal gradients; 1e-2 for 16 bits.

Seeds are powers of two, so only atomic additions cause a difference."""


@dataclass(frozen=True)
class Layout:
    """Index i along dimension ``dim``, of size outer * B * inner, belongs to sample (i // inner) % B.

    -1 as ``outer`` or ``inner``: what follows from the size of the dimension. Neither, where both are 1: a longer dimension may
    have either.
    """

    dim: int
    outer: int
    inner: int

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Whether a gradient of this shape can have this layout."""
        size, known = shape[self.dim], batch * abs(self.outer * self.inner)
        return size % known == 0 if -1 in (self.outer, self.inner) else size == known

    def rows(self, weights: Tensor, like: Tensor) -> Tensor:
        """Returns the samples' weights (B,) as a tensor that broadcasts over ``like``."""
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


class SampledElements:
    """Nonzero elements of a gradient, and their indices: drawn at random, with the same seed every time."""

    def __init__(self, grad: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        flat = grad.reshape(-1)
        indices = torch.randint(max(len(flat), 1), (min(2 * MAX_ELEMENTS, len(flat)),), generator=generator)
        indices = indices[(flat[indices.to(grad.device)] != 0).cpu()]
        if 2 * len(indices) < min(MAX_ELEMENTS, len(flat)):  # most elements are zero: draw from the others
            indices = flat.nonzero().flatten().cpu()
            if len(indices) > MAX_ELEMENTS:
                indices = indices[torch.randint(len(indices), (MAX_ELEMENTS,), generator=generator)]
        self.shape, self.dtype = grad.shape, grad.dtype
        self.indices = torch.unravel_index(indices, grad.shape) if grad.dim() else ()
        self.values = self._of(grad)

    def _of(self, grad: Tensor) -> Tensor:
        return grad[tuple(one.to(grad.device) for one in self.indices)].double().cpu().reshape(-1)

    def __len__(self) -> int:
        return len(self.values) if self.shape else 0

    def layouts(self, grad: Tensor, seeds: Tensor) -> list[Layout]:
        """Returns the layouts for which ``grad`` equals this gradient, of unit seeds, with rows scaled by ``seeds`` (B,)."""
        found, other = [], self._of(grad)
        tolerance = TOLERANCE.get(self.dtype, 1e-2) * float(other.norm())
        batch = len(seeds)
        for dim, size in enumerate(self.shape):
            for inner in range(size // batch, 0, -1):
                if size % (batch * inner):
                    continue
                scales = seeds[self.indices[dim] // inner % batch]
                if float((other - scales * self.values).norm()) <= tolerance:
                    outer = size // (batch * inner)
                    if outer == inner == 1:
                        found.append(Layout(dim, 1, 1))
                    else:
                        found.append(
                            Layout(dim, 1 if outer == 1 else -1 if inner == 1 else outer, -1 if outer == 1 else inner)
                        )
        return found


def distinct_seeds(batch: int) -> Tensor:
    """Returns seeds (B,), float64, powers of two: scaling by them is exact."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return 2.0 ** (order % 7 - 3).double()
