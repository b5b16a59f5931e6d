"""Bad input: an error that names the argument, its value and what is accepted, and nothing has changed."""

import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop

import ltsam_fast as lf

from .family import EACH as FAMILY
from .family import ROWS
from .methods import BASES, EACH, INTERFACES, METHODS, RHO
from .oracles import CLASSES, COUNTS, batches, flat, losses, network

NAN, INF = float("nan"), float("inf")
NUMBER = "must be a finite number >= 0"

# (method, keywords of the constructor, error, what its message says)
CONSTRUCTORS = [
    *[
        ("SAM", {"rho": rho}, ValueError, f"rho {NUMBER}.*got {re.escape(repr(rho))}")
        for rho in (-0.1, NAN, INF, None, "1")
    ],
    *[("FocalSAM", {"rho": rho}, ValueError, f"rho {NUMBER}") for rho in (-0.1, NAN, INF)],
    *[("SAM", {"max_grad_norm": n}, ValueError, f"max_grad_norm {NUMBER}.*{n}") for n in (-1.0, NAN, INF, None, "1")],
    ("SAM", {"model": 3}, TypeError, r"model must be a torch\.nn\.Module or None, got 3"),
    ("SAM", {"momnetum": 0.9}, TypeError, "momnetum"),
    ("SAM", {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ("SAM", {"class_counts": [1, 2]}, TypeError, "class_counts"),
    *[
        ("FocalSAM", {"class_counts": counts}, ValueError, "class_counts must be")
        for counts in ([], [-1, 2], [0, 0], [NAN, 1], [INF, 1], "abc", ["a", "b"], [[1, 2]], 3, {"a": 1}, object())
    ],
    *[("FocalSAM", {"gamma": gamma}, ValueError, f"gamma {NUMBER}, got {gamma}") for gamma in (-1.0, NAN, INF)],
    *[("FocalSAM", {"lam": lam}, ValueError, f"lam {NUMBER}, got {lam}") for lam in (-1.0, NAN, INF)],
    ("FocalSAM", {"gamma": NAN, "class_counts": None}, ValueError, "gamma"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), CONSTRUCTORS, ids=lambda value: str(value)[:40])
def test_constructor(name, options, error, message):
    model = network()
    before = flat(model)
    with pytest.raises(error, match=message):
        METHODS[name].make(model, SGD, **{"lr": 0.1, **options})
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("base", [SGD([torch.zeros(1)], lr=0.1), "SGD", None, 3], ids=str)
@pytest.mark.parametrize("name", EACH)
def test_base_optimizer_is_a_class(name, base):
    with pytest.raises(TypeError, match="base_optimizer must be a class such as torch.optim.SGD, got"):
        METHODS[name].cls(network().parameters(), base, lr=0.1)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.zeros(3, requires_grad=True), TypeError, "params"),
        ([3], TypeError, "can only optimize Tensors"),
        ([torch.zeros(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([{"params": [torch.zeros(2)], "rho": -1.0}], ValueError, f"rho {NUMBER}, got -1.0"),
        ([{"params": [torch.zeros(2)], "eta": NAN}], ValueError, f"eta {NUMBER}, got nan"),
        ([{"params": [torch.zeros(2)], "norm_eps": -1e-12}], ValueError, f"norm_eps {NUMBER}, got -1e-12"),
        ([{"params": [torch.zeros(2)]}, {"rho": 0.1}], KeyError, "params"),
    ],
)
@pytest.mark.parametrize("name", EACH)
def test_parameters(name, params, error, message):
    with pytest.raises(error, match=message):
        METHODS[name].cls(params, SGD, lr=0.1, **METHODS[name].options)


@pytest.mark.parametrize("name", EACH)
def test_a_bad_group_is_not_added(name):
    model = network()
    opt = METHODS[name].cls(model[0].parameters(), SGD, lr=0.1, **METHODS[name].options)
    for bad in ({"rho": -1.0}, {"rho": "x"}, {"eta": INF}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} {NUMBER}"):
            opt.add_param_group({"params": list(model[2].parameters()), **bad})
        assert len(opt.param_groups) == len(opt.base_optimizer.param_groups) == 1
    opt.add_param_group({"params": list(model[2].parameters())})
    METHODS[name].drive("closure", opt, model, batches(steps=1))


# (methods, what is called with opt, model, x, y, error, what its message says)
def _second(opt, model, x, y):
    """A closure that returns fewer losses when it is called again."""
    sizes = iter((len(x), len(x) - 1))

    def closure():
        n = next(sizes)
        return losses(model, x[:n], y[:n])

    return opt.step(closure, targets=y)


FOCAL = ("FocalSAM",)
SHAPE = r"closure must return the per-sample losses, shape \(B,\), got "
TARGETS = "targets must be a 1-D integer tensor of 16 labels, one per sample, got "
CALLS = {
    "no closure": (EACH, lambda o, m, x, y: o.step(targets=y), ValueError, "closure must be given"),
    "closure None": (EACH, lambda o, m, x, y: o.step(None, y), ValueError, "closure must be given"),
    "closure 3": (EACH, lambda o, m, x, y: o.step(3, y), ValueError, "closure must be given"),
    "no closures": (EACH, lambda o, m, x, y: o.step([], []), ValueError, "closure must be given"),
    "a loss": (EACH, lambda o, m, x, y: o.step(losses(m, x, y), y), ValueError, "closure must be given"),
    "scalar": (EACH, lambda o, m, x, y: o.step(lambda: losses(m, x, y).mean(), y), ValueError, SHAPE + r"\(\)"),
    "2-D": (EACH, lambda o, m, x, y: o.step(lambda: losses(m, x, y)[:, None], y), ValueError, SHAPE + r"\(16, 1\)"),
    "int": (EACH, lambda o, m, x, y: o.step(lambda: 3, y), ValueError, SHAPE + "int"),
    "None": (EACH, lambda o, m, x, y: o.step(lambda: None, y), ValueError, SHAPE + "NoneType"),
    "tuple": (EACH, lambda o, m, x, y: o.step(lambda: (losses(m, x, y), x), y), ValueError, SHAPE + "tuple"),
    "no samples": (
        EACH,
        lambda o, m, x, y: o.step(lambda: losses(m, x[:0], y[:0]), y[:0]),
        ValueError,
        SHAPE + r"\(0,\)",
    ),
    "detached": (
        EACH,
        lambda o, m, x, y: o.step(lambda: losses(m, x, y).detach(), y),
        ValueError,
        "got a detached tensor",
    ),
    "fewer losses": (EACH, _second, ValueError, "(15 losses|16 entries).*(16 before|15 losses)"),
    "targets missing": (FOCAL, lambda o, m, x, y: o.step(lambda: losses(m, x, y)), ValueError, "targets must be given"),
    "too few targets": (
        EACH,
        lambda o, m, x, y: o.step([lambda: losses(m, x, y)] * 2, [y]),
        ValueError,
        "targets has 1 entries, but there are 2 closures",
    ),
    "short targets": (
        EACH,
        lambda o, m, x, y: o.step(lambda: losses(m, x, y), y[:9]),
        ValueError,
        "targets has 9 entries, but closure returned 16 losses",
    ),
    "float targets": (FOCAL, lambda o, m, x, y: o.step(lambda: losses(m, x, y), y.double()), ValueError, TARGETS),
    "2-D targets": (FOCAL, lambda o, m, x, y: o.step(lambda: losses(m, x, y), y[:, None]), ValueError, TARGETS),
    "targets 'ab'": (
        FOCAL,
        lambda o, m, x, y: o.step(lambda: losses(m, x, y), "ab"),
        ValueError,
        "targets must be.*ab",
    ),
    "high target": (
        FOCAL,
        lambda o, m, x, y: o.step(lambda: losses(m, x, y), torch.where(y == y[3], CLASSES, y)),
        ValueError,
        rf"targets must lie in \[0, {CLASSES}\), got .*{CLASSES}",
    ),
    "negative target": (
        FOCAL,
        lambda o, m, x, y: o.step(lambda: losses(m, x, y), torch.where(y == y[3], -100, y)),
        ValueError,
        rf"targets must lie in \[0, {CLASSES}\), got -100",
    ),
    "no gradients": (("SAM",), lambda o, m, x, y: o.first_step(), ValueError, "no parameter has a gradient"),
    "second first": (
        ("SAM",),
        lambda o, m, x, y: o.second_step(),
        ValueError,
        r"second_step\(\) was called where first_step\(\)",
    ),
    "third first": (
        FOCAL,
        lambda o, m, x, y: o.third_step(),
        ValueError,
        r"third_step\(\) was called where first_step\(\)",
    ),
}


@pytest.mark.parametrize(
    ("name", "call", "error", "message"),
    [
        pytest.param(name, call, error, message, id=f"{name}-{what}")
        for what, (names, call, error, message) in CALLS.items()
        for name in names
    ],
)
@pytest.mark.parametrize("base", ["nesterov", "adamw", "rmsprop"])
def test_call(name, base, call, error, message):
    method, (kind, options), data = METHODS[name], BASES[base], batches(steps=4)
    model, twin = network(), network()
    opt, other = (method.make(m, kind, **options) for m in (model, twin))
    method.drive("closure", opt, model, data[:2])
    before = flat(model)
    with pytest.raises(error, match=message):
        call(opt, model, *data[2])
    assert torch.equal(flat(model), before)
    # The next steps are what they would have been: state did not change either.
    assert torch.equal(method.drive("closure", opt, model, data[2:]), method.drive("closure", other, twin, data))


@pytest.mark.parametrize("name", EACH)
def test_phases_out_of_order(name):
    """Whatever is called out of turn raises, and the phases go on as if it had not been called."""
    method, data = METHODS[name], batches(steps=2)
    model, twin = network(), network()
    opt, other = (method.make(m, SGD, lr=0.1, momentum=0.9) for m in (model, twin))
    for x, y in data:
        for phase in opt.phases:
            losses(model, x, y).mean().backward()
            before = flat(model)
            for wrong in (*opt.phases, "step"):
                if wrong == phase or (wrong == "step" and phase == "first_step"):
                    continue
                arguments = (lambda x=x, y=y: losses(model, x, y), y) if wrong == "step" else ()
                with pytest.raises(ValueError, match=rf"{wrong}\(\) was called where {phase}\(\) is next.*restore\(\)"):
                    getattr(opt, wrong)(*arguments)
                assert torch.equal(flat(model), before)
            getattr(opt, phase)()
            model.zero_grad()
            losses(twin, x, y).mean().backward()
            getattr(other, phase)()
            twin.zero_grad()
    assert torch.equal(flat(model), flat(twin))


def test_a_phase_without_gradients():
    model = network()
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1)
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.first_step()
    with pytest.raises(ValueError, match=r"no parameter has a gradient to ascend along: call loss.backward\(\)"):
        opt.second_step()
    losses(model, *batches(steps=1)[0]).mean().backward()
    opt.second_step()  # the kept gradients and the order were not lost
    opt.third_step()


def test_focal_sam_without_class_counts():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"class_counts must be given to the constructor for step\(closure, targets\)"):
        opt.step(lambda: losses(model, x, y), targets=y)


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


