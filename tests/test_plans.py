"""Whatever way a step takes, its result is the published one; and it takes the cheaper way where there is one."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import ltsam_fast as lf
from ltsam_fast import models
from ltsam_fast.optim import plan as plans
from ltsam_fast.shared import NotShared, SharedBackward
from ltsam_fast.shared.products import products_exceed

from .conftest import LEAST_WORK
from .method_rows import EVERY, every, phased
from .networks import Encoder, Tied
from .oracles import BATCH, COUNTS, FEATURES, batches, flat, losses, network, relative_error

CLASSES = 4
CLASS_WISE = {
    "FocalSAM": {"class_counts": COUNTS, "gamma": 2.0, "lam": 0.6},
    "ImbSAM": {"class_counts": COUNTS, "eta": 10},
    "SSESAM": {"class_counts": COUNTS, "eta": 10, "tail_rho": 0.2, "switch_step": 2},
    "CCSAM": {"class_counts": COUNTS, "scope": "all", "noise_ratio": 1e-2},
}


class Block(nn.Module):
    """A residual block, perhaps in an activation checkpoint."""

    def __init__(self, width, reentrant):
        super().__init__()
        self.norm, self.reentrant = nn.LayerNorm(width), reentrant
        self.body = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))

    def inner(self, h):
        return self.body(self.norm(h))

    def forward(self, h):
        if self.reentrant is None:
            return h + self.inner(h)
        return h + checkpoint(self.inner, h, use_reentrant=self.reentrant)


class Residual(nn.Module):
    """An MLP with layer norms, and a weight that no module's call shows."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.stem, self.shift = nn.Linear(FEATURES, 10), nn.Parameter(torch.randn(10))
        self.blocks = nn.Sequential(*(Block(10, reentrant) for _ in range(3)))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x) + self.shift))


def compiled():
    torch._dynamo.reset()  # else it takes graphs of another test, which may be differentiated only once
    model = Residual()
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
    return model


def prompted():
    """A trained token in front of a frozen transformer."""
    model = Encoder(True)
    model.prompt = nn.Parameter(torch.randn(1, 1, 5))
    inner = model.forward
    model.forward = lambda x: inner(torch.cat([model.prompt.expand(len(x), -1, -1), x], 1))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


FEATURE_SHAPES = {"vit": (3, 8, 8), "transformer": (3, 5), "prompted": (3, 5)}
MAKERS = {
    "residual": Residual,
    "checkpointed": lambda: Residual(False),
    "reentrant": lambda: Residual(True),
    "compiled": compiled,
    "tied": Tied,
    "vit": lambda: models.small_vit(CLASSES, 8, patch=4, dim=12, depth=2, heads=2),
    "prompted": prompted,
}


def every_parameter(model):
    return [{"params": list(model.parameters())}]


def last_perturbed(model):
    params = list(model.parameters())
    return [{"params": params[:-4], "perturb": False}, {"params": params[-4:]}]


def last_trained(model):
    params = list(model.parameters())
    for param in params[:-4]:
        param.requires_grad_(False)
    return [{"params": params[-4:]}]


def vectors_perturbed(model):
    vectors = [param for param in model.parameters() if param.dim() < 2]
    return [{"params": [p for p in model.parameters() if p.dim() > 1], "perturb": False}, {"params": vectors}]


GROUPS = {one.__name__: one for one in (every_parameter, last_perturbed, last_trained, vectors_perturbed)}


def made(name, kind, groups, plan, dtype=torch.float64, base=SGD, **more):
    torch.manual_seed(3)
    model = MAKERS[kind]().to(dtype).train()
    row = EVERY[name]
    options = {**row.options, **more}
    opt = row.cls(GROUPS[groups](model), base, **{"rho": 0.1, **options}, lr=0.02, model=model, plan=plan)
    return model, opt


def batch(generator, kind, dtype, size, tail):
    """A batch with so many samples of the tail, in random order."""
    y = torch.randint(0, 2, (size,), generator=generator)
    y[torch.randperm(size, generator=generator)[:tail]] = torch.randint(2, 4, (tail,), generator=generator)
    x = torch.randn(size, *FEATURE_SHAPES.get(kind, (FEATURES,)), generator=generator, dtype=torch.float64)
    return x.to(dtype), y % 3 if kind in ("tied", "prompted", "transformer") else y


def closure_of(model, x, y, indexed=True):
    def losses(index=slice(None)):
        return F.cross_entropy(
            model(x[index]).double() if x.dtype == torch.float64 else model(x[index]), y[index], reduction="none"
        )

    return losses if indexed else lambda: losses()


