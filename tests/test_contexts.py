"""A step is the same whatever surrounds it: contexts, defaults, groups, closures' habits, and which way the base steps."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop

from ltsam_fast import diagnostics

from .family import EVERY, ROWS, closure_of
from .methods import METHODS, on_cpu
from .oracles import CLASSES, FEATURES, batches, flat, network, relative_error
from .phases import PHASED, step_in_phases

KINDS = {"sgd": SGD, "adamw": AdamW, "rmsprop": RMSprop}
every = pytest.mark.parametrize("name", EVERY)
phased = pytest.mark.parametrize("name", PHASED)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(name, model, kind="sgd", params=None, /, **options):
    momentum = {"momentum": 0.9} if kind == "sgd" else {}
    return (METHODS | ROWS)[name].make(model, KINDS[kind], params, **{"lr": 0.02, **momentum, **options})


# --- autocast and parametrize.cached() keep what they made of the weights


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def cast_losses(model, x, y, inside):
    def losses(index=slice(None)):
        with autocast() if inside else contextlib.nullcontext():
            return F.cross_entropy(model(x[index]).float(), y[index], reduction="none")

    return losses


@pytest.mark.parametrize("parts", [1, 2])
@kinds
@every
@on_cpu
def test_autocast_around_steps_is_autocast_inside_the_closure(name, kind, parts, backend):
    results = []
    for inside in (True, False):
        model = network(torch.float32)
        opt = make(name, model, kind)
        with contextlib.nullcontext() if inside else autocast():
            for x, y in batches(torch.float32, steps=3):
                with torch.no_grad():
                    cast_losses(model, x, y, inside)()  # an evaluation: its casts have no gradient
                pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
                closures = [cast_losses(model, *piece, inside) for piece in pieces]
                opt.step(closures, [piece[1] for piece in pieces])
        results.append(flat(model))
    assert torch.equal(*results)


@kinds
@phased
def test_autocast_around_phases(name, kind):
    results = []
    for inside in (True, False):
        model = network(torch.float32)
        opt = make(name, model, kind)
        with contextlib.nullcontext() if inside else autocast():
            for x, y in batches(torch.float32, steps=3):
                step_in_phases(opt, cast_losses(model, x, y, inside))
        results.append(flat(model))
    assert torch.equal(*results)


def test_autocast_around_diagnostics():
    """Casts made without gradients, or of other weights, are not used again."""
    model, ((x, y), *_) = network(torch.float32), batches(torch.float32)
    seen = []
    for inside in (True, False):

        def loss(z, t):
            return F.cross_entropy(z.float(), t, reduction="none")

        def prepare(x):
            return x

        class Cast(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self, x, inside=inside):
                with autocast() if inside else contextlib.nullcontext():
                    return self.net(x)

        with contextlib.nullcontext() if inside else autocast():
            net = Cast()
            sharp = diagnostics.class_sharpness(net, loss, x, y, rho=1.0, num_classes=CLASSES)
            norms = diagnostics.class_grad_norms(net, loss, x, y, num_classes=CLASSES)
            generator = torch.Generator().manual_seed(0)
            line = diagnostics.loss_slice(net, loss, x, y, steps=3, generator=generator)
            with torch.no_grad():
                after = net(x).float()
        seen.append((sharp.perturbed, norms.norms, line.loss, after))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert float((sharp.perturbed - sharp.loss).nan_to_num().min()) > 0


class Symmetric(nn.Module):
    """As in torch's tutorial; its backward needs nothing that a second backward would miss."""

    def forward(self, w):
        return w.triu() + w.triu(1).T


def parametrized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False), nn.Tanh(), nn.Linear(FEATURES, CLASSES)).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


@kinds
@every
def test_parametrize_cached_around_steps(name, kind):
    results = []
    for context in (contextlib.nullcontext, parametrize.cached):
        model = parametrized()
        opt = make(name, model, kind)
        with context():
            for x, y in batches(steps=3):
                opt.step(closure_of(model, x, y), targets=y)
        results.append(flat(model))
    assert torch.equal(*results)


@phased
def test_parametrize_cached_around_phases(name):
    results = []
    for context in (contextlib.nullcontext, parametrize.cached):
        model = parametrized()
        opt = make(name, model)
        with context():
            for x, y in batches(steps=3):
                step_in_phases(opt, closure_of(model, x, y))
        results.append(flat(model))
    assert torch.equal(*results)


# --- closures that clear gradients


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [1, 4])
@kinds
@every
def test_a_closure_may_begin_with_zero_grad(name, kind, parts, set_to_none):
    results = []
    for clears in (False, True):
        model = network()
        opt = make(name, model, kind)

        def closure_for(x, y, model=model, opt=opt, clears=clears):
            def closure(index=slice(None)):
                if clears:
                    opt.zero_grad(set_to_none)
                return F.cross_entropy(model(x[index]), y[index], reduction="none")

            return closure

        for x, y in batches(steps=4):
            pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
            opt.step([closure_for(*piece) for piece in pieces], [piece[1] for piece in pieces])
        results.append(flat(model))
    assert torch.equal(*results)


