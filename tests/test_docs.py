"""The guides: every block of Python runs as it is printed, every notebook too, and tables agree with the package.

The blocks of a page run in order, in one namespace that begins with ``docs/stand_ins.py``. A comment before a block,
``<!-- runs if: EXPRESSION -->``, leaves it out where the expression is false: without a GPU, say. Printed commands run too.
"""

import contextlib
import importlib
import inspect
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

import ltsam_fast as lf
from ltsam_fast.__main__ import main
from ltsam_fast.optim.registry import method_named
from ltsam_fast.train import cli, compare, diagnose, loop
from ltsam_fast.train.method_registry import options_of
from ltsam_fast.train.recipes import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?:<!-- runs if: (.*?) -->\n)?^```(python|sh)\n(.*?)^```$", re.M | re.S)
PAGES = [DOCS.parent / "README.md", *sorted(page for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text()))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
EXTRAS = ("lightning", "transformers", "accelerate", "sklearn", "matplotlib")


def blocks(page, language):
    """The blocks of a language: line numbers, conditions and text."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start(3)), found[1], found[3]


def name_of(page):
    return str(page.relative_to(DOCS.parent))


@pytest.fixture
def a_folder(tmp_path, monkeypatch):
    """An empty working directory, and the variables of a torchrun with one process."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = port.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "accelerate" in sys.modules:  # which keeps what it found in the environment
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_printed_runs(page, a_folder):
    source = page.read_text()
    for extra in EXTRAS:
        if re.search(rf"^(import|from) {extra}\b", source, re.M):
            pytest.importorskip(extra)
    scope = {"__name__": "__main__"}
    stand_ins = DOCS / "stand_ins.py"
    exec(compile(stand_ins.read_text(), str(stand_ins), "exec"), scope)
    for line, condition, text in blocks(page, "python"):
        if condition and not eval(condition, scope):
            continue
        exec(compile("\n" * line + text, str(page), "exec"), scope)
    with contextlib.suppress(KeyError):
        assert scope["loss"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```sh" in page.read_text()], ids=name_of)
def test_printed_commands_run(page, a_folder, monkeypatch, capsys):
    """Those of a block with a condition that is false are taken up to the work itself."""

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    for _, condition, text in blocks(page, "sh"):
        runs = not condition or eval(condition, {"os": os, "torch": torch})
        with monkeypatch.context() as without_work:
            for module, name in () if runs else ((loop, "train"), (compare, "compare"), (diagnose, "diagnose")):
                without_work.setattr(module, name, stop)
            for command in text.splitlines():
                program, _, arguments = command.partition("python -m ltsam_fast ")
                if program or not arguments:
                    assert command.startswith("pip install"), command
                    continue
                code, message = run(arguments.split(), capsys)
                if runs or arguments == "info":
                    assert code in (None, cli.OK), message
                elif "--resume" in arguments:  # of a run that is not there
                    assert code == cli.WRONG and "no checkpoint" in message
                else:
                    assert code == cli.INTERRUPTED, message
    torch.set_num_threads(threads)


def run(arguments, capsys):
    """Runs a command; returns its exit code and what it said of errors."""
    try:
        main(arguments)
        code = None
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_are_named_as_programs_are_there(page):
    for module in re.findall(r"python -m (ltsam_fast\.[\w.]+)", page.read_text()):
        assert inspect.getsource(importlib.import_module(module).main)


def test_files_that_pages_take_in():
    """In a block that ruff knows as Python it makes an expression of the mark, which the page then shows."""
    taken = [name for page in DOCS.rglob("*.md") for name in re.findall(r'^--8<-- "(.*)"$', page.read_text(), re.M)]
    assert sorted(taken) == ["CHANGELOG.md", "stand_ins.py"]


@pytest.mark.parametrize("folder", ["optim", "train"])
def test_contributors_find_every_file(folder):
    text = (
        (DOCS.parent / "CONTRIBUTING.md")
        .read_text()
        .partition(f"| file in `ltsam_fast/{folder}/` |")[2]
        .partition("\n\n")[0]
    )
    files = {file.name for file in (DOCS.parent / "ltsam_fast" / folder).glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"`(\w+\.py)`", text))


@pytest.mark.parametrize("name", lf.list_methods())
def test_every_method_has_a_page_in_the_menu(name):
    pages = {page: page.read_text() for page in (DOCS / "methods").glob("*.md")}
    (page,) = [
        page for page, text in pages.items() if f"`{name}`" in text.partition("| by name |")[2].partition("\n")[0]
    ]
    assert f"methods/{page.name}\n" in (DOCS.parent / "mkdocs.yml").read_text()
    assert f"::: ltsam_fast.{method_named(name).cls.__name__}\n" in pages[page]
    assert f"({page.name})" in pages[DOCS / "methods" / "index.md"]


def test_starting_values_are_those_of_classes_and_recipes():
    _, table = (DOCS / "choose.md").read_text().split("<!-- table: starting values;")
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", table, re.M)
    assert len(rows) > 20
    for method, option, constructor, *columns in rows:
        default = options_of(method)[option]
        assert str(default) == constructor, f"{method}.{option}"
        for recipe, shown in zip(("digits-lt", "cifar10-lt", "cifar100-lt"), columns, strict=True):
            options = RECIPES[recipe]["options"]
            value = options.get(f"{method}.{option}", options.get(option, default))
            assert str(value) == shown, f"{method}.{option} in {recipe}"


# A page, or a part of the README, and the rows of a run that its figures are from.
COSTS = {
    "sam": ["SAM"],
    "focal_sam": ["Focal-SAM"],
    "imb_sam": ["ImbSAM"],
    "sse_sam": ["SSE-SAM, stage 1", "SSE-SAM, stage 2"],
    "cc_sam": ["CC-SAM, head", "CC-SAM, all"],
}


@pytest.mark.parametrize("name", [*COSTS, "README"])
def test_costs_are_those_of_the_run(name):
    """Of the one that plans.md shows."""
    plans = DOCS / "guides/plans.md"
    found = re.search(r"\((\S*whole-steps/report\.md)\)", plans.read_text().partition("## What it costs")[2])
    report = [
        line.split(" | ")
        for line in (plans.parent / found[1]).read_text().splitlines()
        if line.startswith("| small ViT | all")
    ]
    if name == "README":
        text, rows = re.search(r"\*\*`ImbSAM`\*\*:.*", PAGES[0].read_text())[0], ["ImbSAM"]
    else:
        text, rows = (DOCS / f"methods/{name}.md").read_text(), COSTS[name]
        text = re.search(r"^\| cost \|.* step takes (.*)\|$", text, re.M)[1]
    ratios = [float(one) for cells in report if cells[2] in rows for one in cells[5:7] if one != "-"]
    printed = re.findall(r"\d+(?:\.\d+)?", text)
    assert printed
    for figure in printed:
        assert figure in [f"{ratio:.{len(figure.partition('.')[2])}f}" for ratio in ratios], (
            f"{figure} is none of {ratios}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebooks_run(notebook, a_folder):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    content = nbformat.read(notebook, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in content.cells if cell.cell_type == "code")
    content.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbclient.NotebookClient(content, timeout=120, resources={"metadata": {"path": str(a_folder)}}).execute()


def test_the_docstrings_marks_become_markdown():
    griffe = pytest.importorskip("griffe")
    pytest.importorskip("latex2mathml")
    sys.path.insert(0, str(DOCS))
    try:
        from reference_text import ReferenceText, markdown
    finally:
        sys.path.remove(str(DOCS))
    text = "A :class:`~a.b.C` of ``x``.\n\n.. code-block:: text\n\n    w *= 2\n\nMore:\n\n>>> 1\n1\n"
    assert markdown(text) == (
        'A <autoref identifier="a.b.C" optional><code>C</code></autoref> of `x`.\n\n'
        "```text\nw *= 2\n```\n\nMore:\n\n```pycon\n>>> 1\n1\n```\n"
    )
    assert issubclass(ReferenceText, griffe.Extension)