def drive(model, opt, kind, dtype, seed, steps=4, indexed=True, scaler=None, parts=1):
    """Steps over batches that differ in size and in tail: none, one sample, one class, all."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for size, tail in ((9, 3), (7, 0), (6, 1), (5, 5), (8, 2))[:steps]:
        pairs = [batch(generator, kind, dtype, size - part, max(tail - 2 * part, 0)) for part in range(parts)]
        closures = [closure_of(model, x, y, indexed) for x, y in pairs]
        losses.append(opt.step(closures, [y for _, y in pairs], scaler=scaler))
        if scaler is not None:
            scaler.update()
    return flat(model), torch.stack(losses)


# --- one property: every way gives the published result


@pytest.mark.parametrize("seed", range(90))
def test_every_way_is_the_published_one(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(plans, "LEAST_WORK", (-1.0, 100.0)[seed % 3 == 0])
    name = draw.choice([*EVERY, *CLASS_WISE, *CLASS_WISE])
    kind, groups = draw.choice([*MAKERS]), draw.choice([*GROUPS])
    dtype, parts = draw.choice((torch.float64, torch.float64, torch.float32)), draw.choice((1, 1, 2, 3))
    base, scaled = draw.choice((SGD, AdamW)), draw.random() < 0.3
    indexed = draw.random() < 0.7 or EVERY[name].indexed
    more = CLASS_WISE.get(name, {})
    if kind in ("tied", "prompted"):
        more = {**more, **({"class_counts": COUNTS} if more else {})}
    ends = []
    for plan in ("published", "auto"):
        model, opt = made(name, kind, groups, plan, dtype, base, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None
        ends.append(drive(model, opt, kind, dtype, seed, 5, indexed, scaler, parts))
        assert all(param.grad is None for param in model.parameters()) and not opt.is_perturbed
    start, _ = made(name, kind, groups, "auto", dtype, base, **more)
    moved = ends[0][0] - flat(start)
    # Adam's step is a quotient: where a gradient is rounding alone, so is the direction.
    bound = {torch.float64: 1e-11, torch.float32: 2e-4}[dtype] * (1 if base is SGD else 100)
    assert (ends[1][0] - ends[0][0]).norm() <= bound * moved.norm(), (name, kind, groups, dtype, parts, base, indexed)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=0)


# --- a sweep is shared where that pays


@pytest.fixture
def sweeps(monkeypatch):
    """Whether each step so far has shared a sweep; the rule is the real one."""
    found, call = [], SharedBackward.__call__
    monkeypatch.setattr(plans, "LEAST_WORK", LEAST_WORK)
    monkeypatch.setattr(
        SharedBackward, "__call__", lambda *args, **named: found.append(len(args[1])) or call(*args, **named)
    )
    return found


def perceptron(width):
    return nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


def focal_steps(opt, model, rows, steps, criterion=None):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(rows, FEATURES, generator=generator), torch.randint(4, (rows,), generator=generator)

        def outputs(index=slice(None), x=x, y=y):
            logits = model(x[index])
            return logits if criterion else F.cross_entropy(logits, y[index], reduction="none")

        opt.step(outputs, targets=y, loss=criterion)


@pytest.mark.parametrize("criterion", (None, lf.losses.LogitAdjusted(COUNTS)), ids=("losses", "criterion"))
@pytest.mark.parametrize(("width", "rows", "shared"), ((16, 256, False), (512, 16, False), (512, 512, True)))
def test_a_sweep_is_shared_where_products_take_most_of_the_time(width, rows, shared, criterion, sweeps):
    model = perceptron(width)
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1, class_counts=COUNTS, model=model)
    focal_steps(opt, model, rows, 3, criterion)
    assert sweeps == [rows] * (3 if shared else 0)
    focal_steps(opt, model, 2, 1, criterion)  # another batch
    assert sweeps == [rows] * (3 if shared else 0)


def test_require_looks_at_small_networks_too(sweeps):
    model = perceptron(16)
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1, class_counts=COUNTS, model=model, plan="require")
    focal_steps(opt, model, 8, 2)
    assert sweeps == [8, 8]


@pytest.mark.parametrize("criterion", (None, lf.losses.LogitAdjusted(COUNTS)), ids=("losses", "criterion"))
@pytest.mark.parametrize(("width", "rows"), ((16, 8), (512, 512)))
def test_a_resumed_run_shares_where_the_first_did(width, rows, criterion, sweeps):
    torch.manual_seed(0)
    model = perceptron(width)
    make = lambda model: lf.FocalSAM(model.parameters(), SGD, lr=0.1, class_counts=COUNTS, model=model)  # noqa: E731
    opt = make(model)
    focal_steps(opt, model, rows, 2, criterion)
    resumed = copy.deepcopy(model)
    other = make(resumed)
    other.load_state_dict(opt.state_dict())
    for each, of in ((opt, model), (other, resumed)):
        focal_steps(each, of, rows, 2, criterion)
    assert torch.equal(flat(model), flat(resumed))


@pytest.mark.parametrize("captures", (False, True))
def test_on_a_gpu_only_a_captured_step_shares(captures, sweeps):
    model = perceptron(512)
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1, class_counts=COUNTS, model=model)
    seen, ask = [], plans.Passes._shared_by_two

    def on_gpu(passes, part):
        passes._params, params = [SimpleNamespace(is_cuda=True)], passes._params
        opt.captures = captures
        seen.append(ask(passes, part) is not None)
        passes._params, opt.captures = params, False

    with (
        mock.patch.object(plans.Passes, "_shared_by_two", on_gpu),
        mock.patch.object(plans.Passes, "shared", lambda *_: 1),
    ):
        focal_steps(opt, model, 512, 1)
    assert seen == [captures]


def products(module, *shape):
    """How often a backward multiplies by elements of weights of more than one dimension."""
    root = module(torch.randn(shape, requires_grad=True)).sum()
    low, high = 0, 1
    while products_exceed(root, high):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if products_exceed(root, middle) else (low, middle)
    return high


def test_products_of_a_backward():
    assert products(nn.Linear(5, 3), 7, 5) == 7 * 5 * 3
    assert products(nn.Linear(5, 3, bias=False), 2, 7, 5) == 14 * 5 * 3
    assert products(nn.Conv2d(2, 6, 3, padding=1, groups=2), 4, 2, 8, 8) == 4 * 8 * 8 * 6 * 1 * 9
    assert products(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5)), 7, 5) == 2 * 7 * 5 * 5
    frozen = nn.Linear(5, 3).requires_grad_(False)
    assert products(frozen, 7, 5) == products(nn.Linear(5, 3), 7, 5)
    shared = nn.Linear(5, 5)
    assert products(nn.Sequential(shared, nn.Tanh(), shared), 7, 5) == 2 * 7 * 5 * 5
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert products(lambda x: attention(x, x, x)[0], 3, 5, 8) == 15 * (3 * 8 * 8 + 8 * 8)
    shift = nn.Parameter(torch.randn(7, 5))
    assert not products_exceed((torch.randn(3, 7, 5) + shift).sum(), 0)


@every
def test_fifty_steps_are_the_published_ones(name):
    ends = []
    for plan in ("published", "auto"):
        model = network()
        opt = EVERY[name].make(model, lr=0.05, momentum=0.9, model=model, plan=plan)
        ends.append(EVERY[name].drive("closure", opt, model, batches(steps=50)))
    assert relative_error(*ends) < 1e-11


@pytest.mark.parametrize("name", CLASS_WISE)
def test_autocast_is_as_close_as_rounding(name):
    ends = []
    for plan in ("published", "auto"):
        model, opt = made(name, "residual", "every_parameter", plan, torch.float32, **CLASS_WISE[name])
        start, generator = flat(model), torch.Generator().manual_seed(0)
        for _ in range(3):
            x, y = batch(generator, "residual", torch.float32, 9, 3)
            with torch.autocast("cpu", torch.bfloat16):
                opt.step(closure_of(model, x, y), targets=y)
        ends.append(flat(model) - start)
    assert (ends[1] - ends[0]).norm() < 0.05 * ends[0].norm()


# --- the ways are taken


class Recorder:
    """A closure that notes the samples of its calls, and whether weights were perturbed."""

    def __init__(self, model, opt, x, y):
        self.model, self.opt, self.x, self.y, self.calls = model, opt, x, y, []

    def __call__(self, index=slice(None)):
        chosen = torch.arange(len(self.y))[index].tolist()
        self.calls.append(("e" if self.opt.is_perturbed else "w", chosen))
        return F.cross_entropy(self.model(self.x[index]), self.y[index], reduction="none")


def calls_of(name, y, steps=3, plan="auto", **more):
    """The calls of the last of some steps on one batch."""
    model, opt = made(name, "residual", "every_parameter", plan, **{**CLASS_WISE.get(name, {}), **more})
    y = torch.tensor(y)
    x = torch.randn(len(y), FEATURES, dtype=torch.float64)
    for _ in range(steps):
        closure = Recorder(model, opt, x, y)
        opt.step(closure, targets=y)
    return closure.calls


WHOLE = [0, 1, 2, 3, 4]
LABELS = [0, 3, 1, 0, 2]
WAYS = {
    "ImbSAM": ("ImbSAM", LABELS, {}, [("w", [0, 2, 3]), ("w", [1, 4]), ("e", [1, 4])]),
    "ImbSAM, no tail": ("ImbSAM", [0, 1, 1, 0, 0], {}, [("w", WHOLE)]),
    "ImbSAM, all tail": ("ImbSAM", [3, 3, 2, 2, 3], {}, [("w", WHOLE), ("e", WHOLE)]),
    "SSE-SAM, stage 1": (
        "SSESAM", LABELS, {"switch_step": None}, [("w", [0, 2, 3]), ("w", [1, 4]), ("e", [0, 2, 3]), ("e", [1, 4])],
    ),
    "SSE-SAM, stage 2": ("SSESAM", LABELS, {"switch_step": 0}, [("w", [0, 2, 3]), ("w", [1, 4]), ("e", [1, 4])]),
    "Focal-SAM": ("FocalSAM", LABELS, {}, [("w", WHOLE), ("e", WHOLE)]),
    "CC-SAM": (
        "CCSAM", LABELS, {}, [(at, one) for at in "we" for one in ([0, 3], [2], [4], [1])],
    ),
    "SAM": ("SAM", LABELS, {}, [("w", WHOLE), ("e", WHOLE)]),
    "SAM, radius 0": ("SAM", LABELS, {"rho": 0.0}, [("w", WHOLE)]),
    "ImbSAM, radius 0": ("ImbSAM", LABELS, {"rho": 0.0}, [("w", [0, 2, 3]), ("w", [1, 4])]),
    "CC-SAM, radius 0": ("CCSAM", LABELS, {"noise_ratio": 0.0}, [("w", WHOLE)]),
    "no weight for the tail": ("ImbSAM", LABELS, {"tail_weight": 0.0}, [("w", WHOLE)]),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
def test_samples_without_weight_are_not_evaluated(case):
    name, y, more, expected = WAYS[case]
    assert calls_of(name, y, **more) == expected


def test_the_published_plan_runs_the_published_passes():
    assert calls_of("ImbSAM", LABELS, plan="published") == [("w", WHOLE), ("e", WHOLE)]
    assert calls_of("SAM", LABELS, plan="published", rho=0.0) == [("w", WHOLE), ("e", WHOLE)]


def test_a_default_that_is_a_value_is_no_index():
    """``lambda x=x: ...`` binds a batch, and is called without an argument."""
    model, opt = made("ImbSAM", "residual", "every_parameter", "auto", **CLASS_WISE["ImbSAM"])
    x, y, seen = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS), []

    def closure(x=x, weight=None):
        seen.append((x, weight))
        return F.cross_entropy(model(x), y, reduction="none")

    opt.step(closure, targets=y)
    assert all(one is x and weight is None for one, weight in seen)
    for name in ("MicroBatchSAM", "ESAM"):
        model, opt = made(name, "residual", "every_parameter", "auto")
        with pytest.raises(ValueError, match="closure must take an index"):
            opt.step(lambda x=x, model=model: F.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("index", (slice(None), None, ...), ids=("slice", "None", "ellipsis"))
def test_defaults_that_mean_all_are_an_index(index):
    model, opt = made("ImbSAM", "residual", "every_parameter", "auto", **CLASS_WISE["ImbSAM"])
    x, y, sizes = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS), []

    def closure(index=index):
        index = slice(None) if index is None else index
        sizes.append(len(y[index]))
        return F.cross_entropy(model(x[index]), y[index], reduction="none")

    for _ in range(3):
        sizes.clear()
        opt.step(closure, targets=y)
    assert sizes == [3, 2, 2]


class Counting(nn.Module):
    """Counts the calls of a module, and the products of weights that its backwards form."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("groups", ("last_perturbed", "last_trained"))
