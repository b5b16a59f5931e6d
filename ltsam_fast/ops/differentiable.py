"""The cross entropies' backend call, and its two halves as operators of torch: for autograd, torch.compile and torch.func.

The forward keeps three numbers a row, from which the backward makes the gradient anew out of the logits: no matrix is
saved, and none is written but the gradient itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.backend import backend_for, is_chosen, using, wish
from ltsam_fast.launch_args import Numbers, RowArgs, accumulator
from ltsam_fast.ops.checks import check_range
from ltsam_fast.reference.draws import noise
from ltsam_fast.reference.softmax import cross_entropy_gradient, miss, reduced
from ltsam_fast.snapshot import native


def launch(numbers: Numbers, **tensors: Tensor | None) -> None:
    """Runs ``cross_entropy`` on the backend of the logits: see :class:`~ltsam_fast.launch_args.RowArgs`."""
    args = RowArgs(numbers, tensors)
    backend = backend_for(args.device)
    if not args.rows:
        return
    if args.device.type == "cuda":
        with torch.cuda.device(args.device):
            backend.cross_entropy(args)
    else:
        backend.cross_entropy(args)


are_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active

_HERE = contextlib.nullcontext()

Vectors = Sequence[Tensor | None]
"""Those of :data:`VECTORS`, on the logits' device and ready for use."""

VECTORS = ("scale", "shift", "margin", "weight", "spread", "draw")
_SCALE, _SHIFT, _MARGIN, _WEIGHT, _SPREAD, _DRAW = range(len(VECTORS))

_ARGUMENTS = (
    f"Tensor logits, Tensor targets, {', '.join(f'Tensor? {name}' for name in VECTORS)}, "
    "float[] numbers"  # one list, for torch takes microseconds over each argument
)


def _named(vectors: Vectors, numbers: Numbers) -> dict[str, Any]:
    """Arguments of :func:`launch`."""
    weight_sum = None
    if numbers.label_smoothing and (weight := vectors[_WEIGHT]) is not None:
        weight_sum = weight.sum()
    return {**dict(zip(VECTORS, vectors, strict=True)), "numbers": numbers, "weight_sum": weight_sum}


def _losses_and_state(logits: Tensor, targets: Tensor, vectors: Vectors, numbers: Numbers) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    check_range(targets, classes)
    losses = torch.empty(rows, dtype=accumulator(logits), device=logits.device)
    state = torch.empty(3, rows, dtype=losses.dtype, device=logits.device)
    launch(logits=logits.contiguous(), targets=targets, losses=losses, state=state, **_named(vectors, numbers))
    return losses, state


def _gradient(
    cotangent: Tensor, state: Tensor, logits: Tensor, targets: Tensor, vectors: Vectors, numbers: Numbers
) -> Tensor:
    logits = logits.contiguous()
    grad = torch.empty_like(logits)
    launch(
        logits=logits, targets=targets, state=state.contiguous(),
        cotangent_0=cotangent.to(state.dtype).contiguous(), grad_0=grad, **_named(vectors, numbers),
    )  # fmt: skip
    return grad


