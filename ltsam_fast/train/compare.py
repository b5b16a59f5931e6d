"""Trains a grid of methods, losses and seeds, one run folder per cell; writes a table and charts."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ltsam_fast import atomic
from ltsam_fast.data import DataError, Images
from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.train.config import FIELDS, Config, ConfigError, build, parsed
from ltsam_fast.train.distributed import device_of, is_rank_zero, machine, rank_and_world_size
from ltsam_fast.train.log import GROUPS, Silent
from ltsam_fast.train.loop import Diverged, check_folder, finished, train, train_together
from ltsam_fast.train.loss_registry import check_options as check_loss
from ltsam_fast.train.loss_registry import label as loss_label
from ltsam_fast.train.loss_registry import options_of as loss_options_of
from ltsam_fast.train.method_registry import METHODS, check_method, check_options
from ltsam_fast.train.method_registry import options_of as method_options_of
from ltsam_fast.train.run import check, list_images, subset

_ACCURACY = "accuracy (%)"
TABLE = "table.md"

_LOG = logging.getLogger("ltsam_fast")


@dataclass(frozen=True)
class Cell:
    """One run of a grid: the variant of a method, and its settings with loss and seed."""

    config: Config
    folder: Path
    variant: str


@dataclass(frozen=True)
class Row:
    """The results of a method with a loss over its seeds; accuracies in percent.

    Attributes:
        method: The variant of the method, see :func:`variant`.
        loss: Name of the loss.
        finals: Seed -> group -> accuracy after the last epoch; None for a group without classes.
        accuracies: Group -> (mean, std); std is None for a single seed, the pair is None for a group without classes.
        seconds: Mean training time of an epoch.
        curve: Epoch -> (mean, std) of ``all``, for the epochs that end with a test.
        differences: Group -> mean of the differences to SGD of the same seed, and the ends of its 95 % interval; empty for
            SGD itself, without SGD, and where they have fewer than two seeds in common.
    """

    method: str
    loss: str
    finals: Mapping[int, Mapping[str, float | None]]
    accuracies: Mapping[str, tuple[float, float | None] | None]
    seconds: float
    curve: Mapping[int, tuple[float, float | None]]
    differences: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the method and the settings of a variant, such as "sam+rho=0.1+active=0.3".

    Raises:
        ConfigError: It is not of this form, or there is no such method.

    >>> variant("sam+rho=0.1+active=0.3")
    ('sam', {'active': '0.3', 'options': {'sam.rho': 0.1}})
    """
    method, *pairs = text.split("+")
    check_method(method)
    settings: dict[str, Any] = {"options": {}}
    for name, sign, value in (pair.partition("=") for pair in pairs):
        if not name or not sign:
            raise ConfigError(f"a variant must be METHOD+NAME=VALUE+..., got {text!r}")
        if name in FIELDS:
            is_text = FIELDS[name].annotation in (str, str | None)
            settings = {name: value if is_text else parsed(value), **settings}
        else:
            settings["options"][f"{method}.{name}"] = parsed(value)
    return method, settings


def label(name: str) -> str:
    """Returns a variant's name in print.

    >>> label("focal_sam+rho=0.2")
    'Focal-SAM, rho=0.2'
    """
    method, *pairs = name.split("+")
    return ", ".join([METHODS[method], *pairs])