def test_what_no_perturbed_weight_has_a_part_in_is_computed_once(groups):
    for name in ("SAM", "FriendlySAM", "ImbSAM", "FocalSAM"):
        model, opt = made(name, "residual", groups, "auto", **CLASS_WISE.get(name, {}))
        model.blocks[0] = counting = Counting(model.blocks[0])
        x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
        for _ in range(3):
            counting.calls = 0
            opt.step(closure_of(model, x, y), targets=y)
        published = {"SAM": 2, "FriendlySAM": 2, "FocalSAM": 2, "ImbSAM": 3}[name]
        # Focal-SAM needs all gradients of its clean loss, so that the graph of the first pass is used up.
        assert counting.calls == published - (0 if (name, groups) == ("FocalSAM", "last_perturbed") else 1), name


def test_an_ascent_forms_gradients_of_perturbed_weights_only():
    model, opt = made("SAM", "residual", "vectors_perturbed", "auto")
    asked = []
    model.stem.weight.register_hook(lambda grad: asked.append("matrix"))
    model.stem.bias.register_hook(lambda grad: asked.append("vector"))
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    opt.step(closure_of(model, x, y), targets=y)
    assert sorted(asked) == ["matrix", "vector", "vector"]


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, backwards):
        ctx.backwards = backwards
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.backwards.append(1)
        return grad, None


