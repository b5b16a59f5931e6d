"""What the interpreter can't show: every kernel compiles for real GPUs, and moves 16 bytes at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

# triton.compile and the interpreter need separate processes: the choice is made when triton is imported.
PROGRAM = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ltsam_fast.kernels import norm_kernels as norm
from ltsam_fast.kernels import perturb_kernels as perturb
from ltsam_fast.kernels import step_kernels as step
from ltsam_fast.kernels.cross_entropy_kernels import cross_entropy_kernel

SIGNALS = "norm grad_scale found_inf combination scratch scales out skipped_steps call"
SIGNALS = dict.fromkeys(SIGNALS.split(), "i64")
TABLE = {"items": "*i64", "pointers": "*i64", "hyper": "*fp64"} | SIGNALS
LISTWISE = {"chunk_norms": (norm, 3), "chunk_dots": (norm, 2), "perturb": (perturb, 6), "gaussian_perturb": (perturb, 3)}
LISTWISE |= {"perturb_by_class": (perturb, 2), "combine": (perturb, 3), "restore": (perturb, 2)}
LISTWISE |= {"sgd_step": (step, 5), "adam_step": (step, 7)}
REDUCTIONS = ("chunk_norms", "chunk_dots")


def compiled(kernel, signature, constants, arch):
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature=full, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8, "enable_fp_fusion": False})


for arch, types in ((90, (tl.float32, tl.float64, tl.bfloat16, tl.float16)), (80, (tl.float32,)), (100, (tl.float32,))):
    for type_ in types:
        wide = tl.float64 if type_ is tl.float64 else tl.float32
        for name, (module, roles) in LISTWISE.items():
            kernel = getattr(module, name + "_kernel")
            types = (type_,) * (roles - (name == "perturb")) + (tl.uint8,) * (name == "perturb")
            constants = {"TYPES": types, "A": wide, "BLOCK": 2048}
            ptx = ""
            for drawn in ({"RANDOM": True}, {"RANDOM": False}) if name == "perturb" else ({},):
                ptx = compiled(kernel, TABLE, constants | drawn, arch).asm["ptx"]
            if type_ is tl.float32:
                assert "ld.global.v4" in ptx, (name, arch)
                assert name in REDUCTIONS or "st.global.v4" in ptx, (name, arch)
        names = cross_entropy_kernel.arg_names
        arguments = {n: "i64" for n in names[: names.index("rows")]} | {"rows": "i32", "classes": "i32", "seed": "i64"}
        some = dict.fromkeys(("SCALES", "SHIFTS", "MARGINS", "SPREADS", "WEIGHS", "DETACH", "BY_LABEL", "KEEPS"), False)
        some |= {"SMOOTHING": 0.0, "GAMMA": 0.0, "FORWARD": True, "GRADS": 2, "TYPE": type_, "A": wide, "BLOCK": 1024}
        full = {"SCALES": True, "SHIFTS": True, "MARGINS": True, "WEIGHS": True}
        for more in (
            {"BY_LABEL": True},
            full | {"SMOOTHING": 0.1, "GRADS": 0, "KEEPS": True},
            full | {"SPREADS": True, "GAMMA": 1.5, "GRADS": 0, "KEEPS": True},
            full | {"SPREADS": True, "FORWARD": False, "GRADS": 1},
        ):
            compiled(cross_entropy_kernel, arguments, some | more, arch)
    for sums in (1, 3):
        totals = {"A": tl.float32, "SLOTS": 1024, "SUMS": sums, "ROOT": sums == 1}
        compiled(norm.totals_kernel, {"ranges": "*i64"} | SIGNALS, totals, arch)
    compiled(
        step.count_steps_kernel,
        {"pointers": "*i64", "tensors": "i32"} | SIGNALS,
        {"ROLES": 6, "BLOCK": 128},
        arch,
    )
# Of a value that is specialized 1, a multiple of 16 and any other give three kernels: in a captured step one more.
for kernels in (norm, perturb, step):
    for name, kernel in vars(kernels).items():
        if name.endswith("_kernel"):
            assert all(param.do_not_specialize or param.is_constexpr for param in kernel.params), name
assert {param.name for param in cross_entropy_kernel.params if param.do_not_specialize} == {"rows", "seed"}
print("compiled")
"""


def test_kernels_compile_for_gpus_with_16_byte_accesses(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program = tmp_path / "compile_kernels.py"  # a file: Triton reads the kernels' sources
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "compiled" in done.stdout
