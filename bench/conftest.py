"""What all benchmarks share."""

from __future__ import annotations

import signal

import pytest

from bench.measure import MemoryBandwidth, interleaved

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a time limit's; in a shell's background job it starts out ignored


@pytest.fixture(scope="session")
def measured_bandwidth():
    """The memory bandwidth in bytes per second, measured once."""
    memory = MemoryBandwidth()
    return memory.bandwidth(interleaved(memory.steps, 10))