def test_the_head_costs_one_pass_through_the_backbone():
    torch.manual_seed(0)
    model = Residual().double()
    model.blocks[0] = counting = Counting(model.blocks[0])
    rest = [param for name, param in model.named_parameters() if "head" not in name]
    groups = [{"params": rest}, {"params": list(model.head.parameters())}]
    opt = lf.CCSAM(groups, SGD, class_counts=COUNTS, lr=0.1, model=model, noise_ratio=1e-2)
    backwards = []
    inner = counting.inner.inner
    counting.inner.inner = lambda h: Noted.apply(inner(h), backwards)
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    for _ in range(3):
        counting.calls, backwards[:] = 0, []
        opt.step(closure_of(model, x, y, indexed=False), targets=y)
    assert counting.calls == len(backwards) == 1


# --- random numbers


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.body, self.draw, self.head = nn.Linear(FEATURES, 10), draw, nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.draw(self.body(x)))


OWN = torch.Generator().manual_seed(0)
DRAWS = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "noise": lambda h: h + torch.randn_like(h),
    "Python's": lambda h: h * random.random(),
    "NumPy's": lambda h: h * np.random.rand(),
    "its own": lambda h: h + torch.randn(h.shape, generator=OWN, dtype=h.dtype),
}


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner, self.draw = nn.Linear(FEATURES, FEATURES), draw

    def forward(self, x):
        return self.draw(self.inner(x))


@pytest.mark.parametrize("inside", (False, True), ids=("a function", "in a module"))
@pytest.mark.parametrize("case", DRAWS)
def test_random_numbers_are_drawn_as_in_the_published_passes(case, inside):
    """Nothing random is reused: weights and all generators are as after the published passes."""
    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0), random.seed(0), np.random.seed(0), OWN.manual_seed(0)
        model = nn.Sequential(Drawing(DRAWS[case]), nn.Linear(FEATURES, CLASSES)) if inside else Noisy(DRAWS[case])
        model = model.double()
        head = list(model.parameters())[-2:]
        others = list(model.parameters())[:-2]
        opt = lf.SAM(
            [{"params": others, "perturb": False}, {"params": head}], SGD, rho=0.1, lr=0.1, model=model, plan=plan
        )
        x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
        for _ in range(4):
            opt.step(closure_of(model, x, y), targets=y)
        ends.append((flat(model), torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=OWN)))
    assert all(bool(torch.as_tensor(a == b).all()) for a, b in zip(*ends, strict=True))


def test_dropout_does_not_keep_a_network_from_sub_batches():
    torch.manual_seed(0)
    model = Noisy(nn.Dropout(0.5)).double()
    opt = lf.ImbSAM(model.parameters(), SGD, lr=0.1, model=model, plan="require", **CLASS_WISE["ImbSAM"])
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    for _ in range(3):
        closure = Recorder(model, opt, x, y)
        opt.step(closure, targets=y)
    assert [len(samples) for _, samples in closure.calls] == [3, 2, 2]


# --- what mixes samples is recognized


class Mixes(nn.Module):
    """Does something to the activations of a batch."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Counter(nn.Module):
    """Changes a buffer in every pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, h):
        with torch.no_grad():
            self.mean.lerp_(h.mean(0), 0.1)
        return h - self.mean


def hardest(h):
    sizes = h.detach().norm(dim=1, keepdim=True)
    return h * (sizes >= sizes.median())


class Reassigned(Counter):
    """Makes a new buffer in every pass."""

    def forward(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


class Recurrent(nn.Module):
    """Keeps a state for as long as batches have one size."""

    state = None

    def forward(self, h):
        if self.state is not None and self.state.shape == h.shape:
            h = h + self.state
        self.state = torch.tanh(h.detach())
        return h


class Bank(nn.Module):
    """Looks at the features of all passes so far."""

    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, h):
        self.features.append(h.detach())
        return h + 0.1 * sum(one.mean() for one in self.features)


class Alternating(nn.Module):
    """Has another result in every other pass."""

    passes = 0

    def forward(self, h):
        self.passes += 1
        return h * (1 + self.passes % 2)


