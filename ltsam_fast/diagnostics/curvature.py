"""The largest Hessian eigenvalue of the loss, and slices of the loss around the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltsam_fast.diagnostics.evaluator import Evaluator, LossFn, Prepare
from ltsam_fast.diagnostics.plots import curve, surface
from ltsam_fast.extras import progress_bar
from ltsam_fast.shared.autograd_graph import AutogradGraph


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of a Hessian, as power iteration left it.

    Attributes:
        value: The Rayleigh quotient ``v^T H v``.
        residual: ``||H v - value v||``; an eigenvalue lies within this distance of ``value``.
        converged: Whether the residual is at most ``tolerance`` times the largest magnitude of an eigenvalue found.
        history: The Rayleigh quotient after each product with H.
        vector: The eigenvector ``v`` of norm 1, one tensor for each weight; :func:`loss_slice` takes it as a direction.
    """

    value: float
    residual: float
    converged: bool
    history: list[float]
    vector: list[Tensor]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws ``history`` into the image file ``path``; needs matplotlib."""
        steps = torch.arange(1, len(self.history) + 1)
        curve(path, steps, torch.tensor(self.history), "Hessian-vector product", "Rayleigh quotient")


def top_hessian_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    *,
    classes: Tensor | Sequence[int] | None = None,
    iterations: int = 100,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    prepare: Prepare | None = None,
) -> TopEigenvalue:
    """Returns the largest eigenvalue of the Hessian of the mean loss, by power iteration.

    .. code-block:: text

        v <- random direction, v <- v / ||v||
        repeat: h <- H v (two backwards per batch), value <- v . h, stop if ||h - value v|| <= tolerance |value|
                v <- h / ||h||

    Power iteration finds the eigenvalue of largest magnitude. If that is negative, a second power iteration runs on
    ``H - value I``, whose eigenvalue of largest magnitude belongs to the largest eigenvalue of H. Both share ``iterations`` and
    the scale of ``tolerance``. Two eigenvalues of equal magnitude and opposite sign do not converge. The network is in
    evaluation mode; weights, their ``grad`` and running statistics stay as they are.

    Args:
        model: The network; the Hessian is that of its weights with ``requires_grad``.
        loss_fn: Takes ``model(x)`` and ``y``, returns the loss of each sample, shape (B,); differentiable twice.
        x: Samples, shape (N, ...), on any device; batches are moved to the weights' device.
        y: Their classes, int64, shape (N,).
        classes: Use only the samples of these classes, such as those of the tail; default: all.
        iterations: Maximum number of Hessian-vector products, each a forward and two backwards of all samples.
        tolerance: Relative residual at which to stop, > 0.
        generator: Generator of the first direction.
        batch_size: Samples per forward pass.
        prepare: Turns samples into input, such as ``data.Augment.for_testing(images)`` for uint8 images.

    Raises:
        ValueError: An argument is out of range, there are no samples of these classes, or the network has an activation
            checkpoint with ``use_reentrant=True``.

    Source: Yao et al. 2020 (PyHessian, arXiv 1912.07145), Alg. 2, with a criterion that bounds the error.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> square = lambda out, y: 3 * out.flatten() ** 2
    >>> round(top_hessian_eigenvalue(model, square, torch.ones(4, 1), torch.zeros(4, dtype=torch.long)).value, 4)
    6.0
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    evaluator = Evaluator(model, loss_fn, x, y, classes=classes, batch_size=batch_size, prepare=prepare)
    v = torch.cat([one.flatten() for one in _random(evaluator.params, generator)])
    v /= v.norm()
    history: list[float] = []
    shift = residual = 0.0
    converged = False
    # Attention's fused kernels have no second derivative.
    with evaluator.eval_mode(), sdpa_kernel(SDPBackend.MATH):
        while len(history) < iterations:
            product = _hessian_product(evaluator, v)
            history.append(float(v @ product))
            residual = float((product - history[-1] * v).norm())
            converged = residual <= tolerance * max(abs(history[-1]), abs(shift))
            if converged and (history[-1] >= 0 or shift):
                break
            if converged:
                shift = history[-1]
                # v is the eigenvector of the shift, whose product with H - shift I is zero: begin anew.
                v = torch.cat([one.flatten() for one in _random(evaluator.params, generator)])
                v /= v.norm()
                converged = False
                continue
            v = product - shift * v
            v /= v.norm()
    sizes = [param.numel() for param in evaluator.params]
    vector = [part.view_as(param) for part, param in zip(v.split(sizes), evaluator.params, strict=True)]
    return TopEigenvalue(history[-1], residual, converged, history, vector)


def _hessian_product(evaluator: Evaluator, v: Tensor) -> Tensor:
    total = torch.zeros_like(v)
    for _, losses in evaluator.losses(evaluator.indices):
        if AutogradGraph(losses, []).reentrant:
            raise ValueError(
                "model must not use torch.utils.checkpoint with use_reentrant=True, which has no second derivative: "
                "set use_reentrant=False"
            )
        loss = losses.sum() / len(evaluator.indices)
        grads = torch.autograd.grad(loss, evaluator.params, create_graph=True, materialize_grads=True)
        slope = torch.cat([grad.flatten() for grad in grads]) @ v
        if slope.requires_grad:  # not where the loss is linear in the weights
            products = torch.autograd.grad(slope, evaluator.params, materialize_grads=True)
            total += torch.cat([product.flatten() for product in products])
    return total


