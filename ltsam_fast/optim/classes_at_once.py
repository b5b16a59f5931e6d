"""Several classes in one pass, each with weights of its own: ``torch.func.vmap`` over classes with as many samples each."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ltsam_fast.optim.closures import calls_compiled
from ltsam_fast.optim.head import Calling, Instead, own_weights
from ltsam_fast.shared import NotShared
from ltsam_fast.shared.autograd_graph import leaves
from ltsam_fast.shared.qualify import check_hooks, is_compiled

Index = Callable[[Tensor], Any]


class Refused(Exception):
    """Classes have to be evaluated one after the other; the message says why."""


class ClassesAtOnce:
    """Runs a closure for K classes of n samples, each at weights of its own.

    The passes cost what those of one batch of K n samples do: only products with weights are made class by class.

    Args:
        model: The network.
        params: T weights, which differ between the classes.
        closure: Gives the losses, or what they are made of, of the samples with some numbers.

    Raises:
        Refused: The network has hooks, which would see what is in a ``vmap``, or something is compiled, or a weight is not the
            network's.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], closure: Index) -> None:
        names = {id(param): f"module.{name}" for name, param in model.named_parameters()}
        if not all(id(param) in names for param in params):
            raise Refused("a weight is not the model's")
        self._names, self._params = [names[id(param)] for param in params], params
        try:
            check_hooks(model, list(params))
        except NotShared as error:
            raise Refused(str(error)) from error
        for name, module in model.named_modules():
            if is_compiled(module) or any(getattr(module, hooks) for hooks in _HOOKS):
                raise Refused(f"{name or 'the model'} {'is compiled' if is_compiled(module) else 'has hooks'}")
        if calls_compiled(closure):
            raise Refused("closure calls what torch.compile has made")
        self._calling, self._losses = Calling(model), closure

    def at_weights(self, classes: int) -> tuple[Index, list[Tensor]]:
        """The closure with all classes at the weights, and those: T tensors (K, ...) to be differentiated by."""
        values = [param.detach().expand(classes, *param.shape).requires_grad_() for param in self._params]
        return self._closure(values, [None] * len(values), classes), values

    def at_values(self, values: Sequence[Tensor]) -> Index:
        """The closure with class k at ``values[t][k]``; the weights get the sum of the classes' gradients."""
        return self._closure(values, self._params, len(values[0]))

    def _closure(self, values: Sequence[Tensor], sources: Sequence[Tensor | None], classes: int) -> Index:
        """The closure, which takes the numbers of K n samples, class by class."""
        made: list[weakref.ref[Tensor]] = []

        def each(mapped: Sequence[Tensor], index: Tensor) -> Any:
            nonlocal made
            known = {id(one): pair for one, *pair in zip(mapped, values, sources, strict=True)}
            with _Functions(known) as functions:
                made, there = functions.made, dict(zip(self._names, mapped, strict=True))
                return torch.func.functional_call(self._calling, there, (self._losses, index))

        def call(index: Tensor) -> Any:
            pairs = zip(values, sources, strict=True)
            own = [value if source is None else Instead.apply(source, value) for value, source in pairs]
            with _kernels(index.device), own_weights(self._calling):
                outputs = torch.vmap(each, randomness="different")(own, index.view(classes, -1))
            return outputs.flatten(0, 1)

        def refusing(index: Tensor) -> Any:
            try:
                outputs = call(index)
            except Exception as error:  # whatever a closure, or its network, cannot do in a vmap
                raise Refused((str(error) or type(error).__name__).splitlines()[0]) from error
            if None in sources and not (leaves(outputs) or {}).keys().isdisjoint(map(id, self._params)):
                raise Refused("closure, or a module, refers to a weight by another name")
            kept = [one for one in (reference() for reference in made) if one is not None]
            if any(map(_functorch.is_batchedtensor, kept)):  # of no use outside the vmap
                raise Refused("closure, or a module, keeps a result")
            return outputs

        return refusing


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


FEWEST = 4
"""The fewest classes that take less time at once than one after the other, whatever the network's size."""


def of_equal_size(rows: Mapping[int, Sized]) -> Iterator[list[int]]:
    """Groups of classes that have as many samples each and are to be evaluated at once."""
    sizes: dict[int, list[int]] = {}
    for k, chosen in rows.items():
        sizes.setdefault(len(chosen), []).append(k)
    return (classes for classes in sizes.values() if len(classes) >= FEWEST)


