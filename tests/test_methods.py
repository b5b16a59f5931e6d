"""Every method against its oracle in double precision, and what is peculiar to one of them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, RMSprop, lr_scheduler

import ltsam_fast as lf

from . import oracles
from .method_rows import (
    BASES,
    EVERY,
    KINDS,
    RHO,
    ROWS,
    closure_of,
    every,
    expected,
    on_cpu,
    step_in_phases,
    two_groups,
    with_bases,
)
from .oracles import CLASSES, COUNTS, FEATURES, STEPS, batches, flat, losses, network, relative_error

# --- the formula

FORMULAS = [(name, base, "closure") for name in ROWS for base in KINDS]
FORMULAS += [(name, base, "closure") for name in ("SAM", "FocalSAM") for base in BASES if base not in KINDS]
FORMULAS += [(name, "nesterov", "phases") for name in ROWS if ROWS[name].make(network(), lr=0.1, momentum=0.9).phases]


@pytest.mark.parametrize(("name", "base", "interface"), FORMULAS)
def test_25_steps_agree_with_the_oracle(name, base, interface):
    """The loss returned, at the unperturbed weights, too. In fp32, and on each backend, see test_every_backend.py."""
    row, (kind, options) = ROWS[name].of(interface), BASES[base]
    model = network()
    opt = row.make(model, kind, **options)
    seen = [row.step(interface, opt, model, x, y) for x, y in batches()]
    weights, means = expected(name, base, interface, STEPS)
    assert relative_error(flat(model), weights) < 1e-9
    if interface == "closure":
        assert all(
            loss.shape == () and loss.grad_fn is None and not loss.requires_grad and loss.dtype == torch.float64
            for loss in seen
        )
        assert [loss.item() for loss in seen] == pytest.approx(means, rel=1e-9)


@on_cpu
@with_bases(*KINDS)
@every
def test_clips_like_clip_grad_norm(name, base, backend):
    row, (kind, options) = EVERY[name], BASES[base]
    for limit in (0.05, 1e3):
        model = network()
        weights = row.drive("closure", row.make(model, kind, max_grad_norm=limit, **options), model, batches(steps=8))
        wanted = row.expected(kind, options, batches(steps=8), max_grad_norm=limit)[0]
        assert relative_error(weights, wanted) < 1e-9


def groups_of_all_kinds(row):
    """Radii and rates of their own, no perturbation, ASAM, no radius."""
    scaled = {"adaptive": True} if row.adaptive and row.method != "SSESAM" else {}
    if scaled and "eta" not in row.options:  # which then is the method's own
        scaled["eta"] = 0.1

    def groups(model):
        first, second, third = model[0], model[2], model[4]
        return [
            {"params": list(first.parameters()), "rho": 0.3, "lr": 0.02},
            {"params": list(second.parameters()), "perturb": False},
            {"params": [third.weight], "norm_eps": 0.5, **scaled},
            {"params": [third.bias], "rho": 0.0},
        ]

    return groups


@with_bases(*KINDS)
@every
def test_groups_have_their_own_options(name, base):
    row, (kind, options) = EVERY[name], BASES[base]
    for groups in (two_groups, groups_of_all_kinds(row)):
        model = network()
        weights = row.drive("closure", row.make(model, kind, groups(model), **options), model, batches(steps=8))
        assert relative_error(weights, row.expected(kind, options, batches(steps=8), groups)[0]) < 1e-9


@pytest.mark.parametrize("labels", [[0], [3], [0, 0, 0], [3, 3], [1, 1, 2, 2]], ids=str)
@every
def test_batches_of_one_and_of_few_classes(name, labels):
    y = torch.tensor(labels)
    data = [(torch.randn(len(y), FEATURES, generator=torch.Generator().manual_seed(i)).double(), y) for i in range(4)]
    row, (kind, options) = EVERY[name], BASES["momentum"]
    model = network()
    weights = row.drive("closure", row.make(model, kind, **options), model, data)
    assert relative_error(weights, row.expected(kind, options, data)[0]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_weights_of_16_bits_learn(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)).to(dtype)
    x = torch.randn(64, FEATURES).to(dtype)
    y = x.float()[:, :CLASSES].argmax(1)
    opt = EVERY[name].make(model, SGD, rho=0.05, lr=0.2, momentum=0.9)
    closure = closure_of(model, x, y)
    first = closure().mean().item()
    for _ in range(40):
        opt.step(closure, targets=y)
    assert closure().mean().item() < 0.7 * first


FOCAL = 1.1 * (1 - np.array(COUNTS) / sum(COUNTS))
SHARP, TAIL = np.ones(CLASSES), np.array(COUNTS) < 10


@on_cpu
@pytest.mark.parametrize(
    ("name", "options", "v"),
    [
        ("SAM", {}, SHARP),
        ("SAM", {"adaptive": True}, SHARP),
        ("FocalSAM", {"gamma": 0.0, "lam": 1.0}, SHARP),
        ("FocalSAM", {"gamma": 1.0, "lam": 0.0}, 0 * SHARP),
        ("FocalSAM", {"gamma": 1.0, "lam": 1.1}, FOCAL),
        ("ImbSAM", {}, 1.0 * TAIL),
        ("ImbSAM", {"eta": 0}, 0 * SHARP),
    ],
)
def test_softmax_regression_written_out(name, options, v, backend):
    """An oracle without autograd and without torch."""
    x, y = batches(steps=1)[0]
    start = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    adaptive = options.get("adaptive", False)
    wanted = oracles.softmax_regression(x.numpy(), y.numpy(), start, 1 - v, v, 0.2, 0.1, 0.9, 25, adaptive)
    w = nn.Parameter(torch.tensor(start))
    opt = EVERY[name].make(None, SGD, [w], rho=0.2, lr=0.1, momentum=0.9, **options)
    for _ in range(25):
        opt.step(lambda: F.cross_entropy(x @ w, y, reduction="none"), targets=y)
    assert relative_error(w.detach(), torch.tensor(wanted)) < 1e-12


# --- SAM and ASAM


def perturbation(w, g, **options):
    """How far first_step() moves weights ``w`` along gradients ``g``."""
    param = nn.Parameter(w.clone())
    param.grad = g.clone()
    opt = lf.SAM([{"params": [param], **options}], SGD, lr=0.1)
    opt.first_step()
    moved = param.detach().double() - w.double()
    opt.restore()
    assert torch.equal(param, w)
    return moved


@on_cpu
def test_perturbation_has_length_rho_and_the_gradients_direction(backend):
    w, g = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = perturbation(w, g, rho=0.3)
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-12)
    assert relative_error(moved, 0.3 * g / g.norm()) < 1e-12
    moved = perturbation(w, g, rho=0.3, adaptive=True, eta=0.05)
    scale = w.abs() + 0.05
    assert (moved / scale).norm().item() == pytest.approx(0.3, rel=1e-9)


@on_cpu
def test_a_zero_gradient_does_not_perturb(backend):
    w = torch.randn(50)
    assert not perturbation(w, torch.zeros(50)).any()
    assert not perturbation(w, torch.zeros(50), adaptive=True).any()


@on_cpu
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_gradient_does_not_perturb(value, backend):
    g = torch.ones(50)
    g[7] = value
    assert not perturbation(torch.randn(50), g, rho=0.5).any()


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_half_precision_gradients_does_not_overflow(dtype, backend):
    w, g = torch.zeros(4096, dtype=dtype), torch.full((4096,), 6e4, dtype=dtype)
    assert perturbation(w, g, rho=0.5).norm().item() == pytest.approx(0.5, rel=1e-2)


@on_cpu
def test_norm_of_tiny_gradients_does_not_underflow(backend):
    w, g = torch.zeros(4096), torch.full((4096,), 1e-11)
    assert perturbation(w, g, rho=0.5, norm_eps=0.0).norm().item() == pytest.approx(0.5, rel=1e-5)


# --- Focal-SAM


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda c: torch.tensor(c, dtype=torch.float32)])
def test_class_counts_in_any_form(kind):
    opt = lf.FocalSAM(network().parameters(), SGD, class_counts=kind(COUNTS), gamma=2.0, lam=1.1, lr=0.1)
    wanted = 1.1 * (1 - torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)) ** 2
    torch.testing.assert_close(opt.sharp_weights, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_dtype(dtype):
    results = []
    for kind in (torch.int64, dtype):
        model = network()
        opt = EVERY["FocalSAM"].make(model, lr=0.1)
        for x, y in batches(steps=3):
            opt.step(closure_of(model, x, y), targets=y.to(kind))
        results.append(flat(model))
    assert torch.equal(*results)


def test_a_class_without_samples():
    row = EVERY["FocalSAM"].having(class_counts=[30, 0, 4, 1], gamma=1.5, lam=0.7)
    data = [(x, torch.full_like(y, i % CLASSES)) for i, (x, y) in enumerate(batches(steps=8, size=3))]
    model = network()
    weights = row.drive("closure", row.make(model, lr=0.1), model, data)
    assert relative_error(weights, row.expected(SGD, {"lr": 0.1}, data)[0]) < 1e-9


def test_phases_need_no_class_counts():
    row = EVERY["FocalSAM"]
    model, other = network(), row.make(network(), lr=0.1)
    opt = lf.FocalSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
    for x, y in batches(steps=8):
        weights = [one[y] for one in (other.clean_weights, other.sharp_weights, other.sharp_weights)]
        for phase, weight in zip(opt.phases, weights, strict=True):
            (weight * losses(model, x, y)).mean().backward()
            getattr(opt, phase)()
    assert relative_error(flat(model), row.expected(SGD, {"lr": 0.1}, batches(steps=8))[0]) < 1e-9


@on_cpu
def test_kept_gradients_do_not_share_memory_with_the_next_backward(backend):
    """Gradients that are views of one buffer, as in distributed training, are overwritten by the next pass."""
    results = []
    for viewed in (False, True):
        bucket = torch.zeros(10)
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))]
        opt = lf.FocalSAM(params, SGD, rho=RHO, lr=0.1)
        for number, phase in enumerate((opt.first_step, opt.second_step, opt.third_step)):
            bucket.copy_(torch.randn(10, generator=torch.Generator().manual_seed(number)))
            grads = bucket[:4], bucket[4:].view(2, 3)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad if viewed else grad.clone()
            phase()
        results.append(flat(params))
    assert torch.equal(*results)


# --- ImbSAM


def test_imb_sam_with_named_tail_classes():
    results = []
    for options in (
        {"class_counts": COUNTS, "eta": 10},
        {"class_counts": COUNTS, "tail_classes": [3, 2]},
        {"tail_classes": [2, 3]},
    ):
        model = network()
        opt = lf.ImbSAM(model.parameters(), SGD, rho=RHO, lr=0.1, **options)
        results.append(EVERY["ImbSAM"].drive("closure", opt, model, batches(steps=6)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="targets must lie"):
        opt.step(closure_of(model, *batches(steps=1)[0]), targets=torch.full((16,), -1))


# --- SSE-SAM


def test_sse_sam_scales_both_perturbations_by_the_unperturbed_weights():
    row, model = EVERY["SSESAM"].having(adaptive=True), network()
    weights = row.drive("closure", row.make(model, lr=0.1), model, batches(steps=3))
    assert relative_error(weights, row.expected(SGD, {"lr": 0.1}, batches(steps=3))[0]) < 1e-12


# --- GNM


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_gnm_leaves_weights_without_gradient_alone(kind):
    torch.manual_seed(0)
    model, idle = network(), nn.Linear(3, 2)
    opt = lf.GNM([*model.parameters(), *idle.parameters()], kind, rho=1.0, lr=0.1)
    before = flat(idle)
    EVERY["GNM"].drive("closure", opt, model, batches(steps=3))
    assert torch.equal(flat(idle), before)


# --- Sparse SAM


def moving(opt):
    """The coordinates that are perturbed, as a mask: those of a step's second pass."""
    seen, params = [], opt.param_groups[0]["params"]

    def closure(model, x, y):
        seen.append(flat(params))
        return losses(model, x, y)

    return closure, lambda: seen[-1] != seen[-2]


