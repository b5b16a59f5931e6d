"""Walking a table of addresses on the device: one program a chunk, one launch for each set of element types.

The host's side is :func:`launch`; the device's are :func:`load` and :func:`store`. Element types and which roles are there
are compile-time constants of a launch, so tensors are grouped by them.
"""

import numpy as np
import torch
import triton
import triton.language as tl

CHUNK = 16384  # ltsam_fast.table.CHUNK
BLOCK = 2048  # with 8 warps two 16-byte accesses of a role in fp32 for each thread
TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)  # ltsam_fast.table.DTYPES
SIZES = np.array([4, 8, 2, 2])


@triton.jit
def item(items):
    """This program's chunk: row of its tensor's addresses, first element, elements, hyperparameters' row, wide, slot."""
    at = items + tl.program_id(0).to(tl.int64) * 6
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def load(address, first, count, TYPE: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from ``first`` on, widened to A; zeros for an absent role (TYPE None) and past ``count``.

    WIDE promises 16-byte alignment and a whole block: then accesses are 16 bytes wide, else single elements.
    """
    lanes = tl.arange(0, BLOCK)
    if TYPE is None:
        value = tl.zeros([BLOCK], A)
    else:
        pointer = address.to(tl.pointer_type(TYPE)) + first
        if WIDE:
            value = tl.load(tl.multiple_of(pointer, 16) + lanes).to(A)
        else:
            value = tl.load(pointer + lanes, mask=lanes < count, other=0.0).to(A)
    return value


@triton.jit
def bf16_bits(value):
    """A float as bfloat16's bits, rounded to nearest even: Triton's own cast truncates in the interpreter."""
    u = value.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def store(address, first, count, value, TYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Stores what :func:`load` would load; nothing for an absent role."""
    lanes = tl.arange(0, BLOCK)
    if TYPE is not None:
        if TYPE == tl.bfloat16:
            pointer = address.to(tl.pointer_type(tl.uint16)) + first
            narrow = bf16_bits(value)
        else:
            pointer = address.to(tl.pointer_type(TYPE)) + first
            narrow = value.to(TYPE)
        if WIDE:
            tl.store(tl.multiple_of(pointer, 16) + lanes, narrow)
        else:
            tl.store(pointer + lanes, narrow, mask=lanes < count)


@triton.jit
def inverse_scale(signals, A: tl.constexpr):
    """1 / grad_scale, or 1 without one. ``signals`` holds the addresses of norm, grad_scale, found_inf and scratch."""
    address = tl.load(signals + 1)
    scale = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=1.0)
    return 1.0 / scale.to(A)


@triton.jit
def skipped(signals):
    """Whether found_inf says that the update is to be skipped."""
    address = tl.load(signals + 2)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0) != 0.0


@triton.jit
def norm_of(signals, A: tl.constexpr):
    """The norm, or 0 without one."""
    address = tl.load(signals)
    return tl.load(address.to(tl.pointer_type(A)), mask=address != 0, other=0.0)


@triton.jit
def finite(x):
    """Inf - inf and NaN - NaN are NaN."""
    return x - x == 0


def accumulator(part):
    """The Triton type that sums are kept in."""
    return tl.float64 if part.wide else tl.float32


def on_device(part, key, make):
    """An array on the part's device, uploaded once for each ``key`` until a tensor moves."""
    if key not in part.cache:
        host = torch.from_numpy(np.ascontiguousarray(make()))
        part.cache[key] = host.pin_memory().to(part.device, non_blocking=True) if part.device.type == "cuda" else host
    return part.cache[key]


def signals_on_device(part, signals):
    """The addresses of norm, grad_scale, found_inf and the part's scratch."""
    return on_device(part, ("signals", signals), lambda: np.array([*signals, part.scratch], np.int64))


def _groups(part, array_roles):
    """For each set of tensors with the same types: those types, with None for absent roles, and the tensors' indices."""
    present = part.pointers[:, :array_roles] != 0
    types = np.where(present, part.dtypes[:, :array_roles].astype(np.int64), -1)
    for kind in np.unique(types[part.numels > 0], axis=0):
        yield (
            tuple(TYPES[code] if code >= 0 else None for code in kind),
            np.flatnonzero((types == kind).all(axis=1) & (part.numels > 0)),
        )


def _items(part, tensors, array_roles):
    """One row a chunk, as :func:`item` reads it."""
    chunks = np.diff(part.first_chunk)[tensors]
    owner = np.repeat(tensors, chunks)
    slot = np.concatenate([np.arange(part.first_chunk[t], part.first_chunk[t + 1]) for t in tensors])
    begin = (slot - part.first_chunk[owner]) * CHUNK
    count = np.minimum(CHUNK, part.numels[owner] - begin)
    aligned = (part.pointers[:, :array_roles] % 16 == 0).all(axis=1)
    wide = aligned[owner] & (count % BLOCK == 0)
    return np.stack([owner, begin, count, part.groups[owner], wide, slot], axis=1).astype(np.int64)


def launch(kernel, part, hyper, signals, array_roles):
    """Runs ``kernel`` over all chunks, once for each set of element types."""
    if "groups" not in part.cache:
        part.cache["groups"] = list(_groups(part, array_roles))
    pointers = on_device(part, "pointers", lambda: part.pointers)
    rows = on_device(part, ("hyper", hyper.tobytes()), lambda: hyper if hyper.size else np.zeros((1, 1)))
    for index, (types, tensors) in enumerate(part.cache["groups"]):
        items = on_device(part, ("items", index), lambda tensors=tensors: _items(part, tensors, array_roles))
        kernel[(len(items),)](
            items,
            pointers,
            rows,
            signals_on_device(part, signals),
            TYPES=types,
            A=accumulator(part),
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
