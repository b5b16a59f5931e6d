"""What all benchmarks share."""

from __future__ import annotations

import pytest

from bench.measure import Roof, interleaved


@pytest.fixture(scope="session")
def measured_roof():
    """Bytes a second that the machine's memory gives, measured once."""
    roof = Roof()
    return roof.bandwidth(interleaved(roof.steps, 10))
