"""``python -m tests.sanitized``: the ops' tests on cores that GCC's sanitizers watch; the first finding ends it with an error.

First addresses, undefined behaviour and leaks, of the C++ core and of the CUDA core's source on the host (cuda_on_host itself
looks for races); then threads, of the C++ core. Nothing is suppressed. What no sanitizer has compiled, Python and torch, is
seen in part only:

* threads: openmp_on_threads.cpp stands in for libgomp, and what other code reads and writes is not looked at
  (``ignore_noninstrumented_modules``).
* leaks: Python keeps what it has until it ends, and then frees little of it. So leaks are looked for before, and those count
  that the core has asked for: a frame of it is on the stack.

As a plugin of pytest this loads the core, and leaves out the tests of other backends.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
CXX = shlex.split(os.environ.get("CXX", "g++"))
VARIABLE = "LTSAM_TEST_SANITIZER"
CHECKS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}
OPTIONS = {
    "ASAN_OPTIONS": "leak_check_at_exit=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
    "PYTHONMALLOC": "malloc",  # its own allocator hides each object's ends
    "OMP_NUM_THREADS": "3",
}
OPTIONS_OF_PYTEST = ["-p", "tests.sanitized", "-p", "no:faulthandler", "--capture=sys", "-q"]
TESTS = "test_ops test_ops_calls test_random test_lists test_fuzz".split()
TESTS = {"address": [*TESTS, "test_cuda_source"], "thread": TESTS}


def flags(kind):
    """What a compiler needs to have this sanitizer watch."""
    return [f"-fsanitize={CHECKS[kind]}", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer"]


def place(kind):
    """Of the C++ core."""
    return ROOT / f"build/sanitized/{kind}/_cpu.so"


def build(kind):
    """Compiles the C++ core if a source is newer."""
    made = place(kind)
    sources = [*(file for file in (ROOT / "csrc").rglob("*.*")), ROOT / "tests/openmp_on_threads.cpp", Path(__file__)]
    if made.exists() and made.stat().st_mtime > max(file.stat().st_mtime for file in sources):
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], text=True, capture_output=True, check=True
    )
    # Without __gnu_linux__ no copies are made for other instruction sets: they are chosen before a sanitizer has begun.
    common = [
        *CXX, "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U__gnu_linux__", *flags(kind)
    ]  # fmt: skip
    compiled = made.with_suffix(".o")
    run(*common, "-fopenmp", "-Icsrc", *includes.stdout.split(), "-c", "csrc/cpu/module.cpp", "-o", compiled)
    openmp = ["-fopenmp"] if kind == "address" else ["tests/openmp_on_threads.cpp"]
    run(*common, "-shared", compiled, *openmp, "-o", made)


def run(*command):
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


@functools.cache
def library(name):
    """Where the compiler has one of its libraries."""
    found = subprocess.run(
        [*CXX, f"-print-file-name={name}"], text=True, capture_output=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        raise SystemExit(f"{shlex.join(CXX)} has no {name}: install GCC with its sanitizers, or set CXX to it")
    return found


def watched(kind, *arguments, **named):
    """Runs Python with the sanitizer until it ends; ``named``: for subprocess.run()."""
    preload = [library({"address": "libasan.so", "thread": "libtsan.so"}[kind]), library("libstdc++.so")]
    environment = os.environ | OPTIONS | {VARIABLE: kind, "LD_PRELOAD": " ".join(preload)}
    environment["CXXFLAGS"] = shlex.join(flags(kind))  # for the CUDA core
    if arguments[-1].startswith("leaks"):  # whoever asked for memory is some frames up
        environment["ASAN_OPTIONS"] += ":fast_unwind_on_malloc=0:malloc_context_size=20"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, errors="replace", **named)


def load():
    """Has the package find the watched core, in a process that watched() has started."""
    kind = os.environ[VARIABLE]
    os.environ.pop("LD_PRELOAD", None)  # a compiler that a test runs need not be watched
    loader = importlib.machinery.ExtensionFileLoader("ltsam_fast._cpu", str(place(kind)))
    spec = importlib.util.spec_from_file_location(loader.name, loader.path, loader=loader)
    sys.modules[loader.name] = module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items):
    def is_seen(item):
        return getattr(item, "callspec", None) is None or item.callspec.params.get("backend", "cpu") == "cpu"

    items[:] = filter(is_seen, items)


# --- faults, for a sanitizer that finds none may not be looking


def called_with(change):
    """Runs an op natively after a change of its checked arguments."""
    core = load()
    import torch

    from ltsam_fast.ops import dispatch, restore_

    def changed(args):
        change(args)
        core.restore_(args)

    dispatch.backend_for = lambda _: SimpleNamespace(restore_=changed)
    restore_([torch.ones(1000)], [torch.ones(1000)])


def overrun():
    def change(args):
        args.numels += 1

    called_with(change)


def misaligned():
    def change(args):
        args.numels -= 1
        args.pointers += 1

    called_with(change)


def race():
    load()
    import torch

    from ltsam_fast.ops import restore_

    weights, backups = [torch.ones(1000000)], [torch.ones(1000000)]
    threads = [threading.Thread(target=restore_, args=(weights, backups)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def leaks(planted=False):
    """Calls every native function, then says what nothing points to any more."""
    core = load()
    import torch

    from ltsam_fast import ops
    from ltsam_fast.snapshot import ReadOnce

    from .cases import RICHEST, build
    from .cases import run as call

    for case in RICHEST:
        call(ops, case, build(case, torch.Generator().manual_seed(0)))
    logits, targets, once = torch.ones(3, 4, requires_grad=True), torch.tensor([0, 1, 2]), ReadOnce([torch.ones(3)])
    ops.adjusted_cross_entropy(logits, targets, label_smoothing=0.1).sum().backward()
    for params in ([torch.ones(3)], [torch.ones(4)], once):
        (
            core.gradients_of(list(params)),
            core.has_views(list(params)),
            core.values_of({0: 1}, [0]),
            core.entries([{}], "m"),
        )
        try:
            ops.restore_(params, [torch.zeros(3)])
        except ValueError:
            pass
    if planted:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(once.rows))
        once.rows = None
    ctypes.CDLL(None).__lsan_do_recoverable_leak_check()


def leaks_planted():
    leaks(planted=True)


FAULTS = {
    "overrun": ("address", "heap-buffer-overflow"),
    "misaligned": ("address", "misaligned address"),
    "leaks_planted": ("address", r"leak of (.+\n)+.*(\blt::|_cpu\.so)"),
    "race": ("thread", "data race"),
}
"""The sanitizer, and what it says."""


def main():
    ctypes.CDLL(None).personality(0x0040000)  # no addresses drawn at random, which may be those that a sanitizer needs
    for kind in CHECKS:
        build(kind)
        for fault, (its, words) in FAULTS.items():
            if its == kind:
                said = watched(kind, "-m", "tests.sanitized", fault, capture_output=True)
                if not re.search(words, said.stdout + said.stderr):
                    raise SystemExit(f"The {kind} sanitizer misses what {fault}() does:\n{said.stdout}{said.stderr}")
        if kind == "address":
            said = watched(kind, "-m", "tests.sanitized", "leaks", capture_output=True)
            if said.returncode or re.search(FAULTS["leaks_planted"][1], said.stderr):
                raise SystemExit(f"The core leaks memory:\n{said.stdout}{said.stderr}")
        files = [f"tests/{name}.py" for name in TESTS[kind]]
        done = watched(kind, "-m", "pytest", *OPTIONS_OF_PYTEST, *sys.argv[1:], *files)
        if done.returncode:
            raise SystemExit(f"The tests fail, or the {kind} sanitizer has found something: see above.")


if __name__ == "__main__":
    globals()[sys.argv[1]]() if sys.argv[1:] and sys.argv[1] in (*FAULTS, "leaks") else main()
elif VARIABLE in os.environ:
    load()
