"""The charts of the diagnostics, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.data.longtail import shot_split
from ltsam_fast.extras import needed

_NAMED = 30
"""The largest number of classes whose names are written below their bars."""
SHOT_COLORS = {"all": "#999999", "many": "#0072B2", "medium": "#009E73", "few": "#D55E00"}
"""By Okabe and Ito, whose colours the colour-blind can tell apart."""


def bars(
    path: str | os.PathLike[str],
    series: Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    class_counts: Sequence[int] | Tensor | None = None,
    many: int = 100,
    few: int = 20,
) -> None:
    """Draws a panel for each series, with a bar per class.

    Args:
        path: Image file.
        series: Label of the panel's axis -> values, shape (C,).
        names: Names of the classes.
        class_counts: Training samples of each class: one more panel shows them, classes come most frequent first, and bars
            are coloured by shot group.
        many: Classes with more than this many samples are ``"many"``.
        few: Classes with less than this many samples are ``"few"``.
    """
    count = len(next(iter(series.values())))
    for what, given in (("names", names), ("class_counts", class_counts)):
        if given is not None and len(given) != count:
            raise ValueError(f"{what} must be one for each of {count} classes, got {len(given)}")
    panels, order, groups = dict(series), torch.arange(count), {"": (SHOT_COLORS["many"], torch.arange(count))}
    if class_counts is not None:
        counts = torch.as_tensor(class_counts).cpu()
        panels, order = {"training samples": counts, **series}, counts.argsort(descending=True, stable=True)
        limits = {"many": f" (> {many})", "medium": "", "few": f" (< {few})"}
        groups = {
            name + limits[name]: (SHOT_COLORS[name], members)
            for name, members in shot_split(counts, many, few).items()
            if len(members)
        }
    place = order.argsort()
    figure, found = _figure(max(5.0, min(12.0, 1.5 + 0.4 * count)), 1.2 + 2.2 * len(panels), len(panels))
    for axes, (ylabel, values) in zip(found, panels.items(), strict=True):
        for label, (color, members) in groups.items():
            width = 0.8 if count <= _NAMED else 1.0
            axes.bar(place[members].tolist(), values[members].tolist(), width, color=color, label=label)
        axes.margins(x=0.01)
        axes.set_ylabel(ylabel)
    figure.align_ylabels()
    if count <= _NAMED:
        labels = [names[c] if names else str(c) for c in order.tolist()]
        slanted = max(map(len, labels)) > 3
        found[-1].set_xticks(range(count), labels, rotation=40 * slanted, ha="right" if slanted else "center")
    if class_counts is None:
        found[-1].set_xlabel("class")
    else:
        found[-1].set_xlabel("class, most frequent first")
        if count > _NAMED:
            found[-1].set_xticks([])  # places in the order are no classes
        found[0].set_yscale("log")
        found[0].set_ylim(bottom=0.7)  # so that one sample has a bar
        handles, labels = found[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def curve(path: str | os.PathLike[str], x: Tensor, y: Tensor, xlabel: str, ylabel: str) -> None:
    """Draws y over x; whole numbers x have whole numbers as ticks."""
    figure, (axes,) = _figure(4.5, 3.6)
    axes.plot(x.tolist(), y.tolist(), marker=".")
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=not x.is_floating_point())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.savefig(path, dpi=150)


def surface(path: str | os.PathLike[str], x: Tensor, z: Tensor, labels: tuple[str, str], zlabel: str) -> None:
    """Draws contours of z, shape (len(x), len(x)), whose first dimension goes along the x axis."""
    figure, (axes,) = _figure(5.0, 3.6)
    shown = axes.contourf(x.tolist(), x.tolist(), z.T.tolist(), levels=25)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_aspect("equal")
    axes.locator_params(nbins=5)
    figure.colorbar(shown, label=zlabel)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """Returns a figure and its axes, one below the other, without pyplot, which would choose a window system."""
    figure = needed("matplotlib.figure", "matplotlib").Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found
