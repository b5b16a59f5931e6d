"""Every fused op as a plain function on lists of tensors.

Each op checks its arguments, then runs on the backend that serves the tensors' device (see :mod:`ltsam_fast.backend`) in
one pass. All are defined by the reference implementation of the same name in :mod:`ltsam_fast.reference`. What holds for all:

* Tensors are dense, on cpu or cuda, in float32, bfloat16, float16 (sums and arithmetic in fp32) or float64 (in fp64). Sizes
  may be zero, dtypes and devices may differ from tensor to tensor. Tensors of one index have one shape; they need not be
  contiguous, but the pass is fastest when their elements lie alike in memory.
* ``None`` in a list of gradients reads as zeros.
* ``groups``: one int per tensor; a hyperparameter may then be a sequence with one value per group.
* ``grad_scale``, ``found_inf``: one-element float32 tensors, with the meaning that ``torch.amp.GradScaler`` gives them:
  gradients are ``grad_scale`` times too large; non-zero ``found_inf`` skips the update. They are read on the device.
* Same input, same bits, whatever the number of threads.
* Bad input is a ``ValueError`` or ``TypeError`` that names the argument, before anything is changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from numbers import Real
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ltsam_fast import reference, rows
from ltsam_fast.backend import backend_for
from ltsam_fast.rows import Numbers, accumulator, check_range, launch
from ltsam_fast.table import DTYPES, LaunchArgs, Op, Role, TensorTable
from ltsam_fast.weight_caches import clear_weight_caches

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "adam_step_",
    "adjusted_cross_entropy",
    "class_grad_norms",
    "combine_",
    "focal_cross_entropy",
    "focal_weights",
    "gaussian_perturb_",
    "grad_dots",
    "grad_norm",
    "perturb_",
    "perturb_by_class_",
    "restore_",
    "sgd_step_",
]

Tensors = Sequence[Tensor | None]
Hyper = float | Sequence[float]
"""One value, or one for each group."""


def _op(name: str, roles: str, arguments: str, reads: str, writes: str, needs: str, hyper: str, sums: int = 1) -> Op:
    return Op(
        name,
        tuple(roles.split()),
        tuple(arguments.split()),
        frozenset(reads.split()),
        frozenset(writes.split()),
        frozenset(needs.split()),
        tuple(hyper.split()),
        sums,
    )


_PERTURB = (
    "w original g backup mean mask",
    "params original_params grads backups means mask",
    "original g mean mask",
    "w backup mean",
    "w original",
)

OPS = {
    op.name: op
    for op in (
        _op("grad_norm", "g kept w", "grads kept_grads params", "g kept w", "", "", "adaptive eta"),
        _op("grad_dots", "g other", "grads other", "g other", "", "", "", sums=3),
        _op("perturb_", *_PERTURB, "rho adaptive eta eps decay"),
        _op("random_perturb_", *_PERTURB, "rho adaptive eta eps decay probability stochastic seed step"),
        _op(
            "gaussian_perturb_",
            "w original backup",
            "params original_params backups",
            "original",
            "w backup",
            "w original",
            "amplitude sigma clip seed step",
        ),
        _op("perturb_by_class_", "w g", "params class_grads", "w g", "g", "w g", ""),
        _op("combine_", "out g kept", "out grads kept_grads", "out g kept", "out", "out", ""),
        _op("restore_", "w backup", "params backups", "backup", "w", "w backup", ""),
        _op(
            "sgd_step_",
            "w original g kept m step",
            "params backups grads kept_grads momentum_buffers steps",
            "original g kept m step",
            "w m step",
            "w original",
            "lr momentum dampening weight_decay nesterov maximize max_norm",
        ),
        _op(
            "adam_step_",
            "w original g kept m v vmax step",
            "params backups grads kept_grads exp_avgs exp_avg_sqs max_exp_avg_sqs steps",
            "original g kept m v vmax step",
            "w m v vmax step",
            "w original m v step",
            "lr beta1 beta2 eps weight_decay decoupled maximize max_norm",
        ),
    )
}
"""The list-wise ops: what Python must know of csrc/ops.h."""

_LOWEST = {
    op.name: np.array([-np.inf if name in ("dampening", "rho") else 0.0 for name in op.hyper]) for op in OPS.values()
}
_ENDS = {"beta1": 1.0, "beta2": 1.0, "probability": np.nextafter(1.0, 2.0), "seed": 2.0**53, "step": 2.0**32}
_BELOW = {op.name: np.array([_ENDS.get(name, np.inf) for name in op.hyper]) for op in OPS.values()}


class Tracer(Protocol):
    """Who is asked for what kernels read of the host's, while a step is traced: a CUDA graph holds no numbers."""

    def rows(self, op: Op, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hyperparameters of a pass, checked, as the tracer keeps them."""

    def place(self, array: NDArray[Any]) -> Any:
        """An array of 8-byte numbers on the device, where a captured kernel reads it; else the array itself."""


tracer: Tracer | None = None

_ROWS: dict[tuple[Any, ...], NDArray[np.float64]] = {}
_KEPT = 64


def _hyper_rows(op: Op, values: dict[str, Hyper]) -> NDArray[np.float64]:
    """Hyperparameters as the matrix (groups, columns) that native code takes, checked. They seldom change: kept by value."""
    columns = [tuple(value) if isinstance(value := values[name], list) else value for name in op.hyper]
    try:
        rows = _ROWS.get((op.name, *columns))
    except TypeError:  # what has no hash is no number either, which the checks will say
        rows = None
    if rows is None:
        rows = _checked_rows(op, columns)
        if len(_ROWS) >= _KEPT:
            _ROWS.clear()
        _ROWS[(op.name, *columns)] = rows
    return rows if tracer is None else tracer.rows(op, rows)


def _checked_rows(op: Op, columns: list[Any]) -> NDArray[np.float64]:
    count = max((1, *(len(value) for value in columns if isinstance(value, Sequence))))
    for name, value in zip(op.hyper, columns, strict=True):
        if isinstance(value, Sequence) and len(value) != count:
            raise ValueError(f"{name} has {len(value)} values, but there are {count} groups: give one per group")
        for one in value if isinstance(value, Sequence) else (value,):
            if not isinstance(one, Real):  # a tensor's value could change and would still be found in _ROWS
                raise TypeError(f"{name} must be a number, or a sequence with one per group, got {value!r}")
    rows = np.array([[v[row] if isinstance(v, Sequence) else v for v in columns] for row in range(count)], np.float64)
    low, below = _LOWEST[op.name], _BELOW[op.name]
    good = (rows >= low) & (rows < below) & (rows > -np.inf)
    if not good.all():
        row, column = np.argwhere(~good)[0]
        wanted = f" in [{low[column]:g}, {below[column]:g})" if below[column] < np.inf else f" >= {low[column]:g}"
        wanted = "" if low[column] == -np.inf else wanted
        raise ValueError(f"{op.hyper[column]} must be a finite number{wanted}, got {rows[row, column]}")
    return rows


_TABLES: dict[tuple[Any, ...], TensorTable] = {}


def _table_for(op: Op, lists: tuple[Role, ...], given: TensorTable | None = None) -> TensorTable:
    """A table to reuse. Any would do, for bind() checks everything: a good guess only saves building it anew."""
    first = lists[0] or ()
    lead = first[0] if len(first) else None
    on_gpu = isinstance(lead, Tensor) and lead.is_cuda
    # A graph goes on with the scratch memory that it saw: these tables, and a caller's, may let go of theirs before.
    if on_gpu and (given is None or tracer is None) and torch.cuda.is_current_stream_capturing():
        return TensorTable(op)
    if given is not None:
        return given
    stream = torch.cuda.current_stream(lead.device).cuda_stream if on_gpu else 0  # type: ignore[union-attr]
    # Native code drops the GIL, and what runs on two streams at once must not share scratch memory.
    key = (op.name, len(first), id(lead), threading.get_ident(), stream)
    table = _TABLES.get(key)
    if table is None:
        if len(_TABLES) >= _KEPT:
            _TABLES.clear()
        table = _TABLES[key] = TensorTable(op)
    return table


_SLOTS = {"norm": 0, "scales": 0, "grad_scale": 1, "found_inf": 2, "combination": 3, "skipped": 4}
"""Where native code expects the address of a signal: a small tensor that is read, or written, on the device."""


def _check_signals(sizes: dict[str, int], **signals: Tensor | None) -> None:
    for name, value in signals.items():
        count = sizes.get(name, 1)
        if value is not None and (not isinstance(value, Tensor) or value.numel() != count):
            element = "one element" if count == 1 else f"{count} elements"
            raise ValueError(f"{name} must be a tensor of {element}, got {value!r}")


def _at(part: LaunchArgs, name: str, value: Tensor) -> Tensor:
    """A signal on the part's device and in the type that native code reads."""
    dtype = torch.float32 if name in ("grad_scale", "found_inf", "skipped") else part.accumulator
    if value.dtype is dtype and value.device == part.device and value.is_contiguous():
        return value
    return value.detach().to(part.device, dtype).contiguous()


def _launch(
    op: Op, backend: ModuleType, part: LaunchArgs, hyper: NDArray[np.float64], signals: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Runs one native call; returns the signals as it saw them."""
    seen = {name: _at(part, name, value) for name, value in signals.items() if value is not None}
    addresses = [0] * 5
    for name, value in seen.items():
        addresses[_SLOTS[name]] = value.data_ptr()
    with torch.cuda.device(part.device) if part.device.type == "cuda" else _HERE:
        getattr(backend, op.name)(
            part, hyper if tracer is None else tracer.place(hyper), tuple(addresses), part.stream_or_threads()
        )
    return seen


_HERE = contextlib.nullcontext()


def _run(
    op: Op,
    roles: tuple[Role, ...],
    values: dict[str, Hyper] | None = None,
    groups: Sequence[int] | None = None,
    table: TensorTable | None = None,
    offsets: Sequence[int] | None = None,
    **signals: Tensor | None,
) -> None:
    """Runs a pass that writes tensors: checks, then one launch for each part, or the reference implementation."""
    hyper = _hyper_rows(op, values or {})
    _check_groups(groups, len(roles[0] or ()), len(hyper))
    _check_signals({"combination": 4, "scales": len(roles[0] or ())}, **signals)
    lists = roles
    if "original" in op.roles and roles[1] is None:  # without backups the old weights are the weights themselves
        lists = (roles[0], roles[0], *roles[2:])
    own = _table_for(op, roles, table)
    parts = own.bind(lists, groups if len(hyper) > 1 else None, offsets=offsets)
    backends = [backend_for(part.device) for part in parts]
    if reference in backends:
        named: dict[str, Any] = dict(zip(op.arguments, roles, strict=True)) | (values or {}) | signals
        named |= {} if offsets is None else {"offsets": offsets}
        getattr(reference, op.name.removeprefix("random_"))(**named, **({"groups": groups} if op.hyper else {}))
    else:
        for part, backend in zip(parts, backends, strict=True):
            _launch(op, backend, part, hyper, signals)
        own.finish(lists)
    # The writes went past autograd: without this, backward through an overwritten weight would go unnoticed. A caller with
    # a table of its own (an optimizer) keeps its state out of graphs, so there the weights are enough.
    for role, tensors in zip(op.roles, roles, strict=True):
        if tensors is not None and role in op.writes and (role == "w" or table is None):
            torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])
    if "w" in op.writes:
        clear_weight_caches()


def _check_groups(groups: Sequence[int] | None, tensors: int, rows: int) -> None:
    if groups is None:
        if rows > 1:
            raise ValueError(f"groups must say to which of the {rows} groups each tensor belongs, got None")
    elif len(groups) != tensors:
        raise ValueError(f"groups has {len(groups)} entries, but there are {tensors} tensors: give one per tensor")
    elif len(groups) and min(groups) < 0:
        raise ValueError(f"groups must be numbers >= 0, got {min(groups)}")
    elif rows > 1 and len(groups) and max(groups) >= rows:
        raise ValueError(f"groups must lie in [0, {rows}), got {min(groups)}...{max(groups)}")


def grad_norm(
    grads: Tensors,
    params: Tensors | None = None,
    *,
    kept_grads: Tensors | None = None,
    combination: Tensor | None = None,
    adaptive: Hyper = False,
    eta: Hyper = 0.0,
    groups: Sequence[int] | None = None,
    per_group: bool = False,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> Tensor:
    r"""The global norm of a gradient in one pass: 4 bytes read per fp32 element.

    .. math:: \|T (g + g')\|_2, \qquad T = |w| + \eta \text{ if adaptive else } 1

    Args:
        grads: T gradients ``g``; ``None`` counts as zeros.
        params: T weights ``w``; needed when adaptive.
        kept_grads: T gradients ``g'`` to be added, or ``None``.
        combination: Four numbers ``c``, of which two count: the norm is of ``c0 g + c1 g'``; ``None``: both are 1.
        adaptive: Scale by ``|w| + eta`` (ASAM); a flag, or one for each group.
        eta: ASAM's constant, >= 0; a number, or one for each group.
        groups: Group of each tensor.
        per_group: Return one norm for each group instead of the norm over all.
        found_inf: One float32 number, set to 1 when the result is not finite.
        table: A table to reuse, for callers that keep one.

    Returns:
        A 0-d tensor on the device of the first tensor, or shape (G,) with ``per_group``; float32, or float64 if any tensor
        is. The gradient is not unscaled: divide by the scale.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit.
        TypeError: A dtype is not supported.

    Source: Foret et al. 2021 (SAM), eq. 2; Kwon et al. 2021 (ASAM), eq. 3. A fixed order of summation makes it repeatable.

    >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    op = OPS["grad_norm"]
    hyper = _hyper_rows(op, {"adaptive": adaptive, "eta": eta})
    _check_groups(groups, len(grads), len(hyper))
    _check_signals({"combination": 4}, found_inf=found_inf, combination=combination)
    if per_group and groups is None:
        raise ValueError("groups must be given when per_group is set, got None")
    if params is None and hyper[:, 0].any():
        raise ValueError("params must be given when adaptive is set: the norm is of |w| g")
    outputs = max(max(groups, default=-1) + 1, len(hyper)) if per_group and groups is not None else 1
    if kept_grads is not None and len(kept_grads) == len(grads) and any(grad is None for grad in grads):
        if combination is not None:
            grads = _filled(grads, kept_grads)
        else:  # a tensor is known by its first role, so a gradient that stands alone takes it
            pairs = list(zip(grads, kept_grads, strict=True))
            grads = [other if grad is None else grad for grad, other in pairs]
            kept_grads = [None if grad is None else other for grad, other in pairs]
    roles: tuple[Role, ...] = (grads, kept_grads, params if hyper[:, 0].any() else None)
    if per_group and groups is not None and list(groups) != sorted(groups):
        order = sorted(range(len(groups)), key=groups.__getitem__)
        roles = tuple(None if role is None else [role[i] for i in order] for role in roles)
        groups = [groups[i] for i in order]
    parts = _table_for(op, roles, table).bind(
        roles, groups if len(hyper) > 1 else None, groups if per_group else None, outputs
    )
    backends = [backend_for(part.device) for part in parts]
    if reference in backends:
        return reference.grad_norm(
            roles[0] or [], roles[2], kept_grads=roles[1], combination=combination, adaptive=adaptive, eta=eta, groups=groups,
            per_group=per_group, found_inf=found_inf,
        )  # fmt: skip
    norms = []
    for part, backend in zip(parts, backends, strict=True):
        norms.append(torch.empty(outputs, dtype=part.accumulator, device=part.device))
        seen = _launch(
            op, backend, part, hyper, {"norm": norms[-1], "found_inf": found_inf, "combination": combination}
        )
        if found_inf is not None and (found := seen["found_inf"]).data_ptr() != found_inf.data_ptr():
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device)))
    if not norms:
        norms = [torch.zeros(outputs, dtype=torch.float32)]
    norm = norms[0] if len(norms) == 1 else _join(norms)
    return norm if per_group else norm[0]


