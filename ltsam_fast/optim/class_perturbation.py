"""A perturbation for each class: gradients by class, and passes in which each sample sees the weights of its class."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.lists import same_items
from ltsam_fast.optim.amp import LossScale
from ltsam_fast.optim.base_step import sign_of
from ltsam_fast.optim.classes_at_once import ClassesAtOnce, Refused, of_equal_size
from ltsam_fast.optim.closures import calls_compiled, modules_in
from ltsam_fast.optim.gradients import (
    Differentiable,
    Gradient,
    add_scaled,
    check_all_dense,
    gradients_of,
    own_memory,
    swap_gradients,
    take_gradients,
)
from ltsam_fast.optim.head import Head, by_row_alone, owner_of
from ltsam_fast.optim.probe import COARSE, TOLERANCE
from ltsam_fast.optim.unchanged import generators, same_generators
from ltsam_fast.shared import Weighting
from ltsam_fast.shared.qualify import is_compiled, is_hooked

if TYPE_CHECKING:
    from ltsam_fast.optim.plan import Passes
    from ltsam_fast.optim.step import ByClass

Scales = Callable[[Tensor, Tensor, int], Tensor]


class ClassGradients:
    """The gradients of K classes' mean losses over T parameters; once perturbed, the classes' weights.

    Attributes:
        classes: The classes in the batch, ascending.
        grads: For each class T tensors.
    """

    def __init__(self, params: list[Tensor], factors: list[float]) -> None:
        self.classes: list[int] = []
        self.grads: dict[int, list[Tensor]] = {}
        self._params, self._factors = (
            params,
            factors,
        )  # of the schedule; -1 where the loss of a maximized group grows downhill

    def perturb(self, scales: Scales, scaling: LossScale) -> None:
        """Turns the gradients into weights, see :meth:`ltsam_fast.optim.step.Step.ascend_by_class`: two passes in all."""
        params, grads = self._params, [self.grads[k] for k in self.classes]
        norms = ops.grad_norm(
            [grad for one in grads for grad in one], groups=range(len(grads) * len(params)), per_group=True,
            found_inf=scaling.found_inf,
        ).double()  # fmt: skip
        inverse = 1.0 if scaling.grad_scale is None else 1 / scaling.grad_scale.double()
        norms = (norms * inverse).view(len(grads), len(params))
        found = scales(norms, ops.grad_norm(params).double(), sum(param.numel() for param in params))
        factors = inverse * torch.tensor(self._factors, dtype=torch.float64, device=norms.device)
        ops.perturb_by_class_(params, grads, found * factors)


class ClassPasses:
    """The passes that :class:`ltsam_fast.optim.step.ByClass` and ``AtClassPerturbed`` ask for."""

    def __init__(self, passes: Passes, request: ByClass) -> None:
        self._passes, self._share, self._positions = passes, request.share, request.scope
        self._optimizer, self._scaling, self._workers = passes._optimizer, passes._scaling, passes._workers
        step = passes._step
        self._scope = [step._params[i] for i in request.scope]
        groups = self._optimizer.param_groups
        factors = [sign_of(group) * factor for group, factor in zip(groups, step.radii(1.0), strict=True)]
        self.gradients = ClassGradients(self._scope, [factors[step._groups[i]] for i in request.scope])
        self._on_cpu = not self._scope or self._scope[0].device.type == "cpu"
        self._rows: list[dict[int, Tensor]] = []  # of each part the samples of its classes
        self._head: Head | None = None
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._at_once: ClassesAtOnce | None = None
        self._stacks: list[tuple[list[int], list[Tensor]]] = []  # of classes that are evaluated at once

    def at_weights(self) -> tuple[Gradient, ClassGradients]:
        """The gradient of the mean loss, which stays in place, and the classes'."""
        passes, gradients, scope = self._passes, self.gradients, self._scope
        passes.fetch_labels()
        members = _members_of([part.host_labels for part in passes.parts])
        sizes = {k: sum(map(len, numbers.values())) for k, numbers in members.items()}
        perturbs = bool(scope) and self._share < 1
        synced = perturbs and self._optimizer.ascent_sync and self._workers.averages
        if synced:
            sizes = self._sizes_everywhere(sizes)
        gradients.classes = sorted(sizes) if perturbs else []
        hooked = perturbs and any(map(is_hooked, passes._params))  # a hook sees the gradients of the published passes
        self._head = self._find_head() if perturbs and not hooked else None
        for number, part in enumerate(passes.parts):
            rows = {k: members[k][number] for k in gradients.classes if number in members.get(k, ())}
            with self._workers.backward(last=not perturbs and part is passes.parts[-1]):
                together = self._head or hooked or passes.trains_others
                apart = rows and not together and self._are_separable(part)
                self._at_once = self._find_at_once(rows) if apart else None
                if apart and (self._at_once or self._on_cpu):
                    self._sub_batches_at_weights(part, rows, sizes)
                else:
                    self._part_at_weights(part, rows, sizes)
        passes._step.seen_unperturbed = True
        if synced:
            for k in gradients.classes:
                gradients.grads.setdefault(k, list(map(torch.zeros_like, scope)))
            self._workers.add_up([grad for k in gradients.classes for grad in gradients.grads[k]])
            gradients.classes = sorted(members)  # those of other workers are not evaluated here
        averaged = not perturbs or not self._workers.averages
        return Gradient(gradients_of(passes._params), next(passes._step.gradient_numbers), averaged), gradients

    def _are_separable(self, part: Any) -> bool:
        """Whether each class may have a pass of its own samples: DDP finds unused weights by the last pass alone."""
        return not self._workers.finds_unused and self._passes.are_separable(part)

    def _on_device(self, rows: dict[int, list[int]], device: torch.device) -> dict[int, Tensor]:
        """The numbers of the samples of each class in a part, where they are needed, now and for the perturbed pass."""
        self._rows.append({k: torch.tensor(numbers, device=device) for k, numbers in rows.items()})
        return self._rows[-1]

    def _sub_batches_at_weights(self, part: Any, rows: dict[int, list[int]], sizes: dict[int, int]) -> None:
        """A forward and backward for each class; the gradient of the mean loss is a sum of theirs."""
        passes, grads, params = self._passes, self.gradients.grads, self._passes._params
        total = take_gradients(params)
        indices = self._on_device(rows, self._scope[0].device)
        total, done = self._at_once_at_weights(part, indices, total)
        for k, chosen in indices.items():
            if k in done:
                continue
            with passes.recording(part, keeps_graph=False):
                losses = part.evaluate(chosen)
            torch.autograd.backward(losses, self._scaling(torch.full_like(losses, 1 / sizes[k])))
            found = own_memory(take_gradients(params))
            check_all_dense(found)
            self._workers.gradients_cleared()
            total = add_scaled(total, found, self._share * sizes[k] / passes.size)
            of_scope = [found[i] for i in self._positions]
            if k in grads:
                grads[k] = added(of_scope, self._scope, grads[k])
            else:
                pairs = zip(of_scope, self._scope, strict=True)
                grads[k] = [torch.zeros_like(p, requires_grad=False) if g is None else g for g, p in pairs]
        swap_gradients(params, total)

    def _find_at_once(self, rows: dict[int, list[int]]) -> ClassesAtOnce | None:
        """What evaluates several classes at once: where all weights are perturbed, on one worker, of a batch in one part."""
        at_once = sum(map(len, of_equal_size(rows)))
        # On a GPU a small pass for each of the others costs more than what all classes can share.
        if not at_once or not (self._on_cpu or 2 * at_once > len(rows)):
            return None
        passes, scope = self._passes, self._scope
        whole = len(passes.parts) == 1 and len(scope) == sum(param.requires_grad for param in passes._params)
        if not whole or self._workers.averages or passes.network is None:
            return None
        part = passes.parts[0]
        return passes.network.at_once((passes.mode, part.kind), scope, part.closure)

    def _refuse_at_once(self, error: Refused) -> None:
        passes, self._at_once = self._passes, None
        passes.network.refuse_at_once((passes.mode, passes.parts[0].kind), error)  # type: ignore[union-attr]

    def _agree(self, part: Any, chosen: Tensor, found: Sequence[Tensor]) -> bool:
        """Whether a class has these gradients where it is evaluated alone: torch has rules for vmap that are wrong."""
        losses = part.evaluate(chosen, at_w=False)
        seed = self._scaling(torch.full_like(losses, 1 / len(losses)))
        alone = Differentiable(losses, self._scope, self._optimizer.all_weights()).gradients(seed, retain_graph=False)
        wanted = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(found, alone, strict=True)]
        coarse = torch.is_autocast_enabled(losses.device.type) or any(one.dtype != torch.float64 for one in found)
        largest = float(torch.stack([one.abs().max() for one in wanted if one.numel()]).max())
        bound = (COARSE if coarse else TOLERANCE[torch.float64]) * largest
        return not math.isfinite(bound) or all(
            torch.allclose(one, other, rtol=0.0, atol=bound) for one, other in zip(found, wanted, strict=True)
        )

    def _at_once_at_weights(
        self, part: Any, indices: dict[int, Tensor], total: list[Tensor | None]
    ) -> tuple[list[Tensor | None], set[int]]:
        """A forward and backward for all classes with as many samples each; the sum of gradients, and these classes."""
        done: set[int] = set()
        passes = self._passes
        checks = self._at_once is not None and passes.network.checks_at_once((passes.mode, part.kind))  # type: ignore[union-attr]
        for classes in of_equal_size(indices):
            if self._at_once is None:
                break
            closure, values = self._at_once.at_weights(len(classes))
            index = torch.cat([indices[k] for k in classes])
            before = generators(index.device)
            try:
                losses = part.evaluate(index, closure=closure)
            except Refused as error:
                self._refuse_at_once(error)
                break
            seed = self._scaling(torch.full_like(losses, len(classes) / len(index)))
            found = torch.autograd.grad(losses, values, seed, allow_unused=True)
            stack = own_stacks(found, values)
            # What draws would draw other numbers alone. Of a generator that the closure seeds only the first class has them.
            if checks and same_generators(before, generators(index.device)):
                if not self._agree(part, indices[classes[-1]], [one[-1] for one in stack]):
                    part.total = part.total - losses.detach().sum()
                    self._refuse_at_once(Refused("torch.vmap gives other gradients"))
                    break
            sums: list[Tensor | None] = [None] * len(total)
            for i, grad in zip(self._positions, found, strict=True):
                sums[i] = None if grad is None else grad.sum(0)
            total = add_scaled(total, sums, self._share * len(index) / len(classes) / self._passes.size)
            self._stacks.append((classes, stack))
            self.gradients.grads |= {k: [one[i] for one in stack] for i, k in enumerate(classes)}
            done.update(classes)
        return total, done

    def _part_at_weights(self, part: Any, rows: dict[int, list[int]], sizes: dict[int, int]) -> None:
        """A forward for all classes, and a backward for each, or one that they share."""
        grads = self.gradients.grads
        passes, unchanged = self._passes, self._passes.unchanged
        shared = passes.shared(self._scope) if rows and not self._head else None
        # The mean loss is differentiated with the perturbed one: their gradients meet where the head begins.
        waits = self._head is not None and unchanged is not None
        with (
            self._head.watched(self._runs_compiled(part)) if self._head else _NOTHING,
            shared.record_outputs() if shared else _NOTHING,
            passes.recording(part, keeps_graph=waits),
        ):
            losses = part.evaluate()
        self._optimizer.graphs.check(losses)
        if self._head and not self._head.keeps_apart(losses):
            self._head = None
        # A checkpoint's recomputation could not tell the two passes apart.
        if waits and (self._head is None or self._head.in_checkpoint):
            waits = False
            unchanged.forget()  # type: ignore[union-attr]
        mean = self._scaling(torch.full_like(losses, self._share / self._passes.size))
        shares = {}
        for k, chosen in self._on_device(rows, losses.device).items():
            weights = torch.zeros_like(losses).index_fill_(0, chosen, 1 / sizes[k])
            shares[k] = self._scaling(weights), chosen
        found = None
        passes.look_for_others(losses, shared is not None)
        if shared is not None and shares and self._share > 0 and not passes.trains_others:
            factors = [Weighting(weights / mean, chosen) for weights, chosen in shares.values()]
            found = passes.attempt(lambda: shared(losses, mean, factors))
        if found is not None:
            for k, one in zip(shares, found, strict=True):
                grads[k] = added(one, self._scope, grads.get(k))
            return
        at_w = Differentiable(losses, self._scope, self._optimizer.all_weights())
        for k, (weights, _) in shares.items():
            grads[k] = added(at_w.gradients(weights), self._scope, grads.get(k))
        if waits:
            self._waiting = losses, mean
        else:
            torch.autograd.backward(losses, mean)

    def _runs_compiled(self, part: Any) -> bool:
        """Whether a part's closure runs what torch.compile has made, as far as that can be seen."""
        modules = [*modules_in(part.closure), *([self._optimizer.model] if self._optimizer.model is not None else [])]
        return calls_compiled(part.closure) or any(is_compiled(one) for module in modules for one in module.modules())

    def _find_head(self) -> Head | None:
        """The module of the scope's parameters, if it computes each row by itself; hooks come and go from step to step."""
        optimizer = self._optimizer
        if optimizer.plan == "published":
            return None
        known = optimizer.row_wise_head
        if known is None or not same_items(known[0], self._scope):
            root = optimizer.head_module if optimizer.model is None else optimizer.model  # type: ignore[attr-defined]
            owner = owner_of(self._scope, root)
            known = optimizer.row_wise_head = self._scope, None if owner is None else Head(owner, self._scope)
        head = known[1]
        return head if head and by_row_alone(head.module) else None

    def _sizes_everywhere(self, sizes: dict[int, int]) -> dict[int, int]:
        """The numbers of samples of each class in all workers' batches."""
        sums = torch.zeros(self._optimizer.classes() or 0, dtype=torch.long, device=self._scope[0].device)
        for k, size in sizes.items():
            sums[k] = size
        self._workers.add_up([sums])
        return {k: size for k, size in enumerate(sums.tolist()) if size}

    def at_perturbed(self, share: float) -> Gradient:
        """The gradient of ``share`` times the mean loss, each sample at its class's weights, added to that in place."""
        passes = self._passes
        perturbation = passes._step._perturbation
        share = share / passes.size
        if self._optimizer.model is not None:
            perturbation.disable_running_stats(self._optimizer.model)
        if self._head:
            self._by_row(self._head, share)
        else:
            self._class_by_class(share)
        return Gradient(gradients_of(passes._params), next(passes._step.gradient_numbers), True)

    def _by_row(self, head: Head, share: float) -> None:
        """In one pass: nothing mixes samples from the head's input on."""
        parts, grads = self._passes.parts, self.gradients.grads
        for part, rows in zip(parts, self._rows, strict=True):
            weights = [grads[k] for k in rows]
            with self._workers.backward(last=part is parts[-1]), head.by_row(list(rows.values()), weights):
                with self._passes.reusing():
                    losses = part.evaluate(at_w=False)
                seed = self._scaling(torch.full_like(losses, share))
                at_w, mean = self._waiting or (None, None)
                if at_w is None:
                    torch.autograd.backward(losses, seed)
                else:
                    torch.autograd.backward([losses, at_w], [seed, mean])

    def _class_by_class(self, share: float) -> None:
        """In a pass for each class: of its samples, or of the whole batch where samples may mix."""
        grads, done = self.gradients.grads, self._at_once_at_perturbed(share)
        passes = [(k, n) for k in grads if k not in done for n, rows in enumerate(self._rows) if k in rows]
        if passes:
            self._passes._step._perturbation.back_up(self._scope, self._positions, self._workers)
        for k, number in passes:
            part, rows = self._passes.parts[number], self._rows[number][k]
            ops.restore_(self._scope, grads[k])
            index = rows if self._are_separable(part) else None
            with self._workers.backward(last=(k, number) == passes[-1]):
                with self._passes.reusing():
                    losses = part.evaluate(index, at_w=False)
                weights = torch.full_like(losses, share)
                if index is None:
                    weights = torch.zeros_like(losses).index_fill_(0, rows, share)
                torch.autograd.backward(losses, self._scaling(weights))

    def _at_once_at_perturbed(self, share: float) -> set[int]:
        """A forward and backward for classes whose gradients were found at once, which leave the weights; these classes."""
        done: set[int] = set()
        for classes, stack in self._stacks:
            if self._at_once is None:
                break
            part, rows = self._passes.parts[0], self._rows[0]
            closure = self._at_once.at_values(stack)
            try:
                losses = part.evaluate(torch.cat([rows[k] for k in classes]), at_w=False, closure=closure)
            except Refused as error:
                self._refuse_at_once(error)
                break
            torch.autograd.backward(losses, self._scaling(torch.full_like(losses, share)))
            done.update(classes)
        return done


