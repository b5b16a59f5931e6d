"""The training loop: epochs, test accuracies, checkpoints and resuming."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltsam_fast import atomic, data
from ltsam_fast.optim import SharpnessAware
from ltsam_fast.train import run_checkpoint
from ltsam_fast.train.config import Config, ConfigError, build, differing, from_stored
from ltsam_fast.train.distributed import Distributed, machine, process_group
from ltsam_fast.train.log import GROUPS, Console, Logs, Silent
from ltsam_fast.train.loss_registry import reweight, same_noise
from ltsam_fast.train.run import Run, prepare, test_images

EVAL_BATCH = 1024
CONFIG = "config.json"
_LOG = logging.getLogger("ltsam_fast")


class Diverged(RuntimeError):
    """The training loss is not finite."""


def train_epoch(run: Run, advance: Callable[[int], object]) -> Tensor:
    """Trains for one epoch, each process on its part of every batch; does not wait for the device.

    Returns:
        The sum of the losses at the unperturbed weights, and the number of images.
    """
    run.model.train()
    dist, config = run.dist, run.config
    reweight(run.loss, config, run.counts, run.epoch)
    pixels, labels = _on_device_if_small(run.train.pixels, dist.device), run.train.labels.to(dist.device)
    loss_sum, count = torch.zeros((), dtype=torch.float64, device=dist.device), 0
    for batch in data.batches(len(labels), config.batch_size, generator=run.sampler_generator):
        size = len(batch) // dist.world_size * dist.world_size  # equal parts, so that their mean is the batch\'s
        local = batch[:size][dist.rank :: dist.world_size]
        if len(local):
            x = _in_memory_format(run, run.train_transform(_select(pixels, local, dist.device), run.augment_generator))
            y = labels[local.to(dist.device, non_blocking=True)]
            loss_sum += take_step(run, x, y).double() * len(local)
            count += len(local)
        advance(1)
    return dist.all_reduce(torch.stack([loss_sum, torch.full_like(loss_sum, count)]))


def take_step(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Takes one step on this process's part of a batch; returns its mean loss at the unperturbed weights, on the device.

    Class weights are normalized by their mean over the whole batch, as in LDAM's code for deferred reweighting.
    """
    if run.graph is not None:
        return run.graph(x, y)
    batch = None if run.loss.weight is None else run.dist.all_gather(y)

    def closure(index: Any = slice(None)) -> Tensor:
        with run.autocast():
            logits = run.forward(x[index])
        return run.loss(logits, y[index], batch=batch)

    with same_noise(run.loss):
        if isinstance(run.optimizer, SharpnessAware):
            loss = run.optimizer.step(closure, y, run.scaler)
        else:
            run.optimizer.zero_grad()
            loss = closure().mean()
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach()


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Returns test accuracies in percent: of ``all`` images, the class mean of each shot group, and ``per_class``."""
    run.network.eval()
    run.dist.broadcast(run.network.buffers())  # running statistics: the checkpoint has those of rank 0
    dist, classes = run.dist, len(run.counts)
    sums = torch.zeros(2, classes, dtype=torch.float64, device=dist.device)  # correct predictions, images
    for index in torch.arange(dist.rank, len(run.test.labels), dist.world_size).split(EVAL_BATCH):
        x = _in_memory_format(run, run.test_transform(_select(run.test.pixels, index, dist.device)))
        y = run.test.labels[index].to(dist.device)
        with run.autocast():
            correct = run.network(x).argmax(1) == y
        sums += torch.stack([y[correct].bincount(minlength=classes), y.bincount(minlength=classes)])
    correct, images = dist.all_reduce(sums).cpu()
    per_class = 100 * correct / images
    groups = data.shot_split(run.counts, run.config.many, run.config.few)
    means = {name: per_class[members].nanmean().item() for name, members in groups.items()}
    shown = {"all": (100 * correct.sum() / images.sum()).item(), **means}
    return {name: _rounded(shown[name]) for name in GROUPS} | {
        "per_class": [_rounded(one) for one in per_class.tolist()]
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _on_device_if_small(pixels: Tensor, device: torch.device) -> Tensor:
    """Returns the images on the device if they take less than a quarter of its free memory, else as they are."""
    if device.type == "cuda" and pixels.device != device:
        free, _ = torch.cuda.mem_get_info(device)
        return pixels.to(device) if pixels.nbytes < free / 4 else pixels
    return pixels


def _select(pixels: Tensor, index: Tensor, device: torch.device) -> Tensor:
    return pixels[index.to(pixels.device, non_blocking=True)].to(device, non_blocking=True)


def _in_memory_format(run: Run, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if run.config.channels_last else x


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Any = None,
    images: tuple[data.Images, data.Images] | None = None,
) -> list[dict[str, Any]]:
    """Trains a network and writes a run folder: ``config.json``, ``log.csv``, ``log.jsonl``, ``last.pt``.

    The checkpoint is written before the first and after every epoch. A run that was killed and resumed ends with the same
    weights as an uninterrupted one, bit for bit: on a CPU with the same number of threads, on GPUs with ``deterministic``.

    With ``val`` the checkpoint of the epoch with the highest accuracy on the held-out images is kept as ``best.pt``; with
    ``val_share`` that of the highest class mean, and ``test.json`` has the accuracies of its weights on the test images.

    Args:
        config: The settings.
        out: The run folder; created if missing.
        resume: Resume from the folder's checkpoint, if there is one.
        overwrite: Remove the folder's run before the first step.
        report: Reports progress: ``log.Silent`` (default), ``log.Console``, or the like.
        images: The images that :func:`load_images` returns for these settings, if they are loaded already.

    Returns:
        A row for each epoch: ``epoch`` (from 1), ``lr``, ``train_loss``, accuracies in percent (``all``, ``many``,
        ``medium``, ``few``; None for a group without classes; ``per_class``), ``seconds`` of training and
        ``eval_seconds``.

    Raises:
        ConfigError: A setting does not fit; or the folder has a run of at least an epoch without ``resume`` and ``overwrite``,
            or one with other settings or images, whose hash the checkpoint has, see :attr:`ltsam_fast.data.Images.digest`.
        DataError: Something is wrong with the data.
        Diverged: The loss is not finite; the checkpoint of the previous epoch stays.

    >>> import tempfile
    >>> from ltsam_fast.train import build
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = train(build({"epochs": 1, "method": "sam"}), folder)
    >>> [row["epoch"] for row in rows]
    [1]
    """
    out = Path(out)
    with process_group(config.device) as dist:
        reporter = (report if dist.rank == 0 else None) or Silent()
        with contextlib.ExitStack() as opened:
            opened.enter_context(reporter)
            course = _Course(config, out, dist, resume, images, overwrite, isinstance(reporter, Console))
            opened.callback(course.close)
            reporter.begin(course.run)
            while not course.finished:
                course.begin_epoch(reporter.advance)
                reporter.epoch(course.end_epoch())
            course.test_best()
        dist.all_gather_object(None)  # no process continues before the last checkpoint is written
        return course.run.history


def train_together(
    runs: Sequence[tuple[Config, Path, tuple[data.Images, data.Images]]],
) -> list[list[dict[str, Any]] | Exception]:
    """Trains several runs on one device, epoch by epoch in turns; each is resumed, as :func:`train` does it.

    On a GPU each has a stream of its own: while one run's steps wait for each other, the device works on the others'. With
    ``graph`` the host has time for many. Networks that draw random numbers, such as dropout, draw them from one generator here,
    so that their runs depend on each other.

    Args:
        runs: Settings, run folder and images of each; they name the same device.

    Returns:
        For each run its rows, or what ended it.
    """
    results: list[Any] = [None] * len(runs)
    with process_group(runs[0][0].device) as dist, contextlib.ExitStack() as opened:
        courses: list[_Course | None] = [None] * len(runs)
        going = list(range(len(runs)))
        while going:
            for index in list(going):
                try:
                    if (course := courses[index]) is None:
                        config, out, images = runs[index]
                        stream = torch.cuda.Stream(dist.device) if dist.device.type == "cuda" else None
                        course = courses[index] = _Course(config, Path(out), dist, True, images, stream=stream)
                        opened.callback(course.close)
                    with course.aside():
                        if course.sums is not None:
                            course.end_epoch()
                        if not course.finished:
                            course.begin_epoch()
                            continue
                        course.test_best()
                    results[index] = course.run.history
                except Exception as error:  # the others go on
                    results[index] = error
                going.remove(index)
    return results


class _Course:
    """A run on its way: its folder, its logs, and the epoch that has begun."""

    def __init__(
        self,
        config: Config,
        out: Path,
        dist: Distributed,
        resume: bool,
        images: tuple[data.Images, data.Images] | None,
        overwrite: bool = False,
        progress: bool = False,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.out, self.stream, self.progress = out, stream, progress
        self.logs: Logs | None = None
        self.sums: Tensor | None = None
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:  # closed if something is wrong
            opened.callback(self.close)
            self._begin(config, dist, resume, images, overwrite)
            opened.pop_all()

    def _begin(
        self,
        config: Config,
        dist: Distributed,
        resume: bool,
        images: tuple[data.Images, data.Images] | None,
        overwrite: bool,
    ) -> None:
        out, found = self.out, self.out.is_dir()
        check_folder(out)
        if found:
            self._lock(dist)
        state = None if overwrite else _checkpoint_to_resume(config, out, resume)
        epochs = dist.all_gather_object(None if state is None else state["epoch"])
        if len(set(epochs)) > 1:
            raise ConfigError(
                f"out {out}: the processes find checkpoints of epochs {epochs}; it must be one folder for all"
            )
        with self.aside():
            self.run = prepare(config, dist, images, self.progress)
            if state is not None:
                _restore(self.run, state, out)
        if dist.rank == 0:
            if not found:
                out.mkdir(parents=True, exist_ok=True)
                self._lock(dist)
            if state is None:
                run_checkpoint.remove_run(out)
            elif state["file"].name == run_checkpoint.BEFORE:  # or the next one would be kept in its place
                os.replace(state["file"], out / run_checkpoint.NAME)
            self.logs = Logs(out, self.run.history, config.tensorboard)
        if self.logs and (left_out := (*self.run.train.left_out, *self.run.test.left_out)):
            atomic.write(out / run_checkpoint.LEFT_OUT, "".join(f"{line}\n" for line in left_out).encode())
        if state is None:
            _save(self.run, out)

    def _lock(self, dist: Distributed) -> None:
        if dist.rank == 0:
            self._opened.enter_context(run_checkpoint.lock(self.out))

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """The context of its work, if it has a stream of its own."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @property
    def finished(self) -> bool:
        return self.run.epoch >= self.run.config.epochs

    def begin_epoch(self, advance: Callable[[int], object] = lambda steps: None) -> None:
        """Trains for an epoch, without waiting for the device."""
        self.rate, self.start = self.run.optimizer.param_groups[0]["lr"], time.perf_counter()
        self.sums = train_epoch(self.run, advance)

    def end_epoch(self) -> dict[str, Any]:
        """Waits for the epoch's end; tests, saves and logs it. Returns its row."""
        run, number = self.run, self.run.epoch + 1
        loss_sum, count = self.sums.tolist()  # type: ignore[union-attr]  # an epoch has begun
        if not math.isfinite(loss_sum):
            raise Diverged(
                f"the loss is {loss_sum / count} in epoch {number}: a lower lr, or a longer warmup, may help"
            )
        run.scheduler.step()
        middle = time.perf_counter()
        due = number % run.config.eval_every == 0 or number >= run.config.epochs
        row = {
            "epoch": number,
            "lr": self.rate,
            "train_loss": loss_sum / count,
            **(evaluate(run) if due else dict.fromkeys((*GROUPS, "per_class"))),
            "seconds": round(middle - self.start, 4),
            "eval_seconds": round(time.perf_counter() - middle, 4),
        }
        run.history.append(row)
        if due:
            if self.logs:  # first: what is killed here writes them anew, and a finished run is not looked at again
                self.logs.write(run.history)
            _save(run, self.out)
        return row

    def test_best(self) -> None:
        """With ``val_share`` tests the weights of the best epoch on the test images, and writes ``test.json``."""
        run, dist = self.run, self.run.dist
        if run.config.val_share is None:
            return
        dist.all_gather_object(None)  # best.pt is there
        state = run_checkpoint.read(self.out / run_checkpoint.BEST)
        path = self.out / run_checkpoint.TEST
        known = False
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # missing or damaged: it is written anew
            known = json.loads(path.read_text(encoding="utf-8"))["epoch"] == state["epoch"]
        if any(dist.all_gather_object(known)):
            return
        run.network.load_state_dict(state["model"])
        run.test = test_images(run.config, self.progress)
        found = {"epoch": state["epoch"], **evaluate(run)}
        if dist.rank == 0:
            atomic.write(path, (json.dumps(found) + "\n").encode())

    def close(self) -> None:
        """Closes the logs, and lets others have the folder."""
        with self._opened:
            if self.logs:
                self.logs.close()


