"""What kind of closure ``step`` was given is never guessed from the gradients that happen to be there: all methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

import ltsam_fast as lf

from . import family
from .oracles import batches, flat, network

EVERY = family.EVERY
TOLD = ("FocalSAM", "ImbSAM", "SSESAM", "CCSAM")
"""Those that need to be told the classes."""
each = pytest.mark.parametrize("name", EVERY)
with_bases = pytest.mark.parametrize(
    ("base", "options"), [(SGD, {"lr": 0.1, "momentum": 0.9}), (AdamW, {"lr": 0.01}), (RMSprop, {"lr": 0.01})]
)


@each
@with_bases
def test_left_over_gradients_are_not_looked_at(name, base, options):
    results, calls = [], []
    for left_over in (None, 0.0, 3.0, float("nan")):
        model, data = network(), batches(steps=4)
        opt = EVERY[name].make(model, base, **options)
        counted = []
        for x, y in data:
            for param in model.parameters():
                param.grad = None if left_over is None else torch.full_like(param, left_over)
            losses = family.closure_of(model, x, y)
            targets = (y,) if name in TOLD else ()
            opt.step(lambda i=slice(None), losses=losses: counted.append(0) or losses(i), *targets)  # noqa: B023
        results.append(flat(model))
        calls.append(len(counted))
    assert all(torch.equal(one, results[0]) for one in results)
    assert calls[1:] == calls[:-1]


@each
@with_bases
@pytest.mark.parametrize("returned", ["loss", "detached", "number", "nothing"])
def test_a_closure_that_calls_backward_is_refused(name, base, options, returned):
    """Whatever it returns: the message names the class that takes it, and the weights are the old ones."""
    model, data = network(), batches(steps=3)
    opt = EVERY[name].make(model, base, **options)
    twin = network()
    other = EVERY[name].make(twin, base, **options)
    for its, one in ((model, opt), (twin, other)):
        family.drive(one, its, data[:1])
    before = flat(model)
    x, y = data[1]

    def closure(i=slice(None)):
        losses = family.closure_of(model, x, y)(i)
        loss = losses.mean()
        loss.backward()
        return {"loss": loss, "detached": loss.detach(), "number": loss.item()}.get(returned)

    for targets in (y,) if name in TOLD else (y, None):
        for left_over in (False, True):
            if left_over:
                family.closure_of(model, x, y)().mean().backward()
            with pytest.raises(ValueError, match=r"ltsam_fast\.compat\.SAM") as error:
                opt.step(closure, targets=targets)
            assert "\n" not in str(error.value)
            assert torch.equal(flat(model), before)
    for its, one in ((model, opt), (twin, other)):
        family.drive(one, its, data[2:])
    assert torch.equal(flat(model), flat(twin))


@each
@with_bases
def test_gradients_that_a_closure_leaves_are_not_the_steps(name, base, options):
    """A closure may look at gradients by itself, or let another optimizer step."""
    results = []
    for extra in (False, True):
        model, data = network(), batches(steps=4)
        opt = EVERY[name].make(model, base, **options)
        for x, y in data:
            plain = family.closure_of(model, x, y)

            def closure(i=slice(None), losses=plain, extra=extra):
                if extra and torch.is_grad_enabled():
                    losses(i).mean().backward()
                return losses(i)

            opt.step(closure, targets=y)
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["ESAM", "MSAM"])
def test_a_published_closure_without_an_index_is_refused_with_the_same_remedy(name):
    model, (x, y) = network(), batches(steps=1)[0]
    opt = EVERY[name].make(model, SGD, lr=0.1)
    before = flat(model)
    with pytest.raises(ValueError, match=r"closure must take an index.*ltsam_fast\.compat\.SAM"):
        opt.step(lambda: family.closure_of(model, x, y)().mean().backward(), targets=y)
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
