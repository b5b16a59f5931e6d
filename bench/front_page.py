"""``python -m bench.front_page``: draws README's picture, docs/front.png, from committed results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STEPS, EVIDENCE = RESULTS / "2026-11-26-h200-whole-steps", RESULTS / "2026-11-26-h100-cifar10-lt"
SHOWN = ("SAM", "Focal-SAM", "ImbSAM", "GNM", "MomentumSAM")
NAMES = {
    "sam": "SAM",
    "focal_sam": "Focal-SAM",
    "imb_sam": "ImbSAM",
    "sse_sam": "SSE-SAM",
    "gnm": "GNM",
    "momentum_sam": "MomentumSAM",
}


def steps(axes: Any) -> None:
    """Whole steps on ResNet-32 in units of an eager SGD step: the published way, and ours in a CUDA graph."""
    found = json.loads((STEPS / "bench.json").read_text())
    rows = {
        row["method"]: row
        for one in found["benchmarks"]
        for row in one["extra_info"].get("rows", ())
        if row["network"] == "ResNet-32"
    }
    for offset, way, color, name in (
        (-0.2, "published", "0.6", "published way"),
        (0.2, "captured", "tab:green", "ours, CUDA graph"),
    ):
        values = [rows[method][f"{way}_sgd"] for method in SHOWN]
        bars = axes.bar([i + offset for i in range(len(SHOWN))], values, 0.4, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_ylabel("whole step / eager SGD step")
    axes.set_title("ResNet-32, batch 64, H200")
    axes.legend(frameon=False)


def few_shot(axes: Any) -> None:
    """Accuracy in the few-shot classes less SGD's, with 95 % intervals."""
    with (EVIDENCE / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for offset, loss, color, name in (
        (-0.12, "ce", "tab:blue", "cross entropy"),
        (0.12, "la", "tab:orange", "logit adjustment"),
    ):
        chosen = [row for row in rows if row["loss"] == loss and row["few_low"] and "active" not in row["method"]]
        x = [list(NAMES).index(row["method"].split("+")[0]) + offset for row in chosen]
        means, low, high = ([float(row[f"few_{name}"]) for row in chosen] for name in ("difference", "low", "high"))
        spans = [[m - a for m, a in zip(means, low, strict=True)], [b - m for m, b in zip(means, high, strict=True)]]
        axes.errorbar(x, means, spans, fmt="o", markersize=4, capsize=3, color=color, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(NAMES)), NAMES.values())
    axes.set_ylabel("few-shot classes: points over SGD, 95 %")
    axes.set_title("CIFAR-10-LT, 500 to 5 images of 16 x 16, ResNet-20, 5 seeds")
    axes.legend(frameon=False)


def main(path: Path) -> None:
    """Draws both into ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, draw in ((left, steps), (right, few_shot)):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "docs" / "front.png")
