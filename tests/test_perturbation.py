"""Perturbed weights: never left behind, not seen by running statistics, whatever the layouts, dtypes and errors."""

import contextlib
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, RMSprop

import ltsam_fast as lf
from ltsam_fast.backend import backend_for

from .method_rows import (
    BASES,
    DRIVEN,
    EVERY,
    KINDS,
    RHO,
    driven,
    each_way,
    every,
    expected,
    on_cpu,
    phased,
    step_in_phases,
    with_bases,
)
from .oracles import CLASSES, FEATURES, STEPS, batches, flat, losses, network, relative_error

# --- what is perturbed


@driven
def test_groups_that_are_left_out_stay_where_they_are_seen(name, interface):
    row, model = EVERY[name].of(interface), network()
    left_out, perturbed = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    opt = row.make(model, SGD, [{"params": left_out, "perturb": False}, {"params": perturbed}], lr=0.0)
    before, kept, seen = flat(perturbed), flat(left_out), []

    def look(*_):
        assert torch.equal(flat(left_out), kept)
        seen.append((opt.is_perturbed, not torch.equal(flat(perturbed), before)))

    model.register_forward_pre_hook(look)
    row.drive(interface, opt, model, batches(steps=2))  # in the first Momentum-SAM has no direction yet
    assert any(moved for _, moved in seen) and all(said == moved for said, moved in seen)


@pytest.mark.parametrize("name", ["SAM", "FocalSAM"])
def test_groups_that_are_left_out_are_not_in_the_norm(name):
    row, model = EVERY[name], network()
    perturbed = [*model[2].parameters(), *model[4].parameters()]
    groups = [{"params": list(model[0].parameters()), "perturb": False}, {"params": perturbed}]
    opt, before, seen = row.make(model, SGD, groups, lr=0.1), flat(perturbed), []
    model.register_forward_pre_hook(lambda *_: seen.append((flat(perturbed) - before).norm().item()))
    row.drive("closure", opt, model, batches(steps=1))
    assert seen == pytest.approx([0.0, RHO], rel=1e-9)


@pytest.mark.parametrize("left_out", [False, True], ids=["no radius", "perturb=False"])
@with_bases(*KINDS)
@every
def test_without_a_perturbation_a_step_is_the_bases(name, base, left_out):
    row, (kind, options) = EVERY[name], BASES[base]
    options = {**options, "lr": 0.01}
    model, plain = network(), network()
    own = ({"gamma": 1.0} if name == "ESAM" else {}) if left_out else row.unperturbed
    opt = row.make(model, kind, [{"params": list(model.parameters()), "perturb": not left_out}], **options, **own)
    row.drive("closure", opt, model, batches(steps=8))
    optimizer = kind(plain.parameters(), **options)
    for x, y in batches(steps=8):
        optimizer.zero_grad()
        losses(plain, x, y).mean().backward()
        optimizer.step()
    assert relative_error(flat(model), flat(plain)) < 1e-12


@every
def test_only_unperturbed_groups_have_gradients(name):
    """A frozen backbone and a head that is left out: nothing to perturb, so the base optimizer's step."""
    row = EVERY[name].having(gamma=1.0) if name == "ESAM" else EVERY[name]
    model, plain, data = network(), network(), batches(steps=3)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    body, head = [*model[0].parameters(), *model[2].parameters()], list(model[4].parameters())
    opt = row.make(model, SGD, [{"params": body}, {"params": head, "perturb": False}], lr=0.1)
    row.drive("closure", opt, model, data)
    optimizer = SGD(plain[4].parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        losses(plain, x, y).mean().backward()
        optimizer.step()
    assert relative_error(flat(model), flat(plain)) < 1e-12


@each_way
def test_frozen_parameters_are_never_touched(name, base, interface):
    row, (kind, options), model = EVERY[name].of(interface), BASES[base], network()
    opt = row.make(model, kind, **options)
    losses(model, *batches(steps=1)[0]).mean().backward()  # gradients that are left over
    model[2].requires_grad_(False)
    model[0].zero_grad()
    model[4].zero_grad()
    before, start, seen = flat(model[2]), flat(model), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.equal(flat(model[2]), before)))
    row.drive(interface, opt, model, batches(steps=3))
    assert all(seen) and torch.equal(flat(model[2]), before) and not torch.equal(flat(model), start)
    model[2].requires_grad_(True)
    row.drive(interface, opt, model, batches(steps=1))
    assert not torch.equal(flat(model[2]), before)


