"""How an op runs: its description, hyperparameters, a table of its tensors, then one backend call for each part."""

from __future__ import annotations

import contextvars
import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from ltsam_fast.backend import backend_for
from ltsam_fast.launch_args import Op, Role, aligned, stream_or_threads
from ltsam_fast.ops.checks import checked_rows
from ltsam_fast.table import TensorTable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


class Tracer(Protocol):
    """Who is asked for what kernels read of the host's, while a step is traced: a CUDA graph holds no numbers."""

    def rows(self, op: Op, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hyperparameters of a pass, checked, as the tracer keeps them."""

    def place(self, array: NDArray[Any]) -> Any:
        """An array of 8-byte numbers on the device, where a captured kernel reads it; else the array itself."""


tracer: contextvars.ContextVar[Tracer | None] = contextvars.ContextVar("ltsam_fast.tracer", default=None)
"""Of this thread: what others launch meanwhile is none of the traced step's."""

_ROWS: dict[tuple[Any, ...], NDArray[np.float64]] = {}
_KEPT = 64


def hyper_rows(op: Op, values: dict[str, Hyper]) -> NDArray[np.float64]:
    """Hyperparameters as the matrix (groups, columns) that backends take, checked. They seldom change: kept by value."""
    columns = [tuple(value) if isinstance(value := values[name], list) else value for name in op.hyper]
    try:
        rows = _ROWS.get((op.name, *columns))
    except TypeError:  # what has no hash is no number either, which the checks will say
        rows = None
    if rows is None:
        rows = checked_rows(op, columns)
        if len(_ROWS) >= _KEPT:
            _ROWS.clear()
        _ROWS[(op.name, *columns)] = rows
    asking = tracer.get()
    return rows if asking is None else asking.rows(op, rows)


_TABLES: dict[tuple[Any, ...], TensorTable] = {}


def table_for(op: Op, lists: tuple[Role, ...], given: TensorTable | None = None) -> TensorTable:
    """A table to reuse. Any would do, for bind() checks everything: a good guess only saves building it anew."""
    first = lists[0] or ()
    lead = first[0] if len(first) else None
    on_gpu = isinstance(lead, Tensor) and lead.is_cuda
    # A graph goes on with the scratch memory that it saw: these tables, and a caller's, may let go of theirs before.
    if on_gpu and (given is None or tracer.get() is None) and torch.cuda.is_current_stream_capturing():
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
"""Place in ``lt::Signals`` of a signal: a small tensor that is read, or written, on the device."""
_SINGLE = frozenset(("grad_scale", "found_inf", "skipped"))
"""Signals in float32; the others are in the accumulator's type."""


def launch(
    op: Op,
    table: TensorTable,
    hyper: NDArray[np.float64],
    signals: dict[str, Tensor | None],
    roles: tuple[Role, ...],
    groups: Sequence[int] | None = None,
    buckets: Sequence[int] | None = None,
    bucket_count: int = 1,
    offsets: Sequence[int] | None = None,
    results: tuple[int, ...] | None = None,
) -> list[dict[str, Tensor]]:
    """Binds the tensors and runs one backend call for each part; returns the signals as these saw them.

    ``results`` is the shape of a signal "norm" that is made, in the part's accumulator.
    """
    parts = table.bind(roles, groups, buckets, bucket_count, offsets, len(hyper))
    calls = [(part, backend_for(part.device)) for part in parts]
    found, asking = [], tracer.get()
    for args, _ in calls:
        seen: dict[str, Tensor] = {}
        addresses = [0] * 5
        for name, value in signals.items():
            if value is None:
                continue
            elements = 4 if name == "combination" else len(roles[0] or ()) if name == "scales" else 1
            if not isinstance(value, Tensor) or value.numel() != elements:
                wanted = f"{elements} elements" if name in ("combination", "scales") else "one element"
                raise ValueError(f"{name} must be a tensor of {wanted}, got {value!r}")
            dtype = torch.float32 if name in _SINGLE else args.accumulator
            if value.dtype is not dtype or value.device != args.device or not value.is_contiguous():
                value = value.detach().to(args.device, dtype).contiguous()
            seen[name] = value = aligned(value)
            addresses[_SLOTS[name]] = value.data_ptr()
        if seen and (key := tuple(addresses)) not in table.apart:
            table.check_apart(seen, key)
        if results is not None:
            seen["norm"] = norm = torch.empty(results, dtype=args.accumulator, device=args.device)
            addresses[0] = norm.data_ptr()
        args.signals, args.addresses = seen, tuple(addresses)
        found.append(seen)
    for args, backend in calls:
        args.hyper = hyper if asking is None else asking.place(hyper)
        args.stream_or_threads = stream_or_threads(args.device)
        if args.device.type == "cpu":
            getattr(backend, op.name)(args)
        else:
            with torch.cuda.device(args.device):
                getattr(backend, op.name)(args)
        args.launched, args.lists = True, ()
    if table.staged:
        table.finish()
    return found


def run(
    op: Op,
    roles: tuple[Role, ...],
    values: dict[str, Hyper] | None = None,
    groups: Sequence[int] | None = None,
    table: TensorTable | None = None,
    offsets: Sequence[int] | None = None,
    **signals: Tensor | None,
) -> None:
    """Runs a pass that writes tensors."""
    hyper = hyper_rows(op, values or {})
    lists = roles
    if roles[1] is None and "original" in op.roles:  # without backups the old weights are the weights themselves
        lists = (roles[0], roles[0], *roles[2:])
    moves_weights = "w" in op.writes
    if moves_weights:
        clear_weight_caches()
    launch(op, table_for(op, roles, table), hyper, signals, lists, groups, offsets=offsets)
    # The writes went past autograd: without this, backward through an overwritten weight would go unnoticed. A caller with
    # a table of its own (an optimizer) keeps its state out of graphs, so there the weights are enough.
    if table is None:
        for role, tensors in zip(op.roles, roles, strict=True):
            if tensors is not None and role in op.writes:
                increment_version([tensor for tensor in tensors if tensor is not None])
    elif moves_weights:
        increment_version(roles[0])  # type: ignore[arg-type]


def reduce(
    op: Op,
    roles: tuple[Role, ...],
    hyper: NDArray[np.float64],
    groups: Sequence[int] | None = None,
    buckets: Sequence[int] | None = None,
    shape: tuple[int, ...] = (),
    table: TensorTable | None = None,
    found_inf: Tensor | None = None,
    **signals: Tensor | None,
) -> list[Tensor]:
    """Runs a reduction; returns numbers of this shape, ``op.sums`` for each bucket, for each part."""
    signals["found_inf"] = found_inf
    count = math.prod(shape) // op.sums
    results = []
    for seen in launch(op, table_for(op, roles, table), hyper, signals, roles, groups, buckets, count, results=shape):
        results.append(seen["norm"])
        if found_inf is not None and (found := seen["found_inf"]).data_ptr() != found_inf.data_ptr():
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device)))
    return results


def clear_weight_caches() -> None:
    """Clears what torch keeps of weights until a context ends: whatever moves weights must, or nobody sees that they moved.

    These are autocast's 16-bit casts and what ``torch.nn.utils.parametrize.cached()`` keeps.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()
