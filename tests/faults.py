"""Injects faults into training, and checks what is left: ``make faults``, or ``python -m tests.faults [KIND ...] -n 50``.

A process is forked for each run, so that a run needs no start-up and may be killed at any moment of it. What a run must come to
after all faults is what an undisturbed one does, bit for bit. ``--seed`` repeats a choice of faults.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import functools
import hashlib
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ltsam_fast as lf
from ltsam_fast.data import embedded

Program = Callable[[Path], Any]
KINDS: dict[str, Callable[[Faults], None]] = {}


def kind(function: Callable[[Faults], None]) -> Callable[[Faults], None]:
    KINDS[function.__name__] = function
    return function


class Finding(AssertionError):
    """A fault that was not survived."""


class Faults:
    """A choice of faults, and how many there were."""

    def __init__(self, times: int, seed: int, folder: Path, programs: Iterable[str]) -> None:
        self.times, self.folder, self.programs, self.random = times, folder, programs, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.known: dict[Any, Any] = {}
        self.chosen: dict[str, list[tuple[str, ...]]] = {}

    def arguments(self, name: str) -> tuple[str, ...]:
        """Some for a program, of a few that are drawn once."""
        if name not in self.chosen:
            self.chosen[name] = [PROGRAMS[name][1](self.random) for _ in range(4)]
        return self.random.choice(self.chosen[name])

    def new(self) -> Path:
        """A folder that is not there yet."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def undisturbed(self, key: Any, program: Program) -> tuple[Any, float]:
        """What a run comes to, and how long it takes."""
        if key not in self.known:
            folder, start = self.new(), time.monotonic()
            with Child(program, folder) as child:
                child.ends(0)
            self.known[key] = outcome(folder), time.monotonic() - start
        return self.known[key]

    def same(self, folder: Path, wanted: dict[str, str], *said: Any) -> None:
        """Raises unless the folder has what an undisturbed run leaves."""
        found = outcome(folder)
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        self.check(not different, *said, "ends otherwise than undisturbed:", different)

    def check(self, holds: Any, *said: Any) -> None:
        if not holds:
            raise Finding(" ".join(map(str, said)))


class Child:
    """A forked process that runs a program in a folder; its output is in a file."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.folder, self.output = folder, Path(tempfile.mkstemp(".output", dir=folder.parent)[1])
        self.began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self.pid = os.fork()
        if not self.pid:
            self._run(program)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        self.status: int | None = None

    def _run(self, program: Program) -> None:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program runs
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            number = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(number, stream)
            sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
            faulthandler.enable()
            code = program(self.folder)
            code = code if isinstance(code, int) else 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.poll() is None:
            self.send(signal.SIGKILL)
            self.wait(60)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float) -> int | None:
        """Waits for the end, but not longer."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        return self.poll()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        """Its output, without faulthandler's list of modules."""
        return self.output.read_text().partition("\nExtension modules")[0]

    def ends(self, *codes: int, within: float = 120) -> int:
        """Waits for the end, with one of these exit codes."""
        code = self.wait(within)
        if code is None:
            self.send(signal.SIGABRT)  # it says where it hangs
            self.wait(10)
        if code not in codes:
            raise Finding(f"{'hangs' if code is None else f'exit code {code}'}, not {codes}: {self.said()[-3000:]}")
        return code


# --- what a run comes to

PASSING = {"seconds", "eval_seconds", "machine", "callbacks"}
"""Entries that differ between equal runs."""


