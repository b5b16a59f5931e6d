"""Tables of addresses: what the native loops walk, checked before any address is taken.

A :class:`TensorTable` belongs to one op. Each call reads address, size, dtype, device and layout of every tensor afresh (about
20 ns a tensor through the C exchange table of DLPack 1.3), so a tensor that moved can never leave a stale address behind;
what follows from them is kept for as long as nothing changed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 16384
"""Elements per chunk: the unit of work and of the fixed summation order; ``lt::kChunk`` in csrc."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITMAP = len(DTYPES)  # the code of uint8, which serves as a map of bits
ITEM_SIZES = np.array([4, 8, 2, 2, 1])
WIDE = DTYPES.index(torch.float64)

ADDRESS, NUMEL, DTYPE, DEVICE, SHAPE, LAYOUT = range(6)
COLUMNS = 6
NUMBER_BITS = 24  # of a tensor's number; the bits above say where its random numbers begin
ABSENT = -1  # "device" of a role that a tensor does not have
NEVER_READ = -2
CONTIGUOUS, NOT_DENSE = 0, 1  # layouts; anything else is a hash of strides that leave no holes
DEVICE_TYPES = {1: "cpu", 2: "cuda"}  # DLPack's numbers

SAME, MOVED, CHANGED, REFRESHED = range(4)

Role = Sequence[torch.Tensor | None] | None


class Op(NamedTuple):
    """What Python must know of a native op. The same facts stand in its functor, and a test compares the two."""

    name: str
    roles: tuple[str, ...]
    arguments: tuple[str, ...]
    """Name of each role's argument in :mod:`ltsam_fast.ops`."""
    reads: frozenset[str]
    writes: frozenset[str]
    needs: frozenset[str]
    """Roles that every tensor must have."""
    hyper: tuple[str, ...]
    sums: int = 1
    """Numbers that a reduction yields for each bucket."""