def stored_config(out: str | Path) -> Config | None:
    """Returns the config of the run in a folder, or None; that in its checkpoint if ``config.json`` is missing or damaged."""
    path = Path(out) / CONFIG
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        if not run_checkpoint.exists(Path(out)):
            return None
        _LOG.warning("%s is missing or damaged: the settings are those in the checkpoint", path)
        stored = run_checkpoint.read(out)["config"]
    try:
        return build(from_stored(stored))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_folder(out: Path) -> None:
    """Raises ConfigError unless files can be written below ``out``."""
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"out {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"out {out}: can't write to {existing}")


def finished(config: Config, out: str | Path, images: tuple[data.Images, data.Images] | None) -> dict[str, Any] | None:
    """Returns the checkpoint in a folder if its run is finished, else None; errors are those of :func:`train`.

    Without ``images`` they are not compared with the run's.
    """
    state = _checkpoint_to_resume(config, Path(out), resume=True)
    if state is None:
        return None
    done = state["epoch"] >= config.epochs
    if config.val_share is not None:
        done &= (Path(out) / run_checkpoint.TEST).exists()
    if images is not None and (done or "data" in state):  # train() warns for a run that it resumes
        run_checkpoint.check_images(state, images, out)
    return state if done else None


def _checkpoint_to_resume(config: Config, out: Path, resume: bool) -> dict[str, Any] | None:
    """Returns the checkpoint in the run folder, or None; raises ConfigError if it must not be resumed."""
    if not run_checkpoint.exists(out):
        return None
    try:
        state = run_checkpoint.read(out)
    except run_checkpoint.Unreadable as error:
        raise ConfigError(f"{error}; --overwrite begins the run anew") from error
    if not resume:
        if state["epoch"] == 0:
            return None
        raise ConfigError(f"out {out} has a run: --resume, --overwrite, or choose another folder")
    before = build(state["config"])
    if state["epoch"] == 0 and before != config:  # nothing is lost if it begins anew
        return None
    if names := differing(before, config):
        changes = "; ".join(f"{name} was {getattr(before, name)!r}, is {getattr(config, name)!r}" for name in names)
        raise ConfigError(f"the run in {out} can't be resumed with other settings: {changes}")
    return state


