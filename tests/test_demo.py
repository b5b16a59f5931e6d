"""The demo runs and leaves what it says."""

from __future__ import annotations

import json

import pytest
import torch

import ltsam_fast as lf
from ltsam_fast import demo


@pytest.fixture(autouse=True)
def needs_the_demo_extra():
    threads = torch.get_num_threads()
    for needed in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    yield
    torch.set_num_threads(threads)


def test_quick_demo_leaves_a_chart_and_all_numbers(tmp_path, capsys):
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert list(report["accuracy"]) == list(report["step_times"]) == ["SGD", "SAM", "ImbSAM", "SSE-SAM", "Focal-SAM"]
    for name, groups in report["accuracy"].items():
        assert name in printed
        assert all(0 <= groups[group]["mean"] <= 100 for group in ("all", "many", "medium", "few"))
        assert groups["many"]["mean"] > 50  # three epochs are enough for the frequent classes
    for name, entry in report["step_times"].items():
        assert entry["published_ms"] > 0 and ("ratio" in entry) == ("ours_ms" in entry) == (name != "SGD")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_all_methods_in_one_table(tmp_path, capsys):
    assert demo.main(["--methods", "all", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert list(report["accuracy"]) == list(demo.METHODS.values())
    assert [*demo.METHODS] == ["sgd", *lf.list_methods()] and demo.OPTIONS.keys() <= demo.METHODS.keys()
    for name, groups in report["accuracy"].items():
        assert name in printed and groups["step_ms"]["mean"] > 0


@pytest.mark.parametrize("arguments", [["--methods", "adamw"], ["--seeds", "0"], ["--imbalance", "nan"]])
def test_bad_arguments_are_one_clear_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
