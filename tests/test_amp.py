"""Mixed precision: a GradScaler in both interfaces, overflow in any pass, torch's contract for optimizers that scale."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import ltsam_fast as lf

COUNTS = [40, 20, 5]
METHODS = {
    "SAM": {},
    "FocalSAM": {"class_counts": COUNTS},
    "ImbSAM": {"class_counts": COUNTS, "eta": 30},
    "GNM": {},
    "FriendlySAM": {},
    "GSAM": {},
    "WSAM": {},
}
MORE = {"SSESAM": {"class_counts": COUNTS, "eta": 30}, "ESAM": {}, "MSAM": {"m": 3}, "CCSAM": {"class_counts": COUNTS}}
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "dampened": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "unfused": (torch.optim.RMSprop, {"lr": 0.01}),
}
OVERFLOWS = (1, 7, 8)


def data(steps=12):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(9, 4, generator=generator), torch.randint(0, 3, (9,), generator=generator)


class Run:
    """A model, its optimizer and a scaler, driven through one of the interfaces."""

    def __init__(self, method, base, scaled=True, **more):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        cls, options = BASES[base]
        options = (METHODS | MORE).get(method, {}) | options | more
        self.optimizer = getattr(lf, method)(self.model.parameters(), cls, rho=0.05, **options)
        # Powers of two, and no growth: scaling then changes no bit of the result.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, enabled=scaled)

    def losses(self, x, y, index=slice(None)):
        return F.cross_entropy(self.model(x[index]), y[index], reduction="none")

    def step(self, x, y, spoil):
        passes, self.calls = iter(spoil), 0

        def closure(index=slice(None)):
            self.calls += 1
            return Overflow.apply(self.losses(x, y, index=index), next(passes, False))

        self.optimizer.step(closure, targets=y, scaler=self.scaler)
        self.scaler.update()

    def backward(self, x, y, weights, spoil):
        losses = Overflow.apply(self.losses(x, y), spoil)
        self.scaler.scale((losses * weights).sum() / len(y)).backward()

    def phases(self, x, y, spoil, finish=None, **first):
        """The phases, with ``spoil`` for the backward passes, which may overflow one by one."""
        optimizer, spoil = self.optimizer, list(spoil)
        while len(spoil) < 3:
            spoil.append(spoil[-1])
        ones = torch.ones(len(y))
        if isinstance(optimizer, lf.GNM):
            optimizer.first_step(zero_grad=True, **first)
            self.backward(x, y, ones, spoil[0])
            last = optimizer.second_step
        elif "third_step" in optimizer.phases:
            u, v = (w.float()[y] for w in (optimizer.clean_weights, optimizer.class_weights))
            self.backward(x, y, u, spoil[0])
            optimizer.first_step(**first)
            self.backward(x, y, v, spoil[1])
            optimizer.second_step()
            self.backward(x, y, v, spoil[2])
            last = optimizer.third_step
        else:
            optimizer.zero_grad()
            self.backward(x, y, ones, spoil[0])
            optimizer.first_step(zero_grad=True, **first)
            self.backward(x, y, ones, spoil[1])
            last = optimizer.second_step
        (finish or last)()
        self.scaler.update()

    def state(self):
        return [p.detach().clone() for p in self.model.parameters()], copy.deepcopy(self.optimizer.state_dict())


class Overflow(torch.autograd.Function):
    """Passes losses on; their gradient is infinite if told so."""

    @staticmethod
    def forward(ctx, losses, spoil):
        ctx.spoil = spoil
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * torch.inf if ctx.spoil else grad), None


def ordered(tree):
    if isinstance(tree, dict):
        return {key: ordered(tree[key]) for key in sorted(tree)}
    return [ordered(one) for one in tree] if isinstance(tree, (list, tuple)) else tree


def assert_same(one, other):
    """Equal to the last bit, but for the count of steps that were tried."""
    for state in (one[1], other[1]):
        for group in state["param_groups"]:
            group.pop("steps", None)
            group.pop("skipped_steps", None)
    for mine, its in zip(tree_leaves(ordered(one)), tree_leaves(ordered(other)), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)
        else:
            assert mine == its


def assert_close(one, other):
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["first", "last", "all"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS | MORE)
def test_steps_that_overflow_are_skipped(method, base, which):
    run, skipping = Run(method, base), Run(method, base)
    for i, (x, y) in enumerate(data()):
        scale = run.scaler.get_scale()
        spoil = [which == "all"] * getattr(run, "calls", 1)
        spoil[0 if which == "first" else -1] = True
        run.step(x, y, spoil if i in OVERFLOWS else ())
        assert (run.scaler.get_scale() < scale) == (i in OVERFLOWS)
        if i not in OVERFLOWS:
            skipping.step(x, y, ())
    assert_same(run.state(), skipping.state())


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method, options", [("LookSAM", {"k": 3}), ("SSESAM", {"switch_step": 6})])
def test_steps_that_overflow_count_where_a_method_counts_steps(method, options, base, which):
    """Whoever looks, refreshes or switches at every so many steps counts those that were tried, without asking the device."""
    options = MORE.get(method, {}) | options
    run, skipping = Run(method, base, **options), Run(method, base, **options)
    for i, (x, y) in enumerate(data()):
        bad = i in (1, 6, 7)  # LookSAM looks at step 6 and uses an older look at step 8
        spoil = [bad] if len(run.optimizer.phases) == 1 else [bad and which == "first", False, bad and which == "last"]
        if method != "SSESAM" or i >= options["switch_step"]:
            spoil = [spoil[0], spoil[-1]]
        run.step(x, y, spoil)
        if bad:
            for group in skipping.optimizer.param_groups:
                group["steps"] += 1
        else:
            skipping.step(x, y, ())
    for mine, its in zip(run.model.parameters(), skipping.model.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_an_overflow_leaves_sparse_sams_mask(mask, which):
    """The mask is renewed at steps 0, 3, 6, ...; at 6 gradients overflow, and the one of step 3 stays until 9."""
    run = Run("SparseSAM", "sgd", refresh_every=3, mask=mask)
    for i, (x, y) in enumerate(data()):
        before = [state["mask"].clone() for state in run.optimizer.state.values()]
        run.step(x, y, [i == 6 and which == "first", i == 6 and which == "last"])
        after = [state["mask"] for state in run.optimizer.state.values()]
        changed = i == 0 or any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert changed == (i in (0, 3, 9))


@pytest.mark.parametrize("which", ["first", "last"])
def test_sparse_sams_first_mask_is_made_again_after_an_overflow(which):
    run, skipping = Run("SparseSAM", "sgd"), Run("SparseSAM", "sgd")
    for i, (x, y) in enumerate(data(5)):
        run.step(x, y, [i < 2 and which == "first", i < 2 and which == "last"])
        if i > 1:
            skipping.step(x, y, ())
    assert_same(run.state(), skipping.state())


@pytest.mark.parametrize("method", METHODS | MORE)
def test_an_overflow_in_the_very_first_step(method):
    run, skipping = Run(method, "dampened"), Run(method, "dampened")
    for i, (x, y) in enumerate(data(4)):
        run.step(x, y, [True] * 8 if i == 0 else ())
        if i:
            skipping.step(x, y, ())
    assert_same(run.state(), skipping.state())


@pytest.mark.parametrize("method", ["GNM", "ESAM"])
def test_random_numbers_after_an_overflow_survive_a_checkpoint(method):
    run = Run(method, "sgd")
    for i, (x, y) in enumerate(data(4)):
        run.step(x, y, [True] * 3 if i == 1 else ())
    resumed = Run(method, "sgd")
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert resumed.optimizer.param_groups[0]["skipped_steps"] == 1
    for x, y in data(3):
        run.step(x, y, ())
        resumed.step(x, y, ())
    assert_same(run.state(), resumed.state())


@pytest.mark.parametrize("passes", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_phases_with_a_scaler(method, base, passes):
    run, skipping = Run(method, base), Run(method, base, scaled=False)
    if method == "GNM":
        passes = (True,)
    elif "third_step" not in run.optimizer.phases:
        passes = (passes[0], passes[1] or passes[2])
    for i, (x, y) in enumerate(data()):
        scale = run.scaler.get_scale()
        run.phases(x, y, passes if i in OVERFLOWS else (False,), scaler=run.scaler)
        assert (run.scaler.get_scale() < scale) == (i in OVERFLOWS)
        if i not in OVERFLOWS:
            skipping.phases(x, y, (False,))
    assert_close(run, skipping)


@pytest.mark.parametrize("method", METHODS)
def test_torchs_contract(method):
    """grad_scale and found_inf as attributes: found_inf is set on the device, and the step does nothing."""
    run, plain = Run(method, "adamw"), Run(method, "adamw", scaled=False)
    for i, (x, y) in enumerate(data(4)):
        run.scaler.scale(torch.zeros(()))
        run.optimizer.grad_scale, run.optimizer.found_inf = run.scaler._get_scale_async(), torch.zeros(())
        before = run.state()
        run.scaler.update = lambda: None
        run.phases(x, y, (i == 2,))
        assert run.optimizer.found_inf.item() == (i == 2)
        if i == 2:
            assert_same(run.state(), before)
        else:
            plain.phases(x, y, (False,))
        del run.optimizer.grad_scale, run.optimizer.found_inf
    assert_close(run, plain)


@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "GNM"])
def test_scaler_step_is_the_last_phase(method):
    run, plain = Run(method, "sgd"), Run(method, "sgd", scaled=False)
    fired = []
    run.optimizer.register_step_post_hook(lambda *_: fired.append(1))
    assert run.optimizer._step_supports_amp_scaling
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, (x, y) in enumerate(data(6)):
            before = run.state()
            run.phases(x, y, (i == 3,), finish=lambda: run.scaler.step(run.optimizer))
            if i == 3:
                assert_same(run.state(), before)
            else:
                plain.phases(x, y, (False,))
    assert run.scaler.get_scale() == 2.0**7 and len(fired) == 6
    assert_close(run, plain)


def test_clipping_under_a_scaler():
    run, plain = Run("FocalSAM", "sgd", max_grad_norm=0.05), Run("FocalSAM", "sgd", scaled=False, max_grad_norm=0.05)
    for x, y in data(5):
        run.step(x, y, (False,))
        plain.step(x, y, (False,))
    assert_close(run, plain)


def test_unscaled_gradients_are_refused():
    run = Run("SAM", "sgd")
    ((x, y),) = data(1)
    run.backward(x, y, torch.ones(len(y)), False)
    run.scaler.unscale_(run.optimizer)
    with pytest.raises(ValueError, match=r"unscale_\(optimizer\) must not be called.*max_grad_norm"):
        run.optimizer.first_step(scaler=run.scaler)


def test_a_closure_through_the_scaler_is_refused():
    run = Run("SAM", "sgd")
    ((x, y),) = data(1)
    run.backward(x, y, torch.ones(len(y)), False)
    before = run.state()
    with pytest.raises(ValueError, match=r"call step\(closure, scaler=scaler\)"):
        run.scaler.step(run.optimizer, lambda: run.losses(x, y))
    assert_same(run.state(), before)


@pytest.mark.parametrize("method", METHODS | MORE)
def test_bfloat16_autocast(method):
    run = Run(method, "sgd")
    losses = run.losses

    def under_autocast(*arguments, **named):
        with torch.autocast("cpu", torch.bfloat16):
            return losses(*arguments, **named)

    run.losses = under_autocast
    before = run.state()[0]
    for x, y in data(3):
        run.step(x, y, (False,))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))