def outcome(folder: Path) -> dict[str, str]:
    """A digest of each file with tensors or results in a folder, without times; of an example's checkpoints the last."""
    found = {}
    last = max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=None)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("unfinished") or (
            name.startswith("checkpoint-") and not name.startswith(f"checkpoint-{last}/")
        ):
            continue
        if path.suffix in (".pt", ".ckpt", ".bin") and path.name != "training_args.bin":
            found[name] = digest(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("log.jsonl", "test.json", "chosen.json"):
            found[name] = digest([json.loads(line) for line in path.read_text().splitlines()])
    return found


def digest(value: Any) -> str:
    """A digest of all bits of tensors and numbers in a value."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                if key not in PASSING:
                    found.update(repr(key).encode())
                    add(one)
        elif isinstance(value, (list, tuple)):
            found.update(f"{len(value)}".encode())
            for one in value:
                add(one)
        elif isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {value.shape}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()


# --- programs

QUICK = ["--imbalance", "20", "--n-max", "60", "--test-per-class", "10", "--batch-size", "16", "--no-tensorboard"]


def command(*arguments: str) -> int:
    main = importlib.import_module("ltsam_fast.train.cli").main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(arguments)


def train(*arguments: str) -> Program:
    """The command, as it is typed again after each fault."""

    def run(folder: Path) -> int:
        from ltsam_fast.train import run_checkpoint

        return command("train", *QUICK, *arguments, *["--resume"] * run_checkpoint.exists(folder), "--out", str(folder))

    return run


def compare(*arguments: str) -> Program:
    def run(folder: Path) -> int:
        return command("compare", *QUICK, *arguments, "--out", str(folder))

    return run


def example(name: str, *arguments: str) -> Program:
    def run(folder: Path) -> None:
        importlib.import_module(f"ltsam_fast.examples.{name}").main([*arguments, "--out", str(folder)])

    return run


def some_train(draw: random.Random) -> tuple[str, ...]:
    """Arguments of a run of 4 epochs."""
    method = draw.choice(["sgd", *lf.list_methods()])
    loss = draw.choice(["ce", "la", "gcl", "ldam"])
    more = draw.choice(
        [
            (),
            ("--val-share", "0.2"),
            ("--amp", "fp16"),
            ("--eval-every", "3"),
            ("--optimizer", "adamw", "--lr", "0.001"),
        ]
    )
    return ("--quiet", "--method", method, "--loss", loss, "--epochs", "4", *more)


def some_compare(draw: random.Random) -> tuple[str, ...]:
    method = draw.choice(lf.list_methods())
    return ("--quiet", "--methods", f"sgd,{method}", "--seeds", "0,1", "--epochs", "2")


def some_example(draw: random.Random) -> tuple[str, ...]:
    method = draw.choice(lf.list_methods())
    return ("--epochs", "2", "--method", method, "--accumulate", draw.choice(["1", "2"]))


NEEDS = {
    "plain_loop": (),
    "accelerate_loop": ("accelerate",),
    "lightning_module": ("lightning",),
    "hugging_face_lora": ("transformers", "peft"),
}
PROGRAMS: dict[str, tuple[Callable[..., Program], Callable[[random.Random], tuple[str, ...]]]] = {
    "train": (train, some_train),
    "compare": (compare, some_compare),
    **{name: (functools.partial(example, name), some_example) for name in NEEDS},
}
COMMANDS = ("train", "compare")
LATE = ("ltsam_fast.train.compare", "ltsam_fast.train.describe", "sklearn.datasets", "matplotlib.backends.backend_agg")


def there(names: Iterable[str]) -> list[str]:
    """Those whose packages are installed; they are imported, for all processes."""
    found = []
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            for module in (*NEEDS.get(name, ()), *LATE):
                importlib.import_module(module)
            importlib.import_module(f"ltsam_fast.examples.{name}" if name in NEEDS else "ltsam_fast.train.cli")
            found.append(name)
    embedded._pixels_and_labels()
    return found


# --- kinds of faults


@kind
def kills(faults: Faults) -> None:
    """``kill -9`` at random moments of the commands and the examples: run again they end alike."""
    for name in there(faults.programs):
        while faults.counts[f"kills, {name}"] < faults.times:
            _disturbed(faults, name, signal.SIGKILL)


@kind
def interrupts(faults: Faults) -> None:
    """Ctrl-C and SIGTERM at random moments of the commands: the former is told in a line, and both may be resumed."""
    for name in there(one for one in COMMANDS if one in faults.programs):
        while faults.counts[f"Ctrl-C, {name}"] < faults.times:
            _disturbed(faults, name, signal.SIGINT)
        while faults.counts[f"SIGTERM, {name}"] < faults.times / 4:
            _disturbed(faults, name, signal.SIGTERM)


NAMES = {signal.SIGKILL: "kills", signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def _disturbed(faults: Faults, name: str, number: int) -> None:
    """A run with up to eight signals, then undisturbed."""
    arguments = faults.arguments(name)
    program, folder = PROGRAMS[name][0](*arguments), faults.new()
    wanted, seconds = faults.undisturbed((name, arguments), program)
    for attempt in range(9):
        with Child(program, folder) as child:
            if attempt < 8 and child.wait(faults.random.uniform(0.0, 1.1 * seconds)) is None:
                child.send(number)
                code = child.ends(0, -number, *([130] if number == signal.SIGINT else []))
                faults.counts[f"{NAMES[number]}, {name}"] += 1
                said = child.said()
                faults.check("Traceback" not in said, name, arguments, said[-3000:])
                faults.check(code != 130 or said.count("interrupted") == 1, name, arguments, said)
                if code:
                    continue
            child.ends(0)
            break
    faults.same(folder, wanted, name, arguments)
    shutil.rmtree(folder.parent)


FAULTS_OF_FILES = {
    "disk full": errno.ENOSPC,
    "read-only": errno.EROFS,
    "forbidden": errno.EACCES,
    "input/output error": errno.EIO,
    "killed": None,
}


@kind
def files(faults: Faults) -> None:
    """Each call for a file of a run fails, or is the last: one line names the file, and the run can be resumed."""
    arguments = ("--quiet", "--method", "focal_sam", "--epochs", "2", "--val-share", "0.2")
    wanted, _ = faults.undisturbed("files", train(*arguments))
    places = [(call, number) for call in ("open", "fsync", "replace") for number in range(13)]
    faults.random.shuffle(places)
    for call, number in places[: faults.times]:
        for what, error in FAULTS_OF_FILES.items():
            folder = faults.new()
            with Child(functools.partial(_failing, train(*arguments), call, number, error), folder) as child:
                code = child.ends(*((0, 2) if error else (0, -signal.SIGKILL)))
            said = child.said()
            if code == 0:  # there are not so many calls
                faults.check(outcome(folder) == wanted, what, call, number, "a failure was not noticed", said)
                break
            faults.counts[what] += 1
            if error:
                line = said.splitlines()[-1]
                faults.check("Traceback" not in said and os.strerror(error) in line, what, call, number, said[-3000:])
                faults.check(str(folder) in line, what, call, number, "no file is named:", line)
            faults.check(error is None or not list(folder.glob("*.part")), what, call, number, "leaves a partial file")
            with Child(train(*arguments), folder) as child:
                child.ends(0)
            faults.same(folder, wanted, what, call, number)
            shutil.rmtree(folder.parent)


def _failing(program: Program, name: str, number: int, error: int | None, folder: Path) -> Any:
    """Runs a program in which the given call for a file in the folder fails."""
    from ltsam_fast import atomic

    calls = [0]

    def counted(function: Callable[..., Any], about: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if about(*args):
                calls[0] += 1
                if calls[0] == number + 1:
                    if error is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(error, os.strerror(error), str(args[0]))
            return function(*args, **named)

        return call

    if name == "open":
        Path.open = counted(Path.open, lambda path, mode="r", *_: "w" in mode and folder in path.parents)  # type: ignore
    elif name == "replace":
        os.replace = counted(os.replace, lambda path, *_: folder in Path(path).parents)
    else:
        inside = lambda number: folder in Path(os.readlink(f"/proc/self/fd/{number}")).parents  # noqa: E731
        os.fsync = counted(os.fsync, inside)
    assert atomic.os is os
    return program(folder)


@kind
def disk(faults: Faults) -> None:
    """A disk that fills up, or turns read-only, in a run: a real one, in memory, where a user may mount that."""
    if os.environ.get("LTSAM_MOUNTS") is None:
        again = [
            sys.executable,
            "-m",
            "tests.faults",
            "disk",
            "-n",
            str(faults.times),
            "--seed",
            str(faults.random.random()),
        ]
        if (
            shutil.which("unshare") is None
            or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode
        ):
            print("disk: left out, since unshare -Urm is not allowed here")
            return
        done = subprocess.run(["unshare", "-Urm", *again], env={**os.environ, "LTSAM_MOUNTS": "1"})
        faults.check(done.returncode == 0, "the disk's faults were not survived")
        faults.counts["as above"] = faults.times
        return
    for _ in range(faults.times):
        arguments = faults.arguments("train")
        program, folder = train(*arguments), faults.new()
        wanted, seconds = faults.undisturbed(("train", arguments), program)
        folder.mkdir()
        mount = functools.partial(subprocess.run, check=True, capture_output=True)
        mount(["mount", "-t", "tmpfs", "-o", f"size={faults.random.randrange(8, 700)}k", "none", str(folder)])
        with Child(program, folder) as child:
            if child.wait(faults.random.uniform(0, seconds)) is None and faults.random.random() < 0.5:
                with contextlib.suppress(subprocess.CalledProcessError):  # a file is being written
                    mount(["mount", "-o", "remount,ro", str(folder)])
            if child.ends(0, 2) == 2:
                said = child.said()
                faults.counts["disk, in a line"] += 1
                faults.check("Traceback" not in said and str(folder) in said.splitlines()[-1], arguments, said[-3000:])
        mount(["mount", "-o", "remount,rw,size=64m", str(folder)])
        with Child(program, folder) as child:
            child.ends(0)
        faults.same(folder, wanted, arguments)
        faults.counts["disk"] += 1
        mount(["umount", str(folder)])


@kind
def damage(faults: Faults) -> None:
    """A file of a run that is cut, changed, lost or malicious: the run ends alike, or a line names the file."""
    arguments = ("--quiet", "--method", "friendly_sam", "--epochs", "3", "--val-share", "0.2")
    program = train(*arguments)
    wanted, _ = faults.undisturbed("damage", program)
    template = faults.new()
    with Child(functools.partial(_stopped_after, program, 2), template) as child:
        child.ends(130)
    names = sorted(path.name for path in template.iterdir() if path.is_file() and path.name != ".lock")
    for _ in range(faults.times):
        folder, name = faults.new(), faults.random.choice([*names, "last.pt"])
        shutil.copytree(template, folder)
        how = faults.random.choice(list(DAMAGES))
        mark = folder.parent / "executed"
        DAMAGES[how](folder / name, faults.random, mark)
        with Child(program, folder) as child:
            code = child.ends(0, 2)
        said = child.said()
        faults.counts[f"damage: {how}"] += 1
        faults.check(not mark.exists(), how, name, "was executed")
        faults.check("Traceback" not in said, how, name, said[-3000:])
        if code:
            faults.check(said.count("\n") <= 2 and name in said.splitlines()[-1], how, name, said)
            faults.check(name == "best.pt", how, name, "a run could not go on:", said)
        else:
            faults.same(folder, wanted, how, name)
        if name == "last.pt" and how != "a bit":
            faults.check("previous.pt, of epoch 1, is used" in said, how, name, "without a word", said)
        shutil.rmtree(folder.parent)


def _stopped_after(program: Program, epochs: int, folder: Path) -> Any:
    from ltsam_fast.train import loop

    save, saved = loop._save, []

    def stopping(run: Any, out: Path) -> None:
        save(run, out)
        saved.append(run.epoch)
        if run.epoch == epochs:
            raise KeyboardInterrupt

    loop._save = stopping
    return program(folder)


class Malicious:
    """What executes code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def _cut(path: Path, draw: random.Random, mark: Path) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _bit(path: Path, draw: random.Random, mark: Path) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _zeros(path: Path, draw: random.Random, mark: Path) -> None:
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    path.write_bytes(content)


def _malicious(path: Path, draw: random.Random, mark: Path) -> None:
    if draw.random() < 0.5:
        torch.save({"version": 1, "epoch": Malicious(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(mark)))


DAMAGES: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "cut": _cut,
    "a bit": _bit,
    "zeros": _zeros,
    "malicious": _malicious,
    "lost": lambda path, *_: path.unlink(),
    "empty": lambda path, *_: path.write_bytes(b""),
}


@kind
def data(faults: Faults) -> None:
    """CIFAR's pickles, images and their cache, damaged or malicious: read as before, or named in a line."""
    from .test_readers import dump, write_cifar

    draw = np.random.default_rng(faults.random.randrange(2**31))
    folder = faults.new()
    write_cifar(folder / "cifar", "cifar10", draw, each=2)
    for number in range(6):
        path = folder / "tree" / "train" / "ab"[number % 2] / f"{number}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = importlib.import_module("PIL.Image").fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image.save(path)
    sources = {"cifar": {}, "tree": {"cache": folder / "cache"}}
    wanted = {name: data_of(folder / name, more) for name, more in sources.items()}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]

    def damaged(_: Path) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        for _ in range(20 * faults.times):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            path, how, mark = faults.random.choice(files), faults.random.choice(list(DAMAGES)), folder / "executed"
            if how == "malicious" and "cifar" in path.parts:
                dump(path, {b"data": Malicious(mark), b"labels": [Malicious(mark)], b"label_names": Malicious(mark)})
            else:
                DAMAGES[how](path, faults.random, mark)
            for name, more in sources.items():
                try:
                    found = data_of(folder / name, more)
                except lf.data.DataError as error:
                    faults.check("\n" not in str(error) and str(folder) in str(error), how, path, error)
                    faults.check("cache" not in path.parts, how, path, "the cache was not built anew", error)
                else:
                    alike = "cifar" in path.parts or path.suffix in (".png", ".jpg")  # where other pixels may be meant
                    faults.check(alike or found == wanted[name], how, path, "other images without a word")
            faults.check(not mark.exists(), how, path, "was executed")

    kept = shutil.copytree(folder, folder.with_name("kept"))
    with Child(damaged, folder) as child:
        child.ends(0, within=600)
    faults.counts["data"] += 20 * faults.times


