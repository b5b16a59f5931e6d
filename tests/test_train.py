"""``python -m ltsam_fast train`` and ``compare``: what they accept, leave behind, and go on from."""

from __future__ import annotations

import copy
import csv
import functools
import gzip
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ltsam_fast as lf
from ltsam_fast import data, demo, diagnostics, models

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from ltsam_fast.optim import capture
from ltsam_fast.optim.registry import method_named
from ltsam_fast.train import METHODS, Config, ConfigError, Diverged, build, cli, loop, read_file, train
from ltsam_fast.train import run as run_module
from ltsam_fast.train.config import FIELDS, active_steps, differing
from ltsam_fast.train.distributed import process_group
from ltsam_fast.train.log import Silent
from ltsam_fast.train.loop import train_together
from ltsam_fast.train.loss_registry import LOSSES, reweight, same_noise
from ltsam_fast.train.method_registry import check_options, options_of
from ltsam_fast.train.run import load_images, prepare

from .networks import smooth
from .test_capture import tape  # noqa: F401

CE = torch.nn.CrossEntropyLoss(reduction="none")
QUICK = {"epochs": 2, "tensorboard": False}


def run(*arguments, command="train"):
    """The command in this process; its exit code."""
    return cli.main([command, *map(str, arguments)])


def command_line(*arguments, launcher=("-m", "ltsam_fast")):
    """The command as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(lf.__file__).parents[1])])}
    return subprocess.Popen(
        [sys.executable, *map(str, (*launcher, *arguments))],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def same_weights(one, other):
    first, second = last(one)["model"], last(other)["model"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_method_of_the_package_has_a_name():
    assert [*METHODS] == ["sgd", *lf.list_methods()]
    assert METHODS["sgd"] == "SGD" and METHODS["focal_sam"] == "Focal-SAM"


class StopIn(Silent):
    """Ctrl-C after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def advance(self, steps):
        self.steps -= steps
        if not self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "loss"), [*((method, "ce") for method in METHODS), *(("sam", loss) for loss in LOSSES)]
)
def test_every_method_and_loss_resumes_exactly(method, loss, tmp_path):
    config = build({"method": method, "loss": loss, "epochs": 3, "drw_start": 2, "tensorboard": False})
    train(config, tmp_path / "at_once")
    for steps in (2, 9):  # in the first epoch, and again, six steps further on, in the second
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", resume=True, report=StopIn(steps))
    assert last(tmp_path / "stopped")["epoch"] == 1
    rows = train(config, tmp_path / "stopped", resume=True)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert same_weights(tmp_path / "at_once", tmp_path / "stopped")
    logged = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert logged == rows


