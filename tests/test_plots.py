"""Charts for a paper: legends off the axes, labels apart, whole error bars, whole numbers for what is counted."""

import itertools
from pathlib import Path

import pytest
import torch

from ltsam_fast import data, demo
from ltsam_fast.diagnostics import ClassGradNorms, ClassSharpness, LossSlice, TopEigenvalue
from ltsam_fast.diagnostics.plots import SHOT_COLORS

from .test_report import MEASURED, report

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
LINE = torch.linspace(-1, 1, 21)


def norms(classes):
    return ClassGradNorms(torch.rand(classes), torch.ones(classes))


def sharpness(classes):
    return ClassSharpness(torch.rand(classes), 2 + torch.rand(classes), torch.ones(classes))


def draw_demo(path, names):
    """With spreads that reach above 100 % and below 0."""
    entry = {"all": (80, 2), "many": (99, 4), "medium": (85, 2), "few": (10, 15)}
    groups = {group: {"mean": mean, "std": std} for group, (mean, std) in entry.items()}
    times = dict.fromkeys(["SGD", "SAM", "ImbSAM", "SSE-SAM", "Focal-SAM"], {"published_ms": 9.9, "ours_ms": 19.9})
    demo._draw(path, dict.fromkeys(names, groups), times)


def measured(table):
    return {f"{table}, {run}": results for run, results in MEASURED.items() if report.rows(results, table)}


DRAW = {
    "norms": lambda path: norms(10).plot(path),
    "norms of 3": lambda path: norms(3).plot(path, ["a", "b", "c"], class_counts=[101, 20, 1]),
    "norms of 100": lambda path: norms(100).plot(path),
    "norms of 300": lambda path: norms(300).plot(path, class_counts=data.longtail_counts(1280, 300, 256)),
    "sharpness": lambda path: sharpness(10).plot(path, CIFAR10, class_counts=data.longtail_counts(5000, 10, 500)),
    "eigenvalue": lambda path: TopEigenvalue(3.0, 0.0, True, [1.0, 2.0, 3.0], []).plot(path),
    "line": lambda path: LossSlice(LINE, LINE**2, []).plot(path),
    "plane": lambda path: LossSlice(LINE, LINE**2 + LINE[:, None], []).plot(path),
    "demo": lambda path: draw_demo(path, ["SGD", "SAM", "ImbSAM", "SSE-SAM", "Focal-SAM"]),
    "demo, one": lambda path: draw_demo(path, ["SAM"]),
    "demo, all": lambda path: draw_demo(path, [f"Friendly SAM {i}" for i in range(20)]),
    **{name: lambda path, part=part: report.draw(part, path) for name, part in measured("phases").items()},
    **{name: lambda path, part=part: report.draw_steps(part, path) for name, part in measured("whole steps").items()},
}


@pytest.fixture
def drawn(monkeypatch):
    """Draws a chart in place of writing its file; returns the figure."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(function):
        torch.manual_seed(0)
        function(Path("chart.png"))
        figures[-1].draw_without_rendering()
        return figures[-1]

    return draw


def shown_axes(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def legends(figure):
    own = [axes.get_legend() for axes in shown_axes(figure) if axes.get_legend()]
    return [*own, *figure.legends, *itertools.chain.from_iterable(part.legends for part in figure.subfigs)]


@pytest.mark.parametrize("chart", DRAW)
def test_nothing_overlaps_and_nothing_is_cut(chart, drawn):
    figure = drawn(DRAW[chart])
    for axes in shown_axes(figure):
        box = axes.get_window_extent()
        assert not any(box.overlaps(legend.get_window_extent()) for legend in legends(figure))
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text() and not label.get_rotation()]
            boxes = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), axis
        low, high = axes.get_ylim()
        spreads = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
        for ends in itertools.chain.from_iterable(lines.get_segments() for lines in spreads):
            assert low < ends[:, 1].min() and ends[:, 1].max() < high
    for legend in legends(figure):
        box = legend.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_classes_are_coloured_by_shot_group_beside_their_counts(drawn):
    counts = [10, 500, 50, 5]
    figure = drawn(lambda path: norms(4).plot(path, list("abcd"), class_counts=counts))
    above, below = figure.axes
    assert [label.get_text() for label in below.get_xticklabels()] == ["b", "c", "a", "d"]
    assert [bar.get_height() for bar in above.patches] == [500, 50, 10, 5]
    for axes in (above, below):
        shots = ["many", "medium", "few", "few"]
        expected = [to_rgba(SHOT_COLORS[shot]) for shot in shots]
        assert [bar.get_facecolor() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())] == expected
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["many (> 100)", "medium", "few (< 20)"]


def test_what_is_counted_has_whole_numbers(drawn):
    (axes,) = drawn(DRAW["eigenvalue"]).axes
    assert all(float(label.get_text()).is_integer() for label in axes.get_xticklabels())


def test_counts_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="class_counts must be one for each of 4 classes, got 2"):
        norms(4).plot("chart.png", class_counts=[1, 2])
