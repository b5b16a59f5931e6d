"""The CUDA core without a GPU: its kernels run on the host (see cuda_on_host), and what nvcc makes of them.

Left to a real GPU: the memory model, streams, graph capture and speed.
"""

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pybind11
import pytest
import torch

from ltsam_fast import ops, reference
from ltsam_fast.table import CHUNK, Table

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "csrc").rglob("*.*")), *sorted((ROOT / "tests/cuda_on_host").iterdir())]
INCLUDES = [f"-I{folder}" for folder in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
ARITHMETIC = ["-fno-math-errno", "-ffp-contract=off"]
ARCHS = ("80", "90", "100")
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("c++")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [0, 1, 7, 4095, 4097, 0, 16384, 16385, 100003, 0]
MIXED = (F32, BF16, F16, F32, BF16)
NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(0), dtype=F64)


def made(config, name, *command):
    """Runs a compiler on the CUDA core unless it has done so for these very sources; returns the result and its output."""
    key = hashlib.sha256(repr(command).encode() + b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    folder = config.cache.mkdir("cuda_source")
    made, log = folder / f"{key}-{name}", folder / f"{key}-{name}.log"
    if not (made.exists() and log.exists()):
        for old in folder.glob(f"*-{name}*"):
            old.unlink()
        new = made.with_name(f"{made.name}.new")
        process = subprocess.run([*map(str, command), "-o", new], text=True, capture_output=True)
        assert process.returncode == 0, process.stdout + process.stderr
        log.write_text(process.stdout + process.stderr)
        new.rename(made)
    return made, log.read_text()


@pytest.fixture(scope="session", params=[32764, 4096], ids="{}-byte-arguments".format)
def core(request):
    """The CUDA core, built to run on the host, with either limit on what a kernel takes by value."""
    if CXX is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler and ucontext")
    path, _ = made(
        request.config, f"_cuda_{request.param}{sysconfig.get_config_var('EXT_SUFFIX')}",
        CXX, "-xc++", "-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", *ARITHMETIC,
        "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",  # a GPU traps at misaligned vectors
        f"-DLT_ARGUMENT_BYTES={request.param}", f"-I{ROOT}/tests/cuda_on_host", *INCLUDES,
        ROOT / "csrc/cuda/module.cu",
    )  # fmt: skip
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    return SimpleNamespace(
        module=module, launches=library.on_host_launches, blocks=library.on_host_blocks, bytes=request.param
    )


@pytest.fixture(scope="session")
def cpu():
    """The C++ core: it shares the functors, so whole tensors are compared bit by bit."""
    return pytest.importorskip("ltsam_fast._cpu", reason="the C++ core is not built")


@pytest.fixture
def on(monkeypatch, core):
    """on(module)(op, ...): calls a public op and has this module run it."""

    def on(module, device=0, seed=0):
        def call(op, *arguments, **named):
            monkeypatch.setattr(ops, "backend_for", lambda _: module)
            monkeypatch.setenv("LTSAM_HOST_DEVICE", str(device))
            monkeypatch.setenv("LTSAM_HOST_SEED", str(seed))
            return getattr(ops, op)(*arguments, **named)

        return call

    return on


class Lists:
    """Lists of tensors for all roles, in buffers with something around each tensor that must stay."""

    def __init__(self, sizes, dtypes=(F32,), offsets=(0,)):
        self.sizes, self.dtypes, self.offsets = sizes, dtypes, offsets
        self.buffers, self.count = [], 0

    def new(self, positive=False):
        tensors = []
        for size in self.sizes:
            first = 7919 * self.count % (len(NOISE) - size - 64)
            values = NOISE[first : first + size + 64]
            buffer = (values.abs() if positive else values).to(self.dtypes[self.count % len(self.dtypes)], copy=True)
            start = 16 + self.offsets[self.count % len(self.offsets)]  # 16 elements: 16 bytes in every dtype
            tensors.append(buffer[start : start + size])
            self.buffers.append(buffer)
            self.count += 1
        return tensors

    def steps(self, first=0.0):
        steps = [torch.tensor(first + i % 3) for i in range(len(self.sizes))]
        self.buffers += steps
        return steps


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(cores, *arguments, **named):
    """Runs build(lists) -> (op, arguments, keywords) on equal inputs by every core; all buffers must end up equal."""
    build, *arguments = arguments
    results = []
    for call in cores:
        lists = Lists(*arguments, **named)
        op, positional, keywords = build(lists)
        before = [buffer.clone() for buffer in lists.buffers]
        returned = call(op, *positional, **keywords)
        results.append((lists.buffers, returned))
        changed = [not torch.equal(bits(x), bits(y)) for x, y in zip(before, lists.buffers, strict=True)]
        assert op == "grad_norm" or any(changed), "the op did nothing"
    for buffers, returned in results[1:]:
        for mine, theirs in zip(buffers, results[0][0], strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        if returned is not None:
            assert torch.equal(bits(returned), bits(results[0][1]))


def perturb(lists, **named):
    keywords = {"rho": 0.05, "norm": torch.tensor(3.7, dtype=ops_dtype(lists))} | named
    return "perturb_", (lists.new(), lists.new(), lists.new()), keywords


def restore(lists):
    return "restore_", (lists.new(), lists.new()), {}


def sgd(lists, *optional, **named):
    w, g = lists.new(), lists.new()
    made = {name: lists.steps() if name == "steps" else lists.new() for name in optional}
    return "sgd_step_", (w, g), {"lr": 0.1, "weight_decay": 5e-4} | made | named


def adam(lists, *optional, **named):
    w, g, m, v, steps = lists.new(), lists.new(), lists.new(), lists.new(positive=True), lists.steps(4.0)
    made = {name: lists.new(positive=name == "max_exp_avg_sqs") for name in optional}
    return "adam_step_", (w, g, m, v, steps), {"lr": 1e-3, "weight_decay": 1e-2} | made | named


def ops_dtype(lists):
    return F64 if F64 in lists.dtypes else F32


def scalar(value):
    return torch.tensor(float(value))


MAPS = {
    "perturb": perturb,
    "perturb adaptive": lambda x: perturb(x, adaptive=True, eta=0.01, grad_scale=scalar(512), found_inf=scalar(0)),
    "restore": restore,
    "sgd": sgd,
    "sgd extra": lambda x: sgd(x, "backups", "extra", maximize=True),
    "sgd momentum": lambda x: sgd(x, "backups", "momentum_buffers", momentum=0.9, nesterov=True),
    "sgd all": lambda x: sgd(
        x, "backups", "extra", "momentum_buffers", "steps", momentum=0.9, dampening=0.1, max_norm=1.0,
        norm=torch.tensor(900.0, dtype=ops_dtype(x)), grad_scale=scalar(256), found_inf=scalar(0),
    ),
    "sgd skip": lambda x: sgd(x, "backups", "momentum_buffers", "steps", momentum=0.9, found_inf=scalar(1)),
    "adam": adam,
    "adam extra": lambda x: adam(x, "backups", "extra", decoupled=True, max_norm=1.0,
                                 norm=torch.tensor(9.0, dtype=ops_dtype(x))),
    "adam amsgrad": lambda x: adam(x, "max_exp_avg_sqs", maximize=True),
    "adam all": lambda x: adam(x, "backups", "extra", "max_exp_avg_sqs", grad_scale=scalar(4)),
    "adam skip": lambda x: adam(x, "backups", found_inf=scalar(1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtypes", "offsets"),
    [((F32,), (0,)), ((F32,), (0, 1, 2, 3, 4)), ((BF16,), (0, 4, 1)), (MIXED, (0, 0, 0, 2)), ((F64,), (0, 0, 1))],
    ids=["fp32", "fp32-views", "bf16", "mixed", "fp64"],
)
@pytest.mark.parametrize("build", MAPS.values(), ids=MAPS)
def test_maps_match_the_cpu_core(on, core, cpu, build, dtypes, offsets):
    assert_same_bits([on(cpu), on(core.module, device=1, seed=1)], build, SIZES, dtypes, offsets)
