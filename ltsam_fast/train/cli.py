"""The commands ``train``, ``compare`` and ``diagnose``. Each setting of :class:`Config` is a flag."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ltsam_fast import command_line
from ltsam_fast.train.config import FIELDS, ConfigError, build, read_file
from ltsam_fast.train.recipes import RECIPES

OK, FAILED, WRONG, INTERRUPTED = 0, 1, command_line.WRONG, 130
"""Exit codes: success; training failed (the loss is not finite); wrong input; Ctrl-C."""


class Parser(command_line.Parser):
    """A parser that raises its errors as ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)


def main(argv: Sequence[str]) -> int:
    """Runs a command, ``argv[0]``; returns the exit code."""
    from ltsam_fast.data import DataError
    from ltsam_fast.train.distributed import rank_and_world_size
    from ltsam_fast.train.loop import Diverged

    command, *arguments = argv
    rank, world_size = rank_and_world_size()
    process = f" (process {rank})" if world_size > 1 else ""
    warnings, log = logging.StreamHandler(sys.stderr), logging.getLogger("ltsam_fast")
    warnings.setFormatter(logging.Formatter(f"ltsam_fast {command}{process}: warning: %(message)s"))
    log.addHandler(warnings)
    try:
        return COMMANDS[command](arguments)
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except (ConfigError, DataError, Diverged) as error:
        message, code = str(error), FAILED if isinstance(error, Diverged) else WRONG
    except OSError as error:
        message, code = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), WRONG
    except ModuleNotFoundError as error:
        message, code = str(error), WRONG
        if (package := str(error.name).partition(".")[0]) in command_line.EXTRAS:
            message = f"needs {package}: pip install 'ltsam_fast[train]'"
    finally:
        log.removeHandler(warnings)
    print(f"ltsam_fast {command}{process}: {' '.join(message.split())}", file=sys.stderr)
    return code


def add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Adds a flag for every setting except ``without``."""
    for name, item in FIELDS.items():
        if name in without:
            continue
        flag, kind = f"--{item.metadata.get('flag', name).replace('_', '-')}", str(item.type).partition(" | ")[0]
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name, "help": item.metadata["help"]}
        if kind == "bool":
            more["action"] = argparse.BooleanOptionalAction
        elif kind.startswith("dict"):
            more |= {"action": "append", "type": _pair, "metavar": "NAME=VALUE"}
        elif "choices" in item.metadata:
            more["choices"] = item.metadata["choices"]
        else:
            more |= {"type": _TYPES[kind], "metavar": _METAVARS.get(kind, "NUMBER")}
        if kind != "bool" and item.default not in (None, argparse.SUPPRESS) and not kind.startswith("dict"):
            shown = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
            more["help"] += f" (default: {shown})"
        parser.add_argument(flag, **more)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the flags ``--config`` and ``--recipe``."""
    parser.add_argument("--config", metavar="FILE", help="settings from a TOML, YAML or JSON file; flags override it")
    parser.add_argument("--recipe", choices=RECIPES, help="published settings (default without --data: digits-lt)")


def given(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the layers of settings from file and flags; later ones override earlier ones."""
    flags = {name: value for name, value in vars(options).items() if name in FIELDS}
    for name in ("options", "loss_options"):
        if name in flags:
            flags[name] = dict(flags[name])
    layers = [read_file(options.config)] if options.config else []
    return [*layers, flags, {"recipe": options.recipe} if options.recipe else {}]


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 160,180, got {text!r}") from None


_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "tuple[int, ...]": _whole_numbers}
_METAVARS = {"str": "NAME", "tuple[int, ...]": "EPOCHS"}


def train_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast train``."""
    parser = Parser(prog="python -m ltsam_fast train", allow_abbrev=False, description=_TRAIN)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/METHOD-LOSS-seedSEED)")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run folder's checkpoint, with its settings"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_sources(parser)
    add_settings(parser)
    options = parser.parse_args(arguments)

    from ltsam_fast.train.distributed import is_rank_zero
    from ltsam_fast.train.log import Console
    from ltsam_fast.train.loop import stored_config, train
    from ltsam_fast.train.run_checkpoint import NAME

    layers = given(options)
    stored = stored_config(options.out) if options.resume and options.out else None
    if stored and not any("recipe" in layer for layer in layers):  # stored settings would override all of a recipe
        layers.insert(0, stored.as_dict())
    config = build(*layers)
    out = options.out or Path("runs") / f"{config.method}-{config.loss}-seed{config.seed}"
    if options.resume and not (out / NAME).exists():
        raise ConfigError(f"--resume: no checkpoint {out / NAME}; leave --resume out to start a run")
    report = None if options.quiet else Console()
    try:
        train(config, out, resume=options.resume, report=report)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to resume: python -m ltsam_fast train --resume --out {out}", file=sys.stderr)
        return INTERRUPTED
    if report and is_rank_zero():
        print(f"wrote {out}/: last.pt, log.csv, log.jsonl, config.json")
    return OK


