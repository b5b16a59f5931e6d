"""Fixtures of all benchmarks."""

from __future__ import annotations

import signal

import pytest

from bench.measure import MemoryBandwidth, interleaved

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # for time limits; background jobs of a shell ignore it by default


@pytest.fixture(scope="session")
def measured_bandwidth():
    """The memory bandwidth in bytes per second, measured once."""
    memory = MemoryBandwidth()
    return memory.bandwidth(interleaved(memory.steps, 10))
