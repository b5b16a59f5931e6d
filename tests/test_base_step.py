"""Every optimizer of torch as the base of every method: made once, of the user's own parameters."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn, optim

import ltsam_fast as lf

from .method_rows import EVERY, closure_of, every
from .oracles import batches, flat, network, relative_error

REFUSED = ("LBFGS", "SparseAdam")
BASES = sorted(
    name
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and name not in (*REFUSED, "Optimizer")
)
MORE = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.9}, "Adadelta": {"lr": 0.5}}
MATRICES = ("Muon",)
"""Bases that take no other parameters."""
DATA = batches(steps=3)
needs_muon = pytest.mark.skipif("Muon" not in BASES, reason="this torch has no Muon")


def weights(model, matrices=True):
    """Two groups, of matrices only where that is asked for."""
    first, *others = [param for param in model.parameters() if param.dim() == 2 or not matrices]
    return [{"params": [first], "rho": 0.05, "lr": 0.02}, {"params": others}]


def made(name, base, model, params=None):
    """A method on one of torch's optimizers."""
    options = {"lr": 0.01, **MORE.get(base, {})}
    return EVERY[name].make(model, getattr(optim, base), params or weights(model, base in MATRICES), **options)


def listed(kind=optim.Optimizer):
    """All optimizers that this torch has, by whatever module: a new one is tried by itself."""
    found = {one.__name__ for one in kind.__subclasses__() if one.__module__.startswith("torch.optim")}
    return found.union(*map(listed, kind.__subclasses__()))


def test_every_optimizer_of_torch_is_tried():
    assert {*BASES, *REFUSED} == listed() and len(BASES) >= 12


@pytest.mark.parametrize("base", BASES)
@every
def test_steps_agree_with_the_oracle(name, base):
    row, kind, options = EVERY[name], getattr(optim, base), {"lr": 0.01, **MORE.get(base, {})}
    model, groups = network(), functools.partial(weights, matrices=base in MATRICES)
    start = flat(model)
    opt = made(name, base, model)
    row.drive("closure", opt, model, DATA)
    wanted = row.expected(kind, options, DATA, groups)[0]
    # Muon orthogonalizes in bfloat16, where a last bit may make a difference.
    assert relative_error(flat(model) - start, wanted - start) < (2e-2 if base == "Muon" else 1e-7)
    assert opt.base_optimizer.param_groups is opt.param_groups and len(opt.param_groups) == 2
    assert sum(len(group["params"]) for group in opt.param_groups) == (3 if base in MATRICES else 6)


@pytest.mark.parametrize("base", BASES)
@every
def test_runs_continue_bit_for_bit(name, base):
    """From a checkpoint, as a copy and from a pickle, in the middle of a run; the state is all that the base has."""
    row, model = EVERY[name], network()
    opt = made(name, base, model)
    row.drive("closure", opt, model, DATA[:2])
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    state, saved = torch.load(file, weights_only=True)
    loaded = network(seed=8)
    loaded.load_state_dict(state)
    resumed = made(name, base, loaded)
    resumed.load_state_dict(saved)
    runs = [(loaded, resumed), copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt))), (model, opt)]
    ends = []
    for one, its in runs:
        assert its.base_optimizer.state is its.state and len(its.state) == len(opt.state)
        ends.append(row.drive("closure", its, one, DATA[2:] + DATA))
    assert all(torch.equal(end, ends[-1]) for end in ends)
    torch.testing.assert_close(resumed.state_dict()["state"], opt.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["generator", "named", "named groups", "groups of generators", "list"])