def _save(run: Run, out: Path) -> None:
    """Writes config and checkpoint on rank 0, with the random states of all processes."""
    states = run.dist.all_gather_object(run_checkpoint.random_state(run.sampler_generator, run.augment_generator))
    if run.dist.rank:
        return
    out.mkdir(parents=True, exist_ok=True)
    run_checkpoint.remove_partial_files(out)
    text = json.dumps(run.config.as_dict(), indent=2) + "\n"
    atomic.write(out / CONFIG, text.encode())
    tested = [row for row in run.history if row["all"] is not None]
    best = max(tested, key=_class_mean if run.config.val_share else _all, default={"epoch": 0, "all": None})
    state = {
        "version": run_checkpoint.VERSION,
        "config": run.config.as_dict(),
        "epoch": run.epoch,
        "classes": list(run.train.classes),
        "class_counts": run.counts,
        "data": {"train": run.train.digest, "test": run.test.digest},
        "loss": run.loss.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": states,
        "history": run.history,
        "machine": machine(run.dist.device),
        "best": {"epoch": best["epoch"], "all": best["all"]},
    }
    if run.config.keep_weights or run.epoch < run.config.epochs:
        state |= {"model": run.network.state_dict(), "optimizer": run.optimizer.state_dict()}
    held_out = run.config.val is not None or run.config.val_share is not None
    if held_out and run.config.keep_weights and best["epoch"] == run.epoch > 0:
        atomic.write(out / run_checkpoint.BEST, state)  # first: a run killed here writes it again
    atomic.write(out / run_checkpoint.NAME, state, keep=out / run_checkpoint.BEFORE)
    if "model" not in state:
        (out / run_checkpoint.BEFORE).unlink(missing_ok=True)