def grid(
    layers: Sequence[Mapping[str, Any]], methods: Sequence[str], losses: Sequence[str], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Returns the cells of a grid, seed by seed. An option without a prefix applies to all methods, or losses, that have it.

    ``methods`` may be variants, see :func:`variant`.

    Raises:
        ConfigError: A setting of a cell is wrong, or no method or loss has an option.
    """
    cells = []
    variants = {name: variant(name) for name in methods}
    known = {
        "options": {method: method_options_of(method) for method, _ in variants.values()},
        "loss_options": {name: loss_options_of(name) for name in losses},
    }
    for key, owners in known.items():
        for name in (name for layer in layers for name in layer.get(key, {})):
            if "." not in name and not any(name in options for options in owners.values()):
                meant = did_you_mean(name, {option for options in owners.values() for option in options})
                raise ConfigError(f"none of {', '.join(owners)} has an option {name!r}{meant}".rstrip("."))
    for seed, loss, (name, (method, settings)) in itertools.product(dict.fromkeys(seeds), losses, variants.items()):
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
        config = build(*filtered, settings, {"method": method, "loss": loss, "seed": seed})
        check_options(config)
        check_loss(config)
        cells.append(Cell(config, out / f"{name}-{loss}" / f"seed{seed}", name))
    return cells


def compare(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    report: Callable[[Cell], Any] = lambda cell: None,
    jobs: int = 1,
    together: int = 1,
    limit: float = math.inf,
    progress: bool = False,
) -> tuple[list[Row], list[str]]:
    """Trains the unfinished cells; writes ``table.md``, ``table.csv``, ``results.json`` and charts, after Ctrl-C as well.

    Finished cells are read, a stopped one is resumed. Accuracies are those of the last epoch. A cell that fails is left out of
    the table, and the others are still trained; wrong settings are an error before anything is trained.

    Args:
        cells: Those of :func:`grid`.
        out: Folder for table and charts.
        report: Returns the reporter of a cell's run, see ``log.Silent``.
        jobs: Processes that train side by side.
        together: Runs that a process trains in turns on one device, see :func:`ltsam_fast.train.loop.train_together`.
        limit: Seconds after which no further run begins.
        progress: Show a progress bar while images are decoded.

    Returns:
        The rows of the table, and a line for each cell that failed or was not begun.

    Raises:
        ConfigError: A setting does not fit, or a cell's folder has a run with other settings or images.
        DataError: Something is wrong with the data.
    """
    out = Path(out)
    check_folder(out)
    deadline = time.monotonic() + limit
    draws: _Draws | None = None
    try:
        draws = _Draws(cells[0].config, progress)
        draws(cells[0].config)
    except DataError as error:  # a table of finished runs needs no images
        if any(finished(cell.config, cell.folder, None) is None for cell in cells):
            raise
        _LOG.warning("%s: the images of the finished runs are not checked", error)
    earlier = {cell.folder: finished(cell.config, cell.folder, draws(cell.config) if draws else None) for cell in cells}
    found: dict[Path, Any] = {folder: state and state["history"] for folder, state in earlier.items()}
    machines = {state.get("machine") for state in earlier.values() if state}
    waiting = [cell for cell in cells if found[cell.folder] is None]
    for _ in range(len(cells) - len(waiting)):
        report(cells[0])  # it counts cells
    if draws is not None and waiting:
        for cell in cells:
            check(cell.config, draws(cell.config)[0])
    failures = []
    side_by_side = jobs > 1 or together > 1
    if side_by_side and rank_and_world_size()[1] > 1:
        raise ConfigError("jobs and together must be 1 under torchrun")
    trained = (
        _side_by_side(waiting, jobs, together, deadline) if side_by_side else _in_turn(waiting, draws, report, deadline)
    )
    try:
        for cell, outcome in trained:
            if isinstance(outcome, str):
                failures.append(outcome)
                continue
            found[cell.folder] = outcome
            machines.add(machine(device_of(cell.config.device), cell.config.threads))
            if side_by_side:
                with report(cell) or Silent() as reporter:
                    reporter.epoch(outcome[-1])
    finally:
        rows = _rows(cells, found)
        if rows and is_rank_zero():
            _write(rows, cells[0].config, machines, out)
    if left := sum(history is None for history in found.values()) - len(failures):
        failures.append(f"{left} of {len(cells)} runs were not begun within {limit:g} s; repeat the command to go on")
    return rows, failures


_Outcome = list[dict[str, Any]] | str
"""The rows of a run, or the line that reports its failure."""


class _Draws:
    """The images of every cell of a grid, which differ in what is drawn of them."""

    def __init__(self, config: Config, progress: bool = False) -> None:
        self.images = list_images(config, progress)
        self.drawn: dict[int, tuple[Images, Images]] = {}

    def __call__(self, config: Config) -> tuple[Images, Images]:
        seed = config.seed * config.resample
        if seed not in self.drawn:
            self.drawn[seed] = subset(config, self.images)
        return self.drawn[seed]


def _in_turn(
    cells: Sequence[Cell], draws: _Draws | None, report: Callable[[Cell], Any], deadline: float
) -> Iterator[tuple[Cell, _Outcome]]:
    for cell in cells:
        if time.monotonic() > deadline:
            return
        outcome: Any
        try:
            images = draws(cell.config) if draws else None
            outcome = train(cell.config, cell.folder, resume=True, report=report(cell), images=images)
        except Exception as error:  # the other cells are still to be trained
            outcome = error
        yield cell, _settled(cell, outcome)


def _side_by_side(cells: Sequence[Cell], jobs: int, together: int, deadline: float) -> Iterator[tuple[Cell, _Outcome]]:
    rounds = max(1, -(-len(cells) // (jobs * together)))
    together = max(1, -(-len(cells) // (jobs * rounds)))  # all processes have as much to do
    batches = iter([cells[first : first + together] for first in range(0, len(cells), together)])
    running: set[Future[list[tuple[Cell, _Outcome]]]] = set()
    context = multiprocessing.get_context("spawn")
    watched, kept_open = context.Pipe(duplex=False)
    with kept_open, ProcessPoolExecutor(jobs, context, initializer=_end_with, initargs=(watched,)) as pool:
        try:
            while True:
                while len(running) < jobs and time.monotonic() < deadline and (batch := next(batches, None)):
                    running.add(pool.submit(_train_batch, batch))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        except BrokenProcessPool:
            raise Killed(
                "a process was killed, perhaps for want of memory; repeat the command to go on, with fewer --jobs"
            ) from None
        except BaseException:  # Ctrl-C may have reached this process only
            kept_open.close()
            raise


class Killed(RuntimeError):
    """A process that trained has ended without a word."""


def _end_with(other: Connection) -> None:
    """Has this process end when the one that has the pipe's other end closes it, or ends, however it does."""

    def wait_for_end() -> None:
        with contextlib.suppress(EOFError):
            other.recv()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _train_batch(cells: Sequence[Cell]) -> list[tuple[Cell, _Outcome]]:
    """Trains cells, in a process of its own."""
    global _worker_draws
    _LOG.setLevel(logging.ERROR)
    if _worker_draws is None:
        _worker_draws = _Draws(cells[0].config)
    outcomes = train_together([(cell.config, cell.folder, _worker_draws(cell.config)) for cell in cells])
    return [(cell, _settled(cell, outcome)) for cell, outcome in zip(cells, outcomes, strict=True)]


_worker_draws: _Draws | None = None
"""The images, in a process that trains cells of one grid."""


def _settled(cell: Cell, outcome: list[dict[str, Any]] | Exception) -> _Outcome:
    """Returns the rows of a run, or the line that reports its failure; writes a traceback unless the loss was not finite.

    With several processes other errors are raised: the other processes may not have failed, and would wait for this one.
    """
    if not isinstance(outcome, Exception):
        _trace(cell).unlink(missing_ok=True)
        return outcome
    error = outcome
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


def _rows(cells: Sequence[Cell], found: Mapping[Path, list[dict[str, Any]] | None]) -> list[Row]:
    """Returns the rows of the table, of the runs that are finished."""
    histories: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for cell in cells:
        if (history := found[cell.folder]) is not None:
            histories.setdefault((cell.config.loss, cell.variant), {})[cell.config.seed] = history
    losses = list(dict.fromkeys(cell.config.loss for cell in cells))
    rows = [summary(name, loss, runs) for (loss, name), runs in histories.items()]
    rows.sort(key=lambda row: losses.index(row.loss))
    bases = {row.loss: row for row in rows if row.method == "sgd"}
    return [
        replace(row, differences=paired(row.finals, bases[row.loss].finals))
        if row.loss in bases and row.method != "sgd"
        else row
        for row in rows
    ]


def summary(method: str, loss: str, histories: Mapping[int, Sequence[dict[str, Any]]]) -> Row:
    """Returns the row of a method and a loss from the histories of its seeds."""
    finals = {seed: {group: history[-1][group] for group in GROUPS} for seed, history in histories.items()}
    accuracies = {}
    for group in GROUPS:
        values = [final[group] for final in finals.values()]
        accuracies[group] = None if None in values else _mean_and_std(values)
    seconds = statistics.mean(row["seconds"] for history in histories.values() for row in history)
    curve = {
        rows[0]["epoch"]: _mean_and_std([row["all"] for row in rows])
        for rows in zip(*histories.values(), strict=True)
        if all(row["all"] is not None for row in rows)
    }
    return Row(method, loss, finals, accuracies, seconds, curve)


def paired(
    finals: Mapping[int, Mapping[str, float | None]], base: Mapping[int, Mapping[str, float | None]]
) -> dict[str, tuple[float, float, float]]:
    """Returns the mean difference to ``base`` over the seeds of both, and its 95 % interval (Student's t), for each group.

    >>> found = paired({0: {"all": 3.0}, 1: {"all": 4.0}, 2: {"all": 8.0}}, {0: {"all": 1.0}, 1: {"all": 2.0}, 2: {"all": 3.0}})
    >>> [round(value, 3) for value in found["all"]]
    [3.0, -1.303, 7.303]
    """
    seeds = [seed for seed in finals if seed in base]
    found = {}
    for group in GROUPS if len(seeds) > 1 else ():
        pairs = [(finals[seed].get(group), base[seed].get(group)) for seed in seeds]
        steps = [one - other for one, other in pairs if one is not None and other is not None]
        if len(steps) == len(seeds):
            mean = statistics.mean(steps)
            half = student_t(len(steps) - 1) * statistics.stdev(steps) / math.sqrt(len(steps))
            found[group] = (mean, mean - half, mean + half)
    return found


def student_t(freedom: int, probability: float = 0.975) -> float:
    """Returns the quantile of Student's t distribution, to five digits.

    >>> [round(student_t(freedom), 3) for freedom in (1, 4, 19)]
    [12.706, 2.776, 2.093]
    """
    # With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1) on a finite interval.
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * probability - 1, mass / mass[-1], angle)))


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def cells_of(row: Row, best: Mapping[str, float] | None = None, mark: str = "**") -> list[str]:
    """Returns the row's cells as texts, with the best mean of each column between ``mark``.

    >>> cells_of(Row("sam", "ce", {}, {"all": (71.26, 0.5), "few": None}, 1.5, {}), {"all": 71.26})
    ['SAM', 'CE', '**71.3 ± 0.5**', '-', '1.50']
    """
    texts = [label(row.method), loss_label(row.loss)]
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
    seeds = {len(row.finals) for row in rows}
    over = f"mean ± std over {' or '.join(map(str, sorted(seeds)))} seeds" if max(seeds) > 1 else "one seed"
    tail = f", imbalance {config.imbalance:g} ({config.profile})" if config.imbalance is not None else ""
    if config.n_max and config.imbalance:
        tail += f", {config.n_max} to {config.n_max / config.imbalance:.0f} images a class"
    kind = "Test accuracy" if config.val is None else f"Accuracy on {config.val} held-out training images of each class"
    if config.val_share is not None:
        kind = f"Accuracy on a share of {config.val_share:g} of the training images, held out,"
    empty = [group for group in GROUPS if all(row.accuracies[group] is None for row in rows)]
    none = f" No class is {' or '.join(empty)}." if empty else ""
    return (
        f"{kind} in percent after {config.epochs} epochs, {over}: {config.model} on {Path(config.data).name}{tail}. "
        f"many: more than {config.many} training images, few: fewer than {config.few}.{none}"
    )