@pytest.mark.parametrize(
    "more",
    [
        {"amp": "fp16"},
        {"amp": "fp16", "init_scale_overflows": True},
        {"amp": "bf16", "method": "look_sam", "optimizer": "adamw", "lr": 1e-3, "warmup": 1},
        {"method": "gnm", "loss": "gcl"},
        {"method": "friendly_sam", "loss": "ldam", "drw_start": 1, "schedule": "step", "milestones": (1,)},
    ],
    ids=str,
)
def test_resumes_exactly_with_augmentation_scaler_and_state(more, tmp_path, monkeypatch):
    more = dict(more)
    overflows = more.pop("init_scale_overflows", False)
    if overflows:  # steps are skipped, and the scale falls, on both sides of the stop
        monkeypatch.setattr(loop.torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**60))
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = data.Images(pixels, torch.arange(60).square() // 360, tuple("abcdefghij"))
    images = (images, images)
    assert data.Augment.for_training(images[0]).crop_padding and data.Augment.for_training(images[0]).flip
    settings = {"model": "small_cnn", "epochs": 3, "batch_size": 8, "tensorboard": False, "imbalance": None}
    config = build({"method": "focal_sam", **settings, **more})
    train(config, tmp_path / "at_once", images=images)
    for steps in (2, 11):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", resume=True, report=StopIn(steps), images=images)
    train(config, tmp_path / "stopped", resume=True, images=images)
    assert same_weights(tmp_path / "at_once", tmp_path / "stopped")
    scalers = [last(tmp_path / name)["scaler"] for name in ("at_once", "stopped")]
    assert scalers[0] == scalers[1]
    assert not overflows or scalers[0]["scale"] < 2.0**50


def before_a_step(method, loss):
    """A run with reweighted classes before its first step, and a batch of it."""
    settings = {"method": method, "loss": loss, "drw_start": 0, "batch_size": 32, "momentum": 0.0, "imbalance": 20.0}
    own = {"direction": "last_gradient"} if method == "momentum_sam" else {}
    config = build({**settings, "options": own, "tensorboard": False})
    with process_group("cpu") as dist:
        run = prepare(config, dist)
    reweight(run.loss, config, run.counts, 0)
    run.network.train()
    batch = torch.randperm(len(run.train), generator=torch.Generator().manual_seed(1))[:32]
    return run, run.test_transform(run.train.pixels[batch]), run.train.labels[batch]


@pytest.mark.parametrize(
    ("method", "loss"), [*((method, "ce") for method in METHODS), *(("sgd", loss) for loss in LOSSES)]
)
def test_weights_of_the_classes_divide_by_their_sum_over_the_batch(method, loss):
    """As in the code that deferred reweighting is from: criterion(weight=w) with torch's mean."""
    mine, x, y = before_a_step(method, loss)
    shown = loop.take_step(mine, x, y)
    other, *_ = before_a_step(method, loss)
    weight = other.loss.weight.float()
    assert weight.max() > 5 * weight.min()
    if method == "sgd":
        other.loss.reduction = "mean"
        with same_noise(other.loss):
            published = other.loss(other.network(x), y)
        published.backward()
        other.optimizer.step()
        assert loss != "ce" or published.item() == pytest.approx(
            F.cross_entropy(before_a_step(method, loss)[0].network(x), y, weight).item(), rel=1e-6
        )
    else:
        scale = len(y) / weight[y].sum()

        def closure(index=slice(None)):
            return scale * F.cross_entropy(other.network(x[index]), y[index], weight, reduction="none")

        published = other.optimizer.step(closure, y)
    assert shown.item() == pytest.approx(published.item(), rel=1e-6)
    moved = zip(mine.network.parameters(), other.network.parameters(), strict=True)
    for one, two in moved:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def with_default_dtype(request):
    """Calls a function as usual, and with another default dtype; returns both results."""

    def both(function):
        results, before = [function()], torch.get_default_dtype()
        try:
            torch.set_default_dtype(request.param)
            results.append(function())
            assert torch.get_default_dtype() == request.param
        finally:
            torch.set_default_dtype(before)
        return results

    return both


def same(one, other):
    """Equal to the last bit, and of the same dtypes."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("method", "loss"), [*((method, "ce") for method in METHODS), *(("sgd", loss) for loss in LOSSES)]
)
def test_no_run_depends_on_the_default_dtype(method, loss, with_default_dtype, tmp_path):
    settings = {"method": method, "loss": loss, "epochs": 1, "imbalance": 30.0, "drw_start": 0, "tensorboard": False}
    folders = iter((tmp_path / "usual", tmp_path / "other"))

    def weights():
        folder = next(folders)
        return [row["train_loss"] for row in train(build(settings), folder)], last(folder)["model"]

    same(*with_default_dtype(weights))


@pytest.mark.parametrize("name", models.names()[:1] + models.names()[-2:])
def test_no_part_depends_on_the_default_dtype(name, with_default_dtype):
    def parts():
        torch.manual_seed(0)
        counts = [9, 4, 2]
        criteria = [cls(counts, reduction="none") for _, cls in LOSSES.values()]
        pixels = torch.arange(6 * 64 * 3).view(6, 3, 8, 8).mul(7).to(torch.uint8)
        images, y = data.Images(pixels[:, :1], torch.arange(6) % 3, tuple("abc")), torch.arange(6) % 3
        network = models.create(name, 3, (3, 8, 8), cosine_head=True).eval()
        prepare = data.Augment((0.4,) * 3, (0.2,) * 3, crop_padding=1, flip=True)
        asked = {"num_classes": 3, "prepare": prepare.for_testing(data.Images(pixels, y, tuple("abc")))}
        weights = lf.losses.deferred_reweighting(9, counts, 3)
        criteria[0].set_weight([0.5, 1, 2])
        generator = torch.Generator().manual_seed(0)
        logits = network(prepare(pixels, generator))
        return [
            vars(data.digits()),
            vars(data.Augment.for_training(images)),
            weights,
            [[dict(criterion.named_buffers()), criterion(logits, y, batch=y)] for criterion in criteria],
            [vars(diagnostics.class_grad_norms(network, criteria[1], pixels, y, **asked))],
            [vars(diagnostics.class_sharpness(network, criteria[1], pixels, y, rho=0.1, **asked))],
            [vars(diagnostics.loss_slice(network, CE, pixels, y, steps=3, generator=generator, prepare=prepare))],
            [vars(diagnostics.top_hessian_eigenvalue(network, CE, pixels, y, iterations=3, prepare=asked["prepare"]))],
            {
                key: value
                for key, value in demo.train("sam", data.digits(), 1, 0, lambda: None).items()
                if key != "step_ms"
            },
        ]

    one, other = with_default_dtype(parts)
    for mine, others in zip(one, other, strict=True):
        same(mine, others)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["sgd", "focal_sam"])
def test_mixed_precision(method, amp, tmp_path):
    rows = train(build({"method": method, "amp": amp, "epochs": 3, "tensorboard": False}), tmp_path)
    plain = train(build({"method": method, "epochs": 3, "tensorboard": False}), tmp_path / "plain")
    assert rows[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=0.05)
    assert rows[-1]["train_loss"] != plain[-1]["train_loss"]
    assert bool(last(tmp_path)["scaler"]) == (amp == "fp16")


def test_the_folder_tells_all(tmp_path):
    rows = train(build({"method": "sam", "seed": 3, **QUICK}), tmp_path)
    logged = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["all"]) for row in logged] == [row["all"] for row in rows]
    state = last(tmp_path)
    counts = state["class_counts"]
    groups = lf.data.shot_split(counts, 60, 10)
    for name, members in groups.items():
        per_class = [rows[-1]["per_class"][c] for c in members.tolist()]
        assert rows[-1][name] == pytest.approx(sum(per_class) / len(per_class), abs=1e-3)
    assert rows[-1]["all"] == pytest.approx(
        sum(rows[-1]["per_class"]) / 10, abs=1e-3
    )  # as many test images in each class
    assert state["best"]["all"] == max(row["all"] for row in rows)
    assert build(read_file(tmp_path / "config.json")) == build({"method": "sam", "seed": 3, **QUICK})


def test_killed_in_mid_epoch_and_resumed_the_weights_are_those_of_an_undisturbed_run(tmp_path):
    arguments = ["--method", "focal_sam", "--epochs", 30, "--imbalance", 5, "--no-tensorboard", "--seed", 5]
    process = command_line("train", *arguments, "--out", tmp_path / "killed")
    while (
        not (tmp_path / "killed" / "log.csv").exists() or len((tmp_path / "killed" / "log.csv").read_text().split()) < 4
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = last(tmp_path / "killed")["epoch"]
    assert 2 <= done < 30
    assert run("--resume", "--out", tmp_path / "killed", "--quiet") == 0
    assert run(*arguments, "--out", tmp_path / "whole", "--quiet") == 0
    assert last(tmp_path / "killed")["epoch"] == 30
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


FILES = {"last.pt", "previous.pt", "config.json", "log.csv", "log.jsonl", ".lock"}
KILLED_WHILE_WRITING = """
import os, signal, sys
from ltsam_fast.train import cli

def fsync(number, seen=[]):
    if "last.pt" in os.readlink(f"/proc/self/fd/{number}"):
        seen.append(number)
        if len(seen) == 3:
            os.truncate(f"/proc/self/fd/{number}", 1000)  # what a kill between two writes leaves
            os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
cli.main(["train", *sys.argv[1:]])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_killed_while_the_checkpoint_is_written(tmp_path):
    arguments = ["--method", "gnm", "--epochs", 4, "--no-tensorboard"]
    process = command_line(*arguments, "--out", tmp_path / "killed", launcher=("-c", KILLED_WHILE_WRITING))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("*.part"))) == 1
    assert last(tmp_path / "killed")["epoch"] == 1
    assert run("--resume", "--out", tmp_path / "killed", "--quiet") == 0
    assert run(*arguments, "--out", tmp_path / "whole", "--quiet") == 0
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == FILES


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    process = command_line("train", "--epochs", 5000, "--no-tensorboard", "--out", tmp_path / "run")
    while not (tmp_path / "run" / "previous.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"train --resume --out {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    assert last(tmp_path / "run")["epoch"] >= 1


TWO_PROCESSES = """
import pathlib, sys, torch
from ltsam_fast import models
from ltsam_fast.train import cli
from ltsam_fast.train.distributed import process_group

sys.path.append({root!r})
from tests.networks import smooth

models._OWN["smooth"] = smooth

def threads():
    return [(thread / "comm").read_text() for thread in pathlib.Path("/proc/self/task").glob("*")].count("pt_gloo_runloop\\n")

with process_group("cpu") as dist:
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean += dist.rank
    dist.broadcast(norm.buffers())
    assert norm.running_mean.eq(0).all()
    for call in {calls}:
        assert cli.main(call) == 0
    before = threads()
assert before == 0 or threads() < before, "the default group's threads, which may abort a program's end, are still there"
"""


def test_two_processes_equal_one_and_resume_exactly(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models._OWN, "smooth", smooth)
    arguments = ["--method", "focal_sam", "--set", "ascent_sync=true", "--imbalance", 1, "--batch-size", 20]
    arguments += ["--schedule", "constant", "--no-tensorboard", "--model", "smooth", "--drw-start", 1]
    two, parts = ["--epochs", 2, "--out", tmp_path / "two"], ["--out", tmp_path / "parts", "--epochs"]
    calls = [["train", *map(str, (*arguments, *more))] for more in (two, [*parts, 1], [*parts, 2, "--resume"])]
    (tmp_path / "calls.py").write_text(TWO_PROCESSES.format(calls=calls, root=str(Path(__file__).parents[1])))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "calls.py")
    process = command_line(launcher=torchrun)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("wrote") == 3
    assert same_weights(tmp_path / "two", tmp_path / "parts")
    assert run("--resume", "--out", tmp_path / "parts", "--epochs", 3) == 2
    assert "the run had 2 processes, not 1" in capsys.readouterr().err
    assert run(*arguments, "--epochs", 2, "--out", tmp_path / "one", "--quiet") == 0
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)
    assert two["history"][-1]["train_loss"] == pytest.approx(one["history"][-1]["train_loss"], rel=1e-5)
    assert two["history"][-1]["all"] == pytest.approx(one["history"][-1]["all"], abs=0.3)  # a sample of 400 either way