def _join(norms: list[Tensor]) -> Tensor:
    """The norm over parts on several devices or in several precisions."""
    exact = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.linalg.vector_norm(exact, dim=0).to(dtype)


def _filled(grads: Tensors, kept_grads: Tensors) -> list[Tensor | None]:
    """Zeros for gradients that are missing where their partner is there."""
    return [
        torch.zeros_like(other) if grad is None and other is not None else grad
        for grad, other in zip(grads, kept_grads, strict=True)
    ]


def grad_dots(grads: Tensors, other: Tensors, *, table: TensorTable | None = None) -> Tensor:
    r"""The inner products of two gradients over all tensors, in one pass: 8 bytes read per fp32 element.

    Args:
        grads: T gradients ``g``; ``None`` counts as zeros.
        other: T gradients ``h``; ``None`` counts as zeros.
        table: A table to reuse, for callers that keep one.

    Returns:
        Shape (3,): ``g.g``, ``h.h``, ``g.h``; float32, or float64 if any tensor is.

    Raises:
        ValueError: Lengths, shapes or devices do not fit.
        TypeError: A dtype is not supported.

    >>> grad_dots([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])])
    tensor([5., 9., 3.])
    """
    if len(other) == len(grads) and any(grad is None for grad in grads):
        grads = _filled(grads, other)
    op, roles = OPS["grad_dots"], (grads, other)
    parts = _table_for(op, roles, table).bind(roles)
    backends = [backend_for(part.device) for part in parts]
    if reference in backends:
        return reference.grad_dots(grads, other)
    dots = []
    for part, backend in zip(parts, backends, strict=True):
        dots.append(torch.empty(3, dtype=part.accumulator, device=part.device))
        _launch(op, backend, part, _hyper_rows(op, {}), {"norm": dots[-1]})
    if len(dots) < 2:
        return dots[0] if dots else torch.zeros(3, dtype=torch.float32)
    dtype = torch.float64 if any(one.dtype == torch.float64 for one in dots) else torch.float32
    return torch.stack([one.to(dots[0].device, torch.float64) for one in dots]).sum(0).to(dtype)


