"""Trains the methods on long-tailed digits and times whole steps, ours and the published way."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltsam_fast as lf
from ltsam_fast import plain
from ltsam_fast.backend import backend_for
from ltsam_fast.command_line import Parser, one_line
from ltsam_fast.data import LongTailed, digits, shot_split
from ltsam_fast.diagnostics.plots import SHOT_COLORS
from ltsam_fast.extras import progress_bars
from ltsam_fast.models import create
from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.optim.registry import method_named

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.05, 0.9, 5e-4
MANY, FEW = 60, 10
"""Shot groups of the digits: more than 60 and fewer than 10 training images; the largest class has about 130."""
GROUPS = ("all", "many", "medium", "few")
BASE: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}

WAYS = ("published", "ours")

Step = Callable[[Tensor, Tensor], object]


def network() -> nn.Sequential:
    """Returns a new network for the digits. It does not mix samples, so a step runs what the method needs of each."""
    return create("small_cnn", 10, (1, 8, 8))  # type: ignore[return-value]


@dataclass(frozen=True)
class Setting:
    """What a method's options may depend on: the network, the training images per class and the number of steps."""

    model: nn.Sequential
    counts: list[int]
    steps: int


Options = Callable[[Setting], dict[str, Any]]

METHODS = {"sgd": "SGD"} | {name: method_named(name).title for name in lf.list_methods()}
"""Name on the command line -> name in print. SGD is the base optimizer alone."""
# SAM, Focal-SAM, ImbSAM, SSE-SAM, GNM and Momentum-SAM as chosen in bench/results/2026-11-26-digits-lt-evidence, cross entropy.
OPTIONS: dict[str, Options] = {
    "sam": lambda s: {"rho": 0.025},
    "asam": lambda s: {"rho": 0.5},
    "focal_sam": lambda s: {"rho": 0.1, "gamma": 3.0, "lam": 0.5},
    "imb_sam": lambda s: {"rho": 0.1, "eta": FEW},
    "cc_sam": lambda s: {"head": s.model[-1], "noise_ratio": 1e-4},
    "sse_sam": lambda s: {"rho": 0.05, "eta": FEW, "switch_step": int(0.7 * s.steps)},
    "gnm": lambda s: {"rho": 0.2},
    "friendly_sam": lambda s: {"rho": 0.1, "lmbda": 0.6},
    "micro_batch_sam": lambda s: {"rho": 0.1, "m": BATCH // 2},
    "sparse_sam": lambda s: {"rho": 0.1, "sparsity": 0.5, "refresh_every": s.steps // 10 + 1},
    "esam": lambda s: {"rho": 0.1},
    "look_sam": lambda s: {"rho": 0.1, "k": 2, "alpha": 0.5},
    "gsam": lambda s: {"rho": 0.1, "alpha": 0.2},
    "wsam": lambda s: {"rho": 0.1, "gamma": 0.8},
    "vasso": lambda s: {"rho": 0.1, "theta": 0.4},
    "momentum_sam": lambda s: {"rho": 0.03},
}
"""Options of the methods; one that is not here has its defaults."""
DEFAULT = ("sgd", "sam", "imb_sam", "sse_sam", "focal_sam")


def options_of(name: str, setting: Setting) -> dict[str, Any]:
    """Returns the options of a method, class counts included."""
    return {"class_counts": setting.counts, **(OPTIONS[name](setting) if name in OPTIONS else {})}


def _trainer(name: str, setting: Setting, published: bool = False) -> tuple[torch.optim.Optimizer, Step]:
    """Returns the optimizer and a function that takes one step, ours or the published way."""
    params, model = setting.model.parameters(), setting.model
    if name == "sgd":
        optimizer: Any = plain.SGD(params, **BASE)
    elif published:
        published_class = getattr(plain, method_named(name).cls.__name__)
        optimizer = published_class(params, torch.optim.SGD, **options_of(name, setting), **BASE)
    else:
        optimizer = lf.create(name, params, torch.optim.SGD, model=model, **options_of(name, setting), **BASE)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.step(
            lambda index=slice(None): F.cross_entropy(model(x[index]), y[index], reduction="none"), targets=y
        )

    return optimizer, step


def accuracies(model: nn.Module, data: LongTailed) -> dict[str, float]:
    """Returns the test accuracy in percent: of all images, and the class mean of each shot group."""
    with torch.no_grad():
        correct = (model(data.test_x).argmax(1) == data.test_y).float()
    per_class = torch.stack([correct[data.test_y == c].mean() for c in range(len(data.class_counts))])
    groups = shot_split(data.class_counts, MANY, FEW)
    return {"all": 100 * correct.mean().item()} | {
        name: 100 * per_class[classes].mean().item() for name, classes in groups.items()
    }


def train(method: str, data: LongTailed, epochs: int, seed: int, advance: Callable[[], object]) -> dict[str, float]:
    """Trains one network from ``seed`` with a cosine schedule; returns its :func:`accuracies` and ``step_ms``, a median."""
    torch.manual_seed(seed)
    model = network()
    setting = Setting(model, data.class_counts, epochs * -(-len(data.train_y) // BATCH))
    optimizer, step = _trainer(method, setting)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    times = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y), generator=order).split(BATCH):
            x, y = data.train_x[batch], data.train_y[batch]
            start = time.perf_counter()
            step(x, y)
            times.append(time.perf_counter() - start)
        schedule.step()
        advance()
    return {**accuracies(model, data), "step_ms": 1e3 * statistics.median(times)}


def step_times(data: LongTailed, rounds: int) -> dict[str, dict[str, float]]:
    """Times whole steps of the default methods in turns, the published way and ours, on the same batches.

    SSE-SAM is in its first stage.

    Returns:
        For each method the medians ``published_ms`` and ``ours_ms``, in milliseconds, and ``ratio``, of both within a round.
    """
    runs = {}
    for name in DEFAULT:
        for way in WAYS[:1] if name == "sgd" else WAYS:
            torch.manual_seed(0)
            setting = Setting(network(), data.class_counts, steps=10**9)
            runs[name, way] = _trainer(name, setting, published=way == "published")[1]
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(0)).split(BATCH)
    batches = [(data.train_x[batch], data.train_y[batch]) for batch in order if len(batch) == BATCH]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for index in range(-5, rounds):
        batch = batches[index % len(batches)]
        for key, step in runs.items():
            start = time.perf_counter()
            step(*batch)
            if index >= 0:  # the first rounds warm up
                times[key].append(time.perf_counter() - start)
    result: dict[str, dict[str, float]] = {}
    for (name, way), seconds in times.items():
        result.setdefault(METHODS[name], {})[f"{way}_ms"] = 1e3 * statistics.median(seconds)
        if way == "ours":
            pairs = zip(times[name, "published"], seconds, strict=True)
            result[METHODS[name]]["ratio"] = statistics.median(published / ours for published, ours in pairs)
    return result


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _draw(path: Path, accuracy: dict[str, dict[str, dict[str, float]]], times: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    names = list(accuracy)
    widths = [max(4.0, 0.9 * len(names)), 5.0]
    figure = Figure(figsize=(sum(widths) + 1, 4.4), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=widths)
    left, right = (side.subplots() for side in sides)
    for index, group in enumerate(GROUPS):
        x = [position + (index - (len(GROUPS) - 1) / 2) * 0.2 for position in range(len(names))]
        means, spreads = ([accuracy[name][group][what] for name in names] for what in ("mean", "std"))
        left.bar(x, means, 0.2, yerr=spreads, capsize=2, label=group, color=SHOT_COLORS[group])
    left.set_ylabel("test accuracy (%)")
    left.set_title("Accuracy by shot group, mean ± std over seeds")
    slanted = len(names) > 5
    left.set_xticks(range(len(names)), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    for offset, way, color in ((-0.2, "published", "tab:gray"), (0.2, "ours", "tab:blue")):
        found = [(index, entry[f"{way}_ms"]) for index, entry in enumerate(times.values()) if f"{way}_ms" in entry]
        bars = right.bar([index + offset for index, _ in found], [ms for _, ms in found], 0.4, label=way, color=color)
        right.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    right.set_xticks(range(len(times)), list(times), fontsize=9)
    right.set_ylabel("whole training step (ms)")
    right.set_title("Time per step, the published way and ours")
    for side, axes in zip(sides, (left, right), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        side.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="ltsam demo", description=__doc__)
    parser.add_argument("--seeds", type=int, help="networks per method (default 5; 3 for all methods)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs per network (default 40)")
    parser.add_argument("--imbalance", type=float, default=50, help="largest class over smallest (default 50)")
    parser.add_argument(
        "--methods",
        default=",".join(DEFAULT),
        help=f"'all' (unless asked otherwise with 3 seeds), or some of {','.join(METHODS)} (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for demo.json and demo.png")
    parser.add_argument("--quick", action="store_true", help="two seeds and three epochs")
    options = parser.parse_args(argv)
    if options.seeds is None:
        options.seeds = 3 if options.methods == "all" else 5
    options.methods = list(METHODS) if options.methods == "all" else options.methods.split(",")
    if unknown := [name for name in options.methods if name not in METHODS]:
        meant = did_you_mean(unknown[0], METHODS)
        parser.error(f"--methods: there is no method {unknown[0]!r}{meant} Choose from {', '.join(METHODS)} or 'all'")
    if options.quick:
        options.seeds, options.epochs = 2, 3
    for name in ("seeds", "epochs", "imbalance"):
        if not 1 <= getattr(options, name) < float("inf"):
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and returns 0; exits with 2 if a package is missing or an argument is wrong."""
    options = _parse(argv)
    with one_line("ltsam demo"):
        for package in ("matplotlib", "rich"):
            importlib.import_module(package)
        backend_for(torch.device("cpu"))
        first = digits(options.imbalance)
        options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a second thread slows a network of 24 k parameters down
    print(f"long-tailed digits, training images per class: {first.class_counts}")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.methods}
    with progress_bars() as bars:
        task = bars.add_task("", total=options.seeds * len(results) * options.epochs)
        for seed in range(options.seeds):
            data = digits(options.imbalance, seed)
            for name, runs in results.items():
                bars.update(task, description=f"{METHODS[name]}, seed {seed}: epochs")
                runs.append(train(name, data, options.epochs, seed, lambda: bars.advance(task)))
    rounds = 10 if options.quick else 100
    times = step_times(first, rounds)
    accuracy = {
        METHODS[name]: {what: _summary([run[what] for run in runs]) for what in (*GROUPS, "step_ms")}
        for name, runs in results.items()
    }
    print(f"\naccuracy (%), mean ± std of {options.seeds} seeds; many: n > {MANY}, few: n < {FEW}")
    print(f"{'':16}" + "".join(f"{group:>15}" for group in GROUPS) + f"{'ms per step':>15}")
    for name, groups in accuracy.items():
        shown = "".join(f"{groups[g]['mean']:9.1f} ± {groups[g]['std']:3.1f}" for g in GROUPS)
        print(f"{name:16}{shown}{groups['step_ms']['mean']:15.2f}")
    print(
        f"\nwhole training steps of {BATCH} images, ms, medians of {rounds} rounds in turns. published: the authors' passes,"
        "\nwith a loop over the parameters; ratio: published / ours within a round. SGD is torch's, SSE-SAM in stage 1"
    )
    print(f"{'':16}{'published':>15}{'ours':>15}{'ratio':>15}")
    for name, entry in times.items():
        ours = f"{entry['ours_ms']:15.2f}{entry['ratio']:15.2f}" if "ours_ms" in entry else f"{'-':>15}{'-':>15}"
        print(f"{name:16}{entry['published_ms']:15.2f}{ours}")
    report = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "class_counts": first.class_counts,
        "accuracy": accuracy,
        "runs": results,
        "step_times": times,
        "versions": {"ltsam_fast": lf.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    (options.out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(options.out / "demo.png", accuracy, times)
    print(f"\nwrote {options.out / 'demo.json'} and {options.out / 'demo.png'}")
    return 0
