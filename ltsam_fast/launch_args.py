"""What dispatch hands to a backend: an op's description, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 16384
"""Elements per chunk: the unit of work and of the fixed summation order; ``lt::kChunk`` in csrc."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMBER_BITS = 24  # of a tensor's number; the bits above say where its random numbers begin

Role = Sequence[torch.Tensor | None] | None


class Op(NamedTuple):
    """What Python must know of an op on lists of tensors. The same facts stand in its functor, and a test compares the two."""

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
    """The one argument of a backend's op: tensors that share a device and an accumulator, T by R roles.

    What a table knows of them:

    * ``op``, ``device``; ``wide``: accumulate in fp64; ``accumulator``: the dtype of sums and norms.
    * ``pointers`` int64 (T, R), 0 where absent; ``dtypes`` uint8 (T, R), indices of :data:`DTYPES`; ``numels`` int64 (T,).
    * ``groups`` int32 (T,), rows of the hyperparameters; ``buckets`` int32 (T,), nondecreasing, outputs of a reduction,
      ``bucket_count`` of them.
    * ``numbers`` int64 (T,): positions in the caller's lists, from bit 24 on a quarter of the element number that a shard
      begins at.
    * ``first_chunk`` int64 (T + 1,); ``scratch``: address of ``scratch_memory``, 1 + chunks * sums zeroed doubles.
    * ``cache``: a dict for what a backend derives, emptied when a tensor moved.

    What belongs to the present call:

    * ``lists``: a list of tensors, or ``None``, for each role; those of this part are at ``positions``.
    * ``hyper``: rows of hyperparameters, float64 (groups, columns): on the host, or a tensor on the device.
    * ``signals``: small tensors on the device, by name; ``addresses``: theirs, 0 where absent, in the order of ``lt::Signals``.
    * ``stream_or_threads``: a CUDA stream, or the number of threads on the CPU.
    * ``launched``: set by the backend, see :class:`ltsam_fast.backend.Backend`.
    """

    def __init__(
        self,
        op: Op,
        pointers: NDArray[np.int64],
        dtypes: NDArray[np.int64],
        numels: NDArray[np.int64],
        groups: NDArray[np.int32],
        numbers: NDArray[np.int64],
        buckets: NDArray[np.int32],
        bucket_count: int,
        device: torch.device,
        wide: bool,
    ) -> None:
        self.op = op
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
        self.accumulator = torch.float64 if wide else torch.float32
        self.cache: dict[Any, Any] = {}
        # The first cell counts finished CUDA blocks and must start at zero; then a cell for each chunk and sum.
        cells = 1 + int(self.first_chunk[-1]) * op.sums
        self.scratch_memory = torch.zeros(cells, dtype=torch.float64, device=device)
        self.scratch = self.scratch_memory.data_ptr()

        self.lists: tuple[Any, ...] = ()
        self.hyper: Any = None
        self.signals: dict[str, torch.Tensor] = {}
        self.addresses: tuple[int, ...] = ()
        self.stream_or_threads = 0
        self.launched: bool | Callable[[], NDArray[np.bool_]] = False

    @property
    def positions(self) -> list[int]:
        """Position of each tensor in the caller's lists."""
        return (self.numbers & ((1 << NUMBER_BITS) - 1)).tolist()

    def tensors(self, role: int) -> list[torch.Tensor | None] | None:
        """This part's tensors of a role, for backends that take no addresses."""
        given = self.lists[role]
        return None if given is None else [given[position] for position in self.positions]


class RowArgs:
    """The one argument of a backend's ``cross_entropy``: contiguous tensors on one device, by the names of :data:`TENSORS`.

    Absent ones are ``None`` or left out. With ``losses`` these are filled, and ``state`` if given; else ``state`` is read. With
    ``grad_0`` (and ``grad_1``) the gradients that belong to the cotangents are filled. Vectors are of the accumulator's dtype.
    """

    TENSORS = (
        "logits", "targets", "scale", "shift", "margin", "spread", "draw", "weight", "weight_sum", "losses", "state",
        "cotangent_0", "cotangent_1", "grad_0", "grad_1",
    )  # fmt: skip
    """In the order of ``lt::Rows``."""

    def __init__(self, numbers: Numbers, tensors: dict[str, torch.Tensor | None]) -> None:
        self.numbers = numbers
        self.tensors = tensors = {name: None if one is None else aligned(one) for name, one in tensors.items()}
        logits = tensors["logits"]
        assert logits is not None
        self.device = logits.device
        self.rows, self.classes = logits.shape
        self.dtype = DTYPES.index(logits.dtype)
        self.addresses = tuple(0 if (one := tensors.get(name)) is None else one.data_ptr() for name in self.TENSORS)
        """Address of each tensor, 0 where absent."""
        self.stream_or_threads = stream_or_threads(self.device)


class Numbers(NamedTuple):
    """Numbers of a cross entropy, in the order of native code."""

    label_smoothing: float = 0.0
    gamma: float = 0.0
    detach: bool = False
    seed: int = 0
    by_label: bool = False
    """Cotangents are weights of the classes, to be divided by the number of rows; else one for each row."""

    def floats(self) -> list[float]:
        """What an operator of torch takes."""
        return [float(number) for number in self[:4]]

    @classmethod
    def from_floats(cls, floats: Sequence[float]) -> Numbers:
        """The numbers that an operator of torch got."""
        smoothing, gamma, detach, seed = floats
        return cls(smoothing, gamma, bool(detach), int(seed))

    def of_reference(self) -> dict[str, Any]:
        """Arguments of the reference implementation."""
        return {name: number for name, number in self._asdict().items() if name != "by_label"}


def stream_or_threads(device: torch.device) -> int:
    """The current CUDA stream of a device; on the CPU the number of threads."""
    if device.type != "cuda":
        return torch.get_num_threads()
    return int(torch.cuda.current_stream(device).cuda_stream)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that begins at a multiple of its elements' size: a copy, where ``torch.frombuffer`` gave one that does not."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that a tensor's elements are summed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def version(tensor: torch.Tensor) -> int:
    """How often torch has written a tensor; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
