"""Finds out on a batch whether a network's samples can be evaluated in sub-batches: by doing so, and comparing."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltsam_fast.optim.gradients import Differentiable, swap_gradients
from ltsam_fast.shared.autograd_graph import reaches_others
from ltsam_fast.shared.not_shared import REMEDY, NotShared
from ltsam_fast.shared.qualify import check_batch_norm, eager_modules

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""How much losses and gradients may differ, relative to the largest, by rounding."""
COARSE = 3e-2
"""The same for gradients where a module's output has 16 bits."""

Evaluate = Callable[[Tensor | None], Tensor]
"""The losses of the samples with these numbers, 1-D; None: of all."""


def looks_again(number: int) -> bool:
    """Whether a kind of pass is looked at in the pass of this number: the 1st, 2nd, 4th, 8th, ..."""
    return number & (number - 1) == 0


def check_separable(
    model: nn.Module, evaluate: Evaluate, size: int, params: Sequence[Tensor], others: Sequence[nn.Module] = ()
) -> None:
    """Compares a batch, evaluated as a whole, with two parts of it: each sample's loss, and the gradients.

    Random numbers are replaced by their means meanwhile, so that dropout does not hide what mixes. Generators, buffers and
    what else modules keep are as before afterwards.

    Args:
        model: The network.
        evaluate: Runs the forward pass.
        size: How many samples the batch has, >= 2.
        params: Weights whose gradients are compared.
        others: Further modules whose buffers the forward pass may change, such as a loss.

    Raises:
        NotShared: Samples mix, the forward pass changes a buffer, depends on earlier ones, or fails for some of the samples.
            The message names the module, or the error.
    """
    check_batch_norm(model)
    device = params[0].device
    # A part of one sample, as batches may have one of the tail; not the middle, which flip(0) pairs with itself. And halves, by
    # which a loss of the hardest samples, say, chooses others.
    alone, every = (size - 1) // 3, range(size)
    splits = [([i for i in every if i != alone], [alone]), *([(every[::2], every[1::2])] if size > 3 else [])]
    wanted = [param for param in params if param.requires_grad]
    seeds = torch.linspace(0.5, 1.5, size, dtype=torch.float64, device=device)

    def evaluate_some(index: Tensor | None) -> Tensor:
        try:
            return evaluate(index)
        except NotShared:
            raise
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise NotShared(f"closure(index) fails: {line}; {REMEDY}") from error

    def gradients(losses: Tensor, index: Tensor | None = None) -> list[Tensor]:
        # Of parts four times as large: a step's passes over them may differ in it, and a clipped gradient would not follow.
        weights = (seeds if index is None else 4 * seeds[index]).to(losses)
        found = Differentiable(losses, wanted, model.parameters()).gradients(weights, retain_graph=False)
        factor = 1.0 if index is None else 0.25
        return [torch.zeros_like(p) if g is None else factor * g for g, p in zip(found, wanted, strict=True)]

    with _restored((model, *others), device) as left, _Means() as means:
        with _Outputs(model) as outputs:
            losses = evaluate(None)
        left.check()
        if reaches_others(losses, (*params, *model.parameters())):
            raise NotShared(f"the losses depend on weights of another optimizer; {REMEDY}")
        means.refuses_single = False  # those of a single sample are as many as it is large
        tolerance = losses_tolerance = TOLERANCE[torch.promote_types(losses.dtype, torch.float32)]
        if outputs.coarse:  # rounding is what another order of the samples makes of the losses
            backwards = torch.arange(size - 1, -1, -1, device=device)
            noise = (evaluate_some(backwards).detach() - losses.detach()[backwards]).abs().max() / _size(losses)
            tolerance, losses_tolerance = COARSE, max(tolerance, min(4 * float(noise), COARSE))
        whole = gradients(losses)
        if _differ(evaluate_some(None).detach(), losses.detach(), losses_tolerance):
            raise NotShared(f"the forward pass depends on what the one before has left; {REMEDY}")
        largest = max((grad.abs().max() for grad in whole if grad.numel()), default=torch.zeros(()))
        for split in splits:
            separate = [torch.zeros_like(param) for param in wanted]
            for part in split:
                index = torch.tensor(part, device=device)
                some = evaluate_some(index)
                if _differ(some.detach(), losses.detach()[index], losses_tolerance):
                    raise NotShared(f"{_where(model, evaluate, size, index, tolerance)}; {REMEDY}")
                separate = [a + b for a, b in zip(separate, gradients(some, index), strict=True)]
            if any(param.grad is not None for param in wanted):
                raise NotShared(f"a function in the forward pass calls backward() in its own; {REMEDY}")
            for param, one, other in zip(wanted, whole, separate, strict=True):
                if bool(((one - other).abs() > tolerance * largest).any()):
                    name = next((name for name, own in model.named_parameters() if own is param), "a parameter")
                    raise NotShared(
                        f"samples mix in the gradient of {name}, or it does not follow their weights; {REMEDY}"
                    )


