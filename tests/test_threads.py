"""Threads, forked processes and OpenMP within OpenMP; and that nothing is left behind by ten thousand steps.

LTSAM_TEST_STEPS is how many steps a method takes in the tests of leaks; the criterion is the same for any number.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ltsam_fast as lf
from ltsam_fast import ops
from ltsam_fast.backend import backend_for
from ltsam_fast.ops import OPS, dispatch
from ltsam_fast.optim.trace import Trace
from ltsam_fast.snapshot import native, reader

from .cases import CASES, FEW_SHAPES, build, tensors_of
from .method_rows import DRIVEN, EVERY, every, on_cpu
from .oracles import batches, flat, network
from .test_ops import run as run_op
from .test_package import COMPILER, ROOT, needs_compiler

STEPS = int(os.environ.get("LTSAM_TEST_STEPS", 480))
CPU = torch.device("cpu")
needs_core = pytest.mark.skipif(native() is None or not native().OPENMP, reason="no C++ core with OpenMP")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture
def in_threads(monkeypatch):
    """Calls functions at the same time, each in a thread of its own that often gives way; returns their results."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def run(functions):
        together = threading.Barrier(len(functions))

        def one(function):
            together.wait(60)
            return function()

        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(one, functions))

    yield run
    sys.setswitchinterval(before)


class Run:
    """A method with a network of its own, ready to be driven; each seed has another network and other batches."""

    def __init__(self, name, seed, interface="closure", steps=5):
        self.row, self.interface = EVERY[name].of(interface), interface
        self.model, self.data = network(torch.float32, seed), batches(torch.float32, steps, seed=seed)
        self.opt = self.row.make(self.model, lr=0.1, momentum=0.9)

    def __call__(self):
        return self.row.drive(self.interface, self.opt, self.model, self.data)


@on_cpu
@pytest.mark.parametrize(("name", "interface"), DRIVEN)
def test_optimizers_in_threads(name, interface, backend, in_threads):
    wanted = [Run(name, seed, interface)() for seed in range(3)]
    runs = [Run(name, seed, interface) for seed in range(3)]

    def on_backend(run):
        with lf.use_backend(backend):
            return run()

    found = in_threads([lambda run=run: on_backend(run) for run in runs])
    assert all(map(torch.equal, found, wanted))


def test_all_methods_and_backends_at_once(in_threads):
    """What one thread chooses, and keeps, is none of the others'."""
    backends = [name for name in ("cpu", "torch") if name in lf.backends()]
    kinds = [(name, backend) for name in EVERY for backend in backends]

    def run(made, backend):
        with lf.use_backend(backend):
            weights = made()
            return weights, backend_for(CPU).__name__

    wanted = [run(Run(name, seed), backend) for seed, (name, backend) in enumerate(kinds)]
    runs = [(Run(name, seed), backend) for seed, (name, backend) in enumerate(kinds)]
    found = in_threads([lambda one=one: run(*one) for one in runs])
    for kind, (weights, name), (other, other_name) in zip(kinds, found, wanted, strict=True):
        assert torch.equal(weights, other) and name == other_name, kind


def test_calls_without_a_table(backend, in_threads):
    """Those of a thread may share memory to work in with no other's."""

    def norms(seed):
        with lf.use_backend(backend):
            grads = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for _ in range(3)]
            return [ops.grad_norm(grads).item() for _ in range(5 if backend == "triton" else 200)]

    found = in_threads([lambda seed=seed: norms(seed) for seed in range(4)])
    assert found == [[norms(seed)[0]] * len(found[0]) for seed in range(4)]


