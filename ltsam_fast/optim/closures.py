"""Closures: evaluated with gradients out of reach, their losses checked and weighed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import SKIP
from ltsam_fast.ops.dispatch import clear_weight_caches
from ltsam_fast.optim.gradients import swap_gradients
from ltsam_fast.shared.qualify import is_compiled

if TYPE_CHECKING:
    from ltsam_fast.optim.amp import LossScale
    from ltsam_fast.optim.criterion import Criterion

Closure = Callable[..., Tensor]

_PUBLISHED = "a closure that calls backward() itself, as in scripts for the published SAM, is for ltsam_fast.compat.SAM"
_LIGHTNING = (
    "for Lightning derive from ltsam_fast.trainers.lightning.SharpnessAwareModule, and write training_losses() in place of "
    "training_step()"
)
_NO_GRAPH = (
    "closure must return losses of a forward pass of its own, without calling backward(), got some whose graph was used up: "
    f"return the per-sample losses alone, with reduction='none'; {_PUBLISHED}"
)
_CHANGED_IN_PLACE = (
    "closure must run the whole forward pass each time it is called, and change in place nothing that the backward pass "
    "needs; got losses of which something was changed since"
)


def explained(error: RuntimeError) -> Exception:
    """An error of a step, or one that says what is wrong if the closure ran the backward pass itself, or no forward pass."""
    said = str(error)
    if "backward through the graph a second time" in said:
        return ValueError(_NO_GRAPH)
    return ValueError(_CHANGED_IN_PLACE) if "modified by an inplace operation" in said else error


class Part:
    """A closure with its labels: the batch, or one of the parts that it comes in. With a criterion it returns logits.

    Attributes:
        labels: The samples' classes, shape (B,), if they are known.
        weighed_by: What the samples' weights follow from: the labels, or the caller's weights u and v, shape (2, B).
        size: The number of samples; -1 until it is known.
        losses: The losses seen at w, detached, shape (B,), if those of all samples were seen at once.
        total: The sum of the losses seen at w.
        weights: Weights of the samples, shape (B,), by the :class:`ltsam_fast.optim.closures.ClassWeights` they are from.
        host_labels: ``weighed_by`` on the CPU, once it is needed there.
        separable: Whether its samples can be evaluated in sub-batches, once that is known.
        logit_gradients: For each of two weightings the latest pass's logits and their gradient, if the criterion made these.
    """

    def __init__(
        self,
        closure: Closure,
        labels: Tensor | None,
        params: list[Tensor],
        scaling: LossScale,
        criterion: Criterion | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.closure, self.labels, self._params, self.criterion = closure, labels, params, criterion
        self._scaling = scaling
        self.weighed_by = labels if weights is None else weights
        self.size = weights.shape[1] if weights is not None else -1 if labels is None else len(labels)
        self._sized_by = "targets" if weights is None else "weights"
        self.losses: Tensor | None = None
        self.total: Any = 0
        self.weights: dict[Weights, Tensor] = {}
        self.host_labels: Tensor | None = None
        self.separable: bool | None = None
        self.logit_gradients: list[tuple[Tensor, Tensor]] | None = None
        self._masks: dict[Weights, Tensor] = {}
        self._indices: dict[tuple[Weights, bool], Tensor] = {}
        self._needs_index = _needs_index(closure)

    def evaluate(
        self,
        index: Tensor | None = None,
        *,
        at_w: bool = True,
        graph: bool = True,
        weighted: Callable[..., Any] | None = None,
        closure: Closure | None = None,
    ) -> Tensor:
        """The closure's per-sample losses, checked.

        Args:
            index: The numbers of the samples wanted, 1-D; None: all.
            at_w: The weights are not perturbed: these losses count for what the step returns.
            graph: The losses are to be differentiated.
            weighted: Makes losses and gradients of logits, see :meth:`Criterion.weighted`; then ``logit_gradients`` may be set,
                and the losses have no graph.
            closure: What is called in place of the closure.
        """
        closure = closure or self.closure
        self.logit_gradients = None
        if index is None and self.size >= 0 and self._needs_index:
            index = torch.arange(self.size, device=None if self.weighed_by is None else self.weighed_by.device)
        stash = _stash_gradients(self._params)
        try:
            with torch.set_grad_enabled(graph):
                losses = closure() if index is None else closure(index)
                if self.criterion is not None:
                    logits, labels = losses, self.labels
                    self.criterion.check_logits(logits)
                    labels = labels if index is None else labels[index.to(labels.device)]  # type: ignore[index, union-attr]
                    if weighted is not None and (both := weighted(logits, labels)) is not None:
                        losses, gradients = both
                        self.logit_gradients = [(logits, one) for one in gradients]
                    else:
                        losses = self.criterion(logits, labels)  # type: ignore[arg-type]
        except RuntimeError as error:
            if graph or "does not require grad" not in str(error):
                raise
            raise ValueError(f"closure must run without gradients too: {self._instead()}") from error
        finally:
            _restore_gradients(self._params, stash)
            if not graph:
                clear_weight_caches()  # autocast keeps casts that have no gradients, too
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            if self.criterion is not None:
                raise ValueError(
                    f"loss must return the per-sample losses, shape (B,), got {shape}: use reduction='none'"
                )
            raise ValueError(
                f"closure must return the per-sample losses, shape (B,), got {shape}: use reduction='none'; {self._instead()}"
            )
        if not len(losses):
            raise ValueError(f"closure returned losses of shape (0,), of a batch without samples: {SKIP}")
        if graph and not (losses if self.logit_gradients is None else logits).requires_grad:
            raise ValueError("closure must return losses that depend on the parameters, got a detached tensor")
        self._scaling.check_closure(losses)
        if index is not None:
            if len(losses) != len(index):
                raise ValueError(f"closure returned {len(losses)} losses for an index of {len(index)} samples")
        elif self.size < 0:
            self.size = len(losses)
        elif len(losses) != self.size:
            if at_w or self.losses is None:
                raise ValueError(
                    f"{self._sized_by} has {self.size} entries, but closure returned {len(losses)} losses: give one each"
                )
            raise ValueError(f"closure returned {len(losses)} losses at the perturbed weights, but {self.size} before")
        if at_w:
            seen = losses.detach()
            self.total = self.total + seen.sum()
            self.losses = seen
        return losses

    def seeds(
        self,
        weights: Sequence[Weights | None],
        losses: Tensor,
        divisor: int,
        index: Tensor | None = None,
    ) -> Any:
        """The weights (B,) that losses are differentiated with, one vector for each weighting; None where all are zero.

        Args:
            weights: The weightings; without any it is the mean's.
            losses: (B,)
            divisor: By what the weights are divided: the number of samples.
            index: The numbers of the samples that the losses are of; None: all.
        """
        if not weights:
            return [self._scaling(torch.full_like(losses, 1 / divisor))]
        seeds: list[Tensor | None] = []
        for one in weights:
            if one is None:
                seeds.append(None)
                continue
            if one not in self.weights:
                self.weights[one] = one.of(self.weighed_by, losses)  # type: ignore[arg-type]
            whole = self.weights[one]
            seed = (whole if index is None else whole[index]) / divisor
            seeds.append(self._scaling(seed) if self._scaling.signals else seed)
        return seeds

    def mask(self, weights: Weights) -> Tensor:
        """Which samples have weights that are not zero, (B,), bool, on the CPU. Needs ``host_labels``."""
        if weights not in self._masks:
            self._masks[weights] = weights.nonzero(self.host_labels)  # type: ignore[arg-type]
        return self._masks[weights]

    def index(self, weights: Weights, others: bool = False) -> Tensor:
        """The numbers of these samples, or of the ``others``, ascending, (n,), int64, where ``weighed_by`` is.

        The same tensor each time: what was computed of these samples may be known.
        """
        if (weights, others) not in self._indices:
            mask = self.mask(weights)
            index = (~mask if others else mask).nonzero().flatten()
            self._indices[weights, others] = index.to(self.weighed_by.device, non_blocking=True)  # type: ignore[union-attr]
        return self._indices[weights, others]

    def _instead(self) -> str:
        """What a caller does whose closure is made for other optimizers."""
        module = getattr(getattr(self.closure, "func", self.closure), "__module__", None)
        return _LIGHTNING if "lightning" in str(module) else _PUBLISHED

    def modules(self) -> list[torch.nn.Module]:
        """The modules that a pass calls, as far as that can be seen."""
        loss = self.criterion and self.criterion.loss
        return [*modules_in(self.closure), *([loss] if isinstance(loss, torch.nn.Module) else [])]

    @functools.cached_property
    def takes_index(self) -> bool:
        """Whether the closure may be asked for some of the samples."""
        return takes_index(self.closure)

    @functools.cached_property
    def kind(self) -> Any:
        """What the closure runs, as far as that can be told: two with the same code count as one."""
        loss = self.criterion and self.criterion.loss
        return _kind_of(self.closure), loss and (_kind_of(loss), id(loss) if isinstance(loss, torch.nn.Module) else 0)


def _stash_gradients(params: list[Tensor]) -> list[Tensor | None] | None:
    """Keeps gradients out of reach while a closure runs: it may begin with zero_grad(), as torch's documentation has it."""
    kept = list(map(_grad, params))
    if {*map(type, kept)} <= _NO_GRADIENT:
        return None
    for param in params:
        param.grad = None
    return kept


