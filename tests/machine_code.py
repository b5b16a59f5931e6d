"""What nvcc makes of the CUDA core. ``python -m tests.machine_code`` writes docs/guides/machine_code.md anew."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .on_host import HEADERS, INCLUDES, ROOT, made

ARCHS = ("80", "90", "100")
PAGE = ROOT / "docs/guides/machine_code.md"
THREADS = 256
SHARED = {"80": 164, "90": 228, "100": 228}
"""KiB of a multiprocessor's shared memory; 64 warps and 65,536 registers are the same for all of these."""
NVCC = shutil.which("nvcc")
_TRITON = importlib.util.find_spec("triton")
_IN_TRITON = _TRITON and Path(_TRITON.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
CUOBJDUMP = shutil.which("cuobjdump") or (_IN_TRITON and _IN_TRITON.exists() and str(_IN_TRITON)) or None
TEXT = """# What nvcc makes of the CUDA kernels

Written by `python -m tests.machine_code`, with nvcc {version}, flags as in `setup.py`; a test compares. No GPU is needed.
No kernel has a stack frame or spills a register.

| column | is |
|---|---|
| registers | of a thread, for sm_80, sm_90, sm_100 |
| blocks | of {threads} threads that a multiprocessor holds at a time, for each of these; 8 would be all of its threads |
| shared | bytes of shared memory of a block |
| loops | bytes that a thread moves in a round of each loop over whole aligned tensors, 16 at a time, masks one |
| bytes an instruction | the fewest among these loops |

A multiprocessor starts 128 instructions of threads in a cycle. To keep up with its memory an A100 or H100 has to move 0.11
bytes with each, an H200 0.16, a B200 0.2, by their peak figures: below that the arithmetic takes longer than the memory.
That is so for the Gaussian noise alone.

| kernel | registers | blocks | shared | loops | bytes an instruction |
|---|---|---|---|---|---|
{rows}

On sm_100 nvcc splits the reads of the sums in double precision, and some others there, into halves of 8 bytes. The cross
entropy takes single elements, for its rows may begin anywhere: the threads of a warp read neighbours.
"""


class Kernel(NamedTuple):
    """A kernel as compiled for one architecture."""

    registers: int
    shared: int
    on_stack: int
    """Bytes of stack, and of registers spilled and read back."""
    loops: list[Loop]
    local: bool
    """Whether there are accesses to local memory."""
    generic: bool
    """Whether there are accesses of which it is not known that they are to global memory."""

    def blocks(self, arch: str) -> int:
        """Blocks that a multiprocessor holds at a time."""
        registers = math.ceil(self.registers * 32 / 256) * 256 * (THREADS // 32)
        return min(64 // (THREADS // 32), 65536 // registers, SHARED[arch] * 1024 // (self.shared + 1024))

    @property
    def plain(self) -> list[Loop]:
        """The loops over whole aligned tensors."""
        return [loop for loop in self.loops if 16 in loop.widths and not loop.widths & {2, 4}]


class Loop(NamedTuple):
    """An innermost loop that accesses global memory."""

    moved: int
    instructions: int
    widths: frozenset[int]


def name_of(mangled: str) -> str | None:
    """Perturb<float>, say; None for what is none of the kernels."""
    found = re.search(r"(?:map|reduce)_kernelINS_\d+([A-Za-z]+)I([fd])E", mangled)
    if found is None and (loss := re.search(r"cross_entropy_kernelI([fd])E", mangled)):
        found = re.match(r"(\w+) (\w)", f"CrossEntropy {loss[1]}")
    return found and f"{found[1]}<{'float' if found[2] == 'f' else 'double'}>"


def nvcc_version() -> str:
    """Its release."""
    said = subprocess.run([NVCC, "--version"], text=True, capture_output=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def width(access: str) -> int:
    """Bytes of an access by the rest of its mnemonic."""
    found = re.search(r"\.(?:[US]?(8|16)|64|128)\b", access)
    return 4 if found is None else int(found[0].lstrip(".US")) // 8


@functools.cache
def compiled() -> dict[tuple[str, str], Kernel]:
    """All kernels, by name and architecture."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    built, log = made(
        "module.o", HEADERS,
        NVCC, "-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "--threads=0", "-Xptxas=-v", *code,
        "-Xcompiler=-fPIC", *INCLUDES, "-c", ROOT / "csrc/cuda/module.cu",
    )  # fmt: skip
    said = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        log,
    )
    texts = {}
    for arch in ARCHS:
        command = [CUOBJDUMP, "-sass", "-arch", f"sm_{arch}", built]
        text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
        for mangled, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction|\Z)", text, re.DOTALL):
            texts[mangled, arch] = body
    return {
        (name_of(mangled), arch): _kernel(texts[mangled, arch], int(registers), int(shared or 0), *map(int, on_stack))
        for mangled, arch, *on_stack, registers, shared in said
        if name_of(mangled)
    }


def _kernel(text: str, registers: int, shared: int, *on_stack: int) -> Kernel:
    instructions = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    jumps = [
        (int(found[1], 16), at)
        for at, what in instructions
        if (found := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", what)) and int(found[1], 16) < at
    ]
    loops = []
    for begin, end in jumps:
        if any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in jumps):
            continue  # has loops within
        inside = [what for at, what in instructions if begin <= at <= end]
        widths = [width(access) for access in re.findall(r"\b(?:LDG|STG)(\S*)", "\n".join(inside))]
        if widths:
            loops.append(Loop(sum(widths), len(inside), frozenset(widths)))
    local, generic = (bool(re.search(what, text)) for what in (r"\b(LDL|STL)\b", r"\b(LD|ST)\.E"))
    return Kernel(registers, shared, sum(on_stack), loops, local, generic)


def page() -> str:
    """The page as it should be."""
    kernels = compiled()
    rows = []
    for name in sorted({name for name, _ in kernels}):
        of = [kernels[name, arch] for arch in ARCHS]
        moved = [sorted(loop.moved for loop in kernel.plain) for kernel in of]
        least = [min((loop.moved / loop.instructions for loop in kernel.plain), default=None) for kernel in of]
        cells = [
            f"`{name}`",
            _joined(str(kernel.registers) for kernel in of),
            _joined(str(kernel.blocks(arch)) for kernel, arch in zip(of, ARCHS, strict=True)),
            _joined(str(kernel.shared) for kernel in of),
            _joined(" ".join(map(str, one)) for one in moved),
            _joined("" if one is None else f"{one:.2f}" for one in least),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return TEXT.format(version=nvcc_version(), threads=THREADS, rows="\n".join(rows))


def _joined(cells) -> str:
    cells = [cell or "–" for cell in cells]
    return cells[0] if len(set(cells)) == 1 else ", ".join(cells)


if __name__ == "__main__":
    PAGE.write_text(page())
