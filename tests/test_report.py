"""``python -m bench.report`` on what was measured, whole and in parts."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name.replace('.', '/')}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report, front_page = loaded("report"), loaded("front_page")
against_time, collect = loaded("evidence.against_time"), loaded("evidence.collect")

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


def test_accuracy_against_time_is_that_of_its_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = BENCH / "results" / "2026-11-26-epyc-cifar10-lt-cnn"
    found = against_time.curves(folder)
    assert against_time.table(found) == (folder / "time.md").read_text()
    sse, imb, sgd = (
        next(one for name, one in found.items() if name.startswith(method)) for method in ("sse", "imb", "sgd")
    )
    assert sgd.ours == sgd.published == sgd.epochs
    steps = {
        row["method"]: row
        for one in json.loads((folder / "steps.json").read_text())["benchmarks"]
        for row in one["extra_info"]["rows"]
    }
    assert imb.ours[-1] == pytest.approx(100 * steps["ImbSAM"]["ours_sgd"])
    stages = steps["SSE-SAM, stage 1"]["ours_sgd"], steps["SSE-SAM, stage 2"]["ours_sgd"]
    assert sse.ours[-1] == pytest.approx(70 * stages[0] + 30 * stages[1])
    against_time.draw(found, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 20_000


def test_logs_are_collected(tmp_path):
    log = tmp_path / "runs" / "test" / "sam+rho=0.1-la" / "seed3" / "log.csv"
    log.parent.mkdir(parents=True)
    lines = [f"{epoch},0.1,{1 / epoch},{50 if epoch == 20 else ''},,,,1.5" for epoch in range(1, 26)]
    log.write_text("\n".join(["epoch,lr,train_loss,all,many,medium,few,seconds", *lines]) + "\n")
    collect.main(tmp_path / "runs", tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "stage,method,loss,seed,epoch,lr,train_loss,all,many,medium,few,seconds",
        "test,sam+rho=0.1,la,3,1,0.1,1.0000,,,,,1.5",
        "test,sam+rho=0.1,la,3,10,0.1,0.1000,,,,,1.5",
        "test,sam+rho=0.1,la,3,20,0.1,0.0500,50,,,,1.5",
    ]