def class_grad_norms(
    class_grads: Sequence[Tensors], params: Tensors | None = None, *, adaptive: bool = False, eta: float = 0.0
) -> Tensor:
    """The norms of K gradients, say one per class, in one pass over all of them.

    Args:
        class_grads: K lists of T gradients; ``None`` counts as zeros.
        params: T weights, needed when adaptive.
        adaptive: Scale by ``|w| + eta``.
        eta: ASAM's constant, >= 0.

    Returns:
        Shape (K,), float32, or float64 if any gradient is.

    Raises:
        ValueError: The K lists differ in length, or as for :func:`grad_norm`.

    Source: the class-conditional gradients of CC-SAM (Zhou et al. 2023).

    >>> class_grad_norms([[torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]])
    tensor([5., 2.])
    """
    lengths = {len(grads) for grads in class_grads}
    if len(lengths) > 1:
        raise ValueError(f"class_grads must hold lists of one length, got lengths {sorted(lengths)}")
    if not class_grads:
        return torch.zeros(0, dtype=torch.float32)
    grads = [grad for one in class_grads for grad in one]
    groups = [k for k, one in enumerate(class_grads) for _ in one]
    norms = grad_norm(
        grads, None if params is None else [*params] * len(class_grads), adaptive=adaptive, eta=eta, groups=groups,
        per_group=True,
    )  # fmt: skip
    return norms if len(norms) == len(class_grads) else norms.new_zeros(len(class_grads))


