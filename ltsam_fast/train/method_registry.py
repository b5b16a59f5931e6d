"""Methods by name: their options read off their signatures, the rest supplied from the run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ltsam_fast as lf
from ltsam_fast.models import classifier
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.train.config import Config, ConfigError

METHODS: dict[str, tuple[str, type[SharpnessAware] | None, dict[str, Any]]] = {
    "sgd": ("SGD", None, {}),
    "sam": ("SAM", lf.SAM, {}),
    "asam": ("ASAM", lf.SAM, {"adaptive": True}),
    "focal_sam": ("Focal-SAM", lf.FocalSAM, {}),
    "imb_sam": ("ImbSAM", lf.ImbSAM, {}),
    "cc_sam": ("CC-SAM", lf.CCSAM, {}),
    "sse_sam": ("SSE-SAM", lf.SSESAM, {}),
    "gnm": ("GNM", lf.GNM, {}),
    "friendly_sam": ("Friendly SAM", lf.FriendlySAM, {}),
    "m_sam": ("m-SAM", lf.MSAM, {}),
    "sparse_sam": ("sparse SAM", lf.SparseSAM, {}),
    "esam": ("ESAM", lf.ESAM, {}),
    "look_sam": ("LookSAM", lf.LookSAM, {}),
    "gsam": ("GSAM", lf.GSAM, {}),
    "wsam": ("WSAM", lf.WSAM, {}),
}
"""Name on the command line -> name in print, class and fixed options; ``sgd`` is the base optimizer alone."""

_BASE_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_SUPPLIED = {"self", "params", "base_optimizer", "base_kwargs", "model", "class_counts", "head"}
_SETTINGS = {"lr", "momentum", "nesterov", "weight_decay"}
"""Options of the base optimizers that are settings of their own."""


@dataclass(frozen=True)
class RunInfo:
    """What a method may need to know of the run: network as called, network itself, counts, and the number of steps."""

    model: nn.Module
    network: nn.Module
    class_counts: Sequence[int]
    steps_per_epoch: int
    steps: int


def label(method: str) -> str:
    """The method's name in print.

    >>> label("focal_sam")
    'Focal-SAM'
    """
    return METHODS[method][0]


def options_of(method: str, optimizer: str = "sgd") -> dict[str, Any]:
    """The options that a method takes, with their defaults: its own, those of all methods, and its base optimizer's.

    Raises:
        ConfigError: There is no such method.

    >>> [name for name in options_of("focal_sam") if name in ("rho", "gamma", "lam", "class_counts")]
    ['rho', 'gamma', 'lam']
    """
    return {name: parameter.default for name, parameter in _parameters(method, optimizer).items()}


def _parameters(method: str, optimizer: str) -> dict[str, inspect.Parameter]:
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _, cls, fixed = METHODS[method]
    base = inspect.signature(_BASE_OPTIMIZERS[optimizer]).parameters
    found = {name: parameter for name, parameter in base.items() if name not in _SETTINGS}
    for one in (SharpnessAware, cls) if cls else ():
        found |= inspect.signature(one).parameters
    order = [*(inspect.signature(cls).parameters if cls else ()), *found]
    return {
        name: found[name] for name in dict.fromkeys(order) if name in found and name not in _SUPPLIED | fixed.keys()
    }


def check_options(config: Config) -> None:
    """Raises ConfigError if the method, or one of its options, is not known."""
    known = _parameters(config.method, config.optimizer)
    if unknown := [name for name in config.options if name not in known]:
        raise ConfigError(f"{config.method} has no option {', '.join(map(repr, unknown))}; it takes {', '.join(known)}")


def create(config: Config, run: RunInfo) -> Optimizer:
    """The optimizer of a run: a method around its base optimizer, or the base optimizer alone.

    Class counts, the model, the classifier (CC-SAM's ``head``) and the run's seed are supplied; so are ``m`` of m-SAM, half a
    batch, and ``total_steps`` of sparse SAM. Options that count steps may be given as "140ep" (epochs) or "70%" (of the run).

    Raises:
        ConfigError: An option is unknown or out of its range.
    """
    check_options(config)
    parameters = _parameters(config.method, config.optimizer)
    options = {
        name: _steps(name, value, run) if "int" in str(parameters[name].annotation) else value
        for name, value in config.options.items()
    }
    base = _BASE_OPTIMIZERS[config.optimizer]
    for name in ("lr", "weight_decay") + (("momentum", "nesterov") if config.optimizer == "sgd" else ()):
        options[name] = getattr(config, name)
    _, cls, fixed = METHODS[config.method]
    try:
        if cls is None:
            return base(run.network.parameters(), **options)
        taken = inspect.signature(cls).parameters
        supplied = {
            "class_counts": list(run.class_counts),
            "head": classifier(run.network) if "head" in taken else None,
            "m": max(1, config.batch_size // 2),
            "total_steps": run.steps,
            "seed": config.seed,
        }
        known = {name: value for name, value in supplied.items() if name in taken}
        return cls(run.network.parameters(), base, model=run.model, **{**known, **fixed, **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.method}: {error}") from error


def _steps(name: str, value: Any, run: RunInfo) -> Any:
    """A number of steps from "140ep" or "70%"; anything else stays."""
    if not isinstance(value, str):
        return value
    for suffix, unit in (("ep", run.steps_per_epoch), ("%", run.steps / 100)):
        if value.endswith(suffix):
            try:
                return round(float(value.removesuffix(suffix)) * unit)
            except ValueError:
                break
    raise ConfigError(f"{name} must be a whole number, or as in '140ep' or '70%', got {value!r}")
