"""Compares methods by a protocol: options are chosen on held-out training images, then the test images are looked at once."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from ltsam_fast import atomic
from ltsam_fast.train.compare import Cell, Row, compare, grid
from ltsam_fast.train.config import ConfigError, Settings, by_field

CHOSEN = "chosen.json"
_LOG = logging.getLogger("ltsam_fast")


def variants(grids: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, list[str]]:
    """Returns the variants of each method, all combinations of its options, see :func:`ltsam_fast.train.compare.variant`.

    >>> variants({"sgd": {}, "sam+active=0.3": {"rho": [0.1, 0.2]}})
    {'sgd': ['sgd'], 'sam+active=0.3': ['sam+active=0.3+rho=0.1', 'sam+active=0.3+rho=0.2']}
    """
    return {
        name: ["+".join([name, *pairs]) for pairs in itertools.product(*_pairs(options))]
        for name, options in grids.items()
    }


def _pairs(options: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    return [[f"{option}={value}" for value in values] for option, values in options.items()]


class Protocol(Settings):
    """What is compared, and how.

    Raises:
        ConfigError: A key is missing, unknown or of the wrong type, or a seed is in both lists.
    """

    losses: list[str]
    seeds: list[int]
    val: int
    val_seeds: list[int]
    settings: dict[str, Any]
    grids: dict[str, dict[str, list[Any]]]

    @model_validator(mode="after")
    def _disjoint(self) -> Protocol:
        if set(self.seeds) & set(self.val_seeds):
            raise ConfigError("val_seeds must be others than seeds")
        return self


def evidence(
    protocol: Mapping[str, Any],
    out: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    report: Callable[[Sequence[Cell]], Callable[[Cell], Any]] = lambda cells: lambda cell: None,
    limit: float = math.inf,
    **pace: Any,
) -> tuple[list[Row], list[str]]:
    """Runs a protocol; what is finished is not trained again.

    1. Each variant of each method is trained with each loss and the seeds ``val_seeds``, and tested on ``val`` images of each
       class that are held out of the training images. For each loss the variant with the highest mean accuracy over these
       images is chosen, the first one of several. As many images of each class are held out, so this is the mean over classes.
       A variant whose training failed is left out, with a warning.
    2. The chosen variants are trained with ``seeds`` and tested on the test images, all methods of a seed before the next seed.

    Folders ``validation`` and ``test`` have the tables of :func:`ltsam_fast.train.compare.compare`, ``chosen.json`` the choice.

    Args:
        protocol: ``losses``, ``seeds``, ``val``, ``val_seeds``; ``settings`` of all runs; ``grids``, for each method the values
            of its options.
        out: Output folder.
        changes: Settings that replace those of the protocol.
        report: Returns the reporter of a stage's cells, see ``compare``.
        limit: Seconds after which no further run begins.
        **pace: ``jobs``, ``together`` and ``progress`` of ``compare``.

    Returns:
        The rows of the test table, and a line for each of its runs that failed or was not begun. Without the time to choose
        there are no rows.

    Raises:
        ConfigError: The protocol is wrong, or a folder has runs with other settings.
        DataError: Something is wrong with the data.
    """
    asked, out, start = Protocol(**protocol), Path(out), time.monotonic()
    losses, layers = asked.losses, [by_field(asked.settings), dict(changes or {})]
    tried = variants(asked.grids)
    every = [name for names in tried.values() if len(names) > 1 for name in names]
    chosen = {loss: {method: names[0] for method, names in tried.items()} for loss in losses}
    if every:
        folder = out / "validation"
        cells = grid([*layers, {"val": asked.val}], every, losses, asked.val_seeds, folder)
        rows, failures = compare(cells, folder, report=report(cells), limit=limit, **pace)
        complete = [row for row in rows if len(row.finals) == len(set(asked.val_seeds))]  # others failed
        if len(complete) < len(every) * len(losses) and time.monotonic() - start >= limit:
            return [], failures
        for line in failures:
            _LOG.warning("%s", line)
        scores = {(row.loss, row.method): row.accuracies["all"][0] for row in complete}  # type: ignore[index]
        for loss, (method, names) in itertools.product(losses, tried.items()):
            candidates = [name for name in names if (loss, name) in scores]
            if len(names) > 1 and not candidates:
                raise ConfigError(f"no variant of {method} with {loss} could be trained: {failures[0]}")
            chosen[loss][method] = max(candidates, key=lambda name: scores[loss, name], default=names[0])  # noqa: B023
    atomic.write(_made(out) / CHOSEN, (json.dumps(chosen, indent=2) + "\n").encode())
    folder = out / "test"
    cells = [
        cell
        for seed, loss in itertools.product(asked.seeds, losses)
        for cell in grid(layers, list(chosen[loss].values()), [loss], [seed], folder)
    ]
    left = limit - (time.monotonic() - start)
    return compare(cells, folder, report=report(cells), limit=max(0.0, left), **pace)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
