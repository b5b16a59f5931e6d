"""The commands ``train``, ``compare`` and ``diagnose``. Each setting of :class:`Config` is a flag."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ltsam_fast import command_line
from ltsam_fast.train.config import FIELDS, ConfigError, build, parsed, read_file
from ltsam_fast.train.recipes import RECIPES

OK, FAILED, WRONG, INTERRUPTED = 0, 1, command_line.WRONG, 130
"""Exit codes: success; training failed (the loss is not finite); wrong input; Ctrl-C."""


class Parser(command_line.Parser):
    """The parser of a command. It raises its errors as ConfigError; its ``--help`` tells what applies with the other arguments.

    Flags are accepted with underscores as well, as they stand in config files.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"ltsam {command}", description=description, allow_abbrev=False, add_help=False)
        more: dict[str, Any] = {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("-h", "--help", action=_Help, help="show this, with the defaults that apply", **more)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the arguments, those in ``--config`` included unless they are settings, see :func:`given`."""
        dashed = [_dashed(one) for one in arguments]
        dashed.sort(key=lambda one: one in ("-h", "--help"))  # it tells about all others
        options = self.parse_args(dashed)
        if getattr(options, "config", None):
            flags = {one.dest: one.option_strings[-1] for one in self._actions if one.dest in _others(options)}
            found = read_file(options.config).items()
            first = [_as_flag(flags[name], value) for name, value in found if name in flags and value is not False]
            options = self.parse_args([*first, *dashed])
        return options


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Prints the help and exits."""
        from ltsam_fast.train.describe import everything

        layers, flags = given(namespace), {action.dest: action for action in parser._actions}
        if "recipe" not in flags:  # the settings are those of a protocol or of a run
            parser.print_help()
            parser.exit()
        if any("recipe" in layer for layer in layers):
            layers.insert(0, {"data": "DIR"})
        for name, value in vars(build(*layers)).items():
            if name in flags and value is not None and not isinstance(value, dict):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                text, *_ = flags[name].help.partition("; default:")
                flags[name].help = f"{text} (default: {shown.replace('%', '%%')})"
        parser.print_help()
        print(f"\n{everything(lambda **changes: build(*layers, changes), chosen='method' in flags)}")
        parser.exit()


def _dashed(argument: str) -> str:
    flag, sign, value = argument.partition("=")
    return f"{flag.replace('_', '-')}{sign}{value}" if flag.startswith("--") else argument


def _as_flag(flag: str, value: Any) -> str:
    if value is True:
        return flag
    return f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"


def main(argv: Sequence[str]) -> int:
    """Runs a command, ``argv[0]``; returns the exit code."""
    from ltsam_fast.data import DataError
    from ltsam_fast.train.compare import Killed
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
    except (ConfigError, DataError, Diverged, Killed) as error:
        message, code = str(error), FAILED if isinstance(error, (Diverged, Killed)) else WRONG
    except RuntimeError as error:
        if world_size == 1:
            raise
        traceback.print_exc()
        message, code = f"{error}; another process may have failed or hang: see what it says, then resume", FAILED
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
        kind = str(item.type).partition(" | ")[0]
        flags = [f"--{one.replace('_', '-')}" for one in (name, item.metadata.get("flag", name))]
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name, "help": item.metadata["help"]}
        if kind == "bool":
            more["action"] = argparse.BooleanOptionalAction
        elif kind.startswith("dict"):
            more |= {"action": "append", "type": _pair, "metavar": "NAME=VALUE"}
        elif "choices" in item.metadata:
            more["choices"] = item.metadata["choices"]
        else:
            more |= {"type": _TYPES[kind], "metavar": _METAVARS.get(kind, "NUMBER")}
        parser.add_argument(*dict.fromkeys(flags), **more)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the flags ``--config`` and ``--recipe``."""
    parser.add_argument("--config", metavar="FILE", help="settings from a TOML, YAML or JSON file; flags override it")
    parser.add_argument("--recipe", choices=RECIPES, help="published settings (default without --data: digits-lt)")


def given(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the layers of settings from file and flags; later ones override earlier ones."""
    layers = []
    if getattr(options, "config", None):
        found = read_file(options.config).items()
        layers = [{name: value for name, value in found if name not in _others(options)}]
    recipe = getattr(options, "recipe", None)
    return [*layers, settings_of(options), {"recipe": recipe} if recipe else {}]