def data_of(source: Path, more: dict[str, Any]) -> str:
    images = lf.data.load(source, **more)
    return digest([images.pixels, images.labels, images.classes])


@kind
def clock(faults: Faults) -> None:
    """A clock that goes back all the time."""
    for _ in range(max(1, faults.times // 10)):
        arguments = (*faults.arguments("train"), "--tensorboard")
        program = functools.partial(_with_clock_going_back, train(*arguments))
        wanted, seconds = faults.undisturbed(("train", arguments), train(*arguments))
        folder = faults.new()
        with Child(program, folder) as child:
            if child.wait(faults.random.uniform(0.3, 1) * seconds) is None:
                child.send(signal.SIGKILL)
        with Child(program, folder) as child:
            child.ends(0)
        faults.same(folder, wanted, arguments)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        faults.check(all(row["seconds"] >= 0 and row["eval_seconds"] >= 0 for row in rows), arguments, rows)
        faults.counts["clock"] += 1


def _with_clock_going_back(program: Program, folder: Path) -> Any:
    begin, now = time.time(), time.monotonic
    time.time = lambda: begin - 1000 * now()
    return program(folder)


@kind
def steps(faults: Faults) -> None:
    """Ctrl-C at random moments of every method's step: the weights are those after a whole number of steps."""
    from .test_perturbation import DRIVEN, EVERY, INTERRUPTED

    for interface in ("closure", "phases"):
        names = [name for name, way in DRIVEN if way == interface and not EVERY[name].averages]
        rounds = -(-faults.times // (20 * len(names)))
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, interface, *names * rounds], capture_output=True, text=True
        )
        faults.check(done.returncode == 0, interface, done.stderr[-3000:])
        for line in done.stdout.splitlines():
            faults.counts[f"Ctrl-C, {interface}"] += int(line.split()[1])


TIMEOUT = 4.0
"""Seconds after which a collective call fails."""
OF_WORKERS = ("dies", "stops", "hangs", "raises", "overflows")
WITH = ("a scaler", "autocast", "groups", "parts")


@kind
def workers(faults: Faults) -> None:
    """One of two workers fails in a pass of a step: the other has an error before long, and both their weights of before."""
    from .workers import EVERY

    for _ in range(faults.times):
        name, what = faults.random.choice(list(EVERY)), faults.random.choice(OF_WORKERS)
        wrap = "DDP" if name in ("CCSAM", "SparseSAM") else faults.random.choice(("DDP", "FSDP2"))
        mixed = tuple(one for one in WITH if faults.random.random() < 0.5)
        number = faults.random.randint(1, 4 if "parts" in mixed else 2)
        case = (name, what, number, wrap, mixed)
        folder = faults.new()
        folder.mkdir()
        with contextlib.ExitStack() as opened:
            pair = [
                opened.enter_context(Child(functools.partial(_works, *case, rank, folder), folder / str(rank)))
                for rank in range(2)
            ]
            pair[0].ends(0, within=60)
            if what in ("raises", "overflows"):
                pair[1].ends(0, within=60)
        notes = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.notes"))]
        if not notes[0]["reached"]:
            continue  # a method of one pass
        faults.counts[f"a worker {what}, {wrap}"] += 1
        faults.counts.update(f"with {one}" for one in mixed)
        for note in notes:
            if note["reached"]:
                faults.check(note["unperturbed"], *case, note)
                faults.check(note["said"] or what == "overflows", *case, "no error", note)
                faults.check(note["seconds"] < TIMEOUT + 10, *case, note)
        if what == "overflows":
            faults.check(notes[0]["weights"] == notes[1]["weights"], *case, "the workers part")
            faults.check(notes[0]["moved"] and not notes[0]["said"], *case, notes)
        shutil.rmtree(folder.parent)


def _works(
    name: str, what: str, number: int, wrap: str, mixed: tuple[str, ...], rank: int, folder: Path, _: Path
) -> None:
    import datetime

    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from . import workers as jobs
    from .method_rows import two_groups

    dtype = torch.float32 if "autocast" in mixed else torch.float64
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=TIMEOUT))
    model = (DistributedDataParallel if wrap == "DDP" else jobs.shard)(jobs.network(dtype))
    opt = jobs.make(name, two_groups(model) if "groups" in mixed else model, "sgd", model=model)
    scaled, data = what == "overflows" or "a scaler" in mixed, jobs.share(jobs.batches(dtype, steps=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, enabled=scaled)
    passes = [0]

    def step(x: torch.Tensor, y: torch.Tensor, fails: bool) -> None:
        passes[0] = 0
        sizes = [3, 5] if "parts" in mixed else [8]

        def evaluate(x: torch.Tensor, y: torch.Tensor, index: Any = slice(None)) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mixed):
                losses = F.cross_entropy(model(x[index]), y[index], reduction="none")
            passes[0] += 1
            if fails and passes[0] == number and rank == 1:
                if what == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if what == "hangs":
                    time.sleep(1000)
                if what == "raises":
                    raise MemoryError("of a worker")
                losses = losses * torch.inf
            return losses

        parts = [*zip(x.split(sizes), y.split(sizes), strict=True)]
        closures = [functools.partial(evaluate, *part) for part in parts]
        opt.step(closures, targets=[labels for _, labels in parts], scaler=scaler)
        scaler.update(8.0) if scaled else None

    def bits() -> str:
        return digest([getattr(param, "_local_tensor", param) for param in model.parameters()])

    step(*data[0], fails=False)
    before, start, said = bits(), time.monotonic(), ""
    try:
        step(*data[1], fails=True)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    note = {"said": said, "seconds": time.monotonic() - start, "unperturbed": bits() == before and not opt.is_perturbed}
    note |= {"reached": passes[0] >= number or bool(said)}
    if what == "overflows" and not said:
        step(*data[2], fails=False)
        note |= {"moved": bits() != before, "weights": digest(jobs.whole(model))}
    torch.save(note, folder / f"{rank}.notes")