def test_dynamic_masks_keep_their_size_and_change():
    model = network()
    opt = lf.SparseSAM(
        model.parameters(), SGD, rho=1.0, mask="dynamic", sparsity=0.7, refresh_every=2, total_steps=20, lr=0.1
    )
    loss, mask_of = moving(opt)
    masks = []
    for x, y in batches(steps=8):
        opt.step(lambda x=x, y=y: loss(model, x, y))
        masks.append(mask_of())
    count = sum(p.numel() for p in model.parameters())
    assert {int(mask.sum()) for mask in masks} == {int(count * (1 - 0.7))}
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_sparse_sam_by_phases_needs_a_mask():
    model = network()
    (x, y), *_ = batches()
    opt = lf.SparseSAM(model.parameters(), SGD, lr=0.1)
    losses(model, x, y).mean().backward()
    with pytest.raises(ValueError, match="refresh_mask"):
        opt.first_step()
    step_in_phases(opt, closure_of(model, x, y))


# --- ESAM


def test_esam_keeps_the_samples_whose_loss_rises_most():
    model = network()
    (x, y), *_ = batches()
    seen = []

    def closure(index=None):
        seen.append(index)
        return closure_of(model, x, y)() if index is None else closure_of(model, x, y)(index)

    lf.ESAM(model.parameters(), SGD, lr=0.1, gamma=0.3).step(closure)
    assert [index is None for index in seen] == [True, True, False]
    assert len(seen[2]) == 5 and seen[2].dtype == torch.long


