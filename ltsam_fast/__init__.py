"""Sharpness-aware minimization for long-tailed classification, in fused passes over the parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ltsam_fast.backend import backends, use_backend
from ltsam_fast.optim import SAM, FocalSAM

if TYPE_CHECKING:
    from ltsam_fast import data, ops, reference

__version__ = "0.1.0"
__all__ = ["SAM", "FocalSAM", "__version__", "backends", "data", "ops", "reference", "use_backend"]

_ON_FIRST_USE = ("data", "ops", "plain", "reference")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"ltsam_fast.{name}")
    raise AttributeError(f"module 'ltsam_fast' has no attribute {name!r}")
