"""Checkpoints with all that a run needs to resume bit for bit; they are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltsam_fast.data import Images
from ltsam_fast.extras import needed
from ltsam_fast.train.config import ConfigError, from_stored

_LOG = logging.getLogger("ltsam_fast")
NAME, BEFORE, BEST, LEFT_OUT, TEST = "last.pt", "previous.pt", "best.pt", "skipped.txt", "test.json"
LOCK = ".lock"
VERSION = 1
"""Version of the format; increase it with every change that an earlier reader would misunderstand."""


class Unreadable(ConfigError):
    """A checkpoint is missing or damaged."""


def lock(folder: Path) -> Any:
    """Returns a context in which no other process trains the folder's run; one that is killed leaves it.

    Raises:
        ConfigError: Another process is in it.
    """
    filelock = needed("filelock", "filelock")
    try:
        return filelock.FileLock(folder / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"out {folder}: another process trains the run there: wait for its end, or choose another folder"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        _LOG.warning("out %s: its file system has no locks: let no other process train the run there", folder)
        return contextlib.nullcontext()


def remove_partial_files(folder: Path) -> None:
    """Removes the temporary files of a :func:`write` that was killed."""
    for partial in folder.glob("*.part"):
        partial.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Removes the files of a run, if the folder has one; its checkpoint last."""
    if exists(folder):
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for name in (BEST, LEFT_OUT, TEST, "config.json", "log.csv", "log.jsonl", BEFORE, NAME):
            (folder / name).unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Returns whether a run folder has a checkpoint."""
    return (folder / NAME).exists() or (folder / BEFORE).exists()


def read(path: str | Path) -> dict[str, Any]:
    """Returns the checkpoint at ``path``, or in the run folder ``path``, on the CPU; no code in it is executed.

    Where that of a run folder is missing or damaged it is the one before, with a warning. Its key ``file`` says which.

    Raises:
        ConfigError: There is no checkpoint, it is damaged, or it was not written by this package.
    """
    path = Path(path)
    if not path.is_dir():
        return _read(path)
    try:
        return _read(path / NAME)
    except Unreadable as error:
        if not (path / BEFORE).exists():
            raise
        try:
            state = _read(path / BEFORE)
        except Unreadable:
            raise Unreadable(f"{error}; nor can {BEFORE}") from error
        _LOG.warning("%s; the one before it, %s, of epoch %d, is used", error, BEFORE, state["epoch"])
        return state


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        kind = Unreadable if error.errno in (errno.ENOENT, errno.EIO) else ConfigError
        raise kind(f"checkpoint {path}: {(error.strerror or str(error)).lower()}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as records:  # torch does not look at their checksums
            damaged = records.testzip()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of errors, about pickles
        raise Unreadable(f"checkpoint {path} can't be read: it is damaged, or not one of ltsam_fast train") from error
    if damaged is not None:
        raise Unreadable(f"checkpoint {path} can't be read: it is damaged, at {damaged}")
    version = state.get("version") if isinstance(state, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ConfigError(
            f"checkpoint {path} is of format {version}, of a later version of ltsam_fast; this one reads {VERSION}: update it"
        )
    if version != VERSION:
        raise ConfigError(f"checkpoint {path} is not one of ltsam_fast train, version {VERSION}")
    return {**state, "config": from_stored(state["config"]), "file": path}


def weights(state: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Returns the network's state in a checkpoint; raises ConfigError if it has none."""
    if "model" not in state:
        raise ConfigError(f"the run in {source} is finished and has no weights: it was trained with --no-keep-weights")
    return state["model"]


def check_images(state: dict[str, Any], images: tuple[Images, Images], source: str | Path) -> None:
    """Raises ConfigError unless ``images``, for training and test, are those of the run in ``source``.

    Checkpoints of earlier versions have no hash of the images: then only a warning is logged.
    """
    saved = state.get("data")
    if saved is None:
        _LOG.warning("%s: an older version wrote it without a hash of the images, which are not checked", source)
        return
    for split, found in zip(("train", "test"), images, strict=True):
        if saved[split] != found.digest:
            raise ConfigError(
                f"data: the {split} images, their order or their labels are not those of the run in {source}: "
                f"use those, or start another run"
            )


def seed_all(seed: int) -> None:
    """Seeds Python's, numpy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """Returns the states of Python's, numpy's and torch's random numbers, on CPU and GPU, and of ``generators``."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": [one.get_state() for one in generators],
    }


def set_random_state(state: dict[str, Any], *generators: torch.Generator) -> None:
    """Sets the states that :func:`random_state` returned; those of GPUs only if there are as many GPUs."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for one, saved in zip(generators, state["generators"], strict=True):
        if saved.shape == one.get_state().shape:  # a generator on another type of device keeps its seed
            one.set_state(saved)
