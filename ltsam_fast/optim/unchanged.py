"""What a forward pass computes without any perturbed weight: kept at w, and not computed again at w + eps."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from ltsam_fast.lists import tensors_in
from ltsam_fast.optim.probe import looks_again
from ltsam_fast.shared.qualify import current_checkpoint, is_compiled


class _Result(NamedTuple):
    """What a call gave.

    Attributes:
        value: Its value.
        versions: Those of the tensors in it. One that was changed in place since is not what the call gave.
        arguments: The tensors that it was given. They stay alive, so that no other object gets the ``id`` of one.
    """

    value: Any
    versions: list[int]
    arguments: list[Tensor]

    def is_intact(self) -> bool:
        return self.versions == [one._version for one in tensors_in(self.value)]


class UnchangedResults:
    """Results of calls that no perturbed weight has a part in.

    Calls of torch's functions, and of the outermost modules without perturbed weights, are looked at. A call in the pass at
    w + eps whose arguments are the same objects as at w, unchanged since, gives what it gave there, so it is not run: the
    arguments are the batch, weights that are not perturbed, or results from here. The n-th of several equal calls gives what
    the n-th gave.

    What draws random numbers is always run. So is everything in an activation checkpoint, which has to save in a pass what its
    recomputation will, and modules whose inner modules have hooks. A call's first pass at w + eps runs it and compares, and so
    do a kind's 2nd, 4th, 8th, ... pass: one that gives something else there, since its module reads another one's weights, say,
    is always run from then on.

    Args:
        model: The network.
        perturbed: The weights that may be perturbed.
    """

    def __init__(self, model: nn.Module, perturbed: Sequence[Tensor]) -> None:
        self.model, self.perturbed = model, list(perturbed)
        self._ids = {id(one) for one in perturbed}
        self._memory = {_address(one) for one in perturbed}
        self._device = self.perturbed[0].device
        self._mode = _Calls(self)
        self._results: dict[Any, _Result] = {}
        self._used: dict[Any, _Result] = {}
        self._known: dict[int, int] = {}  # the versions of tensors in results, by id
        self._counts: Counter[Any] = Counter()  # how often a call was made in this pass
        self._excluded: set[Any] = set()
        self._verified: set[Any] = set()
        self._newly_verified: set[Any] = set()
        self._passes: Counter[Any] = Counter()
        self._trials: dict[Any, Trial] = {}
        self._trial: Trial | None = None  # of the kind of the latest pass at w
        self.makes_event = _timing_event if self._device.type == "cuda" else None
        """Makes what tells the time on a GPU; None: reuse always pays."""
        self._notes_draws = False
        self._aside = False  # inside of a call that is looked at as a whole
        self._looks = self._reusing = self._checks_all = self._captured = self._keeps_graph = False

    def forget(self) -> None:
        """Lets go of all results: the step is over."""
        self._results.clear()
        self._used.clear()
        self._known.clear()

    @contextlib.contextmanager
    def recording(self, kind: Any, keeps_graph: bool) -> Iterator[None]:
        """Around a forward pass at w.

        Args:
            kind: What tells passes apart that may be of other code or in another mode.
            keeps_graph: Whether no backward goes through the results before the next forward; else only those are kept that
                have no graph.
        """
        if kind in self._excluded:
            yield
            return
        self._reusing, self._keeps_graph = False, keeps_graph
        self._passes[kind] += 1
        number = self._passes[kind]
        self._captured = _is_captured(self._device)  # what is captured cannot be looked at: what was seen before counts
        self._checks_all = looks_again(number) and not self._captured
        self._trial = None
        if self.makes_event is not None and not self._captured:
            self._trial = self._trials.setdefault(kind, Trial(self.makes_event))
            self._trial.begin(number)
        with contextlib.nullcontext() if self._trial is None else self._trial.timed():
            if self._trial is None or self._trial.reuses:
                with self._recording(kind):
                    yield
            else:
                yield

    @contextlib.contextmanager
    def _recording(self, kind: Any) -> Iterator[None]:
        before = generators(self._device), _generators_elsewhere() if self._checks_all else None
        with self._looking():
            yield
        if before[1] is not None and before[1] != _generators_elsewhere():
            self._excluded.add(kind)
        if not self._notes_draws and not same_generators(before[0], generators(self._device)):
            self._notes_draws = True  # from the next step on it is seen which call draws
            self.forget()
        if kind in self._excluded:
            self.forget()

    @contextlib.contextmanager
    def reusing(self, have_moved: Callable[[], bool]) -> Iterator[None]:
        """Around a forward pass at w + eps, of the latest kind; ``have_moved`` tells whether any weight differs from w."""
        with contextlib.nullcontext() if self._trial is None else self._trial.timed():
            if not self._results:
                yield
                return
            self._reusing = True
            self._used = {}
            self._newly_verified = set()
            with self._looking():
                yield
        if self._newly_verified and have_moved():
            self._verified |= self._newly_verified
        if any(_has_graph(one.value) for one in self._used.values()):  # a backward will go through these, once
            self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._results = {key: one for key, one in self._results.items() if not _has_graph(one.value)}

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        replaced: list[tuple[nn.Module, str, Any, Any]] = []
        self._aside = False
        self._counts.clear()
        try:
            with _LOCK:
                self._replace(self.model, replaced)
            self._looks = True
            with self._mode:
                yield
        finally:
            self._looks = False
            with _LOCK:
                for module, name, before, mine in replaced:
                    if vars(module).get(name) is not mine:  # another thread's, which passes on to this one
                        continue
                    if before is None:
                        del vars(module)[name]
                    else:
                        vars(module)[name] = before

    def _replace(self, module: nn.Module, replaced: list[tuple[nn.Module, str, Any, Any]]) -> None:
        """Has calls of the outermost modules without perturbed weights, and of compiled ones, come here."""
        fixed = self._is_fixed(module)
        if isinstance(module, torch.jit.ScriptModule):
            return
        if not is_compiled(module) and (not fixed or _has_inner_hooks(module)):
            for child in module.children():
                self._replace(child, replaced)
            return
        name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        original = getattr(module, name)
        run = self._whole(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._looks:
                return original(*args, **kwargs)
            return self.call(module, run, args, kwargs) if fixed else run(*args, **kwargs)

        replaced.append((module, name, vars(module).get(name), call))
        vars(module)[name] = call

    def _is_fixed(self, module: nn.Module) -> bool:
        return all(id(one) not in self._ids and _address(one) not in self._memory for one in module.parameters())

    def _whole(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A call that is not looked into. Without the mode: torch.compile would compile anew for it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._aside:
                return run(*args, **kwargs)
            self._aside = True
            depth = torch._C._len_torch_function_stack()
            on_top = depth and torch._C._get_function_stack_at(depth - 1) is self._mode
            try:
                with _pop_mode_temporarily() if on_top else contextlib.nullcontext():
                    return run(*args, **kwargs)
            finally:
                self._aside = False

        return call

    def call(self, what: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a call, or returns what it gave at w."""
        if self._aside:
            return run(*args, **kwargs)
        given: list[Tensor] = []
        with self._unseen():
            key = self._key(what, (args, kwargs), given)
        if key is None:
            return run(*args, **kwargs)
        if self._reusing:
            return self._again(what, key, run, args, kwargs)
        with self._unseen():
            before = generators(self._device) if self._notes_draws else None
            attributes = _attributes(what) if self._checks_all else None
        value = run(*args, **kwargs)
        with self._unseen():
            if (
                before is not None
                and not same_generators(before, generators(self._device))
                or attributes != (_attributes(what) if self._checks_all else None)
            ):
                self._excluded.add(what)
            else:
                self._keep(key, value, given)
        return value

    def _again(self, what: Any, key: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call at w + eps that may have been made at w."""
        with self._unseen():
            found = self._results.get(key)
            if found is not None and not found.is_intact():
                found = None
        name = what, key[1]
        if found is not None and name in self._verified and not self._checks_all:
            self._used[key] = found
            return found.value
        value = run(*args, **kwargs)
        if found is None or self._captured:
            return value
        with self._unseen():
            if not _equal(found.value, value):
                self._excluded.add(what)
                return value
        self._newly_verified.add(name)
        self._used[key] = found
        return found.value

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Around functions of torch that are this class's own."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def _keep(self, key: Any, value: Any, given: list[Tensor]) -> None:
        tensors = tensors_in(value)
        if not tensors or not _is_plain(value) or any(one.is_inference() for one in tensors):
            return
        if not self._keeps_graph and _has_graph(value):
            return
        if any(one is other for one in tensors for other in given):  # changed in place, or as it was
            return
        self._results[key] = _Result(value, [one._version for one in tensors], given)
        self._known.update((id(one), one._version) for one in tensors)

    def _key(self, what: Any, arguments: Any, given: list[Tensor]) -> Any:
        """What tells a call from others; None: it is always run. ``given`` gets the tensors among its arguments."""
        name = getattr(getattr(what, "__self__", None), "__name__", "") or getattr(what, "__name__", "")
        if name in _RAW or name in _HOOKS:
            self._drop(arguments)
            return None
        if what in _BACKWARDS:  # the closure's own, such as for adversarial examples: graphs are used up
            self._keeps_graph = False
            self._drop_graphs()
            return None
        if (
            name in _ELSE
            or what in self._excluded
            or current_checkpoint()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        device = self._device.type
        key: list[Any] = [torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
        if not self._describe(arguments, key, given):
            return None
        if isinstance(what, nn.Module):
            key.append(what.training)
            for one in (*what.parameters(), *what.buffers()):
                key += (id(one), 0 if one.is_inference() else one._version)
        made = (what, *key)
        self._counts[made] += 1
        return (what, self._counts[made], *key)

    def _describe(self, value: Any, key: list[Any], given: list[Tensor]) -> bool:
        """Appends what tells a value from others; False: that is not known."""
        if isinstance(value, Tensor):
            given.append(value)
            if not self._is_known(value):
                return False
            key += (id(value), value._version)
        elif isinstance(value, (tuple, list)):
            key += (type(value), len(value))
            return all(self._describe(one, key, given) for one in value)
        elif isinstance(value, dict):
            key += (dict, *value)
            return all(self._describe(one, key, given) for one in value.values())
        elif isinstance(value, slice):
            key.append(slice)
            return all(self._describe(one, key, given) for one in (value.start, value.stop, value.step))
        elif isinstance(value, _PLAIN):
            key += (type(value), value)
        else:
            return False
        return True

    def _is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor is a result, or none that depends on a perturbed weight as far as autograd knows."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
            return False
        version = self._known.get(id(tensor))
        if version is not None:
            return tensor._version == version
        return tensor.grad_fn is None and id(tensor) not in self._ids and _address(tensor) not in self._memory

    def _drop(self, arguments: Any) -> None:
        """Lets go of what is from, or of, tensors that may be written to without autograd's knowledge, or have hooks."""
        touched = {id(one) for one in tensors_in(arguments)}
        self._results = {
            key: one
            for key, one in self._results.items()
            if touched.isdisjoint(map(id, (*tensors_in(one.value), *one.arguments)))
        }
        for one in touched:
            self._known.pop(one, None)


class Trial:
    """Whether reuse takes less time than it saves. On a GPU launches may cost less than looking for what need not be launched.

    Some passes are timed with it and some without. Then the faster way stays, for passes of one kind in one process.

    Args:
        makes_event: Makes an event with the methods of torch.cuda.Event.
    """

    WITH, WITHOUT = (5, 7, 9), (6, 10, 11)
    """Numbers of passes that are timed; none is one that checks everything."""
    DECIDES = 16
    """One that does, and so waits for the device anyway."""

    def __init__(self, makes_event: Callable[[], Any]) -> None:
        self._makes_event = makes_event
        self._spans: dict[int, list[tuple[Any, Any]]] = {}
        self._number = 0
        self.reuses = True
        """Whether the present pass looks for results."""
        self.decided = False

    def begin(self, number: int) -> None:
        """Begins the pass at w of this number."""
        self._number = number
        if self.decided:
            return
        if number >= self.DECIDES and len(self._spans) == len((*self.WITH, *self.WITHOUT)):
            with_it, without = (min(map(self._time, numbers)) for numbers in (self.WITH, self.WITHOUT))
            self.reuses, self.decided = with_it < without, True
            self._spans.clear()
        else:
            self.reuses = number not in self.WITHOUT

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is evaluated in the present pass, or in the one at w + eps that follows it."""
        if self.decided or self._number not in (*self.WITH, *self.WITHOUT):
            yield
            return
        start, end = self._makes_event(), self._makes_event()
        start.record()
        yield
        end.record()
        self._spans.setdefault(self._number, []).append((start, end))

    def _time(self, number: int) -> float:
        for _, end in self._spans[number]:
            end.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans[number])


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


_LOCK = threading.Lock()


def _has_inner_hooks(module: nn.Module) -> bool:
    """Whether modules in this one have hooks, which would not be called."""
    return any(
        one is not module and (one._forward_hooks or one._forward_pre_hooks or one._backward_hooks)
        for one in module.modules()
    )


def _attributes(what: Any) -> Any:
    """What shows that a module's call has left something in its attributes."""
    if not isinstance(what, nn.Module):
        return None
    return [
        (name, id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for module in what.modules()
        for name, value in vars(module).items()
        if not isinstance(value, (NoneType, bool, int, float, str))  # what counts its calls may count fewer
    ]


class _Calls(TorchFunctionMode):
    """Has calls of torch's functions come to :meth:`UnchangedResults.call`."""

    def __init__(self, results: UnchangedResults) -> None:
        super().__init__()
        self._results = results

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._results.call(func, func, args, kwargs or {})


_PLAIN = (
    NoneType,
    bool,
    int,
    float,
    complex,
    str,
    EllipsisType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_RAW = frozenset({"data", "data_ptr", "numpy", "__dlpack__", "__array__", "storage", "untyped_storage"})
"""What gives access to a tensor's memory past its version counter."""
_HOOKS = frozenset({"register_hook", "retain_grad", "grad_fn"})
"""What may change a result's backward; each pass is to have a graph of its own then."""
_BACKWARDS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_ELSE = frozenset({"grad", "_set_grad_enabled"})
"""What is not of the forward pass."""


def _has_graph(value: Any) -> bool:
    return any(one.requires_grad for one in tensors_in(value))


def _is_plain(value: Any) -> bool:
    """Whether a value is made of tensors and plain values alone, in tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, *_PLAIN))


def _equal(first: Any, second: Any) -> bool:
    """Whether the tensors in two results have the same bits."""
    pairs = tensors_in(first), tensors_in(second)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*pairs, strict=True)
    )


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; tensors that share it have the same."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing runs, and a generator has no state."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def generators(device: torch.device) -> tuple[Tensor, int]:
    """The state of torch's generators. In a CUDA graph the device's has none: what draws was seen before the capture."""
    known = device.type == "cuda" and not _is_captured(device)
    offset = torch.cuda.default_generators[device.index or 0].get_offset() if known else 0
    return torch.default_generator.get_state(), offset


def same_generators(first: tuple[Tensor, int], second: tuple[Tensor, int]) -> bool:
    """Whether nothing was drawn from torch's generators between two looks at them."""
    return first[1] == second[1] and torch.equal(first[0], second[0])


def _generators_elsewhere() -> Any:
    """The states of Python's generator and of NumPy's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy and repr(numpy.random.get_state())
