"""Trains a grid of methods, losses and seeds, one run folder per cell; writes a table and charts."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltsam_fast.data import DataError, Images
from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.train import run_checkpoint
from ltsam_fast.train.config import Config, ConfigError, build
from ltsam_fast.train.distributed import is_rank_zero, rank_and_world_size
from ltsam_fast.train.log import GROUPS
from ltsam_fast.train.loop import Diverged, check_folder, finished, train
from ltsam_fast.train.loss_registry import check_options as check_loss
from ltsam_fast.train.loss_registry import label as loss_label
from ltsam_fast.train.loss_registry import options_of as loss_options_of
from ltsam_fast.train.method_registry import METHODS, check_options
from ltsam_fast.train.method_registry import options_of as method_options_of
from ltsam_fast.train.run import check, load_images

_ACCURACY = "accuracy (%)"
TABLE = "table.md"

_LOG = logging.getLogger("ltsam_fast")


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    config: Config
    folder: Path


@dataclass(frozen=True)
class Row:
    """The results of a method with a loss over its seeds; accuracies in percent.

    Attributes:
        method: Name of the method.
        loss: Name of the loss.
        seeds: Number of seeds.
        accuracies: Group -> (mean, std); std is None for a single seed, the pair is None for a group without classes.
        seconds: Median training time of an epoch.
        curve: (mean, std) of ``all`` for each epoch.
    """

    method: str
    loss: str
    seeds: int
    accuracies: Mapping[str, tuple[float, float | None] | None]
    seconds: float
    curve: Sequence[tuple[float, float | None]]


def grid(
    layers: Sequence[Mapping[str, Any]], methods: Sequence[str], losses: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Returns the cells of a grid, seed by seed. An option without a prefix applies to all methods, or losses, that have it.

    Raises:
        ConfigError: A setting of a cell is wrong, or no method or loss has an option.
    """
    cells = []
    known = {
        "options": {name: method_options_of(name) for name in methods},
        "loss_options": {name: loss_options_of(name) for name in losses},
    }
    for key, owners in known.items():
        for name in (name for layer in layers for name in layer.get(key, {})):
            if "." not in name and not any(name in options for options in owners.values()):
                meant = did_you_mean(name, {option for options in owners.values() for option in options})
                raise ConfigError(f"none of {', '.join(owners)} has an option {name!r}{meant}".rstrip("."))
    for seed, loss, method in itertools.product(dict.fromkeys(seeds), losses, methods):
        own = {"options": known["options"][method], "loss_options": known["loss_options"][loss]}
        filtered = [
            {
                key: {name: one for name, one in value.items() if "." in name or name in own[key]}
                if key in own
                else value
                for key, value in layer.items()
            }
            for layer in layers
        ]
        config = build(*filtered, {"method": method, "loss": loss, "seed": seed})
        check_options(config)
        check_loss(config)
        cells.append(Cell(config, out / f"{method}-{loss}" / f"seed{seed}"))
    return cells


def compare(
    cells: Sequence[Cell], out: str | Path, *, report: Callable[[Cell], Any] = lambda cell: None
) -> tuple[list[Row], list[str]]:
    """Trains the unfinished cells and writes ``table.md``, ``table.csv``, ``bars.png`` and ``curves.png``.

    Finished cells are read, a stopped one is resumed. Accuracies are those of the last epoch. A cell that fails is left out of
    the table, and the others are still trained; wrong settings are an error before anything is trained.

    Args:
        cells: Those of :func:`grid`.
        out: Folder for table and charts.
        report: Returns the reporter of a cell's run, see ``log.Silent``.

    Returns:
        The rows of the table, and a line for each cell that failed.

    Raises:
        ConfigError: A setting does not fit, or a cell's folder has a run with other settings or images.
        DataError: Something is wrong with the data.
    """
    out = Path(out)
    check_folder(out)
    images: tuple[Images, Images] | None = None
    try:
        images = load_images(cells[0].config)
    except DataError as error:  # a table of finished runs needs no images
        if any(finished(cell.config, cell.folder, None) is None for cell in cells):
            raise
        _LOG.warning("%s: the images of the finished runs are not checked", error)
    earlier = [finished(cell.config, cell.folder, images) for cell in cells]
    if images is not None and None in earlier:
        for cell in cells:
            check(cell.config, images[0])
    histories: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    failures = []
    for cell, history in zip(cells, earlier, strict=True):
        reporter = report(cell)
        if history is None:
            try:
                history = train(cell.config, cell.folder, resume=True, report=reporter, images=images)
            except Exception as error:  # the other cells are still to be trained
                failures.append(_failure(cell, error))
                continue
            _trace(cell).unlink(missing_ok=True)
        histories.setdefault((cell.config.method, cell.config.loss), []).append(history)
    rows = [summary(method, loss, found) for (method, loss), found in histories.items()]
    rows.sort(key=lambda row: [cell.config.loss for cell in cells].index(row.loss))
    if rows and is_rank_zero():
        _write(rows, cells[0].config, out)
    return rows, failures


def _failure(cell: Cell, error: Exception) -> str:
    """Returns the line that reports a failed cell; writes a traceback unless its loss was not finite.

    With several processes other errors are raised: the other processes may not have failed, and would wait for this one.
    """
    if isinstance(error, Diverged):
        return f"{cell.folder}: {error}"
    if rank_and_world_size()[1] > 1:
        raise error
    trace = _trace(cell)
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{cell.folder}: {type(error).__name__}: {' '.join(str(error).split())[:200]}; traceback in {trace}"