def perturb_(
    params: Sequence[Tensor],
    grads: Tensors,
    backups: Tensors | None,
    norm: Tensor,
    *,
    rho: Hyper,
    maximize: Hyper = False,
    adaptive: Hyper = False,
    eta: Hyper = 0.0,
    eps: Hyper = 1e-12,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    original_params: Sequence[Tensor] | None = None,
    means: Tensors | None = None,
    combination: Tensor | None = None,
    decay: Hyper = 0.0,
    mask: Tensors | None = None,
    probability: Hyper = 1.0,
    stochastic: bool = False,
    seed: int | None = None,
    step: int = 0,
    skipped: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Backs the weights up and perturbs them along the gradient, in one pass: 16 bytes moved per fp32 element.

    .. math:: b \leftarrow w, \quad w \leftarrow w + \frac{\rho}{\|d\| + \epsilon} T d,
        \qquad T = (|w| + \eta)^2 \text{ if adaptive else } 1

    with the ascent direction ``d = g``, or ``d = c0 g + c1 m`` with means, which then take the gradient in.

    Args:
        params: T weights ``w``, changed in place.
        grads: T ascent gradients ``g``; ``None``: that weight stays.
        backups: T tensors of the weights' dtypes, filled with the old weights; ``None``: they are not kept.
        norm: Norm of the ascent direction, one number, from :func:`grad_norm`. When it is not finite, nothing is perturbed.
        rho: Radius, in units of the weights, >= 0.
        maximize: Against the gradient: the worst weights nearby where the loss is maximized; a flag, or one for each group.
        adaptive: ASAM's scaling.
        eta: ASAM's constant, >= 0.
        eps: Added to the norm, >= 0.
        groups: Group of each tensor.
        grad_scale: What the gradients, and so the norm, are too large by.
        found_inf: When not zero, nothing is perturbed.
        original_params: T tensors with the old weights, when ``params`` are perturbed already; ``None``: ``params`` themselves.
        means: T running means ``m`` of the (unscaled) gradients, updated to ``decay m + (1 - decay) g`` unless the step is
            skipped.
        combination: Four numbers ``c``, of which two count; ``None``: 1, 0.
        decay: Of the means, >= 0.
        mask: T maps of bits, uint8 of ceil(n / 8) elements: bit i % 8 (lowest first) of byte i / 8 is 1 when element i, in
            the order of memory, is not to move.
        probability: In [0, 1], to 2^-16: each element moves with this probability, drawn anew. Needs ``seed``.
        stochastic: Round weights of 16 bits up or down at random, so that steps below their resolution survive on average.
            Needs ``seed``.
        seed: Seed of the draws, in [0, 2^53). They depend on seed, step, the tensor's position and the element's alone.
        step: Number of the step, in [0, 2^32).
        skipped: One float32 number, read on the device and subtracted from ``step``: how many of the steps were none.
        table: A table to reuse, for callers that keep one; with a seed another one than without.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: Foret et al. 2021 (SAM), eq. 2; Kwon et al. 2021 (ASAM), eq. 3; means: Li et al. 2024 (Friendly SAM), Alg. 1;
    mask: Mi et al. 2022 (sparse SAM), Alg. 1; probability: Du et al. 2022 (ESAM), section 3.2.

    >>> w, g, backup = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0]), torch.empty(2)
    >>> perturb_([w], [g], [backup], grad_norm([g]), rho=0.5)
    >>> w
    tensor([1.3000, 1.4000])
    """
    if norm is None:
        raise ValueError("norm must be a tensor of one element, from grad_norm(), got None")
    rho = _signed(rho, maximize)
    values: dict[str, Hyper] = {"rho": rho, "adaptive": adaptive, "eta": eta, "eps": eps, "decay": decay}
    op = OPS["perturb_"]
    if seed is not None:
        op = OPS["random_perturb_"]
        values |= {"probability": probability, "stochastic": stochastic, "seed": seed, "step": step}
    elif stochastic or np.any(np.not_equal(probability, 1.0)):
        raise ValueError("seed must be given with probability or stochastic, got None")
    roles = (params, original_params, grads, backups, means, mask)
    signals: Any = {
        "norm": norm,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "combination": combination,
        "skipped": skipped,
    }
    _run(op, roles, values, groups, table, **signals)


def _signed(rho: Hyper, maximize: Hyper) -> Hyper:
    """The radii as native code takes them: negative where the loss is maximized."""
    radii = list(rho) if isinstance(rho, Sequence) else [rho]
    for radius in radii:
        if isinstance(radius, Real) and not radius >= 0:
            raise ValueError(f"rho must be a finite number >= 0, got {radius}")
    flags = list(maximize) if isinstance(maximize, Sequence) else [maximize]
    if not any(flags):
        return rho
    radii, flags = (one * max(len(radii), len(flags)) if len(one) == 1 else one for one in (radii, flags))
    return tuple(-radius if flag else radius for radius, flag in zip(radii, flags, strict=True))


def gaussian_perturb_(
    params: Sequence[Tensor],
    backups: Tensors | None,
    *,
    amplitude: Hyper,
    sigma: Hyper = 1 / 3,
    clip: Hyper = 1.0,
    seed: int = 0,
    step: int = 0,
    skipped: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    original_params: Sequence[Tensor] | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Keeps the weights and adds clipped Gaussian noise that is made on the way, in one pass: 12 bytes per fp32 element.

    .. math:: b \leftarrow w, \quad w \leftarrow w + a \, \mathrm{clamp}(\sigma z, -c, c), \quad z \sim N(0, 1)

    Args:
        params: T weights ``w``, changed in place.
        backups: T tensors of the weights' dtypes, filled with the old weights; ``None``: they are not kept.
        amplitude: ``a`` >= 0, in units of the weights.
        sigma: Standard deviation before clipping, >= 0.
        clip: ``c`` >= 0.
        seed: In [0, 2^53). The noise depends on seed, step, the tensor's position and the element's (in the order of
            memory) alone: not on the backend, the number of threads or other tensors.
        step: Number of the step, in [0, 2^32).
        skipped: One float32 number, read on the device and subtracted from ``step``: how many of the steps were none.
        offsets: For shards of larger tensors the element number that each begins at, in [0, 2^40): they then get the
            noise that the whole tensor has there. Shards that begin elsewhere than at a multiple of 4 must be contiguous.
        groups: Group of each tensor.
        original_params: T tensors with the old weights, when ``params`` are perturbed already; ``None``: ``params`` themselves.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: GNM-PT (NeurIPS 2024, arXiv 2410.21042), poster, eqs. 1-3. Philox-4x32-10 (Salmon et al. 2011) and the inverse
    distribution function after Giles (2011).

    >>> w, backup = torch.zeros(4), torch.empty(4)
    >>> gaussian_perturb_([w], [backup], amplitude=1.0)
    >>> bool((w.abs() <= 1.0).all() and w.any())
    True
    """
    values: dict[str, Hyper] = {"amplitude": amplitude, "sigma": sigma, "clip": clip, "seed": seed, "step": step}
    if offsets is None:
        _run(OPS["gaussian_perturb_"], (params, original_params, backups), values, groups, table, skipped=skipped)
        return
    _check_offsets(offsets, params)
    led = _led(params, original_params, backups, offsets)
    _run(OPS["gaussian_perturb_"], led, values, groups, table, [x - x % 4 for x in offsets], skipped=skipped)
    for param, stand_in, offset in zip(params, led[0], offsets, strict=True):
        if stand_in is not param:
            param.copy_(stand_in[offset % 4 :].view_as(param))