@pytest.mark.parametrize("perturb", [True, False])
@pytest.mark.parametrize("base", [SGD, Adam])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Embedded, ValueError, r"grads\[0\] is sparse .*only dense tensors are supported"),
        (Complex, TypeError, r"\[0\] has dtype torch.complex64: accepted are float32, float64, bfloat16, float16"),
        (Meta, ValueError, r"\[0\] is on device meta: move it to cpu or cuda"),
    ],
)
@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("name", EACH)
def test_tensors_that_are_not_supported(name, interface, kind, error, message, base, perturb):
    """Also where only the base step would meet them, with the other weights perturbed by then."""
    model, y = kind(), torch.tensor([0, 1, 2, 3])
    head = nn.Linear(2, 1)
    x = torch.randn(4, 2)
    groups = [{"params": list(model.parameters()), "perturb": perturb}, {"params": list(head.parameters())}]
    opt = METHODS[name].cls(groups, base, rho=RHO, lr=0.1, **METHODS[name].options)
    everything = [*model.parameters(), *head.parameters()]
    before = [p.detach().clone() for p in everything]

    def closure():
        losses = model.losses(y) + head(x)[:, 0].square()
        losses.register_hook(lambda _: fill())
        return losses

    def fill():  # no backward() reaches the meta device by itself
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.is_meta else p.grad

    def phases():
        for phase in opt.phases:
            closure().sum().backward()
            getattr(opt, phase)()

    with pytest.raises(error, match=message):
        phases() if interface == "phases" else opt.step(closure, targets=y)
    assert all(p.is_meta or torch.equal(p, old) for p, old in zip(everything, before, strict=True))
    assert not any(buffer.any() for state in opt.state.values() for buffer in state.values() if not buffer.is_meta)


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
@pytest.mark.parametrize("name", EACH)
def test_a_group_option_that_went_bad(name, bad):
    model, data = network(), batches(steps=1)
    for option in ("rho", "eta", "lr"):
        opt = METHODS[name].make(model, SGD, lr=0.1)
        opt.param_groups[0][option] = bad
        before = flat(model)
        with pytest.raises(ValueError, match=rf"{option} {NUMBER.replace('a finite number', '.*')}|{option} must be"):
            METHODS[name].drive("closure", opt, model, data)
        assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", EACH)
