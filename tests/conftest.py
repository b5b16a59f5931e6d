"""Backends for the tests, and memory that is never zero by luck."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, if it is chosen before triton is imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import ltsam_fast as lf


@pytest.fixture(params=["torch", "cpu", "triton", "cuda"])
def backend(request):
    """Every backend in turn, chosen for the test; one that is missing is skipped with its reason."""
    from ltsam_fast.backend import why_not

    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    with lf.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    """Where the backend's tensors live."""
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty holds NaN: what a kernel forgets to write can't pass."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **kwargs):
            made = plain(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)