MIXING = {
    "the mean, detached": (lambda: Mixes(lambda h: h - h.mean(0).detach()), r"last \(Linear\)"),
    "a neighbour, hardly": (lambda: Mixes(lambda h: h + 1e-3 * h.roll(1, 0)), r"last \(Linear\)"),
    "the largest": (lambda: Mixes(lambda h: h / h.abs().amax()), r"last \(Linear\)"),
    "the size": (lambda: Mixes(lambda h: h / len(h)), r"last \(Linear\)"),
    "batch norm": (lambda: Mixes(nn.BatchNorm1d(8)), r"function \(BatchNorm1d\)"),
    "a buffer": (lambda: Mixes(Counter()), "function.mean is changed"),
    "the opposite one": (lambda: Mixes(lambda h: 0.7 * h + 0.3 * h.flip(0)), r"last \(Linear\)"),  # as mixup does
    "a buffer of each pass": (lambda: Mixes(Reassigned()), "function.mean is changed"),
    "a hidden state": (lambda: Mixes(Recurrent()), "depends on what the one before has left"),
    "a list of features": (lambda: Mixes(Bank()), "depends on what the one before has left"),
    "a counter": (lambda: Mixes(Alternating()), "depends on what the one before has left"),
    "a permutation": (lambda: Mixes(lambda h: h + h[torch.randperm(len(h))]), r"randperm\(\)"),
    "the hardest half": (lambda: Mixes(hardest), "samples mix"),
    "gradients": (lambda: Mixes(MixedGradients.apply), "gradient of first"),
    "a clipped gradient": (lambda: Mixes(ClippedGradients.apply), "gradient of first.*or it does not follow"),
}


class MixedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


class ClippedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.01, 0.01)


@pytest.mark.parametrize("name", ("ImbSAM", "SSESAM", "CCSAM"))
@pytest.mark.parametrize("case", MIXING)
def test_a_network_that_mixes_samples_takes_the_published_way(case, name, caplog):
    make, message = MIXING[case]
    ends = []
    x, y = torch.randn(9, FEATURES, dtype=torch.float64), torch.tensor([0, 3, 1, 0, 2, 1, 0, 0, 3])
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model = make().double()
        opt = (
            lf.create(name)
            if False
            else EVERY[name].cls(model.parameters(), SGD, lr=0.05, rho=0.1, model=model, plan=plan, **CLASS_WISE[name])
        )
        with caplog.at_level(logging.WARNING, "ltsam_fast"):
            for _ in range(3):
                opt.step(closure_of(model, x, y), targets=y)
        ends.append((flat(model), *(buffer.clone() for buffer in model.buffers()), torch.rand(1)))
    assert len(caplog.records) == 1 and re.search(message, caplog.text)
    for published, found in zip(*ends, strict=True):
        torch.testing.assert_close(found, published, rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    model = make().double()
    opt = EVERY[name].cls(model.parameters(), SGD, lr=0.05, rho=0.1, model=model, plan="require", **CLASS_WISE[name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotShared, match=message):
        opt.step(closure_of(model, x, y), targets=y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_loss_that_mixes_samples_is_recognized():
    model = network()
    opt = lf.ImbSAM(model.parameters(), SGD, lr=0.05, model=model, plan="require", **CLASS_WISE["ImbSAM"])
    x, y = batches(steps=1)[0]

    def closure(index=slice(None)):
        z = F.normalize(model(x[index]))
        return (z @ z.t()).logsumexp(1)

    with pytest.raises(NotShared, match=r"samples mix after model|samples mix after 4 \(Linear\)"):
        opt.step(closure, targets=y)


@pytest.mark.parametrize("error", (IndexError("too many indices\nfor x"), ZeroDivisionError()))
def test_a_closure_that_fails_with_an_index_is_published(error, caplog):
    x, y = batches(steps=1)[0]
    message = re.escape(
        f"closure(index) fails: {str(error).splitlines()[0] if error.args else 'ZeroDivisionError'}; use"
    )
    ends = []
    for plan in ("published", "auto", "require"):
        model = network()
        opt = lf.ImbSAM(model.parameters(), SGD, lr=0.05, model=model, plan=plan, **CLASS_WISE["ImbSAM"])

        def closure(index=slice(None), model=model):
            if isinstance(index, torch.Tensor):
                raise error
            return F.cross_entropy(model(x), y, reduction="none")

        before = flat(model)
        if plan == "require":
            with pytest.raises(NotShared, match=message):
                opt.step(closure, targets=y)
            assert torch.equal(flat(model), before) and not opt.is_perturbed
            continue
        with caplog.at_level(logging.WARNING, "ltsam_fast"):
            for _ in range(2):
                opt.step(closure, targets=y)
        ends.append(flat(model))
    assert len(caplog.records) == 1 and re.search(message, caplog.text)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


def test_ctrl_c_while_a_network_is_looked_at():
    model = network()
    opt = lf.ImbSAM(model.parameters(), SGD, lr=0.05, model=model, **CLASS_WISE["ImbSAM"])
    x, y = batches(steps=1)[0]

    def closure(index=slice(None)):
        if isinstance(index, torch.Tensor):
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y, reduction="none")

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure, targets=y)


def test_networks_are_looked_at_again_in_another_mode():
    torch.manual_seed(0)
    model = Mixes(nn.BatchNorm1d(8)).double()
    opt = lf.ImbSAM(model.parameters(), SGD, lr=0.05, model=model, **CLASS_WISE["ImbSAM"])
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    for training, sizes in ((True, [5, 5]), (False, [3, 2, 2]), (True, [5, 5])):
        model.train(training)
        for _ in range(3):
            closure = Recorder(model, opt, x, y)
            opt.step(closure, targets=y)
        assert [len(samples) for _, samples in closure.calls] == sizes


@pytest.mark.parametrize(
    "inner", (contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)), ids=("", "autocast")
)
def test_looking_at_a_network_disturbs_nothing(inner):
    torch.manual_seed(0)
    model = Noisy(nn.Dropout(0.5))
    opt = lf.ImbSAM(model.parameters(), SGD, lr=0.0, model=model, **CLASS_WISE["ImbSAM"])
    x, y = torch.randn(5, FEATURES), torch.tensor(LABELS)
    states = []
    for _ in range(2):  # the first of them looks
        torch.manual_seed(1)
        with inner():
            loss = opt.step(closure_of(model, x, y), targets=y)
        states.append((loss, torch.rand(1)))
    assert torch.equal(states[0][1], states[1][1]) and torch.equal(states[0][0], states[1][0])
    assert not any(module._forward_hooks for module in model.modules())


