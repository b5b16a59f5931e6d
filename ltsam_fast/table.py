"""Tables of tensors: checked before any address is taken.

A :class:`TensorTable` belongs to one op. Each call reads address, size, dtype, device and layout of every tensor afresh, so a
tensor that moved can never leave a stale address behind; what follows from them is kept for as long as nothing changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ltsam_fast.launch_args import DTYPES, NUMBER_BITS, LaunchArgs, Op, Role, version
from ltsam_fast.overlap import elements_share_memory, find_meeting, find_overlap
from ltsam_fast.snapshot import (
    ABSENT,
    ADDRESS,
    BITMAP,
    COLUMNS,
    CONTIGUOUS,
    DEVICE,
    DEVICE_TYPES,
    DTYPE,
    LAYOUT,
    NEVER_READ,
    NOT_DENSE,
    NUMEL,
    REFRESHED,
    SAME,
    SHAPE,
    ReadOnce,
    device_of,
    reader,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LISTS = (list, ReadOnce, NoneType)
_WIDE = DTYPES.index(torch.float64)
_KEPT = 64


class Staged(NamedTuple):
    """A copy that stands in for a tensor during a pass. ``copy`` is a view of ``memory``, which the pass takes."""

    role: int
    row: int
    copy: torch.Tensor
    memory: torch.Tensor


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a sparse tensor."""
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({tensor.layout}): only dense tensors are supported, e.g. build nn.Embedding with sparse=False"
        )


