"""Sharpness-aware minimization for long-tailed classification, in fused passes over the parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ltsam_fast.backend import backends, use_backend
from ltsam_fast.optim import (
    CCSAM,
    ESAM,
    GNM,
    GSAM,
    SAM,
    SSESAM,
    WSAM,
    FocalSAM,
    FriendlySAM,
    ImbSAM,
    LookSAM,
    MicroBatchSAM,
    MomentumSAM,
    SparseSAM,
    TailMomentumSAM,
    VaSSO,
    create,
    list_methods,
)
from ltsam_fast.optim.capture import graph_step

if TYPE_CHECKING:
    from ltsam_fast import compat, data, diagnostics, losses, models, ops, reference

__version__ = "0.1.0"
__all__ = [
    "CCSAM",
    "ESAM",
    "FocalSAM",
    "FriendlySAM",
    "GNM",
    "GSAM",
    "ImbSAM",
    "LookSAM",
    "MicroBatchSAM",
    "MomentumSAM",
    "SAM",
    "SSESAM",
    "SparseSAM",
    "TailMomentumSAM",
    "VaSSO",
    "WSAM",
    "__version__",
    "backends",
    "compat",
    "create",
    "data",
    "diagnostics",
    "graph_step",
    "list_methods",
    "losses",
    "models",
    "ops",
    "reference",
    "use_backend",
]

_ON_FIRST_USE = ("compat", "data", "diagnostics", "losses", "models", "ops", "plain", "reference")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"ltsam_fast.{name}")
    raise AttributeError(f"module 'ltsam_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
