"""CC-SAM over a whole network: classes with as many samples are evaluated at once, and the step is the published one."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import ltsam_fast as lf
from ltsam_fast import models
from ltsam_fast.optim import classes_at_once as at_once

from .oracles import flat

CLASSES = 10
COUNTS = [90, 80, 70, 40, 30, 20, 10, 5, 2, 1]
LABELS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 9, 9]  # at once: 0 to 3 with two samples each, 4 to 8 with one


class Network(nn.Sequential):
    """Of a type of its own: what torch's own modules of rows are made of is taken as a head."""


class Parts(nn.Module):
    """Weights that are used twice, transposed, without a bias, outside modules, and not at all."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.shift, self.spare = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.twice(F.gelu(self.twice(self.stem(x) + self.shift)))
        h = h + torch.tanh(h @ self.twice.weight) + F.linear(h, weight=self.stem.weight)
        return self.head(torch.cat([h[:, :4], self.shift[4:].expand(len(h), -1)], 1))


class Same(nn.Module):
    """Two weights that get one gradient, and one whose gradient is constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(CLASSES)) for _ in range(3))
        self.layer = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.layer(x) + (self.a + self.b) + self.c.sum() * torch.arange(CLASSES)


def tied():
    model = Network(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    model[2].weight = model[0].weight
    return model


def tokens():
    return Network(
        nn.Unflatten(1, (4, 2)),
        nn.Linear(2, 8),
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class Attention(nn.Module):
    """Attention to other tokens than its own: the packed weight is used in parts."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(4, 8), nn.Linear(4, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = x.unflatten(1, (2, 4))
        other = self.other(tokens)
        return self.head(self.attention(self.own(tokens), other, other)[0].mean(1))


def weight_normed():
    return Network(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, CLASSES))


NETWORKS = {
    "parts": Parts,
    "same": Same,
    "tied": tied,
    "tokens": tokens,
    "attention": Attention,
    "weight norm": weight_normed,
    "norms": lambda: Network(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU(), nn.RMSNorm(8), nn.Linear(8, CLASSES)),
    "images": lambda: Network(
        nn.Unflatten(1, (2, 2, 2)),
        *(nn.Conv2d(2, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4, CLASSES)),
    ),
    "vit": lambda: Network(
        nn.Linear(8, 48), nn.Unflatten(1, (3, 4, 4)), models.small_vit(CLASSES, 4, patch=2, dim=8, depth=2, heads=2)
    ),
}


def batches(dtype, steps=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor(LABELS)
    return [
        (torch.randn(len(y), 8, generator=generator).to(dtype), y[torch.randperm(len(y), generator=generator)])
        for _ in range(steps)
    ]


def made(model, plan, **more):
    model = copy.deepcopy(model)
    options = {"noise_ratio": 0.05, "lr": 0.1, "momentum": 0.9, **more}
    opt = lf.CCSAM(
        model.parameters(), torch.optim.SGD, class_counts=COUNTS, scope="all", model=model, plan=plan, **options
    )
    return model, opt


def closure_of(model, x, y, calls=None):
    def losses(index=slice(None)):
        logits = model(x[index])
        if calls is not None:
            calls.append(len(logits))
        return F.cross_entropy(logits, y[index], reduction="none")

    return losses


def trained(model, plan, dtype=torch.float64, closures=closure_of, **more):
    """The change of the weights in three steps."""
    model, opt = made(model, plan, **more)
    start = flat(model).clone()
    for x, y in batches(dtype):
        opt.step(closures(model, x, y), targets=y)
        assert not opt.is_perturbed
    return flat(model) - start


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def refusals(caplog):
    """What the log says of classes that cannot be evaluated at once."""
    caplog.set_level(logging.INFO, "ltsam_fast")
    return lambda: [one.getMessage() for one in caplog.records if "one after the other" in one.getMessage()]


ATTENTIVE = () if hasattr(torch.overrides, "redispatch_function") else ("tokens", "attention")
"""Networks whose classes are evaluated one by one on this torch."""


@pytest.mark.parametrize("flat_ratio", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_is_the_published_one(name, flat_ratio, refusals):
    single = (
        2e-3 if name == "vit" else 5e-6
    )  # its gradients are close to zero, and so radii far from it: rounding grows
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, single)):
        torch.manual_seed(2)
        model = NETWORKS[name]().to(dtype)
        ends = [trained(model, plan, dtype, flat_ratio=flat_ratio) for plan in ("auto", "published")]
        assert relative(*ends) < bound
    assert bool(refusals()) == (name in ATTENTIVE and flat_ratio > 0)


@pytest.mark.parametrize("base", (torch.optim.SGD, torch.optim.AdamW))
def test_with_groups_a_scaler_and_a_schedule_of_the_radius(base, refusals):
    ends = []
    for plan in ("auto", "published"):
        torch.manual_seed(2)
        model = NETWORKS["norms"]()
        groups = [
            {"params": [p for p in model.parameters() if p.dim() == 2], "maximize": True},
            {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.01},
        ]
        opt = lf.CCSAM(groups, base, class_counts=COUNTS, scope="all", noise_ratio=0.05, lr=0.1, model=model, plan=plan)
        start, scaler = flat(model).clone(), torch.amp.GradScaler("cpu", init_scale=64.0)
        for x, y in batches(torch.float32):
            opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
            scaler.update()
        ends.append(flat(model) - start)
    assert relative(*ends) < 1e-3
    assert not refusals()


@pytest.mark.parametrize("loss", ("torch", "CrossEntropy"))
def test_with_a_loss_of_the_step(loss, refusals):
    torch.manual_seed(2)
    model = NETWORKS["norms"]().double()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if loss == "torch" else lf.losses.CrossEntropy()
    ends = []
    for plan in ("auto", "published"):
        own, opt = made(model, plan)
        start = flat(own).clone()
        for x, y in batches(torch.float64):
            opt.step(lambda index=slice(None), own=own, x=x: own(x[index]), targets=y, loss=criterion)
        ends.append(flat(own) - start)
    assert relative(*ends) < 1e-12
    assert not refusals()


@pytest.mark.parametrize("name", ("norms", "tokens", "attention"))
@pytest.mark.parametrize("outside", (False, True))
def test_autocast(name, outside, refusals):
    def under_autocast(model, x, y):
        def losses(index=slice(None)):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(x[index]), y[index], reduction="none")

        return losses

    torch.manual_seed(2)
    model = NETWORKS[name]()
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        closures = closure_of if outside else under_autocast
        ends = [trained(model, plan, torch.float32, closures) for plan in ("auto", "published")]
    assert relative(*ends) < 0.05
    assert bool(refusals()) == (name in ATTENTIVE)


@pytest.mark.skipif(bool(ATTENTIVE), reason="this torch hides them")
@pytest.mark.parametrize("autocast", (False, True))
def test_attention_is_made_of_linear_layers(autocast, refusals, monkeypatch):
    """Else vmap would copy the weights for each sample."""
    shapes, linear = [], at_once._linear
    monkeypatch.setattr(at_once, "_linear", lambda x, *rest: shapes.append(rest[0][0].shape[1:]) or linear(x, *rest))
    model, opt = made(tokens(), "auto")
    (x, y), *_ = batches(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        opt.step(closure_of(model, x, y), targets=y)
    layers = [tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2]
    assert sorted(map(tuple, shapes)) == sorted(layers * 4)  # in two passes, of classes with one sample and with two
    assert not refusals()


def test_attention_on_a_torch_that_hides_its_linear_layers(refusals, monkeypatch):
    monkeypatch.delattr(torch.overrides, "redispatch_function", raising=False)
    torch.manual_seed(2)
    model = NETWORKS["attention"]().double()
    assert relative(*(trained(model, plan) for plan in ("auto", "published"))) < 1e-12
    (said,) = refusals()
    assert "multi_head_attention_forward needs a newer torch" in said


@pytest.mark.parametrize("transform", ("jvp", "grad"))
def test_a_closure_with_transforms_of_its_own(transform, refusals):
    def penalized(model, x, y):
        def losses(index=slice(None)):
            some = x[index]
            if transform == "jvp":
                _, slope = torch.func.jvp(model, (some,), (torch.ones_like(some),))
            else:
                slope = torch.func.grad(lambda x: model(x).sum())(some)
            return F.cross_entropy(model(some), y[index], reduction="none") + 0.01 * slope.square().sum(1)

        return losses

    torch.manual_seed(2)
    model = Network(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    ends = [trained(model, plan, closures=penalized) for plan in ("auto", "published")]
    assert relative(*ends) < 1e-12 and not refusals()


def passes_of(y):
    """How many samples of a class each pass of a step has."""
    torch.manual_seed(2)
    model, opt = made(NETWORKS["norms"](), "auto")
    x, y, calls = torch.randn(len(y), 8), torch.tensor(y), []
    for _ in range(3):
        calls.clear()
        opt.step(closure_of(model, x, y, calls), targets=y)
    return calls


def test_classes_with_as_many_samples_take_one_pass():
    """At w and at w + eps; class 9 alone has three samples."""
    assert passes_of(LABELS) == [2, 1, 3] * 2


def test_two_or_three_classes_are_faster_one_after_the_other():
    assert passes_of([0, 1, 2, 3, 3, 4, 4]) == [1, 1, 1, 2, 2] * 2


def test_the_mean_loss_is_that_of_the_batch():
    torch.manual_seed(2)
    model, opt = made(NETWORKS["norms"]().double(), "auto")
    for x, y in batches(torch.float64):
        wanted = closure_of(model, x, y)().mean()
        torch.testing.assert_close(opt.step(closure_of(model, x, y), targets=y), wanted.detach())


def test_dropout_draws_for_each_sample(refusals, monkeypatch):
    torch.manual_seed(2)
    model, opt = made(Network(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)), "auto")
    x, y, drawn, dropout = torch.ones(6, 8), torch.arange(6), [], F.dropout

    def recorded(*args, **kwargs):
        result = dropout(*args, **kwargs)
        if torch._C._functorch.is_batchedtensor(result):
            drawn.append(torch._C._functorch.get_unwrapped(result).clone())
        return result

    for step in range(3):
        if step == 2:
            monkeypatch.setattr(F, "dropout", recorded)
        opt.step(closure_of(model, x, y), targets=y)
    assert not refusals()
    assert [len(one.view(6, 8).unique(dim=0)) > 1 for one in drawn] == [True] * len(drawn) != []


def reads_on_the_host(model, x, y):
    def losses(index=slice(None)):
        chosen = torch.arange(len(y))[index].tolist()
        return F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")

    return losses


def refers_to_a_weight(model, x, y):
    head = model[-1].weight
    return lambda index=slice(None): closure_of(model, x, y)(index) + 0.1 * (x[index] @ head.T).square().sum(1)


def in_place(model, x, y):
    def losses(index=slice(None)):
        h = torch.zeros(CLASSES, dtype=x.dtype)
        h += model(x[index]).sum(0)  # of each class's weights
        return closure_of(model, x, y)(index) + 0 * h.sum()

    return losses


def padded(model, x, y):
    """A closure with an embedding, of which a row is to have no gradient, made of a network's first weight."""
    words = x.abs().mul(3).long() % 8

    def losses(index=slice(None)):
        tokens = F.embedding(words[index], model[0].weight, padding_idx=0).mean(1)
        return F.cross_entropy(
            model(x[index]) + tokens.sum(1, keepdim=True) * model[-1].bias, y[index], reduction="none"
        )

    return losses


class Twice(torch.autograd.Function):
    """A function that has no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def seeded(model, x, y):
    """A closure that masks the same features in every call; in a vmap each class would have others."""

    def losses(index=slice(None)):
        mask = torch.rand(CLASSES, generator=torch.Generator().manual_seed(0)) < 0.5
        return F.cross_entropy(model(x[index]) * mask, y[index], reduction="none")

    return losses


class WrongRule(torch.autograd.Function):
    """A function whose rule for vmap is another one's."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

    @staticmethod
    def vmap(info, in_dims, x):
        return 3 * x, in_dims[0]


def wrong_rule(model, x, y):
    return lambda index=slice(None): F.cross_entropy(WrongRule.apply(model(x[index])), y[index], reduction="none")


def own_function(model, x, y):
    return lambda index=slice(None): Twice.apply(closure_of(model, x, y)(index))


KEPT = []


def keeps_results(model, x, y):
    def losses(index=slice(None)):
        KEPT[:] = [model(x[index])]
        return F.cross_entropy(KEPT[0], y[index], reduction="none")

    return losses


def compiled_network(model, x, y):
    torch._dynamo.reset()
    return closure_of(torch.compile(model, backend="aot_eager"), x, y)


def compiled_function(model, x, y):
    torch._dynamo.reset()
    forward = torch.compile(lambda x: model(x), backend="aot_eager")
    return lambda index=slice(None): F.cross_entropy(forward(x[index]), y[index], reduction="none")


REFUSED = {
    "compiled network": (compiled_network, "torch.compile"),
    "compiled function": (compiled_function, "torch.compile"),
    "reads on the host": (reads_on_the_host, ""),
    "refers to a weight": (refers_to_a_weight, "refers to a weight by another name"),
    "in place": (in_place, "broadcast shape"),
    "an embedding with padding": (padded, "padding_idx"),
    "a generator of its own": (seeded, "gives other gradients"),
    "a wrong rule": (wrong_rule, "gives other gradients"),
    "a function of its own": (own_function, "autograd.Function"),
    "keeps results": (keeps_results, "keeps a result"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_at_once_is_evaluated_one_after_the_other(case, refusals):
    closures, reason = REFUSED[case]
    torch.manual_seed(2)
    model = NETWORKS["norms"]().double()
    ends = [trained(model, plan, closures=closures) for plan in ("auto", "published")]
    assert relative(*ends) < 1e-12
    (said,) = refusals()
    assert said.startswith("plan: classes are evaluated one after the other: ") and reason in said
    for one in KEPT:
        assert torch.isfinite(one).all()


def test_networks_with_hooks_or_compiled_modules_are_left_alone(refusals):
    for change in ("hook", "backward hook", "hook of a weight", "compiled"):
        torch.manual_seed(2)
        model, opt = made(NETWORKS["norms"](), "auto")
        if change == "hook":
            model[0].register_forward_hook(lambda *_: None)
        if change == "backward hook":
            model[0].register_full_backward_hook(lambda *_: None)
        if change == "hook of a weight":
            model[0].weight.register_hook(lambda grad: None)
        if change == "compiled":
            model[0].compile(backend="eager")
        x, y = batches(torch.float32, 1)[0]
        calls = []
        for _ in range(3):
            calls.clear()
            opt.step(closure_of(model, x, y, calls), targets=y)
        # A hook of a weight is to see the gradient of the mean loss, too.
        at_w = [16] if change == "hook of a weight" else [1] * 5 + [2] * 4 + [3]
        assert sorted(calls) == sorted([1] * 5 + [2] * 4 + [3] + at_w)
    assert len(refusals()) == 3


def test_an_error_in_the_closure_is_the_callers():
    """In any pass: the weights and the optimizer are as before the step."""
    for failing in range(6):
        torch.manual_seed(2)
        model, opt = made(NETWORKS["norms"](), "auto")
        x, y = batches(torch.float32, 1)[0]
        for _ in range(3):
            opt.step(closure_of(model, x, y), targets=y)
        before, calls = flat(model).clone(), []

        def closure(index=slice(None), model=model, x=x, y=y, calls=calls, failing=failing):
            if len(calls) >= failing:
                raise KeyError("no such image")
            return closure_of(model, x, y, calls)(index)

        with pytest.raises(KeyError, match="no such image"):
            opt.step(closure, targets=y)
        assert not opt.is_perturbed and torch.equal(flat(model), before)
        opt.step(closure_of(model, x, y), targets=y)
        assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("scope", ("all", "head"))
def test_ctrl_c_leaves_the_networks_own_weights(scope, monkeypatch):
    """Wherever it comes while ``functional_call`` exchanges them."""
    from torch.nn.utils import _named_member_accessor as accessor

    swap, calls = accessor.swap_tensor, [0]
    torch.manual_seed(2)
    model = NETWORKS["vit"]()
    more = {"scope": scope} if scope == "all" else {"scope": scope, "head": model[-1].head}
    opt = lf.CCSAM(
        model.parameters(), torch.optim.SGD, class_counts=COUNTS, model=model, noise_ratio=0.05, lr=0.1, **more
    )
    x, y = batches(torch.float32, 1)[0]

    def interrupted(*args, **kwargs):
        calls[0] -= 1
        if calls[0] == 0:
            raise KeyboardInterrupt
        return swap(*args, **kwargs)

    monkeypatch.setattr(accessor, "swap_tensor", interrupted)
    opt.step(closure_of(model, x, y), targets=y)
    own, before = dict(model.named_parameters()), flat(model).clone()
    for at in (1, 2, 3, 30, 60, 90, 120):
        calls[0] = at
        try:
            opt.step(closure_of(model, x, y), targets=y)
        except KeyboardInterrupt:
            assert torch.equal(flat(model), before) and not opt.is_perturbed
        found = dict(model.named_parameters())
        assert found.keys() == own.keys() and all(found[name] is own[name] for name in own)
        before = flat(model).clone()
