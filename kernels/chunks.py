"""Walking a table of addresses on the device: one program a chunk, one launch for each set of element types.

The host's side is :func:`launch`; the device's are :func:`item`, :func:`load` and :func:`store`. Element types and which
roles are there are compile-time constants of a launch, so tensors are grouped by them.
"""

import functools
import inspect
import itertools
import threading

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ltsam_fast.launch_args import CHUNK
from ltsam_fast.ops import dispatch

BLOCK = 2048  # with 8 warps two 16-byte accesses of a role in fp32 for each thread
TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16, tl.uint8)  # launch_args.DTYPES, and maps of bits
BITMAP = 4


@triton.jit
def item(items):
    """This program's chunk: tensor, first element, end of whole aligned blocks, end, hyperparameters' row, slot, number."""
    at = items + tl.program_id(0).to(tl.int64) * 7
    begin, whole, end = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return tl.load(at), begin, whole, end, tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


def launched(function):
    """Decorates a kernel that the host launches, which is compiled once for all values of its arguments.

    Triton would compile anew for an address that is no multiple of 16, which arguments of captured steps may have, and what is
    compiled during a capture ends it. Tensors' addresses are read from memory, so nothing is lost.
    """
    values = [one.name for one in inspect.signature(function).parameters.values() if one.annotation is not tl.constexpr]
    kernel = triton.jit(do_not_specialize=values)(function)
    return _OneByOne(kernel) if isinstance(kernel, InterpretedFunction) else kernel


class _OneByOne:
    """A kernel in Triton's interpreter, which patches its language and knows one place in one grid: one thread at a time."""

    _LOCK = threading.Lock()

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **constants):
            with self._LOCK:
                self._kernel[grid](*args, **constants)

        return run


@triton.jit
def pointer_to(address, TYPE: tl.constexpr):
    """A kernel's argument as a pointer: the interpreter gives small integers, low addresses too, 32 bits."""
    return address.to(tl.int64).to(tl.pointer_type(TYPE))


@triton.jit
def note(scratch, slot, call):
    """Notes in a chunk's cell of the scratch memory that this call has come to it."""
    tl.store(pointer_to(scratch, tl.int64) + slot, call)


