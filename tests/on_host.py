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

from ltsam_fast import launch_args, ops
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


def made(config, name, sources, *command):
    """Runs a compiler unless it has done so for what the sources are now; returns the result and its output."""
    key = hashlib.sha256(repr(command).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
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


class Core:
    """The CUDA core as a backend for tensors on the host, with this limit on what a kernel takes by value.

    A kernel may touch the tensors of its call and nothing else, and goes to the stream that is current when it is launched.
    """

    CAPTURABLE = True

    def __init__(self, config, argument_bytes):
        if CXX is None or not sys.platform.startswith("linux"):
            pytest.skip("needs a C++ compiler and ucontext")
        compiler = [
            CXX, "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-ffp-contract=off",
            *FLAGS, f"-DLT_ARGUMENT_BYTES={argument_bytes}", f"-I{EMULATION}", *INCLUDES,
        ]  # fmt: skip
        # A GPU traps at misaligned vectors. GCC would link the sanitizer, in place of which the runtime is.
        checks = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
        header, source = EMULATION / "cuda_runtime.h", EMULATION / "runtime.cpp"
        module, _ = made(
            config, f"module_{argument_bytes}.o", [*HEADERS, header],
            *compiler, *checks, *TRACED, "-c", "-xc++", ROOT / "csrc/cuda/module.cu",
        )  # fmt: skip
        runtime, _ = made(config, f"runtime_{argument_bytes}.o", [header, source], *compiler, "-c", source)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        linker = [CXX, "-shared", "-pthread", *FLAGS]
        path, _ = made(config, f"_cuda_{argument_bytes}{suffix}", [], *linker, module, runtime)
        name = f"arguments{argument_bytes}._cuda"  # by name, pybind11 would return the module it made first
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(self.module)
        self.library = library = ctypes.CDLL(str(path))
        library.on_host_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.on_host_set_stream.argtypes = [ctypes.c_void_p]
        library.on_host_replay.restype = library.on_host_synchronize.restype = ctypes.c_char_p
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
        self.library.on_host_forget()
        for tensor in tensors_of(args):
            self.library.on_host_memory(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        getattr(self.module, op)(args)

    @contextlib.contextmanager
    def serving(self, monkeypatch, live=False):
        """Has the package run its ops here, as if the tensors were on a GPU.

        ``live``: with hyperparameters where a CUDA graph would have them, on the device, read when a kernel runs.
        """
        self.live = live
        with monkeypatch.context() as patch:
            for caller in (dispatch, differentiable):
                patch.setattr(caller, "backend_for", lambda _: self)
            for caller in (dispatch, launch_args):
                patch.setattr(caller, "stream_or_threads", lambda _: self.stream)
            yield self


def tensors_of(args):
    """All tensors that a call names."""
    if isinstance(args, launch_args.RowArgs):
        found = list(args.tensors.values())
    else:
        found = [args.hyper, args.scratch_memory, *args.signals.values()]
        found += [tensor for role in range(len(args.op.roles)) for tensor in args.tensors(role) or ()]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
