"""Every method of the family against its oracle, and what each must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import ltsam_fast as lf

from . import oracles_family as family
from .family import EACH, RHO, ROWS, Row, closure_of, drive, expected
from .methods import BASES, on_cpu
from .oracles import CLASSES, COUNTS, FEATURES, batches, flat, network, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
each = pytest.mark.parametrize("name", EACH)


# --- the formula


@on_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("base", ["nesterov", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", ROWS)
def test_25_steps_agree_with_the_oracle(name, base, dtype, backend):
    if name in ("ESAM", "ESAM-tensor") and (base, dtype) == ("rmsprop", torch.float32):
        pytest.skip("two samples' losses rise so much alike that rounding decides which of them is kept")
    kind, options = BASES[base]
    model = network(dtype)
    losses = drive(ROWS[name].make(model, kind, **options), model, batches(dtype))
    weights, means = expected(name, base)
    assert relative_error(flat(model), weights) < TOLERANCE[dtype]
    assert relative_error(torch.stack(losses).double(), torch.tensor(means, dtype=torch.float64)) < TOLERANCE[dtype]


def two_groups(model):
    params = list(model.parameters())
    return [{"params": params[:2], "rho": 0.05, "lr": 0.05}, {"params": params[2:], "rho": 0.3}]


@on_cpu
@each
def test_groups_with_radii_of_their_own(name, backend):
    kind, options = BASES["momentum"]
    row, model = ROWS[name], network()
    if row.options.get("tail_rho"):
        row = ROWS["SSESAM-1"]
    more = {"scope": "head"} if name == "CCSAM" else {}
    drive(row.make(model, kind, two_groups(model), **options, **more), model, batches())
    row = Row(row.method, row.oracle, row.options | more, row.others)
    assert relative_error(flat(model), row.expected(kind, options, batches(), two_groups)[0]) < 1e-9


def test_gsam_ties_the_radius_to_the_learning_rate():
    model = network()
    opt = ROWS["GSAM-lr"].make(model, SGD, lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)
    for x, y in batches():
        opt.step(closure_of(model, x, y))
        schedule.step()
    others = {"schedule": lambda step: 0.9**step}
    row = Row("GSAM", family.gsam, ROWS["GSAM-lr"].options, others)
    assert relative_error(flat(model), row.expected(SGD, {"lr": 0.2, "momentum": 0.9}, batches())[0]) < 1e-9


@each
def test_clips_inside_the_update(name):
    kind, options = BASES["momentum"]
    row, model = ROWS[name], network()
    drive(row.make(model, kind, max_grad_norm=0.05, **options), model, batches())
    row = Row(row.method, row.oracle, row.options, row.others | {"max_grad_norm": 0.05})
    assert relative_error(flat(model), row.expected(kind, options, batches())[0]) < 1e-9


# --- batches


@pytest.mark.parametrize("labels", [[0], [3], [0, 0, 0], [3, 3], [1, 1, 2, 2]], ids=str)
@each
def test_batches_of_one_and_of_few_classes(name, labels):
    y = torch.tensor(labels)
    data = [(torch.randn(len(y), FEATURES, generator=torch.Generator().manual_seed(i)).double(), y) for i in range(4)]
    kind, options = BASES["momentum"]
    model = network()
    drive(ROWS[name].make(model, kind, **options), model, data)
    assert relative_error(flat(model), ROWS[name].expected(kind, options, data)[0]) < 1e-9


@pytest.mark.parametrize("sizes", [(16,), (9, 7), (1, 15)], ids=str)
@each
def test_a_batch_in_parts_is_one_step(name, sizes):
    """But for what looks at parts by its nature: micro-batches and the samples that are selected."""
    if name in ("MSAM", "ESAM", "SparseSAM") and len(sizes) > 1:
        pytest.skip(f"{name} treats each part by itself")
    results = []
    for parts in ((16,), sizes):
        model = network()
        opt = ROWS[name].make(model, SGD, lr=0.1, momentum=0.9)
        losses = []
        for x, y in batches(steps=6):
            pieces = list(zip(x.split(parts), y.split(parts), strict=True))
            losses.append(opt.step([closure_of(model, *piece) for piece in pieces], [piece[1] for piece in pieces]))
        results.append((flat(model), torch.stack(losses)))
    assert relative_error(results[1][0], results[0][0]) < 1e-12
    torch.testing.assert_close(results[1][1], results[0][1])


@pytest.mark.parametrize("name", ["GNM", "FriendlySAM", "MSAM", "SparseSAM", "ESAM", "LookSAM", "GSAM", "WSAM"])
def test_needs_no_targets(name):
    results = []
    for given in (True, False):
        model = network()
        opt = ROWS[name].make(model, SGD, lr=0.1)
        for x, y in batches(steps=5):
            opt.step(closure_of(model, x, y), targets=y if given else None)
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["CCSAM", "MSAM", "ESAM"])
def test_a_closure_may_need_its_index(name):
    (x, y), *_ = batches()
    results = []
    for required in (False, True):
        model = network()
        closure = closure_of(model, x, y)
        ROWS[name].make(model, SGD, lr=0.1).step(
            (lambda index, c=closure: c(index)) if required else closure, targets=y
        )
        results.append(flat(model))
    assert torch.equal(*results)
    if name == "CCSAM":  # it evaluates whole batches only
        return
    model = network()
    before = flat(model)
    with pytest.raises(ValueError, match="closure must take an index"):
        ROWS[name].make(model, SGD, lr=0.1).step(lambda: F.cross_entropy(model(x), y, reduction="none"), targets=y)
    assert torch.equal(flat(model), before)


# --- parameters


class Forked(nn.Module):
    """Weights that only one of the passes uses, one that none uses, a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.later, self.idle, self.frozen = (nn.Linear(FEATURES, CLASSES) for _ in range(5))
        self.frozen.requires_grad_(False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) + self.frozen(x) + (self.first if self.calls == 1 else self.later)(x)


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@each
def test_parameters_without_a_gradient_in_a_pass(name, base):
    kind, options = BASES[base]
    model = Forked()
    before = copy.deepcopy(model.state_dict())
    opt = ROWS[name].make(model, kind, **{**options, "weight_decay": 0.0})
    for x, y in batches(torch.float32, steps=2):
        model.calls = 0
        opt.step(closure_of(model, x, y), targets=y)
    after = model.state_dict()
    for key in before:
        if key.split(".")[0] in ("idle", "frozen"):
            assert torch.equal(before[key], after[key]), f"{key} has no gradient and must stay"
        assert bool(after[key].isfinite().all())
    assert not torch.equal(before["body.weight"], after["body.weight"])
    assert not opt.is_perturbed