def compare_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast compare``."""
    parser = Parser(prog="python -m ltsam_fast compare", allow_abbrev=False, description=_COMPARE)
    parser.add_argument("--methods", type=_names, default=["sgd", "sam", "focal_sam"], metavar="A,B", help=_METHODS)
    parser.add_argument("--losses", type=_names, default=["ce"], metavar="A,B", help="losses, or all (default: ce)")
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), metavar="A,B", help="seeds (default: 0,1,2)")
    parser.add_argument("--out", type=Path, default=Path("compare-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    add_sources(parser)
    add_settings(parser, without=("method", "loss", "seed"))
    options = parser.parse_args(arguments)

    from ltsam_fast.train.compare import compare, grid
    from ltsam_fast.train.distributed import is_rank_zero, process_group
    from ltsam_fast.train.log import Cells
    from ltsam_fast.train.loss_registry import LOSSES
    from ltsam_fast.train.method_registry import METHODS

    methods, losses = (
        list(there) if asked == ["all"] else asked
        for asked, there in ((options.methods, METHODS), (options.losses, LOSSES))
    )
    cells = grid(given(options), methods, losses, options.seeds, options.out)
    try:
        with process_group(cells[0].config.device):
            if options.quiet or not is_rank_zero():
                rows, failures = compare(cells, options.out)
            else:
                with Cells(len(cells)) as bar:
                    rows, failures = compare(cells, options.out, report=bar.cell)
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to resume", file=sys.stderr)
        return INTERRUPTED
    if is_rank_zero():
        _show(rows, cells[0].config, options.out)
    for line in failures:
        print(f"ltsam_fast compare: {line}", file=sys.stderr)
    return FAILED if failures else OK


def _show(rows: Sequence[Any], config: Any, out: Path) -> None:
    """Prints the table; in a file or a pipe, as Markdown."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as Terminal
    from rich.markup import escape
    from rich.table import Table

    from ltsam_fast.train.compare import TABLE, best_of, caption, cells_of, head

    if not rows:
        return
    terminal = Terminal()
    if not terminal.is_terminal:
        print((out / TABLE).read_text(encoding="utf-8"))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(head()):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    before = rows[0].loss
    for row in rows:
        if row.loss != before:
            table.add_section()
        before = row.loss
        texts = cells_of(row, best_of(rows), mark="*")
        table.add_row(*(f"[bold]{text.strip('*')}[/bold]" if text.startswith("*") else escape(text) for text in texts))
    width = terminal.measure(table, options=terminal.options.update(width=1000)).maximum
    Terminal(width=max(width, terminal.width)).print(table)  # a narrow terminal wraps lines, but cells are not cut off
    terminal.print(caption(rows, config), highlight=False, markup=False)
    terminal.print(f"wrote {out}/: {TABLE}, table.csv, bars.png, curves.png", highlight=False, markup=False)


def _names(text: str) -> list[str]:
    names = [one.strip() for one in text.split(",") if one.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be names such as a,b, got {text!r}")
    return list(dict.fromkeys(names))


def diagnose_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast diagnose``."""
    parser = Parser(prog="python -m ltsam_fast diagnose", allow_abbrev=False, description=_DIAGNOSE)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint or a run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: diagnostics beside the checkpoint")
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="images to evaluate (default: train)"
    )
    parser.add_argument("--rho", type=float, help="radius of the sharpness (default: the run's, else 0.05)")
    parser.add_argument(
        "--per-class", type=int, default=200, help="maximum number of images per class (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=50, help="maximum number of Hessian-vector products (default: %(default)s)"
    )
    changes = ("data", "test_data", "images", "cache", "loss", "device", "threads")
    add_settings(parser, without=[name for name in FIELDS if name not in changes])
    options = vars(parser.parse_args(arguments))
    if options["per_class"] < 1 or options["iterations"] < 1 or not 0 <= (options["rho"] or 0) < math.inf:
        parser.error("--per-class and --iterations must be at least 1, --rho a finite number >= 0")

    from rich.console import Console as Terminal

    from ltsam_fast.train.diagnose import diagnose

    with Terminal().status("") as status:
        found = diagnose(options.pop("checkpoint"), options.pop("out"), report=status.update, **options)
    print(f"{'class':>14}{'images':>8}{'gradient':>12}{'loss':>10}{'sharpness':>12}")
    for row in found["classes"]:
        numbers = (f"{row[name]:{width}.4g}" if row[name] is not None else f"{'-':>{width}}" for name, width in _WIDTHS)
        print(f"{row['name']:>14}{row['images']:>8}" + "".join(numbers))
    for name, value in found["hessian"].items():
        if value:
            note = "" if value["converged"] else " (not converged)"
            print(f"top Hessian eigenvalue, {name}: {value['top_eigenvalue']:.4g} ± {value['residual']:.2g}{note}")
    print(f"wrote {found['folder']}/: diagnostics.json, class_grad_norms.png, class_sharpness.png, loss_slice.png")
    return OK


_WIDTHS = (("gradient_norm", 12), ("loss", 10), ("sharpness", 12))
_DIAGNOSE = (
    "Computes from a checkpoint the gradient norm and sharpness of each class, the top Hessian eigenvalue of head and tail, "
    "and a slice of the loss; writes diagnostics.json and plots."
)
_COMPARE = (
    "Trains a grid of methods, losses and seeds, one run folder per cell, and writes a table and charts. Finished cells are "
    "not trained again. An option without a prefix applies to all methods that have it."
)
_METHODS = "methods, or all (default: sgd,sam,focal_sam)"
_TRAIN = (
    "Trains a network on long-tailed data. Settings come from a recipe, a file and flags; the later override the earlier. "
    "A run that was stopped or killed continues exactly with --resume."
)
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "compare": compare_command,
    "diagnose": diagnose_command,
}