def test_a_trace_is_of_one_thread(in_threads):
    """A step that is captured in a graph, and others' passes meanwhile."""
    inside, done = threading.Event(), threading.Event()
    traces = [Trace(), Trace()]
    w, g = [torch.ones(3)], [torch.ones(3)]

    def traced():
        with traces[0].recording():
            inside.set()
            assert done.wait(60)

    def others():
        assert inside.wait(60)
        ops.perturb_(w, g, None, torch.ones(()), rho=0.5)
        with traces[1].recording():
            ops.perturb_(w, g, None, torch.ones(()), rho=0.25)
        done.set()

    in_threads([traced, others])
    assert [name for name, _ in traces[1].calls] == ["perturb_"]
    assert not traces[0].calls and not traces[0].asked


class Slow(nn.Module):
    """Gives way in its forward pass."""

    def forward(self, x):
        time.sleep(0.002)
        return x


def settings():
    """What of torch's is the whole process's."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch._dynamo.eval_frame._stance.stance,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture
def tf32():
    """TensorFloat-32 is allowed."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@every
def test_settings_of_the_process_are_as_before(name, in_threads, tf32):
    """A network is looked at in another mode, by one thread after the other."""
    before, runs = settings(), []
    for seed in range(4):
        run = Run(name, seed, steps=2)
        run.model = nn.Sequential(Slow(), *run.model, Slow())
        run.opt = run.row.make(run.model, lr=0.1, model=run.model)
        runs.append(run)
    in_threads(runs)
    assert settings() == before


# --- processes


def python(script, *arguments, **environment):
    """Runs a script in a process of its own and returns what it prints; one that hangs fails."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKED = """
import multiprocessing, os, sys
import torch
from ltsam_fast import ops
import ltsam_fast as lf

sys.path.append(os.getcwd())
from tests.method_rows import EVERY
from tests.oracles import batches, network

torch.set_num_threads(1)  # torch's own functions would wait for ever in a forked process
data = batches(torch.float32, 3)
models = [network(torch.float32) for _ in range(2 * len(EVERY))]
big = [torch.randn(300_000, generator=torch.Generator().manual_seed(0)) for _ in range(3)]

def work(models):
    rows = zip(EVERY.values(), models)
    weights = [row.drive("closure", row.make(model, lr=0.1), model, data).tolist() for row, model in rows]
    torch.set_num_threads(2 if sys.argv[1] == "cpu" else 1)
    norm = ops.grad_norm(big).item()
    torch.set_num_threads(1)
    return [*weights, norm]

def child(pipe):
    pipe.send(work(models[len(EVERY):]))

with lf.use_backend(sys.argv[1]):
    wanted = work(models[:len(EVERY)])
    context = multiprocessing.get_context("fork")
    pipe, other_end = context.Pipe()
    process = context.Process(target=child, args=(other_end,), daemon=True)
    process.start()
    assert pipe.poll(60), "the forked process hangs"
    assert pipe.recv() == wanted
    assert work(models[:len(EVERY)])[-1] == wanted[-1]
"""


@needs_fork
@pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in lf.backends()])
def test_fork_after_use(backend):
    """A forked process takes the same steps, with more than one thread too."""
    python(FORKED, backend)


WORKERS = """
import os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from ltsam_fast import losses, ops
import ltsam_fast as lf

sys.path.append(os.getcwd())
from tests.method_rows import EVERY
from tests.oracles import BATCH, COUNTS, FEATURES, network

torch.set_num_threads(2)
big = [torch.ones(300_000) for _ in range(3)]
criterion = losses.LDAM(COUNTS)

class Data(Dataset):
    def __len__(self):
        return 4 * BATCH

    def __getitem__(self, i):
        x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(i))
        x += criterion(x[None, :4], torch.tensor([i % 4]))
        return x * ops.grad_norm(big), i % 4  # threads of the core's, had it any here

def train(row, workers):
    model = network(torch.float32)
    opt = row.make(model, lr=1e-3)
    for _ in range(2):
        for x, y in DataLoader(Data(), BATCH, num_workers=workers):
            row.step("closure", opt, model, x, y)
    return torch.cat([param.detach().flatten() for param in model.parameters()])

with lf.use_backend(sys.argv[1]):
    ops.grad_norm(big)
    for row in (EVERY["SAM"], EVERY["ImbSAM"]):
        assert torch.equal(train(row, 2), train(row, 0))