def _size(values: Tensor) -> Tensor:
    """The largest magnitude; never quite zero."""
    return values.detach().abs().amax() + 1e-3 if values.numel() else torch.ones(())


def _differ(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool(((found - wanted).abs() > tolerance * _size(wanted)).any())


class _Outputs:
    """Around a forward pass: notes what modules give.

    Attributes:
        coarse: Whether any of it has 16 bits.
        kept: Names of the modules and their outputs, in the order in which they ended, if these are kept.
    """

    def __init__(self, model: nn.Module, keep: bool = False) -> None:
        self._model, self._keep = model, keep
        self.coarse = False
        self.kept: list[tuple[str, Tensor]] = []

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            for one in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(one, Tensor) and one.is_floating_point():
                    self.coarse |= one.dtype in (torch.bfloat16, torch.float16)
                    if self._keep:
                        self.kept.append((f"{name or 'model'} ({type(module).__name__})", one.detach()))

        return note

    def __enter__(self) -> _Outputs:
        self._hooks = [one.register_forward_hook(self._hook(name)) for name, one in eager_modules(self._model)]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def _where(model: nn.Module, evaluate: Evaluate, size: int, index: Tensor, tolerance: float) -> str:
    """Says which module's output of some samples is the first that differs from theirs in the whole batch."""
    runs = []
    for one in (None, index):
        with _Outputs(model, keep=True) as outputs:
            evaluate(one)
        runs.append(outputs.kept)
    before = ""
    for (name, whole), (_, some) in zip(*runs, strict=False):
        if not _has_rows(whole, some, size, index, tolerance):
            return f"samples mix in {name}" + (f", or between {before} and it" if before else "")
        before = name
    return f"samples mix after {before}" if before else "samples mix in the closure"


def _has_rows(whole: Tensor, some: Tensor, size: int, index: Tensor, tolerance: float) -> bool:
    """Whether ``some`` is what ``whole`` has of the samples ``index``, along whatever dimension they lie."""
    if whole.shape == some.shape:
        return not _differ(some, whole, tolerance)
    for dim, (all_rows, rows) in enumerate(zip(whole.shape, some.shape, strict=False)):
        if all_rows % size or all_rows * len(index) != rows * size:
            continue
        each = all_rows // size
        for parts, sample in (((size, each), dim), ((each, size), dim + 1)):
            picked = whole.unflatten(dim, parts).index_select(sample, index).flatten(dim, dim + 1)
            if picked.shape == some.shape and not _differ(some, picked, tolerance):
                return True
    return False


class _LeftBehind:
    """What forward passes may leave in modules, and in generators of others than torch: whether it changes, and what it was."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        named = {one: name for module in modules for name, one in module.named_buffers()}
        self._named = [(name, one, one._version, one.clone()) for one, name in named.items()]
        each = {one: name for module in modules for name, one in module.named_modules()}
        each = {one: name for one, name in each.items() if not isinstance(one, torch.jit.ScriptModule)}
        self._buffers = [(name, one._buffers, dict(one._buffers)) for one, name in each.items()]
        self._attributes = [_Attributes(one) for one in each if not _is_torchs(one)]
        self._numpy = sys.modules.get("numpy")
        self._states = random.getstate(), self._numpy and self._numpy.random.get_state()

    def check(self) -> None:
        """Raises NotShared if a buffer or a generator has changed."""
        changed = [name for name, now, version, _ in self._named if now._version != version]
        for owner, now, before in self._buffers:
            names = [name for name in {**now, **before} if now.get(name) is not before.get(name)]
            changed += [f"{owner}.{name}" if owner else name for name in names]
        if changed:
            raise NotShared(f"{changed[0]} is changed by every forward pass; {REMEDY}")
        if random.getstate() != self._states[0] or (
            self._numpy and repr(self._numpy.random.get_state()) != repr(self._states[1])
        ):
            raise NotShared(
                f"the forward pass draws from Python's or NumPy's generator, which may mix samples; {REMEDY}"
            )

    def restore(self) -> None:
        """Makes them what they were."""
        for _, now, before in self._buffers:
            _refill(now, before)
        for _, buffer, version, value in self._named:
            if buffer._version != version:
                buffer.copy_(value)
        for attributes in self._attributes:
            attributes.restore()
        random.setstate(self._states[0])
        if self._numpy:
            self._numpy.random.set_state(self._states[1])


_MODULES = {*vars(nn.Module()), "forward", "_compiled_call_impl"}
"""Attributes that every module may have, and that are not of its forward pass."""


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is one of torch's, which keep what matters in buffers; DistributedDataParallel's state is its own."""
    return type(module).__module__.partition(".")[0] == "torch"


class _Attributes:
    """A module's own attributes, and the contents of the lists, dicts and sets among them."""

    def __init__(self, module: nn.Module) -> None:
        self._now, self._kept = vars(module), _MODULES | getattr(module, "bookkeeping", frozenset())
        self._before = {name: value for name, value in self._now.items() if name not in self._kept}
        self._contents = [(one, one.copy()) for one in self._before.values() if type(one) in (list, dict, set)]

    def restore(self) -> None:
        """Makes them what they were."""
        for name in {*self._now} - {*self._before} - self._kept:
            del self._now[name]
        self._now.update(self._before)
        for container, inside in self._contents:
            _refill(container, inside)


def _refill(container: Any, before: Any) -> None:
    """Gives a list, dict or set the items that it had."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


_LOCK = threading.RLock()
"""Settings of the process's are changed and put back by one thread at a time."""


@contextlib.contextmanager
def _restored(modules: Sequence[nn.Module], device: torch.device) -> Iterator[_LeftBehind]:
    """Around forward passes, in full precision: leaves generators, buffers and gradients as they were."""
    params: list[Tensor] = [param for module in modules for param in module.parameters()]
    with _LOCK:
        left = _LeftBehind(modules)
        grads = swap_gradients(params, [None] * len(params))
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            # Compiled modules run as they were written: torch.compile would give up on what it first sees in another mode.
            forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with forked, torch.compiler.set_stance("force_eager"):
                yield left
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
            swap_gradients(params, grads)
            with torch.no_grad():
                left.restore()


_FILLED: dict[str, Callable[..., Any]] = {
    "bernoulli_": lambda p=0.5: p,
    "uniform_": lambda low=0.0, high=1.0: (low + high) / 2,
    "normal_": lambda mean=0.0, std=1.0: mean,
    "exponential_": lambda rate=1.0: 1.0,
    "rand": lambda *_: 0.5,
    "rand_like": lambda *_: 0.5,
    "randn": lambda *_: 0.0,
    "randn_like": lambda *_: 0.0,
}
"""Random functions, and what stands for their numbers: a function of their arguments after the first."""


class _Means(TorchDispatchMode):
    """Replaces random numbers by their means; those that select or permute, or decide alone, are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses_single = True
        self._generators: dict[torch.Generator, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self._generators.items():
            generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for one in (*args, *kwargs.values()):
            if isinstance(one, torch.Generator) and one not in self._generators:
                self._generators[one] = one.get_state()
        names = [one.name for one in func._schema.arguments]
        if "dropout_p" in names:
            args, kwargs = _with(names, args, kwargs, "dropout_p", 0.0)
        if torch.Tag.nondeterministic_seeded not in func.tags or "dropout_p" in names:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("native_dropout", "_fused_dropout"):
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli":
            return args[0].clone() if len(args) == 1 else torch.full_like(args[0], args[1])
        if name == "_cudnn_rnn":
            return func(*_with(names, args, kwargs, "dropout", 0.0)[0], **kwargs)
        if name not in _FILLED:
            raise NotShared(f"{name}() in the forward pass may mix samples; {REMEDY}")
        value = _FILLED[name](*args[1:])
        result = func(*args, **kwargs)
        if self.refuses_single and result.numel() == 1:
            raise NotShared(f"{name}() of one number in the forward pass may decide how samples mix; {REMEDY}")
        return result.copy_(value) if isinstance(value, Tensor) else result.fill_(value)


def _with(
    names: list[str], args: Any, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with another value of one of them."""
    args, place = list(args), names.index(name)
    if place < len(args):
        args[place] = value
    elif name in kwargs:
        kwargs = {**kwargs, name: value}
    return args, kwargs
