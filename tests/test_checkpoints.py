"""Checkpoints of other classes: the plain base optimizer's, the published wrappers', and what does not fit."""

from __future__ import annotations

import ast
import copy
import functools
import gzip
import io
import math
import pathlib
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

import ltsam_fast as lf
from ltsam_fast import compat
from ltsam_fast.optim import checkpoints

from .method_rows import BASES, EVERY, RHO, every
from .oracles import batches, flat, losses, network, relative_error


class Lion(torch.optim.Optimizer):
    """Somebody's optimizer, whose state is made by its first step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                if param.grad.norm() > 0:
                    param.sub_(group["lr"] * (0.9 * state["exp_avg"] + 0.1 * param.grad).sign())
                state["exp_avg"].lerp_(param.grad, 0.01)


KINDS = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "plain": (SGD, {"lr": 0.1}),
    "adam": (Adam, {"lr": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adagrad": (Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adadelta": (Adadelta, {"lr": 0.5}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "lion": (Lion, {"lr": 0.01}),
}
WITHIN = {
    "davda54": ("old_p",),
    "davda54, old": ("e_w",),
    "focal": ("grad", "old_p"),
    "imbsam": ("eps", "grad_normal"),
    "gsam": ("old_g", "e_w"),
    "wsam": ("grad", "e_w", "sharpness"),
}


def published(model, kind, options, within=("old_p",), rho=0.3, **more):
    """What a published wrapper saves: its options in the groups, what lives within a step in the state."""
    groups = kind(model.parameters(), **options).state_dict()["param_groups"]
    state = {i: {name: p.detach().clone() for name in within} for i, p in enumerate(model.parameters()) if within}
    return {"state": state, "param_groups": [{**group, "rho": rho, "adaptive": False, **more} for group in groups]}


def drive(opt, model, data):
    EVERY[type(opt).__name__].drive("closure", opt, model, data)


def everything(opt):
    """All that a failed load must leave."""
    tensors = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    return tensors, copy.deepcopy(opt.state_dict())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


PUBLISHED = [(name, kind) for name in EVERY for kind in ("momentum", "adamw")] + [("SAM", kind) for kind in KINDS]


@pytest.mark.parametrize(("name", "kind"), dict.fromkeys(PUBLISHED))
def test_published_checkpoint_is_taken(name, kind):
    """The radius counts, the rest of its state is dropped: steps are those of an optimizer made with it."""
    base, options = KINDS[kind]
    model, data = network(), batches(steps=4)
    opt = EVERY[name].make(model, base, **{**options, "rho": 0.05})
    drive(opt, model, data[:2])
    saved = published(model, base, {**options, "lr": 0.02})
    untouched = copy.deepcopy(saved)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    said = [str(one.message) for one in seen if "no state of" in str(one.message)]
    assert len(said) == (0 if kind == "plain" else 1)
    assert all(f"no state of {base.__name__}" in one and "\n" not in one for one in said)
    assert [seen[0].filename] == [__file__] if said else True
    assert same(saved, untouched)
    assert opt.param_groups[0]["rho"] == 0.3 and opt.param_groups[0]["lr"] == 0.02
    assert not any("old_p" in state for state in opt.state.values())
    assert opt.state is opt.base_optimizer.state and opt.param_groups is opt.base_optimizer.param_groups

    twin = copy.deepcopy(model)
    other = EVERY[name].make(twin, base, **{**options, "rho": 0.3, "lr": 0.02})
    counted = {name: value for name, value in opt.param_groups[0].items() if name in ("steps", "skipped_steps")}
    for group in other.param_groups:
        group.update(counted)
    for its, one in ((model, opt), (twin, other)):
        drive(one, its, data[2:])
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [*(("SAM", wrapper) for wrapper in WITHIN), *((name, "davda54") for name in EVERY if name != "SAM")],
)
def test_what_lives_within_a_step_is_dropped(name, wrapper):
    model = network()
    opt = EVERY[name].make(model, AdamW, lr=0.01)
    with pytest.warns(UserWarning, match="no state of AdamW"):
        opt.load_state_dict(published(model, AdamW, {"lr": 0.01}, WITHIN[wrapper]))
    assert not opt.state
    drive(opt, model, batches(steps=1))


@pytest.mark.parametrize("base", [*BASES])
@pytest.mark.parametrize("name", ["SAM", "FocalSAM"])
def test_goes_on_from_the_plain_optimizers_checkpoint(name, base):
    (kind, options), data, model = BASES[base], batches(steps=10), network()
    plain = kind(model.parameters(), **options)

    def run(data):
        for x, y in data:
            plain.zero_grad()
            losses(model, x, y).mean().backward()
            plain.step()

    run(data[:5])
    other, saved = copy.deepcopy(model), copy.deepcopy(plain.state_dict())
    run(data[5:])
    opt = EVERY[name].make(other, kind, **{**options, "lr": 77.0, "rho": 0.0})
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.0  # also for Adadelta, whose own rho is another thing
    assert opt.param_groups[0]["lr"] == options["lr"]
    drive(opt, other, data[5:])
    assert relative_error(flat(other), flat(model)) < 1e-12


@every
def test_a_plain_checkpoint_leaves_the_groups_own_options(name):
    row, model = EVERY[name], network()
    parts = [list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]]
    plain = SGD([{"params": part} for part in parts], lr=0.3)
    scaled = {"adaptive": True} if row.adaptive else {}
    groups = [{"params": parts[0], "perturb": False}, {"params": parts[1], "rho": 0.7, **scaled}]
    opt = row.make(model, SGD, groups, lr=0.1)
    opt.load_state_dict(plain.state_dict())
    assert [(g["lr"], g["perturb"], g["rho"], g["adaptive"]) for g in opt.param_groups] == [
        (0.3, False, RHO, False),
        (0.3, True, 0.7, row.adaptive),
    ]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_state_is_kept_where_it_is_there(kind):
    """Scripts that save ``optimizer.base_optimizer``, or whose wrapper shares the state."""
    base, options = KINDS[kind]
    model, data = network(), batches(steps=10)
    plain = base(model.parameters(), **options)
    for x, y in data[:5]:
        plain.zero_grad()
        losses(model, x, y).mean().backward()
        plain.step()
    saved = copy.deepcopy(plain.state_dict())
    for group in saved["param_groups"]:
        group |= {"rho": 0.0, "adaptive": False}
    for i, p in enumerate(model.parameters()):
        saved["state"].setdefault(i, {})["old_p"] = p.detach().clone()
    twin = copy.deepcopy(model)
    opt = lf.SAM(twin.parameters(), base, rho=0.5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
    drive(opt, twin, data[5:])
    for x, y in data[5:]:
        plain.zero_grad()
        losses(model, x, y).mean().backward()
        plain.step()
    assert relative_error(flat(twin), flat(model)) < 1e-9


def test_groups_their_radii_and_adaptive():
    model = network()
    parts = [{"params": list(model[0].parameters())}, {"params": [*model[2].parameters(), *model[4].parameters()]}]
    saved = published(model, SGD, {"lr": 0.1})
    ids = saved["param_groups"][0]["params"]
    group = saved["param_groups"][0]
    saved["param_groups"] = [{**group, "params": ids[:2]}, {**group, "params": ids[2:], "rho": 0.7, "adaptive": True}]
    opt = lf.SAM([{**parts[0], "perturb": False}, parts[1]], SGD, rho=0.05, lr=0.5)
    opt.load_state_dict(saved)
    assert [(g["rho"], g["adaptive"], g["perturb"], g["lr"]) for g in opt.param_groups] == [
        (0.3, False, False, 0.1),
        (0.7, True, True, 0.1),
    ]
    with pytest.raises(ValueError, match="adaptive must be False for GNM"):
        lf.GNM([{"params": p["params"]} for p in parts], SGD, lr=0.1).load_state_dict(saved)


def test_numbers_of_numpy():
    """Focal-SAM's linear schedule leaves np.float16 in the groups."""
    np = pytest.importorskip("numpy")
    model = network()
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1)
    opt.load_state_dict(published(model, SGD, {"lr": 0.1}, rho=np.float16(0.25), adaptive=np.bool_(False)))
    assert opt.param_groups[0]["rho"] == 0.25 and type(opt.param_groups[0]["rho"]) is float