def test_weights_that_share_memory(name):
    storage = torch.ones(6)
    first, second = nn.Parameter(storage[:4]), nn.Parameter(storage[2:])
    opt = METHODS[name].cls([first, second], SGD, lr=0.1, **METHODS[name].options)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        opt.step(lambda: (first * second).square(), targets=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(storage, torch.ones(6))


def test_counts_for_the_wrong_number_of_classes():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.FocalSAM(model.parameters(), SGD, class_counts=COUNTS[:2], lr=0.1)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\), got 0\.\.\.3: give one class count per class"):
        opt.step(lambda: losses(model, x, y), targets=y)


# --- gradients and parameters that don't qualify


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
@pytest.mark.parametrize("base", [SGD, Adagrad, RMSprop])
@pytest.mark.parametrize("name", ["SAM", "FocalSAM", *FAMILY])
def test_sparse_gradients_are_named(name, base, mask, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(12, 4)).double()
    more = {"mask": mask} if name == "SparseSAM" else {"scope": "all"} if name == "CCSAM" else {}
    opt = (METHODS | ROWS)[name].make(model, base, lr=0.1, **more)
    x, y = torch.randint(0, 6, (8, 3)), torch.arange(8) % 4
    before = flat(model)
    closures = [lambda i=slice(None): losses(model, x[i], y[i])] * parts
    with pytest.raises(ValueError, match=r"^grads\[\d+\] is sparse .*: only dense tensors are supported"):
        opt.step(closures, targets=[y] * parts)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", ["SAM", "FocalSAM", *FAMILY])
def test_lazy_modules_work_or_are_named(name):
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 4))
    opt = (METHODS | ROWS)[name].make(model, SGD, lr=0.1)
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