def _check_offsets(offsets: Sequence[int], params: Sequence[Tensor]) -> None:
    if len(offsets) != len(params):
        raise ValueError(f"offsets has {len(offsets)} entries, but params has {len(params)}: give one per weight")
    for i, (offset, param) in enumerate(zip(offsets, params, strict=True)):
        if not isinstance(offset, int) or not 0 <= offset < 2**40:
            raise ValueError(f"offsets[{i}] must be a whole number in [0, 2^40), got {offset!r}")
        if offset % 4 and not param.is_contiguous():
            raise ValueError(f"params[{i}] must be contiguous to begin at element {offset}: make it so")


def _led(
    params: Sequence[Tensor], original_params: Sequence[Tensor] | None, backups: Tensors | None, offsets: Sequence[int]
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor | None] | None]:
    """The roles, with stand-ins that begin at a multiple of 4 for weights that don't: four elements share a random number."""
    weights, old = list(params), None if original_params is None else list(original_params)
    kept = None if backups is None else list(backups)
    for i, offset in enumerate(offsets):
        if lead := offset % 4:
            source = params[i].detach() if old is None else old[i]
            weights[i] = torch.empty(lead + params[i].numel(), dtype=params[i].dtype, device=params[i].device)
            weights[i][:lead] = 0
            weights[i][lead:] = source.reshape(-1)
            if kept and (backup := kept[i]) is not None:
                backup.copy_(source)
                kept[i] = None
            if old is not None:
                old[i] = weights[i]
    return weights, old, kept


