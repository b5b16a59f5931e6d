"""The charts of the diagnostics, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ltsam_fast.extras import needed

_NAMED = 30
"""The largest number of classes whose names are written below their bars."""


def bars(
    path: str | os.PathLike[str], series: Mapping[str, Tensor], ylabel: str, names: Sequence[str] | None = None
) -> None:
    """Draws a bar per class for each series."""
    count = len(next(iter(series.values())))
    if names is not None and len(names) != count:
        raise ValueError(f"names must be one for each of {count} classes, got {len(names)}")
    figure, axes = _figure(max(4.5, min(12.0, 1.5 + 0.35 * count * len(series))))
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        left = -0.4 + width * (index + 0.5)
        axes.bar([c + left for c in range(count)], values.tolist(), width, label=label or None)
    if count <= _NAMED:
        axes.set_xticks(
            range(count), names or range(count), rotation=40 if names else 0, ha="right" if names else "center"
        )
    axes.set_xlabel("class")
    axes.set_ylabel(ylabel)
    if len(series) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def curve(path: str | os.PathLike[str], x: Tensor, y: Tensor, xlabel: str, ylabel: str) -> None:
    """Draws y over x."""
    figure, axes = _figure(4.5)
    axes.plot(x.tolist(), y.tolist(), marker=".")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.savefig(path, dpi=150)


def surface(path: str | os.PathLike[str], x: Tensor, z: Tensor, labels: tuple[str, str], zlabel: str) -> None:
    """Draws contours of z, shape (len(x), len(x)), whose first dimension goes along the x axis."""
    figure, axes = _figure(5.0)
    shown = axes.contourf(x.tolist(), x.tolist(), z.T.tolist(), levels=25)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_aspect("equal")
    figure.colorbar(shown, label=zlabel)
    figure.savefig(path, dpi=150)


def _figure(width: float) -> tuple[Any, Any]:
    """Returns a figure and its axes, without pyplot, which would keep the figure and choose a window system."""
    figure = needed("matplotlib.figure", "matplotlib").Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
