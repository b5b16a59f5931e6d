"""Options: declared once and kept everywhere. Any real number is one of Python's; what is none is refused by name."""

import copy
import inspect
import io
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import ltsam_fast as lf

from .method_rows import EVERY, closure_of, every
from .oracles import batches, flat, network
from .stubs import STUB, stub

GROUP = ("rho", "eta", "norm_eps")
COUNTED = (
    "k", "m", "refresh_every", "num_samples", "seed", "decay_every", "total_steps", "switch_step", "eta",
)  # fmt: skip
"""Options that count; the others are shares."""
NOT = ("self", "params", "base_optimizer", "class_counts", "class_weights", "model", "base_kwargs", "scope", "head", "mask",
       "granularity", "tail_classes", "adaptive", "decouple", "plan", "ascent_sync", "active", "rho_schedule", "renormalize",
       "direction")  # fmt: skip


def options():
    """Method and option, for all numbers in the constructors."""
    for name, row in EVERY.items():
        for option in inspect.signature(row.cls).parameters:
            if option not in NOT:
                yield name, option


def make(name, option, value):
    pair = {"rho_min": 0.1, "rho_max": 0.2} if option in ("rho_min", "rho_max") else {}
    pair |= {"total_steps": 9} if option == "loss_budget" else {}
    model = network()
    return EVERY[name].make(model, SGD, **{**pair, option: value, "lr": 0.1}), model


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_real_numbers_are_numbers(name, option):
    value, ends = 4 if option in COUNTED else 0.5, []
    kinds = (np.int64, np.int8, np.uint16) if option in COUNTED else (np.float32, np.float16, np.float64, Fraction)
    for kind in (type(value), *kinds):
        opt, model = make(name, option, kind(value))
        EVERY[name].drive("closure", opt, model, batches(steps=2))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file, weights_only=True))
        kept = opt.param_groups[0]["rho"] if option == "rho" else getattr(opt, option, value)
        assert type(kept) in (int, float) and kept == value
        ends.append(flat(model))
    assert all(torch.equal(one, ends[0]) for one in ends)


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_what_is_no_number_is_refused_by_name(name, option):
    for value in (True, False, np.True_, "0.5", Decimal("0.5"), 0.5j, float("nan"), torch.tensor(0.5), [1]):
        with pytest.raises(ValueError, match=f"^{option} must be .*, got"):
            make(name, option, value)


@pytest.mark.parametrize("option", [*GROUP, "lr_max"])
def test_options_of_groups(option):
    opt = lf.GSAM([nn.Parameter(torch.zeros(2))], SGD, rho_min=0.1, rho_max=0.2, lr=0.1)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], option: np.float32(0.5)})
    assert type(opt.param_groups[1][option]) is float
    for value in (True, "a", torch.tensor(0.5)):
        with pytest.raises(ValueError, match=f"{option} must be"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], option: value})
    assert len(opt.param_groups) == 2


# --- options are declared once, and are everywhere

OTHERS = {
    "rho": 0.3, "adaptive": True, "max_grad_norm": 2.5, "ascent_sync": True, "eta": 0.25, "asam_eta": 0.25, "norm_eps": 1e-5,
    "perturb": False, "plan": "require", "class_counts": [7.0, 5.0, 3.0, 2.0], "class_weights": None,
    "gamma": 0.75, "lam": 0.25, "tail_classes": [1, 3],
    "tail_weight": 2.0, "tail_rho": 0.4, "switch_step": 6, "scope": "all", "head": None,
    "noise_ratio": 1e-3, "flat_ratio": 0.25, "dis_mul": 0.3, "clip": 0.5, "decay_every": 4, "seed": 9, "sigma": 0.4,
    "lmbda": 0.3, "m": 3, "sparsity": 0.8, "mask": "dynamic", "refresh_every": 5, "drop_rate": 0.1, "total_steps": 50,
    "num_samples": 3,
    "beta": 0.8, "granularity": "tensor", "k": 2, "alpha": 0.9, "rho_min": 0.1, "rho_max": 0.5, "lr_min": 0.01, "lr_max": 0.4,
    "lr_seen": 0.2, "decouple": False, "theta": 0.8, "active": 0.25, "rho_schedule": "quadratic", "loss_budget": 0.7,
    "decay": 0.6, "unified_lambda": 0.4,
    "renormalize": True, "direction": "last_gradient",
}  # fmt: skip
"""Another value for each option than the default and the tests' own."""