def _restore_gradients(params: list[Tensor], stash: list[Tensor | None] | None) -> None:
    """Restores the gradients. What the closure left, such as by another optimizer's step, is not this step's."""
    if stash is not None or not {*map(type, map(_grad, params))} <= _NO_GRADIENT:
        swap_gradients(params, stash or [None] * len(params))


_grad = operator.attrgetter("grad")
_NO_GRADIENT = {type(None)}


def _needs_index(closure: Closure) -> bool:
    """Whether a closure can only be called with an index; raises ValueError if it needs more than that."""
    code = getattr(closure, "__code__", None)
    if code is not None and not code.co_argcount:
        return False
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ValueError(
            f"closure must need no arguments but the samples' numbers, got a function of {', '.join(needed)}: let it find the "
            "batch by itself, def closure(index=slice(None)), with the losses of x[index]"
        )
    return bool(needed)


def check_own_samples(closures: Sequence[Closure], labels: Sequence[Tensor | None]) -> None:
    """Raises ValueError if two closures are functions of the same variables, as those of a loop that binds none.

    The same one with the same labels may come twice.
    """
    places: dict[Any, int] = {}
    for place, closure in enumerate(closures if len(closures) > 1 else ()):
        if not isinstance(closure, types.FunctionType):
            continue
        bound = (*(closure.__closure__ or ()), *(closure.__defaults__ or ()), *(closure.__kwdefaults__ or {}).values())
        names = (
            repr(one) if isinstance(one, slice) else id(one) for one in bound
        )  # slice(None) is made anew each time
        known = places.setdefault((closure.__code__, *names), place)
        if closures[known] is not closure or labels[known] is not labels[place]:
            raise ValueError(
                f"closure[{place}] must have samples of its own, but reads the same variables as closure[{known}]: bind them, "
                "such as by a function closure_of(x, y) that returns the closure"
            )