def test_a_published_wrapper_that_took_no_step_is_no_loss():
    model = network()
    opt = lf.SAM(model.parameters(), AdamW, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(published(model, AdamW, {"lr": 0.1}, within=()))
    assert opt.param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("cls", [lf.FriendlySAM, compat.FriendlySAM])
def test_friendly_sams_mean_lives_on(cls):
    """F-SAM's class calls it ``momentum``."""
    model, (x, y) = network(), batches(steps=1)[0]
    saved = published(model, SGD, {"lr": 0.1}, ("old_p", "momentum"))
    opt = cls(model.parameters(), SGD, rho=0.05, sigma=1.0, lmbda=0.9, lr=0.1)
    opt.load_state_dict(saved)
    losses(model, x, y).mean().backward()
    expected = [0.9 * p.detach() + 0.1 * p.grad for p in model.parameters()]
    difference = flat([p.grad - p.detach() for p in model.parameters()])
    before = flat(model)
    opt.first_step(zero_grad=True)
    assert relative_error(flat(model) - before, 0.3 * difference / difference.norm()) < 1e-9
    assert relative_error(flat([opt.state[p]["grad_mean"] for p in model.parameters()]), flat(expected)) < 1e-12


BROKEN = {
    "groups": (
        lambda s: s["param_groups"].append({**s["param_groups"][0], "params": []}),
        ValueError,
        "parameter groups",
    ),
    "parameters": (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "match the size"),
    "no state": (lambda s: s.pop("state"), ValueError, "state_dict must have state and param_groups.*lacks .'state'"),
    "no groups": (lambda s: s.pop("param_groups"), ValueError, "state_dict must have.*lacks .'param_groups'"),
    "a key": (lambda s: s["state"][3].pop("exp_avg"), ValueError, r"state_dict must have all.*lacks \['exp_avg'\]"),
    "the step": (lambda s: s["state"][0].pop("step"), ValueError, r"state_dict must have all.*lacks \['step'\]"),
    "a shape": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 3)),
        ValueError,
        r"exp_avg of shape \(3, 3\) for a parameter of shape \(17, 6\)",
    ),
    "rho": (lambda s: s["param_groups"][0].update(rho=-1.0), ValueError, "rho must be a finite number >= 0, got -1"),
    "rho nan": (lambda s: s["param_groups"][0].update(rho=math.nan), ValueError, "rho must be a finite number"),
    "rho text": (
        lambda s: s["param_groups"][0].update(rho="1"),
        ValueError,
        "rho must be a finite number >= 0, got '1'",
    ),
}


