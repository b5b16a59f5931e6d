"""Makes the optimizers that ``--method`` names, with the options of their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ltsam_fast as lf
from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.optim.registry import method_named
from ltsam_fast.train.config import Config, ConfigError, active_steps, number_of_steps

METHODS = {"sgd": "SGD"} | {name: method_named(name).title for name in lf.list_methods()}
"""Name on the command line -> name in print; ``sgd`` is the base optimizer alone."""

_BASE_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_SUPPLIED = {"params", "base_optimizer", "model", "class_counts", "head", "lr", "momentum", "nesterov", "weight_decay"}
"""Keywords that come from the run and from settings of their own, not from ``options``."""
_STEP_COUNTS = ("_step", "_steps", "_every")
"""How the names of options end that count steps, which may be given in epochs or percent."""


@dataclass(frozen=True)
class RunInfo:
    """What a method may take from the run: the model that is called, the network in it, class counts, numbers of steps."""

    model: nn.Module
    network: nn.Module
    class_counts: Sequence[int]
    steps_per_epoch: int
    steps: int


def check_method(method: str) -> None:
    """Raises ConfigError if there is no such method."""
    if method not in METHODS:
        raise ConfigError(
            f"there is no method {method!r}{did_you_mean(method, METHODS)} There are {', '.join(METHODS)}"
        )


def options_of(method: str, optimizer: str = "sgd") -> dict[str, Any]:
    """Returns the options of a method with their defaults: every keyword of its class, then those of the base optimizer.

    Keywords that the run supplies and those that the method fixes are left out.

    Raises:
        ConfigError: There is no such method.

    >>> [name for name in options_of("focal_sam") if name in ("rho", "gamma", "lam", "class_counts")]
    ['rho', 'gamma', 'lam']
    """
    check_method(method)
    classes: list[Any] = [_BASE_OPTIMIZERS[optimizer]]
    without = {*_SUPPLIED}
    if method != "sgd":
        classes.insert(0, method_named(method).cls)
        without.update(method_named(method).options)
    found: dict[str, Any] = {}
    for one in classes:
        for name, parameter in inspect.signature(one).parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(name, parameter.default)
    return {name: default for name, default in found.items() if name not in without}


def check_options(config: Config) -> None:
    """Raises ConfigError unless the method exists and has all options of the config."""
    known = options_of(config.method, config.optimizer)
    if unknown := [name for name in config.options if name not in known]:
        raise ConfigError(
            f"{config.method} has no option {unknown[0]!r}{did_you_mean(unknown[0], known)} It takes {', '.join(known)}"
        )


def supplied(config: Config) -> dict[str, Any]:
    """Returns the defaults that a run gives to the options of methods that have them."""
    return {
        "m": max(1, config.batch_size // 2),
        "seed": config.seed,
        "total_steps": "of the run",
        "active": config.active,
    }


def create(config: Config, run: RunInfo) -> Optimizer:
    """Returns the optimizer of a run: a method around its base optimizer, or the base optimizer alone.

    The run supplies class counts and the model, whose last linear layer is CC-SAM's head. It also supplies defaults for its
    seed, for ``m`` (MicroBatchSAM: half a batch) and for ``total_steps``. Options that count steps may be "140ep" (epochs) or
    "70%" (of the run).

    Raises:
        ConfigError: An option is unknown or out of its range.
    """
    check_options(config)
    options = {name: _number_of_steps(name, value, run) for name, value in config.options.items()}
    base = _BASE_OPTIMIZERS[config.optimizer]
    for name in ("lr", "weight_decay") + (("momentum", "nesterov") if config.optimizer == "sgd" else ()):
        options[name] = getattr(config, name)
    params = run.network.parameters()
    try:
        if config.method == "sgd":
            return base(params, **options)
        counts = None if "class_weights" in options else list(run.class_counts)
        active = active_steps(config.active, run.steps_per_epoch, run.steps)
        defaults = supplied(config) | {"total_steps": run.steps, "active": active}
        known = options_of(config.method)
        options = {name: value for name, value in defaults.items() if name in known} | options
        return lf.create(config.method, params, base, model=run.model, class_counts=counts, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.method}: {error}") from error


def _number_of_steps(name: str, value: Any, run: RunInfo) -> Any:
    """Converts "140ep" or "70%" for an option that counts steps; returns anything else as it is."""
    if not isinstance(value, str) or not name.endswith(_STEP_COUNTS):
        return value
    try:
        return number_of_steps(value, run.steps_per_epoch, run.steps)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name} must be a whole number, or as in '140ep' or '70%', got {value!r}") from None
