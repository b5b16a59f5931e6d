"""The CUDA core built to run on the host, see cuda_on_host: a backend whose launches and accesses are checked."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ltsam_fast import backend, launch_args, losses, ops
from ltsam_fast.ops import differentiable, dispatch

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests/cuda_on_host"
HEADERS = sorted(file for file in (ROOT / "csrc").rglob("*.*") if file.parent.name != "cpu")
INCLUDES = [f"-I{folder}" for folder in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
CXX = shutil.which("g++") or shutil.which("c++")
FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
"""More flags for the host's compiler. What is built with a sanitizer of its own is not traced: no races are found."""
TRACED = [] if "-fsanitize" in " ".join(FLAGS) else ["-fsanitize=thread"]
STREAM = 0x57


def made(name, sources, *command):
    """Runs a compiler unless it has done so for what the sources are now; returns the result and its output."""
    key = hashlib.sha256(repr(command).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build/cuda_source"
    made, log = folder / f"{key}-{name}", folder / f"{key}-{name}.log"
    if not (made.exists() and log.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"*-{name}*"):
            if not old.name.startswith(key):  # else another process is at it
                old.unlink(missing_ok=True)
        new = made.with_name(f"{made.name}.{os.getpid()}")
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer for the tests
        process = subprocess.run([*map(str, command), "-o", new], text=True, capture_output=True, env=env)
        assert process.returncode == 0, process.stdout + process.stderr
        log.write_text(process.stdout + process.stderr)
        new.rename(made)
    return made, log.read_text()


class Core:
    """The CUDA core as a backend for tensors on the host, with this limit on what a kernel takes by value.

    A kernel may touch the tensors of its call and nothing else, and goes to the stream that is current when it is launched.
    """

    CAPTURABLE = True

    def __init__(self, argument_bytes):
        if CXX is None or not sys.platform.startswith("linux"):
            pytest.skip("needs a C++ compiler and ucontext")
        compiler = [
            CXX, "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-ffp-contract=off",
            *FLAGS, f"-DLT_ARGUMENT_BYTES={argument_bytes}", f"-I{EMULATION}", *INCLUDES,
        ]  # fmt: skip
        # A GPU traps at misaligned vectors. GCC would link the sanitizer, in place of which the runtime is.
        checks = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
        name = f"{argument_bytes}{hashlib.sha256(repr(FLAGS).encode()).hexdigest()[:6] if FLAGS else ''}"
        header, source = EMULATION / "cuda_runtime.h", EMULATION / "runtime.cpp"
        module, _ = made(
            f"module_{name}.o", [*HEADERS, header],
            *compiler, *checks, *TRACED, "-c", "-xc++", ROOT / "csrc/cuda/module.cu",
        )  # fmt: skip
        runtime, _ = made(f"runtime_{name}.o", [header, source], *compiler, "-c", source)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        linker = [CXX, "-shared", "-pthread", *FLAGS]
        path, _ = made(f"_cuda_{name}{suffix}", [], *linker, module, runtime)
        name = f"arguments{argument_bytes}._cuda"  # by name, pybind11 would return the module it made first
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(self.module)
        self.library = library = ctypes.CDLL(str(path))
        library.on_host_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.on_host_set_stream.argtypes = [ctypes.c_void_p]
        library.on_host_try.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t]
        for name in ("try", "replay", "synchronize"):
            getattr(library, f"on_host_{name}").restype = ctypes.c_char_p
        self.launches, self.blocks = library.on_host_launches, library.on_host_blocks
        self.stream, self.live = STREAM, False
        for op in (*ops.OPS, "cross_entropy"):
            setattr(self, op, functools.partial(self.run, op))

    @property
    def stream(self):
        """The current stream."""
        return self._stream

    @stream.setter
    def stream(self, stream):
        self._stream = stream
        self.library.on_host_set_stream(stream)

    def run(self, op, args):
        """Runs an op on what its arguments name."""
        if self.live and op != "cross_entropy":
            args.hyper = torch.from_numpy(args.hyper.copy())
        self.named = [(tensor, tensor.numel() * tensor.element_size()) for tensor in tensors_of(args)]
        self.name_memory((tensor.data_ptr(), size) for tensor, size in self.named)
        getattr(self.module, op)(args)

    def name_memory(self, memory):
        """Names what kernels may touch: pairs of an address and a number of bytes."""
        self.library.on_host_forget()
        for address, size in memory:
            self.library.on_host_memory(address, size)

    def captured(self, call, args):
        """A call captured as a CUDA graph; returns a function that replays it, on those of its tensors that are still there."""
        number = self.library.on_host_begin_capture()
        try:
            call(args)
        finally:
            self.library.on_host_end_capture()
        memory = [(StorageWeakRef(one.untyped_storage()), one.data_ptr(), size) for one, size in self.named]

        def replay():
            self.name_memory((address, size) for storage, address, size in memory if not storage.expired())
            self.check(self.library.on_host_replay(number))

        return replay

    @contextlib.contextmanager
    def deferring(self):
        """Launches run at the end, as on a GPU that is busy until then."""
        self.library.on_host_defer()
        try:
            yield
        finally:
            error = self.library.on_host_synchronize()
        self.check(error)

    @staticmethod
    def check(error):
        """Raises what went wrong."""
        if error:
            raise RuntimeError(error.decode())

    @contextlib.contextmanager
    def serving(self, monkeypatch, live=False):
        """Has the package run its ops here, as if the tensors were on a GPU.

        ``live``: with hyperparameters where a CUDA graph would have them, on the device, read when a kernel runs.
        """
        self.live = live
        with chosen(monkeypatch, self) as patch:
            for caller in (dispatch, launch_args):
                patch.setattr(caller, "stream_or_threads", lambda _: self.stream)
            yield self


@contextlib.contextmanager
def chosen(monkeypatch, module):
    """Has this module run all ops on CPU tensors."""
    key = (backend.wish(), backend._environment.get(backend._variable), torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setitem(backend._resolved, key, module)
        for caller in (differentiable, losses):  # small losses too
            patch.setattr(caller, "is_chosen", lambda: True)
        yield patch


def tensors_of(args):
    """All tensors that a call names."""
    if isinstance(args, launch_args.RowArgs):
        found = list(args.tensors.values())
    else:
        found = [args.hyper, args.scratch_memory, *args.signals.values()]
        found += [tensor for role in range(len(args.op.roles)) for tensor in args.tensors(role) or ()]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