# --- what must not be reused


class Aliases(nn.Module):
    """A head that gets at the activations, or at its own weights, by other ways than arguments."""

    def __init__(self, way):
        super().__init__()
        self.body, self.head, self.way = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), way
        self.hidden = [self.head]
        self.count = 0

    def forward(self, x):
        h = self.body(x)
        if self.way == "in place":
            h += 1.0
        elif self.way == "data":
            h.data.mul_(2.0)
        elif self.way == "numpy" and not h.requires_grad:
            h.numpy()[:] *= 2.0
        elif self.way == "a view":
            h.view(-1)[:3] = 0.0
        elif self.way == "another module's weight":
            h = h + self.reader(x)
        elif self.way == "a detached weight":
            h = h + self.head.weight.detach().sum()
        elif self.way == "a cache":
            self.count += 1
            h = h * (1.0 + 0.01 * (self.count % 3))
        elif self.way == "no_grad":
            with torch.no_grad():
                h = h + self.head(h).sum()
        return self.head(h)


class Reader(nn.Module):
    """Reads a weight that is not its own."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, x):
        return F.linear(x[:, :1], self.hidden[0].weight[:1].t().detach())


WAYS_AROUND = (
    "in place",
    "data",
    "numpy",
    "a view",
    "another module's weight",
    "a detached weight",
    "a cache",
    "no_grad",
)


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
@pytest.mark.parametrize("way", WAYS_AROUND)
def test_nothing_is_reused_that_has_changed(way, frozen):
    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model = Aliases(way).double()
        if way == "another module's weight":
            model.reader = Reader(model.hidden)
        body = {"params": list(model.body.parameters()), "perturb": False}
        if frozen:
            model.body.requires_grad_(False)
        groups = [{"params": list(model.head.parameters())}, *([] if frozen else [body])]
        opt = lf.SAM(groups, SGD, rho=0.5, lr=0.1, model=model, plan=plan)
        x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
        for _ in range(3):
            opt.step(closure_of(model, x, y), targets=y)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_data_written_between_steps_is_seen():
    model, opt = made("SAM", "residual", "last_trained", "auto")
    twin, published = made("SAM", "residual", "last_trained", "published")
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    for number in range(4):
        x.numpy()[:] += number  # past the version counter
        model.blocks[0].norm.bias.data.add_(0.1)
        twin.blocks[0].norm.bias.data.add_(0.1)
        opt.step(closure_of(model, x, y), targets=y)
        published.step(closure_of(twin, x, y), targets=y)
    assert torch.equal(flat(model), flat(twin))


def test_an_error_in_a_pass_leaves_modules_as_they_were():
    model, opt = made("SAM", "residual", "last_trained", "auto")
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
    before, calls = flat(model), []

    def closure():
        calls.append(opt.is_perturbed)
        losses = F.cross_entropy(model(x), y, reduction="none")
        if opt.is_perturbed:
            raise KeyboardInterrupt
        return losses

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure, targets=y)
    assert calls == [False, True] and torch.equal(flat(model), before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_compiled_blocks_are_compiled_once():
    model, opt = made("SAM", "compiled", "last_trained", "auto")
    x, y = torch.randn(BATCH, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))
    for number in range(4):
        if number == 2:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        opt.step(closure_of(model, x, y), targets=y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


# --- how often closures are evaluated where the network is not known


def passes_of(row, interface="closure", steps=1, **options):
    """For each step a string: "w" and "e" for its evaluations at w and at w + eps."""
    model, seen = network(), []
    opt = row.make(model, lr=0.1, **options)

    def loss(model, x, y):
        assert torch.is_grad_enabled() or row.method == "ESAM"  # which looks at the losses at w + eps
        seen[-1] += "e" if opt.is_perturbed else "w"
        return losses(model, x, y)

    for x, y in batches(steps=steps):
        seen.append("")
        row.step(interface, opt, model, x, y, loss)
        assert all(p.grad is None for p in model.parameters())
    return seen


@every
def test_a_step_evaluates_as_often_as_its_method_says(name):
    assert passes_of(EVERY[name]) == ["".join(EVERY[name].passes)]


@phased
def test_the_phases_need_the_same_passes(name):
    row = EVERY[name].of("phases")
    assert passes_of(row, "phases", steps=3) == passes_of(row, steps=3)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("ImbSAM", {"eta": 0}, ["w"] * 3),
        ("FocalSAM", {"lam": 0.0}, ["w"] * 3),
        ("FocalSAM", {"gamma": 0.0, "lam": 1.0}, ["we"] * 3),
        ("SSESAM", {"switch_step": 1}, ["wee", "we", "we"]),
        ("LookSAM", {"k": 2}, ["we", "w", "we"]),
        ("MicroBatchSAM", {"m": 16}, ["we"] * 3),
    ],
)
def test_what_is_weighed_with_zero_or_not_due_is_not_run(name, options, passes):
    assert passes_of(EVERY[name], steps=3, **options) == passes


# --- situations in which a shortcut would be wrong


def both_plans(make, drive_step, name="SAM", steps=4, **more):
    """Weights, buffers and generators after some steps; ``drive_step(model, opt, number)`` takes one."""
    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model, groups = make()
        opt = EVERY[name].cls(
            groups, SGD, **{"rho": 0.3, **CLASS_WISE.get(name, {}), **more}, lr=0.1, model=model, plan=plan
        )
        for number in range(steps):
            drive_step(model, opt, number)
        ends.append((flat(model), *(buffer.clone() for buffer in model.buffers()), torch.rand(1)))
    for published, found in zip(*ends, strict=True):
        torch.testing.assert_close(found, published, rtol=1e-9, atol=1e-11)


X = torch.randn(9, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 0, 2, 1, 0, 0, 3])


def by_body(model, frozen=False):
    """The last layer is perturbed; the others are trained without, or frozen."""
    params = list(model.parameters())
    for param in params[:-2]:
        param.requires_grad_(not frozen)
    return [*([] if frozen else [{"params": params[:-2], "perturb": False}]), {"params": params[-2:]}]


@pytest.mark.parametrize("again", (torch.clone, torch.zeros_like), ids=("clones", "zeros"))
def test_two_equal_calls_give_two_tensors(again):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            with torch.no_grad():
                base = self.body(x)
                total, shift = again(base), again(base)
            total = total + 0.0 * shift
            total += self.head(x)
            return total + shift

    def make():
        model = Adds().double()
        return model, by_body(model, frozen=True)

    both_plans(make, lambda model, opt, number: opt.step(closure_of(model, X, Y), targets=Y))


@pytest.mark.parametrize("name", ("ImbSAM", "SSESAM", "CCSAM"))
@pytest.mark.parametrize("change", ("a module", "a regulariser", "a loss", "a criterion"))
def test_what_begins_to_mix_later_is_seen(change, name):
    def plain_loss(z, y):
        return F.cross_entropy(z, y, reduction="none")

    def mixing_loss(z, y):
        return F.cross_entropy(z - z.mean(0), y, reduction="none")

    def make():
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Identity(), nn.Linear(8, CLASSES)).double()
        return model, model.parameters()

    def drive_step(model, opt, number):
        if change == "a module" and number == 3:
            model[1] = nn.BatchNorm1d(8, affine=False).double()
        of = mixing_loss if number >= 3 else plain_loss
        if change == "a loss":
            opt.step(lambda i=slice(None): model(X[i]), Y, loss=of)
            return
        factor = 0.3 * max(number - 2, 0) if change == "a regulariser" else 0.0
        of = of if change == "a criterion" else plain_loss

        def losses(i=slice(None)):
            z = model(X[i])
            return of(z, Y[i]) + factor * z.mean().square()

        opt.step(losses, targets=Y)

    both_plans(make, drive_step, name)


def test_a_first_step_that_overflows_proves_nothing():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
            self.body.hidden = [self.head]
            self.body.register_forward_hook(
                lambda module, args, out: out * module.hidden[0].weight.detach().double().mean().cos()
            )
            self.reader = Reader([self.head])

        def forward(self, x):
            return self.head(self.body(x) + self.reader(x))

    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model = Hidden().double()
        params = [*model.head.parameters()]
        model.body.requires_grad_(False)
        opt = lf.SAM(params, SGD, rho=0.5, lr=0.1, model=model, plan=plan)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number in range(4):
            x = X * torch.inf if number == 0 else X
            opt.step(closure_of(model, x, Y), targets=Y, scaler=scaler)
            scaler.update()
        ends.append(model.head.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ("SAM", "FocalSAM", "ImbSAM", "CCSAM"))
def test_gradients_of_another_optimizers_weights_stay_as_published(name):
    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model = Residual().double()
        body = [param for key, param in model.named_parameters() if "head" not in key]
        groups = [{"params": body[:3], "perturb": False}, {"params": body[3:]}]
        opt = EVERY[name].cls(groups, SGD, rho=0.1, lr=0.05, model=model, plan=plan, **CLASS_WISE.get(name, {}))
        other = SGD(model.head.parameters(), lr=0.05)
        for _ in range(3):
            opt.step(closure_of(model, X, Y), targets=Y)
            other.step()
            other.zero_grad()
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-11


@pytest.mark.parametrize("rho", (0.1, 0.0))
@pytest.mark.parametrize("given", ("model", "no model"))
@every
def test_gradients_of_another_optimizers_weights_outside_the_network_stay_as_published(name, given, rho):
    """Such as of a loss with centers, which have an optimizer of their own."""
    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model, centers = Residual().double(), nn.Parameter(torch.randn(CLASSES, CLASSES, dtype=torch.float64))
        params = list(model.parameters())
        groups = [{"params": params[:3], "perturb": False}, {"params": params[3:]}]
        options = {**EVERY[name].options, **CLASS_WISE.get(name, {}), "rho": rho, "plan": plan}
        opt = EVERY[name].cls(groups, SGD, lr=0.05, **options, **({"model": model} if given == "model" else {}))
        other = SGD([centers], lr=0.05)

        def losses(i=slice(None), model=model, centers=centers):
            z = model(X[i])
            return F.cross_entropy(z, Y[i], reduction="none") + (z - centers[Y[i]]).square().sum(1)

        for _ in range(3):
            opt.step(losses, targets=Y)
            other.step()
            other.zero_grad()
        ends.append(flat([*model.parameters(), centers]))
    assert relative_error(*ends) < 1e-11


def test_one_sample_of_the_tail_may_have_no_dimension():
    def make():
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        return model, model.parameters()

    y = torch.tensor([0, 1, 1, 0, 3, 0, 1, 0, 0])

    def losses_of_all(model, i):
        return F.cross_entropy(model(X[i]).squeeze().reshape(-1, CLASSES).squeeze(), y[i].squeeze(), reduction="none")

    both_plans(make, lambda model, opt, _: opt.step(lambda i=slice(None): losses_of_all(model, i), targets=y), "ImbSAM")


def test_hooks_inside_a_frozen_module_are_called():
    seen = []

    def make():
        model = nn.Sequential(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh()), nn.Linear(8, CLASSES)).double()
        model[0][0].register_forward_hook(lambda *_: seen.append(1))
        return model, by_body(model, frozen=True)

    for plan in ("published", "auto"):
        model, groups = make()
        opt = lf.SAM(groups, SGD, rho=0.1, lr=0.1, model=model, plan=plan)
        seen.clear()
        for _ in range(4):
            opt.step(closure_of(model, X, Y), targets=Y)
        assert len(seen) == 8


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
@every
def test_hooks_on_activations_count_once_a_pass(name, frozen):
    """Those that are not computed again at w + eps would have two."""

    def make():
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, CLASSES)).double()
        params = list(model.parameters())
        for param in params[:2]:
            param.requires_grad_(not frozen)
        return model, [{"params": params[:4], "perturb": False}, {"params": params[4:]}]

    def losses_of_all(model, i):
        h = torch.tanh(model[0](X[i]))
        h = model[2](h)
        if h.requires_grad:
            h.register_hook(lambda grad: 2 * grad)
            h.grad_fn.register_prehook(lambda grads: tuple(3 * grad for grad in grads))
        return F.cross_entropy(model[3](h), Y[i], reduction="none")

    def drive(model, opt, _):
        opt.step(lambda i=slice(None): losses_of_all(model, i), targets=Y)

    both_plans(make, drive, name, **{**EVERY[name].options, **CLASS_WISE.get(name, {})})


@every
def test_a_penalty_on_the_gradient_by_the_inputs(name):
    """Its graph has nodes of which only some outputs have gradients."""

    def make():
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        return model, model.parameters()

    def losses_of_all(model, i):
        x = X[i].clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return F.cross_entropy(model(X[i]), Y[i], reduction="none") + 0.1 * grad.square().sum(1)

    def drive(model, opt, _):
        opt.step(lambda i=slice(None): losses_of_all(model, i), targets=Y)

    both_plans(make, drive, name, **{**EVERY[name].options, **CLASS_WISE.get(name, {})})


@every
def test_experts_that_only_some_samples_use(name):
    """Of a batch in parts, or of an ascent after another, gradients may be of other weights than those before."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.experts = nn.Linear(FEATURES, 8), nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(4))

        def forward(self, x):
            h, number = torch.tanh(self.body(x)), x[:, 0].mul(3).long().abs().clamp(max=3)
            out = h.new_zeros(len(x), CLASSES)
            for k in number.unique().tolist():
                rows = (number == k).nonzero().flatten()
                out = out.index_add(0, rows, self.experts[k](h[rows]))
            return out

    def make():
        model = Experts().double()
        return model, model.parameters()

    def drive(model, opt, _):
        opt.step(closure_of(model, X, Y), targets=Y)

    both_plans(make, drive, name, **{**EVERY[name].options, **CLASS_WISE.get(name, {})})