@with_bases("momentum", "adam", "rmsprop")
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


class Parts(nn.Module):
    """Quadratic losses in any of several tensors, so that a pass can leave some out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.ParameterList(
            nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(4)
        )

    def losses(self, x, used):
        return sum((x @ self.w[i] - i - 1).square().sum(1) for i in used)


# Which tensors the passes at w and at w + eps use: both, only the first, only the second, later than others, never.
USED = [((0, 1), (0, 2)), ((0,), (0, 1, 2)), ((0, 1), (0,)), ((2, 0), (1, 2)), ((0, 1, 2), (0, 1, 2))] * 2


@pytest.mark.parametrize(
    ("base", "limit"), [("sgd", 0.0), ("dampening", 0.0), ("nesterov", 0.1), ("adamw", 0.1), ("rmsprop", 0.0)]
)
@every
def test_parameters_without_gradient_in_a_pass(name, base, limit):
    """With clipping, a gradient that only the pass at w has, and that is kept, is part of the norm."""
    row, (kind, options) = EVERY[name], BASES[base]
    options = {**options, "lr": 0.01}
    generator = torch.Generator().manual_seed(4)
    data = [
        (
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (5,), generator=generator),
        )
        for _ in USED
    ]
    model = Parts()
    opt = row.make(model, kind, max_grad_norm=limit, **options)
    for (x, y), used in zip(data, USED, strict=True):
        opt.step(lambda i=slice(None), x=x, used=used: model.losses(x[i], used[opt.is_perturbed]), targets=y)
    steps = {id(x): used for (x, _), used in zip(data, USED, strict=True)}
    wanted, _ = row.expected(
        kind, options, data, model=Parts(), max_grad_norm=limit,
        loss=lambda model, x, y, perturbed: model.losses(x, steps[id(x)][perturbed]),
    )  # fmt: skip
    assert relative_error(flat(model), wanted) < 1e-9
    assert torch.equal(model.w[3], Parts().w[3]) and not {"momentum_buffer", "exp_avg"} & {
        *opt.state.get(model.w[3], ())
    }


# --- shapes, layouts and dtypes


class Odd(nn.Module):
    """A scalar, empty tensors first, middle and last, a convolution, and a weight used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.empty_too = nn.Parameter(torch.zeros(0))
        self.mix = nn.Linear(4, 4)
        self.unmix = nn.Linear(4, 4, bias=False)
        self.unmix.weight = self.mix.weight
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.last = nn.Parameter(torch.zeros(2, 0))
        self.double()

    def forward(self, x):
        hidden = self.unmix(torch.tanh(self.mix(self.conv(x).mean((2, 3)))))
        out = self.scale * hidden @ self.transposed @ self.transposed.t()
        return out + self.empty.sum() + self.empty_too.sum() + self.last.sum()


def odd(channels_last):
    model = Odd()
    if channels_last:
        model.to(memory_format=torch.channels_last)
        assert not model.conv.weight.is_contiguous()
    return model