def perturb_by_class_(
    params: Sequence[Tensor],
    class_grads: Sequence[Sequence[Tensor]],
    scales: Tensor,
    *,
    table: TensorTable | None = None,
) -> None:
    r"""Turns K gradients of the same weights into K perturbed copies of the weights, in one pass over all of them.

    .. math:: g_k \leftarrow w + s_{k} g_k

    Args:
        params: T weights ``w``, not changed.
        class_grads: K lists of T gradients ``g_k``, overwritten with the perturbed weights, say one list per class.
        scales: Shape (K,), or (K, T) for a scale of each tensor's own: radius divided by norm.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or gradients share memory.
        TypeError: A dtype is not supported.

    Source: the class-conditional perturbations of CC-SAM (Zhou et al., CVPR 2023).

    >>> w, g = torch.tensor([1.0, 1.0]), [torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0])]
    >>> perturb_by_class_([w], [[g[0]], [g[1]]], torch.tensor([0.5, 0.25]))
    >>> g
    [tensor([1., 2.]), tensor([2., 1.])]
    """
    classes, tensors = len(class_grads), len(params)
    for k, grads in enumerate(class_grads):
        if len(grads) != tensors:
            raise ValueError(
                f"class_grads[{k}] has {len(grads)} entries, but params has {tensors}: give one per weight"
            )
    if not isinstance(scales, Tensor) or tuple(scales.shape) not in {(classes,), (classes, tensors)}:
        shape = tuple(scales.shape) if isinstance(scales, Tensor) else scales
        raise ValueError(f"scales must have shape ({classes},) or ({classes}, {tensors}), got {shape}")
    flat = scales.reshape(classes, -1).expand(classes, tensors).reshape(-1)
    rows = (list(params) * classes, [grad for grads in class_grads for grad in grads])
    _run(OPS["perturb_by_class_"], rows, table=table, scales=flat)


def combine_(
    out: Sequence[Tensor],
    grads: Tensors,
    kept_grads: Tensors,
    combination: Tensor,
    *,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    """Fills ``out`` with ``c0 g + c1 g'``, with numbers that are on the device, in one pass: 16 bytes per fp32 element.

    Args:
        out: T tensors, overwritten.
        grads: T gradients ``g``; ``None`` counts as zeros.
        kept_grads: T gradients ``g'``; ``None`` counts as zeros.
        combination: Four numbers ``c``, of which two count.
        found_inf: When not zero, nothing is written.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    _run(OPS["combine_"], (out, grads, kept_grads), table=table, found_inf=found_inf, combination=combination)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor], *, table: TensorTable | None = None) -> None:
    """Puts the old weights back, bit for bit, into the same storage: 8 bytes moved per fp32 element.

    Args:
        params: T weights, overwritten.
        backups: T tensors from :func:`perturb_`.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes or devices do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    _run(OPS["restore_"], (params, backups), table=table)


def sgd_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    *,
    lr: Hyper,
    momentum: Hyper = 0.0,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    nesterov: Hyper = False,
    maximize: Hyper = False,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    momentum_buffers: Tensors | None = None,
    steps: Tensors | None = None,
    max_norm: Hyper = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Restores, adds up gradients and takes the step of torch.optim.SGD, in one pass: 24 bytes per fp32 element.

    .. math:: d = s (g + g') + \lambda b, \quad m \leftarrow \mu m + (1 - \tau) d, \quad w \leftarrow b - \alpha m

    with the old weights ``b``, and ``d + mu m`` in place of ``m`` in the last term when nesterov. ``s`` unscales, clips to
    ``max_norm`` and turns around to maximize.

    Args:
        params: T weights ``w``, overwritten.
        grads: T gradients ``g``.
        lr: Learning rate, >= 0.
        momentum: ``mu`` >= 0; without momentum no buffers are needed.
        dampening: ``tau``; not applied in a tensor's first step, see ``steps``.
        weight_decay: ``lambda`` >= 0, acts on the old weights.
        nesterov: Nesterov's momentum.
        maximize: Ascend instead.
        backups: T old weights ``b``; ``None``: the weights are not perturbed and ``b = w``.
        kept_grads: T gradients ``g'`` to be added.
        momentum_buffers: T buffers ``m``, updated; zeros before the first step.
        steps: T float32 numbers that count steps taken; needed with dampening only.
        max_norm: Clip the gradient's norm to this; 0: do not.
        norm: Norm of ``g + g'``, still scaled, as :func:`grad_norm` gives it; needed with ``max_norm``.
        combination: Four numbers ``c``: the gradient is ``c0 g + c1 g'``, and weights also move by ``-lr s (c2 g + c3 g')``,
            without momentum, decay and clipping; ``None``: 1, 1, 0, 0.
        groups: Group of each tensor.
        grad_scale: What gradients and norm are too large by.
        found_inf: When not zero, weights are restored and nothing else happens.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    values = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "max_norm": max_norm,
    }
    _check_momentum_buffers(momentum_buffers, momentum, groups)
    _check_clipping(max_norm, norm)
    roles = (params, backups, grads, kept_grads, momentum_buffers, steps)
    _run(
        OPS["sgd_step_"],
        roles,
        values,
        groups,
        table,
        norm=norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        combination=combination,
    )


