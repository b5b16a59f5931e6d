"""What is peculiar to SAM and ASAM."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import ltsam_fast as lf
from ltsam_fast import compat, plain

from . import oracles
from .methods import BASES, METHODS, RHO, on_cpu
from .oracles import CLASSES, FEATURES, batches, flat, losses, network, relative_error

# --- scripts written for the reference implementation


def script_with_two_steps(SAM, model, data, adaptive):
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.1, momentum=0.9, weight_decay=0.0005
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.2)
    for inputs, targets in data:
        predictions = model(inputs)
        loss = F.cross_entropy(predictions, targets, label_smoothing=0.1, reduction="none")
        loss.mean().backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(inputs), targets, label_smoothing=0.1, reduction="none").mean().backward()
        optimizer.second_step(zero_grad=True)
        with torch.no_grad():
            _ = torch.argmax(predictions.data, 1) == targets
        scheduler.step()
    return flat(model)


def script_with_closure(SAM, model, data, adaptive):
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.1, momentum=0.9, weight_decay=0.0005
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.2)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    for input, output in data:

        def closure(input=input, output=output):
            loss = loss_function(model(input), output)
            loss.backward()
            return loss

        loss = loss_function(model(input), output)
        loss.backward()
        optimizer.step(closure)
        optimizer.zero_grad()
        scheduler.step()
    return flat(model)


@on_cpu
@pytest.mark.parametrize("script", [script_with_two_steps, script_with_closure])
@pytest.mark.parametrize("adaptive", [False, True])
def test_reference_script_runs_unchanged(script, adaptive, backend):
    twin = network()
    base = SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0005)
    scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=10, gamma=0.2)
    for x, y in batches():
        oracles.step(
            [{"params": list(twin.parameters()), "rho": RHO, "adaptive": adaptive}],
            lambda _, x=x, y=y: F.cross_entropy(twin(x), y, label_smoothing=0.1, reduction="none"),
            y, *oracles.sam_weights(), base,
        )  # fmt: skip
        scheduler.step()
    assert relative_error(script(compat.SAM, network(), batches(), adaptive), flat(twin)) < 1e-9


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the plain loop's
@pytest.mark.parametrize("adaptive", [False, True])
def test_reference_script_gives_what_the_plain_loop_gives(adaptive):
    results = [script_with_two_steps(SAM, network(), batches(), adaptive) for SAM in (lf.SAM, plain.SAM)]
    assert relative_error(*results) < 1e-9


# --- the formula


@on_cpu
@pytest.mark.parametrize("adaptive", [False, True])
def test_softmax_regression_written_out(adaptive, backend):
    """An oracle without autograd and without torch."""
    x, y = batches(steps=1)[0]
    start = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    u, v = (weights.numpy() for weights in oracles.sam_weights())
    expected = oracles.softmax_regression(x.numpy(), y.numpy(), start, u, v, 0.2, 0.1, 0.9, 25, adaptive)
    w = nn.Parameter(torch.tensor(start))
    opt = lf.SAM([w], SGD, rho=0.2, adaptive=adaptive, lr=0.1, momentum=0.9)
    for _ in range(25):
        opt.step(lambda: F.cross_entropy(x @ w, y, reduction="none"))
    assert relative_error(w.detach(), torch.tensor(expected)) < 1e-12


def climb(w, g, **options):
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
    moved = climb(w, g, rho=0.3)
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-12)
    assert relative_error(moved, 0.3 * g / g.norm()) < 1e-12
    moved = climb(w, g, rho=0.3, adaptive=True, eta=0.05)
    scale = w.abs() + 0.05
    assert (moved / scale).norm().item() == pytest.approx(0.3, rel=1e-9)


@on_cpu
def test_a_zero_gradient_does_not_perturb(backend):
    w = torch.randn(50)
    assert not climb(w, torch.zeros(50)).any()
    assert not climb(w, torch.zeros(50), adaptive=True).any()


@on_cpu
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_gradient_does_not_perturb(value, backend):
    g = torch.ones(50)
    g[7] = value
    assert not climb(torch.randn(50), g, rho=0.5).any()


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_half_precision_gradients_does_not_overflow(dtype, backend):
    w, g = torch.zeros(4096, dtype=dtype), torch.full((4096,), 6e4, dtype=dtype)
    assert climb(w, g, rho=0.5).norm().item() == pytest.approx(0.5, rel=1e-2)


@on_cpu
def test_norm_of_tiny_gradients_does_not_underflow(backend):
    w, g = torch.zeros(4096), torch.full((4096,), 1e-11)
    assert climb(w, g, rho=0.5, norm_eps=0.0).norm().item() == pytest.approx(0.5, rel=1e-5)


# --- phases


def test_phases_clear_gradients_when_asked():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), SGD, lr=0.1)
    for zero_grad in (False, True):
        for phase in (opt.first_step, opt.second_step):
            model.zero_grad()
            losses(model, x, y).mean().backward()
            assert phase(zero_grad=zero_grad) is None
            assert all((p.grad is None) == zero_grad for p in model.parameters())


@pytest.mark.parametrize("base", ["momentum", "adam", "rmsprop"])
def test_a_frozen_parameter_whose_gradient_is_never_cleared(base):
    kind, options = BASES[base]
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), kind, **options)
    losses(model, x, y).mean().backward()
    model[0].requires_grad_(False)
    before = flat(model[0]), flat(model[2])
    for phase in (opt.first_step, opt.second_step):
        losses(model, x, y).mean().backward()
        phase()
        assert torch.equal(flat(model[0]), before[0]) and not torch.equal(flat(model[2]), before[1])


def test_gradients_accumulated_by_hand_over_micro_batches():
    """The two-step loop with several backward() calls a phase."""
    model, data = network(), batches(steps=5)
    opt = METHODS["SAM"].make(model, SGD, lr=0.1, momentum=0.9)
    for x, y in data:
        for phase in (opt.first_step, opt.second_step):
            for part, labels in zip(x.split(4), y.split(4), strict=True):
                (losses(model, part, labels).mean() / 4).backward()
            phase(zero_grad=True)
    assert relative_error(flat(model), METHODS["SAM"].oracle(SGD, {"lr": 0.1, "momentum": 0.9}, data)[0]) < 1e-9


# --- step(closure) as the reference has it


@on_cpu
@pytest.mark.parametrize("left_over", ["none", "zeros", "stale", "infinite"])
@pytest.mark.parametrize("base", ["momentum", "adam", "rmsprop"])
def test_a_per_sample_closure_ignores_gradients_that_are_left_over(base, left_over, backend):
    kind, options = BASES[base]
    model = network()
    opt = METHODS["SAM"].make(model, kind, model=model, **options)
    data = batches(steps=6)
    calls = []
    for x, y in data:
        for p in model.parameters():
            if left_over != "none":
                p.grad = torch.full_like(p, {"zeros": 0.0, "stale": 3.0, "infinite": float("inf")}[left_over])
        opt.step(lambda x=x, y=y: calls.append(0) or losses(model, x, y))
    weights, _ = METHODS["SAM"].oracle(kind, options, data)
    assert relative_error(flat(model), weights) < 1e-9
    assert len(calls) == 2 * len(data)


def test_a_per_sample_closure_with_a_frozen_gradient_left_over():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), SGD, lr=0.1)
    losses(model, x, y).mean().backward()
    model[0].requires_grad_(False)
    for layer in (model[2], model[4]):
        layer.zero_grad()
    assert opt.step(lambda: losses(model, x, y)).shape == ()


def test_reference_closure_may_zero_gradients_and_return_what_it_likes():
    results = []
    for returned in ("loss", "detached", "number", "nothing"):
        model = network()
        opt = compat.SAM(model.parameters(), SGD, rho=RHO, lr=0.1, momentum=0.9)
        for x, y in batches(steps=3):

            def closure(x=x, y=y, model=model, opt=opt, returned=returned):
                opt.zero_grad()
                loss = losses(model, x, y).mean()
                loss.backward()
                return {"loss": loss, "detached": loss.detach(), "number": loss.item()}.get(returned)

            closure()
            value = opt.step(closure)
            assert returned != "loss" or (value.shape == () and not value.requires_grad)
            opt.zero_grad()
        results.append(flat(model))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("base", [SGD, Adam, RMSprop])
def test_an_error_in_a_reference_closure_leaves_the_original_weights(base, error):
    model, (x, y) = network(), batches(steps=1)[0]
    opt = compat.SAM(model.parameters(), base, rho=1.0, lr=0.1)
    before = flat(model)

    def closure():
        assert not torch.equal(flat(model), before)
        losses(model, x, y).mean().backward()
        raise error

    losses(model, x, y).mean().backward()
    with pytest.raises(error):
        opt.step(closure)
    assert torch.equal(flat(model), before) and all(p.grad is None for p in model.parameters())
    opt.state_dict()


def test_a_closure_that_forgot_backward():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = compat.SAM(model.parameters(), SGD, lr=0.1)
    before = flat(model)
    losses(model, x, y).mean().backward()
    with pytest.raises(ValueError, match="closure must call backward"):
        opt.step(lambda: losses(model, x, y).mean())
    assert torch.equal(flat(model), before)


def test_targets_are_not_looked_at():
    model, (x, y) = network(), batches(steps=1)[0]
    opt = lf.SAM(model.parameters(), SGD, lr=0.1)
    opt.step(lambda: losses(model, x, y), targets=None)
    opt.step(lambda: losses(model, x, y), targets=y + 100)
    opt.step([lambda: losses(model, x, y)] * 2)