def _others(options: argparse.Namespace) -> set[str]:
    """Returns the names of the arguments that are no settings of runs and may stand in a config file."""
    return vars(options).keys() - FIELDS.keys() - {"config", "recipe"}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings among the arguments."""
    flags = {name: value for name, value in vars(options).items() if name in FIELDS}
    return {name: dict(value) if name in ("options", "loss_options") else value for name, value in flags.items()}


def _pair(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, parsed(value)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 160,180, got {text!r}") from None


_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "tuple[int, ...]": _whole_numbers}
_METAVARS = {"str": "NAME", "tuple[int, ...]": "EPOCHS"}


def train_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast train``."""
    parser = Parser("train", _TRAIN)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/METHOD-LOSS-seedSEED)")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run folder's checkpoint, with its settings"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder, if it has one")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_sources(parser)
    add_settings(parser)
    options = parser.parse(arguments)

    from ltsam_fast.train.distributed import is_rank_zero
    from ltsam_fast.train.log import Console
    from ltsam_fast.train.loop import stored_config, train
    from ltsam_fast.train.run_checkpoint import BEST, LEFT_OUT, NAME, TEST, exists

    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    layers = given(options)
    stored = stored_config(options.out) if options.resume and options.out else None
    if stored and not any("recipe" in layer for layer in layers):  # stored settings would override all of a recipe
        layers.insert(0, stored.as_dict())
    config = build(*layers)
    out = options.out or Path("runs") / f"{config.method}-{config.loss}-seed{config.seed}"
    if options.resume and not exists(out):
        raise ConfigError(f"--resume: no checkpoint {out / NAME}; leave --resume out to start a run")
    report = None if options.quiet else Console()
    try:
        train(config, out, resume=options.resume, overwrite=options.overwrite, report=report)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to resume: python -m ltsam_fast train --resume --out {out}", file=sys.stderr)
        return INTERRUPTED
    if report and report.epochs and is_rank_zero():
        names = (NAME, BEST, TEST, LEFT_OUT, "log.csv", "log.jsonl", "config.json")
        if config.val_share is not None:
            print(_tested(json.loads((out / TEST).read_text(encoding="utf-8"))))
        print(f"wrote {out}/: {', '.join(name for name in names if (out / name).exists())}")
    return OK


def _tested(row: dict[str, Any]) -> str:
    groups = (f"{name} {row[name]:.2f}" for name in ("all", "many", "medium", "few") if row[name] is not None)
    return f"the test images, with the weights of epoch {row['epoch']}, the best on held-out ones: {', '.join(groups)}"


