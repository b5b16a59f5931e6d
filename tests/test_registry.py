"""Methods by name, and that trying another one is changing its name."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import ltsam_fast as lf
from ltsam_fast import models, optim
from ltsam_fast.optim import registry
from ltsam_fast.optim.registry import METHODS

from .method_rows import EVERY, closure_of, every
from .oracles import COUNTS, batches, flat, network

README = (Path(__file__).parents[1] / "README.md").read_text()
PRINTED = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "opt = lf.FocalSAM(" in block)
names = pytest.mark.parametrize("name", lf.list_methods())


def test_every_method_has_a_name_a_row_in_the_tests_and_is_exported():
    classes = {method.cls.__name__ for method in METHODS.values()}
    assert classes == EVERY.keys()
    assert classes == {*optim.__all__} - {"SharpnessAware", "create", "list_methods"}
    assert classes <= {*lf.__all__}
    assert all(f"| `{name}`" in README for name in classes)
    for name, method in METHODS.items():
        assert (method.name, getattr(lf, method.cls.__name__)) == (name, method.cls)
        assert name == "asam" or method.cls.__module__ == f"ltsam_fast.optim.methods.{name}"


def test_lists():
    assert lf.list_methods() == sorted(METHODS)
    assert lf.list_methods("sam") == ["sam"] and lf.list_methods("SAM") == []
    assert lf.list_methods("?sam") == ["asam", "esam", "gsam", "wsam"]
    assert lf.list_methods("[gw]*") == ["gnm", "gsam", "wsam"]
    assert {"sam", "focal_sam", "micro_batch_sam"} <= {*lf.list_methods("*sam*")}


@names
def test_created_by_name_it_is_the_class_s(name):
    method, ends = METHODS[name], []
    for made in (lambda *args, **options: lf.create(name, *args, **options), method.cls):
        model = network()
        fixed = method.options if made is method.cls else {}
        opt = made(model.parameters(), SGD, 0.1, class_counts=COUNTS, lr=0.1, momentum=0.9, model=model, **fixed)
        assert type(opt) is method.cls and opt.rho == 0.1 and opt.adaptive == (name == "asam")
        for x, y in batches(steps=2):
            opt.step(closure_of(model, x, y), targets=y)
        ends.append(flat(model))
    assert torch.equal(*ends) and not torch.equal(ends[0], flat(network()))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (
            ("focal-sam",),
            {},
            ValueError,
            "there is no method 'focal-sam': did you mean 'focal_sam'\\? There are asam, .*",
        ),
        (
            ("FocalSAM",),
            {},
            ValueError,
            "there is no method 'FocalSAM': did you mean 'focal_sam'\\? There are asam, .*",
        ),
        (("adam",), {}, ValueError, r"there is no method 'adam'.* There are asam, cc_sam, .*, wsam"),
        (("xyz",), {}, ValueError, r"there is no method 'xyz'\. There are asam, cc_sam, .*, wsam"),
        ((lf.SAM,), {}, ValueError, r"there is no method <class '.*SAM'>.* There are .*"),
        (("asam",), {"adaptive": False}, ValueError, "adaptive must be True for asam, got False"),
        (("sam",), {"rhoo": 1}, TypeError, r"SAM has no option 'rhoo': did you mean 'rho'\?.*"),
    ],
)
def test_what_cannot_be_created(args, options, error, message):
    with pytest.raises(error, match=f"^{message}$") as raised:
        lf.create(*args, network().parameters(), SGD, lr=0.1, **options)
    assert "\n" not in str(raised.value)
    with pytest.raises(
        TypeError, match=r"^base_optimizer must be given, .*: SAM\(params, torch\.optim\.SGD, lr=0\.1\)$"
    ):
        lf.create("sam", network().parameters(), lr=0.1)


def run(snippet, kind):
    """Weights before and after a printed snippet's steps."""
    torch.manual_seed(0)
    body = [nn.Linear(6, 8), nn.BatchNorm1d(8)] if kind == "mixing" else [nn.Linear(6, 8)]
    model = nn.Sequential(*body, nn.ReLU(), nn.Linear(8, 4))
    before = flat(model)
    loader = [(torch.randn(64, 6), torch.arange(64) % 4) for _ in range(3)]
    scope = {"model": model, "counts": [500, 90, 15, 4], "loader": loader}
    exec(compile(snippet, "README.md", "exec"), scope)
    return before, flat(model), scope


@names
@pytest.mark.parametrize("kind", ["plain", "mixing"])
def test_in_the_printed_snippet_another_method_is_another_name(name, kind):
    method = METHODS[name]
    by_class = run(PRINTED.replace("lf.FocalSAM(", f"lf.{method.cls.__name__}("), kind)
    by_name = run(PRINTED.replace("lf.FocalSAM(", f'lf.create("{name}", '), kind)
    for before, after, scope in (by_class, by_name):
        assert type(scope["opt"]) is method.cls and scope["opt"].param_groups[0]["steps"] == 3
        assert after.isfinite().all() and not torch.equal(before, after)
        assert scope["loss"].isfinite() and scope["opt"].class_counts == [500, 90, 15, 4]
    assert torch.equal(by_class[1], by_name[1]) == (name != "asam")


def test_a_method_of_one_s_own_has_a_name_too(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", {**METHODS})

    @registry.registered("half_sam", "half a SAM", rho=0.025)
    class HalfSAM(lf.SAM):
        pass

    assert lf.list_methods("half*") == ["half_sam"]
    assert lf.create("half_sam", network().parameters(), SGD, lr=0.1).rho == 0.025


@every
def test_a_checkpoint_without_class_counts_leaves_those_that_are_given(name):
    opt = EVERY[name].make(network(), SGD, lr=0.1, class_counts=COUNTS)
    opt.load_state_dict(lf.SAM(network().parameters(), SGD, lr=0.2).state_dict())
    assert opt.class_counts == COUNTS and opt.param_groups[0]["lr"] == 0.2


@every
def test_class_counts_are_taken_by_all_and_shown(name):
    ends = []
    for counts in ({}, {"class_counts": COUNTS}):
        model = network()
        opt = EVERY[name].make(model, SGD, lr=0.1, **counts)
        if counts or EVERY[name].told:
            assert "class_counts: [" in repr(opt)
            assert opt.state_dict()["param_groups"][0]["class_counts"] == opt.class_counts
        ends.append(EVERY[name].drive("closure", opt, model, batches(steps=3)))
    if not EVERY[name].told:
        assert torch.equal(*ends)


def test_the_head_of_cc_sam_is_the_model_s_last_linear_layer():
    ends = {}
    for given in ("module", "model", "none", "frozen"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        head = {"head": model[2]} if given == "module" else {}
        params = model[0].parameters() if given == "frozen" else model.parameters()
        opt = lf.CCSAM(params, SGD, class_counts=COUNTS[:4], noise_ratio=0.1, lr=0.1, **head)
        if given != "none":
            opt.model = model  # as trainers do
        everything = [*range(len(opt.all_params()[0]))]
        assert opt.perturbed_parameters() == ([2, 3] if given in ("module", "model") else everything)
        x, y = torch.randn(8, 6), torch.arange(8) % 4
        opt.step(closure_of(model, x, y), targets=y)
        ends[given] = flat(model)
    assert torch.equal(ends["module"], ends["model"]) and not torch.equal(ends["module"], ends["none"])
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters()}]
    assert lf.CCSAM(groups, SGD, class_counts=COUNTS, model=model, lr=0.1).perturbed_parameters() == [2, 3]
    assert models.classifier(model) is model[2]
