"""What is told of a run: files, TensorBoard, and the terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ltsam_fast.train import checkpoint

GROUPS = ("all", "many", "medium", "few")
COLUMNS = ("epoch", "lr", "train_loss", *GROUPS, "seconds", "eval_seconds")


class Logs:
    """``log.csv``, ``log.jsonl`` (with the accuracy of each class) and TensorBoard's events in a run folder.

    The two files are written whole each epoch: they never disagree with the checkpoint, whose history they show.
    """

    def __init__(self, out: Path, history: Sequence[dict[str, Any]], tensorboard: bool) -> None:
        self.out, self.rows, self.board = out, list(history), None
        out.mkdir(parents=True, exist_ok=True)
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=len(self.rows) + 1)
        if self.rows:
            self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Logs an epoch."""
        self.rows.append(row)
        self._write()
        if self.board:
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
        checkpoint.write(self.out / "log.csv", table.getvalue().encode())
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        checkpoint.write(self.out / "log.jsonl", lines.encode())

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self.board:
            self.board.close()


class Silent:
    """Tells nothing. A reporter is a context, and is told of the run's begin, of steps, and of epochs."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, run: Any) -> None:
        """The run, a ``loop.Run``, is ready."""

    def advance(self, steps: int) -> None:
        """Steps were taken."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended with this row."""


class Console(Silent):
    """A progress bar with the time left, above it a line for each epoch."""

    def __init__(self, title: str = "") -> None:
        from rich.console import Console as Terminal
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.title, self.epochs = title, 0
        self.terminal = Terminal()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, [progress.elapsed]"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
        )

    def __enter__(self) -> Console:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def begin(self, run: Any) -> None:
        """Prints what is trained on what, and the head of the table."""
        config, counts = run.config, run.counts
        per_epoch = -(-len(run.train.labels) // config.batch_size)
        size = sum(param.numel() for param in run.network.parameters())
        self.epochs = config.epochs
        self._print(
            f"{config.method}, {config.loss}: {config.model} ({size:,} parameters) on {len(run.train.labels):,} images of "
            f"{len(counts)} classes ({max(counts)} to {min(counts)} each), tested on {len(run.test.labels):,}; "
            f"{config.epochs} epochs of {per_epoch} steps on {run.at.device}"
            + (f" x {run.at.size}" * (run.at.size > 1))
        )
        self._print("".join(f"{name:>10}" for name in ("epoch", "lr", "loss", *GROUPS, "seconds")))
        self.task = self.bar.add_task(self.title or config.method, total=config.epochs * per_epoch)
        self.bar.advance(self.task, run.epoch * per_epoch)

    def advance(self, steps: int) -> None:
        """Moves the bar."""
        self.bar.advance(self.task, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        """Prints the epoch's line."""
        values = [f"{row['lr']:.4g}", f"{row['train_loss']:.4f}"]
        values += ["-" if row[name] is None else f"{row[name]:.2f}" for name in GROUPS]
        values.append(f"{row['seconds']:.2f}")
        self._print(f"{row['epoch']:>10}" + "".join(f"{value:>10}" for value in values))

    def _print(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