def others_of(name):
    """Options of a method, all with another value, as keywords and as a group's entries."""
    options = EVERY[name].cls.options
    chosen = {option: OTHERS[option] for option in options}
    chosen["eta"] = 3 if name in ("ImbSAM", "SSESAM") else OTHERS["eta"]
    if name in ("CCSAM", "GNM"):
        chosen["adaptive"] = False
    if name == "GSAM":
        chosen["rho_schedule"] = "constant"
    if name == "SAM":
        chosen["unified_lambda"] = 1.0  # not with a budget
    return {n: v for n, v in chosen.items() if options[n].keyword}, {
        n: v for n, v in chosen.items() if not options[n].keyword
    }


def with_others(name):
    keywords, entries = others_of(name)
    model = network()
    head = {"head": model[4]} if name == "CCSAM" else {}
    groups = [{"params": list(model.parameters()), **entries}]
    return EVERY[name].cls(groups, SGD, **{**keywords, **head}, model=model, lr=0.1), model


@every
def test_options_survive_checkpoints_copies_and_pickles(name):
    opt, _ = with_others(name)
    keywords, entries = others_of(name)
    wanted = {**keywords, **entries}
    if name == "CCSAM":
        wanted["head"] = [[0, 4], [0, 5]]
    model = network()
    loaded = EVERY[name].make(model, SGD, lr=0.2, model=model)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one in (opt, loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for option, value in wanted.items():
            assert one.param_groups[0][option] == value and getattr(one, option) == value, option
            assert f"{option}: " in repr(one)
    late = {"params": [nn.Parameter(torch.zeros(2))]}
    loaded.add_param_group(late)
    whole = {option: value for option, value in wanted.items() if not loaded.options[option].per_group}
    assert {option: loaded.param_groups[1][option] for option in whole} == whole


@every
def test_options_are_in_the_signature_the_defaults_and_the_docstring(name):
    cls = EVERY[name].cls
    parameters = inspect.signature(cls).parameters
    opt = EVERY[name].make(network(), SGD, lr=0.1)
    for option, declared in cls.options.items():
        assert option in opt.defaults and option in opt.param_groups[0]
        assert (option in parameters) == declared.keyword
        if declared.keyword:
            assert parameters[option].default == declared.default
            assert f"{option}: {declared.doc}"[:40] in " ".join(cls.__doc__.split())
    assert [*parameters][:4] == ["params", "base_optimizer", "rho", "adaptive"] and "model" in parameters
    assert [*parameters][-1] == "base_kwargs"


@every
def test_an_attribute_sets_the_option_of_all_groups_and_checks_it(name):
    model = network()
    halves = [{"params": list(model[0].parameters())}, {"params": list(model[2:].parameters())}]
    opt = EVERY[name].make(model, SGD, halves, lr=0.1)
    opt.rho = np.float32(0.5)
    assert [(group["rho"], type(group["rho"])) for group in opt.param_groups] == [(0.5, float)] * 2
    with pytest.raises(ValueError, match=r"max_grad_norm must be a finite number >= 0, got -1"):
        opt.max_grad_norm = -1
    opt.param_groups[1]["max_grad_norm"] = 3.0
    (x, y), *_ = batches(steps=1)
    with pytest.raises(ValueError, match=r"max_grad_norm must be the same in all groups, got \[0\.0, 3\.0\]"):
        opt.step(closure_of(model, x, y), targets=y)


def test_two_groups_may_have_numbers_of_their_own_while_the_method_has_one():
    model = network()
    with pytest.raises(ValueError, match=r"gamma must be the same in all groups, got \[2\.0, 1\.0\]"):
        halves = [{"params": list(model[0].parameters()), "gamma": 2.0}, {"params": list(model[2:].parameters())}]
        opt = lf.FocalSAM(halves, SGD, class_counts=[4, 3, 2, 1], lr=0.1)
        (x, y), *_ = batches(steps=1)
        opt.step(closure_of(model, x, y), targets=y)


def test_class_weights_follow_the_options():
    opt = lf.FocalSAM(network().parameters(), SGD, class_counts=[40, 9, 3, 1], gamma=2.0, lr=0.1)
    before = opt.sharp_weights
    opt.gamma = 3.0
    assert not torch.equal(opt.sharp_weights, before)
    opt.class_counts = [1, 3, 9, 40]
    assert torch.equal(opt.sharp_weights, lf.ops.focal_weights([1, 3, 9, 40], 3.0, 0.5))


@pytest.mark.parametrize("value", ["no", "False", 2, None, torch.tensor([1, 2])], ids=str)
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ValueError, match="decouple must be True or False, got"):
        lf.WSAM(network().parameters(), SGD, lr=0.1, decouple=value)
    opt = lf.WSAM(network().parameters(), SGD, lr=0.1, decouple=np.False_)
    assert opt.decouple is False