# --- GSAM's radius lies between rho_min and rho_max, whatever the schedule of the learning rate

LOW, HIGH, TOP, SCHEDULED = 0.02, 0.1, 0.1, 12
SCHEDULES = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, TOP, total_steps=SCHEDULED + 1, cycle_momentum=False),
    "warm-up": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / 5, 1.0)),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
    "sequence": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 9)], [3]
    ),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, SCHEDULED),
}
"""Schedules whose largest rate is known from the start."""


class Radius:
    """One weight vector for each learning rate, and how far each step perturbs them."""

    def __init__(self, lr, base=SGD, tensor=False, **options):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
        self.x = torch.randn(8, 5, dtype=torch.float64)
        rates = [torch.tensor(one) if tensor else one for one in lr]
        groups = [{"params": [p], "lr": one, **options} for p, one in zip(self.params, rates, strict=True)]
        self.opt = lf.GSAM(groups, base, rho_min=LOW, rho_max=HIGH, lr=0.1)

    def step(self, n):
        before, norms = [p.detach().clone() for p in self.params], []

        def losses():
            norms.append([float((p.detach() - b).norm()) for p, b in zip(self.params, before, strict=True)])
            return sum((self.x @ p - n % 3).square() for p in self.params)

        self.opt.step(losses)
        for p, b in zip(self.params, before, strict=True):  # each step begins at the same weights
            p.data.copy_(b)
        grads = torch.autograd.grad(losses().mean(), self.params)
        whole = torch.cat(grads).norm()
        return [far * float(whole / g.norm()) for far, g in zip(norms[1], grads, strict=True)]


