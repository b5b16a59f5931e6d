"""What a closure may do, what surrounds it, and batches in parts. What kind it is, is never guessed from gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, RMSprop
from torch.utils.checkpoint import checkpoint

import ltsam_fast as lf
from ltsam_fast import diagnostics

from .method_rows import BASES, EVERY, closure_of, driven, every, step_in_phases
from .oracles import CLASSES, FEATURES, batches, flat, losses, network, relative_error

INDEXED = tuple(name for name, row in EVERY.items() if row.indexed)
with_bases = pytest.mark.parametrize("base", [SGD, RMSprop])

# --- closures and gradients


@with_bases
@every
def test_left_over_gradients_are_not_looked_at(name, base):
    row, results, calls = EVERY[name], [], []
    for left_over in (None, 0.0, 3.0, float("nan")):
        model, counted = network(), []
        opt = row.make(model, base, lr=0.01)
        for x, y in batches(steps=4):
            for param in model.parameters():
                param.grad = None if left_over is None else torch.full_like(param, left_over)
            closure = closure_of(model, x, y)
            opt.step(lambda i=slice(None): counted.append(0) or closure(i), *((y,) if row.told else ()))  # noqa: B023
        results.append(flat(model))
        calls.append(len(counted))
    assert all(torch.equal(one, results[0]) for one in results)
    assert calls[1:] == calls[:-1]


def test_a_gradient_of_a_frozen_weight_that_is_left_over():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), SGD, lr=0.1)
    losses(model, x, y).mean().backward()
    model[0].requires_grad_(False)
    for layer in (model[2], model[4]):
        layer.zero_grad()
    assert opt.step(lambda: losses(model, x, y)).shape == ()


@every
def test_a_closure_sees_no_gradients(name):
    model, seen = network(), []
    opt = EVERY[name].make(model, lr=0.02)
    (x, y), *_ = batches()

    def closure(index=slice(None)):
        seen.append([param.grad for param in model.parameters()])
        return losses(model, x[index], y[index])

    opt.step([closure, closure], [y, y])
    assert all(grad is None for grads in seen for grad in grads)


@pytest.mark.parametrize(("parts", "set_to_none"), [(1, True), (4, False)])
@every
def test_a_closure_may_begin_with_zero_grad(name, parts, set_to_none):
    results = []
    for clears in (False, True):
        model = network()
        opt = EVERY[name].make(model, lr=0.02, momentum=0.9)

        def loss(model, x, y, opt=opt, clears=clears):
            if clears:
                opt.zero_grad(set_to_none)
            return losses(model, x, y)

        for x, y in batches(steps=4):
            pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
            opt.step([closure_of(model, *piece, loss) for piece in pieces], [piece[1] for piece in pieces])
        results.append(flat(model))
    assert torch.equal(*results)


@with_bases
@every
def test_gradients_that_a_closure_leaves_are_not_the_steps(name, base):
    """A closure may look at gradients by itself, or let another optimizer step."""
    row, results = EVERY[name], []

    def looking(model, x, y):
        if torch.is_grad_enabled():
            losses(model, x, y).mean().backward()
        return losses(model, x, y)

    for loss in (losses, looking):
        model = network()
        results.append(row.drive("closure", row.make(model, base, lr=0.01), model, batches(steps=4), loss))
    assert torch.equal(*results)


@every
def test_a_closure_that_calls_backward_is_refused(name):
    """Whatever it returns: the message names the class that takes it, and the weights are the old ones."""
    row, model, other, data = EVERY[name], network(), network(), batches(steps=3)
    opt = row.make(model, lr=0.1, momentum=0.9)
    wanted = row.drive("closure", row.make(other, lr=0.1, momentum=0.9), other, [data[0], data[2]])
    before, (x, y) = row.drive("closure", opt, model, data[:1]), data[1]
    for returned in (lambda loss: loss, torch.detach, float, lambda loss: None):

        def published(i=slice(None), returned=returned):
            loss = losses(model, x[i], y[i]).mean()
            loss.backward()
            return returned(loss)

        for targets in (y,) if row.told else (y, None):
            for left_over in (False, True):
                if left_over:
                    losses(model, x, y).mean().backward()
                with pytest.raises(ValueError, match=r"ltsam_fast\.compat\.SAM") as error:
                    opt.step(published, targets=targets)
                assert "\n" not in str(error.value)
                assert torch.equal(flat(model), before)
    assert torch.equal(row.drive("closure", opt, model, data[2:]), wanted)


@pytest.mark.parametrize("name", INDEXED)
def test_a_published_closure_without_an_index_is_refused_with_the_same_remedy(name):
    model, (x, y) = network(), batches(steps=1)[0]
    opt = EVERY[name].make(model, lr=0.1)
    before = flat(model)
    with pytest.raises(ValueError, match=r"closure must take an index.*ltsam_fast\.compat\.SAM"):
        opt.step(lambda: losses(model, x, y).mean().backward(), targets=y)
    assert torch.equal(flat(model), before)


def test_two_networks_against_each_other():
    """The generator's step leaves gradients in the discriminator, as in any GAN."""
    softplus = nn.functional.softplus

    def run(clear):
        torch.manual_seed(0)
        generator = nn.Linear(4, 6)
        critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        z, real = torch.randn(16, 4), torch.randn(16, 6)
        of_g, of_d = lf.SAM(generator.parameters(), SGD, lr=0.01), lf.SAM(critic.parameters(), SGD, lr=0.01)
        calls = []
        for _ in range(4):
            if clear:
                critic.zero_grad()
            of_d.step(
                lambda: (
                    calls.append(0) or (softplus(-critic(real)) + softplus(critic(generator(z).detach()))).squeeze(1)
                )
            )
            of_g.step(lambda: softplus(-critic(generator(z))).squeeze(1))
        assert len(calls) == 8
        return torch.cat([flat(generator), flat(critic), critic[1].running_mean.double()])

    assert torch.equal(run(False), run(True))


