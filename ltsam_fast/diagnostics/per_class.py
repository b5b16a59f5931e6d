"""Gradient norm and sharpness of each class."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ltsam_fast import ops
from ltsam_fast.diagnostics.evaluator import Evaluator, LossFn, Prepare
from ltsam_fast.diagnostics.plots import bars

_GRADIENT_BYTES = 256 << 20
"""Memory for the gradients of several classes whose norms one pass takes; one class is always held."""


@dataclass(frozen=True)
class ClassGradNorms:
    """Gradient norms of classes.

    Attributes:
        norms: Norm of the gradient of each class's mean loss, shape (C,); NaN for a class without samples.
        counts: Samples used of each class, int64, shape (C,).
    """

    norms: Tensor
    counts: Tensor

    def plot(self, path: str | os.PathLike[str], names: Sequence[str] | None = None, **shots: Any) -> None:
        """Draws a bar per class into the image file ``path``; needs matplotlib.

        Args:
            path: The image file.
            names: Names of the classes.
            **shots: ``class_counts``, the training samples of each class: they are drawn too, and bars are coloured by shot
                group; ``many`` and ``few``, the limits of :func:`ltsam_fast.data.shot_split`.
        """
        bars(path, {"gradient norm": self.norms}, names, **shots)


def class_grad_norms(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    batch_size: int = 256,
    prepare: Prepare | None = None,
    exact: bool = False,
) -> ClassGradNorms:
    r"""Returns the norm of each class's gradient, :math:`\|\nabla_w \frac{1}{n_c} \sum_{i: y_i = c} \ell_i(w)\|`.

    Each sample goes forward and backward once, in batches of one class. The network is in evaluation mode and must not mix
    samples there. Weights, their ``grad`` and running statistics stay as they are. Batches of rare classes are small:
    ``exact=True`` takes full batches of several classes with one backward each, and forms each class's gradient from the rows
    of its samples, see :class:`ltsam_fast.shared.SharedBackward`.

    Args:
        model: The network; its weights with ``requires_grad`` are used.
        loss_fn: Takes ``model(x)`` and ``y``, returns the loss of each sample, shape (B,).
        x: Samples, shape (N, ...), on any device; batches are moved to the weights' device.
        y: Their classes, int64, shape (N,).
        num_classes: Number of classes C.
        batch_size: Samples per forward pass.
        prepare: Turns samples into input, such as ``data.Augment.for_testing(images)`` for uint8 images.
        exact: Take batches of several classes, with one backward each.

    Raises:
        ValueError: Labels are out of range or not one per sample, ``loss_fn`` does not return one loss per sample, batch
            norm has no running statistics, or with ``exact`` the network mixes samples in another way
            (:class:`ltsam_fast.shared.NotShared`, which names the module).

    Source: the class-conditional gradients of CC-SAM (Zhou et al., CVPR 2023).

    >>> model = nn.Linear(2, 3)
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> class_grad_norms(model, loss, torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 0]), num_classes=3).counts
    tensor([4, 2, 0])
    """
    evaluator = Evaluator(model, loss_fn, x, y, num_classes=num_classes, batch_size=batch_size, prepare=prepare)
    norms = torch.full((num_classes,), math.nan, dtype=torch.float64)
    max_classes = max(1, _GRADIENT_BYTES // sum(param.nbytes for param in evaluator.params))
    with evaluator.eval_mode():
        gradients = evaluator.gradients_in_mixed_batches(max_classes) if exact else evaluator.gradients_by_class()
        while chunk := list(islice(gradients, max_classes)):
            norms[[c for c, _ in chunk]] = ops.class_grad_norms([grads for _, grads in chunk]).double().cpu()
    return ClassGradNorms(norms, evaluator.counts)


@dataclass(frozen=True)
class ClassSharpness:
    """Sharpness of classes.

    Attributes:
        loss: Mean loss of each class at the weights, shape (C,); NaN for a class without samples.
        perturbed: Mean loss of each class at the perturbed weights, shape (C,).
        counts: Samples used of each class, int64, shape (C,).
    """

    loss: Tensor
    perturbed: Tensor
    counts: Tensor

    @property
    def sharpness(self) -> Tensor:
        """How much the mean loss of each class rises, shape (C,)."""
        return self.perturbed - self.loss

    def plot(self, path: str | os.PathLike[str], names: Sequence[str] | None = None, **shots: Any) -> None:
        """Draws loss and sharpness of each class; arguments as in :meth:`ClassGradNorms.plot`."""
        bars(path, {"mean loss": self.loss, "sharpness": self.sharpness}, names, **shots)


def class_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    *,
    rho: float,
    num_classes: int,
    shared: bool = False,
    adaptive: bool = False,
    batch_size: int = 256,
    prepare: Prepare | None = None,
) -> ClassSharpness:
    r"""Returns the loss of each class at the weights and at weights perturbed by ``rho`` along the gradient.

    .. math:: S_c = L_c(w + \epsilon_c) - L_c(w), \qquad \epsilon_c = \rho \, \nabla L_c(w) / \|\nabla L_c(w)\|

    with ``L_c`` the mean loss of class c. With ``shared=True`` all classes have one perturbation, SAM's: along the gradient of
    the mean loss of all samples. The network is in evaluation mode and must not mix samples there. The weights are restored
    to the last bit, after an error too.

    Args:
        model: The network; its weights with ``requires_grad`` are perturbed.
        loss_fn: Takes ``model(x)`` and ``y``, returns the loss of each sample, shape (B,).
        x: Samples, shape (N, ...), on any device; batches are moved to the weights' device.
        y: Their classes, int64, shape (N,).
        rho: Radius, in units of the weights, >= 0.
        num_classes: Number of classes C.
        shared: Perturb along the gradient of all samples instead of that of each class.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        batch_size: Samples per forward pass.
        prepare: Turns samples into input, such as ``data.Augment.for_testing(images)`` for uint8 images.

    Raises:
        ValueError: ``rho`` is negative or not finite, labels are out of range or not one per sample, batch norm has no
            running statistics, or ``loss_fn`` does not return one loss per sample.

    Source: Foret et al. 2021 (SAM, arXiv 2010.01412), eq. 1 and 2; by class: Focal-SAM (arXiv 2505.01660), section 4.

    >>> model = nn.Linear(2, 2)
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> result = class_sharpness(model, loss, torch.randn(6, 2), torch.arange(6) % 2, rho=0.1, num_classes=2)
    >>> result.sharpness > 0
    tensor([True, True])
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    evaluator = Evaluator(model, loss_fn, x, y, num_classes=num_classes, batch_size=batch_size, prepare=prepare)
    with evaluator.eval_mode():
        loss = evaluator.loss_by_class()
        if shared:
            with evaluator.perturbed(evaluator.gradient(evaluator.indices), rho, adaptive):
                return ClassSharpness(loss, evaluator.loss_by_class(), evaluator.counts)
        perturbed = torch.full_like(loss, math.nan)
        for c, indices in evaluator.class_indices():
            with evaluator.perturbed(evaluator.gradient(indices), rho, adaptive):
                perturbed[c] = evaluator.mean_loss(indices)
    return ClassSharpness(loss, perturbed, evaluator.counts)