@each
def test_a_group_that_is_not_perturbed_stays_where_it_is_seen(name):
    model = network()
    params = list(model.parameters())
    groups = [{"params": params[:2], "perturb": False}, {"params": params[2:]}]
    opt = ROWS[name].make(model, SGD, groups, lr=0.0)
    old, seen = flat(params[:2]), []

    def closure(index=slice(None)):
        seen.append(torch.equal(flat(params[:2]), old))
        return F.cross_entropy(model(x[index]), y[index], reduction="none")

    (x, y), *_ = batches()
    opt.step(closure, targets=y)
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each
def test_weights_of_16_bits_learn(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)).to(dtype)
    x = torch.randn(64, FEATURES).to(dtype)
    y = x.float()[:, :CLASSES].argmax(1)
    opt = ROWS[name].make(model, SGD, rho=0.05, lr=0.2, momentum=0.9)
    closure = closure_of(model, x, y)
    first = closure().mean().item()
    for _ in range(40):
        opt.step(closure, targets=y)
    assert closure().mean().item() < 0.7 * first


# --- state


@on_cpu
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_has_the_same_bits(name, base, backend):
    kind, options = BASES[base]
    data = batches(torch.float32)
    whole = network(torch.float32)
    drive(ROWS[name].make(whole, kind, **options), whole, data)
    model = network(torch.float32)
    opt = ROWS[name].make(model, kind, **options)
    drive(opt, model, data[:11])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    model = network(torch.float32, seed=7)
    opt = ROWS[name].make(model, kind, **options)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    drive(opt, model, data[11:])
    assert torch.equal(flat(model), flat(whole))


@each
def test_copies_and_pickles_go_on_by_themselves(name):
    data = batches(steps=10)
    model = network()
    opt = ROWS[name].make(model, SGD, lr=0.1, momentum=0.9)
    drive(opt, model, data[:5])
    pair = copy.deepcopy((model, opt))
    again = pickle.loads(pickle.dumps((model, opt)))
    for other, its in ((model, opt), pair[::1], again):
        drive(its, other, data[5:])
    assert torch.equal(flat(pair[0]), flat(model)) and torch.equal(flat(again[0]), flat(model))


