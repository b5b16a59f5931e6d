"""Losses by name, one value per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ltsam_fast.train.config import Config, ConfigError

LOSSES = ("ce", "la")
COSINE = ("ldam", "gcl")
"""Losses whose logits are meant to be cosines."""


def criterion(config: Config, counts: Sequence[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a run: logits (B, C) and labels (B,) to losses (B,).

    Raises:
        ConfigError: There is no such loss, or an option is not accepted.
    """
    if config.loss not in LOSSES:
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, got {config.loss!r}")
    shift = torch.tensor(counts, dtype=torch.float32, device=device)
    shift = (shift / shift.sum()).log() if config.loss == "la" else torch.zeros_like(shift)
    return lambda logits, labels: F.cross_entropy(logits + shift, labels, reduction="none")