def test_plans_of_two_processes_end_alike(tmp_path):
    arguments = ["--method", "imb_sam", "--set", "eta=60", "--batch-size", 20, "--no-tensorboard", "--epochs", 2]
    plans = ("published", "require")
    calls = [["train", *map(str, (*arguments, "--set", f"plan={plan}", "--out", tmp_path / plan))] for plan in plans]
    (tmp_path / "calls.py").write_text(TWO_PROCESSES.format(calls=calls, root=str(Path(__file__).parents[1])))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "calls.py")
    process = command_line(launcher=torchrun)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    published, planned = (last(tmp_path / plan)["model"] for plan in plans)
    for name, value in published.items():
        torch.testing.assert_close(planned[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def seen(monkeypatch):
    """The numbers of samples that steps evaluate, one for each pass."""
    sizes, take_step = [], loop.take_step

    def counting(run, x, y):
        forward = run.forward
        run.forward = lambda x: (sizes.append(len(x)), forward(x))[1]
        try:
            return take_step(run, x, y)
        finally:
            run.forward = forward

    monkeypatch.setattr(loop, "take_step", counting)
    return sizes


@pytest.mark.parametrize("images", ["digits", "augmented"])
@pytest.mark.parametrize("method", ["imb_sam", "focal_sam", "sse_sam", "cc_sam"])
def test_plans_end_alike(method, images, tmp_path, monkeypatch, seen, caplog):
    monkeypatch.setitem(models._OWN, "smooth", smooth)
    own = {"imb_sam": {"eta": 30}, "sse_sam": {"eta": 30}, "cc_sam": {"scope": "all"}}.get(method, {})
    settings = {"method": method, "loss": "la", "model": "smooth", "epochs": 2, "drw_start": 1, "tensorboard": False}
    if method in ("imb_sam", "sse_sam"):
        settings["epochs"] = (
            10  # in a short run looking at the network, in steps 1, 2, 4, 8, ..., costs more than it saves
        )
    given = None
    if images == "augmented":
        pixels = torch.randint(256, (80, 3, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
        given = (data.Images(pixels, torch.arange(80).square() // 640, tuple("abcdefghij")),) * 2
        settings |= {"batch_size": 16, "imbalance": None}
        own |= {"eta": 8} if "eta" in own else {}
    evaluated = {}
    for plan in ("published", "auto", "require"):
        seen.clear()
        train(build({**settings, "options": {**own, "plan": plan}}), tmp_path / plan, images=given)
        evaluated[plan] = sum(seen)
    assert not caplog.records
    published = last(tmp_path / "published")
    for plan in ("auto", "require"):
        found = last(tmp_path / plan)
        for name, value in published["model"].items():
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-5)
        assert found["history"][-1]["train_loss"] == pytest.approx(published["history"][-1]["train_loss"], rel=1e-5)
        if method in ("imb_sam", "sse_sam"):
            assert evaluated[plan] < 0.9 * evaluated["published"]


def test_batch_norm_is_one_line_in_the_log(tmp_path, capsys):
    arguments = ["--model", "resnet20", "--epochs", 1, "--imbalance", 10, "--quiet", "--no-tensorboard"]
    arguments += ["--method", "imb_sam", "--set", "eta=30"]
    for plan in ("published", "auto"):
        assert run(*arguments, "--set", f"plan={plan}", "--out", tmp_path / plan) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (plan == "auto")
    assert "warning: plan: passes are run as published: bn1 (BatchNorm2d)" in lines[0]
    assert same_weights(tmp_path / "published", tmp_path / "auto")


WRONG = {
    "a method that is not there": (("--method", "nix"), "focal_sam"),
    "an option that the method lacks": (("--method", "sam", "--set", "gamma=3"), "rho"),
    "an option out of its range": (("--method", "sam", "--set", "rho=-1"), "rho must be"),
    "steps that are none": (("--method", "sse_sam", "--set", "switch_step=later"), "70%"),
    "no number": (("--lr", "abc"), "lr must be a valid number"),
    "a number out of its range": (("--lr", "0"), "lr must be"),
    "a choice that is not there": (("--schedule", "steep"), "cosine"),
    "a flag that is not there": (("--learning-rate", "1"), "--learning-rate"),
    "a loss that is not there": (("--loss", "nix"), "la"),
    "a network that is not there": (("--model", "nix"), "nix"),
    "a recipe that is not there": (("--recipe", "nix"), "cifar10-lt"),
    "a recipe without its data": (("--recipe", "cifar10-lt"), "data"),
    "no such data": (("--data", "/nowhere/at/all"), "/nowhere/at/all"),
    "no such config": (("--config", "/nowhere/at/all.toml"), "/nowhere/at/all.toml"),
    "a device that is not there": (("--device", "warp"), "warp"),
    "too long a tail": (("--imbalance", "1e9"), "imbalance"),
    "nothing to resume": (("--resume",), "no checkpoint"),
    "an option of the loss": (("--loss", "la", "--loss-set", "tau=-1"), "tau must be"),
}


@pytest.mark.parametrize(("arguments", "named"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, named, tmp_path, capsys):
    assert run(*arguments, "--out", tmp_path / "run") == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("ltsam_fast train: ")
    assert errors.count("\n") == 1
    assert named in errors
    assert not (tmp_path / "run").exists()


def test_a_run_is_replaced_only_if_that_is_asked_for(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--epochs", 1, "--out", out, "--quiet")
    assert run(*arguments, "--val", 5, "--tensorboard") == 0
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*arguments, "--method", "sam") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--resume") == 2
    assert run(*arguments, "--overwrite", "--model", "nix") == 2
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*arguments, "--overwrite", "--method", "sam", "--no-tensorboard") == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "notes.txt"}
    assert run(*arguments[:2], "--out", tmp_path / "other", "--quiet", "--method", "sam", "--no-tensorboard") == 0
    assert same_weights(out, tmp_path / "other")
    (out / "last.pt").write_bytes(b"nix")
    assert run(*arguments, "--overwrite", "--no-tensorboard") == 0
    assert run(*arguments[:2], "--out", tmp_path / "new", "--overwrite", "--quiet") == 0


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_run_that_diverged_at_once_does_not_block_its_folder(resume, tmp_path, capsys):
    arguments = ("--epochs", 2, "--no-tensorboard", "--quiet")
    assert run(*arguments, "--method", "sam", "--set", "rho=1e30", "--out", tmp_path / "run") == 1
    assert last(tmp_path / "run")["epoch"] == 0
    assert run(*arguments, *resume, "--method", "sam", "--set", "rho=0.1", "--out", tmp_path / "run") == 0
    assert run(*arguments, "--method", "sam", "--set", "rho=0.1", "--out", tmp_path / "other") == 0
    assert same_weights(tmp_path / "run", tmp_path / "other")
    grid = ("--methods", "sam", "--seeds", 0, "--out", tmp_path / "grid", *arguments)
    assert run(*grid, "--set", "rho=1e30", command="compare") == 1
    assert run(*grid, command="compare") == 0


def test_a_finished_run_says_so(tmp_path, capsys):
    assert run("--epochs", 2, "--no-tensorboard", "--out", tmp_path) == 0
    capsys.readouterr()
    assert run("--resume", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["2 of 2 epochs are finished: there is nothing to resume"] and lines[0].startswith("sgd, ce: ")


@pytest.mark.parametrize(("n_max", "imbalance"), [(40, 20), (130, 2), (30, 5)])
def test_empty_shot_groups_are_told_with_limits_that_leave_none(n_max, imbalance, tmp_path, capsys):
    arguments = ("--data", "digits", "--imbalance", imbalance, "--n-max", n_max, "--model", "small_cnn", "--epochs", 1)
    assert run(*arguments, "--no-tensorboard", "--out", tmp_path / "one") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no class is ")]
    words = line.replace(";", "").split()
    many, few = (words[len(words) - words[::-1].index(flag)] for flag in ("--many", "--few"))
    assert last(tmp_path / "one")["history"][0]["many" if n_max < 100 else "few"] is None
    assert run(*arguments, "--no-tensorboard", "--out", tmp_path / "two", "--many", many, "--few", few) == 0
    assert "no class is" not in capsys.readouterr().out
    assert None not in last(tmp_path / "two")["history"][0].values()


def test_shot_limits():
    for sizes in ([5, 4, 3], [9, 9, 1, 1, 4], range(1, 5), range(1, 6), range(1, 7), range(7, 107)):
        many, few = data.shot_limits([*sizes])
        assert all(len(group) for group in data.shot_split([*sizes], many, few).values())
    assert data.shot_limits([5, 5, 4]) is None


def test_the_best_epoch_on_held_out_images_is_kept(tmp_path, monkeypatch):
    scores = iter([50.0, 70.0, 60.0, 70.0, 65.0])
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda run: evaluate(run) | {"all": next(scores)})
    weights = []
    save = loop._save
    monkeypatch.setattr(
        loop, "_save", lambda run, out: (weights.append(copy.deepcopy(run.network.state_dict())), save(run, out))
    )
    settings = {"method": "sam", "epochs": 5, "tensorboard": False, "schedule": "constant"}
    with pytest.raises(KeyboardInterrupt):
        train(build({**settings, "val": 10}), tmp_path / "run", report=StopIn(7 * 3 + 2))
    train(build({**settings, "val": 10}), tmp_path / "run", resume=True)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["epoch"] == 2 and last(tmp_path / "run")["best"] == {"epoch": 2, "all": 70.0}
    same(best["model"], dict(weights[2]))
    scores = iter([1.0] * 5)
    train(build(settings), tmp_path / "without")
    assert not (tmp_path / "without" / "best.pt").exists()


def test_a_share_is_held_out_of_each_class():
    whole, test = load_images(build({"imbalance": 60.0}))
    rest, held_out = load_images(build({"imbalance": 60.0, "val_share": 0.2}))
    assert held_out.counts() == [max(1, round(0.2 * count)) for count in whole.counts()] and whole.counts()[-1] == 2
    assert [one + other for one, other in zip(rest.counts(), held_out.counts(), strict=True)] == whole.counts()
    both = torch.cat([rest.pixels, held_out.pixels]).flatten(1)
    assert torch.equal(both.unique(dim=0), whole.pixels.flatten(1).unique(dim=0))
    lonely, held_out = load_images(build({"imbalance": 134.0, "val_share": 0.9}))
    assert lonely.counts()[-1] == 1 and held_out.counts()[-1] == 0 and min(lonely.counts()) == 1
    assert torch.equal(run_module.test_images(build({"val_share": 0.2}), False).pixels, test.pixels)


def test_the_best_epoch_on_a_held_out_share_is_tested(tmp_path, capsys):
    arguments = ("--method", "sam", "--val-share", 0.2, "--epochs", 6, "--no-tensorboard", "--lr", 0.2)
    assert run(*arguments, "--out", tmp_path / "run") == 0
    output = capsys.readouterr().out
    rows = last(tmp_path / "run")["history"]
    means = [sum(filter(None, row["per_class"])) / sum(one is not None for one in row["per_class"]) for row in rows]
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + means.index(max(means)) == last(tmp_path / "run")["best"]["epoch"]
    found = json.loads((tmp_path / "run" / "test.json").read_text())
    assert (
        f"the test images, with the weights of epoch {best['epoch']}" in output and f"all {found['all']:.2f}" in output
    )
    config = build(best["config"])
    train_images, test = load_images(build({"epochs": 6}))
    network = run_module.network_of(config, train_images)
    network.load_state_dict(best["model"])
    normalized = data.Augment.for_testing(load_images(config)[0])(test.pixels)
    correct = (network.eval()(normalized).argmax(1) == test.labels).double()
    assert found["all"] == pytest.approx(100 * correct.mean().item(), abs=1e-3)
    (tmp_path / "run" / "test.json").unlink()
    assert run("--resume", "--out", tmp_path / "run", "--quiet") == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text()) == found
    together = (config, tmp_path / "together", load_images(config))
    assert train_together([together])[0][-1]["train_loss"] == rows[-1]["train_loss"]
    assert json.loads((tmp_path / "together" / "test.json").read_text()) == found


@pytest.mark.parametrize(
    "more", [{"val_share": 1.0}, {"val_share": 0.1, "val": 3}, {"val_share": 0.1, "keep_weights": False}]
)
def test_shares_that_can_not_be_held_out(more):
    with pytest.raises(ConfigError, match="val_share must"):
        Config(**more)


def test_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert run("--out", out, "--data", "/nowhere") == 2
        assert "is a file, not a folder" in capsys.readouterr().err
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert run("--out", tmp_path / "closed" / "run") == 2
        assert "can't write to" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path):
    limited = "ulimit -f 40; exec " + shlex.join([sys.executable, "-m", "ltsam_fast", "train"])
    command = f"{limited} --epochs 1 --no-tensorboard --quiet --out {shlex.quote(str(tmp_path / 'run'))}"
    env = {**os.environ, "PYTHONPATH": str(Path(lf.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ltsam_fast train: ") and done.stderr.count("\n") == 1
    assert "last.pt: File too large" in done.stderr


def test_other_settings_are_not_resumed_with(tmp_path, capsys):
    assert run("--epochs", 1, "--out", tmp_path, "--quiet", "--no-tensorboard") == 0
    for arguments, named in (
        (("--lr", "0.2", "--method", "sam"), ("lr was 0.05, is 0.2", "method was 'sgd', is 'sam'")),
        (("--epochs", "2"), ("epochs was 1, is 2",)),  # the cosine would have been another
        (("--recipe", "cifar10-lt", "--data", "digits"), ("model was 'small_cnn', is 'resnet32'",)),
        (("--recipe", "digits-lt", "--epochs", "1"), ()),
        ((), ()),
    ):
        resumed = run("--resume", "--out", tmp_path, "--quiet", *arguments)
        assert resumed == (2 if named else 0)
        errors = capsys.readouterr().err
        assert all(one in errors for one in named)
    assert run("--epochs", 1, "--out", tmp_path) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_run_folder_with_a_method_s_former_name_resumes(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    arguments = ("--method", "micro_batch_sam", "--epochs", 1, "--schedule", "constant", "--no-tensorboard", "--quiet")
    for folder in (new, old):
        assert run(*arguments, "--out", folder) == 0
    state = last(old)
    torch.save({**state, "config": {**state["config"], "method": "m_sam"}}, old / "last.pt")
    stored = (old / "config.json").read_text()
    (old / "config.json").write_text(stored.replace("micro_batch_sam", "m_sam"))
    for folder in (new, old):
        assert run("--resume", "--epochs", 2, "--out", folder, "--quiet") == 0
    assert same_weights(new, old) and last(old)["config"]["method"] == "micro_batch_sam"
    assert run("--method", "m_sam", "--out", tmp_path / "other") == 2


def test_a_run_of_version_0_1_0_goes_on(tmp_path, monkeypatch, caplog):
    """A run of 3 epochs that version 0.1.0 was stopped in after the second; without a hash of the images then."""
    linear = lambda classes, shape, cosine: nn.Sequential(nn.Flatten(), nn.Linear(64, classes))  # noqa: E731
    monkeypatch.setitem(models._OWN, "linear", linear)
    stored = Path(__file__).with_name("checkpoints") / "0.1.0_run.pt.gz"
    (tmp_path / "last.pt").write_bytes(gzip.decompress(stored.read_bytes()))
    assert last(tmp_path)["config"]["method"] == "m_sam"
    assert run("--resume", "--out", tmp_path, "--quiet") == 0
    assert "without a hash of the images" in caplog.text
    row = last(tmp_path)["history"][-1]
    assert row["epoch"] == 3 and row["lr"] == 0.0012500000000000007
    assert row["train_loss"] == pytest.approx(0.9246730183068227, rel=1e-5)
    assert row["per_class"] == [100.0, 75.0, 92.5, 90.0, 82.5, 87.5, 60.0, 10.0, 0.0, 2.5]


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_settings_from_a_file_and_flags_before_them(suffix, tmp_path):
    text = {
        "toml": 'method = "focal_sam"\nlr = 0.3\nmilestones = [1, 2]\n[options]\nlam = 0.9\nrho = 0.4\n',
        "yaml": "method: focal_sam\nlr: 0.3\nmilestones: [1, 2]\noptions: {lam: 0.9, rho: 0.4}\n",
        "json": '{"method": "focal_sam", "lr": 0.3, "milestones": [1, 2], "options": {"lam": 0.9, "rho": 0.4}}',
    }[suffix]
    (tmp_path / f"run.{suffix}").write_text(text)
    config = build(read_file(tmp_path / f"run.{suffix}"), {"lr": 0.2, "options": {"rho": 0.7}})
    assert (config.method, config.lr, config.milestones) == ("focal_sam", 0.2, (1, 2))
    assert config.options == {"lam": 0.9, "rho": 0.7, "gamma": 3.0}
    assert build(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.toml", "lr = ", "a.toml"),
        ("a.yaml", "lr: [", "a.yaml"),
        ("a.yaml", "lr: 1\nlr: 2", "duplicate key"),
        ("a.json", "[1]", "table"),
        ("a.ini", "", ".toml"),
        ("b.json", '{"lrr": 1}', "there is no setting 'lrr': did you mean 'lr'?"),
        ("b.json", '{"lr": "1"}', "lr must be a valid number"),
        ("b.json", '{"epochs": 1.5}', "epochs must be a valid integer"),
        ("b.json", '{"epochs": true}', "epochs must be a valid integer, got True"),
        ("b.json", '{"nesterov": 1}', "nesterov must be a valid boolean"),
        ("b.json", '{"data": 1}', "data must be a valid string"),
        ("b.json", '{"milestones": [1, "2"]}', "milestones.1 must be a valid integer"),
        ("b.json", '{"options": 1}', "options"),
    ],
)
def test_a_config_file_that_is_wrong(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=named):
        build(read_file(tmp_path / name))


@pytest.mark.parametrize("text", ["1e-2", "1E-2", "+1e-2", "0.01", "1.e-2", ".1e-1"])
def test_numbers_of_yaml(text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"lr: {text}\noptions: {{rho: 2e-1}}\ndata: 1e-2x\n")
    found = read_file(tmp_path / "run.yaml")
    assert found == {"lr": 0.01, "options": {"rho": 0.2}, "data": "1e-2x"}


def test_flags_and_files_take_the_same_names(tmp_path):
    names = [item.validation_alias.choices[0] if item.validation_alias else name for name, item in FIELDS.items()]
    for spelling in (lambda name: name.replace("_", "-"), lambda name: name.replace("-", "_")):
        values = {spelling(name): name for name in names}
        (tmp_path / "run.json").write_text(json.dumps(values))
        assert [*read_file(tmp_path / "run.json")] == [*FIELDS]
    folder, config = tmp_path / "by_file", tmp_path / "run.yaml"
    lines = ["method: sam", "set: {rho: 0.3}", "batch-size: 32", "epochs: 3", f"out: {folder}", "quiet: true"]
    config.write_text("\n".join([*lines, "tensorboard: false", "resume: false"]))
    assert run("--config", config, "--epochs", 1, "--weight_decay", 1e-3) == 0
    arguments = ("--method", "sam", "--options", "rho=0.3", "--batch_size", 32, "--epochs", 1, "--no_tensorboard")
    assert run(*arguments, "--weight-decay", 1e-3, "--out", tmp_path / "by_flags", "--quiet") == 0
    assert last(folder)["config"] == last(tmp_path / "by_flags")["config"]
    assert same_weights(folder, tmp_path / "by_flags")


@pytest.mark.parametrize(
    "grid", ['methods = ["sgd", "sam"]\nseeds = [4]', 'methods = "sgd,sam"\nseeds = 4\nlosses = "ce"\njobs = 1']
)
def test_a_grid_in_a_file(grid, tmp_path):
    (tmp_path / "grid.toml").write_text(f"{grid}\nepochs = 1\ntensorboard = false\n")
    assert run("--config", tmp_path / "grid.toml", "--out", tmp_path / "out", "--quiet", command="compare") == 0
    assert {path.parent.parent.name for path in tmp_path.glob("out/*/seed4/last.pt")} == {"sgd-ce", "sam-ce"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("set: {}\noptions: {}", "twice"),
        ("nix: 1", "there is no setting 'nix'"),
        ("quite: true", "did you mean 'quiet'?"),
        ("recpe: digits-lt", "did you mean 'recipe'?"),
        ("config: a.yaml", "config must be a flag"),
        ("resume: 3", "resume must be a valid boolean"),
        ("threads: true", "threads must be a valid integer, got True"),
        ("lr: yes", "lr must be a valid number, got 'yes'"),
    ],
)
def test_names_in_a_file_that_are_wrong(text, named, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert run("--config", tmp_path / "run.yaml", "--out", tmp_path / "run") == 2
    assert named in capsys.readouterr().err


def test_no_variable_of_the_environment_is_a_setting(tmp_path, monkeypatch):
    for name in ("LR", "lr", "OUT", "out", "RECIPE"):
        monkeypatch.setenv(name, "nix")
    assert run("--epochs", 1, "--no-tensorboard", "--quiet", "--out", tmp_path / "run") == 0
    assert last(tmp_path / "run")["config"]["lr"] == 0.05


def test_none_takes_back_what_a_recipe_sets(tmp_path):
    arguments = ("--epochs", 1, "--no-tensorboard", "--quiet", "--out", tmp_path)
    assert run(*arguments, "--imbalance", "None", "--test-per-class", 3) == 0
    config = last(tmp_path)["config"]
    assert (config["imbalance"], config["test_per_class"], config["model"]) == (None, 3, "small_cnn")
    assert run("--lr", "None") == 2


def helped(capsys, *arguments, command="train"):
    """The help of a command, its white space as single spaces."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, command=command)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_what_there_is(capsys):
    for text in (helped(capsys, "--help"), helped(capsys, "-h", command="compare")):
        for name in METHODS:
            assert f" {name} {METHODS[name]}" in text
            own = options_of(name).keys() - options_of("sam").keys()
            assert all(f" {one}=" in text for one in own)
        for name, (label, _) in LOSSES.items():
            assert f" {name} {label}: " in text
        assert ", ".join(models.names()) in text
    text = helped(capsys, "--help", command="evidence")
    assert "--protocol" not in text and "largest to the smallest class; default: all images --n-max" in text
    assert "(default: 0.1)" not in text and "side by side (default: 1)" in text
    text = helped(capsys, "--help", command="diagnose")
    assert "Hessian-vector products (default: 50)" in text and "(default: digits)" not in text


def test_help_tells_the_defaults_that_apply(capsys):
    text = helped(capsys, "--help")
    assert "learning rate (default: 0.05)" in text and "network by name (default: small_cnn)" in text
    text = helped(capsys, "--help", "--recipe", "cifar10-lt", "--method", "focal_sam", "--seed", 3, "--loss", "gcl")
    assert "learning rate (default: 0.1)" in text and "passes over the training images (default: 200)" in text
    assert "options of focal_sam (--set NAME=VALUE): rho=0.2 Radius of the perturbation" in text
    assert "gamma=3.0 Focus on the tail" in text and "imb_sam ImbSAM: rho=0.05, eta=200" in text
    assert "asam_" not in text and "seed=3" in text
    assert "learning rate (default: 0.1)" in helped(capsys, "--data", "somewhere", "--help")
    assert "lam=0.75 Weight" in helped(capsys, "--method", "focal_sam", "-h", "--set", "lam=0.75")


@pytest.mark.parametrize("method", METHODS)
def test_help_tells_what_every_option_means(method, capsys):
    text = helped(capsys, "--method", method, "--help")
    declared = {} if method == "sgd" else method_named(method).cls.options
    for name in options_of(method):
        assert f" {name}=" in text
        if name in declared:
            assert declared[name].doc.split("`")[0].strip() in text


def test_help_of_what_is_wrong_is_its_error(capsys):
    assert run("--help", "--lr", 0) == 2
    assert "lr must be" in capsys.readouterr().err


def test_schedules():
    step = Config(schedule="step", milestones=(2, 3), decay=0.1, warmup=2)
    assert [step.factor(epoch) for epoch in range(4)] == pytest.approx([0.5, 1.0, 0.1, 0.01])
    cosine = Config(epochs=10)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10)
    for epoch in range(10):
        assert cosine.factor(epoch) == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()


def test_more_epochs_only_where_the_first_ones_stay_what_they_are():
    old = Config(schedule="step")
    assert differing(old, Config(schedule="step", epochs=300)) == []
    assert differing(old, Config(schedule="step", epochs=190)) == ["epochs"]
    assert differing(Config(), Config(epochs=300)) == ["epochs"]
    late = {"method": "sse_sam", "options": {"switch_step": "70%"}, "schedule": "constant"}
    assert differing(Config(**late), Config(**late, epochs=300)) == ["epochs"]
    assert differing(old, Config(schedule="step", threads=3, device="cpu")) == []


def test_published_settings():
    ours = build({"recipe": "cifar10-lt", "data": "x", "method": "focal_sam", "loss": "la"})
    assert (ours.model, ours.epochs, ours.batch_size, ours.lr, ours.weight_decay) == ("resnet32", 200, 64, 0.1, 2e-4)
    assert (ours.many, ours.few, ours.imbalance) == (1000, 200, 100)
    assert ours.options == {"rho": 0.2, "gamma": 3.0, "lam": 0.5}
    for recipe in ("digits-lt", "cifar10-lt", "cifar100-lt"):
        for method in METHODS:
            settings = build({"recipe": recipe, "data": "x", "method": method})
            assert settings.options.keys() <= options_of(method).keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_keyword_of_a_method_is_an_option(method):
    cls, fixed = (torch.optim.SGD, {}) if method == "sgd" else (method_named(method).cls, method_named(method).options)
    keywords = [name for name in inspect.signature(cls).parameters if name != "base_kwargs"]
    supplied = {
        "params",
        "base_optimizer",
        "model",
        "class_counts",
        "head",
        "lr",
        "momentum",
        "nesterov",
        "weight_decay",
    }
    assert {*keywords} - supplied - fixed.keys() <= options_of(method).keys()
    with pytest.raises(
        ConfigError, match=f"^{method} has no option 'gama'.* It takes .*{list(options_of(method))[-1]}"
    ):
        check_options(Config(method=method, options={"gama": 1}))


def test_deterministic_runs_tell_cublas(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        train(build({**QUICK, "epochs": 1, "deterministic": True}), tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# --- what evidence needs


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("all", "all"),
        ("0.3", 0.3),
        ("0", 0.0),
        ("every:5", ("every", 5)),
        ("100:2000", ("range", 100, 2000)),
        ("140ep:", ("range", 1400, 2000)),
        (":70%", ("range", 0, 1400)),
        ("50%:150ep", ("range", 1000, 1500)),
    ],
)
def test_active_steps(text, active):
    assert active_steps(text, 10, 2000) == active
    assert Config(active=text).active == text


@pytest.mark.parametrize("text", ["1.5", "-0.1", "nan", "every:0", "every:x", "-3:5", "x:", "0.7:", ""])
def test_active_steps_that_are_none(text):
    with pytest.raises(ConfigError, match="active must be all, 0.3, every:5"):
        Config(active=text)


def prepared(**settings):
    with process_group("cpu") as dist:
        return prepare(build({"tensorboard": False, **settings}), dist)


def test_active_reaches_the_method_and_sgd_ignores_it():
    late = prepared(method="sam", active="30ep:").optimizer
    assert late.active == ("range", 180, 240, 1)  # of 40 epochs of 6 steps
    assert prepared(method="sam", active="0.3").optimizer.active == 0.3
    assert prepared(method="sam", active="0.3", options={"active": ["every", 2]}).optimizer.active == ("every", 2)
    assert type(prepared(method="sgd", active="0.3").optimizer) is torch.optim.SGD


def test_methods_of_a_seed_begin_with_the_same_weights_and_get_the_same_batches(tmp_path, monkeypatch):
    """So their differences are paired. Losses, too; another seed has others."""
    seen, take_step = [], loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda run, x, y: seen.append((x.clone(), y)) or take_step(run, x, y))
    pixels = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    images = (data.Images(pixels, torch.arange(60) % 10, tuple("abcdefghij")),) * 2

    def beginning(method, loss="ce", seed=3):
        seen.clear()
        settings = {"method": method, "loss": loss, "seed": seed, "model": "small_cnn", "epochs": 2, "batch_size": 16}
        config = build({**settings, "imbalance": None, "tensorboard": False})
        with process_group("cpu") as dist:
            weights = prepare(config, dist, images).network.state_dict()
        train(config, tmp_path / f"{method}-{loss}-{seed}", images=images)
        return weights, [*seen]

    first = beginning("sgd")
    assert len(first[1]) == 8
    for method in [name for name in METHODS if name != "sgd"]:
        same(first, beginning(method))
    same(first, beginning("sam", "la"))
    other = beginning("sgd", seed=4)
    assert not torch.equal(first[1][0][0], other[1][0][0])
    assert not torch.equal(first[0]["0.weight"], other[0]["0.weight"])


def test_held_out_images_are_none_that_are_trained_or_tested_on():
    everything, tests = data.load("digits"), data.load("digits", "test")
    settings = {"n_max": 50, "imbalance": 25.0, "resample": True, "test_per_class": 7}

    def taken(**more):
        return load_images(build({**settings, **more}))

    def rows(images):
        return {tuple(one.flatten().tolist()) for one in images.pixels}

    chosen, held_out = taken(val=30, seed=1)
    assert chosen.counts() == data.longtail_counts(50, 10, 25.0) and held_out.counts() == [30] * 10
    assert not rows(chosen) & rows(held_out) and rows(held_out) <= rows(everything)
    assert not rows(held_out) & rows(tests)
    train_images, test = taken(seed=1)
    assert train_images.counts() == chosen.counts() and test.counts() == [7] * 10
    assert rows(test) <= rows(tests)
    assert taken(seed=1)[0].digest == train_images.digest != taken(seed=2)[0].digest
    assert taken(seed=2)[1].digest == test.digest
    assert taken(seed=1, resample=False)[0].digest == taken(seed=2, resample=False)[0].digest


def test_without_a_test_in_every_epoch_a_run_ends_alike_and_resumes(tmp_path):
    settings = {"method": "sam", "epochs": 5, "tensorboard": False}
    rows = train(build(settings), tmp_path / "each")
    few = build({**settings, "eval_every": 2, "keep_weights": False})
    with pytest.raises(KeyboardInterrupt):  # in the fourth epoch; the third is not in the checkpoint
        train(few, tmp_path / "few", report=StopIn(3 * 7 + 2))
    assert last(tmp_path / "few")["epoch"] == 2 and "model" in last(tmp_path / "few")
    again = train(few, tmp_path / "few", resume=True)
    assert [row["all"] is not None for row in again] == [False, True, False, True, True]
    for one, other in zip(rows, again, strict=True):
        assert one["train_loss"] == other["train_loss"]
        assert other["per_class"] in (None, one["per_class"])
    state = last(tmp_path / "few")
    assert "model" not in state and "optimizer" not in state and state["history"] == again
    assert [row["all"] for row in csv.DictReader((tmp_path / "few" / "log.csv").open())][:2] == [
        "",
        str(rows[1]["all"]),
    ]


def test_a_finished_run_without_weights_says_so(tmp_path, capsys):
    assert run("--epochs", 1, "--no-keep-weights", "--no-tensorboard", "--quiet", "--out", tmp_path / "run") == 0
    for command, arguments in (("train", ("--resume", "--out", tmp_path / "run")), ("diagnose", (tmp_path / "run",))):
        assert run(*arguments, command=command) == 2
        assert "has no weights: it was trained with --no-keep-weights" in capsys.readouterr().err


def test_runs_in_turns_end_as_each_alone(tmp_path):
    methods = {"sgd": {}, "sam": {}, "asam": {"rho": 1e30}, "gnm": {}}
    configs = {
        name: build({"method": name, "options": own, "eval_every": 2, **QUICK, "epochs": 3})
        for name, own in methods.items()
    }
    images = load_images(configs["sgd"])
    found = train_together([(config, tmp_path / "together" / name, images) for name, config in configs.items()])
    for (name, config), outcome in zip(configs.items(), found, strict=True):
        if name == "asam":
            assert isinstance(outcome, Diverged)
            continue
        train(config, tmp_path / name)
        assert [row["epoch"] for row in outcome] == [1, 2, 3]
        assert same_weights(tmp_path / name, tmp_path / "together" / name)


@pytest.mark.parametrize("method", ["sgd", "sam", "sse_sam", "gnm"])
def test_runs_in_graphs_end_as_without(method, tape, tmp_path, monkeypatch):  # noqa: F811
    """On a tape that stands for CUDA's graphs. SGD's fused step rounds otherwise than torch's on the CPU."""

    def graph_step(model, losses, optimizer, *arguments, scaler, **named):
        tape(model, optimizer, scaler if scaler.is_enabled() else None)
        return lf.graph_step(model, losses, optimizer, *arguments, scaler=scaler, **named)

    monkeypatch.setattr(run_module, "graph_step", graph_step)
    settings = {"method": method, "loss": "la", "drw_start": 1, **QUICK, "epochs": 4, "active": "every:2"}
    own = {"sgd": {}, "sse_sam": {"plan": "published", "switch_step": 20}}.get(method, {"plan": "published"})
    for graph in (True, False):
        train(build({**settings, "options": own, "graph": graph}), tmp_path / ("graph" if graph else "eager"))
    for name, value in last(tmp_path / "eager")["model"].items():
        torch.testing.assert_close(last(tmp_path / "graph")["model"][name], value, rtol=1e-4, atol=1e-6)
    assert capture.Machine.captures >= 1 + (method != "sgd")


def test_graphs_need_a_gpu(tmp_path, capsys):
    assert run("--graph", "--device", "cpu", "--out", tmp_path / "run") == 2
    assert "graph: model must be on one CUDA device" in capsys.readouterr().err
