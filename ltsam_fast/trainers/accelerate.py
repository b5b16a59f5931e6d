"""Accelerate: call :class:`AcceleratedStep` with each batch, inside ``accelerator.accumulate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    message = "ltsam_fast.trainers.accelerate needs Accelerate: pip install 'ltsam_fast[accelerate]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from ltsam_fast.ops.checks import shown
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.trainers.micro_batches import MicroBatches, check_per_sample, labels_of

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Single devices and DDP."""


class AcceleratedStep:
    r"""Takes the optimizer's steps, in place of ``accelerator.backward(loss)``, ``optimizer.step()`` and ``zero_grad()``.

    Micro-batches are stored until ``accelerator.sync_gradients``: one perturbation for the whole step, weighted by samples.
    All but the last are copied, since a loader may reuse its memory. Mixed precision's GradScaler is the accelerator's; after
    an overflow ``accelerator.optimizer_step_was_skipped`` is True, and schedulers from ``prepare`` skip their step. Clip
    gradients with the optimizer's ``max_grad_norm``: ``accelerator.clip_grad_norm_`` finds none.

    Args:
        accelerator: The accelerator.
        model: The model as ``accelerator.prepare`` returned it; becomes ``optimizer.model``, so that DDP averages once a step
            and the optimizer's ``plan`` applies. For ``plan="require"`` give the optimizer the model that is prepared, too.
        optimizer: The optimizer as ``accelerator.prepare`` returned it, of one of the package's methods.
        losses: ``losses(batch)`` runs the forward pass and returns the per-sample losses, shape (B,), of a batch or some of
            its samples, see :mod:`ltsam_fast.trainers`.
        targets: ``targets(batch)`` returns the samples' classes, shape (B,), integer; by default the second of a pair, or
            ``batch["labels"]``.

    Raises:
        TypeError: ``optimizer`` was not prepared, or is not one of the package's.
        ValueError: The accelerator shards the model (FSDP, DeepSpeed, Megatron) or runs on XLA.

    >>> import ltsam_fast as lf
    >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
    >>> sam = lf.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> model, optimizer = accelerator.prepare(model, sam)
    >>> def losses(batch):
    ...     x, y = batch
    ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    >>> step = AcceleratedStep(accelerator, model, optimizer, losses)
    >>> for batch in [(torch.randn(8, 3), torch.randint(0, 2, (8,)))]:
    ...     with accelerator.accumulate(model):
    ...         loss = step(batch)
    >>> loss.shape
    torch.Size([])
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        losses: Callable[[Any], Tensor],
        targets: Callable[[Any], Tensor | None] = labels_of,
    ) -> None:
        if not isinstance(optimizer, AcceleratedOptimizer) or not isinstance(optimizer.optimizer, SharpnessAware):
            raise TypeError(
                "optimizer must be one of ltsam_fast's, as accelerator.prepare() returned it, got "
                f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__}"
            )
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator must be an Accelerator, got {shown(accelerator)}")
        if not callable(losses):
            raise TypeError(f"losses must be a function of the batch, got {shown(losses)}")
        if accelerator.distributed_type not in _SUPPORTED:
            raise ValueError(f"distributed_type must be NO, MULTI_CPU or MULTI_GPU, got {accelerator.distributed_type}")
        self.accelerator, self.optimizer = accelerator, optimizer
        self.method: SharpnessAware = optimizer.optimizer
        self._micro_batches = MicroBatches(lambda batch: check_per_sample(losses(batch), "losses"), targets)
        self.method.model = model

    def __call__(self, batch: Any) -> Tensor | None:
        """Stores the batch, and takes the step with the last micro-batch.

        Returns:
            The mean loss at the unperturbed weights (GNM, MomentumSAM: the perturbed ones) over the step's micro-batches, 0-d,
            detached; ``None`` without a step.

        Raises:
            TypeError: A batch that must be copied can't be.
            ValueError: ``losses`` did not return losses of shape (B,).
        """
        self._micro_batches.add(batch, last=self.accelerator.sync_gradients)
        if not self.accelerator.sync_gradients:
            return None
        scaler = self.optimizer.scaler
        loss = self._micro_batches.step(self.method, scaler)
        if scaler is not None:
            scale = scaler.get_scale()
            scaler.update()
            self.optimizer._is_overflow = scaler.get_scale() < scale  # what step_was_skipped returns
        return loss
