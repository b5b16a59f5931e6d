"""Losses and gradients of a network on a set of samples, in batches; weights that were perturbed are restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltsam_fast import ops
from ltsam_fast.ops.checks import class_numbers, shown
from ltsam_fast.ops.dispatch import clear_weight_caches
from ltsam_fast.optim.gradients import Differentiable
from ltsam_fast.shared import SharedBackward, Weighting

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``loss_fn(output, labels)`` returns the loss of each sample, shape (B,)."""
Prepare = Callable[[Tensor], Tensor]
"""``prepare(x)`` turns samples into the network's input."""


class Evaluator:
    """Evaluates a network and a loss on samples, for all diagnostics.

    The network runs in evaluation mode and must not mix samples there, since a batch may hold a single class. Running
    statistics and ``grad`` attributes stay as they are. The arguments are those of the diagnostics.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        x: Tensor,
        y: Tensor,
        *,
        num_classes: int | None = None,
        classes: Tensor | Sequence[int] | None = None,
        batch_size: int = 256,
        prepare: Prepare | None = None,
    ) -> None:
        if len(x) != len(y) or y.ndim != 1 or not len(y):
            raise ValueError(f"y must be one label for each of {len(x)} samples, got shape {tuple(y.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self.num_classes = int(y.max()) + 1 if num_classes is None else num_classes
        if not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(f"y must lie in [0, {self.num_classes}), got {int(y.min())}..{int(y.max())}")
        self.params = [param for param in model.parameters() if param.requires_grad]
        if not self.params:
            raise ValueError("model must have weights that require gradients, got none")
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"model must keep samples apart in evaluation mode, but {name} ({type(module).__name__}) has "
                    "track_running_stats=False and normalizes by the batch: give it running statistics"
                )
        self.model, self.loss_fn, self.x, self.y = model, loss_fn, x, y.cpu()
        self.batch_size, self.prepare = batch_size, prepare
        self.counts = self.y.bincount(minlength=self.num_classes)
        indices = torch.ones(len(y), dtype=torch.bool)
        if classes is not None:
            indices = torch.isin(self.y, class_numbers("classes", classes))
        self.indices = indices.nonzero().flatten()
        if not len(self.indices):
            raise ValueError(f"classes must have a sample in y, got {shown(classes)}")

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """A context with the network in evaluation mode and gradients enabled; restores every module's mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def restored_afterwards(self) -> Iterator[list[Tensor]]:
        """A context that yields a copy of the weights and restores the weights from it at its end."""
        backups = [param.detach().clone() for param in self.params]
        try:
            yield backups
        finally:
            with torch.no_grad():
                for param, backup in zip(self.params, backups, strict=True):
                    param.copy_(backup)
            clear_weight_caches()

    def losses(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields indices and losses of each batch of the samples at ``indices``."""
        device = self.params[0].device
        for batch in indices.split(self.batch_size):
            clear_weight_caches()  # the weights may have changed, and the previous batch may have run without gradients
            x = self.x[batch.to(self.x.device)].to(device)
            losses = self.loss_fn(self.model(x if self.prepare is None else self.prepare(x)), self.y[batch].to(device))
            if losses.shape != batch.shape:
                raise ValueError(
                    f"loss_fn must return one loss per sample, shape ({len(batch)},), as with reduction='none'; "
                    f"got shape {tuple(losses.shape)}"
                )
            yield batch, losses

    def mean_loss(self, indices: Tensor) -> float:
        """Returns the mean loss of the samples at ``indices``, summed in float64."""
        with torch.no_grad():
            return float(sum(losses.double().sum() for _, losses in self.losses(indices))) / len(indices)

    def loss_by_class(self) -> Tensor:
        """Returns the mean loss of each class, float64, shape (num_classes,); NaN for a class without samples."""
        sums = torch.zeros(self.num_classes, dtype=torch.float64)
        with torch.no_grad():
            for batch, losses in self.losses(self.indices):
                sums.index_add_(0, self.y[batch], losses.double().cpu())
        return sums / self.counts

    def gradient(self, indices: Tensor) -> list[Tensor]:
        """Returns the gradient of the mean loss of the samples at ``indices``, one tensor for each weight."""
        total = self._zeros()
        for _, losses in self.losses(indices):
            weights = torch.full_like(losses, 1 / len(indices))
            _add(total, Differentiable(losses, self.params).gradients(weights, retain_graph=False))
        return total

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(param) for param in self.params]

    def gradients_by_class(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields each class that has samples and the gradient of its mean loss, by one backward for each batch of a class."""
        for c, indices in self.class_indices():
            yield c, self.gradient(indices)

    def gradients_in_mixed_batches(self, max_classes: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields the same from full batches of at most ``max_classes`` classes, by one backward for each batch."""
        shared = SharedBackward(self.model, self.params)
        order = self.indices[self.y[self.indices].argsort(stable=True)]
        remaining = self.counts.clone()
        sums: dict[int, list[Tensor]] = {}
        for batch in self._batches_of(order, max_classes):
            with shared.record_outputs():
                ((_, losses),) = self.losses(batch)
            labels = self.y[batch]
            classes = labels.unique().tolist()
            weightings = []
            for c in classes:
                members = (labels == c).nonzero().flatten().to(losses.device)
                weights = torch.zeros_like(losses).index_fill_(0, members, 1 / int(self.counts[c]))
                weightings.append(Weighting(weights, members))
            class_grads = shared(losses, torch.ones_like(losses), weightings, native=False)
            if class_grads is None:  # this graph is not analyzed yet: one backward for each class
                differentiable = Differentiable(losses, self.params)
                class_grads = [differentiable.gradients(weighting.weights) for weighting in weightings]
            for c, grads in zip(classes, class_grads, strict=True):
                if c not in sums:
                    sums[c] = self._zeros()
                _add(sums[c], grads)
                remaining[c] -= int((labels == c).sum())
                if not remaining[c]:
                    yield c, sums.pop(c)

    def _batches_of(self, order: Tensor, max_classes: int) -> Iterator[Tensor]:
        """Splits indices, sorted by class, into batches of at most ``batch_size`` samples and ``max_classes`` classes."""
        while len(order):
            batch = order[: self.batch_size]
            number = self.y[batch].unique_consecutive(return_inverse=True)[1]  # of the class within the batch
            batch = batch[number < max_classes]
            yield batch
            order = order[len(batch) :]

    def class_indices(self) -> list[tuple[int, Tensor]]:
        """Returns each class that has samples, with their indices."""
        by_class = self.y.argsort(stable=True).split(self.counts.tolist())
        return [(c, indices) for c, indices in enumerate(by_class) if len(indices)]

    @contextmanager
    def perturbed(self, grads: Sequence[Tensor], rho: float, adaptive: bool) -> Iterator[None]:
        """A context with the weights perturbed along ``grads`` as SAM (ASAM if adaptive) does, with radius ``rho``."""
        with self.restored_afterwards():
            norm = ops.grad_norm(grads, self.params, adaptive=adaptive)
            ops.perturb_(self.params, grads, None, norm, rho=rho, adaptive=adaptive)
            yield


def _add(total: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    for one, grad in zip(total, grads, strict=True):
        if grad is not None:
            one.add_(grad)