WENT_BAD = [
    ("WSAM", "gamma", 1.0, r"gamma must be a number in \[0, 1\), got 1\.0"),
    ("ESAM", "beta", 0, r"beta must be a number in \(0, 1\], got 0"),
    ("LookSAM", "k", 0, "k must be an integer >= 1, got 0"),
    ("MicroBatchSAM", "m", 0, "m must be an integer >= 1, got 0"),
    ("CCSAM", "class_counts", None, "class_counts must be given for CCSAM"),
    ("GNM", "adaptive", True, "adaptive must be False for GNM"),
    ("SparseSAM", "mask", "foo", "mask must be one of 'fisher', 'dynamic', got 'foo'"),
    ("GSAM", "rho_max", 0.1, "rho_min and rho_max must both be given, or neither, got None and 0.1"),
]


@pytest.mark.parametrize(("name", "option", "value", "message"), WENT_BAD)
def test_an_option_that_goes_bad_is_refused_wherever_it_is_set(name, option, value, message):
    model = network()
    opt = EVERY[name].make(model, SGD, lr=0.1)
    before = opt.param_groups[0][option]
    with pytest.raises(ValueError, match=message):
        setattr(opt, option, value)
    assert opt.param_groups[0][option] == before
    state = opt.state_dict()
    opt.param_groups[0][option] = value
    (x, y), *_ = batches(steps=1)
    start = flat(model)
    with pytest.raises(ValueError, match=message):
        opt.step(closure_of(model, x, y), targets=y)
    opt.param_groups[0][option] = before
    state["param_groups"][0][option] = value
    if option != "class_counts":  # a checkpoint without them leaves those that are there
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    assert torch.equal(flat(model), start)
    opt.step(closure_of(model, x, y), targets=y)


def test_class_counts_may_be_changed_in_place():
    opt = lf.FocalSAM(network().parameters(), SGD, class_counts=[40, 9, 3, 1], lr=0.1)
    before = opt.sharp_weights
    opt.class_counts[0] = 1.0
    assert not torch.equal(opt.sharp_weights, before)


def test_editors_know_the_constructors():
    assert STUB.read_text() == stub(), "python -m tests.stubs"


@every
def test_a_misspelt_key_of_a_group_is_answered(name):
    """Torch's groups take any key, so that an option with a wrong letter would be without effect."""
    model = network()
    opt = EVERY[name].make(model, SGD, lr=0.1)
    for option in {*opt.options, "momentum", "weight_decay"}:
        if len(option) > 2:
            group = {"params": [nn.Parameter(torch.zeros(2))], f"{option}s": 0.5}
            with pytest.raises(ValueError, match=f"^a group has no option '{option}s': did you mean '{option}'"):
                opt.add_param_group(group)
    assert len(opt.param_groups) == len(EVERY[name].make(network(), SGD, lr=0.1).param_groups)
    opt.add_param_group(
        {"params": [nn.Parameter(torch.zeros(2))], "name": "more", "lr_scale": 0.5, "max_momentum": 0.9}
    )
    assert opt.param_groups[-1]["lr_scale"] == 0.5
