"""The cross entropies' backend call, and its two halves as operators of torch: for autograd, torch.compile and torch.func.

The forward keeps three numbers a row, from which the backward makes the gradient anew out of the logits: no matrix is
saved, and none is written but the gradient itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.backend import backend_for, using, wish
from ltsam_fast.launch_args import Numbers, RowArgs, accumulator
from ltsam_fast.ops.checks import check_range
from ltsam_fast.reference.softmax import cross_entropy_gradient


def launch(numbers: Numbers, **tensors: Tensor | None) -> None:
    """Runs ``cross_entropy`` on the backend of the logits: see :class:`~ltsam_fast.launch_args.RowArgs`."""
    args = RowArgs(numbers, tensors)
    backend = backend_for(args.device)
    if args.rows:
        with torch.cuda.device(args.device) if args.device.type == "cuda" else _HERE:
            backend.cross_entropy(args)


_HERE = contextlib.nullcontext()

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
    losses = torch.empty(rows, dtype=accumulator(logits), device=logits.device)
    state = torch.empty(3, rows, dtype=losses.dtype, device=logits.device)
    launch(
        Numbers(**numbers), logits=logits.contiguous(), targets=targets, losses=losses, state=state,
        weight_sum=_weight_sum(vectors, numbers), **vectors,
    )  # fmt: skip
    return losses, state


def _backward(cotangent: Tensor, state: Tensor, logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    vectors, numbers = _named(*rest)
    logits = logits.contiguous()
    grad = torch.empty_like(logits)
    launch(
        Numbers(**numbers), logits=logits, targets=targets, state=state.contiguous(),
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
        grad = cross_entropy_gradient(cotangent, logits, targets, **named, **numbers)
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
