"""Sparse SAM's masks: which coordinates are perturbed, over all parameters together, kept as a bit for each element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ltsam_fast.optim.gradients import Differentiable, check_all_dense


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a tensor without holes, flat, in the order in which they lie."""
    return tensor.as_strided((tensor.numel(),), (1,))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of all tensors, shape (N,), fp32."""
    return torch.cat([in_memory_order(tensor).float() for tensor in tensors])


def largest(scores: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest scores."""
    chosen = scores.topk(count, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)


def to_bits(moving: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each tensor of ``sizes`` elements the bits of those that do *not* move, as ``ops.perturb_`` takes them."""
    places = 2 ** torch.arange(8, device=moving.device, dtype=torch.uint8)
    return [
        (torch.nn.functional.pad(~one, (0, -len(one) % 8)).view(-1, 8) * places).sum(1, dtype=torch.uint8)
        for one in moving.split(list(sizes))
    ]


def from_bits(bits: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The reverse of :func:`to_bits`."""
    places = torch.arange(8, device=bits[0].device, dtype=torch.uint8)
    return torch.cat([((one[:, None] >> places) & 1 == 0).flatten()[:n] for one, n in zip(bits, sizes, strict=True)])


def fisher(
    losses: Tensor, params: Sequence[Tensor], scale: Tensor, samples: int, others: Iterable[Tensor] = ()
) -> Tensor:
    """The diagonal of the empirical Fisher information, up to a factor: the sum of squared gradients of single samples.

    Args:
        losses: (B,), with their graph, which is kept.
        params: T weights.
        scale: (B,), factors of the losses.
        samples: How many of the losses are used.
        others: Further weights that the losses may depend on.

    Returns:
        (N,), fp32. Source: Mi et al. 2022, section 4.2.
    """
    scores = [torch.zeros_like(param, dtype=torch.float32, requires_grad=False) for param in params]
    at_w = Differentiable(losses, params, others)
    for sample in torch.eye(len(losses), dtype=losses.dtype, device=losses.device)[:samples]:
        check_all_dense(grads := at_w.gradients(sample * scale))
        for score, grad in zip(scores, grads, strict=True):
            if grad is not None:
                score.addcmul_(grad.float(), grad.float())
    return joined(scores)


def exchange(moving: Tensor, size: Tensor, draws: Tensor, count: int) -> Tensor:
    """Drops the ``count`` coordinates of smallest ``size`` and takes in as many others at random (Mi et al. 2022, Alg. 3)."""
    dropped = size.masked_fill(~moving, math.inf).topk(count, largest=False, sorted=False).indices
    grown = draws.masked_fill(moving, -1.0).topk(count, sorted=False).indices
    return moving.index_fill(0, dropped, False).index_fill_(0, grown, True)
