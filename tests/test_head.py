"""CC-SAM on networks that mix samples, and on such that don't: the same definition, whatever number of passes it takes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ltsam_fast as lf
from ltsam_fast import models

from .oracles import flat, relative_error

COUNTS = [90, 30, 5, 2]
Y = torch.tensor([0, 0, 3, 0, 1, 1, 0, 2])


class Centered(nn.Module):
    """Mixes samples, and is of no known type."""

    def forward(self, x):
        return x - x.mean(0)


@torch.no_grad()
def copied(weight):
    other = torch.empty(weight.shape, dtype=weight.dtype)
    torch._foreach_copy_([other], [weight])
    return 1 + other.mean()


READS = {
    "detached": lambda weight: 1 + weight.detach().mean(),
    "data": lambda weight: 1 + weight.data.mean(),
    "number": lambda weight: 1 + weight.mean().item(),
    "copied": copied,
}
"""Ways to read a weight of which no gradient tells."""


class Net(nn.Module):
    """A body, batch norm, and a head, used in some way."""

    def __init__(self, head=None, use="plain", norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6) if norm is None else norm
        self.head = nn.Linear(6, 4) if head is None else head
        self.use = use
        self.double()

    def forward(self, x):
        features = torch.tanh(self.norm(self.body(x)))
        if self.use == "functional":
            return F.linear(features, self.head.weight, self.head.bias)
        if self.use == "twice":
            return self.head(features) + self.head(0.5 * features)
        if self.use == "tied":
            return self.head(features @ self.head.weight.t() @ self.head.weight)
        if self.use == "checkpoint":
            return checkpoint(self.head, features, use_reentrant=False)
        if self.use == "reentrant":
            return checkpoint(self.head, features, use_reentrant=True)
        if self.use == "keyword":
            return self.head(input=features)
        if self.use == "centered behind":
            return Centered()(self.head(features))
        if self.use == "other weights":
            weights = {"weight": F.normalize(self.head.weight, dim=1), "bias": self.head.bias}
            return torch.func.functional_call(self.head, weights, (features,))
        if self.use in READS:
            return self.head(features) * READS[self.use](self.head.weight)
        if self.use == "in place":
            return self.head(features).mul_(2.0)
        return self.head(features)


class MLP(nn.Module):
    """A head with batch norm in it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        return self.layers(x)


class Detached(nn.Module):
    """Mixes samples where no gradient shows it."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * self.linear((x - x.mean(0).detach()) / (x.detach().abs().mean() + 1))


class ByPosition(nn.Module):
    """Knows which sample stands where."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("margins", torch.linspace(-1, 1, 8)[:, None])

    def forward(self, x):
        return self.scale * self.linear(x) * (1 + self.margins[: len(x)])


def zeros_behind_batch_norm():
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    nn.init.zeros_(head[1].weight)
    return head


def hooked():
    """As old weight norm has it: a hook makes the weight, before every forward."""
    head = nn.Linear(6, 4)
    head.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.detach().square().mean(),))
    return head


NETS = {
    "batch norm": (Net, 2),
    "layer norm": (lambda: Net(norm=nn.LayerNorm(6)), 2),
    "unknown mixing": (lambda: Net(norm=Centered()), 2),
    # A bias would have a gradient of nothing but rounding, along which CC-SAM's radius is huge.
    "mixing behind": (lambda: Net(head=nn.Linear(6, 4, bias=False), use="centered behind"), 5),
    "batch norm in the head": (lambda: Net(head=MLP()), 5),
    "layers in the head": (lambda: Net(head=nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))), 2),
    "weight norm": (lambda: Net(head=nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))), 5),
    "cosines": (lambda: Net(head=models.NormedLinear(6, 4)), 2),
    "detached mixing in the head": (lambda: Net(head=Detached()), 5),
    "a classifier of zeros behind batch norm": (lambda: Net(head=zeros_behind_batch_norm()), 5),
    "labels by position": (lambda: Net(head=ByPosition()), 5),
    "a hook in the head": (lambda: Net(head=hooked()), 5),
    "functional": (lambda: Net(use="functional"), 5),
    "twice": (lambda: Net(use="twice"), 5),
    "tied": (lambda: Net(use="tied"), 5),
    "checkpoint": (lambda: Net(use="checkpoint"), 2),
    "reentrant": (lambda: Net(use="reentrant"), 5),
    "keyword": (lambda: Net(use="keyword"), 5),
    "other weights": (lambda: Net(use="other weights"), 5),
    **{use: (lambda use=use: Net(use=use), 5) for use in READS},
    "in place": (lambda: Net(use="in place"), 2),
}
"""Networks, and the forward passes of a step whose batch has four classes."""


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def expected(model, scope, x, y, noise_ratio, flat_ratio=0.5, sign=1.0):
    """The direction, as defined, with whole batches; in a copy, whose gradients it leaves."""
    model = copy.deepcopy(model)
    names = {id(param): name for name, param in model.named_parameters()}
    params = list(model.parameters())
    scope = [param for param, chosen in zip(params, scope, strict=True) if chosen]
    for param in params:
        param.requires_grad_()
    assert names

    def gradient(weights):
        model.zero_grad()
        (weights * losses_of(model, x, y)).sum().backward()
        return {param: torch.zeros_like(param) if param.grad is None else param.grad.clone() for param in params}

    total = gradient(torch.full((len(y),), (1 - flat_ratio) / len(y), dtype=x.dtype))
    count = sum(param.numel() for param in scope)
    norm = math.sqrt(sum(param.square().sum().item() for param in scope)) + 1e-12
    for k in y.unique().tolist():
        mine = (y == k).to(x)
        at_w = gradient(mine / mine.sum())
        before = {param: param.detach().clone() for param in scope}
        with torch.no_grad():
            for param in scope:
                size = at_w[param].norm()
                if size:
                    n = max(COUNTS[k], 2) - 1
                    radius = noise_ratio * math.sqrt(norm / size / 2) / n**0.25 * count**0.25
                    param += sign * radius * at_w[param] / size
        there = gradient(flat_ratio * mine / len(y))
        with torch.no_grad():
            for param in params:
                total[param] += there[param]
                if param in before:
                    param.copy_(before[param])
    return torch.cat([total[param].flatten() for param in params])


