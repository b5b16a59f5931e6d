"""Momentum-SAM along the base optimizer's momentum; along the last gradient it is in the table of all methods."""

import copy

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, NAdam, RMSprop

import ltsam_fast as lf

from .method_rows import BASES, EVERY, on_cpu, step_in_phases, two_groups
from .oracles import STEPS, batches, flat, losses, network, relative_error

ROW = EVERY["MomentumSAM"].having(direction="momentum")
WITH = {
    name: BASES[name]
    for name in ("momentum", "nesterov", "dampening", "maximize", "adam", "adam-amsgrad", "adamw", "rmsprop")
}
WITH["nadam"] = (NAdam, {"lr": 0.01})
bases = pytest.mark.parametrize("base", WITH)


@on_cpu
@pytest.mark.parametrize("groups", [None, two_groups], ids=["", "groups"])
@bases
def test_formula(base, groups, backend):
    kind, options = WITH[base]
    model = network()
    opt = ROW.make(model, kind, groups(model) if groups else None, **options)
    data = batches()
    ends = [float(opt.step(lambda: losses(model, x, y))) for x, y in data]  # noqa: B023
    wanted, means = ROW.expected(kind, options, data, groups=groups)
    assert relative_error(flat(model), wanted) < 1e-9
    assert ends == pytest.approx(means, rel=1e-9)


@bases
def test_a_negative_radius_goes_the_other_way(base):
    kind, options = WITH[base]
    row, model = ROW, network()
    opt = row.make(model, kind, **{**options, "rho": -0.3})
    for x, y in batches():
        opt.step(lambda: losses(model, x, y))  # noqa: B023
    wanted, _ = ROW.expected(kind, options, batches(), groups=lambda m: [{"params": list(m.parameters()), "rho": -0.3}])
    assert relative_error(flat(model), wanted) < 1e-9


@bases
def test_phases(base):
    kind, options = WITH[base]
    models = network(), network()
    by_closure, by_phases = (ROW.make(model, kind, **options) for model in models)
    assert by_phases.phases == ("first_step", "second_step")
    for x, y in batches(steps=5):
        by_closure.step(lambda: losses(models[0], x, y))  # noqa: B023
        step_in_phases(by_phases, lambda: losses(models[1], x, y))  # noqa: B023
    torch.testing.assert_close(flat(models[1]), flat(models[0]), rtol=1e-12, atol=1e-14)


@bases
def test_resumes_bit_for_bit(base):
    kind, options = WITH[base]
    data = batches(torch.float32, 8)
    whole, half = network(torch.float32), network(torch.float32)
    ROW.drive("closure", ROW.make(whole, kind, **options), whole, data)
    opt = ROW.make(half, kind, **options)
    ROW.drive("closure", opt, half, data[:4])
    model = copy.deepcopy(half)
    resumed = ROW.make(model, kind, **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    ROW.drive("closure", resumed, model, data[4:])
    assert torch.equal(flat(model), flat(whole))


def test_one_forward_and_no_state_of_its_own():
    model, count = network(), 0
    opt = ROW.make(model, SGD, lr=0.1, momentum=0.9)

    def closure():
        nonlocal count
        count += 1
        assert opt.is_perturbed == (count > 1)
        return losses(model, x, y)

    ((x, y),) = batches(steps=1)
    for _ in range(4):
        opt.step(closure)
    assert count == 4 and all([*state] == ["momentum_buffer"] for state in opt.state.values())


def test_overflows_leave_everything():
    model = network(torch.float32)
    opt = ROW.make(model, SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = network(torch.float32)
    other = ROW.make(plain, SGD, lr=0.1, momentum=0.9)
    for number, (x, y) in enumerate(batches(torch.float32, 6)):
        spoiled = number in (0, 3)
        opt.step(lambda: losses(model, x * torch.inf if spoiled else x, y), scaler=scaler)  # noqa: B023
        scaler.update()
        if not spoiled:
            other.step(lambda: losses(plain, x, y))  # noqa: B023
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"), [(SGD, {}), (RMSprop, {}), (Adagrad, {})], ids=["SGD", "RMSprop", "Adagrad"]
)
def test_needs_momentum(kind, options):
    with pytest.raises(ValueError, match=f"direction must be 'last_gradient' with {kind.__name__} without momentum"):
        lf.MomentumSAM(network().parameters(), kind, lr=0.1, **options)
    lf.MomentumSAM(network().parameters(), kind, lr=0.1, direction="last_gradient", **options)
    lf.MomentumSAM(network().parameters(), kind, lr=0.1, rho=0.0, **options)


def test_every_step_counts_in_the_oracle():
    """The oracle's perturbations are not small beside the weights: an oracle that forgot them would not be noticed else."""
    with_it, _ = ROW.expected(AdamW, {"lr": 0.01}, batches())
    without, _ = ROW.expected(
        AdamW, {"lr": 0.01}, batches(), groups=lambda m: [{"params": list(m.parameters()), "rho": 0.0}]
    )
    assert relative_error(with_it, without) > 1e-4 and STEPS == 25
