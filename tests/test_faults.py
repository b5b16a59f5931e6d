"""A few of the faults that ``make faults`` injects many of, and whether it would find what is wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ltsam_fast import atomic
from ltsam_fast.train import build, cli, loop, run_checkpoint
from ltsam_fast.train.config import ConfigError, read_file
from ltsam_fast.train.loop import train

from .faults import Malicious

ROOT = Path(__file__).parents[1]
QUICK = ("--epochs", "2", "--no-tensorboard", "--quiet", "--n-max", "30", "--imbalance", "10")


def inject(*arguments, before=""):
    code = f"import sys\nfrom tests import faults\n{before}\nsys.exit(faults.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")
def test_a_few_faults_are_survived():
    pytest.importorskip("sklearn")
    kinds = (
        "kills",
        "interrupts",
        "files",
        "damage",
        "data",
        "clock",
        "workers",
        "processes",
    )
    done = inject(*kinds, "-n", 1, "--seed", 1, "--programs", "train,accelerate_loop,lightning_module")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*kinds] and not any("none" in line for line in lines)


SWALLOWING = """
import contextlib
from ltsam_fast import atomic

write = atomic.write

def swallowing(*args, **named):
    with contextlib.suppress(OSError):
        write(*args, **named)

atomic.write = swallowing
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be forked here")
def test_what_is_wrong_is_found():
    pytest.importorskip("sklearn")
    done = inject("files", "-n", 8, "--seed", 3, before=SWALLOWING)
    assert done.returncode == 1 and "FOUND: " in done.stdout and "faults files -n 8 --seed 3" in done.stdout, (
        done.stderr
    )


def command(name, *arguments):
    return cli.main([name, *map(str, arguments)])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    assert command("train", *QUICK, "--out", folder) == 0
    return folder


