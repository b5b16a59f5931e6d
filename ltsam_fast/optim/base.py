"""What all methods share: one call for a whole step. Phases, climbing, descending, state are one module each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_targets
from ltsam_fast.optim.batch import Batch, Closure, Scaling, mean_loss
from ltsam_fast.optim.gradients import _gradients, _swap_gradients
from ltsam_fast.optim.phases import Phased


class SharpnessAware(Phased):
    """Base of the methods: a torch optimizer that evaluates gradients at perturbed weights and steps from the old ones.

    State and parameter groups are those of ``base_optimizer``, shared, so ``state_dict()`` holds all of it and learning
    rate schedulers take this optimizer itself. Each group may set ``rho``, ``adaptive``, ``eta`` (ASAM's constant, 0),
    ``norm_eps`` (added to the norm, 1e-12) and ``perturb`` (False leaves the group, and its share of the norm, out of the
    perturbation). ``taken`` counts the steps, those that a GradScaler's overflow ``skipped`` included.

    Weights in bfloat16 and float16 are perturbed with stochastic rounding: most of the perturbation is below their
    resolution and would vanish.

    Under DistributedDataParallel give it as ``model``. Workers then climb along their own gradients and only the last pass of
    a step is averaged, once, as in the SAM paper; ``ascent_sync=True`` (any method's keyword) averages the ascent gradient
    too. Methods that combine gradients of both passes (GSAM, WSAM, LookSAM) always do. A gradient that a worker lacks counts
    as zero; with DDP's ``find_unused_parameters=True`` a weight that no worker uses is left out of the step. In DDP's
    ``join()`` a step that has all-reduces of its own is refused. With the phases ``model.no_sync()`` is the caller's business.

    With FSDP2 every backward's gradients are averaged, and norms run over all shards once, replicas of them or not. Give the
    root as ``model`` here too: after an exception, or an evaluation, it may hold gathered copies of other weights, which the
    step then lets go of.

    SGD, Adam and AdamW run fused: restoring, adding up gradients and updating are one pass. Any other torch optimizer
    steps by itself on the restored weights.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        targets: Tensor | Sequence[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """One step of the method.

        Args:
            closure: Runs the forward pass alone and returns the per-sample losses, shape (B,), floating point, not
                detached. A sequence of closures is a batch in parts: their gradients add up to one step.
            targets: The samples' classes, shape (B,), integer; a sequence with a sequence of closures. Methods that are told
                class counts need them, each less than C; the others do not look at them.
            scaler: A GradScaler. If a gradient of either pass overflows, weights and base state stay as they were, which is
                decided on the device. Call ``scaler.update()`` yourself, once a step.

                With the phases, give it to the first one, and call neither its unscale_() nor its step().

        Returns:
            The mean loss at the unperturbed weights, 0-d, detached, on the losses' device.

        Raises:
            ValueError: There is no closure, or what it returns or ``targets`` do not fit. Whatever is raised, by the
                closure too, Ctrl-C included, the weights are the unperturbed ones afterwards.
        """
        closures = _as_list(closure)
        if self._ends(closure):
            return self._last_phase()
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("scaler.step(optimizer, closure) is not supported: call step(closure, scaler=scaler)")
        if not closures or not all(callable(one) for one in closures):
            raise ValueError(
                "closure must be given: step(closure), with a function that returns the per-sample losses (B,)"
            )
        if self._phase:
            self._enter("step")
        labels = self._check_targets(targets, len(closures))
        self._check_join(scaler is not None and scaler.is_enabled())
        try:
            self._clear_gradients()
            params, _ = self._parameters()
            scaling = Scaling(scaler, params)
            graphs = self._graphs if self._twice else None
            parts = [Batch(*pair, params, graphs) for pair in zip(closures, labels, strict=True)]
            with contextlib.nullcontext() if graphs is None else graphs.reusable():
                loss = self._whole_step(parts, scaling)
            self._clear_gradients()
            scaling.report(self)
            return loss
        except BaseException:
            self.restore()
            self._clear_gradients()
            raise

    @property
    def _classes(self) -> int | None:
        """Below which number the samples' classes must lie; None: they are not looked at."""
        return None

    def _check_targets(self, targets: Any, closures: int) -> list[Tensor | None]:
        classes = self._classes
        if classes is not None and targets is None:
            raise ValueError("targets must be given: step(closure, targets=y) with the samples' classes, shape (B,)")
        labels: list[Any] = [None] * closures if targets is None else _as_list(targets)
        if len(labels) != closures:
            raise ValueError(f"targets has {len(labels)} entries, but there are {closures} closures: give one each")
        if classes is not None:
            for label in labels:
                rows = len(label) if isinstance(label, Tensor) and label.dim() else 0
                check_targets(label, rows, classes)
        return labels

    def _cotangents(self, labels: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights (B,) of the samples in the clean and in the sharp loss; None where all are zero."""
        raise NotImplementedError

    _one_pass = False
    """Whether this step has no pass at perturbed weights."""

    def _put_aside(self, grads: list[Tensor | None]) -> None:
        """Keeps gradients at w for the step, and clears those in place; workers leave them there, to be averaged together."""
        kept = any(grad is not None for grad in grads)
        if kept and self._distributed and not self._mixes:
            _swap_gradients(self._parameters()[0], grads)
            return
        if kept:
            self._clean = grads
        self._clear_gradients()

    def _backward_mean(self, parts: list[Batch], scaling: Scaling, last: bool = False) -> list[Tensor]:
        """The gradient of the mean loss, at the weights as they are, which pass for w; returns the losses, detached."""
        seen = []
        for part in parts:
            with self._local(last=last and part is parts[-1]):
                losses = part.evaluate()
                seen.append(losses.detach())
                share = 1 / len(losses) if len(parts) == 1 else 1.0  # of a batch in parts the size is known at its end
                torch.autograd.backward(losses, scaling(torch.full_like(losses, share)))
        if len(parts) > 1:
            grads = [param.grad for param in self._parameters()[0] if param.grad is not None]
            torch._foreach_mul_(grads, 1 / sum(part.size for part in parts))
        return seen

    def _examine(self, losses: Tensor, scaling: Scaling) -> None:
        """Looks at the losses at w before their graph is gone."""

    def _evaluate(self, part: Batch) -> Tensor:
        """The losses at w, whose graph the passes there share."""
        return part.evaluate()

    def _backward_both(self, losses: Tensor, u: Tensor, v: Tensor, clean: list[Tensor | None]) -> list[Tensor | None]:
        """Adds the gradient with weights v to those in place, and that with u to ``clean``, which it returns."""
        params, _ = self._parameters()
        sharp = _swap_gradients(params, clean)
        torch.autograd.backward(losses, u, retain_graph=True)
        clean = _swap_gradients(params, sharp)
        torch.autograd.backward(losses, v)
        return clean

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        """eps = rho g_v / |g_v|, direction g_u(w) + g_v(w + eps): the step of all methods with class weights u and v."""
        params, _ = self._parameters()
        clean: list[Tensor | None] = [None] * len(params)
        weights = []
        for part in parts:
            with self._local(last=self._one_pass and part is parts[-1]):
                losses = self._evaluate(part)
                count = len(losses) if len(parts) == 1 else 1  # of a batch in parts the size is known at its end
                self._examine(losses, scaling)
                u, v = self._cotangents(part.labels, losses)
                weights.append(v)
                if u is not None and v is not None:
                    clean = self._backward_both(losses, scaling(u / count), scaling(v / count), clean)
                elif u is not None:
                    sharp = _swap_gradients(params, clean)
                    torch.autograd.backward(losses, scaling(u / count))
                    clean = _swap_gradients(params, sharp)
                elif v is not None:
                    torch.autograd.backward(losses, scaling(v / count))
        size = sum(part.size for part in parts)
        if len(parts) > 1:
            torch._foreach_mul_([g for g in (*clean, *_gradients(params)) if g is not None], 1 / size)
        if all(v is None for v in weights):
            _swap_gradients(params, clean)
        else:
            self._climb(*scaling.signals)
            self._put_aside(clean)
            for part, v in zip(parts, weights, strict=True):
                with self._local(last=part is parts[-1]):
                    losses = part.evaluate(at_w=False)
                    torch.autograd.backward(losses, scaling(torch.zeros_like(losses) if v is None else v / size))
        self._descend(*scaling.signals)
        return mean_loss(parts)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
