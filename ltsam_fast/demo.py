"""``python -m ltsam_fast demo``: SGD, SAM and Focal-SAM on long-tailed digits, and what a step costs fused and plain."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltsam_fast import SAM, FocalSAM, __version__, plain
from ltsam_fast.data import LongTailed, digits, shot_split

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.05, 0.9, 5e-4
MANY, FEW = 60, 10
"""Shot groups of the digits, whose largest class has about 130 training images: more than 60, fewer than 10."""
GROUPS = ("all", "many", "medium", "few")
BASE: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}

Step = Callable[[Tensor, Tensor], object]


def network() -> nn.Sequential:
    """A small convolutional network for 8 x 8 images: 24 k parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 36),
        nn.ReLU(),
        nn.Linear(36, 10),
    )


def _per_sample(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y, reduction="none")


def _sgd(model: nn.Module, counts: list[int]) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.SGD(model.parameters(), **BASE)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return optimizer, step


def _sam(model: nn.Module, counts: list[int]) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, **BASE)
    return optimizer, lambda x, y: optimizer.step(_per_sample(model, x, y))


def _focal_sam(model: nn.Module, counts: list[int]) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = FocalSAM(model.parameters(), torch.optim.SGD, rho=0.2, class_counts=counts, gamma=3.0, lam=0.5, **BASE)
    return optimizer, lambda x, y: optimizer.step(_per_sample(model, x, y), targets=y)


METHODS = {"sgd": ("SGD", _sgd), "sam": ("SAM", _sam), "focal_sam": ("Focal-SAM", _focal_sam)}
"""Name on the command line -> (name in print, function that makes the optimizer and a training step)."""


def accuracies(model: nn.Module, data: LongTailed) -> dict[str, float]:
    """Test accuracy in percent: over all classes, and the mean over the classes of each shot group."""
    with torch.no_grad():
        right = (model(data.test_x).argmax(1) == data.test_y).float()
    per_class = torch.stack([right[data.test_y == c].mean() for c in range(len(data.class_counts))])
    groups = shot_split(data.class_counts, MANY, FEW)
    return {"all": 100 * right.mean().item()} | {
        name: 100 * per_class[classes].mean().item() for name, classes in groups.items()
    }


def train(method: str, data: LongTailed, epochs: int, seed: int, advance: Callable[[], object]) -> dict[str, float]:
    """Trains one network from ``seed`` with a cosine schedule and returns its :func:`accuracies`."""
    torch.manual_seed(seed)
    model = network()
    optimizer, step = METHODS[method][1](model, data.class_counts)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y), generator=order).split(BATCH):
            step(data.train_x[batch], data.train_y[batch])
        schedule.step()
        advance()
    return accuracies(model, data)