@every
def test_a_closure_sees_no_gradients(name):
    model, seen = network(), []
    opt = make(name, model)
    (x, y), *_ = batches()

    def closure(index=slice(None)):
        seen.append([param.grad for param in model.parameters()])
        return F.cross_entropy(model(x[index]), y[index], reduction="none")

    opt.step([closure, closure], [y, y])
    assert all(grad is None for grads in seen for grad in grads)


# --- groups without parameters


@pytest.mark.parametrize("how", ["plain", "scaled", "bfloat16"])
@pytest.mark.parametrize("empty", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
@every
@on_cpu
def test_a_group_without_parameters(name, kind, empty, how, backend):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    results = []
    for inserted in (False, True):
        model = network(dtype)
        params = list(model.parameters())
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        if inserted:
            groups.insert(empty, {"params": [], "rho": 5.0})
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if how == "scaled" else None
        opt = make(name, model, kind, groups)
        for x, y in batches(dtype, steps=3):
            opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
            if scaler:
                scaler.update()
        copy.deepcopy(opt).load_state_dict(opt.state_dict())
        results.append(flat(model))
    assert torch.equal(*results)


@kinds
@every
def test_with_no_group_to_perturb_a_step_is_the_bases(name, kind):
    if name == "ESAM":
        pytest.skip("ESAM descends with the samples that it selects")
    model, twin = network(), network()
    opt = make(name, model, kind, [{"params": list(model.parameters()), "perturb": False}])
    base = KINDS[kind](twin.parameters(), lr=0.02, **({"momentum": 0.9} if kind == "sgd" else {}))
    for x, y in batches(steps=4):
        opt.step(closure_of(model, x, y), targets=y)
        base.zero_grad()
        closure_of(twin, x, y)().mean().backward()
        base.step()
    assert relative_error(flat(model), flat(twin)) < 1e-12


# --- torch's default dtype


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every
@on_cpu
def test_nothing_depends_on_the_default_dtype(name, default, backend):
    results = []
    for dtype in (torch.float32, default):
        model, data = network(torch.float32), batches(torch.float32, steps=3)
        torch.set_default_dtype(dtype)
        try:
            for scaled in (False, True):
                scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
                opt = make(name, model)
                for x, y in data:
                    opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
                    if scaled:
                        scaler.update()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(flat(model))
    assert torch.equal(*results)


# --- the way the base steps


MAXIMIZING = {
    "sgd": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "adagrad": (Adagrad, {"lr": 0.05}),
    "adadelta": (Adadelta, {"lr": 0.5}),
    "nadam": (NAdam, {"lr": 0.01}),
}


def signed(closure, sign):
    return lambda index=slice(None): sign * closure(index)


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.05}], ids=["plain", "clipped"])
@pytest.mark.parametrize("base", MAXIMIZING)
@every
@on_cpu
def test_to_maximize_f_is_to_minimize_its_negative(name, base, more, backend):
    kind, options = MAXIMIZING[base]
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        model = network()
        opt = (METHODS | ROWS)[name].make(model, kind, maximize=maximize, **options, **more)
        means = [opt.step(signed(closure_of(model, x, y), sign), targets=y) * sign for x, y in batches(steps=6)]
        results.append((flat(model), torch.stack(means)))
    assert relative_error(results[1][0], results[0][0]) < 1e-12
    torch.testing.assert_close(results[1][1], results[0][1])


@phased
def test_to_maximize_with_the_phases(name):
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        model = network()
        opt = make(name, model, maximize=maximize)
        for x, y in batches(steps=6):
            step_in_phases(opt, signed(closure_of(model, x, y), sign))
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


@kinds
@every
def test_some_groups_maximize(name, kind):
    """A saddle point's problem: as if the gradients of those groups had the other sign."""
    results = []
    for reversed_by_hand in (True, False):
        model = network()
        params = list(model.parameters())
        flag = {} if reversed_by_hand else {"maximize": True}
        opt = make(name, model, kind, [{"params": params[:2], **flag}, {"params": params[2:], "rho": 0.2}])
        for param in params[:2] if reversed_by_hand else ():
            param.register_hook(torch.neg)
        if name == "ESAM" and not reversed_by_hand:
            before = flat(model)
            with pytest.raises(ValueError, match="maximize must be the same in all groups"):
                opt.step(closure_of(model, *batches()[0]))
            assert torch.equal(flat(model), before)
            return
        for x, y in batches(steps=6):
            opt.step(closure_of(model, x, y), targets=y)
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


# --- spectral norm's vectors are running statistics


@pytest.mark.parametrize("style", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
@every
def test_spectral_norm_sees_the_unperturbed_pass_only(name, style):
    def normed():
        torch.manual_seed(0)
        return nn.Sequential(style(nn.Linear(FEATURES, 9)), nn.Tanh(), nn.Linear(9, CLASSES)).double()

    model, once = normed(), normed()
    opt = make(name, model, lr=0.0, model=model)
    kept = {key: buffer for key, buffer in model.named_buffers()}
    (x, y), *_ = batches()
    opt.step(closure_of(model, x, y), targets=y)
    if name == "GNM":  # its only pass is at noisy weights
        return
    passes = 4 if name == "MSAM" else 1  # a clean pass for each micro-batch
    for _ in range(passes):
        once(x)
    for key, buffer in once.named_buffers():
        assert model.get_buffer(key) is kept[key]
        torch.testing.assert_close(kept[key], buffer)
