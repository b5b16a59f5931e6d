"""The authors' own classes and ours, side by side in one script; and docs/equality.md, which says what is compared.

``LTSAM_PUBLISHED=FOLDER`` names a folder with the authors' files, which are not part of this package: their licences differ.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, AdamW

import ltsam_fast as lf
from ltsam_fast import compat, reference

from .method_rows import EVERY, imb_sam_step, tail_of
from .oracles import COUNTS, batches, flat, losses, network, relative_error

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "equality.md"
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
BASES = {"SGD": (SGD, BASE), "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1})}


def sam(found, kind, options, model):
    optimizer = (found.SAM if found else compat.SAM)(model.parameters(), kind, rho=0.1, **options)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        optimizer.first_step(zero_grad=True)
        losses(model, x, y).mean().backward()
        optimizer.second_step(zero_grad=True)


def asam(found, kind, options, model):
    optimizer = (found or compat).ASAM(kind(model.parameters(), **options), model, rho=0.5, eta=0.01)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        optimizer.ascent_step()
        losses(model, x, y).mean().backward()
        optimizer.descent_step()


def focal_sam(found, kind, options, model):
    """With the coefficients of the authors' training step."""
    optimizer = (found or lf).FocalSAM(model.parameters(), kind, rho=0.1, **options)
    counts = torch.tensor(COUNTS)
    for x, y in batches():
        focus = ((1 - counts / counts.sum()) ** 3.0 * 0.5)[y]
        loss = losses(model, x, y)
        (((1 - focus) * loss).sum() / len(y)).backward(retain_graph=True)
        optimizer.first_step()
        ((focus * loss).sum() / len(y)).backward()
        optimizer.second_step()
        ((focus * losses(model, x, y)).sum() / len(y)).backward()
        optimizer.third_step()


def imb_sam(found, kind, options, model):
    optimizer = (found or compat).ImbSAM(kind(model.parameters(), **options), model, rho=0.1)
    for x, y in batches():
        imb_sam_step(optimizer, model, x, y)


def sse_sam(found, kind, options, model):
    """Both stages: the head's radius is 0 from the third of five epochs on."""
    base = kind(model.parameters(), **options)
    optimizer = (found or compat).SSESAM(base, model, head_rho=0.1, tail_rho=0.2, gamma=0.4, total_epochs=5)
    data = batches()
    for epoch in range(5):
        for x, y in data[5 * epoch : 5 * epoch + 5]:
            tail = tail_of(y)
            for number, chosen in enumerate((~tail, tail)):
                (losses(model, x, y)[chosen].sum() / len(y)).backward()
                optimizer.compute_and_add_epsilon(n_i=number)
                (losses(model, x, y)[chosen].sum() / len(y)).backward()
                optimizer.compute_grad_sum_and_restore_p()
            optimizer.update()
        optimizer.update_rho()


def gnm(found, kind, options, model):
    """The authors' class gets our noise, and the name that its constructor calls itself by."""
    config = SimpleNamespace(dis_mul=0.5, loss=SimpleNamespace(GCL=SimpleNamespace(reweight_epoch=2)))
    if found:
        found.RSAM = found.GNM
    optimizer = (found or compat).GNM(config, model.parameters(), kind, rho=0.1, adaptive=False, **options)
    for step, (x, y) in enumerate(batches()):
        if found:
            drawn = [torch.zeros_like(param, requires_grad=False) for param in model.parameters()]
            reference.gaussian_perturb_(drawn, None, amplitude=1.0, step=step)
            optimizer.simpler = SimpleNamespace(sample=functools.partial(lambda noise, shape: next(noise), iter(drawn)))
        optimizer.first_step(step // 5, zero_grad=True)
        losses(model, x, y).mean().backward()
        optimizer.second_step(zero_grad=True)


SIDE_BY_SIDE = {
    "SAM": ("sam.py", sam),
    "ASAM": ("asam.py", asam),
    "FocalSAM": ("focal_sam.py", focal_sam),
    "ImbSAM": ("imbsam.py", imb_sam),
    "SSESAM": ("ssesam.py", sse_sam),
    "GNM": ("gnm.py", gnm),
}
"""Our class -> the authors' file, and the script."""


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_the_authors_class_and_ours_side_by_side(name, base):
    """25 steps in double precision with the same script: the weights are the same but for rounding."""
    file, script = SIDE_BY_SIDE[name]
    path = Path(os.environ.get("LTSAM_PUBLISHED", "")) / file
    if not os.environ.get("LTSAM_PUBLISHED") or not path.exists():
        pytest.skip("LTSAM_PUBLISHED names no folder with the authors' files")
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    weights = []
    for found in (published, None):
        model = network()
        script(found, *BASES[base], model)
        weights.append(flat(model))
    assert relative_error(flat(network()), weights[0]) > 1e-2
    assert relative_error(*weights) < 1e-14


def rows_of(section):
    """The rows of a section's table, without its head."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_lists_every_method():
    assert {re.match(r"`(\w+)`", row[0])[1] for row in rows_of("Formula")} == {row.method for row in EVERY.values()}
    assert [re.match(r"`(\w+)`", row[0])[1] for row in rows_of("The authors' classes, side by side")] == [*SIDE_BY_SIDE]
    named = {one for row in rows_of("The authors' scripts") for one in re.findall(r"`(\w+)`", row[0])}
    assert named == {
        name for name in compat.__all__ if isinstance(getattr(compat, name), type) and "Scheduler" not in name
    }


def test_the_page_names_tests_with_the_bounds_that_they_assert():
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"`(test_\w+\.py)::(test_\w+)`(?: \(< (1e-\d+)\))?", text)
    assert len(found) > 15
    for file, name, bound in found:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        functions = {one.name: one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"
        called = {one.id for one in ast.walk(functions[name]) if isinstance(one, ast.Name)} & functions.keys()
        bodies = [ast.get_source_segment(source, functions[one]) for one in (name, *called)]
        assert not bound or any(f"< {bound}" in body for body in bodies), f"{name} does not assert < {bound}"
