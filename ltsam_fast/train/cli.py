"""The commands ``train``, ``compare``, ``evidence`` and ``diagnose``. Each setting of :class:`Config` is a flag."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_settings import CliPositionalArg, CliToggleFlag

from ltsam_fast import command_line
from ltsam_fast.train.config import FIELDS, ConfigError, build, read_file, setting
from ltsam_fast.train.flags import Flags, FlagsAndFiles, Layers, parse

OK, FAILED, WRONG, INTERRUPTED = 0, 1, command_line.WRONG, 130
"""Exit codes: success; training failed (the loss is not finite); wrong input; Ctrl-C."""


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
        with command_line.interruptible():
            options, layers = parse(COMMANDS[command], command, arguments)
            return options.run(layers)
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except (ConfigError, DataError, Diverged, Killed) as error:
        message, code = str(error), FAILED if isinstance(error, (Diverged, Killed)) else WRONG
    except RuntimeError as error:
        if world_size == 1:
            raise
        traceback.print_exc()
        message, code = f"{error}; another process may have failed or hang: see what it says, then resume", FAILED
    except (OSError, ModuleNotFoundError) as error:
        message, code = command_line.in_words(error, "train"), WRONG
    finally:
        log.removeHandler(warnings)
    print(f"ltsam_fast {command}{process}: {' '.join(message.split())}", file=sys.stderr)
    return code


class Train(FlagsAndFiles):
    """Trains a network on long-tailed data. Settings come from a recipe, a file and flags; the later override the earlier.

    A run that was stopped or killed continues exactly with --resume.
    """

    settings = tuple(FIELDS)
    out: Path | None = setting(None, "run folder; default: runs/METHOD-LOSS-seedSEED")
    resume: CliToggleFlag[bool] = setting(False, "resume from the run folder's checkpoint, with its settings")
    overwrite: CliToggleFlag[bool] = setting(False, "replace the run in the run folder, if it has one")
    quiet: CliToggleFlag[bool] = setting(False, "print nothing but errors")

    def run(self, layers: Layers) -> int:
        """Trains; returns the exit code."""
        from ltsam_fast.train.distributed import is_rank_zero
        from ltsam_fast.train.log import Console
        from ltsam_fast.train.loop import stored_config, train
        from ltsam_fast.train.run_checkpoint import BEST, LEFT_OUT, NAME, TEST, exists

        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        stored = stored_config(self.out) if self.resume and self.out else None
        if stored and not any("recipe" in layer for layer in layers):  # stored settings would override all of a recipe
            layers.insert(0, stored.as_dict())
        config = build(*layers)
        out = self.out or Path("runs") / f"{config.method}-{config.loss}-seed{config.seed}"
        if self.resume and not exists(out):
            raise ConfigError(f"--resume: no checkpoint {out / NAME}; leave --resume out to start a run")
        report = None if self.quiet else Console()
        try:
            train(config, out, resume=self.resume, overwrite=self.overwrite, report=report)
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


class Pace(Flags):
    """How a grid of runs is trained."""

    settings = tuple(name for name in FIELDS if name not in ("method", "loss", "seed"))
    jobs: int = setting(1, "processes that train side by side", ge=1)
    together: int = setting(1, "runs that each process trains in turns on its GPU", ge=1)
    limit: float = setting(math.inf, "seconds after which no further run begins", ge=0)
    quiet: CliToggleFlag[bool] = setting(False, "print the table only")

    def train(self, layers: Layers, **pace: Any) -> list[str]:
        """Trains the grid; returns a line for each run that failed."""
        raise NotImplementedError

    def run(self, layers: Layers) -> int:
        """Trains the grid; returns the exit code."""
        try:
            failures = self.train(layers, **self.model_dump(include={"jobs", "together", "limit"}))
        except KeyboardInterrupt:
            print("\ninterrupted; repeat the command to resume", file=sys.stderr)
            return INTERRUPTED
        for line in failures:
            print(f"ltsam_fast {type(self).__name__.lower()}: {line}", file=sys.stderr)
        return FAILED if failures else OK


_LISTED = BeforeValidator(lambda value: value if isinstance(value, list) else str(value).split(","))
"""A file may have "a,b" for a list, as flags do."""


class Compare(Pace, FlagsAndFiles):
    """Trains a grid of methods, losses and seeds, one run folder per cell, and writes a table and charts.

    Finished cells are not trained again. An option without a prefix applies to all methods that have it.
    """

    methods: Annotated[list[str], _LISTED] = setting(
        ["sgd", "sam", "focal_sam"], "methods, or all, or variants such as sam+rho=0.1+active=0.3"
    )
    losses: Annotated[list[str], _LISTED] = setting(["ce"], "losses, or all")
    seeds: Annotated[list[int], _LISTED] = setting([0, 1, 2], "seeds")
    out: Path = setting(Path("compare-out"), "output folder")

    def train(self, layers: Layers, **pace: Any) -> list[str]:
        """Trains the grid and shows the table."""
        from ltsam_fast.train.compare import compare, grid
        from ltsam_fast.train.distributed import is_rank_zero, process_group
        from ltsam_fast.train.log import Cells
        from ltsam_fast.train.loss_registry import LOSSES
        from ltsam_fast.train.method_registry import METHODS

        methods, losses = (
            list(there) if asked == ["all"] else asked
            for asked, there in ((self.methods, METHODS), (self.losses, LOSSES))
        )
        cells = grid(layers, methods, losses, self.seeds, self.out)
        with process_group(cells[0].config.device):
            if self.quiet or not is_rank_zero():
                rows, failures = compare(cells, self.out, **pace)
            else:
                with Cells(len(cells)) as bar:
                    rows, failures = compare(cells, self.out, report=bar.cell, progress=True, **pace)
        if is_rank_zero():
            _show(rows, cells[0].config, self.out)
        return failures


class Evidence(Pace):
    """Compares methods by a protocol: their options are chosen on images held out of the training images.

    The chosen ones are trained with other seeds and tested once. What is finished is not trained again.
    """

    protocol: CliPositionalArg[Path] = setting(..., "a TOML, YAML or JSON file, such as bench/evidence/digits-lt.toml")
    out: Path = setting(Path("evidence-out"), "output folder")

    def train(self, layers: Layers, **pace: Any) -> list[str]:
        """Runs the protocol and shows the table."""
        from ltsam_fast.train.evidence import evidence
        from ltsam_fast.train.log import Cells

        with contextlib.ExitStack() as bars:

            def report(cells: Sequence[Any]) -> Callable[[Any], Any]:
                return (lambda cell: None) if self.quiet else bars.enter_context(Cells(len(cells))).cell

            pace |= {"report": report, "progress": not self.quiet}
            rows, failures = evidence(read_file(self.protocol), self.out, layers[-1], **pace)
        if rows:
            print((self.out / "test" / "table.md").read_text(encoding="utf-8"))
        return failures


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


class Diagnose(Flags):
    """Computes from a checkpoint the gradient norm and sharpness of each class, and a slice of the loss.

    Also the top Hessian eigenvalue of head and tail; writes diagnostics.json and plots.
    """

    settings = ("data", "test_data", "images", "cache", "loss", "device", "threads")
    checkpoint: CliPositionalArg[Path] = setting(..., "a checkpoint or a run folder")
    out: Path | None = setting(None, "output folder; default: diagnostics beside the checkpoint")
    split: Literal["train", "test"] = setting("train", "images to evaluate")
    rho: float | None = setting(
        None, "radius of the sharpness; default: the run's, else 0.05", ge=0, allow_inf_nan=False
    )
    per_class: int = setting(200, "maximum number of images per class", ge=1)
    iterations: int = setting(50, "maximum number of Hessian-vector products", ge=1)

    def run(self, layers: Layers) -> int:
        """Evaluates the checkpoint; returns the exit code."""
        from ltsam_fast.extras import progress_bars
        from ltsam_fast.train.diagnose import diagnose

        asked = self.model_dump(include={"split", "rho", "per_class", "iterations"})
        with progress_bars() as bars:
            task = bars.add_task("", total=None)

            def report(stage: str) -> None:
                bars.update(task, description=stage)

            found = diagnose(self.checkpoint, self.out, report=report, progress=True, **asked, **layers[-1])
        print(f"{'class':>14}{'images':>8}{'gradient':>12}{'loss':>10}{'sharpness':>12}")
        for row in found["classes"]:
            numbers = (
                f"{row[name]:{width}.4g}" if row[name] is not None else f"{'-':>{width}}" for name, width in _WIDTHS
            )
            print(f"{row['name']:>14}{row['images']:>8}" + "".join(numbers))
        for name, value in found["hessian"].items():
            if value:
                note = "" if value["converged"] else " (not converged)"
                print(f"top Hessian eigenvalue, {name}: {value['top_eigenvalue']:.4g} ± {value['residual']:.2g}{note}")
        print(f"wrote {found['folder']}/: diagnostics.json, class_grad_norms.png, class_sharpness.png, loss_slice.png")
        return OK


_WIDTHS = (("gradient_norm", 12), ("loss", 10), ("sharpness", 12))
COMMANDS: dict[str, type[Flags]] = {one.__name__.lower(): one for one in (Train, Compare, Evidence, Diagnose)}