def adam_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Hyper,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled: Hyper = False,
    maximize: Hyper = False,
    max_exp_avg_sqs: Tensors | None = None,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    max_norm: Hyper = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Restores, adds up gradients and takes the step of torch.optim.Adam or AdamW, in one pass: 32 bytes per element.

    .. math:: m \leftarrow m + (1 - \beta_1)(d - m), \quad v \leftarrow \beta_2 v + (1 - \beta_2) d^2, \quad
        w \leftarrow b - \frac{\alpha}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    with the old weights ``b`` and ``d`` as for :func:`sgd_step_`; decoupled decay multiplies ``b`` by
    ``1 - lr weight_decay`` instead.

    Args:
        params: T weights ``w``, overwritten.
        grads: T gradients ``g``.
        exp_avgs: T buffers ``m``, updated.
        exp_avg_sqs: T buffers ``v``, updated.
        steps: T float32 numbers ``t - 1``, counted up unless the step is skipped.
        lr: Learning rate, >= 0.
        beta1: In [0, 1).
        beta2: In [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: >= 0.
        decoupled: Decay as AdamW does.
        maximize: Ascend instead.
        max_exp_avg_sqs: T buffers with the largest ``v`` so far: amsgrad.
        backups: T old weights ``b``; ``None``: the weights are not perturbed and ``b = w``.
        kept_grads: T gradients to be added.
        max_norm: Clip the gradient's norm to this; 0: do not.
        norm: Norm of the summed gradient, still scaled; needed with ``max_norm``.
        combination: As for :func:`sgd_step_`.
        groups: Group of each tensor.
        grad_scale: What gradients and norm are too large by.
        found_inf: When not zero, weights are restored and nothing else happens.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: Kingma & Ba 2015, Alg. 1; Loshchilov & Hutter 2019, Alg. 2; Reddi et al. 2018, Alg. 2 (amsgrad).
    """
    values = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
        "maximize": maximize,
        "max_norm": max_norm,
    }
    for name, buffers in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("steps", steps)):
        if buffers is None:
            raise ValueError(f"{name} must hold one tensor per weight, got None")
    _check_clipping(max_norm, norm)
    roles = (params, backups, grads, kept_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    _run(
        OPS["adam_step_"],
        roles,
        values,
        groups,
        table,
        norm=norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        combination=combination,
    )


def _check_momentum_buffers(buffers: Tensors | None, momentum: Hyper, groups: Sequence[int] | None) -> None:
    gaps = None if buffers is None else [i for i, buffer in enumerate(buffers) if buffer is None]
    if gaps == [] or not _any(momentum):
        return
    if gaps is None:
        raise ValueError(f"momentum_buffers must be given with momentum {momentum}: one tensor of zeros per weight")
    if isinstance(momentum, Sequence):
        _check_groups(groups, len(buffers or ()), len(momentum))
    for i in gaps:
        value = reference._value(momentum, groups, i)
        if value:
            raise ValueError(f"momentum_buffers[{i}] is None, but its momentum is {value}: give a tensor of zeros")


def _any(value: Hyper) -> bool:
    return any(value) if isinstance(value, Sequence) else bool(value)


def _check_clipping(max_norm: Hyper, norm: Tensor | None) -> None:
    if norm is None and _any(max_norm):
        raise ValueError(f"norm must be given with max_norm {max_norm}: the gradient's, from grad_norm()")


def check_counts(class_counts: Any) -> Tensor:
    """``class_counts`` as float64, shape (C,). Raises ValueError unless they are finite, >= 0 and not all 0."""
    try:
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_counts must be numbers of samples, one per class, got {class_counts!r}") from error
    if counts.dim() != 1 or not len(counts) or not bool(((counts >= 0) & counts.isfinite()).all()) or counts.sum() == 0:
        raise ValueError(
            f"class_counts must be a list of finite numbers >= 0, one per class and not all 0, got {class_counts!r}"
        )
    return counts


def focal_weights(class_counts: Any, gamma: float = 1.0, lam: float = 0.5) -> Tensor:
    """Focal-SAM's weight of each class's sharpness, v_c = lam (1 - pi_c)^gamma with pi_c = n_c / n.

    Args:
        class_counts: C numbers of training samples, >= 0, not all zero.
        gamma: Focus on the tail, >= 0.
        lam: Overall weight; may exceed 1 (the paper's iNaturalist recipe has 1.1), v is not clamped.

    Returns:
        Shape (C,), float64.

    Raises:
        ValueError: ``class_counts`` is empty, negative, not finite or sums to zero; ``gamma`` or ``lam`` is not finite.

    Source: Focal-SAM (ICML 2025, arXiv 2505.01660), Algorithm 1.

    >>> focal_weights([90, 10], gamma=1.0, lam=0.5)
    tensor([0.0500, 0.4500], dtype=torch.float64)
    """
    counts = check_counts(class_counts)
    for name, value, low in (("gamma", gamma, 0.0), ("lam", lam, 0.0)):
        if not low <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return reference.focal_weights(counts, gamma, lam)


def focal_cross_entropy(
    logits: Tensor, targets: Tensor, v: Tensor, u: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Per-sample cross entropy and the gradients of both of Focal-SAM's losses, from one pass over the logits.

    .. math:: \ell_j = \log \sum_c e^{z_{jc}} - z_{j y_j}, \qquad
        \nabla_{z_j} \frac{1}{B} \sum_i a_{y_i} \ell_i = \frac{a_{y_j}}{B} (\mathrm{softmax}(z_j) - 1_{y_j})

    Feed the gradients to autograd: ``logits.backward(grad_u, retain_graph=True)``. The results themselves are detached.

    Args:
        logits: (B, C), contiguous or not.
        targets: (B,), int64 in [0, C).
        v: (C,) weights of the sharp loss, e.g. :func:`focal_weights`.
        u: (C,) weights of the clean loss; ``None``: 1 - v.

    Returns:
        losses (B,) in fp32, or fp64 for fp64 logits; grad_u and grad_v (B, C) in the logits' dtype.

    Raises:
        ValueError: Shapes do not fit, or a target is out of range (on cpu; on a GPU that check would wait for the device,
            so there such a row comes out as NaN).
        TypeError: A dtype is not supported.

    Source: Focal-SAM (ICML 2025), Algorithm 1, with its two backward passes' cotangents in one kernel.

    >>> losses, grad_u, grad_v = focal_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.25, 0.75]))
    >>> losses, grad_u, grad_v
    (tensor([0.6931]), tensor([[ 0.1250, -0.1250]]), tensor([[ 0.3750, -0.3750]]))
    """
    logits, targets = _check_logits(logits, targets)
    logits = logits.detach()
    check_range(targets, logits.shape[1])
    rows, classes = logits.shape
    weights = []
    for name, given in (("v", v), ("u", u)):
        weight = 1 - v if given is None and name == "u" else given
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (classes,):
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name} must be a tensor of shape ({classes},), one weight per class, got {got}")
        weights.append(weight.detach().to(logits.device, accumulator(logits)).contiguous())
    v, u = weights
    backend = backend_for(logits.device)
    if backend is reference or rows == 0:
        return reference.focal_cross_entropy(logits, targets, v, u)
    logits = logits.contiguous()
    losses = torch.empty(rows, dtype=accumulator(logits), device=logits.device)
    grad_u, grad_v = torch.empty_like(logits), torch.empty_like(logits)
    launch(
        backend, Numbers(by_label=True), logits=logits, targets=targets, losses=losses,
        cotangent_0=u, cotangent_1=v, grad_0=grad_u, grad_1=grad_v,
    )  # fmt: skip
    return losses, grad_u, grad_v


def adjusted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    detach: bool = False,
    spread: Tensor | None = None,
    draw: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Per-sample cross entropy of adjusted logits, in one pass; differentiable by the logits, in another.

    .. math:: a_c = \alpha_c (z_c - \nu_c |e_c|) + \beta_c - \mu_y [c = y], \qquad
        \ell = \sum_c q_c \Big(\log \sum_k e^{a_k} - a_c\Big), \quad
        q_c = (1 - \epsilon) w_y [c = y] + \tfrac{\epsilon}{C} w_c

    With ``gamma`` the loss is :math:`w_y (1 - p)^\gamma (-\ln p)` of the label's probability :math:`p = e^{a_y} / \sum_k
    e^{a_k}`. Nothing of size (B, C) is kept for the backward but the logits themselves, and nothing is written but their
    gradient; logits that are not contiguous are copied. The reference implementation computes a backward that is itself to
    be differentiated.

    Args:
        logits: (B, C), contiguous or not.
        targets: (B,), integers in [0, C).
        scale: (C,) factors ``alpha`` of the logits; ``None``: 1.
        shift: (C,) ``beta``, added to the logits; ``None``: 0.
        margin: (C,) ``mu``, subtracted from the adjusted logit of the label; ``None``: 0.
        weight: (C,) weights ``w`` of the classes; ``None``: 1.
        label_smoothing: ``epsilon`` in [0, 1]; with weights the meaning is that of torch.nn.functional.cross_entropy.
        gamma: Focus on samples with a small ``p``, >= 0; not together with label smoothing.
        detach: No gradient flows through ``(1 - p)^gamma``.
        spread: (C,) ``nu`` >= 0, amplitudes of the noise ``e ~ clamp(N(0, 1/9), -1, 1)``; ``None``: none. It is made where it
            is used, from Philox by ``seed``, ``draw``, row and class: the same on every backend.
        draw: One int64 number on the logits' device; another one is another noise. Needed with ``spread``.
        seed: In [0, 2^53).

    Returns:
        losses (B,) in fp32, or fp64 for fp64 logits. No gradient flows to anything but the logits.

    Raises:
        ValueError: Shapes or numbers do not fit, or a target is out of range (on cpu; on a GPU that check would wait for the
            device, so there such a row comes out as NaN).
        TypeError: A dtype is not supported.

    Source: see :mod:`ltsam_fast.losses`, whose losses are calls of this.

    >>> adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), shift=torch.tensor([3.0, 1.0]).log())
    tensor([1.3863])
    """
    logits, targets = _check_logits(logits, targets)
    _check_loss_numbers(label_smoothing, gamma, seed)
    vectors = {"scale": scale, "shift": shift, "margin": margin, "weight": weight, "spread": spread}
    ready = {name: _class_vector(name, vector, logits) for name, vector in vectors.items()}
    if spread is not None:
        if not isinstance(draw, Tensor) or draw.numel() != 1 or draw.dtype != torch.int64:
            raise ValueError(f"draw must be a tensor with one int64 number when spread is given, got {draw!r}")
        draw = draw.to(logits.device)
    draw = None if spread is None else draw
    numbers = {"label_smoothing": float(label_smoothing), "gamma": float(gamma), "detach": bool(detach), "seed": seed}
    if not torch.compiler.is_compiling() and backend_for(logits.device) is reference:
        check_range(targets, logits.shape[1])
        return reference.adjusted_cross_entropy(logits, targets, **ready, draw=draw, **numbers)  # type: ignore[arg-type]
    return rows.adjusted_cross_entropy(logits, targets, (*ready.values(), draw), *numbers.values())


def _check_loss_numbers(label_smoothing: Any, gamma: Any, seed: Any) -> None:
    for name, value, last in (("label_smoothing", label_smoothing, 1.0), ("gamma", gamma, float("inf"))):
        if not isinstance(value, (int, float)) or not 0 <= value <= last or value == float("inf"):
            wanted = "in [0, 1]" if last == 1 else ">= 0"
            raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")
    if gamma and label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing} and gamma {gamma}: the focal loss has no smoothed form")
    if not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ValueError(f"seed must be an integer in [0, 2^53), got {seed!r}")


def _class_vector(name: str, vector: Any, logits: Tensor) -> Tensor | None:
    """A vector of classes as native code takes it."""
    if vector is None:
        return None
    classes = logits.shape[1]
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (classes,):
        got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{name} must be a tensor of shape ({classes},), one number per class, got {got}")
    if vector.requires_grad:
        raise ValueError(f"{name} requires a gradient, but none flows to it: give {name}.detach()")
    return vector.to(logits.device, accumulator(logits), non_blocking=True).contiguous()


def _check_logits(logits: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and targets as contiguous int64 on their device."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] == 0:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must have shape (B, C) with C > 0, got {shape}")
    if logits.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"logits has dtype {logits.dtype}: accepted are {accepted}")
    _check_labels(targets, logits.shape[0])
    return logits, targets.to(logits.device, torch.int64, non_blocking=True).contiguous()


def _check_labels(targets: Any, rows: int) -> None:
    integers = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not integers or targets.dim() != 1 or len(targets) != rows:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else targets
        raise ValueError(f"targets must be a 1-D integer tensor of {rows} labels, one per sample, got {shape}")


def check_targets(targets: Tensor, rows: int, classes: int) -> None:
    """Raises ValueError unless ``targets`` are ``rows`` labels in [0, classes). On a GPU the range is not looked at."""
    _check_labels(targets, rows)
    check_range(targets, classes)