@on_cpu
@pytest.mark.parametrize(("base", "channels_last"), [("nesterov", False), ("adamw", True), ("rmsprop", True)])
@every
def test_odd_shapes_and_layouts(name, base, channels_last, backend):
    row, (kind, options) = EVERY[name], BASES[base]
    options = {**options, "lr": 0.01}
    generator = torch.Generator().manual_seed(5)
    data = [
        (torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64), torch.randint(0, CLASSES, (6,)))
        for _ in range(5)
    ]
    model = odd(channels_last)
    strides = [p.stride() for p in model.parameters()]
    opt = row.make(model, kind, **options)
    weights = row.drive("closure", opt, model, [(x.to(memory_format=torch.channels_last), y) for x, y in data])
    # Random numbers go by a weight's place in memory, so the oracle's weights lie as the model's do.
    assert relative_error(weights, row.expected(kind, options, data, model=odd(channels_last))[0]) < 1e-9
    assert [p.stride() for p in model.parameters()] == strides


@with_bases(*KINDS)
@phased
def test_gradients_need_not_lie_like_their_weights(name, base):
    kind, options = BASES[base]
    results = []
    for lay_out in (lambda g: g, lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, g], -1)[..., 0]):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(5, 3))
        opt = EVERY[name].make(None, kind, [w], **options, **({"mask": "dynamic"} if name == "SparseSAM" else {}))
        for number in range(3 * len(opt.phases)):
            w.grad = lay_out(torch.randn(5, 3, generator=torch.Generator().manual_seed(number)))
            getattr(opt, opt.phases[number % len(opt.phases)])()
        results.append(w.detach())
    assert relative_error(results[1], results[0]) < 1e-6 and relative_error(results[2], results[0]) < 1e-6


@with_bases("nesterov", "adamw")
@every
def test_mixed_dtypes_in_one_model(name, base):
    row, (kind, options) = EVERY[name], BASES[base]
    model = nn.Sequential(network()[:3], network(torch.float32)[3:])

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](x).float()), y, reduction="none")

    weights = row.drive("closure", row.make(model, kind, **options), model, batches(), loss)
    assert relative_error(weights, expected(name, base, "closure", STEPS)[0]) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every
def test_a_model_that_changes_its_dtype_comes_back_exactly(name, dtype):
    row, model = EVERY[name], network(torch.bfloat16)
    opt = row.make(model, SGD, lr=0.0)
    row.drive("closure", opt, model, batches(torch.bfloat16, 2))
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    before = flat(model)
    assert torch.equal(row.drive("closure", opt, model, batches(dtype, 2)), before)


@every
def test_a_model_whose_weights_moved(name):
    row, results = EVERY[name], []
    for moving in (False, True):
        model = network()
        opt = row.make(model, lr=0.1, momentum=0.9)
        for x, y in batches(steps=5):
            for p in model.parameters() if moving else ():
                p.data = p.data.clone()
            row.step("closure", opt, model, x, y)
        results.append(flat(model))
    assert torch.equal(*results)


@each_way
def test_parameters_stay_where_they_are(name, base, interface):
    row, (kind, options), model = EVERY[name].of(interface), BASES[base], network()
    opt = row.make(model, kind, **options)
    addresses = [p.data_ptr() for p in model.parameters()]
    row.drive(interface, opt, model, batches(steps=3))
    assert [p.data_ptr() for p in model.parameters()] == addresses


@on_cpu
@every
def test_same_bits_for_any_number_of_threads(name, backend, threads):
    """Of the passes: a matrix product may differ, so gradients come from hooks."""
    runs = []
    for count in (1, 2):
        with threads(count):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(FEATURES, 3000), nn.Tanh(), nn.Linear(3000, CLASSES))
            opt = EVERY[name].make(model, lr=0.1, momentum=0.9, max_grad_norm=0.1)
            for number, p in enumerate(model.parameters()):
                fixed = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
                p.register_hook(lambda _, fixed=fixed: fixed)
            EVERY[name].drive("closure", opt, model, batches(torch.float32, 2))
            runs.append(flat(model))
    assert torch.equal(*runs)


