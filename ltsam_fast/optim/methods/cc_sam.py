"""CC-SAM: every class has a perturbation, and a radius, of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.models import classifier
from ltsam_fast.ops.checks import shown
from ltsam_fast.optim.optimizer import Rule, SharpnessAware
from ltsam_fast.optim.options import option
from ltsam_fast.optim.registry import registered
from ltsam_fast.optim.step import AtClassPerturbed, ByClass, Step


def _kept_head(name: str, value: Any) -> Any:
    """A list of what is no module, which may be read once only."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, torch.nn.Module) else value


@registered("cc_sam", "CC-SAM")
class CCSAM(SharpnessAware):
    r"""Class-conditional sharpness-aware minimization, its first stage.

    .. code-block:: text

        for each class k in the batch and each tensor t of the scope:          n_k training samples
            G_kt     = grad of the mean loss of class k at w
            r_kt     = noise_ratio * sqrt(|w|) / sqrt(|G_kt|) / sqrt(2) / (n_k - 1)^(1/4) / P^(1/4)
            delta_kt = r_kt * sqrt(P) * G_kt / |G_kt|                           P scalars, of joint norm |w|, in the scope
        w <- base_step(w, grad of (1 - flat_ratio) * (1/B) sum_j l_j(w) + flat_ratio * (1/B) sum_j l_j(w + delta_{y_j}))

    The loss of a sample is that of its place in the whole batch: where samples mix, the closure is called with all of them, so
    batch norm sees what it sees in training by SGD, and a class of one sample is no special case. With ``noise_ratio=0`` a step
    is the base optimizer's.

    Where samples stay apart from the head's input on (looked at in each step), its rows get the weights of their classes in
    one pass, and for each class in the batch there is a backward through the head. That needs the head as a module, given as
    ``head`` or found in ``model``, which the forward pass calls once, with one tensor that has the samples' rows, outside of
    reentrant checkpoints and ``torch.compile``; it must be made of torch's linear layers, layer norms, dropout and activations
    as they are, or of modules that say ``keeps_samples_apart = True``. What is detached behind the head is not seen, nor
    is what compiled code reads of its weights. With ``model`` the backbone then has one forward and one backward, as in a step
    of SGD.

    All else takes a forward and a backward of the whole batch for each class in it, and so does ``scope="all"``; of the class's
    samples only, given ``model``, whose samples do not mix, and a closure that takes an index. If then the scope is all trained
    weights, four or more classes with as many samples each are evaluated at once (``torch.func.vmap``). A gradient set of the
    scope is kept for each class. All norms are one pass, and so are all perturbations.

    Dropout is drawn anew in every forward pass: the perturbed losses see other masks than the plain ones, and where each class
    has a pass each has a mask.

    Targets on the cpu are read without waiting for the device. With ``ascent_sync=True`` the mean loss of a class is that of
    all workers' samples.

    Differences from the published code: a class of one sample gets the radius of two, a zero gradient no perturbation; the
    head's second pass recomputes the features; labels are not mixed. Where a group is maximized, its perturbation points the
    other way.

    Source: Zhou et al., "Class-Conditional Sharpness-Aware Minimization for Deep Long-Tailed Recognition", CVPR 2023; the
    radius is the published code's, with the joint norm of the weights and each tensor's own norm of the gradient.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = CCSAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    scope = option(
        "head", '"head": perturb the classifier, as published; "all": the whole network.', choices=("head", "all")
    )
    head = option(
        None,
        "The classifier's parameters or module. None: those of the last parameter group; of a single group, given ``model``, "
        "those of its last linear layer. Kept are their places in the groups.",
        check=_kept_head,
        accepts="a module, or parameters, of those given as params",
        optional=True,
    )
    noise_ratio = option(1e-6, "Factor of all radii.", ge=0)
    flat_ratio = option(0.5, "Share of the perturbed loss.", ge=0, le=1)

    several_gradients = True
    whole_gradients = True
    own_reductions = True
    host_only = "it looks up the classes in the batch on the host"
    pickled = (*SharpnessAware.pickled, "head_module")

    head_module: torch.nn.Module | None = None
    """The head, if it was given as a module."""

    def resolve_options(self) -> None:
        head = self.head
        if head is not None:
            self.head_module = head if isinstance(head, torch.nn.Module) else None
            self.head = self.defaults["head"] = self._places(head)

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options["class_counts"] is None:
            raise ValueError("class_counts must be given for CCSAM: C numbers of training samples, got None")

    def check_group(self, group: dict[str, Any]) -> None:
        if group["adaptive"]:
            raise ValueError("adaptive must be False for CCSAM: its perturbation is not scaled by the weights")

    def _places(self, head: Any) -> list[list[int]]:
        """The head's parameters by group and position, which copies and checkpoints keep."""
        wanted = list(head.parameters()) if isinstance(head, torch.nn.Module) else head
        if not isinstance(wanted, list) or not all(isinstance(one, torch.Tensor) for one in wanted):
            raise TypeError(f"head must be a module, or parameters, of those given as params, got {shown(head)}")
        places = {id(p): [g, i] for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        missing = [tuple(p.shape) for p in wanted if id(p) not in places]
        if missing or not wanted:
            raise ValueError(
                f"head must be a module, or parameters, of those given as params; not among them: {missing}"
            )
        return [places[id(p)] for p in wanted]

    def _places_of_head(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of all places that are the head's, if it was not given."""
        last = max((g for g, _ in places), default=None)  # the last group that has parameters
        if self.model is not None and all(g == last for g, _ in places):
            with contextlib.suppress(ValueError):  # a network without linear layers
                layer = {id(param) for param in classifier(self.model).parameters()}
                found = [(g, i) for g, i in places if id(self.param_groups[g]["params"][i]) in layer]
                if found:
                    return found
        return [(g, i) for g, i in places if g == last]

    def perturbed_parameters(self) -> list[int]:
        """The positions of the parameters in the scope, among all."""
        places = [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        position = {place: number for number, place in enumerate(places)}
        if self.scope == "head":
            places = [(g, i) for g, i in self.head] if self.head else self._places_of_head(places)
        groups = self.param_groups
        return [position[g, i] for g, i in places if groups[g]["perturb"] and groups[g]["params"][i].requires_grad]

    def ascent_params(self) -> list[Tensor]:
        params, _ = self.all_params()
        return [params[i] for i in self.perturbed_parameters()]

    def classes(self) -> int:
        """The number of classes."""
        self.check_options(self.param_groups[0])
        return len(self.class_counts)

    def rule(self, step: Step) -> Rule:
        scope = self.perturbed_parameters()
        flat = self.flat_ratio if scope and self.noise_ratio else 0.0  # unperturbed, all of the loss is plain
        g, by_class = yield ByClass(1 - flat, scope)
        if by_class.classes:
            counts = [max(self.class_counts[k], 2.0) for k in by_class.classes]
            step.ascend_by_class(by_class, lambda *sizes: self._scales(counts, *sizes))
            g = yield AtClassPerturbed(flat)
        step.descend(g)

    def _scales(self, counts: list[float], norms: Tensor, weight_norm: Tensor, size: int) -> Tensor:
        """r_kt sqrt(P) / |G_kt|, shape (K, T); 0 where the gradient is 0."""
        rare = torch.tensor([count - 1 for count in counts], dtype=torch.float64, device=norms.device)
        root = (weight_norm + 1e-12).sqrt()
        radius = self.noise_ratio * root * size**0.25 / math.sqrt(2) * rare**-0.25
        return torch.where(norms > 0, radius[:, None] * norms**-1.5, torch.zeros_like(norms))
