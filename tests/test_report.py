"""``python -m bench.report`` on what was measured, whole and in parts."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, front_page = loaded("report"), loaded("front_page")

MEASURED = {path.parent.name: json.loads(path.read_text()) for path in sorted(BENCH.glob("results/*/bench.json"))}


@pytest.mark.parametrize("run", MEASURED)
def test_the_committed_reports_are_those_of_their_figures(run):
    assert report.table(MEASURED[run]) == (BENCH / "results" / run / "report.md").read_text()


@pytest.mark.parametrize("name", report.SECTIONS)
def test_any_part_of_the_benchmarks_has_a_report(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = []
    for results in MEASURED.values():
        found += [entry for entry in results["benchmarks"] if entry["extra_info"].get("table") == name]
    if not found:
        pytest.skip(f"nothing of {name!r} has been measured")
    part = {**next(iter(MEASURED.values())), "benchmarks": found}
    (tmp_path / "part.json").write_text(json.dumps(part))
    assert report.main([str(tmp_path / "part.json"), str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == text + "\n" and report.SECTIONS[name][1] in text
    assert text.count("\n| ") == 1 + len(report.rows(part, name))
    assert (tmp_path / "report.png").exists() == (name in ("phases", "methods", "growth"))
    assert (tmp_path / "steps.png").exists() == (name == "whole steps")


def test_the_front_page_is_drawn_from_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    front_page.main(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 20_000
