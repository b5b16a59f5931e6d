"""What is peculiar to Focal-SAM."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import ltsam_fast as lf
from ltsam_fast import plain

from . import oracles
from .methods import BASES, METHODS, RHO, focal_phases, on_cpu
from .oracles import CLASSES, COUNTS, FEATURES, batches, flat, losses, network, relative_error

# --- a script written for the published implementation


def script_with_three_steps(FocalSAM, model, data, scaler=None):
    criterion = nn.CrossEntropyLoss(reduction="none")
    optimizer = FocalSAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=False, lr=0.1, momentum=0.9, weight_decay=2e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    flat_gamma, sharpness = 3.0, 0.5
    for images, target in data:
        classes = torch.unique(target)
        counts = torch.tensor(COUNTS, dtype=images.dtype)
        focus = sharpness * (1 - counts / counts.sum()).pow(flat_gamma)[classes]
        mask = (target[:, None] == classes[None, :]).to(images.dtype)

        def weighted(loss, weight, mask=mask):
            return (mask * loss[:, None] * weight[None, :]).sum() / len(mask)

        def backward(loss, **kwargs):
            (loss if scaler is None else scaler.scale(loss)).backward(**kwargs)
            if scaler is not None:
                scaler.unscale_(optimizer)

        loss = criterion(model(images), target)
        backward(weighted(loss, 1 - focus), retain_graph=True)
        optimizer.first_step()
        backward(weighted(loss, focus))
        optimizer.second_step()
        loss = criterion(model(images), target)
        backward(weighted(loss, focus))
        optimizer.third_step()
        scheduler.step()
    return flat(model)


@on_cpu
def test_reference_script_runs_unchanged(backend):
    twin = network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=30)
    groups = [{"params": list(twin.parameters()), "rho": RHO}]
    for x, y in batches():
        weights = oracles.focal_weights(COUNTS, 3.0, 0.5)
        oracles.step(groups, lambda _, x=x, y=y: losses(twin, x, y), y, *weights, base)
        scheduler.step()
    assert relative_error(script_with_three_steps(lf.FocalSAM, network(), batches()), flat(twin)) < 1e-9


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the plain loop's
def test_reference_script_gives_what_the_plain_loop_gives():
    results = [script_with_three_steps(kind, network(), batches()) for kind in (lf.FocalSAM, plain.FocalSAM)]
    assert relative_error(*results) < 1e-9


# --- the formula


@on_cpu
@pytest.mark.parametrize(("gamma", "lam"), [(3.0, 0.5), (2.0, 1.1), (0.0, 1.0), (1.0, 0.0)])
def test_softmax_regression_written_out(gamma, lam, backend):
    """An oracle without autograd and without torch."""
    x, y = batches(steps=1)[0]
    start = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    u, v = (weights.numpy() for weights in oracles.focal_weights(COUNTS, gamma, lam))
    expected = oracles.softmax_regression(x.numpy(), y.numpy(), start, u, v, 0.2, 0.1, 0.9, 25)
    w = nn.Parameter(torch.tensor(start))
    opt = lf.FocalSAM([w], SGD, rho=0.2, class_counts=COUNTS, gamma=gamma, lam=lam, lr=0.1, momentum=0.9)
    for _ in range(25):
        opt.step(lambda: F.cross_entropy(x @ w, y, reduction="none"), targets=y)
    assert relative_error(w.detach(), torch.tensor(expected)) < 1e-12


def run(opt, model, data):
    for x, y in data:
        opt.step(lambda x=x, y=y: losses(model, x, y), targets=y)
    return flat(model)


@on_cpu
def test_all_sharpness_is_sam_and_none_is_the_base_optimizer(backend):
    options = {"lr": 0.1, "momentum": 0.9}
    results = {}
    for name, opt_of in {
        "all": lambda p: lf.FocalSAM(p, SGD, rho=RHO, class_counts=COUNTS, gamma=0.0, lam=1.0, **options),
        "SAM": lambda p: lf.SAM(p, SGD, rho=RHO, **options),
        "none": lambda p: lf.FocalSAM(p, SGD, rho=RHO, class_counts=COUNTS, lam=0.0, **options),
        "SGD": lambda p: lf.SAM(p, SGD, rho=0.0, **options),
    }.items():
        model = network()
        results[name] = run(opt_of(model.parameters()), model, batches())
    assert relative_error(results["all"], results["SAM"]) < 1e-12
    assert relative_error(results["none"], results["SGD"]) < 1e-12


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda c: torch.tensor(c, dtype=torch.float32)])
def test_class_counts_in_any_form(kind):
    opt = lf.FocalSAM(network().parameters(), SGD, class_counts=kind(COUNTS), gamma=2.0, lam=1.1, lr=0.1)
    assert torch.allclose(opt.class_weights, oracles.focal_weights(COUNTS, 2.0, 1.1)[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_dtype(dtype):
    model, twin = network(), network()
    opt, other = (METHODS["FocalSAM"].make(m, lr=0.1) for m in (model, twin))
    for x, y in batches(steps=3):
        opt.step(lambda x=x, y=y: losses(model, x, y), targets=y.to(dtype))
        other.step(lambda x=x, y=y: losses(twin, x, y), targets=y)
    assert torch.equal(flat(model), flat(twin))


@on_cpu
def test_a_batch_of_one_class_and_a_class_without_samples(backend):
    counts = [30, 0, 4, 1]
    weights = oracles.focal_weights(counts, 1.5, 0.7)
    model, twin = network(), network()
    opt = lf.FocalSAM(model.parameters(), SGD, rho=RHO, class_counts=counts, gamma=1.5, lam=0.7, lr=0.1)
    base = SGD(twin.parameters(), lr=0.1)
    groups = [{"params": list(twin.parameters()), "rho": RHO}]
    for number, (x, y) in enumerate(batches(steps=8, size=3)):
        y = torch.full_like(y, number % CLASSES)
        run(opt, model, [(x, y)])
        oracles.step(groups, lambda _, x=x, y=y: losses(twin, x, y), y, *weights, base)
    assert relative_error(flat(model), flat(twin)) < 1e-9


# --- phases


@on_cpu
def test_phases_need_no_class_counts(backend):
    method = METHODS["FocalSAM"]
    model = network()
    opt = lf.FocalSAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
    for x, y in batches():
        focal_phases(method, opt, model, x, y)
    weights, _ = method.oracle(SGD, {"lr": 0.1, "momentum": 0.9}, batches())
    assert relative_error(flat(model), weights) < 1e-9


def test_every_phase_clears_the_gradients():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.FocalSAM(model.parameters(), SGD, lr=0.1)
    for phase in (opt.first_step, opt.second_step, opt.third_step):
        losses(model, x, y).mean().backward()
        assert phase() is None
        assert all(p.grad is None for p in model.parameters())


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


@on_cpu
@pytest.mark.parametrize("base", ["momentum", "adam", "rmsprop"])
def test_gradients_of_the_first_phase_alone(base, backend):
    kind, options = BASES[base]
    kept, climbing = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    opt = lf.FocalSAM([kept, climbing], kind, rho=RHO, **options)
    kept.grad, twin = torch.arange(4.0), nn.Parameter(torch.ones(4))
    opt.first_step()
    climbing.grad = torch.ones(3)
    opt.second_step()
    assert torch.equal(kept, torch.ones(4)) and not torch.equal(climbing, torch.ones(3))
    opt.third_step()
    plain = kind([twin], **options)
    twin.grad = torch.arange(4.0)
    plain.step()
    assert torch.allclose(kept, twin, rtol=1e-6)
    assert torch.equal(climbing, torch.ones(3)) and climbing not in opt.state


@on_cpu
def test_overflow_of_the_clean_gradient_alone(backend):
    """The frequent class weighs next to nothing in the sharp loss; its clean gradient overflows all the same."""
    counts = [10**9, 1]
    for used in ((0, 1), (1,)):  # the parameter that overflowed has a gradient in the last pass, or has none
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        opt = lf.FocalSAM(params, SGD, class_counts=counts, gamma=1.0, lam=0.5, rho=RHO, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        passes = iter([(0, 1), used])

        def closure(params=params, passes=passes):
            both = torch.tensor([1e35, 1.0])
            return sum(
                (params[i] * torch.ones(3)).sum() * (both if i == 0 else 1.0) for i in next(passes)
            ) * torch.ones(2)

        opt.step(closure, targets=torch.tensor([0, 1]), scaler=scaler)
        assert torch.equal(flat(params), torch.ones(6, dtype=torch.float64))
        assert not any(buffer.any() for state in opt.state.values() for buffer in state.values())
        scaler.update()
        assert scaler.get_scale() == 2.0**15
