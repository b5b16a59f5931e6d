"""Mixed precision: a GradScaler in both interfaces, overflow in any pass, torch's contract for optimizers that scale."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD, AdamW, RMSprop
from torch.utils._pytree import tree_leaves

import ltsam_fast as lf

from .method_rows import BASES, EVERY, driven, each_way, every, on_cpu, phased, skip_step, step_in_phases
from .oracles import batches, flat, losses, network, relative_error

KINDS = {
    "dampened": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-3}),
    "adamw": (AdamW, {"lr": 0.01}),
    "unfused": (RMSprop, {"lr": 0.01}),
}


class Overflow(torch.autograd.Function):
    """Passes losses on; their gradient is infinite if told so."""

    @staticmethod
    def forward(ctx, losses, spoil):
        ctx.spoil = spoil
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * torch.inf if ctx.spoil else grad), None


class Run:
    """A model, its optimizer and a scaler, driven through one of the interfaces."""

    def __init__(self, name, kind="dampened", interface="closure", scaled=True, **more):
        base, options = KINDS[kind]
        self.row, self.interface, self.model = EVERY[name].of(interface), interface, network(torch.float32)
        self.optimizer = self.row.make(self.model, base, **options, **more)
        # Powers of two, and no growth: scaling then changes no bit of the result.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, enabled=scaled)

    def losses_spoilt(self, pass_):
        """Losses whose gradient overflows in one of the step's evaluations; None: in none."""
        self.calls = 0

        def loss(model, x, y):
            self.calls += 1
            return Overflow.apply(losses(model, x, y), self.calls - 1 == pass_)

        return loss

    def step(self, x, y, pass_=None):
        scale = self.scaler.get_scale()
        self.row.step(self.interface, self.optimizer, self.model, x, y, self.losses_spoilt(pass_), scaler=self.scaler)
        self.scaler.update()
        return self.scaler.get_scale() < scale

    def skip(self):
        """A step that overflows in the other run."""
        if self.row.counts_tried:
            skip_step(self.optimizer)

    def state(self):
        return [p.detach().clone() for p in self.model.parameters()], copy.deepcopy(self.optimizer.state_dict())


def data(steps):
    return enumerate(batches(torch.float32, steps))


def ordered(tree):
    if isinstance(tree, dict):
        return {key: ordered(tree[key]) for key in sorted(tree)}
    return [ordered(one) for one in tree] if isinstance(tree, (list, tuple)) else tree


COUNTERS = ("steps", "skipped_steps")
"""A group's counts of steps."""


def assert_same(one, other):
    """Equal to the last bit, but for the count of steps that were tried, and LookSAM's direction, which has any length."""
    for state in (one[1], other[1]):
        for group in state["param_groups"]:
            for name in COUNTERS:
                group.pop(name, None)
        for of_parameter in state["state"].values():
            of_parameter.pop("grad_v", None)
    for mine, its in zip(tree_leaves(ordered(one)), tree_leaves(ordered(other)), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)
        else:
            assert mine == its


def assert_close(one, other):
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


# --- steps that overflow


@pytest.mark.parametrize("kind", KINDS)
@driven
def test_steps_that_overflow_are_skipped(name, interface, kind):
    """In any of their passes, in the very first step too: what follows is as if they had not been tried."""
    plain = Run(name, kind, interface)
    passes = [(plain.step(x, y), plain.calls)[1] for _, (x, y) in data(9)]
    for number in range(passes[0]):
        if (name, number) == ("ESAM", 1):  # the pass without gradients
            continue
        if name == "MicroBatchSAM" and 1 < number < 7:  # micro-batches between the first and the last
            continue
        run, skipping = Run(name, kind, interface), Run(name, kind, interface)
        for i, (x, y) in data(9):
            bad = i in (0, 6, 7)  # LookSAM looks at step 6 and uses an older look at step 7
            assert run.step(x, y, min(number, passes[i] - 1) if bad else None) == bad, (number, i)
            skipping.skip() if bad else skipping.step(x, y)
        assert_same(run.state(), skipping.state())


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_an_overflow_leaves_sparse_sams_mask(mask, which):
    """The mask is renewed at steps 0, 3, 6, ...; at 6 gradients overflow, and the one of step 3 stays until 9."""
    run = Run("SparseSAM", refresh_every=3, mask=mask)
    for i, (x, y) in data(12):
        before = [state["mask"].clone() for state in run.optimizer.state.values()]
        run.step(x, y, ["first", "last"].index(which) if i == 6 else None)
        after = [state["mask"] for state in run.optimizer.state.values()]
        changed = i == 0 or any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert changed == (i in (0, 3, 9))