class OwnCheckpoint(torch.autograd.Function):
    """Runs a module without a graph, and again in the backward."""

    @staticmethod
    def forward(ctx, module, h):
        ctx.module = module
        ctx.save_for_backward(h)
        return module(h)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            ctx.module(h).backward(grad)
        return None, h.grad


@pytest.mark.parametrize("name", ("SAM", *CLASS_WISE))
def test_a_backward_inside_a_function_is_recognized(name):
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(OwnCheckpoint.apply(self.inner, self.first(x)))

    def make():
        model = Hides().double()
        params = list(model.parameters())
        return model, [{"params": params[:2], "perturb": False}, {"params": params[2:]}]

    more = {"scope": "head", "head": None} if name == "CCSAM" else {}
    both_plans(make, lambda model, opt, _: opt.step(closure_of(model, X, Y), targets=Y), name, **more)


@pytest.mark.parametrize("name", ("MicroBatchSAM", "ESAM", "SAM"))
def test_running_statistics_at_radius_zero(name):
    def make():
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
        return model, model.parameters()

    both_plans(make, lambda model, opt, _: opt.step(closure_of(model, X, Y), targets=Y), name, rho=0.0)


def test_lazy_modules_are_initialized_by_themselves():
    def make():
        model = nn.Sequential(nn.LazyLinear(8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, CLASSES).double())
        return model, model.parameters()

    ends = []
    for plan in ("published", "auto"):
        torch.manual_seed(0)
        model, groups = make()
        opt = lf.ImbSAM(groups, SGD, lr=0.1, model=model, plan=plan, **CLASS_WISE["ImbSAM"])
        for _ in range(3):
            opt.step(closure_of(model, X, Y), targets=Y)
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-11 and float(ends[1].abs().max()) > 0