@kind
def processes(faults: Faults) -> None:
    """One of two processes of ``train`` is killed or stands still: the other says so before long, and both can be resumed."""
    arguments = ("--quiet", "--method", "focal_sam", "--epochs", "4", "--val-share", "0.2")

    def together(folder: Path) -> list[Child]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        address |= {"WORLD_SIZE": "2", "LTSAM_TIMEOUT": str(TIMEOUT)}
        return [
            Child(functools.partial(_as_process, {**address, "RANK": str(rank)}, train(*arguments)), folder)
            for rank in (0, 1)
        ]

    def finished(folder: Path) -> None:
        for child in together(folder):
            with child:
                child.ends(0)

    there(["train"])
    importlib.import_module("torch._dynamo")  # DDP does, for a second or many
    whole, start = faults.new(), time.monotonic()
    finished(whole)
    wanted, seconds = outcome(whole), time.monotonic() - start
    for number, what in ((signal.SIGKILL, "a process killed"), (signal.SIGSTOP, "a process stopped")):
        while faults.counts[what] < max(1, faults.times // 10):
            folder, victim = faults.new(), faults.random.randrange(2)
            with contextlib.ExitStack() as opened:
                pair = [opened.enter_context(child) for child in together(folder)]
                if pair[victim].wait(faults.random.uniform(0.05, 0.9) * seconds) is None:
                    pair[victim].send(number)
                    code = pair[1 - victim].ends(0, 1, within=TIMEOUT + 30)
                    said = pair[1 - victim].said()
                    faults.check(code == 0 or "another process" in said.splitlines()[-1], what, said[-3000:])
                    faults.counts[what] += 1
            finished(folder)
            faults.same(folder, wanted, what)
            shutil.rmtree(folder.parent)


def _as_process(environment: dict[str, str], program: Program, folder: Path) -> Any:
    os.environ.update(environment)
    return program(folder)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument("-n", "--times", type=int, default=50, help="how often each fault is injected (default 50)")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which are killed (default: %(default)s)")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(2**31)), help="of the choice of faults")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    torch.set_num_threads(1)
    embedded._pixels_and_labels = functools.cache(embedded._pixels_and_labels)  # once for all processes
    failed = 0
    for name in options.kinds or KINDS:
        counts, finding, seconds = inject(name, options.times, options.seed, options.programs.split(","))
        said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"{name}: {said or 'none'}, in {seconds:.0f} s" + (f"\nFOUND: {finding}" if finding else ""), flush=True)
        if finding:
            print(f"to repeat it: python -m tests.faults {name} -n {options.times} --seed {options.seed}", flush=True)
            failed = 1
    return failed


def inject(name: str, times: int, seed: Any, programs: Iterable[str] = PROGRAMS) -> tuple[Counter[str], str, float]:
    """Injects one kind of faults; returns their counts, the first finding, and the time."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        faults = Faults(times, hash_of(f"{seed} {name}"), Path(folder), programs)
        try:
            KINDS[name](faults)
        except Finding as finding:
            return faults.counts, str(finding), time.monotonic() - start
    return faults.counts, "", time.monotonic() - start


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


if __name__ == "__main__":
    sys.exit(main())