@dataclass(frozen=True)
class LossSlice:
    """The loss along one direction or over two.

    Attributes:
        coordinates: Multiples of the directions, shape (steps,), from -radius to radius.
        loss: Mean loss, float64, shape (steps,), or (steps, steps): first direction down, second across.
        directions: One or two lists of one tensor for each weight.
    """

    coordinates: Tensor
    loss: Tensor
    directions: list[list[Tensor]]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws a curve or a contour plot into the image file ``path``; needs matplotlib."""
        if self.loss.ndim == 1:
            curve(path, self.coordinates, self.loss, "along the direction", "mean loss")
        else:
            surface(path, self.coordinates, self.loss, ("first direction", "second direction"), "mean loss")


def loss_slice(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    *,
    directions: int | Sequence[Sequence[Tensor]] = 1,
    radius: float = 1.0,
    steps: int = 21,
    classes: Tensor | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    prepare: Prepare | None = None,
    progress: bool = False,
) -> LossSlice:
    r"""Returns the mean loss on a line or a plane through the weights, :math:`L(w + a d_1 + b d_2)`.

    Random directions are filter-normalized: each filter of ``d`` (one output channel) has the norm of that
    filter of the weights; biases and normalization layers (weights of one dimension) do not move. So slices of networks with
    weights of different scale can be compared. The weights are restored to the last bit, after an error too.

    Args:
        model: The network; its weights with ``requires_grad`` are moved.
        loss_fn: Takes ``model(x)`` and ``y``, returns the loss of each sample, shape (B,).
        x: Samples, shape (N, ...), on any device; batches are moved to the weights' device.
        y: Their classes, int64, shape (N,).
        directions: 1 or 2 random directions; or one or two lists with a tensor for each weight, used as given.
        radius: Largest coordinate, > 0.
        steps: Coordinates per direction, at least 2; an odd number has the weights themselves in the middle.
        classes: Take only the samples of these classes; default: all.
        generator: Generator of random directions; the same state gives the same directions.
        batch_size: Samples per forward pass.
        prepare: Turns samples into input, such as ``data.Augment.for_testing(images)`` for uint8 images.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument is out of range or a direction does not have the shapes of the weights.

    Source: Li et al. 2018 (Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913), section 4.

    >>> model = nn.Linear(2, 2)
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> loss_slice(model, loss, torch.randn(6, 2), torch.arange(6) % 2, directions=2, steps=5).loss.shape
    torch.Size([5, 5])
    """
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius must be a finite number > 0, got {radius!r}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps!r}")
    evaluator = Evaluator(model, loss_fn, x, y, classes=classes, batch_size=batch_size, prepare=prepare)
    moves = _directions(evaluator.params, directions, generator)
    coordinates = torch.linspace(-radius, radius, steps, dtype=torch.float64)
    points = torch.cartesian_prod(*[coordinates] * len(moves)).reshape(-1, len(moves))
    losses = []
    with (
        evaluator.eval_mode(),
        progress_bar(progress, len(points), "loss slice") as advance,
        evaluator.restored_afterwards() as weights,
        torch.no_grad(),
    ):
        for point in points.tolist():
            for param, weight, *move in zip(evaluator.params, weights, *moves, strict=True):
                param.copy_(weight + sum(a * d for a, d in zip(point, move, strict=True)))
            losses.append(evaluator.mean_loss(evaluator.indices))
            advance()
    return LossSlice(coordinates, torch.tensor(losses, dtype=torch.float64).reshape([steps] * len(moves)), moves)


def _directions(
    params: Sequence[Tensor], wanted: int | Sequence[Sequence[Tensor]], generator: torch.Generator | None
) -> list[list[Tensor]]:
    if isinstance(wanted, int):
        if wanted not in (1, 2):
            raise ValueError(f"directions must be 1, 2 or such lists of tensors, got {wanted!r}")
        return [[*map(_filter_normalized, _random(params, generator), params)] for _ in range(wanted)]
    given = [list(one) for one in wanted]
    shapes = [param.shape for param in params]
    if len(given) not in (1, 2) or any([d.shape for d in one] != shapes for one in given):
        raise ValueError(f"directions must be one or two lists of {len(params)} tensors, shaped as the weights are")
    return given


def _filter_normalized(direction: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(direction)
    lengths = (one.detach().flatten(1).norm(dim=1) for one in (weight, direction))
    scale = torch.div(*lengths)
    return direction * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _random(params: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Returns normal numbers in the weights' shapes; with a generator on the CPU they are the same on every device."""
    device = None if generator is None else generator.device
    return [
        torch.randn(p.shape, dtype=p.dtype, generator=generator, device=device or p.device).to(p.device) for p in params
    ]