def _phases(optimizer: Any, counts: list[int] | None, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """One step through the explicit phases: seconds in the optimizer, and in all."""
    spent = 0.0

    def timed(phase: Callable[..., None], *arguments: bool) -> None:
        nonlocal spent
        start = time.perf_counter()
        phase(*arguments)
        spent += time.perf_counter() - start

    begin = time.perf_counter()
    losses = F.cross_entropy(model(x), y, reduction="none")
    if counts is None:
        losses.mean().backward()
        timed(optimizer.first_step, True)
        F.cross_entropy(model(x), y).backward()
        timed(optimizer.second_step, True)
    else:
        sharp = 0.5 * (1 - torch.tensor(counts) / sum(counts))[y] ** 3
        ((1 - sharp) * losses).mean().backward(retain_graph=True)
        timed(optimizer.first_step)
        (sharp * losses).mean().backward()
        timed(optimizer.second_step)
        (sharp * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        timed(optimizer.third_step)
    return spent, time.perf_counter() - begin


def step_times(data: LongTailed, rounds: int) -> dict[str, dict[str, float]]:
    """Median time of a step in milliseconds, fused and plain, in turns on the same batch."""
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    runs = {}
    for name, fused, loop in (("SAM", SAM, plain.SAM), ("Focal-SAM", FocalSAM, plain.FocalSAM)):
        for kind, cls in (("fused", fused), ("plain", loop)):
            torch.manual_seed(0)
            model = network()
            counts = data.class_counts if name == "Focal-SAM" else None
            runs[name, kind] = (cls(model.parameters(), torch.optim.SGD, rho=0.1, **BASE), counts, model)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for index in range(rounds + 5):
        for key, (optimizer, counts, model) in runs.items():
            measured = _phases(optimizer, counts, model, x, y)
            if index >= 5:  # the first few warm up
                times[key].append(measured)
    result: dict[str, dict[str, float]] = {}
    for (name, kind), measured_times in times.items():
        optimizer_ms, step_ms = (1e3 * statistics.median(column) for column in zip(*measured_times, strict=True))
        result.setdefault(name, {}).update({f"{kind}_optimizer_ms": optimizer_ms, f"{kind}_step_ms": step_ms})
    return result


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _draw(path: Path, accuracy: dict[str, dict[str, dict[str, float]]], times: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), gridspec_kw={"width_ratios": [1.5, 1]})
    width = 0.8 / len(accuracy)
    for index, (name, groups) in enumerate(accuracy.items()):
        at = [position + (index - (len(accuracy) - 1) / 2) * width for position in range(len(GROUPS))]
        means, spreads = ([groups[group][what] for group in GROUPS] for what in ("mean", "std"))
        left.bar(at, means, width, yerr=spreads, capsize=3, label=name)
    left.set_xticks(range(len(GROUPS)), GROUPS)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(0, 105)
    left.set_title("Accuracy by shot group, mean ± std over seeds")
    left.legend(loc="lower left")
    for offset, kind in ((-0.2, "plain"), (0.2, "fused")):
        heights = [entry[f"{kind}_optimizer_ms"] for entry in times.values()]
        bars = right.bar([position + offset for position in range(len(times))], heights, 0.4, label=kind)
        right.bar_label(bars, fmt="%.2f", padding=2)
    right.set_xticks(range(len(times)), list(times))
    right.set_ylabel("optimizer time per step (ms)")
    right.set_title("Optimizer work, plain loop and fused")
    right.margins(y=0.15)
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ltsam_fast demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="networks per method (default 5)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs per network (default 40)")
    parser.add_argument("--imbalance", type=float, default=50, help="largest class over smallest (default 50)")
    parser.add_argument("--methods", default="all", help=f"'all', or some of {','.join(METHODS)}")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for demo.json and demo.png")
    parser.add_argument("--quick", action="store_true", help="two seeds, a few epochs: only to see it run")
    options = parser.parse_args(argv)
    options.methods = list(METHODS) if options.methods == "all" else options.methods.split(",")
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)} or 'all'")
    if options.quick:
        options.seeds, options.epochs = 2, 3
    for name in ("seeds", "epochs", "imbalance"):
        if not 1 <= getattr(options, name) < float("inf"):
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code: 0, or 2 where something is missing."""
    options = _parse(argv)
    try:
        import matplotlib as _  # noqa: F401
        from tqdm import tqdm

        first = digits(options.imbalance)
        options.out.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        print(f"ltsam_fast demo: {error}: pip install 'ltsam_fast[demo]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"ltsam_fast demo: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # for 24 k parameters a second thread costs more than it brings
    print(f"long-tailed digits, training images per class: {first.class_counts}")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.methods}
    with tqdm(
        total=options.seeds * len(results) * options.epochs, unit="epoch", desc="training", mininterval=1.0
    ) as bar:
        for seed in range(options.seeds):
            data = digits(options.imbalance, seed)
            for name, runs in results.items():
                bar.set_postfix_str(f"{METHODS[name][0]}, seed {seed}")
                runs.append(train(name, data, options.epochs, seed, bar.update))
    times = step_times(first, 20 if options.quick else 200)
    accuracy = {
        METHODS[name][0]: {group: _summary([run[group] for run in runs]) for group in GROUPS}
        for name, runs in results.items()
    }
    print(f"\naccuracy (%), mean ± std of {options.seeds} seeds; many: n > {MANY}, few: n < {FEW}")
    print(f"{'':12}" + "".join(f"{group:>15}" for group in GROUPS))
    for name, groups in accuracy.items():
        print(f"{name:12}" + "".join(f"{groups[g]['mean']:9.1f} ± {groups[g]['std']:3.1f}" for g in GROUPS))
    print(f"\nms per step, median  {'optimizer: plain':>18}{'fused':>8}{'ratio':>8}{'whole: plain':>15}{'fused':>8}")
    for name, entry in times.items():
        ratio = entry["plain_optimizer_ms"] / entry["fused_optimizer_ms"]
        print(
            f"{name:20}{entry['plain_optimizer_ms']:19.3f}{entry['fused_optimizer_ms']:8.3f}{ratio:8.1f}"
            f"{entry['plain_step_ms']:15.3f}{entry['fused_step_ms']:8.3f}"
        )
    report = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "class_counts": first.class_counts,
        "accuracy": accuracy,
        "runs": results,
        "step_times": times,
        "versions": {"ltsam_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    (options.out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(options.out / "demo.png", accuracy, times)
    print(f"\nwrote {options.out / 'demo.json'} and {options.out / 'demo.png'}")
    return 0