@pytest.mark.parametrize("base", BASES)
def test_parameters_in_every_form(base, form):
    kind, ends = getattr(optim, base), []
    for wanted in ("list", form):
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()
        with torch.no_grad():
            for number, param in enumerate(model.parameters()):
                param.copy_(torch.linspace(-1, 1 + number, param.numel()).view_as(param))
        params = {
            "generator": lambda m=model: m.parameters(),
            "named": lambda m=model: m.named_parameters(),
            "named groups": lambda m=model: [{"params": m[i].named_parameters(f"{i}")} for i in (0, 2)],
            "groups of generators": lambda m=model: [{"params": m[i].parameters()} for i in (0, 2)],
            "list": lambda m=model: list(m.parameters()),
        }[wanted]()
        opt = lf.SAM(params, kind, rho=0.1, lr=0.01)
        for x, y in DATA:
            opt.step(closure_of(model, x, y))
        ends.append(flat(model))
        if wanted.startswith("named"):
            assert sum((group["param_names"] for group in opt.param_groups), []) == ["0.weight", "2.weight"]
            opt.load_state_dict(opt.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@every
def test_bases_that_cannot_step_with_gradients_alone_are_refused_by_name(name):
    class Wanting(optim.SGD):
        def step(self, closure):
            return super().step(closure)

    model = network()
    for groups in (None, [{"params": [param]} for param in model.parameters()]):
        for base, message in (
            (optim.LBFGS, "base_optimizer must step without a closure, which LBFGS needs: use"),
            (Wanting, "base_optimizer must step without a closure, which Wanting needs: use"),
            (optim.SparseAdam, "base_optimizer must not be SparseAdam, which needs sparse gradients: use"),
            (functools.partial(Wanting, momentum=0.9), "which Wanting needs"),
            (lambda params, **options: optim.SparseAdam(params, **options), "must not be SparseAdam"),
        ):
            with pytest.raises(ValueError, match=message):
                EVERY[name].make(model, base, groups, lr=0.1)
        for base in (optim.SGD(model.parameters(), lr=0.1), 3, nn.Linear, int):
            with pytest.raises(TypeError, match=r"base_optimizer must be a class such as torch\.optim\.SGD, got"):
                EVERY[name].make(model, base, groups)


def test_what_a_base_refuses_is_said_before_anything_changes():
    model = network()
    groups = [{"params": list(model.parameters()), "rho": 0.2}]
    for base, options, error, message in (
        *([(optim.Muon, {}, ValueError, "Muon only supports 2D parameters")] if "Muon" in BASES else []),
        (optim.SGD, {"lr": -1.0}, ValueError, "lr must be a finite number >= 0"),
        (optim.SGD, {"colour": 1}, TypeError, "colour"),
        (optim.SGD, {"lr": 0.1, "rho": -1.0}, None, ""),
        (optim.SGD, {"lr": 0.1, "max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
    ):
        if error is None:  # the group's own radius counts
            assert lf.SAM(groups, base, **options).param_groups[0]["rho"] == 0.2
            continue
        with pytest.raises(error, match=message):
            lf.SAM(groups, base, **options)
    assert list(groups[0]) == ["params", "rho"]


@every
@pytest.mark.parametrize("base", [optim.Adadelta, functools.partial(optim.Adadelta, rho=0.7)], ids=["0.9", "0.7"])
def test_options_of_one_name_do_not_meet(name, base):
    row, model = EVERY[name], network()
    opt = row.make(model, base, weights(model), lr=0.5)
    assert [group["rho"] for group in opt.param_groups] == [0.05, 0.1]
    found = row.drive("closure", opt, model, DATA)
    assert [group["rho"] for group in opt.param_groups] == [0.05, 0.1]
    assert relative_error(found, row.expected(base, {"lr": 0.5}, DATA, weights)[0]) < 1e-9


class WithoutRate(torch.optim.Optimizer):
    """A base whose groups have no learning rate."""

    def __init__(self, params):
        super().__init__(params, {"share": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["share"] * param.grad)


@every
def test_a_base_without_a_learning_rate(name):
    if name == "WSAM":
        with pytest.raises(ValueError, match="decouple must be False with WithoutRate, which has no learning rate"):
            EVERY[name].make(network(), WithoutRate)
    more = {"decouple": False} if name == "WSAM" else {}
    results = []
    for base, options in ((WithoutRate, {}), (torch.optim.SGD, {"lr": 0.1})):
        model = network()
        opt = EVERY[name].make(model, base, **options, **more)
        results.append(EVERY[name].drive("closure", opt, model, DATA))
    assert relative_error(*results) < 1e-12


@needs_muon
@every
def test_to_maximize_with_a_base_that_cannot_is_refused(name):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match="maximize must be left out: Muon only minimizes"):
        EVERY[name].make(None, torch.optim.Muon, [{"params": [weight], "maximize": True}], lr=0.01)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
        (optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
        (optim.Adam, {"lr": 0.01, "foreach": True}),
        (optim.AdamW, {"lr": 0.01, "fused": True}),
        (optim.Adam, {"lr": torch.tensor(0.01)}),
        (optim.RMSprop, {"lr": 0.01, "foreach": True}),
        (optim.Adagrad, {"lr": 0.01, "fused": True}),
        (functools.partial(optim.SGD, momentum=0.9), {"lr": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "WSAM"])
def test_takes_the_bases_options(name, base, options):
    plain = {key: float(value) for key, value in options.items() if key in ("lr", "momentum")}
    if isinstance(base, functools.partial):
        plain |= base.keywords
    results = []
    for kind, own in ((base, options), (getattr(base, "func", base), plain)):
        model = network()
        results.append(EVERY[name].drive("closure", EVERY[name].make(model, kind, **own), model, DATA))
    assert relative_error(*results) < 1e-6  # the learning rate's tensor is float32


@pytest.mark.parametrize("base", [optim.Adam, optim.AdamW])
@every
def test_how_weights_decay_where_groups_do_not_say(name, base):
    """As those of torch 2.6 do not."""
    results = []
    for drops in (False, True):
        model = network()
        opt = EVERY[name].make(model, base, lr=0.01, weight_decay=0.3)
        for group in opt.param_groups if drops else ():
            group.pop("decoupled_weight_decay", None)
        results.append(EVERY[name].drive("closure", opt, model, DATA))
    assert torch.equal(*results)


@every
def test_subclasses_of_a_fused_base_step_by_themselves(name):
    row = (
        EVERY[name].having(decouple=False) if name == "WSAM" else EVERY[name]
    )  # a step beside follows the group's rate

    class Halved(optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] /= 2
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 2

    results = []
    for base, lr in ((Halved, 0.2), (optim.SGD, 0.1)):
        model = network()
        results.append(row.drive("closure", row.make(model, base, lr=lr, momentum=0.9), model, DATA))
    assert relative_error(*results) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "scale", "max_norm", "lr", "bound"),
    [
        (torch.float64, 1000.1, 0.0, 0.1, 1e-13),  # 1 / 1000.1 in fp32 is another number
        (torch.float64, 1000.1, 0.01, 0.1, 1e-13),
        (torch.float32, 2.0**50, 1e-31, 1e30, 1e-5),  # the product of both factors is none
    ],
    ids=str,
)
@every
def test_unscales_and_clips_as_the_fused_bases_do(name, dtype, scale, max_norm, lr, bound):
    """One after the other, in the precision of the weights."""

    class ByItself(optim.SGD):
        pass

    ends = []
    for base in (optim.SGD, ByItself):
        model = network(dtype)
        opt = EVERY[name].make(model, base, lr=lr, max_grad_norm=max_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in batches(dtype, steps=1):
            EVERY[name].step("closure", opt, model, x, y, scaler=scaler)
        ends.append(flat(model) - flat(network(dtype)))
    assert ends[0].any() and relative_error(*ends) < bound


@pytest.mark.parametrize("max_norm", [0.0, 1e3])
def test_sums_of_sixteen_bits_are_unscaled_before_they_are_rounded(max_norm):
    """Each of two gradients is a number in fp16, their sum before it is unscaled is none."""

    class ByItself(optim.SGD):
        pass

    ends = []
    for base in (optim.SGD, ByItself):
        weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
        opt = lf.FocalSAM([weight], base, rho=0.0, class_weights=([1.0], [1.0]), lr=0.5, max_grad_norm=max_norm)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
        opt.step(lambda w=weight: (1.5 * w).float().mean()[None], targets=torch.zeros(1).long(), scaler=scaler)
        ends.append(weight.detach())
    assert torch.equal(*ends) and torch.equal(ends[0], torch.full((4,), 0.625, dtype=torch.float16))


@pytest.mark.parametrize(
    ("base", "options"),
    [(optim.SGD, {"lr": 0.1, "momentum": 0.9}), (optim.Adam, {"lr": 0.01}), (optim.RMSprop, {"lr": 0.01})],
)
def test_gradients_of_the_first_phase_alone(base, options):
    kept, perturbed = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    opt = lf.FocalSAM([kept, perturbed], base, rho=0.1, **options)
    kept.grad, twin = torch.arange(4.0), nn.Parameter(torch.ones(4))
    opt.first_step()
    perturbed.grad = torch.ones(3)
    opt.second_step()
    assert torch.equal(kept, torch.ones(4)) and not torch.equal(perturbed, torch.ones(3))
    opt.third_step()
    plain = base([twin], **options)
    twin.grad = torch.arange(4.0)
    plain.step()
    assert torch.allclose(kept, twin, rtol=1e-6)
    assert torch.equal(perturbed, torch.ones(3)) and perturbed not in opt.state
