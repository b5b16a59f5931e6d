"""Clears torch's caches of values computed from weights. Call it after every change of weights inside a context."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def clear_weight_caches() -> None:
    """Clears autocast's 16-bit copies of weights and the cache of ``torch.nn.utils.parametrize.cached()``."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
