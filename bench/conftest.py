"""What all benchmarks share."""

from __future__ import annotations

import signal

import pytest

from bench.measure import Roof, interleaved

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a time limit's; in a shell's background job it starts out ignored


@pytest.fixture(scope="session")
def measured_roof():
    """Bytes a second that the machine's memory gives, measured once."""
    roof = Roof()
    return roof.bandwidth(interleaved(roof.steps, 10))