class LaunchArgs:
    """The tensors of a table that share a device and an accumulator: what one native call takes.

    Attributes: ``pointers`` int64 (T, R), 0 where absent; ``dtypes`` uint8 (T, R), indices of :data:`DTYPES`; ``numels``
    int64 (T,); ``groups`` int32 (T,), rows of the hyperparameters; ``numbers`` int64 (T,), positions in the caller's
    lists, from bit 24 on a quarter of the element number that a shard begins at; ``buckets`` int32 (T,), nondecreasing,
    outputs of a reduction, ``bucket_count`` of them; ``first_chunk`` int64 (T + 1,); ``wide``: accumulates in fp64;
    ``scratch``: address of 1 + chunks * sums zeroed doubles on ``device``; ``cache``: a dict for what a backend derives,
    emptied when a tensor moved.
    """

    def __init__(
        self,
        pointers: NDArray[np.int64],
        dtypes: NDArray[np.int64],
        numels: NDArray[np.int64],
        groups: NDArray[np.int32],
        numbers: NDArray[np.int64],
        buckets: NDArray[np.int32],
        bucket_count: int,
        sums: int,
        device: torch.device,
        wide: bool,
    ) -> None:
        self.pointers = np.ascontiguousarray(pointers)
        self.dtypes = np.ascontiguousarray(dtypes.astype(np.uint8))
        self.numels = np.ascontiguousarray(numels)
        self.groups = np.ascontiguousarray(groups)
        self.numbers = np.ascontiguousarray(numbers.astype(np.int64))
        self.buckets = np.ascontiguousarray(buckets)
        self.bucket_count = bucket_count
        self.first_chunk = np.concatenate([[0], np.cumsum(-(-self.numels // CHUNK))]).astype(np.int64)
        self.device = device
        self.wide = wide
        self.cache: dict[Any, Any] = {}
        # The first cell counts finished CUDA blocks and must start at zero; then partial sums, chunk by chunk.
        self._scratch = torch.zeros(1 + int(self.first_chunk[-1]) * sums, dtype=torch.float64, device=device)
        self.scratch = self._scratch.data_ptr()

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and norms."""
        return torch.float64 if self.wide else torch.float32

    def stream_or_threads(self) -> int:
        """The native call's last argument: a CUDA stream, or the number of threads on the CPU."""
        if self.device.type == "cpu":
            return torch.get_num_threads()
        return int(torch.cuda.current_stream(self.device).cuda_stream)


class Staged(NamedTuple):
    """A tensor whose elements do not lie as its partners' do, and the copy that stands in for it during a pass."""

    role: int
    row: int
    copy: torch.Tensor


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a sparse tensor."""
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({tensor.layout}): only dense tensors are supported, e.g. build nn.Embedding with sparse=False"
        )


class TensorTable:
    """The tensors of one op, T by R roles, as parts that native code can take."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.parts: list[LaunchArgs] = []
        # A step is one number, masks have a bit for each element.
        self._arrays = [index for index, role in enumerate(op.roles) if role not in ("step", "mask")]
        self._written = tuple(role in op.writes for role in op.roles)
        self._bitmaps = np.array([role == "mask" for role in op.roles])
        self._snapshot = np.empty((0, len(op.roles), COLUMNS), np.int64)
        self._valid_for: tuple[Any, ...] | None = None
        self._staged: list[Staged] = []

    def bind(
        self,
        roles: tuple[Role, ...],
        groups: Sequence[int] | None = None,
        buckets: Sequence[int] | None = None,
        bucket_count: int = 1,
        offsets: Sequence[int] | None = None,
    ) -> list[LaunchArgs]:
        """Checks the tensors and returns the parts to launch on.

        Args:
            roles: One list of T tensors per role; ``None`` for a role, or an entry, that is absent (it reads as zeros).
            groups: Row of the hyperparameters of each tensor; ``None``: row 0.
            buckets: Output index of each tensor in a reduction, nondecreasing; ``None``: 0.
            bucket_count: Number of outputs of a reduction.
            offsets: For random numbers, the element that each tensor begins at, a multiple of 4; ``None``: 0.

        Raises:
            TypeError: An entry is no tensor, or its dtype is not one of :data:`DTYPES`.
            ValueError: Lengths, shapes or devices differ; a tensor is sparse or on an unsupported device; a tensor that is
                written shares memory with another. Nothing was changed then.
        """
        lists = self._as_lists(roles)
        # Copies, for callers may change their lists in place.
        asked_for = ([None if one is None else list(one) for one in (groups, buckets, offsets)], bucket_count)
        still_valid = asked_for == self._valid_for
        renewable = still_valid and not self._staged and len(self.parts) == 1
        change = self._read(lists, self.parts[0].pointers if renewable else None)
        if change == REFRESHED:
            self.parts[0].cache.clear()
        elif change != SAME or not still_valid:
            self._valid_for = None  # until the checks have passed
            self._rebuild(lists, groups, buckets, offsets, bucket_count)
            self._valid_for = asked_for
        for staged in self._staged:
            if self.op.roles[staged.role] in self.op.reads:
                staged.copy.copy_(lists[staged.role][staged.row].detach())
        return self.parts

    def finish(self, roles: tuple[Role, ...]) -> None:
        """Copies what was computed on stand-ins back into the tensors they stood in for."""
        for staged in self._staged:
            if self.op.roles[staged.role] in self.op.writes:
                roles[staged.role][staged.row].detach().copy_(staged.copy)  # type: ignore[index, union-attr]

    def forget_launch(self) -> None:
        """PLACEHOLDER"""

    def launched(self) -> list[int]:
        """PLACEHOLDER"""
        return []

    def _as_lists(self, roles: tuple[Role, ...]) -> tuple[Any, ...]:
        lists = tuple(role if role is None or type(role) is list else list(role) for role in roles)
        count = len(lists[0] or ())
        for argument, role in zip(self.op.arguments, lists, strict=True):
            if role is not None and len(role) != count:
                raise ValueError(
                    f"{argument} has {len(role)} entries, but {self.op.arguments[0]} has {count}: give one per tensor"
                )
        if len(self._snapshot) != count:
            self._snapshot = np.full((count, len(lists), COLUMNS), NEVER_READ, np.int64)
            self._valid_for = None  # of no tensors none has changed
        return lists

    def _read(self, lists: tuple[Any, ...], pointers: NDArray[np.int64] | None) -> int:
        try:
            return _reader()(lists, self._snapshot, self._written, pointers)
        except Exception:
            self._snapshot[...] = NEVER_READ
            self._explain(lists)
            raise

    def _explain(self, lists: tuple[Any, ...]) -> None:
        """Raises the reason why some tensor could not be read, if it is a known one."""
        for argument, role in zip(self.op.arguments, lists, strict=True):
            for index, tensor in enumerate(role or ()):
                name = f"{argument}[{index}]"
                if tensor is None:
                    continue
                if not isinstance(tensor, torch.Tensor):
                    raise TypeError(f"{name} is a {type(tensor).__name__}: give a torch.Tensor")
                check_dense(name, tensor)
                if tensor.device.type not in DEVICE_TYPES.values():
                    raise ValueError(f"{name} is on device {tensor.device}: move it to cpu or cuda with .to()")

    def _rebuild(
        self,
        lists: tuple[Any, ...],
        groups: Sequence[int] | None,
        buckets: Sequence[int] | None,
        offsets: Sequence[int] | None,
        bucket_count: int,
    ) -> None:
        self._check(self._snapshot, lists)
        self._check_overlap(lists)
        rows, self._staged = self._stage(self._snapshot.copy(), lists)
        count = len(rows)
        group_of = np.zeros(count, np.int32) if groups is None else np.asarray(groups, np.int32)
        bucket_of = np.zeros(count, np.int32) if buckets is None else np.asarray(buckets, np.int32)
        numbers = np.arange(count) + (0 if offsets is None else np.asarray(offsets, np.int64) // 4 << NUMBER_BITS)
        present = rows[:, self._arrays, DEVICE] != ABSENT
        wide = ((rows[:, self._arrays, DTYPE] == WIDE) & present).any(axis=1)
        device = rows[:, 0, DEVICE]
        self.parts = [
            LaunchArgs(
                rows[chosen, :, ADDRESS],
                rows[chosen, :, DTYPE],
                rows[chosen, 0, NUMEL],
                group_of[chosen],
                numbers[chosen],
                bucket_of[chosen],
                bucket_count,
                self.op.sums,
                _device(code),
                bool(is_wide),
            )
            for code, is_wide in sorted(set(zip(device.tolist(), wide.tolist(), strict=True)))
            if code != ABSENT
            for chosen in [(device == code) & (wide == is_wide)]
        ]

    def _check(self, rows: NDArray[np.int64], lists: tuple[Any, ...]) -> None:
        present = rows[..., DEVICE] != ABSENT
        arrays = np.zeros_like(present)
        arrays[:, self._arrays] = True
        needed = np.array([role in self.op.needs for role in self.op.roles])
        paired = present & present[:, :1]

        def check(bad: NDArray[np.bool_], kind: type[Exception], message: str) -> None:
            if bad.any():
                index, role = (int(i) for i in np.argwhere(bad)[0])
                it, base = None if lists[role] is None else lists[role][index], lists[0][index]
                names = self.op.arguments
                raise kind(
                    f"{names[role]}[{index}] "
                    + message.format(it=it, base=base, kind=type(it).__name__, other=f"{names[0]}[{index}]")
                )

        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        check(~present & needed, ValueError, "is None: give a tensor")
        unknown = (rows[..., DTYPE] < 0) | (rows[..., DTYPE] == BITMAP)
        check(present & unknown & ~self._bitmaps, TypeError, f"has dtype {{it.dtype}}: accepted are {accepted}")
        check(
            present & ~np.isin(rows[..., DEVICE] >> 16, list(DEVICE_TYPES)),
            ValueError,
            "is on device {it.device}: move it to cpu or cuda with .to()",
        )
        check(
            present & (rows[..., ADDRESS] == 0) & (rows[..., NUMEL] > 0),
            ValueError,
            "has no storage of its own ({kind}): give its local tensor",
        )
        check(
            paired & (rows[..., DEVICE] != rows[:, :1, DEVICE]),
            ValueError,
            "is on {it.device}, but {other} is on {base.device}: move it with .to()",
        )
        check(
            paired & arrays & (rows[..., [SHAPE, NUMEL]] != rows[:, :1, [SHAPE, NUMEL]]).any(axis=-1),
            ValueError,
            "has shape {it.shape}, but {other} has {base.shape}: they must be equal",
        )
        whole_bytes = (rows[..., NUMEL] == -(-rows[:, :1, NUMEL] // 8)) & (rows[..., LAYOUT] == CONTIGUOUS)
        check(
            present & self._bitmaps & ~(whole_bytes & (rows[..., DTYPE] == BITMAP)),
            ValueError,
            "has shape {it.shape} and dtype {it.dtype}: it must be contiguous uint8 with a bit for each element",
        )
        check(
            present
            & ~arrays
            & ~self._bitmaps
            & ((rows[..., NUMEL] != 1) | (rows[..., DTYPE] != DTYPES.index(torch.float32))),
            ValueError,
            "has shape {it.shape} and dtype {it.dtype}: it must be one float32 number",
        )

    def _stage(self, rows: NDArray[np.int64], lists: tuple[Any, ...]) -> tuple[NDArray[np.int64], list[Staged]]:
        """Lets copies stand in for tensors whose elements lie unlike those of their tensor's first role."""
        present = rows[..., DEVICE] != ABSENT
        layouts = np.where(present, rows[..., LAYOUT], rows[:, :1, LAYOUT])[:, self._arrays]
        odd = (layouts == NOT_DENSE).any(axis=1) | (layouts != layouts[:, :1]).any(axis=1)
        staged = []
        for index in np.flatnonzero(odd & present[:, 0]).tolist():
            like = torch.empty_like(lists[0][index], memory_format=torch.preserve_format)
            for role in self._arrays:
                in_place = rows[index, role, LAYOUT] == rows[index, 0, LAYOUT] != NOT_DENSE
                if in_place or not present[index, role]:
                    continue
                tensor = lists[role][index]
                if self.op.roles[role] in self.op.writes and _shares_elements(tensor):
                    raise ValueError(
                        f"{self.op.arguments[role]}[{index}] has elements that share memory (an expanded tensor): "
                        "give it memory of its own with .clone()"
                    )
                copy = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
                staged.append(Staged(role, index, copy))
                rows[index, role, ADDRESS] = copy.data_ptr()
        return rows, staged

    def _check_overlap(self, lists: tuple[Any, ...]) -> None:
        """Refuses a tensor that is written and shares memory with another tensor or role."""
        core = _native()
        if core is not None and not core.may_overlap(self._snapshot, self._written):
            return
        rows = self._snapshot
        start = rows[..., ADDRESS]
        size = rows[..., NUMEL] * ITEM_SIZES[rows[..., DTYPE]]
        written = np.array(self._written)
        holes = rows[..., LAYOUT] == NOT_DENSE
        for index, role in np.argwhere(holes).tolist():
            size[index, role] = _reach(lists[role][index])
        # Elements are read before they are written, so a role that is only read may be the tensor's first role itself.
        itself = (rows[:, 1:, [ADDRESS, DTYPE]] == rows[:, :1, [ADDRESS, DTYPE]]).all(axis=-1)
        size[:, 1:][itself & ~written[1:]] = 0
        start, size = start.ravel(), size.ravel()
        order = np.argsort(start, kind="stable")
        order = order[size[order] > 0]
        reach = np.maximum.accumulate(start[order] + size[order])
        if not (start[order[1:]] < reach[:-1]).any():
            return
        columns = len(self.op.roles)
        before: list[int] = []
        for here in order.tolist():
            before = [other for other in before if start[other] + size[other] > start[here]]
            for other in before:
                if not (written[here % columns] or written[other % columns]):
                    continue
                if not holes.flat[[here, other]].any() or _share_elements(
                    *(lists[i % columns][i // columns] for i in (here, other))
                ):
                    names = [f"{self.op.arguments[i % columns]}[{i // columns}]" for i in (other, here)]
                    raise ValueError(f"{names[0]} and {names[1]} share memory: give each its own, or list it once")
            before.append(here)


def _device(code: int) -> torch.device:
    kind = DEVICE_TYPES[code >> 16]
    return torch.device(kind) if kind == "cpu" else torch.device(kind, code & 0xFFFF)


def _shares_elements(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _share_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors meet, or one only lies in the holes of the other."""
    arrays = [
        np.asarray(
            SimpleNamespace(  # no element is looked at, so this serves device memory too
                __array_interface__={
                    "version": 3,
                    "data": (tensor.data_ptr(), True),
                    "shape": tuple(tensor.shape),
                    "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
                    "typestr": f"|V{tensor.element_size()}",
                }
            )
        )
        for tensor in (one, other)
    ]
    return bool(np.shares_memory(arrays[0], arrays[1]))


@functools.cache
def _native() -> Any:
    """The C++ core, which reads tables faster, if it is there."""
    try:
        return importlib.import_module("ltsam_fast._cpu")
    except ImportError:
        return None


Reader = Callable[[tuple[Any, ...], "NDArray[np.int64]", tuple[bool, ...], "NDArray[np.int64] | None"], int]
_READER: Reader | None = None


def _reader() -> Reader:
    """What fills a snapshot: native code where torch publishes DLPack's exchange table, else Python."""
    global _READER
    if _READER is None:
        _READER = read_in_python
        api, native = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), _native()
        if api is not None and native is not None and native.can_snapshot(api):
            _READER = functools.partial(native.snapshot, api)
    return _READER


def read_in_python(
    lists: tuple[Any, ...], out: NDArray[np.int64], written: tuple[bool, ...] = (), pointers: Any = None
) -> int:
    """Fills ``out`` (T, R, COLUMNS) and says what differs from what was there: SAME, MOVED or CHANGED."""
    fresh = np.zeros_like(out)
    fresh[..., DEVICE] = ABSENT
    for role, tensors in enumerate(lists):
        for index, tensor in enumerate(tensors or ()):
            if tensor is not None:
                fresh[index, role] = _describe(tensor)
    differs = fresh != out
    out[...] = fresh
    return CHANGED if differs[..., NUMEL:].any() else MOVED if differs.any() else SAME


def _code(dtype: torch.dtype) -> int:
    return BITMAP if dtype == torch.uint8 else DTYPES.index(dtype) if dtype in DTYPES else -1


def _describe(tensor: torch.Tensor) -> tuple[int, ...]:
    kind = {name: number for number, name in DEVICE_TYPES.items()}[tensor.device.type]
    layout = CONTIGUOUS
    if not tensor.is_contiguous():
        reach = 1
        dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
        for stride, size in sorted(dims):
            reach = reach * size if stride == reach else 0
        layout = hash(tuple(dims)) | 2 if reach == tensor.numel() else NOT_DENSE
    return (
        tensor.data_ptr(),
        tensor.numel(),
        _code(tensor.dtype),
        kind << 16 | (tensor.device.index or 0),
        hash(tuple(tensor.shape)),
        layout,
    )