def counted(model, x, y):
    """A closure, which notes its calls."""
    calls = []

    def closure(*args):
        calls.append(args)
        return losses_of(model, x, y)

    return closure, calls


GIVEN = [(name, given, "head") for name in NETS for given in ("module", "group, model")]
GIVEN += [
    (name, given, "head")
    for name in ("batch norm", "layer norm", "batch norm in the head", "reentrant")
    for given in ("module, model", "parameters", "parameters, model")
]
GIVEN += [(name, "module, model", "all") for name in NETS]


@pytest.mark.parametrize(("name", "given", "scope"), GIVEN)
def test_every_class_has_its_weights_and_all_share_the_batch(name, given, scope):
    make, passes = NETS[name]
    model, x = make(), torch.randn(8, 5, dtype=torch.float64)
    head = list(model.head.parameters())
    body = [param for param in model.parameters() if not any(param is one for one in head)]
    more = {"model": model} if "model" in given else {}
    if "group" not in given:
        more["head"] = model.head if "module" in given else head
    params = [{"params": body}, {"params": head}] if "group" in given else model.parameters()
    chosen = [scope == "all" or any(param is one for one in head) for param in model.parameters()]
    wanted = expected(model, chosen, x, Y, 0.3)
    before, state = flat(model), copy.deepcopy(model)
    opt = lf.CCSAM(params, torch.optim.SGD, class_counts=COUNTS, scope=scope, noise_ratio=0.3, lr=1.0, **more)
    closure, calls = counted(model, x, Y)
    loss = opt.step(closure, targets=Y)
    assert relative_error(before - flat(model), wanted) < 1e-9
    torch.testing.assert_close(loss, losses_of(state, x, Y).mean().detach())
    assert not any(calls)
    if scope == "head" and given != "parameters":
        assert len(calls) == passes
    elif scope == "all":
        assert len(calls) == 5
    if "model" in given and isinstance(model.norm, nn.BatchNorm1d):
        assert model.norm.num_batches_tracked == 1
        torch.testing.assert_close(model.norm.running_mean, state.norm.running_mean)
        assert model.norm.track_running_stats
    assert "forward" not in vars(model.head) and "forward" not in vars(model)


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_with_radius_0_a_step_is_the_base_optimizers(base, scope):
    """On a network with batch norm, with micro-batches too."""
    ours, theirs = Net(), Net()
    opt = lf.CCSAM(
        ours.parameters(), base, class_counts=COUNTS, head=ours.head, scope=scope, noise_ratio=0.0, lr=0.01, model=ours
    )
    plain = base(theirs.parameters(), lr=0.01)
    torch.manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 5, dtype=torch.float64)
        parts = [(x[:5], Y[:5]), (x[5:], Y[5:])]
        opt.step([lambda a=a, b=b: losses_of(ours, a, b) for a, b in parts], targets=[b for _, b in parts])
        plain.zero_grad()
        sum(losses_of(theirs, *part).sum() / 8 for part in parts).backward()
        plain.step()
    assert relative_error(flat(ours), flat(theirs)) < 1e-12
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "twice"])
def test_maximizing_a_loss_is_minimizing_its_negative(name, frozen):
    ends = []
    for maximize in (False, True):
        model = NETS[name][0]()
        for param in (*model.body.parameters(), *model.norm.parameters()):
            param.requires_grad_(not frozen)
        opt = lf.CCSAM(
            model.parameters(), torch.optim.SGD, class_counts=COUNTS, head=model.head, noise_ratio=0.3, lr=0.1,
            momentum=0.9, maximize=maximize,
        )  # fmt: skip
        torch.manual_seed(1)
        for _ in range(5):
            x = torch.randn(8, 5, dtype=torch.float64)
            opt.step(lambda m=model, x=x, s=-1 if maximize else 1: s * losses_of(m, x, Y), targets=Y)
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize("name", ["batch norm", "twice", "batch norm in the head"])
def test_an_error_in_the_second_pass_leaves_everything_as_it_was(name):
    model, x = NETS[name][0](), torch.randn(8, 5, dtype=torch.float64)
    opt = lf.CCSAM(
        model.parameters(), torch.optim.SGD, class_counts=COUNTS, head=model.head, noise_ratio=0.3, lr=0.1, model=model
    )
    before, calls = flat(model), []

    def closure():
        calls.append(None)
        out = losses_of(model, x, Y)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return out

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure, targets=Y)
    assert torch.equal(flat(model), before)
    assert model.norm.track_running_stats and "forward" not in vars(model.head)
    assert not model.head._forward_hooks and not model.head._forward_pre_hooks
    again = copy.deepcopy(opt)
    assert again.step(lambda: losses_of(again.model, x, Y), targets=Y).isfinite()


