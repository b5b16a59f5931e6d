"""bench/run_gpu.sh: what is left when a step fails or takes too long, and that each part fits into its time; nothing is run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import stat
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from ltsam_fast import backend
from ltsam_fast.optim import capture

from .test_capture import Tape

ROOT = Path(__file__).parents[1]
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *is_available*) exit $((1 - ${GPU:-0})) ;;
    *capability*) echo 90; exit ;;
    -) exit ${NEEDS:-0} ;;
    *"-m pip"*) echo "pip says so"; exit ${BUILD:-0} ;;
esac
for last; do :; done
if [[ $last == --benchmark-json=* && ${SLOW:-} ]]; then
    trap 'echo interrupted; echo "{}" >"${last#*=}"; exit 2' INT
    for _ in {1..600}; do sleep 0.1; done
fi
echo done
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script with other programs in place of Python's and, if asked for, of timeout; returns what it left."""

    def run(*parts, programs=("python3",), **env):
        bin_ = tmp_path / "bin"
        bin_.mkdir(exist_ok=True)
        for name, text in (
            ("python3", PYTHON),
            ("timeout", TIMEOUT),
            *((n, TIMEOUT) for n in ("compute-sanitizer", "ncu")),
        ):
            (bin_ / name).unlink(missing_ok=True)
            if name in programs:
                (bin_ / name).write_text(text)
                (bin_ / name).chmod(stat.S_IRWXU)
        path = f"{bin_}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "CALLS": str(tmp_path / "calls"), **env}
        done = subprocess.run(
            ["bash", str(ROOT / "bench/run_gpu.sh"), str(tmp_path / "out"), *parts],
            env=env,
            text=True,
            capture_output=True,
        )
        files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
        return done, files

    return run


def test_a_step_that_takes_too_long_leaves_what_it_has_found(script):
    done, files = script("steps", SLOW="1", LTSAM_LIMIT="2")
    assert done.returncode == 1 and "failed: steps (exit 124" in done.stdout
    assert {"steps/bench.json", "steps.txt"} <= files and "build.txt" not in files


def test_after_a_failed_build_nothing_is_run(script):
    done, files = script(BUILD="3")
    assert done.returncode == 1 and "failed: build (exit 3" in done.stdout and "pip says so" in done.stdout
    assert files == {"build.txt"}


def test_what_is_missing_is_said_before_anything_is_run(script, tmp_path):
    done, files = script(NEEDS="1")
    assert done.returncode == 2 and not files and "== build" not in done.stdout
    text = (ROOT / "bench/run_gpu.sh").read_text()
    needs = text.split("python3 - <<'END' || exit 2\n")[1].split("\nEND\n")[0]
    for have, ends in (
        (dict.fromkeys(NEEDED, "99.1"), None),
        ({**dict.fromkeys(NEEDED, "99.1"), "setuptools": "68.2.0"}, "pip install setuptools>=77"),
        (
            {name: "99.1" for name in NEEDED if name not in ("ninja", "pytest-benchmark")},
            "ninja>=1 pytest-benchmark>=4",
        ),
    ):
        with mock.patch.object(importlib.metadata, "version", functools.partial(installed, have)):
            if ends is None:
                exec(needs, {})
                continue
            with pytest.raises(SystemExit, match=f"lacks .*: .*{ends}$"):
                exec(needs, {})


NEEDED = ("torch", "numpy", "setuptools", "pybind11", "ninja", "pytest", "pytest-benchmark")


def installed(have, name):
    """The version that there is."""
    if name not in have:
        raise importlib.metadata.PackageNotFoundError(name)
    return have[name]


def test_logs_of_what_went_well_go(script):
    done, files = script()
    assert done.returncode == 0, done.stdout + done.stderr
    assert files == {"info.txt", "tests.txt", "kernels.txt", "memcheck.txt", "graphs.txt"}


@pytest.mark.parametrize("part", ["steps", "tests", "bench", "checks"])
def test_each_part_takes_less_than_8_minutes(part, script, tmp_path):
    for gpu in ("0", "1"):
        script(part, programs=("python3", "timeout", "compute-sanitizer", "ncu"), GPU=gpu)
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        assert all(call[0] == "--signal=INT" for call in calls) and len(calls) >= 3
        assert sum(int(call[2]) for call in calls) + 10 <= 480, calls
        (tmp_path / "calls").unlink()


def test_the_whole_steps_come_first(script, tmp_path):
    script(programs=("python3", "timeout", "compute-sanitizer", "ncu"), GPU="1")
    calls = (tmp_path / "calls").read_text()
    order = (
        "ltsam_fast info",
        "test_whole_steps",
        "test_capture",
        "test_steps",
        "memcheck",
        "racecheck",
        "sanitize graphs",
        "ncu",
    )
    places = [calls.index(name) for name in order]
    assert places == sorted(places)


@pytest.mark.parametrize("parts", [("test",), ("tests", "all")])
def test_other_parts_are_refused(script, parts):
    done, files = script(*parts)
    assert done.returncode == 2 and f"got {parts[-1]}" in done.stderr and not files


@pytest.mark.parametrize("wrong", [False, True])
def test_graphs_are_compared_with_ordinary_steps(wrong, monkeypatch, capsys):
    if reason := backend.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    monkeypatch.syspath_prepend(str(ROOT))
    sanitize = importlib.import_module("bench.sanitize")
    monkeypatch.setattr(capture, "Machine", Tape)
    # Of a graph, not of ordinary steps, the tape must put back what it changed while it was captured.
    seen = []
    monkeypatch.setattr(Tape, "state", staticmethod(lambda: seen))
    plain = sanitize.lf.graph_step

    def watched(model, loss, optimizer, *rest, **named):
        seen[:] = [*model.parameters(), *model.buffers()]
        step = plain(model, loss, optimizer, *rest, **named)

        def follow(*batch):
            seen[:] = [*model.parameters(), *model.buffers()]
            seen.extend(x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
            return step(*batch)

        return follow

    monkeypatch.setattr(sanitize.lf, "graph_step", watched)
    if wrong:
        monkeypatch.setattr(capture.Trace, "update", lambda *_, **__: None)
        with pytest.raises(AssertionError, match="not close"):
            sanitize.graphs("cpu")
        return
    sanitize.graphs("cpu")
    assert capsys.readouterr().out.count(" relative difference") == 3
