"""``python -m bench.evidence.against_time DIR``: accuracy against training time, DIR/time.png and time.md.

``DIR`` has ``log.csv`` of :mod:`bench.evidence.collect`, and ``steps.json`` with the rows of ``bench/test_whole_steps.py`` for
the protocol's network. A run's time is its steps times what a step was measured to take, the published way and ours. The
weights of both ways, and so the accuracies, are equal to rounding, which ``tests/test_plans.py`` asserts.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ltsam_fast.train.compare import label

STEPS = {
    "sgd": ("SGD",),
    "sam": ("SAM",),
    "imb_sam": ("ImbSAM",),
    "sse_sam": ("SSE-SAM, stage 1", "SSE-SAM, stage 2"),
    "focal_sam": ("Focal-SAM",),
}
"""Method -> its rows among the whole steps, one for each stage."""
SWITCH = 0.7
"""Share of the steps after which the protocols' SSE-SAM is in its second stage."""


class Curve(NamedTuple):
    """Epochs, the means over the seeds of two accuracies, and the times until then, in epochs of SGD."""

    epochs: list[int]
    all: list[float]
    few: list[float]
    published: list[float]
    ours: list[float]


def curves(folder: Path) -> dict[str, Curve]:
    """Returns the curve of each variant that was tested."""
    measured = json.loads((folder / "steps.json").read_text())["benchmarks"]
    steps = {row["method"]: row for one in measured for row in one["extra_info"].get("rows", ())}
    found: dict[str, dict[int, list[dict[str, str]]]] = {}
    with (folder / "log.csv").open() as file:
        for row in csv.DictReader(file):
            if row["stage"] == "test" and row["all"]:
                found.setdefault(row["method"], {}).setdefault(int(row["epoch"]), []).append(row)
    return {
        variant: Curve(
            list(epochs),
            *(
                [statistics.mean(float(row[name]) for row in rows) for rows in epochs.values()]
                for name in ("all", "few")
            ),
            *([_time(variant, epoch, max(epochs), steps, way) for epoch in epochs] for way in ("published", "ours")),
        )
        for variant, epochs in found.items()
    }


def _time(variant: str, epoch: int, last: int, steps: dict[str, Any], way: str) -> float:
    first, *second = (1.0 if name == "SGD" else steps[name][f"{way}_sgd"] for name in STEPS[variant.partition("+")[0]])
    early = min(epoch, SWITCH * last) if second else epoch
    return early * first + (epoch - early) * sum(second)


def draw(found: dict[str, Curve], path: Path) -> None:
    """Draws two charts, all classes and few-shot classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, group, title in zip(
        figure.subplots(1, 2), ("all", "few"), ("all classes", "few-shot classes"), strict=True
    ):
        for variant, curve in found.items():
            method, _, more = variant.partition("+")
            color = f"C{list(STEPS).index(method)}"
            style = ":" if method == "sgd" and more else "-"
            axes.plot(curve.ours, getattr(curve, group), style, color=color, label=label(variant))
            if method != "sgd":
                axes.plot(curve.published, getattr(curve, group), "--", color=color, linewidth=1, alpha=0.6)
        axes.set_xlabel("training time, in epochs of SGD (dashed: the published way)")
        axes.set_ylabel(f"test accuracy, {title} (%)")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def table(found: dict[str, Curve]) -> str:
    """Returns accuracies at the end, and times, as Markdown."""
    lines = [
        "| method | all | few | time, published way | time, ours |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {label(variant)} | "
            + " | ".join(f"{column[-1]:.{digits}f}" for column, digits in zip(one[1:], (1, 1, 0, 0), strict=True))
            + " |"
            for variant, one in found.items()
        ),
    ]
    return "\n".join(lines) + "\n\nTest accuracy in percent, mean over the seeds; time in epochs of SGD.\n"


def main(folder: Path) -> None:
    """Writes both."""
    found = curves(folder)
    draw(found, folder / "time.png")
    (folder / "time.md").write_text(table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
