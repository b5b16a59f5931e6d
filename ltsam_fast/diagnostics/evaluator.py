"""A network, its loss and the samples it is looked at with: losses and gradients in batches, weights always put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltsam_fast import ops
from ltsam_fast.optim.by_class import added
from ltsam_fast.optim.gradients import Differentiable
from ltsam_fast.shared import SharedBackward, Weighting
from ltsam_fast.weight_caches import clear_weight_caches

LossFn = Callable[[Tensor, Tensor], Tensor]
"""Takes the network's output and the labels of a batch, gives the loss of each sample, shape (B,)."""
Prepare = Callable[[Tensor], Tensor]


class Evaluator:
    """What all diagnostics share.

    The network is in evaluation mode while it is looked at, where it must keep samples apart: a batch may be of one class.
    Running statistics don't move, its mode is put back afterwards, ``grad`` attributes are not touched.
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
            indices = torch.isin(self.y, torch.as_tensor(classes, dtype=torch.long).cpu())
        self.indices = indices.nonzero().flatten()
        if not len(self.indices):
            raise ValueError(f"classes must have a sample in y, got {list(map(int, classes or []))}")

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """The network in evaluation mode, with gradients; every module's mode is put back."""
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
        """Gives a copy of the weights; whatever happens to the weights, they are put back from it."""
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
            clear_weight_caches()  # the weights may have moved, and the batch before may have needed no gradients
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
        total = [torch.zeros_like(param) for param in self.params]
        for _, losses in self.losses(indices):
            share = torch.full_like(losses, 1 / len(indices))
            grads = Differentiable(losses, self.params).gradients(share, retain_graph=False)
            for one, grad in zip(total, grads, strict=True):
                if grad is not None:
                    one.add_(grad)
        return total

    def gradients_by_class(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields each class that has samples, and the gradient of its mean loss: one backward for each batch of a class."""
        for c, indices in self.class_indices():
            yield c, self.gradient(indices)

    def gradients_in_mixed_batches(self, at_once: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields what :meth:`gradients_by_class` does, from full batches of at most ``at_once`` classes, one backward each."""
        shared = SharedBackward(self.model, self.params)
        order = self.indices[self.y[self.indices].argsort(stable=True)]
        remaining = self.counts.clone()
        sums: dict[int, list[Tensor]] = {}
        for batch in self._batches_of(order, at_once):
            with shared.record_outputs():
                ((_, losses),) = self.losses(batch)
            labels = self.y[batch]
            classes = labels.unique().tolist()
            weightings = []
            for c in classes:
                mine = (labels == c).nonzero().flatten().to(losses.device)
                share = torch.zeros_like(losses, requires_grad=False).index_fill_(0, mine, 1 / int(self.counts[c]))
                weightings.append(Weighting(share, mine))
            found = shared(losses, torch.ones_like(losses, requires_grad=False), weightings, native=False)
            if found is None:  # nothing is known of this structure yet: a backward for each class
                at_w = Differentiable(losses, self.params)
                found = [at_w.gradients(one.weights) for one in weightings]
            for c, grads in zip(classes, found, strict=True):
                sums[c] = added(grads, list(self.params), sums.get(c))
                remaining[c] -= int((labels == c).sum())
                if not remaining[c]:
                    yield c, sums.pop(c)

    def _batches_of(self, order: Tensor, at_once: int) -> Iterator[Tensor]:
        """Cuts indices, sorted by class, into batches of at most ``batch_size`` samples and ``at_once`` classes."""
        while len(order):
            batch = order[: self.batch_size]
            first = self.y[batch].unique_consecutive(return_inverse=True)[1]
            yield batch[first < at_once]
            order = order[int((first < at_once).sum()) :]

    def class_indices(self) -> list[tuple[int, Tensor]]:
        """Returns each class that has samples, and their indices."""
        by_class = self.y.argsort(stable=True).split(self.counts.tolist())
        return [(c, indices) for c, indices in enumerate(by_class) if len(indices)]

    @contextmanager
    def perturbed(self, grads: Sequence[Tensor], rho: float, adaptive: bool) -> Iterator[None]:
        """The weights moved to where SAM (ASAM if adaptive) with radius ``rho`` takes its second gradient."""
        with self.restored_afterwards():
            norm = ops.grad_norm(grads, self.params, adaptive=adaptive)
            ops.perturb_(self.params, grads, None, norm, rho=rho, adaptive=adaptive)
            yield