# --- trouble


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
@each
def test_whatever_is_raised_the_weights_come_back(name, base):
    (x, y), *_ = batches()
    for fatal in range(1, 12):
        model = network()
        kind, options = BASES[base]
        opt = ROWS[name].make(model, kind, **options)
        before, calls = flat(model), 0

        def closure(index=slice(None)):
            nonlocal calls
            calls += 1
            if calls == fatal:  # noqa: B023
                raise Stop
            return F.cross_entropy(model(x[index]), y[index], reduction="none")  # noqa: B023

        try:
            opt.step(closure, targets=y)
        except Stop:
            assert torch.equal(flat(model), before)
            assert all(p.grad is None for p in model.parameters())
            opt.step(closure_of(model, x, y), targets=y)  # and it goes on
        else:
            assert calls < fatal
            break
    assert calls >= (1 if name == "GNM" else 2) - (name == "LookSAM" and calls == 1)


@on_cpu
@each
def test_overflow_in_any_pass_skips_the_step(name, backend):
    """As in mixed precision: a loss that is infinite at some call leaves weights and momentum as they were."""
    for fatal in range(1, 6):
        model, twin = network(torch.float32), network(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        opt = ROWS[name].make(model, SGD, lr=0.1, momentum=0.9)
        other = ROWS[name].make(twin, SGD, lr=0.1, momentum=0.9)
        drive(opt, model, batches(torch.float32, steps=1))
        drive(other, twin, batches(torch.float32, steps=1))
        (x, y), *_ = batches(torch.float32, seed=3)
        calls = 0

        def closure(index=slice(None)):
            nonlocal calls
            calls += 1
            losses = F.cross_entropy(model(x[index]), y[index], reduction="none")  # noqa: B023
            return losses * (float("inf") if calls == fatal else 1.0)  # noqa: B023

        momentum = {k: v.clone() for k, v in enumerate(s["momentum_buffer"] for s in opt.state.values())}
        opt.step(closure, targets=y, scaler=scaler)
        if calls < fatal:
            break
        if name == "ESAM" and fatal == 2:
            continue  # the pass without gradients: an infinite rise is a rise
        scaler.update()
        assert scaler.get_scale() == 512.0, f"call {fatal} of {calls} was not noticed"
        assert torch.equal(flat(model), flat(twin)), f"call {fatal} of {calls} moved the weights"
        for k, state in enumerate(opt.state.values()):
            assert torch.equal(state["momentum_buffer"], momentum[k])


@on_cpu
@each
def test_a_scaled_step_is_the_unscaled_one(name, backend):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        opt = ROWS[name].make(model, SGD, lr=0.1, momentum=0.9)
        for x, y in batches(steps=8):
            opt.step(closure_of(model, x, y), targets=y, scaler=scaler)
            if scaler:
                scaler.update()
        results.append(flat(model))
    assert relative_error(*results) < 1e-9


BAD = [
    ("ImbSAM", {"eta": -1}, "eta"),
    ("ImbSAM", {"tail_classes": [4]}, "tail_classes"),
    ("ImbSAM", {"tail_weight": float("nan")}, "tail_weight"),
    ("SSESAM", {"tail_rho": -0.1}, "tail_rho"),
    ("SSESAM", {"switch_step": -1}, "switch_step"),
    ("CCSAM", {"class_counts": [0, 0]}, "class_counts"),
    ("CCSAM", {"scope": "body"}, "scope"),
    ("CCSAM", {"flat_ratio": 1.5}, "flat_ratio"),
    ("CCSAM", {"head": [torch.ones(2)]}, "head"),
    ("CCSAM", {"adaptive": True}, "adaptive"),
    ("GNM", {"dis_mul": -1}, "dis_mul"),
    ("GNM", {"decay_every": 0}, "decay_every"),
    ("GNM", {"seed": -1}, "seed"),
    ("GNM", {"adaptive": True}, "adaptive"),
    ("FriendlySAM", {"lmbda": 1.0}, "lmbda"),
    ("FriendlySAM", {"sigma": float("inf")}, "sigma"),
    ("MSAM", {"m": 0}, "m must"),
    ("SparseSAM", {"sparsity": 1.0}, "sparsity"),
    ("SparseSAM", {"mask": "random"}, "mask"),
    ("ESAM", {"beta": 0.0}, "beta"),
    ("ESAM", {"gamma": 1.1}, "gamma"),
    ("ESAM", {"granularity": "layer"}, "granularity"),
    ("LookSAM", {"k": 0}, "k must"),
    ("GSAM", {"rho_min": 0.1, "rho_max": None}, "rho_max"),
    ("WSAM", {"gamma": 1.0}, "gamma"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        ROWS[name].make(network(), SGD, lr=0.1, **options)


# --- what is a method's own


def test_dynamic_masks_keep_their_size_and_change():
    model = network()
    opt = lf.SparseSAM(model.parameters(), SGD, mask="dynamic", sparsity=0.7, refresh_every=2, total_steps=20, lr=0.1)
    masks = []
    for x, y in batches(steps=8):
        opt.step(closure_of(model, x, y))
        masks.append(torch.cat([state["mask"] for state in opt.state.values()]))
    count = sum(p.numel() for p in model.parameters())
    staying = {sum(int(byte).bit_count() for byte in mask) for mask in masks}
    assert staying == {count - int(count * (1 - 0.7))}
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_sparse_sam_by_phases_needs_a_mask():
    model = network()
    (x, y), *_ = batches()
    opt = lf.SparseSAM(model.parameters(), SGD, lr=0.1)
    closure_of(model, x, y)().mean().backward()
    with pytest.raises(ValueError, match="refresh_mask"):
        opt.first_step()
    opt.refresh_mask(closure_of(model, x, y)())
    opt.first_step(zero_grad=True)
    closure_of(model, x, y)().mean().backward()
    opt.second_step()


def test_esam_keeps_the_samples_whose_loss_rises_most():
    model = network()
    (x, y), *_ = batches()
    seen = []

    def closure(index=None):
        seen.append(index)
        return F.cross_entropy(
            model(x if index is None else x[index]), y if index is None else y[index], reduction="none"
        )

    lf.ESAM(model.parameters(), SGD, lr=0.1, gamma=0.3).step(closure)
    assert [index is None for index in seen] == [True, True, False]
    assert len(seen[2]) == 5 and seen[2].dtype == torch.long


def test_imb_sam_without_a_tail_is_the_base_optimizer_at_its_price():
    model, twin = network(), network()
    calls = 0
    opt = lf.ImbSAM(model.parameters(), SGD, class_counts=COUNTS, eta=0, lr=0.1, momentum=0.9)
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():

        def closure(x=x, y=y):
            nonlocal calls
            calls += 1
            return F.cross_entropy(model(x), y, reduction="none")

        opt.step(closure, targets=y)
        base.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        base.step()
    assert calls == len(batches())
    assert relative_error(flat(model), flat(twin)) < 1e-12


def test_imb_sam_with_named_tail_classes():
    results = []
    for options in (
        {"class_counts": COUNTS, "eta": 10},
        {"class_counts": COUNTS, "tail_classes": [3, 2]},
        {"tail_classes": [2, 3]},
    ):
        model = network()
        drive(lf.ImbSAM(model.parameters(), SGD, rho=RHO, lr=0.1, **options), model, batches(steps=6))
        results.append(flat(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    model = network()
    opt = lf.ImbSAM(model.parameters(), SGD, rho=RHO, lr=0.1, tail_classes=[0])
    drive(opt, model, batches(steps=2))
    with pytest.raises(ValueError, match="targets must lie"):
        opt.step(closure_of(model, *batches(steps=1)[0]), targets=torch.full((16,), -1))


def test_friendly_sam_begins_anew_after_a_first_overflow():
    results = []
    for overflow in (True, False):
        model = network(torch.float32)
        opt = lf.FriendlySAM(model.parameters(), SGD, rho=RHO, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, backoff_factor=0.5)
        data = batches(torch.float32, steps=4)
        if overflow:
            x, y = data[0]
            opt.step(lambda x=x, y=y, m=model: closure_of(m, x, y)() * float("inf"), scaler=scaler)
            scaler.update(8.0)
        for x, y in data:
            opt.step(closure_of(model, x, y), scaler=scaler)
            scaler.update()
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_gnm_leaves_weights_without_gradient_alone(kind):
    model = Forked()
    opt = lf.GNM(model.parameters(), kind, rho=1.0, lr=0.1)
    idle = model.idle.weight.detach().clone()
    for x, y in batches(torch.float32, steps=3):
        opt.step(closure_of(model, x, y))
    assert torch.equal(model.idle.weight, idle)
