"""What a newcomer does wrong: one line that names the argument and the remedy, and nothing has changed; code 2 for commands.

Tables: ``STEPS`` over every method, ``CREATED`` and ``CALLED`` in Python, ``COMMANDS`` on the command line.
"""

from __future__ import annotations

import copy
import math
import re
import runpy
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import ltsam_fast as lf
from ltsam_fast import backend, data, losses, models
from ltsam_fast.__main__ import main

from .method_rows import EVERY

CLASSES, COUNTS = 4, [50, 20, 5, 2]
X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES
TOLD = tuple(name for name, row in EVERY.items() if row.told)


def network(classes=CLASSES, norm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, classes)]
    return nn.Sequential(*layers)


def contents(value):
    """All that a state dict holds, in a form that compares."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: found for key, one in value.items() if (found := contents(one)) != {}}
    return [contents(one) for one in value] if isinstance(value, (list, tuple)) else value


def refused(call, message, *watched):
    """One line of this package, with nothing changed in what is watched."""
    before = [copy.deepcopy(contents(one.state_dict())) for one in watched]
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    assert re.search(message, said), said
    assert [contents(one.state_dict()) for one in watched] == before


def each(model, x=X, y=Y):
    return lambda i=slice(None): F.cross_entropy(model(x[i]), y[i], reduction="none")


def logits(model):
    return lambda i=slice(None): model(X[i])


def published(opt, model):
    def closure(i=slice(None)):
        opt.zero_grad()
        loss = F.cross_entropy(model(X[i]), Y[i])
        loss.backward()
        return loss

    return closure


def backward_of_each(model):
    def closure(i=slice(None)):
        found = F.cross_entropy(model(X[i]), Y[i], reduction="none")
        found.mean().backward()
        return found

    return closure


def of_a_loop(model):
    """Closures that all evaluate the loop's last samples."""
    closures = []
    for samples in (slice(0, 6), slice(6, 12)):

        def closure(i=slice(None)):
            return each(model, X[samples], Y[samples])(i)  # noqa: B023

        closures.append(closure)
    return closures


def scaled(scaler, model):
    return lambda i=slice(None): scaler.scale(each(model)(i))


