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
from ltsam_fast.backend import backend_for
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
        where = torch.cuda.current_stream().cuda_stream if on_gpu else torch.get_num_threads()
        backend.cross_entropy(tuple(addresses), tuple(numbers), rows, classes, DTYPES.index(logits.dtype), where)


def check_range(targets: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in [0, classes). On a GPU that would wait for the device: nobody looks."""
    if targets.device.type != "cpu" or not len(targets):
        return
    low, high = int(targets.min()), int(targets.max())
    if not 0 <= low <= high < classes:
        raise ValueError(f"targets must lie in [0, {classes}), got {low}...{high}: give one class count per class")


_VECTORS = "Tensor? scale, Tensor? shift, Tensor? margin, Tensor? weight, Tensor? spread, Tensor? draw"
_NUMBERS = "float label_smoothing, float gamma, bool detach, int seed"


def _arguments(vectors: tuple[Any, ...], numbers: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    named = dict(zip(("scale", "shift", "margin", "weight", "spread", "draw"), vectors, strict=True))
    return named, dict(zip(("label_smoothing", "gamma", "detach", "seed"), numbers, strict=True))


def _weight_sum(vectors: dict[str, Any], numbers: dict[str, Any]) -> Tensor | None:
    weight = vectors["weight"]
    return None if weight is None or not numbers["label_smoothing"] else weight.sum()


@torch.library.custom_op(
    "ltsam_fast::adjusted_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {_VECTORS}, {_NUMBERS}) -> (Tensor, Tensor)",
)
def forward(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Losses, shape (B,), and the state that the backward needs, (3, B)."""
    vectors, numbers = _arguments(rest[:6], rest[6:])
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


@torch.library.custom_op(
    "ltsam_fast::adjusted_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor cotangent, Tensor state, Tensor logits, Tensor targets, {_VECTORS}, {_NUMBERS}) -> Tensor",
)
def backward(cotangent: Tensor, state: Tensor, logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    """The gradient, of the logits' shape and dtype."""
    vectors, numbers = _arguments(rest[:6], rest[6:])
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


@forward.register_fake
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(logits)
    return logits.new_empty(len(logits), dtype=dtype), logits.new_empty(3, len(logits), dtype=dtype)


@backward.register_fake
def _(cotangent: Tensor, state: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    state, logits, targets, *vectors = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again, which the twin can be
        named, numbers = _arguments(tuple(vectors), ctx.numbers)
        grad = reference._cross_entropy_gradient(cotangent, logits, targets, **named, **numbers)
    else:
        grad = backward(cotangent, state, logits, targets, *vectors, *ctx.numbers)
    return grad, *[None] * 11


forward.register_autograd(_differentiate, setup_context=_setup_context)