@contextlib.contextmanager
def _kernels(device: torch.device) -> Iterator[None]:
    """On a CPU, attention by products, which vmap knows. What it does not know is called for each class, without a warning."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


class _Functions(TorchFunctionMode):
    """Computes linear layers by a few products for all classes; vmap would lay the weights' gradients out transposed.

    Args:
        known: For the id of a weight that is seen in the vmap its values, (K, ...), and the weight that gets the sum of their
            gradients; None: the values themselves get them.

    Attributes:
        made: What functions have returned.
    """

    def __init__(self, known: dict[int, list[Any]]) -> None:
        super().__init__()
        self._known = known
        self._level: Any = _functorch.maybe_current_level()
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(function, types, args, kwargs or {})
        if isinstance(result, Tensor):
            self.made.append(weakref.ref(result))
        return result

    def _call(self, function: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if function in _NO_PADDING:
            nothing = _NO_PADDING[function]
            if (args[2] if len(args) > 2 else kwargs.get("padding_idx", nothing)) != nothing:
                raise Refused("vmap gives an embedding's padding_idx a gradient")
        # A transform of the closure's own, within the vmap, knows the vmap's rules.
        if function is F.linear and _functorch.maybe_current_level() == self._level:
            given = {"bias": None, **dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            x, weight, bias = given["input"], given["weight"], given["bias"]
            narrow, of_weight, of_bias = _autocast_dtype(x), self._values_of(weight), self._values_of(bias)
            if of_weight and of_bias and (narrow or x.dtype == weight.dtype):
                return _linear(x.to(narrow or x.dtype), *zip(of_weight, of_bias, strict=True))
        if function is F.multi_head_attention_forward:  # written in Python, with linear layers in it
            with self:
                return _redispatch(function, types, args, kwargs)
        return function(*args, **kwargs)

    def _values_of(self, weight: Tensor | None) -> Sequence[Any] | None:
        """A weight's values (K, ...), and what gets the sum of their gradients; None if all classes have the same."""
        if weight is None:
            return None, None
        if id(weight) in self._known:
            return self._known[id(weight)]
        values, dim = _functorch._unwrap_batched(weight, self._level)  # say a part of one, or two multiplied
        return None if dim is None else (values.movedim(dim, 0), None)


def _redispatch(function: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function of torch's past its own question for modes, so that what it calls asks them."""
    skip = getattr(torch.overrides, "redispatch_function", None)
    if skip is None:  # vmap would copy the weights for each sample
        raise Refused(f"{function.__name__} needs a newer torch")
    return skip(function, types, args, kwargs)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a linear layer's input and weights; None: it leaves them."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else None


_NO_PADDING = {F.embedding: None, torch.embedding: -1}
"""The third argument of embeddings, ``padding_idx``, where there is none."""


def _linear(x: Tensor, values: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> Tensor:
    """:class:`_LinearByClass` within the vmap. A rule for vmap of a function of its own would take ten times as long."""
    # Private: should it go, classes are refused.
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    level: Any = _functorch.maybe_current_level()
    x, dim = _functorch._unwrap_batched(x, level)
    with temporarily_pop_interpreter_stack():
        x = x.expand(len(values[0]), *x.shape) if dim is None else x.movedim(dim, 0)  # type: ignore[arg-type]
        out = _LinearByClass.apply(x.reshape(len(x), -1, x.shape[-1]), *values, *sources)
        out = out.view(*x.shape[:-1], -1)
    return _functorch._add_batch_dim(out, 0, level)


class _LinearByClass(torch.autograd.Function):
    """``x[k] @ weight[k].T + bias[k]``, in the dtype of ``x``.

    Args:
        x: (K, N, in)
        weight: (K, out, in); an expanded tensor where all classes have the same.
        bias: (K, out), or None.
        sources: (out, in) and (out,): tensors that get the sum of the classes' gradients; or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, *sources: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        given = [one for one in (weight, bias) if one is not None]
        if all(one.stride(0) == 0 for one in given):
            return F.linear(x, *(one[0].to(x.dtype) for one in given))
        weight, *shift = (one.to(x.dtype) for one in given)
        return torch.baddbmm(shift[0][:, None], x, weight.mT) if shift else torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 5
        if wanted[0]:
            found[0] = grad @ (weight[0] if weight.stride(0) == 0 else weight).to(grad.dtype)
        if wanted[1]:
            found[1] = torch.bmm(grad.mT, x)
        if wanted[2]:
            found[2] = grad.sum(1)
        if wanted[3]:
            found[3] = grad.flatten(0, 1).T @ x.flatten(0, 1)
        if wanted[4]:
            found[4] = grad.sum((0, 1))
        return tuple(found)