def by_scaler(opt, model, unscale=False, closure=()):
    """The calls of an ordinary loop with mixed precision."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt, *closure)


def with_label(label):
    return torch.where(Y == 2, label, Y)


PUBLISHED = r"reduction='none'; a closure that calls backward\(\) itself, .* is for ltsam_fast\.compat\.SAM$"
TENSOR = "^targets must be a tensor of the samples' classes, .*: give torch.as_tensor"
INTEGER = r"^targets must be a 1-D integer tensor of 12 labels, .*torch\.float32: give targets\.long\(\)"
EMPTY = "a batch without samples: skip it, or give the loader drop_last=True"
IGNORED = r"^targets must lie in \[0, 4\), got -100\.\.\.3: drop these samples, or, .* weight 0"
TOO_HIGH = r"^targets must lie in \[0, 4\), got 0\.\.\.9: give one class count, and one output of the model, per class"
LOGITS = r"^closure must return logits, shape \(B, C\), where step\(\) is given loss=, got "
ALL = tuple(EVERY)
# What is wrong: (methods, what is called with the optimizer and the model, what the message says)
STEPS = {
    "published closure": (ALL, lambda o, m: o.step(published(o, m), Y), PUBLISHED),
    "backward of each": (ALL, lambda o, m: o.step(backward_of_each(m), Y), f"without calling backward.*{PUBLISHED}"),
    "mean": (ALL, lambda o, m: o.step(lambda i=slice(None): each(m)(i).mean(), Y), PUBLISHED),
    "item": (ALL, lambda o, m: o.step(lambda i=slice(None): each(m)(i).mean().item(), Y), PUBLISHED),
    "None returned": (ALL, lambda o, m: o.step(lambda i=slice(None): None, Y), PUBLISHED),
    "loss": (ALL, lambda o, m: o.step(torch.ones(12), Y), r"^closure must be given: step\(closure\), with a function"),
    "no closure": (ALL, lambda o, m: o.step(), "^closure must be given"),
    "a loop's closures": (ALL, lambda o, m: o.step(of_a_loop(m), [Y[:6], Y[6:]]), r"^closure\[1\] must have samples of"),
    "one closure twice": (ALL, lambda o, m: o.step([each(m)] * 2, [Y, Y + 0]), r"^closure\[1\] must have .*closure_of\(x, y\)"),
    "two arguments": (ALL, lambda o, m: o.step(lambda x, y: each(m, x, y)(), Y), "^closure must need .*, got a function of x,"),
    "another network": (
        tuple(name for name in ALL if name != "SparseSAM"),  # which has made a mask by then
        lambda o, m: o.step(each(network()), Y),
        "^closure must return losses that depend on the optimizer's parameters, got some that depend on none of them",
    ),
    "scaler.step": (ALL, by_scaler, r"^scaler\.step\(optimizer, closure\) is not .*: call step\(closure, scaler=scaler\)"),
    "scaler.step, closure": (ALL, lambda o, m: by_scaler(o, m, closure=[each(m)]), r"^scaler\.step\(optimizer, closure\) is"),
    "unscale_": (ALL, lambda o, m: by_scaler(o, m, True), r"^scaler\.step\(optimizer, closure\) is not supported"),
    "unscale_, closure": (ALL, lambda o, m: by_scaler(o, m, True, [each(m)]), r"^scaler\.step\(optimizer, closure\) is not"),
    "scale": (
        ALL,
        lambda o, m: (lambda scaler: o.step(scaled(scaler, m), Y, scaler))(torch.amp.GradScaler("cpu")),
        r"^closure must return the losses as they are, got scaler\.scale\(losses\): step\(scaler=\) scales them",
    ),
    "list": (ALL, lambda o, m: o.step(each(m), Y.tolist()), TENSOR),
    "lists": (ALL, lambda o, m: o.step([each(m)] * 2, [Y.tolist()] * 2), TENSOR),
    "one list": (ALL, lambda o, m: o.step([each(m)] * 2, [Y, Y.tolist()]), TENSOR),
    "array": (ALL, lambda o, m: o.step(each(m), Y.numpy()), TENSOR),
    "long array": (ALL, lambda o, m: o.step(each(m), np.arange(5000)), TENSOR),
    "mapping": (ALL, lambda o, m: o.step(each(m), {"labels": Y}), TENSOR),
    "scaler as targets": (ALL, lambda o, m: o.step(each(m), torch.amp.GradScaler("cpu", enabled=False)), TENSOR),
    "0-d": (ALL, lambda o, m: o.step(each(m), torch.tensor(3)), r"^targets must have shape \(B,\).* of shape \(\)"),
    "empty": (ALL, lambda o, m: o.step(each(m, X[:0], Y[:0]), Y[:0]), f"targets have shape .*{EMPTY}"),
    "empty, not told": (
        tuple(name for name in ALL if name not in TOLD),
        lambda o, m: o.step(lambda i=slice(None): m(X[:0])[:, 0]),
        f"^closure returned losses of .*{EMPTY}",
    ),
    "float": (TOLD, lambda o, m: o.step(each(m), Y.float()), INTEGER),
    "-100": (TOLD, lambda o, m: o.step(each(m), with_label(-100)), IGNORED),
    "too high": (TOLD, lambda o, m: o.step(each(m), with_label(9)), TOO_HIGH),
    "one-hot": (TOLD, lambda o, m: o.step(each(m), F.one_hot(Y)), r"^targets must be a 1-D .*got \(12, 4\), torch\.int64"),
    "scaler": (ALL, lambda o, m: o.step(each(m), Y, True), "^scaler must be a torch.amp.GradScaler or None, got True"),
    "loss=, float": (ALL, lambda o, m: o.step(logits(m), Y.float(), loss=F.cross_entropy), INTEGER),
    "loss=, list": (ALL, lambda o, m: o.step(logits(m), Y.tolist(), loss=losses.CrossEntropy()), TENSOR),
    "loss=, -100": (ALL, lambda o, m: o.step(logits(m), with_label(-100), loss=F.cross_entropy), IGNORED),
    "loss=, too high": (ALL, lambda o, m: o.step(logits(m), with_label(9), loss=nn.CrossEntropyLoss()), TOO_HIGH),
    "loss=, ours": (ALL, lambda o, m: o.step(logits(m), with_label(9), loss=losses.CrossEntropy()), TOO_HIGH),
    "loss=, no targets": (ALL, lambda o, m: o.step(logits(m), loss=F.cross_entropy), "^targets must be given"),
    "loss=, a loss": (ALL, lambda o, m: o.step(each(m), Y, loss=F.cross_entropy), LOGITS),
    "loss=, mean": (ALL, lambda o, m: o.step(lambda i=slice(None): each(m)(i).mean(), Y, loss=min), rf"{LOGITS}\(\)"),
    "loss=, outputs": (
        ALL, lambda o, m: o.step(lambda i=slice(None): {"logits": m(X[i])}, Y, loss=F.cross_entropy), f"{LOGITS}dict"
    ),
    "loss=, name": (ALL, lambda o, m: o.step(logits(m), Y, loss="ce"), "^loss must be a function .*, got 'ce'"),
    "loss=, class": (ALL, lambda o, m: o.step(logits(m), Y, loss=nn.CrossEntropyLoss), "a loss's instance, got <class"),
    "loss=, of a mean": (
        ALL, lambda o, m: o.step(logits(m), Y, loss=lambda a, b: F.cross_entropy(a, b)), r"^loss must return .*reduction"
    ),
    "loss=, other classes": (
        ALL, lambda o, m: o.step(logits(m), Y, loss=losses.LogitAdjusted([5, 2])), r"must have shape \(B, 2\), .*got"
    ),
}  # fmt: skip


def made(name, model, base=SGD, /, **options):
    more = {"momentum": 0.9} if base is SGD else {}
    return EVERY[name].make(model, base, **{"lr": 0.1, "model": model, "class_counts": COUNTS, **more, **options})


@pytest.mark.parametrize("what", STEPS)
def test_a_wrong_step(what):
    names, call, message = STEPS[what]
    for name in names:
        model = network()
        opt = made(name, model)
        refused(lambda opt=opt, model=model: call(opt, model), message, opt, model)
        opt.step(each(model), Y)


def test_closures_of_a_loop_that_bind_their_samples():
    model = network()
    opt = made("FocalSAM", model)
    for closures in (
        [lambda i=slice(None), k=k: each(model, X[k], Y[k])(i) for k in (slice(0, 6), slice(6, 12))],
        [lambda i=slice(None), x=x, y=y: each(model, x, y)(i) for x, y in ((X[:6], Y[:6]), (X[6:], Y[6:]))],
        [each(model, X[:6], Y[:6]), each(model, X[6:], Y[6:])],
    ):
        opt.step(closures, [Y[:6], Y[6:]])


@pytest.mark.parametrize("plan", ["auto", "published"])
@pytest.mark.parametrize("name", EVERY)
def test_a_model_that_is_another(name, plan):
    model = network()
    opt = made(name, model, plan=plan)
    opt.step(each(model), Y)
    opt.model = network()
    refused(
        lambda: opt.step(each(model), Y), "^model must be the network whose parameters the optimizer has", opt, model
    )
    opt.model = nn.Sequential(model, nn.Softmax(1))
    opt.step(each(model), Y)
    opt.model = nn.Flatten()  # it trains nothing, and may have running statistics
    opt.step(each(model), Y)


@pytest.mark.parametrize("name", EVERY)
def test_a_scaler_that_is_not_updated(name):
    model, scaler = network(), torch.amp.GradScaler("cpu")
    opt = made(name, model)
    opt.step(each(model), Y, scaler)
    refused(lambda: opt.step(each(model), Y, scaler), r"^scaler\.update\(\) must be called after each step", opt, model)
    scaler.update()
    opt.step(each(model), Y, scaler)


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if row.once])
def test_losses_of_an_earlier_forward_pass(name):
    """What one pass would differentiate at the weights of another time is noticed where autograd keeps weights."""
    model = network(norm=False)
    opt = made(name, model)
    opt.step(each(model), Y)
    found = each(model)()
    refused(
        lambda: opt.step(lambda i=slice(None): found[i], Y),
        "^closure must run the whole forward",
        opt,
        model,
    )


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), losses.CrossEntropy()])
@pytest.mark.parametrize("name", TOLD)
def test_class_counts_of_fewer_classes_than_the_model_has(name, loss):
    model = network(6)
    opt = made(name, model)
    refused(
        lambda: opt.step(logits(model), Y, loss=loss),
        r"^class_counts, or class_weights, has 4 entries, but the model's outputs have 6 classes: give one per class",
        opt, model,
    )  # fmt: skip


def test_labels_that_a_loss_of_torch_ignores_are_left_to_it():
    model = network()
    opt = made("SAM", model)
    wanted = F.cross_entropy(model(X), with_label(-100)).detach()
    assert torch.allclose(opt.step(logits(model), with_label(-100), loss=nn.CrossEntropyLoss()), wanted)


NUMBER = "must be a finite number >= 0, got"
# (method, keywords of the constructor, the message)
CREATED = [
    *[(name, {"momentum": 2}, r"^momentum must be a number in \[0, 1\), got 2$") for name in EVERY],
    *[
        (name, {"base": "sgd"}, "^base_optimizer must be a class such as torch.optim.SGD, got str 'sgd'")
        for name in EVERY
    ],
    *[(name, {"class_counts": torch.zeros(1000)}, "^class_counts must be a list of finite numbers") for name in EVERY],
    *[
        (
            name,
            {"class_counts": {0: 9, 1: 5}},
            r"^class_counts must be .*, got \{0: 9, 1: 5\}: .*\[class_counts\[c\] for c in",
        )
        for name in EVERY
    ],
    *[
        (name, {"class_counts": [0.75, 0.25]}, r"^class_counts must be .*, got shares of them, \[0\.75, 0")
        for name in EVERY
    ],
    ("SAM", {"rho": torch.ones(100, 100)}, rf"^rho {NUMBER} tensor\("),
    ("SAM", {"rho": [0.1]}, rf"^rho {NUMBER} \[0\.1\]"),
    ("SAM", {"adaptive": "yes"}, "^adaptive must be True or False, got 'yes'"),
    ("SAM", {"momentum": 1.0}, r"^momentum must be a number in \[0, 1\), got 1\.0"),
    ("SAM", {"momentum": -1}, r"^momentum must be a number in \[0, 1\), got -1"),
    ("SAM", {"lr": "0.1"}, f"^lr {NUMBER} '0.1'"),
    ("SAM", {"lr": math.nan}, f"^lr {NUMBER} nan"),
    ("SAM", {"weight_decay": math.inf}, f"^weight_decay {NUMBER} inf"),
    ("SAM", {"dampening": math.nan}, "^dampening must be a finite number, got nan"),
    ("SAM", {"base": RMSprop, "momentum": 3}, r"^momentum must be a number in \[0, 1\), got 3"),
    ("SAM", {"base": Adam, "betas": 0.9}, r"^betas must be a pair of numbers in \[0, 1\), got 0\.9"),
    ("SAM", {"base": Adam, "betas": (0.9,)}, "^betas must be a pair"),
    ("SAM", {"base": Adam, "eps": "x"}, f"^eps {NUMBER} 'x'"),
    ("SAM", {"base": network()}, "^base_optimizer must be a class .*, got Sequential Sequential\\("),
    ("SAM", {"base": SGD(network().parameters())}, "^base_optimizer must be a class .*, got SGD SGD \\("),
    ("SAM", {"base": torch.optim.LBFGS}, "^base_optimizer must step without a closure, which LBFGS needs: use"),
    ("SAM", {"model": SGD(network().parameters())}, r"^model must be a torch\.nn\.Module or None, got SGD"),
    ("SAM", {"plan": "fast"}, "^plan must be one of 'auto', 'published', 'require', got 'fast'"),
    ("SAM", {"active": 2}, r'^active must be "all", a share .*, got 2'),
    ("SAM", {"active": 0.5}, r"^total_steps must be given with active=0\.5"),
    ("SAM", {"rho_schedule": "cosin"}, "^rho_schedule must be one of 'constant', .*, got 'cosin'"),
    ("SAM", {"total_steps": 1.5}, r"^total_steps must be an integer >= 1, got 1\.5"),
    ("FocalSAM", {"lam": "x"}, f"^lam {NUMBER} 'x'"),
    ("FocalSAM", {"gamma": [1]}, "^gamma must be a number, or one for each of the 4 classes"),
    ("FocalSAM", {"class_counts": None, "class_weights": ([1, 2], [1])}, r"^class_weights must be a pair \(u, v\)"),
    ("ImbSAM", {"tail_classes": [7]}, r"^tail_classes must lie in \[0, 4\), got \[7\]"),
    *[
        (
            "ImbSAM",
            {"tail_classes": mask},
            r"^tail_classes must be numbers of classes, got .*: give .*mask\)\.nonzero\(\)$",
        )
        for mask in ([False, False, True, True], np.array(COUNTS) < 20, torch.tensor(COUNTS) < 20)
    ],
    ("ImbSAM", {"tail_classes": [2.5]}, r"^tail_classes must be numbers of classes, got \[2\.5\]$"),
    ("SSESAM", {"switch_step": "70%"}, "^switch_step must be an integer >= 0, got '70%'"),
    ("CCSAM", {"head": 3}, "^head must be a module, or parameters, of those given as params, got 3"),
    ("CCSAM", {"head": "fc"}, "^head must be a module, or parameters"),
    ("CCSAM", {"class_counts": None}, "^class_counts must be given for CCSAM"),
    (
        "GSAM",
        {"rho_min": 0.5, "rho_max": None},
        r"^rho_min and rho_max must both be given, or neither, got 0\.5 and None",
    ),
    ("MicroBatchSAM", {"m": 1.5}, r"^m must be an integer >= 1, got 1\.5"),
    ("MomentumSAM", {"direction": "back"}, "^direction must be one of .*, got 'back'"),
    ("VaSSO", {"theta": 2}, r"^theta must be a number in \[0, 1\], got 2"),
]


@pytest.mark.parametrize(("name", "options", "message"), CREATED)
def test_a_wrong_constructor(name, options, message):
    model, options = network(), dict(options)
    refused(lambda: made(name, model, options.pop("base", SGD), **options), message, model)


WEIGHT = nn.Parameter(torch.zeros(2))
ONES = torch.ones(12, CLASSES)
IMBALANCE = "^imbalance must be from 1 to n_max = 100, .*, got"
# (what is called, the message)
CALLED = [
    (lambda: lf.SAM(nn.Linear(2, 2), SGD), r"^params must be parameters, .* such as model\.parameters\(\), got Linear"),
    (lambda: lf.SAM(None, SGD), r"^params must be parameters, .* such as model\.parameters\(\), got None"),
    (lambda: lf.SAM([{"rho": 0.1}], SGD), r"^params\[0\] must have 'params'"),
    (lambda: lf.SAM({"params": [WEIGHT]}, SGD), "^params must be parameters, or a list of groups of them, .*, got {'params'"),
    (lambda: lf.SAM([{"params": nn.Linear(2, 2)}], SGD), r"^params\[0\]\['params'\] must be parameters, .*, got Linear"),
    (lambda: lf.SAM(iter([]), SGD), "^params is an empty parameter list: a generator, .*, can be read once only"),
    (lambda: made("SAM", network()).add_param_group({"params": nn.Linear(2, 2)}), "^params must be parameters, .*, got Linear"),
    (lambda: lf.SAM([{"params": [WEIGHT], "momentum": 2}], SGD, lr=0.1), "^momentum must be"),
    (lambda: made("SAM", network()).add_param_group(3), "^param_group must be .*, got 3"),
    (lambda: made("SAM", network()).add_param_group({"params": [WEIGHT], "momentum": 2}), "^momentum must be"),
    (lambda: made("SAM", network()).load_state_dict(3), "^state_dict must have state and param_groups, .* this int lacks"),
    (lambda: made("SAM", network()).load_state_dict({}), r"^state_dict must have state and param_groups, .* this dict lacks"),
    (lambda: lf.create("sma", [WEIGHT], SGD), "^there is no method 'sma': did you mean 'sam'"),
    (lambda: lf.create(3, [WEIGHT], SGD), "^there is no method 3"),
    (lambda: lf.compat.ImbSAM(network(), SGD([WEIGHT])), r"^optimizer must be a torch\.optim\.Optimizer, .*, got Sequential"),
    (lambda: lf.compat.ASAM(SGD([WEIGHT]), SGD([WEIGHT])), r"^model must be a torch\.nn\.Module, .*, got SGD"),
    (
        lambda: lf.diagnostics.loss_slice(network(), nn.CrossEntropyLoss(reduction="none"), X, Y, classes=np.array(COUNTS) < 9),
        r"^classes must be numbers of classes, got array\(.*: give .*mask\)\.nonzero\(\)",
    ),
    (lambda: lf.graph_step("m", min, made("SAM", network()), (X, Y)), "^model must be a torch.nn.Module, got 'm'"),
    (lambda: lf.graph_step(network(), min, SGD([WEIGHT]), (X, Y)), "^optimizer must be a method of ltsam_fast, got SGD"),
    (lambda: lf.graph_step(network(), min, made("SAM", network()), (X, Y), warmup=0), "^warmup must be .* >= 1, got 0"),
    (lambda: lf.use_backend("tpu"), "^unknown backend 'tpu': choose one of"),
    (lambda: losses.LogitAdjusted(None), "^class_counts must be numbers of samples, one per class, got None"),
    (lambda: losses.LogitAdjusted(COUNTS, tau="x"), f"^tau {NUMBER} 'x'"),
    (lambda: losses.LDAM(COUNTS, s=0), "^s must be a finite number > 0, got 0"),
    (lambda: losses.LDAM([5, 0]), r"^class_counts\[1\] is 0, .*: leave the class out or count it as 1"),
    (lambda: losses.CrossEntropy(label_smoothing=2), r"^label_smoothing must be a number in \[0, 1\], got 2"),
    (lambda: losses.CrossEntropy(reduction="avg"), "^reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    (lambda: losses.CrossEntropy(COUNTS, weight=torch.zeros(999) - 1), "^weight must be a list .*, got tensor"),
    (lambda: losses.ClassBalanced(COUNTS, beta=1), r"^beta must be a number in \[0, 1\), got 1"),
    (lambda: losses.CrossEntropy()(ONES, Y.float()), INTEGER),
    (lambda: losses.CrossEntropy()(ONES, Y.tolist()), TENSOR),
    (lambda: losses.CrossEntropy()(ONES, Y.numpy()), TENSOR),
    (lambda: losses.CrossEntropy()(ONES, with_label(-100)), IGNORED),
    (lambda: losses.CrossEntropy()(ONES, with_label(9)), TOO_HIGH),
    (lambda: losses.CrossEntropy()(ONES.numpy(), Y), r"^logits must have shape \(B, C\) with C > 0, got ndarray"),
    (lambda: losses.CrossEntropy(COUNTS)(ONES[:, :3], Y), r"^logits must have shape \(B, 4\), .*, got \(12, 3\)"),
    (lambda: losses.deferred_reweighting(1, COUNTS, start="x"), f"^start {NUMBER} 'x'"),
    (lambda: data.longtail_counts(0, 10, 10), "^n_max must be a whole number >= 1, got 0"),
    (lambda: data.longtail_counts(100, 1, 10), "^classes must be a whole number >= 2, got 1"),
    (lambda: data.longtail_counts(100, 10, "x"), f"{IMBALANCE} 'x'"),
    (lambda: data.longtail_counts(100, 10, 1000), f"{IMBALANCE} 1000"),
    (lambda: data.longtail_counts(100, 10, 10, "expo"), "^profile must be 'exp' or 'step', got 'expo'"),
    (lambda: data.longtail_subset([0, 1], [5, 5]), r"^counts\[0\] must be at most 1, .*, got 5"),
    (lambda: data.longtail_subset([0, 1], [1, 1], seed=-1), r"^seed must be a whole number in \[0, 4294967296\), got -1"),
    (lambda: data.longtail_subset([0.5], [1]), "^labels must be whole numbers in one dimension, got float64"),
    (lambda: data.shot_split([1, 2], many="x"), "^few must be from 0 to many = 'x', got 20"),
    (lambda: data.shot_split([-1]), r"^class_counts must be one number >= 0 for each class, got \[-1\]"),
    (lambda: data.load("/nowhere", "train"), "^/nowhere: no such file or folder, and not the word 'digits'"),
    (lambda: models.create("resnt32", 10, (3, 8, 8)), "^there is no model 'resnt32': did you mean 'resnet32'"),
    (lambda: models.create("resnet32", 0, (3, 8, 8)), "^num_classes must be a whole number >= 1, got 0"),
    (lambda: models.create("resnet32", 10, (3, 8)), r"^image_shape must be channels, height and width, got \(3, 8\)"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["ImbSAM", "SSESAM"])
def test_an_empty_tail(name):
    """By a limit that none is below; not where it is meant."""
    model = network()
    opt = getattr(lf, name)(model.parameters(), SGD, class_counts=[9, 8, 7, 7], eta=7, lr=0.1)
    with pytest.warns(
        UserWarning, match=rf"^eta = 7 leaves no class in the tail, which {name} is about: .* has 7 samples$"
    ):
        opt.step(each(model), Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(each(model), Y)
        opt.eta = 8
        opt.step(each(model), Y)
        if name == "ImbSAM":
            opt.tail_classes = []
            opt.step(each(model), Y)


@pytest.mark.parametrize("interface", ["closure", "phases"])
def test_more_steps_than_total_steps(interface):
    """As where that is the number of epochs: said once."""
    model, row = network(), EVERY["SAM"]
    opt = made("SAM", model, active=0.5, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row.drive(interface, opt, model, [(X, Y)] * 2, lambda model, x, y: each(model, x, y)())
    with pytest.warns(
        UserWarning, match="^total_steps = 2 steps have been taken, .*: it counts steps, not epochs$"
    ) as said:
        row.drive(interface, opt, model, [(X, Y)] * 2, lambda model, x, y: each(model, x, y)())
    assert len(said) == 1


@pytest.mark.parametrize(("call", "message"), CALLED)
def test_a_wrong_call(call, message):
    refused(call, message)


@pytest.mark.parametrize(("attribute", "value"), [("rho", -1), ("plan", "fast"), ("model", 3), ("total_steps", 0)])
def test_a_wrong_attribute(attribute, value):
    opt = made("SAM", network())
    refused(lambda: setattr(opt, attribute, value), f"^{attribute} must be", opt)


@pytest.mark.parametrize("name", EVERY)
def test_phases_out_of_turn(name):
    model = network()
    opt = made(name, model)
    refused(opt.second_step, r"^second_step\(\) was called", opt, model)


# --- trainers


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_that_keeps_training_step(lightning, derived):
    from ltsam_fast.trainers.lightning import SharpnessAwareModule

    class Module(SharpnessAwareModule if derived else lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return made("SAM", self.net)

    module = Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6)
    weights = copy.deepcopy(dict(module.named_parameters()))
    refused(
        lambda: trainer.fit(module, loader),
        r"training_step\(\).*training_losses\(\)|training_losses\(\).*training_step",
    )
    assert all(torch.equal(weights[name], one) for name, one in module.named_parameters())


def test_wrong_arguments_of_accelerate():
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from accelerate import Accelerator

    from ltsam_fast.trainers.accelerate import AcceleratedStep

    accelerator, model = Accelerator(cpu=True), network()
    wrapped, opt = accelerator.prepare(model, made("FocalSAM", model))
    refused(
        lambda: AcceleratedStep(accelerator, wrapped, opt.optimizer, each(model)),
        "^optimizer must be one of ltsam_fast's",
    )
    refused(lambda: AcceleratedStep(None, wrapped, opt, each(model)), "^accelerator must be an Accelerator, got None")
    refused(
        lambda: AcceleratedStep(accelerator, wrapped, opt, "ce"), "^losses must be a function of the batch, got 'ce'"
    )
    mean = AcceleratedStep(accelerator, wrapped, opt, lambda batch: each(wrapped)().mean())
    refused(lambda: mean((X, Y)), "^losses must return the per-sample losses", model)
    untold = AcceleratedStep(accelerator, wrapped, opt, lambda batch: each(wrapped)())
    refused(lambda: untold(X), "^targets must be given", model)


# --- the command line

# The command line: what the line on stderr says.
COMMANDS = {
    "trian": "there is no command 'trian': did you mean 'train'?",
    "--versoin": "there is no argument '--versoin'",
    "info --fast": "there is no argument '--fast'",
    "demo --methods sma": "--methods: there is no method 'sma': did you mean 'sam'?",
    "demo --methods ,": "--methods: there is no method ''",
    "demo --seeds x": "--seeds: invalid int value: 'x'",
    "demo --epochs 0": "--epochs: must be at least 1, got 0",
    "demo --imbalance 1e9": "imbalance must be from 1 to n_max = 134",
    "demo --out /dev/null/x": "/dev/null/x: Not a directory",
    "demo --quik": "there is no argument '--quik': did you mean '--quick'?",
    "train --method focal_smam": "there is no method 'focal_smam': did you mean 'focal_sam'?",
    "train --method Focal_SAM": "did you mean 'focal_sam'?",
    "train --loss LA2": "there is no loss 'LA2': did you mean 'la'?",
    "train --model resnet33": "there is no model 'resnet33': did you mean 'resnet32'?",
    "train --model timm/": "there is no model 'timm/'",
    "train --method sam --set rhoo=0.1": "sam has no option 'rhoo': did you mean 'rho'?",
    "train --method sam --set rho": "--set/--options: must be NAME=VALUE, got 'rho'",
    "train --method sam --set rho=abc": "rho must be a finite number >= 0, got 'abc'",
    "train --method sam --set sma.rho=1": "there is no method or loss 'sma': did you mean 'sam'?",
    "train --method sam --set active=2": "active must be",
    "train --method sam --set total_steps=0": "total_steps must be an integer >= 1, got 0",
    "train --method asam --set adaptive=false": "asam has no option 'adaptive'",
    "train --method focal_sam --set momentum=0.1": "focal_sam has no option 'momentum'",
    "train --method sse_sam --set switch_step=x%": "switch_step must be a whole number, or as in",
    "train --method sse_sam --set switch_step=inf%": "switch_step must be a whole number, or as in",
    "train --method sam --active inf%:": "active must be all, 0.3,",
    "train --optimizer adam --method sam --set betas=[2,3]": "betas must be a pair of numbers in [0, 1), got [2, 3]",
    "train --loss la --loss-set tua=1": "la has no option 'tua': did you mean 'tau'?",
    "train --loss ldam --loss-set s=0": "s must be a finite number > 0, got 0",
    "train --lr abc": "lr must be a valid number, got 'abc'",
    "train --lr nan": "lr must be greater than 0, got 'nan'",
    "train --lr": "--lr: expected one argument",
    "train --momentum 2": "momentum must be less than 1, got '2'",
    "train --weight-decay -1": "weight_decay must be greater than or equal to 0, got '-1'",
    "train --warmup 50 --epochs 3": "warmup must be at most epochs = 3, got 50",
    "train --schedule step --milestones 180,160": "milestones must increase from 0 or more to less than epochs = 40",
    "train --schedule step --milestones 5,7 --epochs 6": "less than epochs = 6, got 5,7",
    "train --schedule step --epochs 6": "less than epochs = 6, got 160,180",
    "train --schedule step --milestones a,b": "milestones.0 must be a valid integer, got 'a'",
    "train --schedule cosin": "schedule must be 'cosine', 'step' or 'constant', got 'cosin'",
    "train --drw-beta 0.99": "drw_beta must be given with drw_start, its first epoch, got 0.99",
    "train --drw-beta 1.5 --drw-start 1": "drw_beta must be less than 1, got '1.5'",
    "train --drw-start -1": "drw_start must be greater than or equal to 0, got '-1'",
    "train --epochs 1.5": "epochs must be a valid integer, got '1.5'",
    "train --batch-size 0": "batch_size must be greater than or equal to 1, got '0'",
    "train --seed -1": "seed must be greater than or equal to 0, got '-1'",
    "train --seed 4294967296": "seed must be less than 4294967296, got '4294967296'",
    "train --device gpu": "device must be auto, cpu, cuda or cuda:NUMBER, got 'gpu'",
    "train --device meta": "device must be auto, cpu, cuda or cuda:NUMBER, got 'meta'",
    "train --threads 0": "threads must be greater than or equal to 1, got '0'",
    "train --imbalance 0.5": "imbalance must be greater than or equal to 1, got '0.5'",
    "train --profile none --imbalance 10": "imbalance must not be given with profile 'none'",
    "train --many 5 --few 10": "few must be at most many = 5, got 10",
    "train --nesterov --momentum 0": "nesterov needs optimizer sgd and a momentum > 0",
    "train --optimizer sdg": "optimizer must be 'sgd', 'adam' or 'adamw', got 'sdg'",
    "train --recipe cifar10": "recipe must be one of digits-lt, cifar10-lt, cifar100-lt, got 'cifar10'",
    "train --recipe cifar10-lt": "recipe cifar10-lt needs data",
    "train --config /nowhere.toml": "config /nowhere.toml: No such file",
    "train --metod sam": "there is no argument '--metod': did you mean '--method'?",
    "train sam": "there is no argument 'sam'",
    "train --data /nowhere": "/nowhere",
    "train --format cifra": "format must be",
    "train --classes 11": "has 10 classes, not 11",
    "train --resume": "no checkpoint",
    "train --out /dev/null/x": "out /dev/null/x",
    "compare --methods sma,sam": "there is no method 'sma': did you mean 'sam'?",
    "compare --methods ,": "there is no method ''. There are sgd, asam",
    "compare --losses ec": "there is no loss 'ec'",
    "compare --seeds a": "seeds.0 must be a valid integer, got 'a'",
    "compare --seeds -1": "seed must be greater than or equal to 0, got -1",
    "compare --jobs 0": "jobs must be greater than or equal to 1, got '0'",
    "compare --limit nan": "limit must be greater than or equal to 0, got 'nan'",
    "compare --set rhoo=1": "has an option 'rhoo': did you mean 'rho'?",
    "compare --method sam": "there is no argument '--method': did you mean '--methods'?",
    "compare --warmup 1000": "warmup must be at most epochs = 40, got 1000",
    "diagnose": "the following arguments are required: CHECKPOINT",
    "diagnose /nowhere": "/nowhere",
    "diagnose x --per-class 0": "per_class must be greater than or equal to 1, got '0'",
    "diagnose x --rho inf": "rho must be a finite number, got 'inf'",
    "diagnose x --splt test": "there is no argument '--splt': did you mean '--split'?",
    "examples.plain_loop --method sma": "there is no method 'sma': did you mean 'sam'?",
    "examples.plain_loop --epochs 0": "--epochs: must be at least 1, got 0",
    "examples.plain_loop --lr -1": "lr must be a finite number >= 0, got -1.0",
    "examples.plain_loop --clip -1": "max_grad_norm must be a finite number >= 0, got -1.0",
    "examples.plain_loop --seed -1": "--seed: must be a whole number in [0, 2^32), got -1",
    "examples.plain_loop --accumulate 65": "--accumulate: must be at most 64, got 65",
    "examples.accelerate_loop --metod sam": "there is no argument '--metod': did you mean '--method'?",
    "examples.lightning_module --epochs x": "--epochs: invalid int value: 'x'",
    "examples.hugging_face_lora --method sgd": "there is no method 'sgd'",
}


def wrong(line, said, monkeypatch, tmp_path, capsys):
    """Code 2, one line on stderr, nothing on stdout and no file."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = line.split(" ") if line else ["train"]
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        if program.startswith("examples."):
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            runpy.run_module(f"ltsam_fast.{program}", run_name="__main__")
        else:
            main(line.split(" ") if line else [])
    torch.set_num_threads(threads)
    output, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert errors.count("\n") == 1 and said in errors, errors
    assert not output and not list(tmp_path.iterdir())