"""


@needs_fork
@pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in lf.backends()])
def test_workers_of_a_data_loader(backend):
    python(WORKERS, backend)


NESTED = """
#include <omp.h>
extern "C" int in_a_team(void (*call)(int)) {
  int size = 0;
#pragma omp parallel num_threads(2)
  {
#pragma omp single
    size = omp_get_num_threads();
    call(omp_get_thread_num());
  }
  return size;
}
"""
IN_A_TEAM = """
import ctypes, sys
import torch
import ltsam_fast as lf
from ltsam_fast import ops

torch.set_num_threads(2)
big = [torch.randn(300_000, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
wanted, found = ops.grad_norm(big).item(), []

def call(number):
    with lf.use_backend("cpu"):
        torch.set_num_threads(2)
        found.extend(ops.grad_norm(big).item() for _ in range(5))

size = ctypes.CDLL(sys.argv[1]).in_a_team(ctypes.CFUNCTYPE(None, ctypes.c_int)(call))
assert found == [wanted] * 5 * size, (size, found, wanted)
print(size)
"""


@needs_core
@needs_compiler
@pytest.mark.parametrize(
    ("environment", "size"),
    [({}, 2), ({"OMP_MAX_ACTIVE_LEVELS": "4", "OMP_DYNAMIC": "true"}, None), ({"OMP_THREAD_LIMIT": "1"}, 1)],
    ids=["default", "nested", "one thread"],
)
def test_openmp_within_openmp(environment, size, tmp_path):
    """Passes that are called by threads of a team: of its own OpenMP or of another, they take what threads they get."""
    (tmp_path / "team.cpp").write_text(NESTED)
    library = tmp_path / "team.so"
    subprocess.run([COMPILER, "-fopenmp", "-shared", "-fPIC", "team.cpp", "-o", library], cwd=tmp_path, check=True)
    printed = python(IN_A_TEAM, library, **environment)
    assert int(printed) == size or size is None


# --- nothing is left behind


class MallInfo(ctypes.Structure):
    """What C's allocator says of itself."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@pytest.fixture
def leaves_nothing():
    """A function that runs another a number of times, and raises AssertionError if something is left of each time.

    Of Python's blocks, of bytes of C's allocator, and of the bytes of the process that are in memory. The least of four parts
    counts: a leak is in all of them, while caches fill and dictionaries grow now and then.
    """
    usage = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if usage is None or not Path("/proc/self/statm").exists():
        pytest.skip("needs glibc 2.33 and Linux")
    usage.restype = MallInfo

    def held():
        dispatch._TABLES.clear()  # of what was called lately
        gc.collect()
        numbers = usage()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return sys.getallocatedblocks(), numbers.hblkhd + numbers.uordblks, resident

    def check(step, times, warm=40, per_time=1):
        for _ in range(warm):
            step()
        found = [held()]
        for _ in range(4):
            for _ in range(times // 4):
                step()
            found.append(held())
        parts = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(found)]
        blocks, in_use, resident = map(min, zip(*parts, strict=True))
        steps = times // 4 * per_time
        assert blocks < 80 + 0.05 * steps and in_use < 4096 + 2 * steps and resident < 2**20, (parts, steps)

    gc.collect()
    gc.freeze()  # what is there already need not be looked through each time: after other tests that takes seconds
    yield check
    gc.unfreeze()


def moving(params):
    """Lets gradients lie elsewhere each time: memory comes and goes in sizes like theirs."""
    taken, seed = [[torch.empty_like(param) for param in params] for _ in range(7)], random.Random(0)

    def move():
        taken[seed.randrange(7)] = [torch.empty_like(param) for param in params]

    return move


@pytest.mark.parametrize("what", ["an object", "memory", "a tensor"])
def test_leaks_are_seen(what, leaves_nothing):
    kept = [None] * 10_000
    places = iter(range(len(kept)))
    leaks = {
        "an object": object,
        "memory": lambda: ctypes.CDLL(None).malloc(128) and None,
        "a tensor": lambda: torch.zeros(10_000),
    }

    def step():
        kept[next(places)] = leaks[what]()

    with pytest.raises(AssertionError):
        leaves_nothing(step, 480)


@on_cpu
@every
def test_steps_leave_nothing_behind(name, backend, leaves_nothing, threads):
    run = Run(name, 0)
    move, turn = moving(list(run.model.parameters())), iter(range(10**9))

    def step():
        move()
        run.row.step("closure", run.opt, run.model, *run.data[next(turn) % len(run.data)])

    with threads(1):
        leaves_nothing(step, STEPS)
    assert flat(run.model).isfinite().all()


@on_cpu
def test_made_and_dropped_optimizers_leave_nothing_behind(backend, leaves_nothing, threads):
    data = batches(torch.float32, 2)

    def step():
        for row in EVERY.values():
            model = network(torch.float32)
            row.drive("closure", row.make(model, lr=0.1), model, data)

    with threads(1):
        leaves_nothing(step, 16, warm=4, per_time=len(EVERY))


@needs_core
def test_ended_threads_leave_nothing_behind(leaves_nothing):
    """Each with a team of OpenMP's threads, and tables."""
    grads = [torch.ones(200_000)]

    def call():
        torch.set_num_threads(2)
        ops.grad_norm(grads)

    def step():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    leaves_nothing(step, 480, warm=100)
    assert len(list(Path("/proc/self/task").iterdir())) < 100


def assert_counts_stay(objects, call, times=50):
    """A call leaves reference counts alone: of these objects, and of those that each function may return."""
    objects = [*objects, None, True, False, ()]
    changes = []
    for _ in range(3):  # what others hold, or with Python 3.13 a count at first, changes once
        before = [sys.getrefcount(one) for one in objects]
        for _ in range(times):
            call()
        changes.append([abs(sys.getrefcount(one) - count) for one, count in zip(objects, before, strict=True)])
    least = [min(each) for each in zip(*changes, strict=True)]
    assert all(count < times / 2 for count in least), changes


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_leave_reference_counts_alone(case, backend, generator):
    call = build(case, generator, shapes=FEW_SHAPES)
    lists = [value for value in call.values() if isinstance(value, list)]
    assert_counts_stay([*lists, *(tensor for _, tensor in tensors_of(call))], lambda: run_op(ops, case, call))


@needs_core
def test_native_functions_leave_reference_counts_alone():
    """And their errors."""
    core = native()
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(3)
    state = {param: {"m": param.grad} for param in params}
    calls = [
        lambda: core.has_none(params),
        lambda: core.same_items(params, params),
        lambda: core.has_views(params),
        lambda: core.gradients_of(params),
        lambda: core.gradients_of([params[0], 1]),
        lambda: core.values_of(state, params),
        lambda: core.values_of(state, [1]),
        lambda: core.entries(list(state.values()), "m"),
        lambda: core.entries(list(state.values()), "n"),
        lambda: core.entries([[]], "n"),
        lambda: core.clear_gradients([object()]),
        lambda: core.grad_norm(None),
        lambda: core.are_labels(0, 0, 1),
    ]
    if reader().__class__.__name__ == "partial":
        out = torch.zeros(3, 1, 6, dtype=torch.int64).numpy()
        calls += [lambda: reader()((params,), out, (True,), None), lambda: reader()(([1] * 3,), out, (True,), None)]
        calls += [lambda: core.may_overlap(out, (True,)), lambda: core.may_meet(out, (True,), [(8, 12)])]
    objects = [*params, *(param.grad for param in params), state, *state.values()]

    def all_calls():
        for call in calls:
            with contextlib.suppress(Exception):
                call()

    assert_counts_stay(objects, all_calls)
    assert {*OPS, "cross_entropy"} <= set(dir(core))
