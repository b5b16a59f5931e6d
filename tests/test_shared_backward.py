"""One sweep gives what two backwards give, on every kind of network, or says why it can't."""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ltsam_fast as lf
from ltsam_fast.diagnostics import per_class
from ltsam_fast.shared import NotShared, SharedBackward, Weighting, qualify
from ltsam_fast.shared.layout import Layout, SampledElements, distinct_seeds

from .networks import BATCH, CLASSES, NETWORKS, Encoder, Residual, ResNet, Tied, images

COUNTS = [90, 9, 1]
METHODS = {
    "Focal-SAM": ("FocalSAM", {"class_counts": COUNTS, "gamma": 2.0, "lam": 0.6}),
    "Focal-SAM, u changes its sign": ("FocalSAM", {"class_counts": COUNTS, "gamma": 0.1, "lam": 1.1}),
    "ImbSAM": ("ImbSAM", {"class_counts": COUNTS, "eta": 20, "tail_weight": 2.0}),
    "SSE-SAM": ("SSESAM", {"class_counts": COUNTS, "eta": 20, "switch_step": 1}),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def cast(model, inputs, dtype):
    return model.train().to(dtype), [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def losses_of(model, inputs, targets, seed):
    torch.manual_seed(seed)  # the same dropout both ways
    return F.cross_entropy(
        model(*inputs).float() if targets.dtype == torch.float32 else model(*inputs), targets, reduction="none"
    )


def error(found, wanted):
    """Of the whole gradient, and of each parameter's against the largest: keys of attention have a gradient of zero."""
    zeros = [torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)]
    largest = max(w.norm() for w in wanted)
    each = max((f - w).norm() / (w.norm() + 1e-3 * largest) for f, w in zip(zeros, wanted, strict=True))
    return float(each)


def both_ways(model, inputs, u, v, native=True):
    """Gradients with weights u and v: by two backwards, and by one sweep (None: refused for now)."""
    targets = torch.randint(CLASSES, (BATCH,))
    params = [p for p in model.parameters() if p.requires_grad]
    seed = int(torch.randint(1000, ()))
    losses = losses_of(model, inputs, targets, seed)
    wanted = [
        [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
        for grads in (
            torch.autograd.grad(losses, params, u.to(losses), retain_graph=True, allow_unused=True),
            torch.autograd.grad(losses, params, v.to(losses), allow_unused=True),
        )
    ]
    model.zero_grad(set_to_none=True)
    shared = SharedBackward(model, params)
    with shared.record_outputs():
        losses = losses_of(model, inputs, targets, seed)
    u, v = u.to(losses), v.to(losses)
    if not native:
        return wanted, shared(losses, torch.ones_like(u), [Weighting.sparse(u), v], native=False)
    found = shared(losses, u, [v / u])
    return wanted, found and [[p.grad for p in params], found[0]]


def weights():
    u, v = torch.rand(2, BATCH, dtype=torch.float64)
    return u + 0.1, v * (torch.arange(BATCH) != 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("native", (True, False), ids=("one of two", "both"))
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_two_backwards(name, native, dtype):
    model, inputs = cast(*NETWORKS[name](), dtype)
    for wanted, found in zip(*both_ways(model, inputs, *weights(), native), strict=True):
        assert error(found, wanted) < TOLERANCE[dtype]


def ways_apart(name, method, dtype):
    """How far weights are after three steps by one sweep from those by two backwards, and how far they went."""
    kind, options = METHODS[method]
    start, inputs = cast(*NETWORKS[name](), dtype)
    ends = []
    for plan in ("published", "require"):
        model = copy.deepcopy(start)
        opt = getattr(lf, kind)(
            [p for p in model.parameters() if p.requires_grad], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, model=model,
            plan=plan, **options,
        )  # fmt: skip
        for seed, y in enumerate(([0, 1, 2, 0], [0, 0, 0, 0], [1, 2, 0, 1])):
            y = torch.tensor(y)
            opt.step(lambda y=y, seed=seed, model=model: losses_of(model, inputs, y, seed), targets=y)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert len(opt.network._shared._plans) == 1  # it was the sweep that ran
    begin = torch.cat([p.detach().flatten() for p in start.parameters()])
    return (ends[1] - ends[0]).norm(), (ends[0] - begin).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_two_backwards(name, method):
    apart, moved = ways_apart(name, method, torch.float64)
    assert apart < 1e-12 * moved


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_in_fp32(name):
    apart, moved = ways_apart(name, "Focal-SAM", torch.float32)
    assert apart < 1e-5 * moved


@pytest.mark.parametrize("make", (lambda: Encoder().eval(), lambda: Encoder(True)), ids=("batch second", "batch first"))
def test_batches_of_other_sizes_take_the_same_plan(make):
    model = make().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    params = list(model.parameters())
    shared = SharedBackward(model, params)
    for batch, length in ((4, 8), (6, 8), (3, 5)):
        x, y = torch.randn(batch, length, 5).double(), torch.randint(CLASSES, (batch,))
        v = torch.rand(batch).double()
        with shared.record_outputs():
            losses = F.cross_entropy(model(x), y, reduction="none")
        wanted = torch.autograd.grad(losses, params, v, retain_graph=True)
        (found,) = shared(losses, torch.ones_like(v), [v])
        assert error(found, wanted) < 1e-12
    assert len(shared._plans) == 1


# --- what does not qualify


class Norm(nn.Module):
    """Subtracts what its function makes of the batch."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, 6), nn.Linear(6, CLASSES), function

    def forward(self, x):
        h = self.first(x)
        return self.last(h - self.function(h))


def with_batch_norm():
    torch.manual_seed(0)
    return ResNet(frozen=False), images(8)


MIXING = {
    "batch norm": (with_batch_norm, "blocks.0.bn1 .*BatchNorm2d"),
    "the batch's mean": (lambda: (Norm(lambda h: h.mean(0)), (torch.randn(BATCH, 5),)), "first .*Linear"),
    "a neighbour, hardly": (lambda: (Norm(lambda h: 1e-3 * h.roll(1, 0)), (torch.randn(BATCH, 5),)), "first .*Linear"),
    "the largest": (lambda: (Norm(lambda h: h.amax(0)), (torch.randn(BATCH, 5),)), "first .*Linear"),
}


def focal(model, plan, **options):
    return lf.FocalSAM(
        model.parameters(), torch.optim.SGD, class_counts=COUNTS, lr=0.1, model=model, plan=plan, **options
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", MIXING)
def test_mixing_is_refused_by_name(case, dtype):
    make, message = MIXING[case]
    model, inputs = cast(*make(), dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotShared, match=message):
        y = torch.tensor([0, 1, 2, 0])
        focal(model, "require").step(lambda: losses_of(model, inputs, y, 0), targets=y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("case", MIXING)
def test_mixing_falls_back_with_one_line(case, caplog):
    make, message = MIXING[case]
    start, inputs = cast(*make(), torch.float64)
    ends, y = [], torch.tensor([0, 1, 2, 0])
    for plan in ("published", "auto"):
        model = copy.deepcopy(start)
        opt = focal(model, plan)
        with caplog.at_level(logging.WARNING, "ltsam_fast"):
            for _ in range(3):
                opt.step(lambda model=model: losses_of(model, inputs, y, 0), targets=y)
        ends.append(list(model.parameters()))
    (record,) = caplog.records
    assert re.search(message, record.getMessage())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_contrastive_loss_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x, y = torch.randn(BATCH, 5).double(), torch.tensor([0, 1, 1, 0])

    def closure():
        z = F.normalize(model(x))
        return F.cross_entropy(z @ z.t(), torch.tensor([3, 2, 1, 0]), reduction="none")

    with pytest.raises(NotShared, match=r"samples mix after 2 \(Linear\)"):
        focal(model, "require").step(closure, targets=y)


def test_what_cannot_be_followed_is_refused():
    model = nn.Linear(5, CLASSES)
    for plan, given, message in (("require", None, "model must be given"), ("yes", model, "plan must be")):
        with pytest.raises(ValueError, match=message):
            lf.ImbSAM(model.parameters(), torch.optim.SGD, class_counts=COUNTS, lr=0.1, plan=plan, model=given)
    model.weight.register_hook(lambda grad: grad.clamp(-1, 1))
    y = torch.tensor([0, 1, 2, 0])
    with pytest.raises(NotShared, match="weight is hooked"):
        focal(model, "require").step(lambda: losses_of(model, (torch.ones(BATCH, 5),), y, 0), targets=y)


# --- the examination


def test_examining_disturbs_nothing():
    model, inputs = cast(*NETWORKS["ViT + LoRA"](), torch.float32)
    start = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    params = [p for p in model.parameters() if p.requires_grad]
    shared, weighting = SharedBackward(model, params), torch.rand(BATCH)
    with shared.record_outputs():
        losses = F.cross_entropy(model(*inputs), torch.tensor([0, 1, 2, 0]), reduction="none")
    state = torch.get_rng_state()
    assert shared(losses, torch.ones(BATCH), [weighting], native=False) is not None
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert versions == [p._version for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start.values(), model.state_dict().values(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "shape, dim, outer, inner", [((12, 5), 0, 1, 3), ((12, 5), 0, 3, 1), ((3, 24), 1, 2, 3), ((4, 4), 1, 1, 1)]
)
def test_layouts_are_recognized(shape, dim, outer, inner):
    grad = torch.randn(shape)
    seeds, truth = distinct_seeds(4), Layout(dim, outer, inner)
    (found,) = SampledElements(grad).layouts(grad * truth.rows(seeds, grad), seeds)
    for batch in (4,) if outer > 1 and inner > 1 else (4, 2):
        other = torch.zeros([size // 4 * batch if d == dim else size for d, size in enumerate(shape)])
        marks = torch.arange(batch)
        index = torch.arange(outer * batch * inner).div(inner, rounding_mode="floor") % batch
        assert torch.equal(found.rows(marks, other).flatten(), marks[index])


# --- autocast, checkpoints, compiled blocks, batches in parts, scaler


def test_autocast_is_as_close_as_two_backwards():
    model, inputs = cast(*NETWORKS["TransformerEncoder"](), torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    u, v = weights()
    with torch.autocast("cpu", torch.bfloat16):
        targets = torch.randint(CLASSES, (BATCH,))
        params = list(model.parameters())
        shared = SharedBackward(model, params)
        with shared.record_outputs():
            losses = losses_of(model, inputs, targets, 0)
    wanted = torch.autograd.grad(losses, params, v.float(), retain_graph=True)
    (found,) = shared(losses, u.float(), [(v / u).float()])
    assert all(grad.dtype == torch.float32 for grad in found) and error(found, wanted) < 0.05


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block, self.more = Residual(8, 8, 1).eval(), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)
        self.reentrant, self.runs = reentrant, 0
        self.more.register_forward_pre_hook(lambda *_: setattr(self, "runs", self.runs + 1))

    def train(self, mode=True):
        super().train(mode)
        self.block.eval()
        return self

    def forward(self, x):
        h = self.stem(x)
        for module in (self.block, self.more):
            h = checkpoint(module, h, use_reentrant=self.reentrant)
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("native", (True, False), ids=("one of two", "both"))
def test_checkpoints(native):
    model, inputs = cast(Checkpointed(False), images(8), torch.float64)
    for wanted, found in zip(*both_ways(model, inputs, *weights(), native), strict=True):
        assert error(found, wanted) < 1e-12


def test_checkpoints_are_computed_no_more_often_than_by_two_backwards():
    model, inputs = cast(Checkpointed(False), images(8), torch.float64)
    y, opt = torch.tensor([0, 1, 2, 0]), focal(model, "require")
    opt.step(lambda: losses_of(model, inputs, y, 0), targets=y)
    before = model.runs
    opt.step(lambda: losses_of(model, inputs, y, 0), targets=y)
    assert model.runs - before == 5  # two forwards, and anew for both weightings and the second backward


def test_what_checkpoints_hide_is_refused():
    y = torch.tensor([0, 1, 2, 0])
    model, inputs = cast(Checkpointed(True), images(8), torch.float64)
    with pytest.raises(NotShared, match="use_reentrant"):
        focal(model, "require").step(lambda: losses_of(model, inputs, y, 0), targets=y)
    model = Checkpointed(False)
    model.last = model.more.bias
    model, inputs = cast(model, images(8), torch.float64)
    with pytest.raises(NotShared, match="last, of an activation checkpoint, is used outside"):
        focal(model, "require").step(lambda: losses_of(model, inputs, y, 0) * model.last.sum(), targets=y)


@pytest.mark.parametrize("name", ("ViT", "Swin", "BERT"))
def test_checkpoints_of_transformers(name):
    model, inputs = NETWORKS[name]()
    model.body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, inputs = cast(model, inputs, torch.float64)
    for frozen in (False, True):
        first = next(module for module in model.modules() if type(module).__name__.endswith(("Layer", "Stage")))
        first.requires_grad_(not frozen)
        for wanted, found in zip(*both_ways(model, inputs, *weights()), strict=True):
            assert error(found, wanted) < 1e-12


def test_a_batch_in_parts_and_a_scaler():
    ends = []
    for plan in ("published", "require"):
        torch.manual_seed(0)
        model = Tied().double()
        opt = focal(model, plan, rho=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            x, y = torch.randn(2, BATCH, 6).double(), torch.randint(CLASSES, (2, BATCH))
            closures = [lambda i=i: losses_of(model, (x[i],), y[i], 0) for i in range(2)]  # noqa: B023
            opt.step(closures, targets=list(y), scaler=scaler)
            scaler.update()
            torch.manual_seed(1)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[1] - ends[0]).norm() < 1e-12 * ends[0].norm()


def test_copies_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    x, y = torch.randn(BATCH, 5).double(), torch.tensor([0, 1, 2, 0])
    opt = copy.deepcopy(focal(model, "require"))
    assert opt.plan == "require"
    inner = opt.model
    opt.step(lambda: losses_of(inner, (x,), y, 0), targets=y)
    inner[0].weight.requires_grad_(False)
    frozen = inner[0].weight.clone()
    for _ in range(2):
        opt.step(lambda: losses_of(inner, (x,), y, 0), targets=y)
    assert torch.equal(frozen, inner[0].weight) and len(opt.network._shared._plans) == 2


# --- gradients of classes


@pytest.mark.parametrize("name", ("ViT", "ConvNeXt", "BERT", "TransformerEncoder", "tied"))
@pytest.mark.parametrize("at_once", (1, 2, 10**6), ids=("a class", "two classes", "all"))
def test_gradients_of_classes_in_mixed_batches(name, at_once, monkeypatch):
    make, (inputs, *_) = NETWORKS[name]()
    model, (x,) = cast(make, [inputs[:1].repeat(11, *[1] * (inputs.dim() - 1))], torch.float64)
    x = torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 50)
    monkeypatch.setattr(per_class, "_GRADIENT_BYTES", at_once * sum(p.nbytes for p in model.parameters()))
    y = torch.tensor([0, 2, 2, 0, 0, 4, 0, 2, 0, 0, 1])
    loss = nn.CrossEntropyLoss(reduction="none")
    norms = [
        per_class.class_grad_norms(
            model, lambda z, c: loss(z, c % CLASSES), x, y, num_classes=6, batch_size=size, exact=exact
        ).norms
        for exact, size in ((False, 256), (True, 4), (True, 7))
    ]
    for found in norms[1:]:
        torch.testing.assert_close(found, norms[0], rtol=1e-10, atol=0, equal_nan=True)
    assert not any(p.grad is not None for p in model.parameters()) and model.training


def test_gradients_of_classes_refuse_mixing():
    model = Norm(lambda h: h.mean(0))
    with pytest.raises(NotShared, match="first"):
        per_class.class_grad_norms(
            model,
            nn.CrossEntropyLoss(reduction="none"),
            torch.randn(6, 5),
            torch.arange(6) % 3,
            num_classes=3,
            exact=True,
        )


@pytest.mark.parametrize("scope", ("head", "all"))
def test_steps_of_cc_sam(scope):
    start, (x,) = cast(*NETWORKS["MLP-Mixer"](), torch.float64)
    ends = []
    for plan in ("published", "require"):
        model = copy.deepcopy(start)
        groups = [
            {"params": [*model.stem.parameters(), *model.blocks.parameters()]},
            {"params": list(model.head.parameters())},
        ]
        opt = lf.CCSAM(
            groups, torch.optim.SGD, class_counts=COUNTS, scope=scope, noise_ratio=1e-2, lr=0.1, model=model,
            plan=plan,
        )  # fmt: skip
        for y in ([0, 1, 2, 0], [1, 2, 1, 1]):
            y = torch.tensor(y)

            def closure(model=model, y=y):  # with an index each class would have a sub-batch
                return F.cross_entropy(model(x), y, reduction="none")

            opt.step(closure, targets=y)
        ends.append(torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]))
    if scope == "all":
        assert len(opt.network._shared._plans) == 1
    assert (ends[1] - ends[0]).norm() < 1e-12 * ends[0].norm()


def test_a_compiled_block_is_one_use():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)), nn.Linear(6, CLASSES)
    )
    model[1] = torch.compile(model[1], backend="aot_eager")
    model, inputs = cast(model, (torch.randn(BATCH, 5),), torch.float64)
    for wanted, found in zip(*both_ways(model, inputs, *weights()), strict=True):
        assert error(found, wanted) < 1e-12


def test_what_has_no_gradient_is_looked_at_again_and_named(caplog):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.on = nn.Linear(5, 6), nn.Linear(6, CLASSES), 0.0

        def forward(self, x):
            return self.last(self.first(x) * self.on + x.sum(1, keepdim=True))

    model = Gated().double()
    x, y = torch.randn(BATCH, 5).double(), torch.tensor([0, 1, 2, 0])
    opt = focal(model, "require")
    for _ in range(12):
        opt.step(lambda: losses_of(model, (x,), y, 0), targets=y)
    (record,) = caplog.records
    assert "first" in record.getMessage() and not opt.network._shared._plans
    model.on = 1.0
    for _ in range(12):
        opt.step(lambda: losses_of(model, (x,), y, 0), targets=y)
    assert len(opt.network._shared._plans) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_running_checkpoint_is_known_in_old_versions_of_torch_too(reentrant, monkeypatch):
    """Where torch does not tell, by the calls that are under way; a nested one is another."""

    def both():
        new = qualify.current_checkpoint()
        with monkeypatch.context() as patch:
            patch.setattr(qualify, "_top_hooks", None)
            return new, qualify.current_checkpoint()

    def inner(x):
        found.append(both())
        return x.sin()

    def outer(x):
        found.append(both())
        y = checkpoint(inner, x, use_reentrant=reentrant)
        found.append(both())
        return y + checkpoint(inner, x, use_reentrant=reentrant)

    found = [both()]
    y = checkpoint(outer, torch.ones(3, requires_grad=True), use_reentrant=reentrant)
    found.append(both())
    for kind in (0, 1):
        none, first, second, again, third, after = (one[kind] for one in found)
        assert none is after is None
        if reentrant:
            assert first is second is again is third is None
        else:
            assert first is again and len({first, second, third}) == 3 and None not in (first, second, third)
    assert y.requires_grad