def test_sequences_of_another_length_lie_elsewhere():
    """Time first: with one time step that cannot be told from the batch first."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, x):  # (B, T, features)
            times = x.transpose(0, 1).flatten(0, 1)
            return self.head(self.embed(times).tanh().unflatten(0, (x.shape[1], len(x))).mean(0))

    def make():
        model = Sequence().double()
        return model, model.parameters()

    def drive_step(model, opt, number):
        x = X[:, None, :] * torch.linspace(1, 2, (1, 3, 1, 2)[number], dtype=torch.float64)[None, :, None]
        opt.step(closure_of(model, x, Y, indexed=False), targets=Y)

    both_plans(make, drive_step, "FocalSAM")


@pytest.mark.parametrize("slower", ("with it", "without"))
def test_on_a_gpu_reuse_stays_where_it_was_faster(slower):
    """Told by events like CUDA's, of which passes 5 to 11 have two each; what the steps do is the same either way."""
    model, opt = made("SAM", "residual", "last_perturbed", "auto")
    other, plain = made("SAM", "residual", "last_perturbed", "auto")
    model.blocks[0] = counting = Counting(model.blocks[0])
    results = opt.network.unchanged(opt.ascent_params())
    events, calls = [], []

    class Event:
        def record(self):
            self.reuses = results._trial.reuses
            events.append(self)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 2.0 if self.reuses == (slower == "with it") else 1.0

    results.makes_event = Event
    for number in range(1, 21):
        x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.tensor(LABELS)
        counting.calls = 0
        opt.step(closure_of(model, x, y), targets=y)
        plain.step(closure_of(other, x, y), targets=y)
        calls.append(counting.calls)
        assert len(events) == 4 * sum(one <= number for one in (5, 6, 7, 9, 10, 11))
    assert calls[4:7] == [1, 2, 1] and calls[8:11] == [1, 2, 2]
    assert calls[16:] == [2 if slower == "with it" else 1] * 4
    assert torch.equal(flat(model), flat(other))