def test_friendly_sam_begins_anew_after_a_first_overflow():
    results = []
    for overflow in (True, False):
        run = Run("FriendlySAM")
        for i, (x, y) in data(4):
            if overflow and i == 0:
                run.optimizer.step(lambda x=x, y=y: losses(run.model, x, y) * torch.inf, scaler=run.scaler)  # noqa: B023
                run.scaler.update(2.0**8)
            run.step(x, y)
        results.append(flat(run.model))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["GNM", "ESAM"])
def test_random_numbers_after_an_overflow_survive_a_checkpoint(name):
    run = Run(name)
    for i, (x, y) in data(4):
        run.step(x, y, 0 if i == 1 else None)
    resumed = Run(name)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for _, (x, y) in data(3):
        run.step(x, y)
        resumed.step(x, y)
    assert_same(run.state(), resumed.state())


@on_cpu
def test_overflow_of_the_clean_gradient_alone(backend):
    """The frequent class weighs next to nothing in the sharp loss; its clean gradient overflows all the same."""
    counts = [10**9, 1]
    for used in ((0, 1), (1,)):  # the parameter that overflowed has a gradient in the last pass, or has none
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
        opt = lf.FocalSAM(params, SGD, class_counts=counts, gamma=1.0, lam=0.5, rho=0.1, lr=0.1, momentum=0.9)
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


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("interface", ["closure", "phases"])
@pytest.mark.parametrize("name", ["SAM", "FocalSAM"])
def test_an_overflow_in_any_micro_batch(name, interface, number):
    """In the last pass it skips the step; without one it is the step of the whole batch."""
    results = []
    for parts in (True, False):
        run = Run(name, scaled=parts)
        for step, (x, y) in data(4):
            bad = parts and step == 2
            pieces = list(zip(x.split(2), y.split(2), strict=True))
            if not parts:
                if step != 2:
                    run.row.step(interface, run.optimizer, run.model, x, y)
                continue

            def loss(i, x, y, run=run, bad=bad):
                infinite = bad and i == number and run.optimizer.is_perturbed
                return losses(run.model, x, y) * (float("inf") if infinite else 1.0)

            if interface == "closure":
                closures = [lambda i=i, piece=piece, loss=loss: loss(i, *piece) for i, piece in enumerate(pieces)]
                run.optimizer.step(closures, targets=[y for _, y in pieces], scaler=run.scaler)
            else:
                all_parts = lambda loss=loss, pieces=pieces: torch.cat([loss(i, *one) for i, one in enumerate(pieces)])  # noqa: E731
                step_in_phases(run.optimizer, all_parts, y, run.scaler)
            run.scaler.update(2.0**8)
        results.append(flat(run.model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


# --- steps that do not


@each_way
def test_a_scaled_step_is_the_unscaled_one(name, base, interface):
    """One update of the scale for each step: with 8 good ones it grows with the 3rd and the 6th."""
    row, (kind, options), results = EVERY[name].of(interface), BASES[base], []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    for used in (scaler, torch.amp.GradScaler("cpu", enabled=False), None):
        model, means = network(), []
        opt = row.make(model, kind, max_grad_norm=0.05, **options)
        for x, y in batches(steps=8):
            means.append(row.step(interface, opt, model, x, y, scaler=used))
            if used:
                used.update()
        results.append(flat(model) if interface == "phases" else torch.cat([flat(model), torch.stack(means)]))
    assert relative_error(results[0], results[2]) < 1e-9 and torch.equal(results[1], results[2])
    assert scaler.get_scale() == 256.0 * 4


@every
def test_bfloat16_autocast(name):
    run = Run(name)

    def under_autocast(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y, reduction="none")

    before = run.state()[0]
    for _, (x, y) in data(3):
        run.row.step("closure", run.optimizer, run.model, x, y, under_autocast, scaler=run.scaler)
        run.scaler.update()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))


