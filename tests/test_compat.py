"""Scripts written for the published classes: call for call, with nothing changed but the import."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD

from ltsam_fast import compat, reference

from . import oracles_family as family
from .oracles import COUNTS, batches, flat, losses, network, relative_error

RHO, ETA = 0.1, 10
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def groups(model, **more):
    return [{"params": list(model.parameters()), "rho": RHO, "norm_eps": 1e-16, **more}]


def tail_of(y):
    return torch.tensor(COUNTS)[y] < ETA


@pytest.mark.parametrize("factor", [1, 2])
def test_imb_sam(factor):
    model = network()
    optimizer = compat.ImbSAM(SGD(model.parameters(), **BASE), model, rho=RHO)
    for x, y in batches():
        loss, tail = losses(model, x, y), tail_of(y)
        (loss[~tail].sum() / len(y)).backward(retain_graph=True)
        optimizer.first_step()
        (factor * loss[tail].sum() / len(y)).backward()
        optimizer.second_step()
        loss = losses(model, x, y)[tail]
        (factor * loss.sum() / len(y)).backward()
        optimizer.third_step()
    own = {"class_counts": COUNTS, "eta": ETA, "tail_weight": factor}
    twin = network()
    expected, _ = family.imb_sam(twin, groups(twin), batches(), SGD, BASE, **own)
    assert relative_error(flat(model), expected) < 1e-9


def test_imb_sam_by_closure_has_todays_factor():
    model = network()
    optimizer = compat.ImbSAM(SGD(model.parameters(), **BASE), model, rho=RHO, class_counts=COUNTS, eta=ETA)
    for x, y in batches():
        optimizer.step(lambda x=x, y=y: losses(model, x, y), targets=y)
    twin = network()
    own = {"class_counts": COUNTS, "eta": ETA, "tail_weight": 2}
    assert relative_error(flat(model), family.imb_sam(twin, groups(twin), batches(), SGD, BASE, **own)[0]) < 1e-9


def test_sam_around_an_optimizer():
    model = network()
    optimizer = compat.SAM(SGD(model.parameters(), **BASE), model, rho=RHO)
    for x, y in batches():
        losses(model, x, y).mean().backward()
        optimizer.first_step()
        losses(model, x, y).mean().backward()
        optimizer.second_step()
    twin = network()
    expected, _ = family.friendly_sam(twin, groups(twin), batches(), SGD, BASE, sigma=0.0)
    assert relative_error(flat(model), expected) < 1e-9


def test_sam_with_a_base_class():
    results = []
    for script in ("published", "closure"):
        model = network()
        optimizer = compat.SAM(model.parameters(), SGD, rho=RHO, adaptive=True, **BASE)
        for x, y in batches():
            if script == "published":
                losses(model, x, y).mean().backward()
                optimizer.first_step(zero_grad=True)
                losses(model, x, y).mean().backward()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(lambda x=x, y=y: losses(model, x, y))  # noqa: B023
        results.append(flat(model))
    assert relative_error(*results) < 1e-12


def test_sse_sam():
    model = network()
    optimizer = compat.SSESAM(
        SGD(model.parameters(), **BASE), model, head_rho=RHO, tail_rho=0.2, gamma=0.4, total_epochs=5
    )
    data = batches()
    for epoch in range(5):
        for x, y in data[5 * epoch : 5 * epoch + 5]:
            tail = tail_of(y)
            for number, chosen in enumerate((~tail, tail)):
                (losses(model, x, y)[chosen].sum() / len(y)).backward(retain_graph=True)
                optimizer.compute_and_add_epsilon(n_i=number)
                (losses(model, x, y)[chosen].sum() / len(y)).backward(retain_graph=True)
                optimizer.compute_grad_sum_and_restore_p()
            optimizer.update()
        optimizer.update_rho()
    twin = network()
    own = {"class_counts": COUNTS, "eta": ETA, "tail_rho": 0.2, "switch_step": 10}
    assert relative_error(flat(model), family.sse_sam(twin, groups(twin), data, SGD, BASE, **own)[0]) < 1e-9


def test_gnm_with_its_double_epoch_0():
    config = SimpleNamespace(dis_mul=0.5, loss=SimpleNamespace(GCL=SimpleNamespace(reweight_epoch=2)))
    model, data = network(), batches()
    optimizer = compat.GNM(config, model.parameters(), SGD, rho=RHO, adaptive=False, **BASE)
    for step, (x, y) in enumerate(data):
        optimizer.first_step(step // 5, zero_grad=True)
        losses(model, x, y).mean().backward()
        optimizer.second_step(zero_grad=True)

    def noise(step, number, shape):
        words = reference._random_words(torch.empty(shape), number, 0, step, None)
        halved = 0.5 ** ((step // 5 - 1) // 2)  # 2 in epoch 0, 1 in 1 and 2, 1/2 in 3 and 4
        return (reference._normal(words).double() / 3).clamp(-1, 1) * halved

    twin = network()
    expected, _ = family.gnm(twin, groups(twin), data, SGD, BASE, noise=noise, dis_mul=0.5)
    assert relative_error(flat(model), expected) < 1e-9


def test_a_wrapped_optimizer_keeps_its_scheduler_and_state():
    model = network()
    base = SGD(model.parameters(), **BASE)
    schedule = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5)
    optimizer = compat.ImbSAM(base, model, rho=RHO, class_counts=COUNTS)
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups
    (x, y), *_ = batches()
    optimizer.step(lambda: losses(model, x, y), targets=y)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert "momentum_buffer" in base.state[next(model.parameters())]
    with pytest.raises(TypeError, match="optimizer must be"):
        compat.ImbSAM(model.parameters(), model)