# --- targets and index


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if not row.told])
def test_needs_no_targets(name):
    """Nor looks at them."""
    results = []
    for targets_of in (lambda y: y, lambda y: y + 100, lambda y: None):
        model = network()
        opt = EVERY[name].make(model, lr=0.1)
        for x, y in batches(steps=5):
            opt.step(closure_of(model, x, y), targets=targets_of(y))
        results.append(flat(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", INDEXED)
def test_a_closure_may_need_its_index(name):
    (x, y), *_ = batches()
    results = []
    for required in (False, True):
        model = network()
        closure = closure_of(model, x, y)
        needing = lambda index, closure=closure: closure(index)  # noqa: E731
        EVERY[name].make(model, lr=0.1).step(needing if required else closure, targets=y)
        results.append(flat(model))
    assert torch.equal(*results)
    model = network()
    before = flat(model)
    with pytest.raises(ValueError, match="closure must take an index"):
        EVERY[name].make(model, lr=0.1).step(lambda: losses(model, x, y), targets=y)
    assert torch.equal(flat(model), before)


# --- a batch in parts

IN_PARTS = [
    (name, base, sizes)
    for name, row in EVERY.items()
    for base, sizes in (("momentum", (16,)), ("adamw", (5, 10, 1)), ("rmsprop", (2,) * 8))
    if not row.by_parts
    or sizes == (16,)
    or (name == "MicroBatchSAM" and sizes == (5, 10, 1))  # whose micro-batches have 5
]


@pytest.mark.parametrize(("name", "base", "sizes"), IN_PARTS)
def test_a_batch_in_parts_is_one_batch(name, base, sizes):
    """Class weights in the loss included."""
    row, (kind, options), model = EVERY[name], BASES[base], network()
    weights = torch.tensor([0.3, 1.0, 2.5, 4.0], dtype=torch.float64)

    def loss(model, x, y, perturbed=None):
        return F.cross_entropy(model(x), y, weights, reduction="none")

    opt, seen = row.make(model, kind, **options), []
    for x, y in batches(steps=6):
        pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
        closures = [closure_of(model, *piece, loss) for piece in pieces]
        seen.append(opt.step(closures, targets=[y for _, y in pieces]).item())
    wanted, means = row.expected(kind, options, batches(steps=6), loss=loss)
    assert relative_error(flat(model), wanted) < 1e-9
    assert seen == pytest.approx(means, rel=1e-9)


# --- autocast and parametrize.cached() keep what they made of the weights


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def cast_losses(inside):
    def loss(model, x, y):
        with autocast() if inside else contextlib.nullcontext():
            return F.cross_entropy(model(x).float(), y, reduction="none")

    return loss


@with_bases
@driven
def test_autocast_around_steps_is_autocast_inside_the_closure(name, interface, base):
    row, results = EVERY[name].of(interface), []
    for inside in (True, False):
        model, loss = network(torch.float32), cast_losses(inside)
        opt = row.make(model, base, lr=0.02)
        with contextlib.nullcontext() if inside else autocast():
            for x, y in batches(torch.float32, steps=3):
                with torch.no_grad():
                    loss(model, x, y)  # an evaluation: its casts have no gradient
                if base is SGD or interface == "phases":
                    row.step(interface, opt, model, x, y, loss)
                else:
                    pieces = list(zip(x.chunk(2), y.chunk(2), strict=True))
                    opt.step([closure_of(model, *piece, loss) for piece in pieces], [piece[1] for piece in pieces])
        results.append(flat(model))
    assert torch.equal(*results)


def test_autocast_around_diagnostics():
    """Casts made without gradients, or of other weights, are not used again."""
    model, ((x, y), *_) = network(torch.float32), batches(torch.float32)
    seen = []
    for inside in (True, False):

        def loss(z, t):
            return F.cross_entropy(z.float(), t, reduction="none")

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


@driven
def test_parametrize_cached_around_steps(name, interface):
    row, results = EVERY[name], []
    for context in (contextlib.nullcontext, parametrize.cached):
        model = parametrized()
        opt = row.make(model, RMSprop if interface == "closure" else SGD, lr=0.02)
        with context():
            for x, y in batches(steps=3):
                closure = closure_of(model, x, y)
                opt.step(closure, targets=y) if interface == "closure" else step_in_phases(opt, closure)
        results.append(flat(model))
    assert torch.equal(*results)


# --- networks of unusual make


@every
def test_functional_call(name):
    """The closure may call the model with its parameters in a dictionary; tensors made from them get their gradients."""
    results = []

    def functional(model, x, y):
        out = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        return F.cross_entropy(out, y, reduction="none")

    for loss in (losses, functional):
        model = network()
        opt = EVERY[name].make(model, lr=0.05)
        results.append(EVERY[name].drive("closure", opt, model, batches(steps=4), loss))
    assert torch.equal(*results)


class Checkpointed(nn.Module):
    """Layers in an activation checkpoint, behind others or the first ones, and a parameter of somebody else."""

    def __init__(self, reentrant, begin):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.reentrant, self.begin = network(), reentrant, begin
        self.foreign = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))

    def forward(self, x):
        x = self.net[: self.begin](x.clone().requires_grad_())
        x = checkpoint(self.net[self.begin : 3], x, use_reentrant=self.reentrant)
        return self.net[3:](x) * self.foreign


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("known", [False, True], ids=("", "model given"))
@every
def test_weights_in_reentrant_checkpoints_count(name, known, begin):
    """torch.autograd.grad doesn't see them."""
    results = []
    for reentrant in (False, True):
        model = Checkpointed(reentrant, begin)
        params = [{"params": list(model.net.parameters())}]
        more = {"model": model, "plan": "auto" if reentrant else "published"} if known else {}
        opt = EVERY[name].make(model, SGD, params, lr=0.05, momentum=0.9, **more)
        results.append(EVERY[name].drive("closure", opt, model, batches(steps=4)))
        assert all(param.grad is None for param in model.net.parameters())
    assert relative_error(*results) < 1e-12
