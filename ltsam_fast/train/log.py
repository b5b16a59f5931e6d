"""Logs a run to files, TensorBoard and the terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ltsam_fast import atomic, data
from ltsam_fast.extras import needed, progress_bars

GROUPS = ("all", "many", "medium", "few")
COLUMNS = ("epoch", "lr", "train_loss", *GROUPS, "seconds", "eval_seconds")


class Logs:
    """Writes ``log.csv``, ``log.jsonl`` (with the accuracy of each class) and TensorBoard's events to a run folder.

    Both files are rewritten each epoch from the checkpoint's history, so they always agree with it.
    """

    def __init__(self, out: Path, history: Sequence[dict[str, Any]], tensorboard: bool | None) -> None:
        self.out, self.rows, self.board = out, list(history), None
        out.mkdir(parents=True, exist_ok=True)
        if importlib.util.find_spec("tensorboard") if tensorboard is None else tensorboard:
            writer = needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self.board = writer(out / "tensorboard", purge_step=len(self.rows) + 1)
        if self.rows:
            self._write()

    def write(self, history: Sequence[dict[str, Any]]) -> None:
        """Logs the epochs that were added to the history."""
        new, self.rows = history[len(self.rows) :], list(history)
        self._write()
        if self.board:
            for row in new:
                for name in COLUMNS[1:]:
                    if row[name] is not None:
                        kind = "accuracy/" if name in GROUPS else ""
                        self.board.add_scalar(f"{kind}{name}", row[name], row["epoch"])
            self.board.flush()

    def _write(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic.write(self.out / "log.csv", table.getvalue().encode())
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        atomic.write(self.out / "log.jsonl", lines.encode())

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self.board:
            self.board.close()


class Silent:
    """A reporter that prints nothing. A reporter is a context; the loop calls ``begin``, ``advance`` and ``epoch``."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, run: Any) -> None:
        """Called with the ``run.Run`` before its first step."""

    def advance(self, steps: int) -> None:
        """Called after steps."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Called with the row of a finished epoch."""


class Console(Silent):
    """Shows a progress bar with the remaining time, and prints a line for each epoch."""

    def __init__(self) -> None:
        self.epochs = 0

    def __enter__(self) -> Console:
        self.bars = progress_bars()
        self.bar = self.bars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.__exit__(*error)

    def begin(self, run: Any) -> None:
        """Prints the run's settings and the header of the table."""
        config, counts = run.config, run.counts
        devices = f" x {run.dist.world_size}" if run.dist.world_size > 1 else ""
        size = sum(param.numel() for param in run.network.parameters())
        _print(
            self.bar,
            f"{config.method}, {config.loss}: {config.model} ({size:,} parameters) on {len(run.train.labels):,} images of "
            f"{len(counts)} classes ({max(counts)} to {min(counts)} each), tested on {len(run.test.labels):,}; "
            f"{config.epochs} epochs of {run.steps} steps on {run.dist.device}{devices}",
        )
        if run.epoch >= config.epochs:
            _print(self.bar, f"{config.epochs} of {config.epochs} epochs are finished: there is nothing to resume")
            return
        groups = data.shot_split(counts, config.many, config.few)
        if empty := [name for name in groups if not len(groups[name])]:
            limits = data.shot_limits(counts)
            advice = "; --many {} --few {} leave no group empty".format(*limits) if limits else ""
            _print(self.bar, f"no class is {' or '.join(empty)} with --many {config.many} --few {config.few}{advice}")
        _print(self.bar, "".join(f"{name:>10}" for name in ("epoch", "lr", "loss", *GROUPS, "seconds")))
        self.task = self.bar.add_task(config.method, total=config.epochs * run.steps, completed=run.epoch * run.steps)

    def advance(self, steps: int) -> None:
        """Moves the bar."""
        self.bar.advance(self.task, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        """Prints the epoch's line."""
        self.epochs += 1
        values = [str(row["epoch"]), f"{row['lr']:.4g}", f"{row['train_loss']:.4f}", *_accuracies(row)]
        _print(self.bar, "".join(f"{value:>10}" for value in (*values, f"{row['seconds']:.2f}")))


class Cells:
    """Shows the progress of a grid: one bar for its cells, one for the steps of the current cell."""

    def __init__(self, cells: int) -> None:
        self.begun, self.cells = 0, cells

    def __enter__(self) -> Cells:
        self.bars = progress_bars()
        self.bar = self.bars.__enter__()
        self.all = self.bar.add_task("cells", total=self.cells)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.remove_task(self.all)
        self.bars.__exit__(*error)

    def cell(self, cell: Any) -> Silent:
        """Returns the reporter of the next cell, a ``compare.Cell``."""
        self.bar.update(self.all, completed=self.begun)
        self.begun += 1
        return _OneCell(
            self.bar, f"{self.begun}/{self.cells} {cell.variant}, {cell.config.loss}, seed {cell.config.seed}"
        )


class _OneCell(Silent):
    def __init__(self, bar: Any, name: str) -> None:
        self.bar, self.name = bar, name
        self.last: dict[str, Any] | None = None
        self.task: Any = None

    def __exit__(self, *error: Any) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        if self.last:
            _print(
                self.bar,
                f"{self.name}: " + ", ".join(f"{g} {a}" for g, a in zip(GROUPS, _accuracies(self.last), strict=True)),
            )

    def begin(self, run: Any) -> None:
        total = run.config.epochs * run.steps
        self.task = self.bar.add_task(self.name, total=total, completed=run.epoch * run.steps)

    def advance(self, steps: int) -> None:
        self.bar.advance(self.task, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        self.last = row


def _print(bar: Any, text: str) -> None:
    bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _accuracies(row: dict[str, Any]) -> list[str]:
    return ["-" if row[name] is None else f"{row[name]:.2f}" for name in GROUPS]