NEEDS = {
    "demo": ("sklearn", "matplotlib", "rich"),
    "examples.plain_loop": ("sklearn",),
    "examples.accelerate_loop": ("sklearn", "accelerate"),
    "examples.lightning_module": ("sklearn", "lightning"),
    "examples.hugging_face_lora": ("transformers", "peft"),
    "train": ("sklearn", "rich", "PIL", "pydantic_settings"),
    "compare": ("sklearn", "rich", "PIL", "pydantic_settings", "matplotlib"),
    "diagnose": ("rich", "pydantic_settings"),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_command_line(line, monkeypatch, tmp_path, capsys):
    for module in NEEDS.get(line.partition(" ")[0], ()):
        pytest.importorskip(module)
    wrong(line, COMMANDS[line], monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("value", ["tpu", "cuda"])
@pytest.mark.parametrize("line", ["info", "demo", "train", "compare", "examples.plain_loop"])
def test_a_backend_that_is_not_to_be_had(line, value, monkeypatch, tmp_path, capsys):
    for module in NEEDS.get(line, ()):
        pytest.importorskip(module)
    monkeypatch.setattr(backend, "_why_not_cuda", lambda: "not built")
    monkeypatch.setattr(backend, "_resolved", {})
    monkeypatch.setenv(backend.VARIABLE, value)
    wrong(line, f"{backend.VARIABLE}={value} ", monkeypatch, tmp_path, capsys)


# The program: the package that is missing, and its extra.
MISSING = {
    "demo": ("matplotlib", "demo"),
    "examples.plain_loop": ("sklearn", "demo"),
    "examples.accelerate_loop": ("accelerate", "accelerate"),
    "examples.lightning_module": ("lightning", "lightning"),
    "examples.hugging_face_lora": ("transformers", "hugging-face"),
    "train": ("rich", "train"),
    "compare": ("pydantic_settings", "train"),
    "evidence": ("pydantic", "train"),
    "diagnose": ("ruamel", "train"),
}


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_extra(line, monkeypatch, tmp_path, capsys):
    package, extra = MISSING[line]
    monkeypatch.setattr(lf, "train", None, raising=False)  # it is imported anew
    for module in list(sys.modules):
        if module.startswith((f"{package}.", "ltsam_fast.train")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    wrong(line, f"needs {package}: pip install 'ltsam_fast[{extra}]'", monkeypatch, tmp_path, capsys)
