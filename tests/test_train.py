"""``python -m ltsam_fast train`` and ``compare``: what they accept, leave behind, and go on from."""

from __future__ import annotations

import csv
import functools
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

import ltsam_fast as lf
from ltsam_fast import data, demo, diagnostics, models

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from ltsam_fast.optim.registry import method_named
from ltsam_fast.train import METHODS, Config, ConfigError, build, cli, loop, read_file, train
from ltsam_fast.train.config import differing
from ltsam_fast.train.distributed import process_group
from ltsam_fast.train.log import Silent
from ltsam_fast.train.loss_registry import LOSSES, reweight, same_noise
from ltsam_fast.train.method_registry import check_options, options_of
from ltsam_fast.train.run import prepare

from .networks import smooth

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
    config = build({**settings, "tensorboard": False})
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


KILLED_WHILE_WRITING = """
import os, signal, sys
from ltsam_fast.train import cli, run_checkpoint

def fsync(number, seen=[]):
    if "last.pt" in os.readlink(f"/proc/self/fd/{number}"):
        seen.append(number)
        if len(seen) == 3:
            os.truncate(f"/proc/self/fd/{number}", 1000)  # what a kill between two writes leaves
            os.kill(os.getpid(), signal.SIGKILL)

run_checkpoint.os.fsync = fsync
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
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"last.pt", "config.json", "log.csv", "log.jsonl"}


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    process = command_line("train", "--epochs", 5000, "--no-tensorboard", "--out", tmp_path / "run")
    while not (tmp_path / "run" / "log.csv").exists():
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
    "no number": (("--lr", "abc"), "--lr"),
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
        ("a.json", "[1]", "table"),
        ("a.ini", "", ".toml"),
        ("b.json", '{"lrr": 1}', "lrr"),
        ("b.json", '{"lr": "1"}', "lr must be a number"),
        ("b.json", '{"epochs": 1.5}', "epochs must be a whole number"),
        ("b.json", '{"nesterov": 1}', "nesterov must be true or false"),
        ("b.json", '{"options": 1}', "options"),
    ],
)
def test_a_config_file_that_is_wrong(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=named):
        build(read_file(tmp_path / name))


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
    assert differing(old, Config(schedule="step", epochs=100)) == ["epochs"]
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
