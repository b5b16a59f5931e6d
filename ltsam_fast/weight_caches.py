"""What torch keeps of weights until a context ends; whatever moves weights must clear it, or nobody sees that they moved."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def clear_weight_caches() -> None:
    """Clears autocast's 16-bit casts of weights, and what ``torch.nn.utils.parametrize.cached()`` keeps."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