class TensorTable:
    """The tensors of one op, T by R roles, as parts that native code can take.

    Args:
        op: The op.
        exact: Refuse backups of other dtypes than their weights'.
    """

    def __init__(self, op: Op, exact: bool = False) -> None:
        self.op = op
        self.parts: list[LaunchArgs] = []
        # A step is one number, masks have a bit for each element.
        self._arrays = [index for index, role in enumerate(op.roles) if role not in ("step", "mask")]
        self._written = tuple(role in op.writes for role in op.roles)
        self._target = self._written.index(True) if op.writes else 0
        self._exact = np.array([exact and role == "backup" for role in op.roles])
        self._bitmaps = np.array([role == "mask" for role in op.roles])
        self._snapshot = np.empty((0, len(op.roles), COLUMNS), np.int64)
        self._valid_for: tuple[Any, ...] | None = None
        self._lists: tuple[Any, ...] = ()
        self.staged: list[Staged] = []
        """Tensors with stand-ins, after whose call :meth:`finish` is to be called."""
        self.calls = 0
        """Calls that have begun."""
        self.apart: set[tuple[int, ...]] = set()
        """Addresses of signals that share no memory with what is written, as long as no tensor moves."""
        self._reader = reader()
        self._finished = False
        self._unfinished: list[tuple[int, torch.Tensor, int]] = []  # row, tensor and its version, before it is written

    def bind(
        self,
        roles: tuple[Role, ...],
        groups: Sequence[int] | None = None,
        buckets: Sequence[int] | None = None,
        bucket_count: int = 1,
        offsets: Sequence[int] | None = None,
        rows: int = 1,
    ) -> list[LaunchArgs]:
        """Checks the tensors and returns the parts to launch on.

        Args:
            roles: One list of T tensors per role; ``None`` for a role, or an entry, that is absent (it reads as zeros).
            groups: Row of the hyperparameters of each tensor; ``None``: row 0.
            buckets: Output index of each tensor in a reduction, nondecreasing; ``None``: 0.
            bucket_count: Number of outputs of a reduction.
            offsets: For random numbers, the element that each tensor begins at; ``None``: 0.
            rows: Rows of hyperparameters.

        Raises:
            TypeError: An entry is no tensor, or its dtype is not one of :data:`DTYPES`.
            ValueError: Lengths, shapes or devices differ; a tensor is sparse or on an unsupported device; a tensor that is
                written shares memory with another; a group has no row. Nothing was changed then.
        """
        self._finished, self._unfinished = False, []
        for part in self.parts:
            part.launched = False
        self.calls += 1
        lists: tuple[Any, ...] = tuple([role if type(role) in _LISTS else list(role) for role in roles])  # type: ignore[arg-type]
        count = len(lists[0] or ())
        # Copies, for callers may change their lists in place.
        asked_for = (
            groups if groups is None else list(groups),
            buckets if buckets is None else list(buckets),
            offsets if offsets is None else list(offsets),
            bucket_count,
            rows,
            [None if role is None else len(role) for role in lists],
        )
        still_valid = asked_for == self._valid_for
        if not still_valid:
            self._check_lengths(lists, count)
            from ltsam_fast.ops.checks import check_groups  # which, by way of its package, imports this module

            check_groups(groups, count, rows)
        renewable = still_valid and not self.staged and len(self.parts) == 1
        self._valid_for = None  # until all is done: an interrupt may come after any line
        try:
            change = self._reader(lists, self._snapshot, self._written, self.parts[0].pointers if renewable else None)
        except Exception:
            self._snapshot[...] = NEVER_READ
            self._explain(lists)
            raise
        if change != SAME or not still_valid:
            self.apart.clear()
        if change == REFRESHED:
            self.parts[0].cache.clear()
        elif change != SAME or not still_valid:
            self._rebuild(lists, groups if rows > 1 else None, buckets, offsets, bucket_count)
        self._valid_for = asked_for
        if self.staged:
            self._lists = lists
            lists = tuple(role and list(role) for role in lists)
            for staged in self.staged:
                if self.op.roles[staged.role] in self.op.reads:
                    staged.copy.copy_(lists[staged.role][staged.row].detach())
                lists[staged.role][staged.row] = staged.memory
        for part in self.parts:
            part.lists = lists
        return self.parts

    def check_apart(self, signals: dict[str, torch.Tensor], addresses: tuple[int, ...]) -> None:
        """Raises ValueError if a signal shares memory with a tensor and one of the two is written; ``addresses``: of all."""
        written = self._written
        if not self.op.writes:  # a reduction, which reads all of its tensors
            written = (True,) * len(written)
            signals = {name: signal for name, signal in signals.items() if name == "found_inf"}
        lists = self._lists if self.staged else self.parts[0].lists
        if found := find_meeting(self._snapshot, lists, written, signals):
            name, (role, index) = found
            other = f"{self.op.arguments[role]}[{index}]"
            raise ValueError(f"{name} and {other} share memory: give {name} its own with .clone()")
        if len(self.apart) >= _KEPT:
            self.apart.clear()
        self.apart.add(addresses)

    def finish(self) -> None:
        """Ends a call that used stand-ins: copies what was computed on them into the tensors they stand in for."""
        pairs = [(one, self._lists[one.role][one.row]) for one in self.staged if self._written[one.role]]
        if pairs:
            self._unfinished = [(one.row, tensor, version(tensor)) for one, tensor in pairs if one.role == self._target]
            # In one call, so that an interrupt finds either nothing written or everything.
            torch._foreach_copy_([tensor.detach() for _, tensor in pairs], [one.copy for one, _ in pairs])
        self._finished = True
        self._lists = ()

    def launched(self) -> list[int]:
        """Says how far the latest call had come when an interrupt (``KeyboardInterrupt``) or an error ended it.

        Returns:
            Positions, in the caller's lists, of the tensors that were written, weights above all; what else the call writes
            for them, backups above all, is complete. Empty when the call had not come that far. Right until
            something else writes these tensors.
        """
        pending: set[int] = set()
        if not self._finished:
            pending = {one.row for one in self.staged if self._written[one.role]}
            pending -= {row for row, tensor, before in self._unfinished if version(tensor) != before}
        found: list[int] = []
        for part in self.parts:
            rows = part.launched() if callable(part.launched) else np.full(len(part.numels), part.launched)
            found += [position for position, row in zip(part.positions, rows, strict=True) if row]
        return sorted(set(found) - pending)

    def _check_lengths(self, lists: tuple[Any, ...], count: int) -> None:
        for argument, role in zip(self.op.arguments, lists, strict=True):
            if role is not None and len(role) != count:
                raise ValueError(
                    f"{argument} has {len(role)} entries, but {self.op.arguments[0]} has {count}: give one per tensor"
                )
        if len(self._snapshot) != count:
            self._snapshot = np.full((count, len(lists), COLUMNS), NEVER_READ, np.int64)

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
        if found := find_overlap(self._snapshot, lists, self._written):
            names = [f"{self.op.arguments[role]}[{index}]" for role, index in found]
            raise ValueError(f"{names[0]} and {names[1]} share memory: give each its own, or list it once")
        rows, self.staged = self._stage(self._snapshot.copy(), lists, offsets)
        count = len(rows)
        group_of = np.zeros(count, np.int32) if groups is None else np.asarray(groups, np.int32)
        bucket_of = np.zeros(count, np.int32) if buckets is None else np.asarray(buckets, np.int32)
        numbers = np.arange(count) + (0 if offsets is None else np.asarray(offsets, np.int64) // 4 << NUMBER_BITS)
        present = rows[:, self._arrays, DEVICE] != ABSENT
        wide = ((rows[:, self._arrays, DTYPE] == _WIDE) & present).any(axis=1)
        device = rows[:, 0, DEVICE]
        self.parts = [
            LaunchArgs(
                self.op,
                rows[chosen, :, ADDRESS],
                rows[chosen, :, DTYPE],
                rows[chosen, 0, NUMEL],
                group_of[chosen],
                numbers[chosen],
                bucket_of[chosen],
                bucket_count,
                device_of(code),
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
        check(
            paired & self._exact & (rows[..., DTYPE] != rows[:, :1, DTYPE]),
            ValueError,
            "has dtype {it.dtype}, but {other} has {base.dtype}: it would not keep them exactly",
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
            & (
                (rows[..., NUMEL] != 1)
                | (rows[..., DTYPE] != DTYPES.index(torch.float32))
                | (rows[..., LAYOUT] == NOT_DENSE)
            ),
            ValueError,
            "has shape {it.shape} and dtype {it.dtype}: it must be one float32 number, at a multiple of four bytes",
        )

    def _stage(
        self, rows: NDArray[np.int64], lists: tuple[Any, ...], offsets: Sequence[int] | None
    ) -> tuple[NDArray[np.int64], list[Staged]]:
        """Lets copies stand in for tensors that a pass cannot take as they are.

        These are tensors whose elements lie unlike those of their row's first role, and shards whose random numbers begin in
        the middle of a group of four: their copies begin up to three elements earlier.
        """
        present = rows[..., DEVICE] != ABSENT
        layouts = np.where(present, rows[..., LAYOUT], rows[:, :1, LAYOUT])[:, self._arrays]
        leads = np.zeros(len(rows), np.int64) if offsets is None else np.asarray(offsets, np.int64) % 4
        odd = (layouts == NOT_DENSE).any(axis=1) | (layouts != layouts[:, :1]).any(axis=1) | (leads > 0)
        staged = []
        for index in np.flatnonzero(odd & present[:, 0]).tolist():
            lead = int(leads[index])
            first = rows[index, 0, LAYOUT]
            unlike = (rows[index, :, LAYOUT] != first) | (first == NOT_DENSE) | (lead > 0)
            chosen = {role for role in self._arrays if present[index, role] and unlike[role]}
            if any(self._written[role] for role in chosen):  # finish() writes all that a row's pass writes at once
                chosen |= {role for role in range(len(lists)) if present[index, role] and self._written[role]}
            like = torch.empty_like(lists[0][index], memory_format=torch.preserve_format)
            for role in sorted(chosen):
                tensor = lists[role][index]
                if self._written[role] and elements_share_memory(tensor):
                    raise ValueError(
                        f"{self.op.arguments[role]}[{index}] has elements that share memory (as of an expanded tensor): "
                        "give it memory of its own with .clone()"
                    )
                if role not in self._arrays:
                    copy = memory = torch.empty_like(tensor)
                elif lead:
                    memory = tensor.new_zeros(lead + tensor.numel())
                    copy = memory[lead:].view(tensor.shape)
                else:
                    copy = memory = torch.empty_strided(
                        like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device
                    )
                staged.append(Staged(role, index, copy, memory))
                rows[index, role, ADDRESS] = memory.data_ptr()
            rows[index, :, NUMEL] += lead
        return rows, staged
