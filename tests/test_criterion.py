"""``step(forward, targets, loss=...)`` is the step with the losses of the samples, whatever the loss's reduction."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import ltsam_fast as lf

from .method_rows import EVERY, every
from .oracles import CLASSES, COUNTS, batches, flat, network, relative_error

WEIGHT = [0.5, 1.0, 2.0, 3.0]
REDUCTIONS = ("none", "mean", "sum")


def forward_of(model, x):
    return lambda index=slice(None): model(x[index])


def trained(name, losses_of, loss=None, steps=4, scaler=None, **more):
    """Weights and mean losses after some steps; ``losses_of(model, x, y)`` gives the closure."""
    model, found = network(), []
    opt = EVERY[name].make(model, lr=0.05, momentum=0.9, **more)
    for x, y in batches(steps=steps):
        extra = {} if loss is None else {"loss": loss}
        found.append(opt.step(losses_of(model, x, y), y, scaler=scaler, **extra))
        if scaler is not None:
            scaler.update()
    return flat(model), torch.stack(found)


def weighted(model, x, y, weight):
    """Losses of the samples whose mean is torch's weighted mean."""
    w = torch.tensor(weight, dtype=torch.float64)
    return lambda index=slice(None): F.cross_entropy(model(x[index]), y[index], w, reduction="none") / w[y].mean()


def assert_same(found, wanted, bound=1e-12):
    assert relative_error(found[0], wanted[0]) < bound
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=0)


PLAIN = {
    "lf.losses": lambda reduction: lf.losses.CrossEntropy(reduction=reduction),
    "torch's": lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
    "a function of torch's": lambda reduction: functools.partial(F.cross_entropy, reduction=reduction),
    "a function": lambda reduction: lambda z, y: F.cross_entropy(z, y, reduction="none"),
}


@every
@pytest.mark.parametrize("kind", PLAIN)
def test_a_loss_is_the_losses_of_the_samples(kind, name):
    wanted = trained(
        name, lambda model, x, y: lambda i=slice(None): F.cross_entropy(model(x[i]), y[i], reduction="none")
    )
    for reduction in REDUCTIONS if name in ("SAM", "FocalSAM") else ("mean",):
        loss = PLAIN[kind](reduction)
        assert_same(trained(name, lambda model, x, y: forward_of(model, x), loss), wanted)
        assert getattr(loss, "reduction", reduction) == reduction


WEIGHTED = {
    "lf.losses": lambda reduction: lf.losses.CrossEntropy(weight=WEIGHT, reduction=reduction),
    "torch's": lambda reduction: nn.CrossEntropyLoss(torch.tensor(WEIGHT, dtype=torch.float64), reduction=reduction),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", WEIGHTED)
@every
def test_class_weights_are_those_of_the_mean(name, kind, reduction):
    wanted = trained(name, functools.partial(weighted, weight=WEIGHT))
    assert_same(trained(name, lambda model, x, y: forward_of(model, x), WEIGHTED[kind](reduction)), wanted)


@pytest.mark.parametrize("plan", ("published", "auto"))
@pytest.mark.parametrize("name", ("FocalSAM", "ImbSAM", "SSESAM", "CCSAM", "SAM"))
@pytest.mark.parametrize(
    "make",
    [
        lambda: lf.losses.LogitAdjusted(COUNTS),
        lambda: lf.losses.VS(COUNTS, weight=WEIGHT),
        lambda: lf.losses.LDAM(COUNTS, weight=WEIGHT),
        lambda: lf.losses.Focal(gamma=2.0),
        lambda: lf.losses.CrossEntropy(label_smoothing=0.1, weight=WEIGHT),
        lambda: lf.losses.BalancedSoftmax(COUNTS, label_smoothing=0.1),
    ],
    ids=("LA", "VS", "LDAM", "Focal", "smoothed", "balanced"),
)
def test_every_loss_and_plan(name, make, plan):
    """Against the same loss in a closure, with its ``batch``; a batch in parts, a scaler and a known network too."""
    results = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = network()
        opt = EVERY[name].make(model, lr=0.05, momentum=0.9, model=model, plan="published" if whole else plan)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for x, y in batches(steps=3):
            xs, ys = x.split([5, 11]), list(y.split([5, 11]))
            if whole:
                loss = make()
                loss.reduction = "none"
                closures = [
                    lambda i=slice(None), x=x, y=y, net=model, of=loss, all_of_them=ys: of(
                        net(x[i]), y[i], batch=all_of_them
                    )
                    for x, y in zip(xs, ys, strict=True)
                ]
                opt.step(closures, ys, scaler)
            else:
                opt.step([forward_of(model, x) for x in xs], ys, scaler, loss=make())
            scaler.update()
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


def test_ignored_samples_are_not_in_the_mean():
    model, twin = network(), network()
    x, y = batches(steps=1)[0]
    y = y.clone()
    y[:4] = -100
    opt = lf.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    found = opt.step(lambda: model(x), y, loss=nn.CrossEntropyLoss())
    opt = lf.SAM(twin.parameters(), SGD, rho=0.1, lr=0.1)
    wanted = opt.step(lambda: F.cross_entropy(twin(x[4:]), y[4:], reduction="none"))
    torch.testing.assert_close(found, wanted)
    assert relative_error(flat(model), flat(twin)) < 1e-12


def test_targets_may_be_probabilities():
    model = network()
    x, y = batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    soft = F.one_hot(y, CLASSES).double()
    found = opt.step(lambda: model(x), soft, loss=nn.CrossEntropyLoss())
    torch.testing.assert_close(found, F.cross_entropy(network()(x), y))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {"loss": "mean"}, "loss must be a function"),
        ((None,), {"loss": nn.CrossEntropyLoss()}, "targets must be given"),
        (("y",), {"loss": lambda z, y: F.cross_entropy(z, y)}, "loss must return the per-sample losses"),
        (("y",), {"loss": lambda z, y: z}, "loss must return the per-sample losses"),
    ],
    ids=("no function", "no targets", "a mean", "logits"),
)
def test_what_is_wrong_is_named(arguments, options, message):
    model = network()
    x, y = batches(steps=1)[0]
    before = flat(model)
    opt = lf.SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    targets = y if arguments == ("y",) or options["loss"] == "mean" else None
    with pytest.raises(ValueError, match=message):
        opt.step(lambda: model(x), targets, **options)
    assert torch.equal(flat(model), before)


def test_both_gradients_come_from_one_pass(monkeypatch):
    """Where a network mixes samples, so that nothing else is shared."""
    calls = []
    both = lf.losses.Loss.weighted
    monkeypatch.setattr(lf.losses.Loss, "weighted", lambda *arguments: calls.append(1) or both(*arguments))
    for name, options in (("FocalSAM", {}), ("ImbSAM", {"tail_classes": [2, 3], "class_counts": None})):
        calls.clear()
        wanted = trained(name, lambda model, x, y: lambda: F.cross_entropy(model(x), y, reduction="none"), **options)
        assert_same(trained(name, lambda model, x, y: lambda: model(x), lf.losses.CrossEntropy(), **options), wanted)
        assert len(calls) == 4