@pytest.mark.parametrize(("base", "tensor"), [(SGD, False), (AdamW, True), (RMSprop, False)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_radius_follows_the_schedules_range(name, base, tensor):
    start = 1.0 if name == "OneCycleLR" else TOP  # OneCycleLR sets the rate itself
    run = Radius([start, start / 2], base, tensor)
    tops = [TOP, TOP] if name == "OneCycleLR" else [TOP, TOP / 2]
    schedule = SCHEDULES[name](run.opt)
    if any(isinstance(g["lr"], torch.Tensor) and g["lr"] is g["initial_lr"] for g in run.opt.param_groups):
        pytest.skip("this torch's SequentialLR changes the first rate with the present one")
    found = []
    for n in range(SCHEDULED):
        if n == 5:  # a resumed run goes on in the same way
            saved = copy.deepcopy((run.opt.state_dict(), schedule.state_dict()))
            run = Radius([0.3, 0.3], base, tensor)
            schedule = SCHEDULES[name](run.opt)
            run.opt.load_state_dict(saved[0]), schedule.load_state_dict(saved[1])
        rates = [float(group["lr"]) for group in run.opt.param_groups]
        wanted = [LOW + (HIGH - LOW) * rate / top for rate, top in zip(rates, tops, strict=True)]
        found.append(run.step(n))
        assert found[-1] == pytest.approx(wanted, rel=1e-5)
        assert all(LOW <= one * (1 + 1e-9) and one <= HIGH * (1 + 1e-9) for one in found[-1])
        schedule.step()
    assert max(max(pair) for pair in found) > 0.09


def radii(run, rates):
    found = []
    for n, rate in enumerate(rates):
        run.opt.param_groups[0]["lr"] = rate
        found.append(run.step(n)[0])
    return found


def at(share):
    return pytest.approx(LOW + (HIGH - LOW) * share, rel=1e-6)


def test_without_a_schedule_the_largest_rate_so_far_counts():
    assert radii(Radius([0.1, 0.1]), [0.1, 0.05, 0.2, 0.1, 0.4, 0.1]) == [at(s) for s in (1, 0.5, 1, 0.5, 1, 0.25)]


def test_a_largest_rate_of_ones_own():
    assert radii(Radius([0.1, 0.1], lr_max=0.2), [0.1, 0.2, 0.4, 0.05]) == [at(s) for s in (0.5, 1, 1, 0.25)]
    opt = lf.GSAM([nn.Parameter(torch.zeros(2))], SGD, rho_min=LOW, rho_max=HIGH, lr_min=0.1, lr=0.05)
    for bad in (0.1, -1.0, float("inf"), "a"):
        with pytest.raises(ValueError, match=r"lr_max must be (a finite number > 0|> lr_min = 0\.1), got"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr_max": bad})
    assert len(opt.param_groups) == 1


def test_below_the_least_rate():
    run = Radius([0.1, 0.1])
    run.opt.lr_min = 0.05
    assert radii(run, [0.1, 0.05, 0.01, 0.075]) == [at(s) for s in (1, 0, 0, 0.5)]


def test_gsams_radius_against_the_oracle():
    row, model = ROWS["GSAM-lr"], network()
    opt = row.make(model, SGD, lr=0.2, momentum=0.9)
    schedule = lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)
    for x, y in batches():
        opt.step(closure_of(model, x, y))
        schedule.step()
    wanted = row.expected(SGD, {"lr": 0.2, "momentum": 0.9}, batches(), schedule=lambda step: 0.9**step)[0]
    assert relative_error(flat(model), wanted) < 1e-9