def _trace(cell: Cell) -> Path:
    return cell.folder.with_suffix(".error.txt")


def summary(method: str, loss: str, histories: Sequence[Sequence[dict[str, Any]]]) -> Row:
    """Returns the row of a method and a loss from the histories of its seeds."""
    accuracies = {}
    for group in GROUPS:
        values = [history[-1][group] for history in histories]
        accuracies[group] = None if None in values else _mean_and_std(values)
    seconds = statistics.median(row["seconds"] for history in histories for row in history)
    curve = [_mean_and_std([row["all"] for row in rows]) for rows in zip(*histories, strict=True)]
    return Row(method, loss, len(histories), accuracies, seconds, curve)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def cells_of(row: Row, best: Mapping[str, float] | None = None, mark: str = "**") -> list[str]:
    """Returns the row's cells as texts, with the best mean of each column between ``mark``.

    >>> cells_of(Row("sam", "ce", 2, {"all": (71.26, 0.5), "few": None}, 1.5, []), {"all": 71.26})
    ['SAM', 'CE', '**71.3 ± 0.5**', '-', '1.50']
    """
    texts = [METHODS[row.method], loss_label(row.loss)]
    for group, accuracy in row.accuracies.items():
        if accuracy is None:
            texts.append("-")
            continue
        mean, std = accuracy
        around = mark if best and best.get(group) == mean else ""
        texts.append(f"{around}{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "") + around)
    return [*texts, f"{row.seconds:.2f}"]


def head() -> list[str]:
    """Returns the names of the table's columns."""
    return ["method", "loss", *GROUPS, "s / epoch"]


def best_of(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the best mean of each group."""
    means = {group: [row.accuracies[group][0] for row in rows if row.accuracies[group]] for group in GROUPS}  # type: ignore[index]
    return {group: max(values) for group, values in means.items() if values}


def caption(rows: Sequence[Row], config: Config) -> str:
    """Returns the caption of the table."""
    seeds = {row.seeds for row in rows}
    over = f"mean ± std over {' or '.join(map(str, sorted(seeds)))} seeds" if max(seeds) > 1 else "one seed"
    tail = f", imbalance {config.imbalance:g} ({config.profile})" if config.imbalance is not None else ""
    return (
        f"Test accuracy in percent after {config.epochs} epochs, {over}: {config.model} on {Path(config.data).name}{tail}. "
        f"many: more than {config.many} training images, few: fewer than {config.few}."
    )


def _write(rows: Sequence[Row], config: Config, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    best = best_of(rows)
    lines = [head(), ["---"] * 2 + ["---:"] * (len(GROUPS) + 1), *(cells_of(row, best) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    run_checkpoint.write(out / TABLE, f"{table}\n\n{caption(rows, config)}\n".encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spread = [name for group in GROUPS for name in (group, f"{group}_std")]
    writer.writerow(["method", "loss", "seeds", *spread, "seconds_per_epoch"])
    for row in rows:
        values = [value for group in GROUPS for value in row.accuracies[group] or (None, None)]
        writer.writerow([row.method, row.loss, row.seeds, *values, row.seconds])
    run_checkpoint.write(out / "table.csv", text.getvalue().encode())
    common = {
        name: value for name, value in config.as_dict().items() if name not in ("method", "options", "loss", "seed")
    }
    run_checkpoint.write(out / "settings.json", (json.dumps(common, indent=2) + "\n").encode())
    _draw(rows, out)


def _draw(rows: Sequence[Row], out: Path) -> None:
    """Draws the bars of the shot groups and the learning curves, one panel per loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(row.loss for row in rows))
    groups = [group for group in GROUPS if any(row.accuracies[group] for row in rows)]
    widest = max(sum(row.loss == loss for row in rows) for loss in losses)
    for name, draw, width in (("bars", _bars, 1.5 + 0.95 * widest), ("curves", _curves, 5.0)):
        figure = Figure(figsize=(max(4.0, width) * len(losses), 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
        for axes, loss in zip(panels, losses, strict=True):
            draw(axes, [row for row in rows if row.loss == loss], groups)
            axes.set_title(loss_label(loss))
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"test {_ACCURACY}")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 7), frameon=False)
        figure.savefig(out / f"{name}.png", dpi=150)


def _bars(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    width = 0.8 / len(groups)
    for index, group in enumerate(groups):
        x = [row + (index - (len(groups) - 1) / 2) * width for row in range(len(rows))]
        shown = [row.accuracies[group] or (0.0, None) for row in rows]
        axes.bar(x, [mean for mean, _ in shown], width, yerr=[std or 0 for _, std in shown], capsize=2, label=group)
    rotated = len(rows) > 4
    axes.set_xticks(
        range(len(rows)),
        [METHODS[row.method] for row in rows],
        rotation=40 * rotated,
        ha="right" if rotated else "center",
    )
    axes.set_ylim(0, 100)


def _curves(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    for row in rows:
        epochs = range(1, len(row.curve) + 1)
        means = [mean for mean, _ in row.curve]
        spreads = [std or 0 for _, std in row.curve]
        (line,) = axes.plot(epochs, means, label=METHODS[row.method], linewidth=1.2)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
