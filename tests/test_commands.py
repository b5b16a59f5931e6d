"""The commands as their users meet them: every kind of data, what is wrong with it, tables of ``compare``, ``diagnose``."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ltsam_fast as lf
from ltsam_fast import data

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")

from PIL import Image

from ltsam_fast.train import Config, ConfigError, build, cli, read_file, train
from ltsam_fast.train import compare as comparison
from ltsam_fast.train.diagnose import diagnose
from ltsam_fast.train.evidence import Protocol, variants
from ltsam_fast.train.loss_registry import LOSSES, criterion
from ltsam_fast.train.run import network_of

SMALL = ("--model", "small_cnn", "--epochs", 1, "--no-tensorboard", "--batch-size", 8, "--threads", 1)


def run(command, *arguments):
    """The command in this process; its exit code."""
    return cli.main([command, *map(str, arguments)])


def one_line(capsys, command, named):
    """The one line that stands on stderr, with a word in it."""
    _, errors = capsys.readouterr()
    assert errors.startswith(f"ltsam_fast {command}: ")
    assert errors.count("\n") == 1
    assert named in errors


# --- data


def pixels(rng, count, side=32):
    return rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def cifar(folder, files, rng, labels, names, classes):
    """Pickles as the site offers them: bytes as keys, protocol 2."""
    folder.mkdir(parents=True)
    for name, count in files.items():
        content = {b"batch_label": b"of six", labels: [i % classes for i in range(count)]}
        content[b"data"] = pixels(rng, count).reshape(count, -1)
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {names: [f"class {c}".encode() for c in range(classes)]}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(meta, protocol=2))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small data sets in the formats of the large ones."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng()
    batches = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
    cifar(root / "cifar10" / "cifar-10-batches-py", batches, rng, b"labels", b"label_names", 10)
    cifar(
        root / "cifar100" / "cifar-100-python",
        {"train": 300, "test": 100},
        rng,
        b"fine_labels",
        b"fine_label_names",
        100,
    )
    for split, counts in (("train", (9, 5, 2)), ("test", (3, 3, 3))):
        lines = []
        for c, count in enumerate(counts):
            for i, image in enumerate(pixels(rng, count, 16)):
                save(root / "tree" / split / "abc"[c] / f"{i}.png", image)
                save(root / "list" / "images" / split / f"n0 {c}" / f"{i}.JPEG", image[:, : 16 - c])
                lines.append(f"{split}/n0 {c}/{i}.JPEG {c}\n")
        (root / "list" / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
    return root


KINDS = {
    "CIFAR-10": (("--data", "cifar10", "--imbalance", 5), [10, 8, 6, 5, 4, 4, 3, 2, 2, 2]),
    "CIFAR-100": (("--data", "cifar100/cifar-100-python"), [3] * 100),
    "tree": (("--data", "tree"), [9, 5, 2]),
    "list": (("--data", "list", "--images", "list/images", "--size", 16, "--cache", "cached"), [9, 5, 2]),
    "two lists": (
        ("--data", "list/ImageNet_LT_train.txt", "--test-data", "list/ImageNet_LT_test.txt")
        + ("--images", "list/images", "--size", 16, "--classes", 3),
        [9, 5, 2],
    ),
}


@pytest.mark.parametrize(("arguments", "counts"), KINDS.values(), ids=KINDS)
def test_train_on(arguments, counts, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(sources)
    assert run("train", *arguments, *SMALL, "--out", tmp_path, "--method", "focal_sam", "--loss", "la") == 0
    assert f"on {sum(counts)} images" in capsys.readouterr().out
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["class_counts"] == counts
    assert state["history"][0]["all"] is not None
    # Pad-crop, flip and a stopped run: the colour images are augmented.
    assert run("train", "--resume", "--out", tmp_path, "--quiet") == 0


def spoiled(sources, tmp_path, kind):
    return shutil.copytree(sources / kind, tmp_path / kind)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def other_line(line):
    def spoil(folder):
        path = folder / "ImageNet_LT_train.txt"
        lines = path.read_text().splitlines()
        lines[6] = line
        path.write_text("\n".join(lines))

    return spoil


LISTED = ("--images", "list/images", "--size", 16)
SPOILED = {
    "a missing pickle": ("cifar10", lambda f: (f / "cifar-10-batches-py/data_batch_4").unlink(), (), "data_batch_4"),
    "a truncated pickle": ("cifar100", lambda f: cut(f / "cifar-100-python/train"), (), "cifar-100-python/train"),
    "pickles of other classes": ("cifar10", lambda f: None, ("--classes", 100), "has 10 classes, not 100"),
    "a corrupt image": ("tree", lambda f: cut(f / "train/b/3.png"), (), "train/b/3.png: not a readable image"),
    "a class less": ("tree", lambda f: shutil.rmtree(f / "test/b"), (), "lacks 'b'"),
    "no test images": ("tree", lambda f: shutil.rmtree(f / "test"), (), "no folder 'test'"),
    "a folder of other classes": ("tree", lambda f: None, ("--classes", 4), "has 3 classes, not 4"),
    "a line without label": ("list", other_line("train/n0 0/1.JPEG"), LISTED, "line 7: expected 'path label'"),
    "a line with a negative label": ("list", other_line("train/n0 0/1.JPEG -1"), LISTED, "line 7: expected"),
    "a line without image": ("list", other_line("train/n0 0/99.JPEG 0"), LISTED, "line 7: no such file"),
    "a label too large": ("list", other_line("train/n0 0/1.JPEG 3"), (*LISTED, "--classes", 3), "line 7: the label"),
    "images of several sizes": ("list", lambda f: None, ("--images", "list/images"), "size="),
    "an image that is gone": ("list", lambda f: (f / "images/test/n0 1/0.JPEG").unlink(), LISTED, "no such file"),
}


@pytest.mark.parametrize(("kind", "spoil", "arguments", "named"), SPOILED.values(), ids=SPOILED)
def test_spoiled_data_is_one_line_and_exit_code_2(
    kind, spoil, arguments, named, sources, tmp_path, monkeypatch, capsys
):
    spoil(spoiled(sources, tmp_path, kind))
    monkeypatch.chdir(tmp_path)
    assert run("train", "--data", kind, *arguments, *SMALL, "--out", "run") == 2
    one_line(capsys, "train", named)
    assert not (tmp_path / "run").exists()


def test_a_list_of_test_images_may_lack_the_last_class(sources, tmp_path, monkeypatch):
    listed = spoiled(sources, tmp_path, "list") / "ImageNet_LT_test.txt"
    listed.write_text("".join(line for line in listed.open() if not line.endswith(" 2\n")))
    monkeypatch.chdir(tmp_path)
    assert run("train", "--data", "list", *LISTED, *SMALL, "--out", "run", "--quiet") == 0
    assert torch.load("run/last.pt", weights_only=True)["history"][0]["per_class"][2] is None


def test_broken_images_are_left_out_and_listed(sources, tmp_path, monkeypatch, capsys):
    cut(spoiled(sources, tmp_path, "tree") / "train/b/3.png")
    (tmp_path / "tree/test/a/0.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", "tree", *SMALL, "--skip-broken", "--quiet", "--out", "run")
    assert run("train", *arguments) == 0
    assert capsys.readouterr().err.count("left out: 1, the first is tree/") == 2
    lines = Path("run/skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["tree/train/b/3.png", "tree/test/a/0.png"]
    assert torch.load("run/last.pt", weights_only=True)["class_counts"] == [9, 4, 2]
    assert run("train", "--resume", "--out", "run", "--quiet") == 0
    shutil.copy(sources / "tree/train/b/3.png", "tree/train/b/3.png")
    assert run("train", "--resume", "--out", "run", "--quiet") == 2


@pytest.mark.parametrize("command", ["train", "compare"])
def test_only_images_of_the_subset_are_decoded(command, sources, tmp_path, monkeypatch):
    from ltsam_fast.data import decode

    seen, original = [], decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *one: seen.append(one[1].parts[-3]) or original(*one))
    monkeypatch.chdir(sources)
    more = ("--methods", "sgd,sam", "--seeds", "0,1") if command == "compare" else ()
    arguments = (*SMALL, *more, "--quiet", "--data", "tree", "--imbalance", 2)
    assert run(command, *arguments, "--test-per-class", 1, "--out", tmp_path / "one") == 0
    assert (seen.count("train"), seen.count("test")) == (2 + 1 + 1, 3)
    seen.clear()
    assert run(command, *arguments, "--val", 1, "--n-max", 1, "--imbalance", 1, "--out", tmp_path / "other") == 0
    assert (seen.count("train"), seen.count("test")) == (6, 0)


def test_a_bar_while_images_are_decoded(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(sources)
    monkeypatch.setenv("FORCE_COLOR", "1")
    grid = ("--methods", "sgd", "--seeds", 0)
    assert run("train", *SMALL, "--data", "tree", "--out", tmp_path / "run") == 0
    assert "decoding" in capsys.readouterr().out
    assert run("compare", *SMALL, *grid, "--data", "tree", "--out", tmp_path / "grid") == 0
    assert "decoding" in capsys.readouterr().out
    assert run("diagnose", tmp_path / "run", "--per-class", 1, "--iterations", 1) == 0
    output = capsys.readouterr().out
    assert "decoding" in output and "sharpness" in output


# --- compare

QUICK = ("--epochs", 2, "--no-tensorboard", "--quiet")


def compare(out, *arguments):
    return run("compare", "--out", out, *QUICK, *arguments)


def table_of(folder):
    return {(row["method"], row["loss"]): row for row in csv.DictReader((folder / "table.csv").open())}


def test_a_table_and_charts(tmp_path, capsys):
    assert compare(tmp_path, "--methods", "sgd,focal_sam", "--losses", "ce,la", "--seeds", "0,1,1") == 0
    output, errors = capsys.readouterr()
    assert not errors and "Focal-SAM" in output and "over 2 seeds" in output
    written = (tmp_path / "table.md").read_text()
    assert output == f"{written}\n"
    table, lines = table_of(tmp_path), written.splitlines()
    assert list(table) == [("sgd", "ce"), ("focal_sam", "ce"), ("sgd", "la"), ("focal_sam", "la")]
    shown = {}
    for (method, loss), row in table.items():
        logs = [tmp_path / f"{method}-{loss}" / f"seed{seed}" / "log.csv" for seed in (0, 1)]
        last = [list(csv.DictReader(log.open()))[-1] for log in logs]
        for group in ("all", "many", "medium", "few"):
            values = [float(one[group]) for one in last]
            assert float(row[group]) == pytest.approx(statistics.mean(values))
            assert float(row[f"{group}_std"]) == pytest.approx(statistics.stdev(values))
            shown[method, loss, group] = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    for line, (method, loss) in zip(lines[2:6], table, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell, group in zip(cells[2:6], ("all", "many", "medium", "few"), strict=True):
            assert cell.strip("*") == shown[method, loss, group]
            best = max(float(row[group]) for row in table.values())
            assert cell.startswith("**") == (float(table[method, loss][group]) == best)
    for name in ("bars.png", "curves.png"):
        assert Image.open(tmp_path / name).width > 500
    assert json.loads((tmp_path / "settings.json").read_text())["epochs"] == 2


def test_a_table_says_which_groups_are_empty(tmp_path, capsys):
    arguments = ("--methods", "sgd", "--seeds", 0, "--n-max", 40, "--imbalance", 2)
    assert compare(tmp_path / "one", *arguments) == 0
    assert "few: fewer than 10. No class is many or few." in capsys.readouterr().out
    assert compare(tmp_path / "two", *arguments, "--many", 30, "--few", 25) == 0
    assert "No class" not in capsys.readouterr().out


def test_finished_cells_are_not_trained_again(tmp_path, capsys):
    arguments = ("--methods", "sgd,sam", "--seeds", 0)
    assert compare(tmp_path, *arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/last.pt")}
    shutil.rmtree(tmp_path / "sam-ce" / "seed0")
    assert compare(tmp_path, "--methods", "sgd,sam,gnm", "--seeds", 0) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/last.pt")}
    assert len(before) == 2 and len(after) == 3
    assert [path.parts[-3] for path in after if before.get(path) == after[path]] == ["sgd-ce"]
    capsys.readouterr()
    assert compare(tmp_path, *arguments, "--lr", 0.07) == 2
    one_line(capsys, "compare", "lr was 0.05, is 0.07")


def swap(one, other):
    aside = one.with_name("aside")
    for old, new in ((one, aside), (other, one), (aside, other)):
        old.rename(new)


def swap_labels(root):
    path = root / "list" / "ImageNet_LT_train.txt"
    text = path.read_text()
    path.write_text(
        text.replace("/0.JPEG 0", "/0.JPEG x").replace("/0.JPEG 1", "/0.JPEG 0").replace("JPEG x", "JPEG 1")
    )


def change_a_pixel(root):
    path = root / "tree" / "train" / "b" / "3.png"
    picture = Image.open(path)
    picture.putpixel((3, 2), tuple(255 - value for value in picture.getpixel((3, 2))))
    picture.save(path)


OTHER_IMAGES = {
    "two classes' folders": (
        "tree",
        lambda root: swap(*(root / "tree" / split / c for split in ["train"] for c in "ab")),
    ),
    "two classes' test images": ("tree", lambda root: swap(root / "tree/test/a", root / "tree/test/b")),
    "two images": ("tree", lambda root: swap(root / "tree/train/a/0.png", root / "tree/train/b/0.png")),
    "a pixel": ("tree", change_a_pixel),
    "two labels": ("list", swap_labels),
}


@pytest.mark.parametrize(("kind", "change"), OTHER_IMAGES.values(), ids=OTHER_IMAGES)
@pytest.mark.parametrize("cache", [False, True])
def test_a_run_goes_on_with_its_own_images_only(kind, change, cache, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for one in ("tree", "list"):
        shutil.copytree(sources / one, one)
    for split in ("train", "test"):  # as many images in two classes: their counts don't tell
        shutil.copytree(f"tree/{split}/a", f"tree/{split}/b", dirs_exist_ok=True)
        for path in (tmp_path / f"tree/{split}/b").iterdir():
            save(path, pixels(np.random.default_rng(len(str(path))), 1, 16)[0])
    data_of = {"tree": ("--data", "tree"), "list": KINDS["list"][0][:-2]}[kind] + ("--cache", "cached") * cache
    settings = (*data_of, *SMALL[:2], *SMALL[4:], "--schedule", "constant", "--lr", 0.01)
    grid = (*settings, "--epochs", 1, "--methods", "sgd", "--seeds", 0, "--out", "grid")
    more = ("train", "--out", "run", "--resume", "--epochs", 2, "--quiet")
    assert run("train", *settings, "--epochs", 1, "--out", "run", "--quiet") == 0
    assert run("compare", *grid) == 0
    written = {path: path.read_bytes() for path in tmp_path.glob("*/**/last.pt")}
    assert len(written) == 2

    state = torch.load("run/last.pt", weights_only=True)
    shutil.copytree("run", "old")
    torch.save({name: value for name, value in state.items() if name != "data"}, "old/last.pt")
    capsys.readouterr()
    for command in (("diagnose", "old", "--per-class", 3), ("train", "--out", "old", *more[3:])):
        assert run(*command) == 0
        one_line(capsys, command[0], "warning: old")
    assert run("train", "--out", "old", "--resume", "--epochs", 3, "--quiet") == 0  # it has a hash from now on
    assert not capsys.readouterr().err

    change(tmp_path)
    split = "test" if change is OTHER_IMAGES["two classes' test images"][1] else "train"
    for command in (more, ("compare", *grid), ("compare", *grid, "--methods", "sgd,sam"), ("diagnose", "run")):
        assert run(*command) == 2
        one_line(capsys, command[0], f"the {split} images, their order or their labels are not those of the run in")
    assert written == {path: path.read_bytes() for path in tmp_path.glob("*/**/last.pt") if "old" not in path.parts}
    assert run("diagnose", "run", "--per-class", 3, "--iterations", 1, *data_of[:2]) == 0  # these were asked for
    one_line(capsys, "diagnose", f"warning: data: the {split} images")
    change(tmp_path)
    assert run(*more) == 0


def test_a_hash_of_many_images_looks_at_each_of_them(monkeypatch):
    from ltsam_fast.data import images

    def digest(**changes):
        return images.Images(**{"pixels": pixels, "labels": labels, "classes": ("a", "b"), **changes}).digest

    pixels = torch.randint(256, (60, 3, 9, 8), dtype=torch.uint8)
    labels = torch.arange(60) % 2
    for limit in (1 << 30, 2000, 1):
        monkeypatch.setattr(images, "_HASHED_BYTES", limit)
        assert digest() == digest(pixels=pixels.clone().to(memory_format=torch.channels_last))
        others = [digest(labels=1 - labels), digest(classes=("b", "a")), digest(pixels=pixels.flip(0))]
        for index in range(60):
            other = pixels.clone()
            other[index, index % 3, 4, index % 8] += 1
            others.append(digest(pixels=other))
        assert len({digest(), *others}) == 64


def test_a_cell_that_fails_does_not_take_the_others_with_it(tmp_path, capsys, monkeypatch):
    def failing(config, *rest, **named):
        if (config.method, config.seed) == ("sam", 0):
            raise RuntimeError("CUDA out of memory")
        return train(config, *rest, **named)

    monkeypatch.setattr(comparison, "train", failing)
    arguments = ("--methods", "sam,sgd,asam", "--seeds", "0,1", "--set", "asam.rho=1e30")
    assert compare(tmp_path, *arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "sam-ce/seed0: RuntimeError: CUDA out of memory" in lines[0]
    assert all("asam-ce" in line and "the loss is nan" in line for line in lines[1:])
    assert "in failing" in (tmp_path / "sam-ce" / "seed0.error.txt").read_text()
    assert {name: row["seeds"] for (name, _), row in table_of(tmp_path).items()} == {"sam": "1", "sgd": "2"}
    monkeypatch.undo()
    assert compare(tmp_path, "--methods", "sam,sgd", "--seeds", "0,1") == 0
    assert not (tmp_path / "sam-ce" / "seed0.error.txt").exists()
    assert {name: row["seeds"] for (name, _), row in table_of(tmp_path).items()} == {"sam": "2", "sgd": "2"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--methods", "sgd,nix"), "nix"),
        (("--losses", "nix"), "nix"),
        (("--seeds", "0,x"), "seeds.1 must be a valid integer"),
        (("--methods", "sgd,sam", "--set", "rho=-1"), "rho must be"),
        (("--methods", "sgd,sam", "--set", "lam=1"), "lam"),
        (("--losses", "la,vs", "--loss-set", "tau=-1"), "tau must be"),
        (("--method", "sgd"), "--method"),
        (("--data", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_a_grid_that_is_wrong_is_told_before_anything_is_trained(arguments, named, tmp_path, capsys):
    assert compare(tmp_path / "out", *arguments) == 2
    one_line(capsys, "compare", named)
    assert not (tmp_path / "out").exists()


def test_variants_of_a_method_side_by_side(tmp_path, capsys):
    arguments = ("--methods", "sgd,sam+rho=0.02,sam+rho=0.2+active=every:2", "--losses", "la", "--seeds", "0,1,2")
    assert compare(tmp_path / "one", *arguments) == 0
    printed = capsys.readouterr().out
    assert "| SAM, rho=0.2, active=every:2 | LA |" in printed
    assert compare(tmp_path / "two", *arguments, "--jobs", 2, "--together", 2) == 0
    capsys.readouterr()
    found = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two")]
    assert [row["finals"] for row in found[0]] == [row["finals"] for row in found[1]]
    names = ["sgd", "sam+rho=0.02", "sam+rho=0.2+active=every:2"]
    assert [row["method"] for row in found[1]] == names
    for name, rho, active in zip(names[1:], (0.02, 0.2), ("all", "every:2"), strict=True):
        config = json.loads((tmp_path / "two" / f"{name}-la" / "seed1" / "config.json").read_text())
        assert (config["method"], config["options"]["rho"], config["active"]) == ("sam", rho, active)


def test_differences_to_sgd_are_paired(tmp_path, capsys):
    assert compare(tmp_path, "--methods", "sgd,sam", "--losses", "la", "--seeds", "0,1,2") == 0
    rows = table_of(tmp_path)
    assert rows["sgd", "la"]["all_difference"] == ""
    for group in ("all", "few"):
        logs = [[tmp_path / f"{name}-la" / f"seed{seed}" / "log.csv" for seed in range(3)] for name in ("sam", "sgd")]
        last = [[float(list(csv.DictReader(log.open()))[-1][group]) for log in one] for one in logs]
        steps = np.subtract(*last)
        half = 4.302653 * steps.std(ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom
        wanted = [steps.mean(), steps.mean() - half, steps.mean() + half]
        names = [f"{group}_{end}" for end in ("difference", "low", "high")]
        assert [float(rows["sam", "la"][name]) for name in names] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    written = (tmp_path / "table.md").read_text()
    assert "Difference to SGD of the same seed" in written
    assert Image.open(tmp_path / "differences.png").width > 300
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["machines"]) == 1 and results["machines"][0].endswith("1 thread")


def test_quantiles_of_students_t():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom in (1, 2, 3, 4, 9, 19, 99):
        assert comparison.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


def test_after_a_time_no_further_run_begins(tmp_path, capsys, monkeypatch):
    arguments = ("--methods", "sgd,sam", "--seeds", "0,1")
    assert compare(tmp_path, *arguments, "--limit", 0) == 1
    one_line(capsys, "compare", "4 of 4 runs were not begun within 0 s")
    assert not list(tmp_path.glob("*/*/last.pt"))
    seen = []

    def stopping(config, *rest, **named):
        seen.append(config.seed)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return train(config, *rest, **named)

    monkeypatch.setattr(comparison, "train", stopping)
    assert compare(tmp_path, *arguments) == 130
    assert {name: row["seeds"] for (name, _), row in table_of(tmp_path).items()} == {"sgd": "1", "sam": "1"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--methods", "sgd+rho=1"), "sgd has no option 'rho'"),
        (("--methods", "sam+rho"), "METHOD+NAME=VALUE"),
        (("--methods", "sam+active=9"), "active must be"),
        (("--methods", "sam+lr=x"), "lr must be a valid number"),
        (("--jobs", 0), "jobs"),
        (("--n-max", 5), "n_max"),
        (("--n-max", 5000), "counts[0]"),
        (("--val", 150), "no such subset"),
    ],
)
def test_a_variant_that_is_wrong_is_told_before_anything_is_trained(arguments, named, tmp_path, capsys):
    assert compare(tmp_path / "out", *arguments) == 2
    one_line(capsys, "compare", named)
    assert not (tmp_path / "out").exists()


# --- evidence

PROTOCOL = {
    "losses": ["ce", "la"],
    "seeds": [0, 1],
    "val": 20,
    "val_seeds": [5, 6],
    "settings": {"recipe": "digits-lt", "n_max": 60, "resample": True, "epochs": 3, "tensorboard": False},
    "grids": {"sgd": {}, "asam": {"rho": [0.05, 10**30]}, "focal_sam+active=0.5": {"rho": [0.1], "gamma": [0.0, 3.0]}},
}


def evidence(protocol, out, *arguments):
    path = out.with_suffix(".json")
    path.write_text(json.dumps(protocol))
    return run("evidence", path, "--out", out, "--quiet", *arguments)


def test_evidence_chooses_on_held_out_images_and_tests_once(tmp_path, capsys):
    assert evidence(PROTOCOL, tmp_path / "out", "--limit", 0) == 1
    one_line(capsys, "evidence", "16 of 16 runs were not begun")
    assert evidence(PROTOCOL, tmp_path / "out") == 0  # of a radius of 1e30 the loss is not finite
    output, errors = capsys.readouterr()
    assert errors.count("\n") == 4 and errors.count(f"asam+rho={10**30}") == 4
    found = [json.loads((tmp_path / "out" / part / "results.json").read_text()) for part in ("validation", "test")]
    validation, test = ({(row["method"], row["loss"]): row for row in one["rows"]} for one in found)
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())
    for loss in PROTOCOL["losses"]:
        tried = [f"focal_sam+active=0.5+rho=0.1+gamma={gamma}" for gamma in (0.0, 3.0)]
        best = max(tried, key=lambda name: validation[name, loss]["accuracies"]["all"][0])
        assert chosen[loss] == {"sgd": "sgd", "asam": "asam+rho=0.05", "focal_sam+active=0.5": best}
        for name in chosen[loss].values():
            assert list(test[name, loss]["finals"]) == ["0", "1"]
            assert (name == "sgd") or list(validation[name, loss]["finals"]) == ["5", "6"]
    assert len(test) == 6
    for part, val, images in (("validation", 20, 200), ("test", None, 400)):
        path = tmp_path / "out" / part / "asam+rho=0.05-ce"
        state = torch.load(next(path.glob("*/last.pt")), weights_only=True)
        assert state["config"]["val"] == val and state["class_counts"][0] == 60
        scale = state["history"][-1]["all"] / 100 * images
        assert scale == pytest.approx(round(scale), abs=1e-3)
    assert (tmp_path / "out" / "test" / "table.md").read_text() + "\n" == output
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/last.pt")}
    grids = {**PROTOCOL["grids"], "asam": {"rho": [0.05]}}
    assert evidence({**PROTOCOL, "grids": grids}, tmp_path / "out", "--limit", 0) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*/last.pt")}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"val_seeds": [1]}, "val_seeds must be others"),
        ({"seed": [1]}, "there is no setting 'seed': did you mean 'seeds'? There are losses, seeds, val, val_seeds,"),
        ({"seeds": 1}, "seeds must be a valid list, got 1"),
        ({"val": "20"}, "val must be a valid integer, got '20'"),
        ({"grids": {"sam": {"rho": 0.1}}}, "grids.sam.rho must be a valid list, got 0.1"),
        ({"grids": None}, "grids must be a valid dictionary, got None"),
        ({"settings": {"rho": 1}}, "there is no setting 'rho'"),
        ({"grids": {"nix": {}}}, "nix"),
    ],
)
def test_a_protocol_that_is_wrong(changes, named, tmp_path, capsys):
    assert evidence({**PROTOCOL, **changes}, tmp_path / "out") == 2
    one_line(capsys, "evidence", named)


def test_a_protocol_takes_the_flags_names_and_options(tmp_path, capsys):
    settings = {"recipe": "digits-lt", "n-max": 60, "batch-size": 32, "epochs": 1}
    assert evidence({**PROTOCOL, "settings": settings}, tmp_path / "out", "--set", "adaptive=true", "--limit", 0) == 1
    one_line(capsys, "evidence", "16 of 16 runs were not begun")
    protocol = {**PROTOCOL, "losses": ["ce"], "seeds": [0], "settings": settings, "grids": {"sam": {}}}
    assert evidence(protocol, tmp_path / "one", "--set", "adaptive=true", "--no-tensorboard") == 0
    config = torch.load(next(tmp_path.glob("one/test/*/*/last.pt")), weights_only=True)["config"]
    assert (config["batch_size"], config["n_max"], config["options"]["adaptive"]) == (32, 60, True)


PROTOCOLS = sorted((Path(__file__).parents[1] / "bench" / "evidence").glob("*.toml"))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.name)
def test_protocols_name_what_is_there(path):
    protocol = Protocol(**read_file(path))
    layers = [protocol.settings, {"val": protocol.val}]
    names = [name for names in variants(protocol.grids).values() for name in names]
    cells = comparison.grid(layers, names, protocol.losses, protocol.val_seeds, Path("out"))
    assert len(cells) == len(names) * len(protocol.losses) * len(protocol.val_seeds)


# --- diagnose


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with reweighted classes and logits that are cosines; of this seed the largest eigenvalues are positive."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(
        build({"method": "sam", "loss": "ldam", "epochs": 2, "drw_start": 1, "seed": 3, "tensorboard": False}), folder
    )
    return folder


def network_and_images(folder):
    """The network in a checkpoint, the checkpoint, and the digits it was trained on."""
    state, images = torch.load(folder / "last.pt", weights_only=True), data.load("digits")
    images = images.take(data.longtail_subset(images.labels, state["class_counts"]))
    model = network_of(build(state["config"]), images)
    model.load_state_dict(state["model"])
    return model, state, images


def test_diagnose(trained, tmp_path, capsys):
    assert run("diagnose", trained, "--out", tmp_path / "found", "--per-class", 30, "--iterations", 300) == 0
    output, errors = capsys.readouterr()
    assert not errors and "top Hessian eigenvalue, few" in output
    found = json.loads((tmp_path / "found" / "diagnostics.json").read_text())
    for name in ("class_grad_norms", "class_sharpness", "loss_slice"):
        assert Image.open(tmp_path / "found" / f"{name}.png").width > 500

    model, state, images = network_and_images(trained)
    config = build(state["config"])
    weight = lf.losses.deferred_reweighting(1, state["class_counts"], 1, config.drw_beta)
    loss = criterion(config, state["class_counts"])
    loss.set_weight(weight)
    prepare = data.Augment.for_testing(images)
    assert [row["images"] for row in found["classes"]] == [min(30, count) for count in state["class_counts"]]
    for c, row in enumerate(found["classes"]):
        members = (images.labels == c).nonzero().flatten()[:30]
        x, y = prepare(images.pixels[members]), images.labels[members]
        model.zero_grad()
        at_w = loss(model(x), y).mean()
        at_w.backward()
        grads = [param.grad for param in model.parameters()]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        with torch.no_grad():
            backup = [param.clone() for param in model.parameters()]
            for param, grad in zip(model.parameters(), grads, strict=True):
                param += 0.1 * grad / norm
            rise = loss(model(x), y).mean() - at_w
            for param, old in zip(model.parameters(), backup, strict=True):
                param.copy_(old)
        wanted = (norm.item(), at_w.item(), rise.item())
        assert (row["gradient_norm"], row["loss"], row["sharpness"]) == pytest.approx(wanted, rel=2e-3)
    whole = sum(row["loss"] * row["images"] for row in found["classes"]) / sum(
        row["images"] for row in found["classes"]
    )
    assert found["slice"]["loss"][7] == pytest.approx(whole, rel=1e-5)  # in the middle are the weights themselves
    assert found["rho"] == 0.1 and found["epoch"] == 2
    for curvature in found["hessian"].values():
        assert not curvature["converged"] or curvature["residual"] <= 0.011 * abs(curvature["top_eigenvalue"])


def test_diagnose_with_another_loss_split_and_radius(trained, tmp_path):
    found = diagnose(
        trained / "last.pt", tmp_path, split="test", loss="ce", rho=0.02, per_class=5, iterations=1, steps=3
    )
    assert [row["images"] for row in found["classes"]] == [5] * 10
    assert (found["rho"], found["config"]["loss"], len(found["slice"]["loss"])) == (0.02, "ce", 3)
    model, _, images = network_and_images(trained)
    test = data.load("digits", "test")
    for c, row in enumerate(found["classes"]):
        x = data.Augment.for_testing(images)(test.pixels[test.labels == c][:5])
        wanted = torch.nn.functional.cross_entropy(model(x), torch.full((5,), c))
        assert row["loss"] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nowhere",), "nowhere: no such file"),
        (("damaged.pt",), "damaged"),
        (("other.pt",), "version"),
        (("run", "--rho", "nan"), "rho must be"),
        (("run", "--per-class", 0), "per_class must be"),
        (("run", "--split", "val"), "split must be"),
        (("run", "--loss", "nix"), "nix"),
        (("run", "--data", "nowhere"), "nowhere"),
        (("run", "--data", "tree"), "n_max"),
        (("whole", "--data", "cifar10"), "classes"),
        (("whole", "--data", "coloured"), "3 x 32 x 32 do not fit"),
        (("run", "--out", "damaged.pt"), "is a file"),
    ],
)
def test_what_diagnose_can_not_do_is_one_line(arguments, named, trained, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    for name in ("tree", "cifar10"):
        (tmp_path / name).symlink_to(sources / name)
    state = torch.load("run/last.pt", weights_only=True)
    content = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(content[: len(content) // 2])
    torch.save({"model": state["model"]}, "other.pt")
    (tmp_path / "whole").mkdir()
    torch.save({**state, "config": {**state["config"], "imbalance": None}}, "whole/last.pt")
    for split in ("train", "test"):
        for c in range(10):
            save(tmp_path / "coloured" / split / str(c) / "0.png", pixels(np.random.default_rng(c), 1)[0])
    assert run("diagnose", *arguments) == 2
    one_line(capsys, "diagnose", named)


# --- seeds


def test_noise_has_the_seed_of_the_run_and_is_another_in_each_process():
    counts = [9, 4, 2]
    z, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 2])
    first, again, other, beside = (
        criterion(Config(loss="gcl", seed=seed), counts, rank)(z, y) for seed, rank in ((1, 0), (1, 0), (5, 0), (1, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, beside)
    for loss in LOSSES:  # those without noise take no seed
        criterion(Config(loss=loss, seed=3), counts)


def test_tensorboard_shows_what_the_logs_do(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ("--out", tmp_path, "--quiet", "--tensorboard", "--schedule", "constant")
    assert run("train", *arguments, "--epochs", 1) == 0
    assert run("train", *arguments, "--epochs", 3, "--resume") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    for tag, column in (("accuracy/all", "all"), ("accuracy/few", "few"), ("train_loss", "train_loss"), ("lr", "lr")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [1, 2, 3]
        assert [value for _, value in shown] == pytest.approx([float(row[column]) for row in rows], rel=1e-6)


def test_tensorboard_that_is_asked_for_and_not_there_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run("train", *SMALL, "--tensorboard", "--out", tmp_path) == 2
    one_line(capsys, "train", "tensorboard: pip install")


def test_seeds_out_of_range():
    for name in ("seed", "data_seed"):
        with pytest.raises(ConfigError, match=rf"{name} must be greater than or equal to 0, got -1"):
            Config(**{name: -1})
        with pytest.raises(ConfigError, match=rf"{name} must be less than 4294967296, got 4294967296"):
            Config(**{name: 2**32})


def test_a_table_of_finished_runs_needs_no_images(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "tree", "tree")
    grid = ("--data", "tree", *SMALL[:2], *SMALL[4:], "--epochs", 1, "--seeds", 0, "--out", "grid")
    assert run("compare", *grid, "--methods", "sgd") == 0
    (tmp_path / "tree").rename("gone")
    capsys.readouterr()
    assert run("compare", *grid, "--methods", "sgd") == 0
    assert "the images of the finished runs are not checked" in capsys.readouterr().err
    assert run("compare", *grid, "--methods", "sgd,sam") == 2
    one_line(capsys, "compare", "tree: no such file or folder")


def test_a_class_of_another_name_is_named(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "tree", "tree")
    settings = ("--data", "tree", *SMALL[:2], *SMALL[4:], "--schedule", "constant", "--lr", 0.01)
    assert run("train", *settings, "--epochs", 1, "--out", "run", "--quiet") == 0
    for split in ("train", "test"):
        (tmp_path / "tree" / split / "c").rename(tmp_path / "tree" / split / "d")
    capsys.readouterr()
    assert run("train", "--out", "run", "--resume", "--epochs", 2, "--quiet") == 2
    one_line(capsys, "train", "a class was 'c', now it is 'd'")


RECIPES_PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_the_commands_of_the_recipes_are_right(monkeypatch, capsys):
    """But for the data, which is not there."""
    grids = []
    monkeypatch.setattr(comparison, "compare", lambda cells, out, **_: (grids.append(cells), ([], []))[1])
    lines = [
        line.strip()
        for line in RECIPES_PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("    python -m")
    ]
    for line in lines:
        _, _, package, command, *arguments = line.split()
        assert (package, command) == ("ltsam_fast", "compare")
        assert run(command, *arguments, "--device", "cpu", "--quiet") == 0, capsys.readouterr().err
    assert len(lines) == len({cells[0].folder.parts[:2] for cells in grids}) == 13
    assert sum(len(cells) for cells in grids) == 8 * 48 + 2 * 6 + 2 * 18 + 12