def test_overflow_leaves_weights():
    model, x = Net(), torch.randn(8, 5, dtype=torch.float64)
    opt = lf.CCSAM(model.parameters(), torch.optim.SGD, class_counts=COUNTS, head=model.head, noise_ratio=0.3, lr=0.1)
    before = flat(model)
    opt.step(lambda: losses_of(model, x, Y) * torch.inf, targets=Y, scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(flat(model), before)


def test_the_head_is_the_last_group_that_has_parameters():
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for empty in ([], [{"params": []}]):
        model = Net()
        groups = [{"params": list(model.body.parameters())}, {"params": list(model.head.parameters())}, *empty]
        opt = lf.CCSAM(groups, torch.optim.SGD, class_counts=COUNTS, noise_ratio=0.3, lr=1.0, model=model)
        opt.step(lambda model=model: losses_of(model, x, Y), targets=Y)
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_groups_that_are_not_to_be_perturbed_are_not(scope):
    """With none left a step is the base's."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, twin = Net(), Net()
    groups = [{"params": list(model.parameters()), "perturb": False}]
    opt = lf.CCSAM(groups, torch.optim.SGD, class_counts=COUNTS, scope=scope, noise_ratio=0.3, lr=0.1, head=model.head)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1)
    opt.step(lambda: losses_of(model, x, Y), targets=Y)
    losses_of(twin, x, Y).mean().backward()
    sgd.step()
    assert relative_error(flat(model), flat(twin)) < 1e-12


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("of", ["head", "body"])
def test_hooks_on_weights_see_the_gradients_of_the_published_passes(of, scope):
    ends, x = [], torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for plan in ("published", "auto"):
        model = Net(norm=nn.LayerNorm(6))
        getattr(model, of).weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        opt = lf.CCSAM(
            model.parameters(), torch.optim.SGD, class_counts=COUNTS, scope=scope, noise_ratio=0.3, lr=1.0, model=model,
            plan=plan,
        )  # fmt: skip
        for _ in range(2):
            opt.step(lambda i=slice(None), model=model: losses_of(model, x[i], Y[i]), targets=Y)
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-12


def test_a_checkpoint_in_the_closure_over_a_head_behind_a_frozen_body():
    ends, x = [], torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for plan in ("published", "auto"):
        model = Net(norm=nn.LayerNorm(6), use="checkpoint")
        model.body.requires_grad_(False)
        model.norm.requires_grad_(False)
        opt = lf.CCSAM(
            model.parameters(), torch.optim.SGD, class_counts=COUNTS, noise_ratio=0.3, lr=1.0, model=model, plan=plan
        )
        opt.step(lambda model=model: losses_of(model, x, Y), targets=Y)
        ends.append(flat(model))
    assert relative_error(*ends) < 1e-12


def test_a_hook_that_comes_later_is_seen():
    """The head of the second step is not the one that the first step knew."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Net()
    opt = lf.CCSAM(model.parameters(), torch.optim.SGD, class_counts=COUNTS, head=model.head, noise_ratio=0.3, lr=1.0)
    opt.step(lambda: losses_of(model, x, Y), targets=Y)
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.detach().square().mean(),))
    head = {id(param) for param in model.head.parameters()}
    wanted = expected(model, [id(param) in head for param in model.parameters()], x, Y, 0.3)
    before = flat(model)
    closure, calls = counted(model, x, Y)
    opt.step(closure, targets=Y)
    assert relative_error(before - flat(model), wanted) < 1e-9 and len(calls) == 5
