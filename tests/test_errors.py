"""Bad input: an error that names the argument, its value and what is accepted, and nothing has changed."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop

import ltsam_fast as lf

from .method_rows import EVERY, closure_of, every, phased, step_in_phases
from .oracles import CLASSES, COUNTS, batches, flat, losses, network

NAN, INF = float("nan"), float("inf")
NUMBER = "must be a finite number >= 0"

# (method, keywords of the constructor, error, what its message says)
CONSTRUCTORS = [
    *[(name, {"rho": -0.1}, ValueError, f"rho {NUMBER}") for name in EVERY if name != "MomentumSAM"],
    *[("SAM", {"rho": rho}, ValueError, f"rho {NUMBER}.*got {re.escape(repr(rho))}") for rho in (NAN, INF, None, "1")],
    *[("SAM", {"max_grad_norm": n}, ValueError, f"max_grad_norm {NUMBER}.*{n}") for n in (-1.0, NAN, INF, None, "1")],
    *[(name, {"model": 3}, TypeError, r"model must be a torch\.nn\.Module or None, got 3") for name in EVERY],
    *[(name, {"class_counts": [-1, 2]}, ValueError, "class_counts must be") for name in EVERY],
    ("SAM", {"lr": -1.0}, ValueError, f"lr {NUMBER}, got -1.0"),
    *[
        ("FocalSAM", {"class_counts": counts}, ValueError, "class_counts must be")
        for counts in ([], [-1, 2], [0, 0], [NAN, 1], [INF, 1], "abc", ["a", "b"], [[1, 2]], 3, {"a": 1}, object())
    ],
    *[("FocalSAM", {"gamma": gamma}, ValueError, f"gamma {NUMBER}, got {gamma}") for gamma in (-1.0, NAN, INF)],
    *[("FocalSAM", {"lam": lam}, ValueError, f"lam {NUMBER}, got {lam}") for lam in (-1.0, NAN, INF)],
    ("FocalSAM", {"gamma": NAN, "class_counts": None}, ValueError, "gamma"),
    ("ImbSAM", {"eta": -1}, ValueError, "eta"),
    ("ImbSAM", {"tail_classes": [4]}, ValueError, "tail_classes"),
    ("ImbSAM", {"tail_weight": NAN}, ValueError, "tail_weight"),
    ("SSESAM", {"tail_rho": -0.1}, ValueError, "tail_rho"),
    ("SSESAM", {"switch_step": -1}, ValueError, "switch_step"),
    ("CCSAM", {"class_counts": [0, 0]}, ValueError, "class_counts"),
    ("CCSAM", {"scope": "body"}, ValueError, "scope"),
    ("CCSAM", {"flat_ratio": 1.5}, ValueError, "flat_ratio"),
    ("CCSAM", {"head": [torch.ones(2)]}, ValueError, "head"),
    ("CCSAM", {"adaptive": True}, ValueError, "adaptive"),
    ("GNM", {"dis_mul": -1}, ValueError, "dis_mul"),
    ("GNM", {"decay_every": 0}, ValueError, "decay_every"),
    ("GNM", {"seed": -1}, ValueError, "seed"),
    ("GNM", {"adaptive": True}, ValueError, "adaptive"),
    ("FriendlySAM", {"lmbda": 1.0}, ValueError, "lmbda"),
    ("FriendlySAM", {"sigma": INF}, ValueError, "sigma"),
    ("MicroBatchSAM", {"m": 0}, ValueError, "m must"),
    ("SparseSAM", {"sparsity": 1.0}, ValueError, "sparsity"),
    ("SparseSAM", {"mask": "random"}, ValueError, "mask"),
    ("ESAM", {"beta": 0.0}, ValueError, "beta"),
    ("ESAM", {"gamma": 1.1}, ValueError, "gamma"),
    ("ESAM", {"granularity": "layer"}, ValueError, "granularity"),
    ("LookSAM", {"k": 0}, ValueError, "k must"),
    ("GSAM", {"rho_min": 0.1, "rho_max": None}, ValueError, "rho_max"),
    ("WSAM", {"gamma": 1.0}, ValueError, "gamma"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), CONSTRUCTORS, ids=lambda value: str(value)[:40])
def test_constructor(name, options, error, message):
    model = network()
    before = flat(model)
    with pytest.raises(error, match=message):
        EVERY[name].make(model, SGD, **{"lr": 0.1, **options})
    assert torch.equal(flat(model), before)


@every
def test_options_that_nobody_has(name):
    """One line of this package's, not SGD.__init__()'s, before anything changes."""
    model = network()
    before, own = flat(model), [option for option, one in EVERY[name].cls.options.items() if one.keyword]
    listed = rf" It takes {', '.join(own)}, model; SGD takes lr, momentum, .*fused$"
    for base, options, message in (
        (SGD, {"momnetum": 0.9}, rf"{name} has no option 'momnetum': did you mean 'momentum'\?{listed}"),
        (SGD, {"Rhoo": 0.9}, rf"{name} has no option 'Rhoo': did you mean 'rho'\?{listed}"),
        (SGD, {"maxgradnorm": 0.9}, rf"{name} has no option 'maxgradnorm': did you mean 'max_grad_norm'\?{listed}"),
        (SGD, {"colour": 1}, rf"{name} has no option 'colour'\.{listed}"),
        (SGD, {"perturb": False}, rf"perturb is an option of parameter groups, not of {name}: {{'params': "),
        (Adam, {"momentum": 0.9}, rf"{name} has no option 'momentum'.*; Adam takes lr, betas"),
        (functools.partial(SGD, lr=0.1), {"colour": 1}, rf"{name} has no option 'colour'.*; base_optimizer takes lr"),
        (None, {"lr": 0.1}, rf"base_optimizer must be given, .*: {name}\(params, torch\.optim\.SGD, lr=0\.1\)"),
    ):
        with pytest.raises(TypeError, match=f"^{message}") as raised:
            EVERY[name].make(model, base, **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match=r"^base_optimizer must be given"):
        EVERY[name].cls(model.parameters(), lr=0.1)
    assert torch.equal(flat(model), before)


def test_a_base_with_options_of_any_name_answers_for_itself():
    class Colourful(SGD):
        def __init__(self, params, lr=0.1, **options):
            self.colour = options.pop("colour", None)
            super().__init__(params, lr, **options)

    assert lf.SAM(network().parameters(), Colourful, colour="red").base_optimizer.colour == "red"
    with pytest.raises(TypeError, match="shape"):
        lf.SAM(network().parameters(), Colourful, shape="round")


PARAMETERS = [
    ([], ValueError, "empty parameter list"),
    (torch.zeros(3, requires_grad=True), TypeError, "params"),
    ([3], TypeError, "can only optimize Tensors"),
    ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
    ([{"params": [torch.zeros(2)], "rho": -INF}], ValueError, "rho must be a finite number.*, got -inf"),
    ([{"params": [torch.zeros(2)], "eta": NAN}], ValueError, f"eta {NUMBER}, got nan"),
    ([{"params": [torch.zeros(2)], "norm_eps": -1e-12}], ValueError, f"norm_eps {NUMBER}, got -1e-12"),
    ([{"params": [torch.zeros(2)]}, {"rho": 0.1}], ValueError, r"params\[1\] must have 'params'"),
]


@every
def test_parameters(name):
    for params, error, message in PARAMETERS:
        with pytest.raises(error, match=message):
            EVERY[name].make(None, SGD, params, lr=0.1)


@every
def test_a_bad_group_is_not_added(name):
    model = network()
    opt = EVERY[name].make(model, SGD, list(model[0].parameters()), lr=0.1)
    for bad in ({"rho": -INF}, {"rho": "x"}, {"eta": INF}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a finite number"):
            opt.add_param_group({"params": list(model[2].parameters()), **bad})
        assert len(opt.param_groups) == len(opt.base_optimizer.param_groups) == 1
    opt.add_param_group({"params": list(model[2].parameters())})
    EVERY[name].drive("closure", opt, model, batches(steps=1))


# --- what step() is given


def given(targets_of=lambda y: y, **returned):
    """step() with a closure that returns something else than the losses: ``returned["of"]`` of them."""
    of = returned.get("of", lambda found: found)
    return lambda opt, model, x, y: opt.step(
        lambda i=slice(None): of(losses(model, x[i], y[i])), targets=targets_of(y)
    )  # fmt: skip


def fewer_losses(opt, model, x, y):
    """A closure that returns fewer losses when it is called again."""
    calls = []

    def closure(i=slice(None)):
        calls.append(1)
        found = losses(model, x[i], y[i])
        return found if len(calls) == 1 else found[:-1]

    return opt.step(closure, targets=y)


EVERYBODY, TOLD = tuple(EVERY), tuple(name for name, row in EVERY.items() if row.told)
SHAPE = r"closure must return the per-sample losses, shape \(B,\), got "
TARGETS = "targets must be a 1-D integer tensor of 16 labels, one per sample, got "
# What is wrong: (methods, what is called with opt, model, x, y, what the error's message says)
CALLS = {
    "no closure": (EVERYBODY, lambda o, m, x, y: o.step(targets=y), "closure must be given"),
    "closure None": (("SAM",), lambda o, m, x, y: o.step(None, y), "closure must be given"),
    "closure 3": (("SAM",), lambda o, m, x, y: o.step(3, y), "closure must be given"),
    "no closures": (EVERYBODY, lambda o, m, x, y: o.step([], []), "closure must be given"),
    "a loss": (("SAM",), lambda o, m, x, y: o.step(losses(m, x, y), y), "closure must be given"),
    "scalar": (EVERYBODY, given(of=torch.mean), SHAPE + r"\(\)"),
    "2-D": (EVERYBODY, given(of=lambda found: found[:, None]), SHAPE + r"\(\d+, 1\)"),
    "int": (("SAM",), given(of=lambda found: 3), SHAPE + "int"),
    "None": (EVERYBODY, given(of=lambda found: None), SHAPE + "NoneType"),
    "tuple": (("SAM",), given(of=lambda found: (found, found)), SHAPE + "tuple"),
    "no samples": (("SAM", "FocalSAM"), given(lambda y: y[:0], of=lambda found: found[:0]), "skip it, or"),
    "detached": (EVERYBODY, given(of=torch.detach), "got a detached tensor"),
    "fewer losses": (
        tuple(name for name, row in EVERY.items() if not row.once),
        fewer_losses,
        r"(\d+ losses|\d+ entries).*(\d+ before|\d+ losses|\d+ samples)",
    ),
    "targets missing": (TOLD, given(lambda y: None), "targets must be given"),
    "too few targets": (
        EVERYBODY,
        lambda o, m, x, y: o.step([closure_of(m, x, y)] * 2, [y]),
        "targets has 1 entries, but there are 2 closures",
    ),
    "short targets": (TOLD, given(lambda y: y[:9]), "targets has 9 entries, but closure returned 16 losses"),
    "float targets": (TOLD, given(lambda y: y.double()), TARGETS),
    "2-D targets": (TOLD, given(lambda y: y[:, None]), TARGETS),
    "targets 'ab'": (TOLD, given(lambda y: "ab"), "targets must be.*ab"),
    "high target": (
        TOLD,
        given(lambda y: torch.where(y == y[3], CLASSES, y)),
        rf"targets must lie in \[0, {CLASSES}\), got .*{CLASSES}",
    ),
    "negative target": (
        TOLD,
        given(lambda y: torch.where(y == y[3], -100, y)),
        rf"targets must lie in \[0, {CLASSES}\), got -100",
    ),
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for what in CALLS for name in CALLS[what][0]])
def test_a_wrong_call_changes_nothing(name, what):
    _, call, message = CALLS[what]
    row, data = EVERY[name], batches(steps=5)
    model, other = network(), network()
    opt = row.make(model, lr=0.1, momentum=0.9)
    wanted = row.drive("closure", row.make(other, lr=0.1, momentum=0.9), other, data)
    before = row.drive("closure", opt, model, data[:3])
    with pytest.raises(ValueError, match=message):
        call(opt, model, *data[3])
    assert torch.equal(flat(model), before)
    after = row.drive("closure", opt, model, data[3:])
    if what != "fewer losses" or not row.averages:
        assert torch.equal(after, wanted), "state has changed"


# --- phases


@phased
def test_phases_out_of_order(name):
    """Whatever is called out of turn raises, and the phases go on as if it had not been called."""
    row, data = EVERY[name].of("phases"), batches(steps=2)
    model, other = network(), network()
    opt = row.make(model, lr=0.1, momentum=0.9)
    wanted = row.drive("phases", row.make(other, lr=0.1, momentum=0.9), other, data)
    phases = {phase: getattr(opt, phase) for phase in opt.phases}

    def in_turn(phase):
        def call(*args, **named):
            before = flat(model)
            for wrong in phases.keys() - {phase}:
                with pytest.raises(ValueError, match=rf"{wrong}\(\) was called where {phase}\(\) is next.*restore\(\)"):
                    phases[wrong]()
            if phase != opt.phases[0]:
                with pytest.raises(ValueError, match=rf"step\(\) was called where {phase}\(\) is next.*restore\(\)"):
                    opt.step(closure_of(model, *data[0]), data[0][1])
            assert torch.equal(flat(model), before)
            return phases[phase](*args, **named)

        return call

    for phase in phases:
        setattr(opt, phase, in_turn(phase))
    assert torch.equal(row.drive("phases", opt, model, data), wanted)


def test_a_phase_without_gradients():
    model = network()
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1)
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.first_step()
    with pytest.raises(ValueError, match=r"no parameter has a gradient"):
        opt.second_step()
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.second_step()  # the kept gradients and the order were not lost
    opt.third_step()


@pytest.mark.parametrize("name", TOLD)
def test_without_class_counts(name):
    model, (x, y) = network(), batches(steps=1)[0]
    options = {key: value for key, value in EVERY[name].options.items() if key != "class_counts"}
    if name == "CCSAM":
        with pytest.raises((TypeError, ValueError), match="class_counts"):
            lf.CCSAM(model.parameters(), SGD, lr=0.1, **options)
        return
    opt = EVERY[name].cls(model.parameters(), SGD, lr=0.1, **options)
    with pytest.raises(ValueError, match=r"class_counts must be given to the constructor for step\(closure, targets\)"):
        opt.step(closure_of(model, x, y), targets=y)


# --- what cannot be computed with


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3, sparse=True)
        self.head = nn.Linear(3, CLASSES)

    def losses(self, y):
        return nn.functional.cross_entropy(self.head(self.embedding(y)), y, reduction="none")


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(CLASSES, dtype=torch.complex64))

    def losses(self, y):
        return (self.w[y].abs() - 3).square()


class Meta(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(CLASSES, device="meta"))

    def losses(self, y):
        return torch.zeros(len(y))


UNSUPPORTED = {
    "sparse": (Embedded, ValueError, r"grads\[0\] is sparse .*only dense tensors are supported"),
    "complex": (
        Complex,
        TypeError,
        r"\[0\] has dtype torch.complex64: accepted are float32, float64, bfloat16, float16",
    ),
    "meta": (Meta, ValueError, r"\[0\] is on device meta: move it to cpu or cuda"),
}


@pytest.mark.parametrize(("base", "perturb"), [(SGD, True), (Adam, False)])
@pytest.mark.parametrize(
    ("name", "interface", "kind"),
    [
        (name, interface, kind)
        for kind in UNSUPPORTED
        for name, interface in (*((name, "closure") for name in EVERY), ("SAM", "phases"), ("FocalSAM", "phases"))
        if kind != "meta" or not (EVERY[name].averages or name == "SparseSAM")  # there torch itself refuses
    ],
)
def test_tensors_that_are_not_supported(name, interface, kind, base, perturb):
    """Also where only the base step would meet them, with the other weights perturbed by then."""
    make, error, message = UNSUPPORTED[kind]
    model, y = make(), torch.tensor([0, 1, 2, 3])
    head = nn.Linear(2, 1)
    x = torch.randn(4, 2)
    groups = [{"params": list(model.parameters()), "perturb": perturb}, {"params": list(head.parameters())}]
    opt = EVERY[name].make(model, base, groups, lr=0.1)
    everything = [*model.parameters(), *head.parameters()]
    before = [p.detach().clone() for p in everything]

    def closure(i=slice(None)):
        found = (model.losses(y) + head(x)[:, 0].square())[i]
        if found.requires_grad:
            found.register_hook(lambda _: fill())
        return found

    def fill():  # no backward() reaches the meta device by itself
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.is_meta else p.grad

    with pytest.raises(error, match=message):
        step_in_phases(opt, closure) if interface == "phases" else opt.step(closure, targets=y)
    assert all(p.is_meta or torch.equal(p, old) for p, old in zip(everything, before, strict=True))
    kept = [state[key] for state in opt.state.values() for key in ("momentum_buffer", "exp_avg") if key in state]
    assert not any(buffer.any() for buffer in kept if not buffer.is_meta)


@every
def test_a_group_option_that_went_bad(name):
    row = EVERY[name]
    for option in ("lr", *(["rho"] if name != "CCSAM" else []), *(["eta"] if row.adaptive else [])):
        for bad in (-INF if name == "MomentumSAM" else -1.0, NAN, INF):
            model = network()
            opt = row.make(model, lr=0.1)
            opt.param_groups[0][option] = bad
            before = flat(model)
            with pytest.raises(ValueError, match=rf"{option} must be"):
                row.drive("closure", opt, model, batches(steps=1))
            assert torch.equal(flat(model), before)


@every
def test_weights_that_share_memory(name):
    storage = torch.ones(6)
    first, second = nn.Parameter(storage[:4]), nn.Parameter(storage[2:])
    opt = EVERY[name].make(None, SGD, [first, second], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        opt.step(lambda i=slice(None): (first * second)[i].square(), targets=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(storage, torch.ones(6))


@pytest.mark.parametrize("base", [SGD, RMSprop])
@every
def test_weights_that_share_memory_at_the_first_step(name, base):
    """Before a method has perturbed, and a base stepped, what an op would refuse later on."""
    expanded, one = nn.Parameter(torch.ones(1).expand(4)), torch.ones(4)
    for params, words in (
        ([expanded], "elements that share memory"),
        ([nn.Parameter(one), nn.Parameter(one)], "share memory"),
    ):
        opt = EVERY[name].make(None, base, params, lr=0.1)
        before = [param.detach().clone() for param in params]
        with pytest.raises(ValueError, match=words):
            opt.step(
                lambda i=slice(None), params=params: sum(params)[i].square(),
                targets=torch.tensor([0, 1, 2, 3]),
            )
        assert all(map(torch.equal, params, before))


def test_counts_for_the_wrong_number_of_classes():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.FocalSAM(model.parameters(), SGD, class_counts=COUNTS[:2], lr=0.1)
    with pytest.raises(
        ValueError, match=r"targets must lie in \[0, 2\), got 0\.\.\.3: give one class count, and one output"
    ):
        opt.step(lambda: losses(model, x, y), targets=y)


# --- gradients and parameters that don't qualify


@pytest.mark.parametrize(
    ("base", "mask", "parts"), [(SGD, "fisher", 1), (Adagrad, "dynamic", 2), (RMSprop, "fisher", 2)]
)
@every
def test_sparse_gradients_are_named(name, base, mask, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(12, 4)).double()
    more = {"mask": mask} if name == "SparseSAM" else {"scope": "all"} if name == "CCSAM" else {}
    opt = EVERY[name].make(model, base, lr=0.1, **more)
    x, y = torch.randint(0, 6, (8, 3)), torch.arange(8) % 4
    before = flat(model)
    closures = [lambda i=slice(None): losses(model, x[i], y[i])] * parts
    with pytest.raises(ValueError, match=r"^grads\[\d+\] is sparse .*: only dense tensors are supported"):
        opt.step(closures, targets=[y] * parts)
    assert torch.equal(flat(model), before)


@every
def test_lazy_modules_work_or_are_named(name):
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 4))
    opt = EVERY[name].make(model, SGD, lr=0.1)
    (x, y), *_ = batches(torch.float32)

    def closure(i=slice(None)):
        return losses(model, x[i], y[i])

    if name == "GNM":
        with pytest.raises(
            ValueError, match="params must be initialized, got a lazy module's: run the model on a batch"
        ):
            opt.step(closure, targets=y)
        model(x)
    for _ in range(2):
        assert opt.step(closure, targets=y).isfinite()
