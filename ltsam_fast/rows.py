"""The cross entropies' native call, and its two halves as operators of torch: for autograd, torch.compile and torch.func.

The forward keeps three numbers a row, from which the backward makes the gradient anew out of the logits: no matrix is
saved, and none is written but the gradient itself.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltsam_fast import reference
from ltsam_fast.backend import backend_for, using, wish
from ltsam_fast.table import DTYPES

ADDRESSES = (
    "logits", "targets", "scale", "shift", "margin", "spread", "draw", "weight", "weight_sum", "losses", "state",
    "cotangent_0", "cotangent_1", "grad_0", "grad_1",
)  # fmt: skip
"""What native code reads and writes, in the order of ``lt::Rows``; 0 stands for what is absent."""


class Numbers(NamedTuple):
    """What native code is told besides, in its order."""

    label_smoothing: float = 0.0
    gamma: float = 0.0
    detach: bool = False
    seed: int = 0
    by_label: bool = False
    """Cotangents are weights of the classes, to be divided by the number of rows; else one for each row."""


def accumulator(logits: Tensor) -> torch.dtype:
    """The dtype that a row is summed in, and its loss has."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def launch(backend: ModuleType, numbers: Numbers, **tensors: Tensor | None) -> None:
    """Runs the native walk over rows on contiguous tensors on one device, vectors in the accumulator's type.

    With ``losses`` it fills these, and ``state`` if given; else it reads ``state``. With ``grad_0`` (and ``grad_1``) it fills
    the gradients that belong to the cotangents.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, classes = logits.shape
    addresses = [0 if (tensor := tensors.get(name)) is None else tensor.data_ptr() for name in ADDRESSES]
    on_gpu = logits.device.type == "cuda"
    with torch.cuda.device(logits.device) if on_gpu else contextlib.nullcontext():
        stream_or_threads = torch.cuda.current_stream().cuda_stream if on_gpu else torch.get_num_threads()
        backend.cross_entropy(
            tuple(addresses), tuple(numbers), rows, classes, DTYPES.index(logits.dtype), stream_or_threads
        )


def check_range(targets: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in [0, classes). On a GPU that would wait for the device: nobody looks."""
    if targets.device.type != "cpu" or not len(targets):
        return
    low, high = map(int, targets.aminmax())
    if not 0 <= low <= high < classes:
        raise ValueError(f"targets must lie in [0, {classes}), got {low}...{high}: give one class count per class")


_ARGUMENTS = (
    "Tensor logits, Tensor targets, Tensor? scale, Tensor? shift, Tensor? margin, Tensor? weight, Tensor? spread, "
    "Tensor? draw, float[] numbers"  # one list, for torch takes microseconds over each argument
)


def _named(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    *vectors, (smoothing, gamma, detach, seed) = arguments
    named = dict(zip(("scale", "shift", "margin", "weight", "spread", "draw"), vectors, strict=True))
    return named, {"label_smoothing": smoothing, "gamma": gamma, "detach": bool(detach), "seed": int(seed)}


def _weight_sum(vectors: dict[str, Any], numbers: dict[str, Any]) -> Tensor | None:
    weight = vectors["weight"]
    return None if weight is None or not numbers["label_smoothing"] else weight.sum()


def _forward(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    vectors, numbers = _named(*rest)
    rows, classes = logits.shape
    check_range(targets, classes)
    backend = backend_for(logits.device)
    if backend is reference:
        return reference._losses_and_state(logits, targets, **vectors, **numbers)
    losses = torch.empty(rows, dtype=accumulator(logits), device=logits.device)
    state = torch.empty(3, rows, dtype=losses.dtype, device=logits.device)
    if rows:
        launch(
            backend, Numbers(**numbers), logits=logits.contiguous(), targets=targets, losses=losses, state=state,
            weight_sum=_weight_sum(vectors, numbers), **vectors,
        )  # fmt: skip
    return losses, state


def _backward(cotangent: Tensor, state: Tensor, logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    vectors, numbers = _named(*rest)
    backend = backend_for(logits.device)
    if backend is reference:
        return reference._cross_entropy_gradient(cotangent, logits, targets, **vectors, **numbers)
    logits = logits.contiguous()
    grad = torch.empty_like(logits)
    if len(logits):
        launch(
            backend, Numbers(**numbers), logits=logits, targets=targets, state=state.contiguous(),
            cotangent_0=cotangent.to(state.dtype).contiguous(), grad_0=grad,
            weight_sum=_weight_sum(vectors, numbers), **vectors,
        )  # fmt: skip
    return grad


forward = torch.library.custom_op(
    "ltsam_fast::adjusted_cross_entropy", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
"""Losses, shape (B,), and the state that the backward needs, (3, B)."""
backward = torch.library.custom_op(
    "ltsam_fast::adjusted_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor cotangent, Tensor state, {_ARGUMENTS}) -> Tensor",
)
"""The gradient, of the logits' shape and dtype."""


@forward.register_fake
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(logits)
    return logits.new_empty(len(logits), dtype=dtype), logits.new_empty(3, len(logits), dtype=dtype)


@backward.register_fake
def _(cotangent: Tensor, state: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _traced(tensor: Tensor) -> bool:
    """Whether somebody looks on who must see an operator: a compiler, or a subclass of tensors."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = inputs[8]
    ctx.wish = wish()


def _differentiate(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    state, logits, targets, *vectors = ctx.saved_tensors
    # The reference implementation can be differentiated again, and takes the batches of autograd.grad(is_grads_batched=True).
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(cotangent):
        named, numbers = _named(*vectors, ctx.numbers)
        grad = reference._cross_entropy_gradient(cotangent, logits, targets, **named, **numbers)
    else:
        run = backward if _traced(cotangent) or torch._C._are_functorch_transforms_active() else _backward
        with using(ctx.wish):
            grad = run(cotangent, state, logits, targets, *vectors, ctx.numbers)
    return grad, *[None] * 8


forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same past torch's dispatcher: a third of what a small call costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


class _Transformed(torch.autograd.Function):
    """The same for torch.func, which takes no operator."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_differentiate)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, targets: Tensor, *rest: Any) -> Any:
        if any(dim is not None for dim in in_dims[2:8]):
            raise ValueError(
                "scale, shift, margin, weight, spread and draw can't be mapped over by vmap: loop over them"
            )
        batched = []
        for tensor, dim in ((logits, in_dims[0]), (targets, in_dims[1])):
            whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            batched.append(whole.flatten(0, 1))
        losses, state = _Transformed.apply(*batched, *rest)
        split = (info.batch_size, -1)
        return (losses.unflatten(0, split), state.unflatten(1, split)), (0, 1)


def adjusted_cross_entropy(
    logits: Tensor, targets: Tensor, vectors: tuple[Tensor | None, ...], *numbers: float
) -> Tensor:
    """Losses, shape (B,). Vectors in the order of the operator's arguments, on the logits' device and ready for use."""
    if _traced(logits):
        run: Any = forward
    else:
        run = (_Transformed if torch._C._are_functorch_transforms_active() else _Direct).apply
    losses: Tensor = run(logits, targets, *vectors, [float(number) for number in numbers])[0]
    return losses