@with_bases(*KINDS)
@phased
def test_a_backward_through_overwritten_weights_is_noticed(name, base):
    """The passes write past autograd, which must know all the same."""
    (kind, options), model = BASES[base], network()
    opt = EVERY[name].make(model, kind, **options, **({"mask": "dynamic"} if name == "SparseSAM" else {}))
    for phase in opt.phases:
        losses(model, *batches(steps=1)[0]).mean().backward()
        outdated = losses(model, *batches(steps=1)[0]).mean()
        getattr(opt, phase)()
        if opt.is_perturbed or phase == opt.phases[-1]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outdated.backward()


# --- running statistics


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            nn.BatchNorm2d(3, momentum=None),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.InstanceNorm2d(3),
        )
        self.head = nn.Sequential(nn.Linear(3 * 16, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.head(self.norms(self.conv(x)).flatten(1))


def images(steps, size=7):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(steps)
    ]


def flags(model):
    names = ("training", "momentum", "track_running_stats")
    return [tuple(getattr(module, name, None) for name in names) for module in model.modules()]


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def drive_noting(row, interface, opt, model, data):
    """The inputs of the passes at w, and the number of all passes."""
    at_w, calls = [], []

    def loss(model, x, y):
        calls.append(1)
        if not opt.is_perturbed:
            at_w.append(x)
        return losses(model, x, y)

    row.drive(interface, opt, model, data, loss)
    return at_w, len(calls)


@driven
def test_statistics_are_those_of_the_passes_at_w(name, interface):
    model, other, row = Normalized(), Normalized(), EVERY[name].of(interface)
    before = flags(model)
    opt = row.make(model, SGD, lr=0.0, model=model)  # the weights stay, so the other sees the same activations
    at_w, calls = drive_noting(row, interface, opt, model, images(4))
    if row.once:  # mostly at perturbed weights
        assert model.head[1].num_batches_tracked == calls
    else:
        for x in at_w:
            other(x)
        assert len(at_w) < calls and same(buffers(model), buffers(other))
    assert flags(model) == before


@driven
def test_without_model_every_pass_is_counted_as_published(name, interface):
    model, row = Normalized(), EVERY[name].of(interface)
    _, calls = drive_noting(row, interface, row.make(model, SGD, lr=0.0), model, images(3))
    assert model.head[1].num_batches_tracked == calls


@every
def test_statistics_are_left_alone_where_the_user_froze_them(name):
    model, row = Normalized(), EVERY[name]
    model.norms.eval()
    opt = row.make(model, SGD, lr=0.1, model=model)
    before, were = buffers(model.norms), flags(model)
    at_w, calls = drive_noting(row, "closure", opt, model, images(3))
    assert same(buffers(model.norms), before) and flags(model) == were
    assert model.head[1].num_batches_tracked == (calls if row.once else len(at_w))


@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "GSAM"])
def test_two_optimizers_of_one_model_share_its_statistics(name):
    row, model = EVERY[name], Normalized()
    before = flags(model)
    params = list(model.parameters())
    first, second = (row.make(model, SGD, half, lr=0.01, model=model) for half in (params[:4], params[4:]))
    for x, y in images(3):  # interleaved phases
        for one, two in zip(first.phases, second.phases, strict=True):
            losses(model, x, y).mean().backward()
            grads = [p.grad.clone() for p in params]
            getattr(first, one)()
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            getattr(second, two)()
            model.zero_grad()
    assert flags(model) == before
    assert model.head[1].num_batches_tracked == 3 * (len(first.phases) - 1)

    def inner():  # a step within a step
        row.step("closure", second, model, x, y)
        return losses(model, x, y)

    first.step(inner, targets=y)
    assert flags(model) == before and buffers(model).keys() == buffers(Normalized()).keys()