@triton.jit
def load(address, first, end, TYPE: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from ``first`` on, as stored; zeros from ``end`` on and, in A, for an absent role (TYPE None).

    WIDE promises a whole block at a multiple of 16 bytes: then accesses are 16 bytes wide, else single elements.
    """
    if TYPE is None:
        value = tl.zeros([BLOCK], A)
    else:
        pointer = pointer_to(address, TYPE) + first
        lanes = tl.arange(0, BLOCK)
        if WIDE:
            value = tl.load(tl.multiple_of(pointer, 16) + lanes)
        else:
            value = tl.load(pointer + lanes, mask=lanes < end - first, other=0.0)
    return value


@triton.jit
def load_bits(address, first, end, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of BLOCK elements from ``first`` on, lowest first; zeros for an absent role and from ``end`` on."""
    if TYPE is None:
        bits = tl.zeros([BLOCK], tl.int32)
    else:
        at = first + tl.arange(0, BLOCK)
        byte = tl.load(pointer_to(address, tl.uint8) + at // 8, mask=at < end, other=0)
        bits = (byte.to(tl.int32) >> (at % 8).to(tl.int32)) & 1
    return bits


@triton.jit
def narrow(value, TYPE: tl.constexpr):
    """A value as it is stored: of another type it is rounded to nearest even, of this one it keeps its bits."""
    if TYPE is None:
        narrowed = value
    elif value.dtype == TYPE:
        narrowed = value
    elif TYPE == tl.bfloat16:  # by hand, because Triton's own cast does not round to even in the interpreter
        number = value.to(tl.float32)
        u = number.to(tl.uint32, bitcast=True)
        rounded = tl.where(number == number, (u + 0x7FFF + ((u >> 16) & 1)) >> 16, 0x7FC0)
        narrowed = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = value.to(TYPE)
    return narrowed


@triton.jit
def store(address, first, end, value, TYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Stores what :func:`load` would load; nothing for an absent role."""
    if TYPE is not None:
        pointer = pointer_to(address, TYPE) + first
        lanes = tl.arange(0, BLOCK)
        if WIDE:
            tl.store(tl.multiple_of(pointer, 16) + lanes, narrow(value, TYPE))
        else:
            tl.store(pointer + lanes, narrow(value, TYPE), mask=lanes < end - first)


@triton.jit
def number(address, otherwise, TYPE: tl.constexpr):
    """The number at an address, or another where there is none."""
    address = address.to(tl.int64)  # the interpreter gives small integers 32 bits
    return tl.load(pointer_to(address, TYPE), mask=address != 0, other=otherwise)


@triton.jit
def coefficient(combination, index: tl.constexpr, otherwise, A: tl.constexpr):
    """A coefficient of a combination, or another number where there is none."""
    address = combination.to(tl.int64)
    return tl.load(pointer_to(address, A) + index, mask=address != 0, other=otherwise)


@triton.jit
def inverse_scale(grad_scale, A: tl.constexpr):
    """1 / grad_scale, or 1 without one."""
    return divide(1.0, number(grad_scale, 1.0, tl.float32).to(A))


@triton.jit
def skipped(found_inf):
    """Whether found_inf says that the update is to be skipped."""
    return number(found_inf, 0.0, tl.float32) != 0.0


@triton.jit
def finite(x):
    """Inf - inf and NaN - NaN are NaN."""
    return x - x == 0


@triton.jit
def divide(x, y):
    """X / y, correctly rounded: of itself Triton only does so in fp64."""
    if y.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def sqrt(x):
    """The root, correctly rounded: of itself Triton only does so in fp64."""
    if x.dtype == tl.float32:
        root = tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


def accumulator(args):
    """The Triton type that sums are kept in."""
    return tl.float64 if args.wide else tl.float32


def on_device(args, name, make, key=None):
    """The array that ``make`` returns, on the device of ``args``: uploaded when a tensor has moved or ``key`` changed.

    While a step is traced nothing is kept: each launch in a graph reads memory of its own, which nobody else lets go of.
    """
    if (tracer := dispatch.tracer.get()) is not None:
        return _upload(args, tracer.place(np.array(make(), order="C")))
    kept = args.cache.get(name)
    if kept is None or kept[0] != key:
        kept = args.cache[name] = (key, _upload(args, np.array(make(), order="C")))
    return kept[1]


def _upload(args, array):
    """An array, which must be nobody else's to change: it may be copied later. A tensor is there already."""
    if isinstance(array, torch.Tensor):
        return array
    host = torch.from_numpy(array)
    return host.pin_memory().to(args.device, non_blocking=True) if args.device.type == "cuda" else host


def _launches(args, array_roles):
    """For each set of element types, with None for absent roles, the chunks with these: rows as :func:`item` reads them."""
    addresses = args.pointers[:, :array_roles]
    kinds = np.where(addresses != 0, args.dtypes[:, :array_roles].astype(np.int64), -1)
    tensor = np.repeat(np.arange(len(addresses)), np.diff(args.first_chunk))
    slot = np.arange(len(tensor))
    begin = (slot - args.first_chunk[tensor]) * CHUNK
    end = np.minimum(begin + CHUNK, args.numels[tensor])
    aligned = ((addresses % 16 == 0) | (kinds == BITMAP)).all(axis=1)[tensor]
    whole = np.where(aligned, end - end % BLOCK, begin)
    columns = [tensor, begin, whole, end, args.groups[tensor], slot, args.numbers[tensor]]
    items = np.stack(columns, axis=1).astype(np.int64)
    _, first, kind = np.unique((kinds + 1) @ 6 ** np.arange(array_roles), return_index=True, return_inverse=True)
    for index, like in enumerate(first):
        chosen = items[kind[tensor] == index]
        if len(chosen):
            yield tuple(TYPES[code] if code >= 0 else None for code in kinds[like]), chosen


_CALLS = itertools.count(1)


def launch_map(kernel, args, signals, array_roles, **constants):
    """As :func:`launch`, for kernels that write tensors and :func:`note` how far they have come."""
    call = next(_CALLS)
    args.launched = functools.partial(_written, args, call)
    launch(kernel, args, (*signals, args.scratch + 8, call), array_roles, **constants)


def _written(args, call):
    """Which tensors a call has written, by the notes in the scratch memory. Tensors without elements have none."""
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)
    reached = np.append(args.scratch_memory[1:].view(torch.int64).cpu().numpy() == call, False)
    return reached[args.first_chunk[:-1]] & (args.numels > 0)


def launch(kernel, args, signals, array_roles, **constants):
    """Runs ``kernel`` over all chunks, once for each set of element types."""
    if args.device.type == "cuda" and dispatch.tracer.get() is None and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend must not be 'triton' in a CUDA graph of your own, which would read tables that are gone: "
            "use lf.graph_step(), or backend 'cuda'"
        )
    if "launches" not in args.cache:
        args.cache["launches"] = list(_launches(args, array_roles))
    pointers = on_device(args, "pointers", lambda: args.pointers)
    rows = args.hyper
    if not isinstance(rows, torch.Tensor):
        rows = on_device(args, "hyper", lambda: args.hyper if args.hyper.size else np.zeros((1, 1)), rows.tobytes())
    for number, (types, chosen) in enumerate(args.cache["launches"]):
        items = on_device(args, f"items {number}", lambda chosen=chosen: chosen)
        kernel[(len(items),)](
            items,
            pointers,
            rows,
            *signals,
            TYPES=types,
            A=accumulator(args),
            BLOCK=BLOCK,
            **constants,
            num_warps=8,
            enable_fp_fusion=False,
        )