_NOTHING = contextlib.nullcontext()


def _members_of(labels: Sequence[Any]) -> dict[int, dict[int, list[int]]]:
    """For each class the parts of the batch that it occurs in, with the numbers of its samples there."""
    members: dict[int, dict[int, list[int]]] = {}
    for part, targets in enumerate(labels):
        for number, label in enumerate(targets.tolist()):
            members.setdefault(label, {}).setdefault(part, []).append(number)
    return members


def added(found: Sequence[Tensor | None], params: list[Tensor], so_far: list[Tensor] | None) -> list[Tensor]:
    """Gradients in memory of their own, added to what there is so far."""
    check_all_dense(found)
    if so_far is None:
        so_far = [torch.empty_like(param, requires_grad=False) for param in params]
        for mine, grad in zip(so_far, found, strict=True):
            mine.zero_() if grad is None else mine.copy_(grad)
    else:
        for mine, grad in zip(so_far, found, strict=True):
            if grad is not None:
                mine += grad
    return so_far


def own_stacks(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients (K, ...) in contiguous memory of their own: autograd may give one tensor for two sums."""
    seen: set[int] = set()
    stacks = []
    for grad, values in zip(found, like, strict=True):
        own = torch.zeros(values.shape, dtype=values.dtype, device=values.device) if grad is None else grad.contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        stacks.append(own)
    return stacks