# --- torch's contract, with the phases


@phased
def test_the_scale_as_attributes(name):
    """grad_scale and found_inf: found_inf is set on the device, and the step does nothing."""
    run, plain = Run(name, "adamw", "phases"), Run(name, "adamw", "phases", scaled=False)
    for i, (x, y) in data(4):
        run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(2.0**8), torch.zeros(())
        before = run.state()
        loss = run.losses_spoilt(0 if i == 2 else None)
        step_in_phases(run.optimizer, lambda x=x, y=y, loss=loss: 2.0**8 * loss(run.model, x, y), y)
        assert run.optimizer.found_inf.item() == (i == 2)
        if i == 2:
            assert_same(run.state(), before)
            plain.skip()
        else:
            plain.step(x, y)
        del run.optimizer.grad_scale, run.optimizer.found_inf
    assert_close(run, plain)


@phased
def test_scaler_step_is_the_last_phase(name):
    run, plain, fired = Run(name, interface="phases"), Run(name, interface="phases", scaled=False), []
    opt, scaler = run.optimizer, run.scaler
    opt.register_step_post_hook(lambda *_: fired.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, (x, y) in data(6):
            before, loss = run.state(), run.losses_spoilt(0 if i == 3 else None)
            last = opt.phases[-1]
            setattr(opt, last, lambda last=last, **_: (delattr(opt, last), scaler.step(opt)))
            step_in_phases(opt, lambda x=x, y=y, loss=loss: loss(run.model, x, y), y, scaler)
            scaler.update()
            if i == 3:
                assert_same(run.state(), before)
                plain.skip()
            else:
                plain.step(x, y)
    assert scaler.get_scale() == 2.0**7 and len(fired) == 6
    assert_close(run, plain)


def test_unscaled_gradients_are_refused():
    run = Run("SAM")
    ((_, (x, y)),) = data(1)
    run.scaler.scale(losses(run.model, x, y).mean()).backward()
    run.scaler.unscale_(run.optimizer)
    with pytest.raises(ValueError, match=r"unscale_\(optimizer\) must not be called.*max_grad_norm"):
        run.optimizer.first_step(scaler=run.scaler)


def test_a_closure_through_the_scaler_is_refused():
    run = Run("SAM")
    ((_, (x, y)),) = data(1)
    run.scaler.scale(losses(run.model, x, y).mean()).backward()
    before = run.state()
    with pytest.raises(ValueError, match=r"call step\(closure, scaler=scaler\)"):
        run.scaler.step(run.optimizer, lambda: losses(run.model, x, y))
    assert_same(run.state(), before)


@pytest.mark.parametrize("name", ["FriendlySAM", "VaSSO"])
def test_a_scale_that_comes_with_the_last_phase_only_is_refused(name):
    """Where the first phase has averaged gradients: it did not know that they were scaled."""
    run = Run(name)
    (_, (x, y)), *_ = data(1)
    opt, before = run.optimizer, flat(run.model)
    run.scaler.scale(losses(run.model, x, y).mean()).backward()
    opt.first_step(zero_grad=True)
    run.scaler.scale(losses(run.model, x, y).mean()).backward()
    with pytest.raises(ValueError, match=r"scaler must be given to first_step\(scaler=scaler\) too"):
        run.scaler.step(opt)
    assert torch.equal(flat(run.model), before) and not hasattr(opt, "grad_scale")