FAILING = [("SAM", what, own) for what in BROKEN for own in (True, False) if not (own and what.startswith("rho"))]
FAILING += [
    (name, what, what != "rho nan") for name in EVERY if name != "SAM" for what in ("a key", "a shape", "rho nan")
]


@pytest.mark.parametrize(("name", "what", "own"), FAILING)
def test_a_load_that_fails_changes_nothing(name, what, own):
    """Present checkpoints and published ones with base state."""
    broken, error, message = BROKEN[what]
    model, data = network(), batches(steps=4)
    opt = EVERY[name].make(model, AdamW, lr=0.01)
    drive(opt, model, data[:2])
    saved = copy.deepcopy(opt.state_dict())
    if not own:
        for group in saved["param_groups"]:
            del group["perturb"]
    broken(saved)
    opt.param_groups[0]["rho"] = 0.07
    before = everything(opt)
    identities = [(id(one.state), id(one.param_groups)) for one in (opt, opt.base_optimizer)]
    with pytest.raises(error, match=message) as raised:
        opt.load_state_dict(saved)
    assert "\n" not in str(raised.value)
    assert same(everything(opt), before)
    assert identities == [(id(one.state), id(one.param_groups)) for one in (opt, opt.base_optimizer)]
    twin = copy.deepcopy((model, opt))
    for its, one in ((model, opt), twin):
        drive(one, its, data[2:])
    assert torch.equal(flat(model), flat(twin[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_loading_does_not_draw_or_call_hooks(kind):
    base, options = KINDS[kind]
    model, calls = network(), []
    opt = lf.SAM(model.parameters(), base, **options)
    opt.register_step_pre_hook(lambda *_: calls.append(0))
    torch.manual_seed(1)
    opt.load_state_dict(base(model.parameters(), **options).state_dict())
    number = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), number) and not calls


@pytest.mark.parametrize("name", ["SparseSAM", "FriendlySAM"])
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_a_first_parameter_that_has_buffers_of_the_method_only(name, base):
    """Copies and checkpoints of Adam look into the first parameter's state. This one is used at w only."""
    kind, options = BASES[base]
    options = {key: value for key, value in options.items() if key != "maximize"}
    model = nn.ModuleList([nn.Linear(4, 4).double(), network()])
    opt = EVERY[name].make(model, kind, **options)

    def loss(model, x, y):
        out = model[1](x)
        return losses(nn.Identity() if opt.is_perturbed else model[0], out, y)

    EVERY[name].drive("closure", opt, model, batches(steps=1), loss)
    assert [*opt.state[model[0].weight]] == ["grad_mean" if name == "FriendlySAM" else "mask"]
    copy.deepcopy((model, opt))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file))
    EVERY[name].drive("closure", opt, model, batches(steps=2), loss)


