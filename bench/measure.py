"""Optimizer steps to be timed, the memory bandwidth, and interleaved timing."""

from __future__ import annotations

import functools
import os
import random
import statistics
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch

import ltsam_fast as lf
from bench import peers
from ltsam_fast import ops, plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
BYTES = {"SAM": 40, "FocalSAM": 44}
"""Bytes moved per fp32 parameter and step, each input and output counted once (SGD with momentum)."""
PHASES = {"SAM": ("first_step", "second_step"), "FocalSAM": ("first_step", "second_step", "third_step")}


PEER = "pytorch_optimizer"
"""The fastest other package, in version 4.1.0."""


def synchronize() -> None:
    """Waits for the device, so that a host clock measures its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


class Step:
    """One optimizer's phases on tensors of the given shapes. Setting gradients is not timed."""

    def __init__(self, method: str, implementation: str, shapes: list[Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        make = lambda scale: [(torch.randn(s, generator=generator) * scale).to(DEVICE) for s in shapes]  # noqa: E731
        self.params = [torch.nn.Parameter(w) for w in make(0.05)]
        self.grads = [make(0.01) for _ in PHASES[method]]
        others: dict[str, Any] = {
            "plain": lambda: getattr(plain, method),
            "foreach": lambda: peers.with_engine(peers.Foreach, getattr(peers, method)),
            "compiled": lambda: peers.with_engine(peers.Compiled, getattr(peers, method)),
            PEER: lambda: peers.published(method),
        }
        self.backend = None if implementation in others else implementation
        cls = others.get(implementation, lambda: getattr(lf, method))()
        self.optimizer = cls(self.params, torch.optim.SGD, rho=0.05, **BASE)
        self.phases = [getattr(self.optimizer, name) for name in PHASES[method]]
        self.elements = sum(p.numel() for p in self.params)

    def __call__(self) -> float:
        """Runs one step and returns the seconds spent in the phases."""
        if self.backend is not None:
            with lf.use_backend(self.backend):
                return self._run()
        return self._run()

    def _run(self) -> float:
        spent = 0.0
        for phase, grads in zip(self.phases, self.grads, strict=True):
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad.clone()  # the plain loop adds into its gradients
            spent += timed(phase)
        return spent


class FixedGradients(torch.autograd.Function):
    """Losses whose backward returns prepared gradients."""

    @staticmethod
    def forward(ctx: Any, grads: list[torch.Tensor], samples: int, *params: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return torch.ones(samples, device=params[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return None, None, *ctx.grads


class WholeStep:
    """``step(closure, targets)`` of any method, with a closure of negligible cost."""

    def __init__(self, method: str, options: dict[str, Any], backend: str, shapes: list[Any]) -> None:
        """``method``: one of ``lf.list_methods()``."""
        generator = torch.Generator().manual_seed(0)
        make = lambda scale: [(torch.randn(s, generator=generator) * scale).to(DEVICE) for s in shapes]  # noqa: E731
        self.params = [torch.nn.Parameter(w) for w in make(0.05)]
        self.grads = make(0.01)
        groups = [{"params": self.params[:-2]}, {"params": self.params[-2:]}]
        options = {"rho": 0.05, "class_counts": [50, 5], **options, **BASE}
        self.optimizer = lf.create(method, groups, torch.optim.SGD, **options)
        self.targets = torch.tensor([0, 1] * 4, device=DEVICE)
        self.backend = backend
        self.elements = sum(p.numel() for p in self.params)

    def closure(self, index: Any = None) -> torch.Tensor:
        return FixedGradients.apply(self.grads, 8 if index is None else len(index), *self.params)

    def __call__(self) -> float:
        """Takes one step and returns its seconds without those in autograd."""
        autograd_seconds = 0.0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal autograd_seconds
                results: list[Any] = []
                autograd_seconds += timed(lambda: results.append(function(*arguments, **named)))
                return results[0]

            return call

        with (
            lf.use_backend(self.backend),
            unittest.mock.patch.multiple(
                torch.autograd, backward=counted(torch.autograd.backward), grad=counted(torch.autograd.grad)
            ),
        ):
            return timed(lambda: self.optimizer.step(self.closure, targets=self.targets)) - autograd_seconds


def interleaved(steps: list[Callable[[], float]], rounds: int, warmup: int = 3) -> list[list[float]]:
    """Times the steps in turns, so that other load affects all of them, after some rounds to warm up. Returns seconds.

    Their order is another in every round: each leaves the caches, and freed memory, to the next.
    """
    times: list[list[float]] = [[] for _ in steps]
    pairs, shuffle = list(zip(steps, times, strict=True)), random.Random(0).shuffle
    for index in range(rounds + warmup):
        shuffle(pairs)
        for step, column in pairs:
            seconds = step()
            if index >= warmup:
                column.append(seconds)
    return times


class MemoryBandwidth:
    """The memory bandwidth: ``steps`` copy, copy past the caches, and read, 256 MiB each; time them in turns."""

    def __init__(self, elements: int = 1 << 26) -> None:
        x, y = (torch.rand(elements, device=DEVICE) for _ in range(2))
        self._moved = (8 * elements, 8 * elements, 4 * elements)
        runs = (lambda: y.copy_(x), lambda: ops.restore_([y], [x]), lambda: ops.grad_norm([x]))
        self.steps: list[Callable[[], float]] = [functools.partial(timed, run) for run in runs]

    def bandwidth(self, times: list[list[float]]) -> float:
        """Returns the bytes per second of the fastest step, from the times of the steps."""
        return max(moved / statistics.median(column) for moved, column in zip(self._moved, times, strict=True))


def machine(request: Any) -> dict[str, Any]:
    """Returns facts of the machine. The bandwidth is measured at the first call; a smoke test makes none."""
    return {
        "bandwidth_gb_per_s": request.getfixturevalue("measured_bandwidth") / 1e9,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def facts(
    request: Any, elements: int, moved: float | None, seconds: float, bandwidth: float | None = None
) -> dict[str, Any]:
    """Facts of a pass that moved ``moved`` bytes in ``seconds``; ``bandwidth``: bytes per second, else the machine's."""
    found = machine(request)
    if bandwidth is not None:
        found["bandwidth_gb_per_s"] = bandwidth / 1e9
    found |= {"elements": elements, "fused_ms": 1e3 * seconds}
    if moved is None:
        return found
    return found | {
        "bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "share_of_bandwidth": moved / seconds / 1e9 / found["bandwidth_gb_per_s"],
    }