def both_gradients(
    logits: Tensor, targets: Tensor, weights: Sequence[Tensor], vectors: Vectors, numbers: Numbers
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, (B,), and the gradients by the logits of two means of them, weighted by class, in one pass."""
    losses = torch.empty(len(logits), dtype=accumulator(logits), device=logits.device)
    grads = torch.empty_like(logits), torch.empty_like(logits)
    launch(
        logits=logits, targets=targets, losses=losses, cotangent_0=weights[0], cotangent_1=weights[1],
        grad_0=grads[0], grad_1=grads[1], **_named(vectors, numbers._replace(by_label=True)),
    )  # fmt: skip
    return losses, *grads


def _forward(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *vectors, numbers = rest
    return _losses_and_state(logits, targets, vectors, Numbers.from_floats(numbers))


def _backward(cotangent: Tensor, state: Tensor, logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    *vectors, numbers = rest
    return _gradient(cotangent, state, logits, targets, vectors, Numbers.from_floats(numbers))


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


def is_traced(tensor: Tensor) -> bool:
    """Whether somebody looks on who must see an operator: a compiler, or a subclass of tensors."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def is_watched(tensor: Tensor) -> bool:
    """Whether an operator is called for, by somebody who looks on or a transform of torch.func."""
    return is_traced(tensor) or are_transformed()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.numbers, ctx.wish = Numbers.from_floats(inputs[8]), wish()


def _differentiate(ctx: Any, cotangent: Tensor) -> Tensor:
    state, logits, targets, *vectors = ctx.saved_tensors
    numbers = ctx.numbers
    # The reference implementation can be differentiated again, and takes the batches of autograd.grad(is_grads_batched=True).
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(cotangent):
        named = dict(zip(VECTORS, vectors, strict=True))
        return cross_entropy_gradient(cotangent, logits, targets, **named, **numbers.of_reference())
    with _HERE if ctx.wish == wish() else using(ctx.wish):
        if is_watched(cotangent):
            return backward(cotangent, state, logits, targets, *vectors, numbers.floats())
        return _gradient(cotangent, state, logits, targets, vectors, numbers)


def _differentiate_operator(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return _differentiate(ctx, cotangent), *[None] * 8


forward.register_autograd(_differentiate_operator, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same past torch's dispatcher and with the reduction: a third of what a small call costs."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vectors: Vectors, numbers: Numbers, reduction: str
    ) -> Tensor:
        losses, state = _losses_and_state(logits, targets, vectors, numbers)
        ctx.save_for_backward(state, logits, targets, *vectors)
        ctx.numbers, ctx.wish = numbers, wish()
        result, ctx.divisor = reduced(losses, targets, vectors[_WEIGHT], reduction)
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if cotangent.dim() == 0:
            cotangent = (cotangent / ctx.divisor).expand(ctx.saved_tensors[0].shape[1])
        return _differentiate(ctx, cotangent), None, None, None, None


class _Transformed(torch.autograd.Function):
    """The same for torch.func, which takes no operator."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_differentiate_operator)

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
    logits: Tensor, targets: Tensor, vectors: Vectors, numbers: Numbers, reduction: str
) -> Tensor:
    """The losses, shape (B,), or their sum or mean."""
    if is_watched(logits):
        run: Any = forward if is_traced(logits) else _Transformed.apply
        losses = run(logits, targets, *vectors, numbers.floats())[0]
        return reduced(losses, targets, vectors[_WEIGHT], reduction)[0]
    if logits.is_cpu and logits.numel() <= small_up_to(vectors, numbers, logits) and not is_chosen():
        check_range(targets, logits.shape[1])
        return Small(vectors, numbers, logits)(logits, targets, reduction, vectors[_DRAW])
    result: Tensor = _Direct.apply(logits, targets, vectors, numbers, reduction)
    return result


def small_up_to(vectors: Vectors, numbers: Numbers, like: Tensor) -> int:
    """Logits of a batch on a CPU up to which torch's own functions are faster, by measurement: see :class:`Small`."""
    scale, _, margin, _, spread, _ = vectors
    few = scale is margin is spread is None and not numbers.gamma and like.dtype == accumulator(like)
    return 1 << (18 if few else 17)  # more where it takes few of them


_NO_LABEL = -(2**62) - int.from_bytes(os.urandom(7), "big")
"""torch ignores one label, which thus is not refused: one that nobody comes to."""

_NUMBER_OF = {"none": 0, "mean": 1, "sum": 2}
_cross_entropy: Any = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls


class Small:
    """The losses by torch's functions: as few of them as will do, and none for constants that change nothing.

    Labels are not looked at: torch raises an error if they are out of range, or of another shape. The backward keeps the noise.
    """

    def __init__(self, vectors: Vectors, numbers: Numbers, like: Tensor) -> None:
        scale, shift, margin, weight, spread, _ = vectors
        self.scale, self.shift, self.weight = scale, shift, weight
        self.smoothing, self.gamma, self.detach, self.seed, _ = numbers
        self.margin = None if margin is None or not margin.any() else -margin[:, None]
        self.spread = None if spread is None else -spread if scale is None else -scale * spread
        self.minus = torch.full(like.shape[1:], -1.0, dtype=accumulator(like)) if self.gamma else None
        self.up_to = small_up_to(vectors, numbers, like)
        self.narrow = like.dtype != accumulator(like)
        self.adds = not self.narrow and scale is None and self.margin is None and spread is None  # a shift, or nothing

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str, draw: Tensor | None) -> Tensor:
        """The losses, shape (B,), or their sum or mean."""
        a = logits
        if not self.adds:
            a = self._adjusted(a, targets, draw)
        elif self.shift is not None:
            a = a + self.shift
        if self.gamma:
            return reduced(self._focal(a, targets), targets, self.weight, reduction)[0]
        return _cross_entropy(  # type: ignore[no-any-return]
            a, targets, self.weight, _NUMBER_OF[reduction], _NO_LABEL, self.smoothing
        )

    def _adjusted(self, logits: Tensor, targets: Tensor, draw: Tensor | None) -> Tensor:
        a, shift = logits.float() if self.narrow else logits, self.shift
        if self.spread is not None and draw is not None:
            clouds = _clouds(len(a), self.spread, draw, self.seed)
            shift = clouds if shift is None else clouds.add_(shift)
        if self.scale is None:
            a = a if shift is None else a + shift
        else:
            a = a * self.scale if shift is None else torch.addcmul(shift, a, self.scale)
        if self.margin is not None:  # an embedding of the labels is a column
            a = a.scatter_add(1, targets[:, None], torch.embedding(self.margin, targets))
        return a

    def _focal(self, a: Tensor, targets: Tensor) -> Tensor:
        log_p = _cross_entropy(a, targets, self.minus, 0, _NO_LABEL, 0.0)
        factor = torch.expm1(log_p)  # p - 1
        if self.gamma != 1:
            factor = -((miss(-log_p) if self.gamma < 1 else -factor) ** self.gamma)
        losses: Tensor = (factor.detach() if self.detach else factor) * log_p
        return losses if self.weight is None else self.weight[targets] * losses


def _clouds(rows: int, factor: Tensor, draw: Tensor, seed: int) -> Tensor:
    """``factor`` times the noise of each row, (B, C)."""
    core, classes = native(), len(factor)
    if core is None:
        return factor * noise(rows, classes, seed, draw).to(factor)
    made = torch.empty(rows, classes, dtype=factor.dtype)
    core.clouds(made.data_ptr(), factor.dtype == torch.float64, rows, classes, factor.data_ptr(), draw.data_ptr(), seed)
    return made