def test_the_checkpoint_before_the_last_is_used_with_a_word(run, capsys):
    wanted = torch.load(run / "last.pt", weights_only=True)["model"]
    content = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(content[:-100])
    assert command("train", "--resume", "--out", run, "--quiet") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run}/last.pt can't be read: it is damaged" in line and "previous.pt, of epoch 1, is used" in line
    found = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert torch.load(run / "previous.pt", weights_only=True)["epoch"] == 1  # not the damaged one
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"")
    assert command("train", "--resume", "--out", run, "--quiet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line and line.endswith("--overwrite begins the run anew")


def test_a_changed_bit_is_noticed(run):
    """torch.load reads over it."""
    content = bytearray((run / "last.pt").read_bytes())
    weights = torch.load(run / "last.pt", weights_only=True)["model"]["0.weight"].numpy().tobytes()
    content[content.index(weights) + 3] ^= 1
    (run / "last.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="last.pt can't be read: it is damaged, at .*/data/"):
        run_checkpoint.read(run / "last.pt")


def test_without_its_settings_a_run_has_those_of_the_checkpoint(run, capsys):
    for content in (None, b"", b"[1, 2]", b"\xff\xfe"):
        (run / "config.json").unlink()
        if content is not None:
            (run / "config.json").write_bytes(content)
        assert command("train", "--resume", "--out", run, "--quiet") == 0
        assert "config.json is missing or damaged: the settings are those in the checkpoint" in capsys.readouterr().err
        (run / "config.json").write_text("{}")


def test_a_checkpoint_of_a_later_format_is_refused(run, capsys):
    torch.save({**torch.load(run / "last.pt", weights_only=True), "version": 7}, run / "last.pt")
    for arguments in (("train", "--resume", "--quiet", "--out", run), ("diagnose", run)):
        assert command(*arguments) == 2
        assert (
            "is of format 7, of a later version of ltsam_fast; this one reads 1: update it" in capsys.readouterr().err
        )


def test_without_weights_nothing_is_kept_of_the_epoch_before(tmp_path):
    assert command("train", *QUICK, "--no-keep-weights", "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "config.json", "log.csv", "log.jsonl", ".lock"}


@pytest.mark.parametrize("where", ["in torch's format", "plain"])
@pytest.mark.parametrize(
    "command_line", [("train", "--resume", "--quiet", "--out"), ("diagnose",)], ids=lambda one: one[0]
)
def test_a_malicious_checkpoint_runs_nothing(command_line, where, run, tmp_path, capsys):
    mark = tmp_path / "executed"
    for name in ("last.pt", "previous.pt"):
        if where == "plain":
            (run / name).write_bytes(pickle.dumps(Malicious(mark)))
        else:
            torch.save({"version": 1, "epoch": Malicious(mark), "config": {}}, run / name)
    assert command(*command_line, run) == 2
    assert "last.pt can't be read" in capsys.readouterr().err and not mark.exists()
    torch.load(run / "last.pt", weights_only=False) if where != "plain" else pickle.loads(
        (run / "last.pt").read_bytes()
    )
    assert mark.exists()  # it would have


def test_a_malicious_file_of_settings_runs_nothing(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "run.yaml").write_text(f"lr: !!python/object/apply:os.mkdir [{mark}]\n")
    with pytest.raises(ConfigError, match="run.yaml"):
        build(read_file(tmp_path / "run.yaml"))
    assert not mark.exists()


def hold(folder, held):
    with run_checkpoint.lock(folder):
        held.send(None)
        time.sleep(600)


def test_one_process_at_a_time_trains_a_run(run, capsys):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(run, theirs), daemon=True)
    other.start()
    ours.recv()
    for arguments in (("--resume",), ("--overwrite", *QUICK)):
        assert command("train", *arguments, "--quiet", "--out", run) == 2
        assert f"out {run}: another process trains the run there" in capsys.readouterr().err
    other.kill()
    other.join()
    assert command("train", "--resume", "--quiet", "--out", run) == 0
    for _ in range(2):  # nor is it kept by a run that failed
        assert command("train", *QUICK, "--overwrite", "--out", run, "--method", "sam", "--set", "rho=1e30") == 1


@pytest.mark.parametrize(
    "error", [NotImplementedError(), OSError(errno.EOPNOTSUPP, "no"), OSError(errno.ENOSPC, "full")]
)
def test_a_file_system_without_locks_is_told(error, tmp_path, monkeypatch, capsys):
    def failing(self, *args, **named):
        raise error

    monkeypatch.setattr(pytest.importorskip("filelock").FileLock, "acquire", failing)
    full = getattr(error, "errno", None) == errno.ENOSPC
    assert command("train", *QUICK, "--out", tmp_path) == (2 if full else 0)
    assert ("full" if full else "has no locks: let no other process train") in capsys.readouterr().err


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_kill_after_the_last_checkpoint_leaves_is_completed(tmp_path, monkeypatch):
    """The logs are there by then, and compare does not take the run for finished without its test."""
    out = tmp_path / "grid"
    arguments = (*QUICK, "--val-share", 0.2, "--methods", "sgd", "--seeds", 0, "--out", out)
    assert command("compare", *arguments) == 0
    cell = out / "sgd-ce" / "seed0"
    tested = (cell / "test.json").read_text()
    (cell / "test.json").unlink()
    assert command("compare", *arguments) == 0
    assert (cell / "test.json").read_text() == tested
    seen, write = [], atomic.write

    def writing(path, *args, **named):
        seen.append(path.name)
        write(path, *args, **named)

    monkeypatch.setattr(atomic, "write", writing)
    train(build({"epochs": 1, "tensorboard": False}), tmp_path / "run")
    assert seen.index("log.jsonl") < len(seen) - 1 and seen[-1] == "last.pt"
    assert [row["epoch"] for row in lines_of(tmp_path / "run" / "log.jsonl")] == [1]


COMPARE = ("--methods", "sgd,sam", "--seeds", "0,1", "--epochs", "2000", "--no-tensorboard", "--quiet", "--jobs", "2")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_no_process_goes_on_without_compare(number, tmp_path):
    """A signal that reaches the first process only."""
    program = [sys.executable, "-m", "ltsam_fast", "compare", *COMPARE, "--out", str(tmp_path)]
    process = subprocess.Popen(
        program,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        while len(list(tmp_path.glob("*/*/last.pt"))) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -number)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("processes go on")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.stderr.close()


def test_ctrl_c_where_exceptions_are_dropped_is_not_lost(tmp_path, monkeypatch, capsys):
    """In a destructor; it interrupts a moment later."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    def saving(run, out, save=loop._save):
        if run.epoch == 2:
            Dropped()
        save(run, out)

    monkeypatch.setattr(loop, "_save", saving)
    hook = sys.unraisablehook
    assert command("train", *QUICK, "--epochs", 300, "--out", tmp_path) == 130
    said = capsys.readouterr().err
    assert "interrupted; to resume" in said and "ignored" not in said and sys.unraisablehook is hook


def test_a_killed_process_of_compare_is_a_line(tmp_path):
    program = [sys.executable, "-m", "ltsam_fast", "compare", *COMPARE, "--out", str(tmp_path)]
    process = subprocess.Popen(
        program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.glob("*/*/last.pt"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc")
    pids = [int(pid) for pid in children.read_text().split()]
    workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == (
        "ltsam_fast compare: a process was killed, perhaps for want of memory; repeat the command to go on, with fewer --jobs\n"
    )


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_timeout_that_is_none(text, monkeypatch):
    from ltsam_fast.train.distributed import timeout

    monkeypatch.setenv("LTSAM_TIMEOUT", text)
    with pytest.raises(ConfigError, match=r"LTSAM_TIMEOUT must be a number of seconds > 0, got"):
        timeout()
    monkeypatch.setenv("LTSAM_TIMEOUT", "90")
    assert timeout().total_seconds() == 90


def test_a_first_process_that_stands_still_is_told(tmp_path):
    """The store's connection is there and nothing comes: no timeout of torch's ends that."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "RANK": "1"}
        env = {**os.environ, **address, "WORLD_SIZE": "2", "LTSAM_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-m", "ltsam_fast", "train", *QUICK, "--out", str(tmp_path)]
        done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("ltsam_fast train (process 1): no answer from 127.0.0.1:")
    assert "within 2 s, twice the timeout, see LTSAM_TIMEOUT; another process may have failed or hang" in line


def test_the_layout_of_a_run_checkpoint(run):
    """What format 1 has; a later reader relies on it."""
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["version"] == run_checkpoint.VERSION == 1
    keys = "version config epoch classes class_counts data loss scheduler scaler random history machine best model optimizer"
    assert [*state] == keys.split()
    assert [*state["random"][0]] == ["python", "numpy", "torch", "cuda", "generators"]