def _all(row: dict[str, Any]) -> float:
    return row["all"]


def _class_mean(row: dict[str, Any]) -> float:
    """Returns what counts where the images that are tested on have a long tail themselves."""
    return statistics.mean(accuracy for accuracy in row["per_class"] if accuracy is not None)


def _restore(run: Run, state: dict[str, Any], out: Path) -> None:
    """Loads a checkpoint into the run, the random states last."""
    if len(state["random"]) != run.dist.world_size:
        raise ConfigError(
            f"the run had {len(state['random'])} processes, not {run.dist.world_size}: start it with as many"
        )
    if state["class_counts"] != run.counts:
        raise ConfigError(f"data: class counts were {state['class_counts']}, now they are {run.counts}")
    for was, now in zip(state["classes"], run.train.classes, strict=True):
        if was != now:
            raise ConfigError(f"data: a class was {was!r}, now it is {now!r}: rename it back, or start another run")
    run_checkpoint.check_images(state, (run.train, run.test), out)
    run.network.load_state_dict(run_checkpoint.weights(state, out))
    run.loss.load_state_dict(state["loss"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.scaler.load_state_dict(state["scaler"])
    run.history[:] = state["history"]
    run_checkpoint.set_random_state(state["random"][run.dist.rank], run.sampler_generator, run.augment_generator)