@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
@every
def test_the_base_may_load_a_checkpoint_by_itself(name, base):
    """As published scripts resume that wrap an optimizer: groups and state stay shared."""
    model, data = network(), batches(steps=6)
    opt = EVERY[name].make(model, base, lr=0.01)
    drive(opt, model, data[:3])
    saved, weights = copy.deepcopy(opt.base_optimizer.state_dict()), copy.deepcopy(model.state_dict())
    results = []
    for by_itself in (False, True):
        model.load_state_dict(weights)
        opt = EVERY[name].make(model, base, lr=0.01)
        if by_itself:
            opt.base_optimizer.load_state_dict(copy.deepcopy(saved))
        else:
            opt.load_state_dict(copy.deepcopy(saved))
        assert opt.param_groups is opt.base_optimizer.param_groups and opt.state is opt.base_optimizer.state
        opt.base_optimizer.param_groups[0]["lr"] = 0.005
        drive(opt, model, data[3:])
        results.append(flat(model))
    assert torch.equal(*results)


def test_a_copys_base_shares_too():
    model = network()
    opt = EVERY["SAM"].make(model, SGD, lr=0.01, momentum=0.9)
    drive(opt, model, batches(steps=1))
    other = copy.deepcopy(opt)
    other.base_optimizer.load_state_dict(copy.deepcopy(opt.base_optimizer.state_dict()))
    assert other.param_groups is other.base_optimizer.param_groups and other.state is other.base_optimizer.state
    assert opt.param_groups is not other.param_groups


def test_adadeltas_own_rho_is_loaded():
    model, twin, data = network(), network(), batches(steps=2)
    plain = torch.optim.Adadelta(twin.parameters(), lr=0.5, rho=0.8)
    opt = EVERY["SAM"].make(model, torch.optim.Adadelta, lr=0.5)
    opt.load_state_dict(plain.state_dict())
    opt.param_groups[0]["rho"] = 0.0
    for x, y in data:
        drive(opt, model, [(x, y)])
        plain.zero_grad()
        losses(twin, x, y).mean().backward()
        plain.step()
    assert torch.allclose(flat(model), flat(twin), rtol=0, atol=1e-12)


# --- versions


@every
def test_a_checkpoint_of_a_later_version_is_refused(name):
    model = network()
    opt = EVERY[name].make(model, SGD, lr=0.1, momentum=0.9)
    drive(opt, model, batches(steps=2))
    saved, before = opt.state_dict(), everything(opt)
    assert saved["version"] == checkpoints.VERSION
    with pytest.raises(ValueError, match=r"of format 9, of a later version of ltsam_fast; this one reads \d+: update"):
        opt.load_state_dict({**saved, "version": 9})
    assert same(everything(opt), before)
    del saved["version"]  # none had one at first
    opt.load_state_dict(saved)
    assert same(everything(opt), before)


@every
def test_the_base_optimizer_alone_takes_the_checkpoint(name):
    model = network()
    opt = EVERY[name].make(model, SGD, lr=0.1, momentum=0.9)
    drive(opt, model, batches(steps=2))
    plain = SGD(model.parameters(), lr=3.0)
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1 and [*plain.state_dict()] == ["state", "param_groups"]
    for param in model.parameters():
        assert same(plain.state[param]["momentum_buffer"], opt.state[param]["momentum_buffer"])


def test_files_are_read_without_running_code_in_them():
    """Wherever the package, its benchmarks and its guides load a file; ruff looks for pickle, marshal, eval and YAML."""
    root = pathlib.Path(lf.__file__).parents[1]
    if not (root / "docs").is_dir():
        pytest.skip("a wheel has no benchmarks and no guides")
    sources = [(path, path.read_text()) for folder in ("ltsam_fast", "bench") for path in (root / folder).rglob("*.py")]
    sources += [
        (path, "\n".join(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)))
        for path in (root / "docs").rglob("*.md")
    ]
    found = []
    for path, text in sources:
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load"):
                found.append(path)
                arguments = {one.arg: ast.unparse(one.value) for one in call.keywords}
                assert arguments.get("weights_only") == "True" and "allow_pickle" not in arguments, (path, call.lineno)
    assert {"run_checkpoint.py", "plain_loop.py", "start.md"} <= {path.name for path in found}