@pytest.mark.parametrize("style", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
@every
def test_spectral_norms_vectors_are_running_statistics(name, style):
    def normed():
        torch.manual_seed(0)
        return nn.Sequential(style(nn.Linear(FEATURES, 9)), nn.Tanh(), nn.Linear(9, CLASSES)).double()

    model, other = normed(), normed()
    opt = EVERY[name].make(model, lr=0.0, model=model)
    kept = {key: buffer for key, buffer in model.named_buffers()}
    drive_noting(EVERY[name], "closure", opt, model, batches(steps=1))
    published = normed()  # whether samples may be left out is found out with passes that leave nothing behind
    at_w, _ = drive_noting(
        EVERY[name],
        "closure",
        EVERY[name].make(published, lr=0.0, model=published, plan="published"),
        published,
        batches(steps=1),
    )
    if name == "GNM":
        assert not at_w
        return
    for x in at_w:
        other(x)
    for key, buffer in other.named_buffers():
        assert model.get_buffer(key) is kept[key]
        torch.testing.assert_close(kept[key], buffer)


# --- errors and interruptions leave the weights


class Fails:
    """Losses that raise in one of their evaluations, or in its backward pass."""

    def __init__(self, call, in_backward, error):
        self.calls, self.call, self.in_backward, self.error = 0, call, in_backward, error

    def __call__(self, model, x, y):
        self.calls += 1
        if self.calls != self.call:
            return losses(model, x, y)
        if not self.in_backward:
            raise self.error
        hidden = model[:2](x)
        if hidden.requires_grad:
            hidden.register_hook(self.fail)
        return F.cross_entropy(model[2:](hidden), y, reduction="none")

    def fail(self, grad):
        raise self.error


@pytest.mark.parametrize(
    ("error", "in_backward"),
    [(KeyboardInterrupt(), False), (RuntimeError("out of memory"), True)],
    ids=["interrupt", "out of memory in backward"],
)
@with_bases("nesterov", "rmsprop")
@every
def test_an_error_in_a_pass_leaves_the_original_weights(name, base, error, in_backward):
    """And the state: the steps after it are those of an optimizer that never saw it."""
    row, (kind, options), data = EVERY[name], BASES[base], batches(steps=5)
    plain = network()
    wanted = row.drive("closure", row.make(plain, kind, **options), plain, data)
    for call in range(1, 10):
        model = network()
        opt = row.make(model, kind, **options)
        row.drive("closure", opt, model, data[:3])
        before, failing = flat(model), Fails(call, in_backward, error)
        try:
            row.step("closure", opt, model, *data[3], failing)
        except type(error):
            assert torch.equal(flat(model), before) and not opt.is_perturbed
            assert all(p.grad is None for p in model.parameters())
            row.drive("closure", opt, model, data[3:])
            if not row.averages:
                assert torch.equal(flat(model), wanted), call
        else:
            assert failing.calls < call or in_backward  # a pass without a graph has no backward
            if failing.calls < call:
                break
    assert call > len({"GNM": "e", "LookSAM": "we"}.get(name, row.passes))


@every
def test_an_error_in_a_pass_restores_the_layers_flags(name):
    for call in range(1, 10):
        model = Normalized()
        opt = EVERY[name].make(model, SGD, lr=0.1, model=model)
        before, calls = flags(model), []

        def loss(model, x, y, call=call, calls=calls):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return losses(model, x, y)

        try:
            EVERY[name].step("closure", opt, model, *images(1)[0], loss)
        except KeyboardInterrupt:
            assert flags(model) == before and all(b is not None for b in model.state_dict().values())
        else:
            break
    assert call > 1


class Interrupted:
    """The ops of a backend, of which one call gets a signal just before it or just after."""

    def __init__(self, patch, call=None, after=False):
        self.calls, self.call, self.after = 0, call, after
        module = backend_for(torch.device("cpu"))
        for name in lf.ops.OPS:
            patch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, op):
        def interrupted(*args, **kwargs):
            self.calls += 1
            mine = self.calls == self.call
            if mine and not self.after:
                signal.raise_signal(signal.SIGINT)
            result = op(*args, **kwargs)
            if mine and self.after:
                signal.raise_signal(signal.SIGINT)
            return result

        return interrupted


