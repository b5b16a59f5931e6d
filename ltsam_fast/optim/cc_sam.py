"""CC-SAM: every class has a perturbation, and a radius, of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_choice, check_factor
from ltsam_fast.optim.ascent import sign_of
from ltsam_fast.optim.batch import Batch, Scaling, mean_loss
from ltsam_fast.optim.by_class import added, climb_by_class, members_of
from ltsam_fast.optim.gradients import Differentiable, Uninterrupted, _same_items
from ltsam_fast.optim.head import Head, by_row_alone, owner_of
from ltsam_fast.optim.sharing import Sharing
from ltsam_fast.shared import Weighting


class CCSAM(Sharing):
    r"""Class-conditional sharpness-aware minimization, its first stage.

    .. code-block:: text

        for each class k in the batch and each tensor t of the scope:          n_k training samples
            G_kt     = grad of the mean loss of class k at w
            r_kt     = noise_ratio * sqrt(|w|) / sqrt(|G_kt|) / sqrt(2) / (n_k - 1)^(1/4) / P^(1/4)
            delta_kt = r_kt * sqrt(P) * G_kt / |G_kt|                           P scalars, of joint norm |w|, in the scope
        w <- base_step(w, grad of (1 - flat_ratio) * (1/B) sum_j l_j(w) + flat_ratio * (1/B) sum_j l_j(w + delta_{y_j}))

    The loss of a sample is that of its place in the whole batch: the closure is always called with all samples, so batch norm
    sees what it sees in training by SGD, and a class of one sample is no special case. With ``noise_ratio=0`` a step is the
    base optimizer's.

    Where samples stay apart from the head's input on (looked at in each step), its rows get the weights of their classes:
    two forwards and two backwards, and for each class in the batch a backward through the head. That needs the head as a
    module, given as ``head`` or found in ``model``, which the forward pass calls once, with one tensor that has the samples'
    rows, outside of reentrant checkpoints and ``torch.compile``; it must be made of torch's linear layers, layer norms, dropout
    and activations, without hooks, or of modules that say ``keeps_samples_apart = True``. What is detached behind the
    head, or read of its weights elsewhere, is not seen. All else takes a forward and a backward of the whole batch for each
    class in it, and so does ``scope="all"``. A gradient set of the scope is kept for each class. All norms are one pass, and
    so are all perturbations.

    Dropout is drawn anew in every forward pass: the perturbed losses see other masks than the plain ones, and where each class
    has a pass each has a mask.

    ``shared_backward=True`` takes the gradients of all classes and the mean's from one sweep, see
    :class:`ltsam_fast.optim.sharing.Sharing`; it pays with ``scope="all"``.

    Targets on the cpu are read without waiting for the device. With ``ascent_sync=True`` the mean loss of a class is that of
    all workers' samples.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: Not looked at: the radius is the rule's. Taken for the sake of one signature.
        adaptive: Must be False.
        class_counts: C numbers of training samples.
        scope: "head": perturb the classifier, as published; "all": the whole network.
        head: The classifier's parameters or module; ``None``: those of the last parameter group.
        noise_ratio: Factor of all radii, >= 0.
        flat_ratio: Share of the perturbed loss, in [0, 1].
        model: If given, running statistics of normalization layers see the unperturbed pass only; else every forward pass
            updates them.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``; and ``shared_backward`` (False, True or "auto", with ``model``): the
            gradients at w from one backward sweep, see :class:`ltsam_fast.optim.sharing.Sharing`.

    Raises:
        ValueError: ``class_counts`` or a number is out of its range, ``scope`` is unknown, or ``head`` is not among ``params``.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: a class of one sample gets the radius of two, a zero gradient no perturbation; the
    head's second pass recomputes the features; labels are not mixed. Where a group is maximized, its perturbation points the
    other way.

    Source: Zhou et al., "Class-Conditional Sharpness-Aware Minimization for Deep Long-Tailed Recognition", CVPR 2023; the
    radius is the published code's, with the joint norm of the weights and each tensor's own norm of the gradient.

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = CCSAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    _takes_shards = False
    _counts_passes = True
    _twice = True
    _uncapturable = "it looks up the classes in the batch on the host"
    _kept = (*Sharing._kept, "class_counts", "scope", "noise_ratio", "flat_ratio", "_head", "_given")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        class_counts: Any,
        scope: str = "head",
        head: Any = None,
        noise_ratio: float = 1e-6,
        flat_ratio: float = 0.5,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        ops.focal_weights(class_counts)  # checks the counts
        check_choice("scope", scope, ("head", "all"))
        self.noise_ratio = check_factor("noise_ratio", noise_ratio)
        self.flat_ratio = check_factor("flat_ratio", flat_ratio, below=math.nextafter(1.0, 2.0))
        self.class_counts = torch.as_tensor(class_counts, dtype=torch.float64).tolist()
        self.scope = scope
        self._head: list[tuple[int, int]] | None = None
        self._given = head if isinstance(head, torch.nn.Module) else None
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)
        if head is not None:
            self._head = self._find(head)

    def _forget(self) -> None:
        super()._forget()
        self._found: tuple[list[Tensor], Head | None] | None = None

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["adaptive"]:
            raise ValueError("adaptive must be False for CCSAM: its perturbation is not scaled by the weights")

    def _find(self, head: Any) -> list[tuple[int, int]]:
        """The head's parameters by group and position, which copies and checkpoints keep."""
        wanted = list(head.parameters()) if isinstance(head, torch.nn.Module) else list(head)
        places = {id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        missing = [tuple(p.shape) for p in wanted if id(p) not in places]
        if missing or not wanted:
            raise ValueError(
                f"head must be a module, or parameters, of those given as params; not among them: {missing}"
            )
        return [places[id(p)] for p in wanted]

    def _scope(self) -> tuple[list[Tensor], list[int]]:
        places = [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        if self.scope == "head":
            last = max((g for g, _ in places), default=None)  # the last group that has parameters
            places = self._head or [(g, i) for g, i in places if g == last]
        params = [self.param_groups[g]["params"][i] for g, i in places]
        moving = [n for n, (g, _) in enumerate(places) if params[n].requires_grad and self.param_groups[g]["perturb"]]
        return [params[n] for n in moving], [places[n][0] for n in moving]

    def _head_module(self, scope: list[Tensor]) -> Head | None:
        if self._found is None or not _same_items(self._found[0], scope):
            root = self._given if self.model is None else self.model
            owner = owner_of(scope, root)
            self._found = scope, None if owner is None else Head(owner, scope)
        head = self._found[1]
        return head if head and by_row_alone(head.module) else None  # looked at in each step: hooks come and go

    @property
    def _classes(self) -> int:
        return len(self.class_counts)

    def _share(
        self,
        losses: Tensor,
        scope: list[Tensor],
        mean: Tensor,
        shares: dict[int, tuple[Tensor, Tensor]],
        grads: dict[int, list[Tensor]],
    ) -> bool:
        """Takes the mean's gradient, and those of the classes, from one sweep, if that can be."""
        if self._sharing is None or not shares or self.flat_ratio == 1:
            return False
        weightings = [Weighting(share / mean, chosen) for share, chosen in shares.values()]
        found = self._sharing(losses, mean, weightings)
        if found is None:
            return False
        for k, one in zip(shares, found, strict=True):
            grads[k] = added(one, scope, grads.get(k))
        return True

    def _sizes_everywhere(self, sizes: dict[int, int], device: torch.device) -> dict[int, int]:
        """The numbers of samples of each class in all workers' batches."""
        sums = torch.zeros(self._classes, dtype=torch.long, device=device)
        for k, size in sizes.items():
            sums[k] = size
        self._add_up([sums])
        return {k: size for k, size in enumerate(sums.tolist()) if size}

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        scope, groups = self._scope()
        flat_ratio = self.flat_ratio if scope else 0.0  # with nothing to perturb all of the loss is plain
        size = sum(part.size for part in parts)
        members = members_of([part.labels for part in parts])
        sizes = {k: sum(map(len, numbers.values())) for k, numbers in members.items()}
        synced = self.ascent_sync and self._distributed and flat_ratio > 0
        if synced:
            sizes = self._sizes_everywhere(sizes, scope[0].device)
        classes = sorted(sizes) if flat_ratio > 0 else []
        grads: dict[int, list[Tensor]] = {}
        rows: list[dict[int, Tensor]] = []  # the samples of each part's classes
        head = self._head_module(scope) if classes else None
        for number, part in enumerate(parts):
            with self._local(last=not classes and part is parts[-1]):
                with head.watched() if head else contextlib.nullcontext():
                    losses = self._evaluate_for(part, scope) if classes else part.evaluate()
                if head and not head.keeps_apart(losses):
                    head = None
                mean = scaling(torch.full_like(losses, (1 - flat_ratio) / size))
                shares = {}
                rows.append({})
                for k in classes:
                    if number in members.get(k, ()):
                        chosen = rows[-1][k] = torch.tensor(members[k][number], device=losses.device)
                        share = torch.zeros_like(losses).index_fill_(0, chosen, 1 / sizes[k])
                        shares[k] = scaling(share), chosen
                if not self._share(losses, scope, mean, shares, grads):
                    at_w = Differentiable(losses, scope, self._everything())
                    for k, (share, _) in shares.items():
                        grads[k] = added(at_w.gradients(share), scope, grads.get(k))
                    torch.autograd.backward(losses, mean)
        if synced:
            self._add_up([grad for k in classes for grad in grads.setdefault(k, list(map(torch.zeros_like, scope)))])
            classes = sorted(members)  # those of other workers are not evaluated here
        if classes:
            signs = [sign_of(self.param_groups[group]) for group in groups]
            counts = [self.class_counts[k] for k in classes]
            climb_by_class(scope, [grads[k] for k in classes], counts, self.noise_ratio, signs, *scaling.signals)
            if head:
                self._freeze_statistics()
                self._backward_by_row(parts, rows, head, grads, scaling)
            else:
                self._perturb(scope, groups, lambda backups: ops.restore_(backups, scope))
                self._backward_by_class(parts, rows, scope, grads, scaling)
        self._descend(*scaling.signals)
        return mean_loss(parts)

    def _backward_by_row(
        self,
        parts: list[Batch],
        rows: list[dict[int, Tensor]],
        head: Head,
        grads: dict[int, list[Tensor]],
        scaling: Scaling,
    ) -> None:
        """The gradient at the perturbed weights in one pass: nothing mixes samples from the head's input on."""
        share = self.flat_ratio / sum(part.size for part in parts)
        for part, of in zip(parts, rows, strict=True):
            with self._local(last=part is parts[-1]), head.by_row(list(of.values()), [grads[k] for k in of]):
                losses = part.evaluate(at_w=False)
                torch.autograd.backward(losses, scaling(torch.full_like(losses, share)))

    def _backward_by_class(
        self,
        parts: list[Batch],
        rows: list[dict[int, Tensor]],
        scope: list[Tensor],
        grads: dict[int, list[Tensor]],
        scaling: Scaling,
    ) -> None:
        """The same in a pass for each class, of the whole batch, whose samples may mix."""
        share = self.flat_ratio / sum(part.size for part in parts)
        passes = [(k, number) for k in grads for number, of in enumerate(rows) if k in of]
        for k, number in passes:
            with Uninterrupted():
                ops.restore_(scope, grads[k])
            with self._local(last=(k, number) == passes[-1]):
                losses = parts[number].evaluate(at_w=False)
                weights = torch.zeros_like(losses).index_fill_(0, rows[number][k], share)
                torch.autograd.backward(losses, scaling(weights))