def _write(rows: Sequence[Row], config: Config, machines: set[str | None], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    best = best_of(rows)
    lines = [head(), ["---"] * 2 + ["---:"] * (len(GROUPS) + 1), *(cells_of(row, best) for row in rows)]
    parts = [_markdown(lines), caption(rows, config)]
    if compared := [row for row in rows if row.differences]:
        lines = [head()[:-1], ["---"] * 2 + ["---:"] * len(GROUPS), *(_differences_of(row) for row in compared)]
        parts += [_markdown(lines), _INTERVALS]
    atomic.write(out / TABLE, ("\n\n".join(parts) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spread = [name for group in GROUPS for name in (group, f"{group}_std")]
    against = [f"{group}_{end}" for group in GROUPS for end in ("difference", "low", "high")]
    writer.writerow(["method", "loss", "seeds", *spread, "seconds_per_epoch", *against])
    for row in rows:
        values = [value for group in GROUPS for value in row.accuracies[group] or (None, None)]
        ends = [value for group in GROUPS for value in row.differences.get(group, (None,) * 3)]
        writer.writerow([row.method, row.loss, len(row.finals), *values, row.seconds, *ends])
    atomic.write(out / "table.csv", text.getvalue().encode())
    results = {"machines": sorted(filter(None, machines)), "rows": [asdict(row) for row in rows]}
    atomic.write(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    common = {
        name: value for name, value in config.as_dict().items() if name not in ("method", "options", "loss", "seed")
    }
    atomic.write(out / "settings.json", (json.dumps(common, indent=2) + "\n").encode())
    _draw(rows, out)


_INTERVALS = (
    "Difference to SGD of the same seed, which has the same initial weights and batches: mean over the seeds, and its 95 % "
    "interval (Student's t). An interval that contains 0 shows no difference."
)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _differences_of(row: Row) -> list[str]:
    texts = [label(row.method), loss_label(row.loss)]
    for group in GROUPS:
        if group in row.differences:
            mean, low, high = row.differences[group]
            mark = "" if low <= 0 <= high else "**"
            texts.append(f"{mark}{mean:+.1f}{mark} [{low:+.1f}, {high:+.1f}]")
        else:
            texts.append("-")
    return texts


def _draw(rows: Sequence[Row], out: Path) -> None:
    """Draws the bars of the shot groups, the learning curves and the differences to SGD, one panel per loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(row.loss for row in rows))
    groups = [group for group in GROUPS if any(row.accuracies[group] for row in rows)]
    widest = max(sum(row.loss == loss for row in rows) for loss in losses)
    charts: list[tuple[str, Callable[..., None], float]] = [
        ("bars", _bars, 1.5 + 0.95 * widest),
        ("curves", _curves, 5.0),
    ]
    if any(row.differences for row in rows):
        charts.append(("differences", _intervals, 1.5 + 0.8 * widest))
    for name, draw, width in charts:
        figure = Figure(figsize=(max(4.0, width) * len(losses), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
        for axes, loss in zip(panels, losses, strict=True):
            draw(axes, [row for row in rows if row.loss == loss], groups)
            axes.set_title(loss_label(loss))
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("difference to SGD (points)" if name == "differences" else _ACCURACY)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 7), frameon=False)
        figure.savefig(out / f"{name}.png", dpi=150)


def _bars(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    width = 0.8 / len(groups)
    for index, group in enumerate(groups):
        x = [row + (index - (len(groups) - 1) / 2) * width for row in range(len(rows))]
        shown = [row.accuracies[group] or (0.0, None) for row in rows]
        axes.bar(x, [mean for mean, _ in shown], width, yerr=[std or 0 for _, std in shown], capsize=2, label=group)
    _name_rows(axes, rows)
    axes.set_ylim(bottom=0)


def _name_rows(axes: Any, rows: Sequence[Row]) -> None:
    rotated = len(rows) > 4
    names = [label(row.method).replace(", ", "\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=40 * rotated, ha="right" if rotated else "center")


def _intervals(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    rows = [row for row in rows if row.differences]
    for index, group in enumerate(groups):
        shown = [(x, row.differences[group]) for x, row in enumerate(rows) if group in row.differences]
        x = [row + (index - (len(groups) - 1) / 2) * 0.18 for row, _ in shown]
        means, halves = [mean for _, (mean, _, _) in shown], [(high - low) / 2 for _, (_, low, high) in shown]
        axes.errorbar(x, means, halves, fmt="o", markersize=4, capsize=2, label=group)
    axes.axhline(0, color="black", linewidth=0.8)
    _name_rows(axes, rows)


def _curves(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    for row in rows:
        epochs = list(row.curve)
        means = [mean for mean, _ in row.curve.values()]
        spreads = [std or 0 for _, std in row.curve.values()]
        (line,) = axes.plot(epochs, means, label=label(row.method), linewidth=1.2)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