@pytest.mark.parametrize(("base", "after"), [(SGD, False), (SGD, True), (RMSprop, True)])
@driven
def test_ctrl_c_within_the_passes(name, interface, base, after, monkeypatch):
    """The signal arrives while an op runs, any of them: the weights are then those after a whole number of steps."""
    row, data = EVERY[name].of(interface), batches(steps=2)

    def run(call=None):
        model = network()
        opt, path = row.make(model, base, lr=0.01), [flat(model)]
        with monkeypatch.context() as patch:
            ops = Interrupted(patch, call, after)
            with contextlib.suppress(KeyboardInterrupt):
                for batch in data:
                    path.append(row.drive(interface, opt, model, [batch]))
        return model, opt, path, ops

    *_, path, ops = run()
    assert len(path) == 3 and ops.calls >= 4
    for call in range(1, ops.calls + 1):
        model, opt, _, interrupted = run(call)
        now = flat(model)
        assert interrupted.calls >= call and any(torch.equal(now, one) for one in path)
        assert not opt.is_perturbed
        opt.restore()
        assert torch.equal(flat(model), now)
        model.zero_grad()
        row.drive(interface, opt, model, data)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@phased
def test_restore_starts_over(name):
    row, model, plain, data = EVERY[name].of("phases"), network(), network(), batches(steps=4)
    opt = row.make(model, lr=0.1, momentum=0.9)
    wanted = row.drive("phases", row.make(plain, lr=0.1, momentum=0.9), plain, data)
    opt.restore()
    before = row.drive("phases", opt, model, data[:2])
    for until in range(1, len(opt.phases)):
        step_in_phases(opt, lambda: losses(model, *data[2]), data[2][1], until=until)
        assert opt.is_perturbed == (not torch.equal(flat(model), before))
        opt.restore()
        assert torch.equal(flat(model), before) and not opt.is_perturbed
    assert torch.equal(row.drive("phases", opt, model, data[2:]), wanted) or row.averages  # whose mean has moved


INTERRUPTED = """
import os, random, signal, sys, threading, time
import torch
from torch import nn
from tests.method_rows import EVERY

torch.set_num_threads(1)
interface = sys.argv[1]
x, y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
armed, done = threading.Event(), threading.Event()


def interrupt():
    seed = random.Random(0)
    while not done.is_set():
        if armed.wait(0.1):
            time.sleep(seed.uniform(0, 0.004))
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)


def bits(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()


def fresh(row):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 4))
    return model, row.make(model, torch.optim.SGD, rho=0.5, lr=1e-3, model=model)


sender = threading.Thread(target=interrupt, daemon=True)
sender.start()
for name in sys.argv[2:]:
    row = EVERY[name].of(interface)
    (model, opt), caught = fresh(row), []
    end = time.monotonic() + 0.15
    while time.monotonic() < end or len(caught) < 20:
        try:
            armed.set()
            while True:
                row.step(interface, opt, model, x, y)
        except KeyboardInterrupt:
            if interface == "phases":
                opt.restore()
                opt.zero_grad()
            caught.append(bits(model))
    model, opt = fresh(row)
    path, last = {bits(model): 0}, caught[-1]
    while last not in path and len(path) < 20000:
        row.step(interface, opt, model, x, y)
        path[bits(model)] = len(path)
    steps = [path.get(one) for one in caught]
    assert None not in steps, (name, steps.index(None), len(steps), len(path))
    assert steps == sorted(steps), name
    print(name, len(caught), "interrupts in", steps[-1], "steps")
done.set()
sender.join()
"""


@pytest.mark.parametrize("interface", ["closure", "phases"])
def test_ctrl_c_at_random_moments(interface):
    """Real signals: whenever they come, the weights are those after a whole number of steps."""
    names = [name for name, way in DRIVEN if way == interface and not EVERY[name].averages]
    command = [sys.executable, "-c", INTERRUPTED, interface, *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout.count("interrupts") == len(names)
