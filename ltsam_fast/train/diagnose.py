"""What a checkpoint looks like from each class: the diagnostics of a run, as JSON and plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ltsam_fast import data, diagnostics
from ltsam_fast.train import checkpoint
from ltsam_fast.train.config import build
from ltsam_fast.train.loop import load_images, network_of
from ltsam_fast.train.losses import criterion
from ltsam_fast.train.workers import device_of

EIGENVALUE_CLASSES = ("many", "few")


def diagnose(
    source: str | Path,
    out: str | Path | None = None,
    *,
    split: str = "train",
    rho: float | None = None,
    per_class: int = 200,
    iterations: int = 50,
    steps: int = 15,
    radius: float = 1.0,
    **changes: Any,
) -> dict[str, Any]:
    """Looks at a checkpoint's network with the loss it was trained with, and writes ``diagnostics.json`` and plots.

    Args:
        source: A checkpoint or a run folder.
        out: Folder for what is written (default: ``diagnostics`` beside the checkpoint).
        split: Images to look at: ``"train"``, the long-tailed subset, or ``"test"``.
        rho: Radius of the classes' sharpness (default: the run's, else 0.05).
        per_class: The most images of a class that are looked at, the first ones.
        iterations: The most products with the Hessian.
        steps: Points of the loss slice.
        radius: Half its length, in units of filter-normalized directions.
        **changes: Settings that are not to be the run's, e.g. ``data``, ``device``, ``threads``, ``loss``.

    Returns:
        What the JSON file holds: for each class ``gradient_norm``, ``loss``, ``sharpness``; for head (many) and tail (few)
        ``top_eigenvalue`` with ``residual`` and ``converged``, None without such classes; ``slice`` with ``coordinates`` and
        ``loss``.

    Raises:
        ConfigError: The checkpoint can't be read, or a setting does not fit.
        DataError: Something is wrong with the data.
    """
    state = checkpoint.read(source)
    config = build(state["config"], changes)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    train, test = load_images(config)
    counts = train.counts()
    network = network_of(config, train)
    network.load_state_dict(state["model"])
    network.to(device)
    images = _first_of_each({"train": train, "test": test}[split], per_class)
    loss = criterion(config, counts).to(device).eval()
    asked: dict[str, Any] = {"batch_size": 256, "prepare": data.Augment.for_testing(train)}
    what = (network, loss, images.pixels, images.labels)
    classes, radius_of_sharpness = len(counts), config.options.get("rho", 0.05) if rho is None else rho

    norms = diagnostics.class_grad_norms(*what, num_classes=classes, **asked)
    sharpness = diagnostics.class_sharpness(*what, rho=radius_of_sharpness, num_classes=classes, **asked)
    groups = data.shot_split(counts, config.many, config.few)
    curvature = {}
    for name in EIGENVALUE_CLASSES:
        if len(groups[name]):
            noise = torch.Generator().manual_seed(0)
            curvature[name] = diagnostics.top_hessian_eigenvalue(
                *what, classes=groups[name], iterations=iterations, generator=noise, **asked
            )
    along = diagnostics.loss_slice(
        *what, steps=steps, radius=radius, generator=torch.Generator().manual_seed(0), **asked
    )

    folder = Path(out) if out is not None else _folder_of(Path(source)) / "diagnostics"
    found = {
        "checkpoint": str(source),
        "folder": str(folder),
        "epoch": state["epoch"],
        "config": config.as_dict(),
        "split": split,
        "rho": radius_of_sharpness,
        "class_counts": counts,
        "classes": [
            {"name": name, "images": count, "gradient_norm": norm, "loss": at_w, "sharpness": rise}
            for name, count, norm, at_w, rise in zip(
                train.classes,
                images.counts(),
                *(_numbers(values) for values in (norms.norms, sharpness.loss, sharpness.sharpness)),
                strict=True,
            )
        ],
        "hessian": {
            name: None
            if name not in curvature
            else {
                "top_eigenvalue": curvature[name].value,
                "residual": curvature[name].residual,
                "converged": curvature[name].converged,
            }
            for name in EIGENVALUE_CLASSES
        },
        "slice": {"coordinates": along.coordinates.tolist(), "loss": along.loss.tolist()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "diagnostics.json", (json.dumps(found, indent=2) + "\n").encode())
    norms.plot(folder / "class_grad_norms.png", train.classes)
    sharpness.plot(folder / "class_sharpness.png", train.classes)
    along.plot(folder / "loss_slice.png")
    return found


def _first_of_each(images: data.Images, most: int) -> data.Images:
    """The first ``most`` images of each class."""
    members = [(images.labels == c).nonzero().flatten()[:most] for c in range(len(images.classes))]
    return images.take(torch.cat(members))


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent
