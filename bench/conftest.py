"""The roof is measured once for all benchmarks of a run."""

import pytest
import torch

from bench.measure import roof


@pytest.fixture(scope="session")
def measured_roof():
    return roof("cuda" if torch.cuda.is_available() else "cpu")