def compare_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast compare``."""
    parser = Parser("compare", _COMPARE)
    parser.add_argument("--methods", type=_names, default=["sgd", "sam", "focal_sam"], metavar="A,B", help=_METHODS)
    parser.add_argument("--losses", type=_names, default=["ce"], metavar="A,B", help="losses, or all (default: ce)")
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), metavar="A,B", help="seeds (default: 0,1,2)")
    parser.add_argument("--out", type=Path, default=Path("compare-out"), metavar="DIR", help="default: %(default)s")
    _add_pace(parser)
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    add_sources(parser)
    add_settings(parser, without=("method", "loss", "seed"))
    options = parser.parse(arguments)
    pace = _pace(options)

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
                rows, failures = compare(cells, options.out, **pace)
            else:
                with Cells(len(cells)) as bar:
                    rows, failures = compare(cells, options.out, report=bar.cell, progress=True, **pace)
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to resume", file=sys.stderr)
        return INTERRUPTED
    if is_rank_zero():
        _show(rows, cells[0].config, options.out)
    for line in failures:
        print(f"ltsam_fast compare: {line}", file=sys.stderr)
    return FAILED if failures else OK


def evidence_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast evidence``."""
    parser = Parser("evidence", _EVIDENCE)
    parser.add_argument("protocol", help="a TOML, YAML or JSON file, such as bench/evidence/digits-lt.toml")
    parser.add_argument("--out", type=Path, default=Path("evidence-out"), metavar="DIR", help="default: %(default)s")
    _add_pace(parser)
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    add_settings(parser, without=("method", "loss", "seed"))
    options = parser.parse(arguments)
    pace = _pace(options)

    from ltsam_fast.train.evidence import evidence
    from ltsam_fast.train.log import Cells

    changes = settings_of(options)
    with contextlib.ExitStack() as bars:

        def report(cells: Sequence[Any]) -> Callable[[Any], Any]:
            return (lambda cell: None) if options.quiet else bars.enter_context(Cells(len(cells))).cell

        try:
            pace["progress"] = not options.quiet
            rows, failures = evidence(read_file(options.protocol), options.out, changes, report=report, **pace)
        except KeyboardInterrupt:
            print("\ninterrupted; repeat the command to resume", file=sys.stderr)
            return INTERRUPTED
    if rows:
        print((options.out / "test" / "table.md").read_text(encoding="utf-8"))
    for line in failures:
        print(f"ltsam_fast evidence: {line}", file=sys.stderr)
    return FAILED if failures else OK


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="processes that train side by side (default: 1)")
    parser.add_argument(
        "--together", type=int, default=1, help="runs that each process trains in turns on its GPU (default: 1)"
    )
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further run begins")


def _pace(options: argparse.Namespace) -> dict[str, Any]:
    if options.jobs < 1 or options.together < 1 or not options.limit >= 0:
        raise ConfigError("--jobs and --together must be at least 1, --limit at least 0")
    return {name: getattr(options, name) for name in ("jobs", "together", "limit")}


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
    terminal.print(
        f"wrote {out}/: {TABLE}, table.csv, results.json, bars.png, curves.png", highlight=False, markup=False
    )


def _names(text: str) -> list[str]:
    names = [one.strip() for one in text.split(",") if one.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be names such as a,b, got {text!r}")
    return list(dict.fromkeys(names))


def diagnose_command(arguments: Sequence[str]) -> int:
    """``python -m ltsam_fast diagnose``."""
    parser = Parser("diagnose", _DIAGNOSE)
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
    options = vars(parser.parse(arguments))
    if options["per_class"] < 1 or options["iterations"] < 1 or not 0 <= (options["rho"] or 0) < math.inf:
        parser.error("--per-class and --iterations must be at least 1, --rho a finite number >= 0")

    from ltsam_fast.extras import progress_bars
    from ltsam_fast.train.diagnose import diagnose

    with progress_bars() as bars:
        task = bars.add_task("", total=None)

        def report(stage: str) -> None:
            bars.update(task, description=stage)

        found = diagnose(options.pop("checkpoint"), options.pop("out"), report=report, progress=True, **options)
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
_EVIDENCE = (
    "Compares methods by a protocol: their options are chosen on images held out of the training images, then the chosen ones "
    "are trained with other seeds and tested once. What is finished is not trained again."
)
_METHODS = "methods, or all, or variants such as sam+rho=0.1+active=0.3 (default: sgd,sam,focal_sam)"
_TRAIN = (
    "Trains a network on long-tailed data. Settings come from a recipe, a file and flags; the later override the earlier. "
    "A run that was stopped or killed continues exactly with --resume."
)
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "compare": compare_command,
    "evidence": evidence_command,
    "diagnose": diagnose_command,
}