def takes_index(closure: Closure, needed: bool = False) -> bool:
    """Whether a closure's first argument is the numbers of the samples wanted: one without default, or whose default means all.

    Any other default is a value that the closure was given for itself, as in ``lambda x=x: ...``.

    Args:
        closure: The closure.
        needed: The method cannot do without: then a closure whose arguments do not tell may be called with an index.
    """
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return needed
    first = next(iter(parameters), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return False
    if first.kind is first.VAR_POSITIONAL:
        return needed
    if first.default is None:
        return needed or first.name in _INDEX_NAMES
    return first.default is first.empty or first.default is ... or isinstance(first.default, slice)


_INDEX_NAMES = ("index", "indices", "idx", "i")


def check_takes_index(parts: list[Part], method: str) -> None:
    """Raises ValueError unless every closure can be called with an index."""
    for part in parts:
        if not takes_index(part.closure, needed=True):
            raise ValueError(
                f"closure must take an index, for {method} evaluates parts of the batch: "
                f"def closure(index=slice(None)), with the losses of x[index]; {_PUBLISHED}"
            )
        if part.labels is None and part._needs_index:
            raise ValueError(
                "closure must give index a default, or targets must be given: else the batch's size is unknown"
            )


def _kind_of(function: Any, depth: int = 2) -> Any:
    """The code of a function, and of those and the modules that it refers to."""
    code = getattr(getattr(function, "func", function), "__code__", type(function))
    if not depth:
        return code
    others = [one for one in parts_of(function) if callable(one) and not isinstance(one, type)]
    return code, *(id(one) if isinstance(one, torch.nn.Module) else _kind_of(one, depth - 1) for one in others)


def parts_of(value: Any) -> Iterator[Any]:
    """What a callable is made of."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        if str(value.__module__).partition(".")[0] not in ("torch", "ltsam_fast"):
            yield from (value.__globals__.get(name) for name in value.__code__.co_names)
            yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # it is empty yet
                    yield cell.cell_contents
    elif callable(value) and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).values()


def modules_in(closure: Any, depth: int = 3) -> list[torch.nn.Module]:
    """The modules that a closure refers to, as far as that can be seen."""
    found: list[torch.nn.Module] = []
    for one in parts_of(closure):
        found += [one] if isinstance(one, torch.nn.Module) else modules_in(one, depth - 1) if depth else []
    return found


def calls_compiled(closure: Any, depth: int = 3) -> bool:
    """Whether a closure refers to what torch.compile has made, as far as that can be seen."""
    return any(
        is_compiled(one)
        if isinstance(one, torch.nn.Module)
        else hasattr(one, "_torchdynamo_orig_callable") or (depth > 0 and calls_compiled(one, depth - 1))
        for one in parts_of(closure)
    )


class ClassWeights:
    """Weights of the classes in one loss.

    Args:
        values: Shape (C,), not all zero.
        open_ended: Whether the last entry stands for all further classes.
    """

    def __init__(self, values: Tensor, open_ended: bool = False) -> None:
        self.values, self.open_ended = values.double(), open_ended
        self._nonzero = self.values.cpu() != 0
        self.everywhere = bool(self._nonzero.all())
        """Whether no class has weight 0."""

    def of(self, labels: Tensor, losses: Tensor) -> Tensor:
        """The weights of samples with these labels, shape (B,), in the losses' dtype and on their device."""
        self.values = self.values.to(losses.device, non_blocking=True)
        chosen = labels.to(losses.device, torch.long, non_blocking=True)
        if self.open_ended:
            chosen = chosen.clamp(max=len(self.values) - 1)
        return self.values[chosen].to(losses.dtype)

    def vector(self, classes: int, device: torch.device) -> Tensor:
        """The weights of so many classes, (C,), float64."""
        self.values = self.values.to(device, non_blocking=True)
        further = self.values[-1:].expand(max(classes - len(self.values), 0))  # with labels if it is open-ended
        return torch.cat([self.values[:classes], further])

    def nonzero(self, labels: Tensor) -> Tensor:
        """Which samples with these labels, on the CPU, have weights that are not zero, shape (B,), bool."""
        chosen = labels.long()
        return self._nonzero[chosen.clamp(max=len(self._nonzero) - 1) if self.open_ended else chosen]


class SampleWeights:
    """The caller's weights of the samples in one loss, of which only :attr:`Part.weighed_by` has the values.

    Args:
        row: Which of these it is: 0 for u, 1 for v.
    """

    everywhere = False
    """Samples may have weight 0."""

    def __init__(self, row: int) -> None:
        self._row = row

    def of(self, weights: Tensor, losses: Tensor) -> Tensor:
        """The weights of the samples, shape (B,), in the losses' dtype and on their device."""
        return weights[self._row].to(losses, non_blocking=True)

    def nonzero(self, weights: Tensor) -> Tensor:
        """Which samples have weights that are not zero, shape (B,), bool."""
        return weights[self._row] != 0


Weights = ClassWeights | SampleWeights
SAMPLE_WEIGHTS = SampleWeights(0), SampleWeights(1)


def pilot_of(u: Tensor, v: Tensor) -> int | None:
    """Which of two vectors of weights is nowhere near zero, so that it can weigh a sweep that both share; None: neither."""
    sizes = [one.abs() for one in (u, v)]
    least = 1e-3 * max(float(one.max()) for one in sizes)
    return next((i for i, one in enumerate(sizes) if float(one.min()) > least), None)


class CompiledGraphs:
    """What an optimizer knows of the graphs of torch.compile in its closures, if it differentiates losses more than once.

    A graph may give its saved tensors' memory away during the backward. torch refuses to differentiate such a graph again;
    without that (``torch._functorch.config.donated_buffer``) its graphs can be differentiated as often as any.
    """

    def __init__(self) -> None:
        self._compiled = 0  # graphs when the closure's were looked at

    @contextlib.contextmanager
    def reusable(self) -> Iterator[None]:
        """Has torch.compile, if it is at work in here, make graphs that can be differentiated again.

        Around backwards too: for batches of several sizes those are compiled when they are first run.
        """
        from torch._functorch import config

        before = config.donated_buffer
        config.donated_buffer = False
        try:
            yield
        finally:
            config.donated_buffer = before

    def check(self, losses: Tensor) -> None:
        """Raises ValueError if a graph that was compiled elsewhere can be differentiated only once.

        With the setting above torch itself would not notice any more. Looked at only after something was compiled.
        """
        from torch._dynamo.utils import counters

        compiled = counters["stats"]["unique_graphs"]
        if compiled == self._compiled:
            return
        seen, nodes = set(), [losses.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if getattr(getattr(getattr(node, "_forward_cls", None), "metadata", None), "bw_donated_idxs", None):
                raise ValueError(
                    "closure must not use a graph of torch.compile that can be differentiated only once: set "
                    "torch._functorch.config.donated_buffer = False before the model's first forward pass, "
                    "or let that be in step()"
                )
            nodes += [following for following, _ in node.next_functions]
        self._compiled = compiled
