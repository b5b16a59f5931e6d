"""What ``--help`` tells below the flags: methods, losses and models with their options, and the defaults that apply."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ltsam_fast import models
from ltsam_fast.optim.registry import method_named
from ltsam_fast.train import loss_registry, method_registry
from ltsam_fast.train.config import Config
from ltsam_fast.train.loss_registry import LOSSES
from ltsam_fast.train.method_registry import METHODS


def print_everything(build: Callable[..., Config], chosen: bool) -> None:
    """Prints what there is for the settings that ``build(method=..., loss=...)`` gives: by default those of the command line.

    Args:
        build: Returns the settings.
        chosen: Tell what the options of their method mean.
    """
    config = build()
    wholes = [
        (f"options of {config.method} (--set NAME=VALUE)", _of_method(config) if chosen else {}),
        ("methods, with what --set may change; ltsam train --method NAME --help tells more", _methods(build)),
        ("losses, with what --loss-set may change", _losses(build)),
        ("models (--model)", {", ".join((*models.names(), "timm/NAME", "torchvision/NAME")): ""}),
    ]
    console = Console()
    for title, rows in wholes:
        if rows:
            table = Table.grid(padding=(0, 2, 0, 0))
            for row in rows.items():
                table.add_row(*map(Text, row))
            console.print(Text(f"\n{title}:"), Padding(table, (0, 0, 0, 2)), sep="\n")


def _of_method(config: Config) -> dict[str, str]:
    declared = {} if config.method == "sgd" else method_named(config.method).cls.options
    rows, others = {}, {}
    for name, value in _method_options(config).items():
        if name in declared:
            accepts = declared[name].accepts
            rows[f"{name}={_shown(value)}"] = f"{_plain(declared[name].doc)} {accepts[:1].upper()}{accepts[1:]}."
        else:
            others[name] = value
    return rows | {"base optimizer": _listed(others)}


def _methods(build: Callable[..., Config]) -> dict[str, str]:
    common = method_registry.options_of("sam").keys() - {"rho"}
    rows = {}
    for name in METHODS:
        own = {key: value for key, value in _method_options(build(method=name)).items() if key not in common}
        rows[name] = f"{METHODS[name]}: {_listed(own)}".removesuffix(": ")
    return rows


def _losses(build: Callable[..., Config]) -> dict[str, str]:
    return {name: f"{label}: {_listed(_loss_options(build(loss=name)))}" for name, (label, _) in LOSSES.items()}


def _method_options(config: Config) -> dict[str, Any]:
    known = method_registry.options_of(config.method, config.optimizer)
    supplied = {name: value for name, value in method_registry.supplied(config).items() if name in known}
    return known | supplied | config.options


def _loss_options(config: Config) -> dict[str, Any]:
    known = loss_registry.options_of(config.loss)
    return known | ({"seed": config.seed} if "seed" in known else {}) | config.loss_options


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in options.items())


def _shown(value: Any) -> str:
    return "..." if value is inspect.Parameter.empty else str(value)


def _plain(doc: str) -> str:
    """Returns a docstring's text without its marks."""
    return re.sub(r"(?::\w+:)?(`+)~?(.*?)\1", r"\2", doc)
