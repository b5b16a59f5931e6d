"""Runs the diagnostics on a checkpoint and writes them as JSON and plots."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltsam_fast import atomic, data, diagnostics
from ltsam_fast.losses import Loss
from ltsam_fast.train import run_checkpoint
from ltsam_fast.train.config import DATA_SETTINGS, Config, ConfigError, build
from ltsam_fast.train.distributed import device_of
from ltsam_fast.train.loop import check_folder
from ltsam_fast.train.loss_registry import criterion
from ltsam_fast.train.run import load_images, network_of

EIGENVALUE_CLASSES = ("many", "few")
_LOG = logging.getLogger("ltsam_fast")


@dataclass(frozen=True)
class Subject:
    """A checkpoint's network, loss and class counts, and the images of a split."""

    epoch: int
    config: Config
    counts: list[int]
    network: nn.Module
    loss: Loss
    images: data.Images
    keywords: dict[str, Any]
    """Keyword arguments of all diagnostics."""

    def arguments(self) -> tuple[Any, ...]:
        """Returns the positional arguments of all diagnostics."""
        return self.network, self.loss, self.images.pixels, self.images.labels


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
    report: Callable[[str], Any] = lambda stage: None,
    progress: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluates a checkpoint's network with the loss of its training; writes ``diagnostics.json`` and plots.

    Args:
        source: A checkpoint or a run folder.
        out: Output folder (default: ``diagnostics`` beside the checkpoint).
        split: Images to evaluate: ``"train"``, the long-tailed subset, or ``"test"``.
        rho: Radius of the classes' sharpness (default: the run's, else 0.05).
        per_class: Maximum number of images per class; the first ones are used.
        iterations: Maximum number of Hessian-vector products.
        steps: Points of the loss slice.
        radius: Half its length, in units of filter-normalized directions.
        report: Called with the name of each stage.
        progress: Show a progress bar while images are decoded.
        **changes: Settings that replace those of the run, e.g. ``data``, ``device``, ``threads``, ``loss``.

    Returns:
        The content of the JSON file: for each class ``gradient_norm``, ``loss``, ``sharpness``; for head (many) and tail (few)
        ``top_eigenvalue`` with ``residual`` and ``converged``, None without such classes; ``slice`` with ``coordinates`` and
        ``loss``.

    Raises:
        ConfigError: The checkpoint can't be read, a setting does not fit, the data has other classes or sizes than the run's,
            or it has other images although ``changes`` has no setting of the data.
        DataError: Something is wrong with the data.
    """
    folder = Path(out) if out is not None else _folder_of(Path(source)) / "diagnostics"
    state = run_checkpoint.read(source)
    check_folder(folder)
    report("reading images")
    subject = _subject(source, state, split, per_class, progress, changes)
    arguments, keywords, names = subject.arguments(), subject.keywords, subject.images.classes
    if rho is None:
        rho = subject.config.options.get("rho", 0.05)
    report("gradient norms")
    norms = diagnostics.class_grad_norms(*arguments, num_classes=len(names), **keywords)
    report("sharpness")
    sharpness = diagnostics.class_sharpness(*arguments, rho=rho, num_classes=len(names), **keywords)
    report("eigenvalues")
    hessian = _curvature(subject, iterations)
    report("slice of the loss")
    along = diagnostics.loss_slice(*arguments, steps=steps, radius=radius, generator=_generator(), **keywords)
    columns = (norms.counts.tolist(), *map(_numbers, (norms.norms, sharpness.loss, sharpness.sharpness)))
    keys = ("name", "images", "gradient_norm", "loss", "sharpness")
    found = {
        "checkpoint": str(source),
        "folder": str(folder),
        "epoch": subject.epoch,
        "config": subject.config.as_dict(),
        "split": split,
        "rho": rho,
        "class_counts": subject.counts,
        "classes": [dict(zip(keys, row, strict=True)) for row in zip(names, *columns, strict=True)],
        "hessian": hessian,
        "slice": {"coordinates": along.coordinates.tolist(), "loss": along.loss.tolist()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / "diagnostics.json", (json.dumps(found, indent=2) + "\n").encode())
    shots = {"class_counts": subject.counts, "many": subject.config.many, "few": subject.config.few}
    norms.plot(folder / "class_grad_norms.png", names, **shots)
    sharpness.plot(folder / "class_sharpness.png", names, **shots)
    along.plot(folder / "loss_slice.png")
    return found


def _subject(
    source: str | Path, state: dict[str, Any], split: str, per_class: int, progress: bool, changes: dict[str, Any]
) -> Subject:
    saved = build(state["config"])
    other_loss = changes.get("loss", saved.loss) != saved.loss
    base = {**state["config"], "loss_options": {}} if other_loss else state["config"]
    config = build(base, changes)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    train, test = load_images(config, progress)
    if list(train.classes) != state["classes"]:
        raise ConfigError(
            f"data {config.data}: does not have the {len(state['classes'])} classes that the run was trained on"
        )
    network = network_of(saved, train)
    loss = criterion(config, state["class_counts"])
    if not other_loss:
        loss.load_state_dict(state["loss"])  # training may have set class weights
    try:
        network.load_state_dict(run_checkpoint.weights(state, source))
    except RuntimeError as error:
        shape = " x ".join(map(str, train.pixels.shape[1:]))
        raise ConfigError(f"data {config.data}: images of {shape} do not fit the run's {config.model}") from error
    try:
        run_checkpoint.check_images(state, (train, test), source)
    except ConfigError as error:
        if not changes.keys() & set(DATA_SETTINGS):
            raise
        _LOG.warning("%s", error)  # the caller chose other data
    images = _first_of_each({"train": train, "test": test}[split], per_class)
    keywords = {"batch_size": 256, "prepare": data.Augment.for_testing(train)}
    return Subject(
        state["epoch"], config, state["class_counts"], network.to(device), loss.to(device).eval(), images, keywords
    )


def _curvature(subject: Subject, iterations: int) -> dict[str, dict[str, Any] | None]:
    groups = data.shot_split(subject.counts, subject.config.many, subject.config.few)
    present = subject.images.labels.unique()
    found: dict[str, dict[str, Any] | None] = {}
    for name in EIGENVALUE_CLASSES:
        found[name] = None
        if torch.isin(present, groups[name]).any():
            top = diagnostics.top_hessian_eigenvalue(
                *subject.arguments(),
                classes=groups[name],
                iterations=iterations,
                generator=_generator(),
                **subject.keywords,
            )
            found[name] = {"top_eigenvalue": top.value, "residual": top.residual, "converged": top.converged}
    return found


def _generator() -> torch.Generator:
    """Returns the generator of random directions; its seed is fixed, so that checkpoints can be compared."""
    return torch.Generator().manual_seed(0)


def _first_of_each(images: data.Images, limit: int) -> data.Images:
    """Returns the first ``limit`` images of each class."""
    members = [(images.labels == c).nonzero().flatten()[:limit] for c in range(len(images.classes))]
    return images.take(torch.cat(members))


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent
