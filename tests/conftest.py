"""Backends for the tests, and memory that is never zero by luck."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal

# Waiting threads that spin make small tests many times slower where other programs run. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, if it is chosen before triton is imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ltsam_fast as lf
from ltsam_fast.optim import plan

LEAST_WORK = plan.LEAST_WORK

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job Ctrl-C starts out ignored


@pytest.fixture(params=sorted(lf.backends(), key=["torch", "cpu", "triton", "cuda"].index))
def backend(request):
    """Every backend in turn, chosen for the test. Which are missing, and why: test_package.py."""
    with lf.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    """Where the backend's tensors live."""
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty holds NaN: what a kernel forgets to write can't pass."""
    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **kwargs):
            made = plain(*args, **kwargs)
            if made.is_floating_point():
                made.detach().fill_(float("nan"))
            return made

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def sharing(monkeypatch):
    """Two gradients share a sweep in the tests' small networks, too, where a backward for each takes less time."""
    monkeypatch.setattr(plan, "LEAST_WORK", -1.0)


@pytest.fixture(scope="session")
def core():
    """The CUDA core on the host."""
    from .on_host import Core

    return Core(32764)


@pytest.fixture(scope="session")
def narrow_core():
    """What CUDA before 12.1 gets: an eighth of the tensors in a launch."""
    from .on_host import Core

    return Core(4096)


@pytest.fixture
def seed():
    """Another one each time, shown when the test fails; LTSAM_TEST_SEED repeats it."""
    seed = int(os.environ.get("LTSAM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LTSAM_TEST_SEED={seed}")
    return seed


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def threads():
    """A context that sets the number of threads."""
    before = torch.get_num_threads()

    @contextlib.contextmanager
    def using(count):
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return using