# --- version 0.1.0

_RENAMED = {"steps": "taken", "skipped_steps": "skipped", "asam_eta": "eta"}
_KEPT_THEN = ("rho", "adaptive", "norm_eps", "perturb", "lr_max", "lr_seen")


def as_of_0_1_0(opt):
    """A checkpoint as version 0.1.0 wrote it: most options were attributes and are not in it, some names were others."""
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        kept = {name: group[name] for name in _KEPT_THEN if name in group}
        kept |= {"eta": 0.0} | {old: group[new] for new, old in _RENAMED.items() if new in group}
        for name in {*opt.options, *_RENAMED}:
            group.pop(name, None)
        group.update({**{name: opt._base_only[name] for name in opt._base_only}, **kept})
    for entry in state["state"].values():
        if "mask" in entry:
            entry["frozen"] = entry.pop("mask")
    return state


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
@every
def test_a_checkpoint_of_version_0_1_0_goes_on(name, kind):
    base, options = {"sgd": (SGD, {"momentum": 0.9}), "adamw": (AdamW, {}), "rmsprop": (torch.optim.RMSprop, {})}[kind]
    model, data = network(), batches(steps=8)
    opt = EVERY[name].make(model, base, lr=0.05, **options)
    drive(opt, model, data[:4])
    twin = copy.deepcopy(model)
    old = as_of_0_1_0(opt)
    assert "steps" not in old["param_groups"][0]
    other = EVERY[name].make(twin, base, lr=1.0, **options)
    other.load_state_dict(old)
    for its, one in ((model, opt), (twin, other)):
        drive(one, its, data[4:])
    assert torch.equal(flat(model), flat(twin))


STORED = pathlib.Path(__file__).with_name("checkpoints")
"""Files of released versions, and of 0.1.0, with digits in their names; whatever comes later reads them."""
COUNTS_THEN = [40, 10, 3]
OPTIONS_THEN = {
    "FocalSAM": {"class_counts": COUNTS_THEN},
    "ImbSAM": {"class_counts": COUNTS_THEN, "eta": 20},
    "CCSAM": {"class_counts": COUNTS_THEN, "scope": "all"},
    "SSESAM": {"class_counts": COUNTS_THEN, "eta": 20, "switch_step": 2},
    "MSAM": {"m": 4},
    "GNM": {"seed": 7, "decay_every": 2},
    "SparseSAM": {"num_samples": 8, "refresh_every": 4},
    "LookSAM": {"k": 2},
    "ESAM": {"gamma": 0.5},
    "SAM": {"adaptive": True},
}
BASES_THEN = {"SGD": (SGD, {"momentum": 0.9, "weight_decay": 0.01}), "AdamW": (AdamW, {})}


@functools.cache
def stored_by_0_1_0():
    """Of each case the weights and the ``state_dict()`` after 3 steps, and the weights after 3 more, by version 0.1.0."""
    return torch.load(io.BytesIO(gzip.decompress((STORED / "0.1.0_optimizers.pt.gz").read_bytes())), weights_only=True)


def batch_then(step):
    x = (torch.arange(48, dtype=torch.float64) * (step + 1)).sin().view(12, 4)
    return x, (torch.arange(12) * (step + 2)) % 5 % 3


@pytest.mark.parametrize("case", sorted(stored_by_0_1_0()))
def test_a_file_of_version_0_1_0_goes_on(case):
    """What version 0.1.0 wrote, not what it is thought to have written."""
    saved, (name, base) = copy.deepcopy(stored_by_0_1_0()[case]), case.split()
    model, (kind, options) = nn.Linear(4, 3).double(), BASES_THEN[base]
    torch.nn.utils.vector_to_parameters(saved["weights"], model.parameters())
    cls = getattr(lf, {"MSAM": "MicroBatchSAM"}.get(name, name))
    opt = cls(model.parameters(), kind, model=model, lr=9.0, **OPTIONS_THEN.get(name, {}), **options)
    opt.load_state_dict(saved["optimizer"])
    assert (opt.rho, opt.param_groups[0]["steps"]) == (0.3, 3)
    for step in range(3, 6):
        x, y = batch_then(step)
        torch.manual_seed(step)
        opt.step(lambda i=slice(None), x=x, y=y: F.cross_entropy(model(x[i]), y[i], reduction="none"), targets=y)
    assert relative_error(flat(model), saved["later"]) < 1e-9
