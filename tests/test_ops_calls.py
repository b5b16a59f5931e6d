"""Calls of the ops beside the table in cases.py: classes and groups, cross entropy, moved tensors, bad input."""

from __future__ import annotations

import inspect
import mmap
import platform
import sys
from dataclasses import replace

import pytest
import torch

from ltsam_fast import ops, reference
from ltsam_fast.ops import OPS
from ltsam_fast.table import TensorTable

from .cases import RICHEST, SIGNALS, assert_same_bits, assert_unchanged, build, run, snapshot, tensors_of, written

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def draw(shapes, dtype, seed, device, positive=False):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [(t.abs() if positive else t).to(device, dtype) for t in made]


def test_norms_by_group_and_by_class(backend, device):
    grads = draw([(5,), (0,), (7, 3), (20000,)], torch.float32, 0, device)
    norms = ops.grad_norm(grads, groups=[2, 0, 0, 2], per_group=True)
    wanted = torch.stack([grads[2].norm(), torch.zeros((), device=device), torch.cat([grads[0], grads[3]]).norm()])
    torch.testing.assert_close(norms, wanted)
    sets = [draw([(5,), (70,)], torch.float32, k, device) for k in range(4)]
    sets[1][0] = None
    torch.testing.assert_close(ops.class_grad_norms(sets), reference.class_grad_norms(sets))
    found = torch.zeros((), device=device)
    ops.grad_norm([torch.tensor([float("nan")], device=device)], found_inf=found)
    assert found.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 100, 1025])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_focal_cross_entropy(rows, classes, dtype, backend, device):
    generator = torch.Generator().manual_seed(rows * classes)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    targets = torch.randint(0, classes, (rows,), generator=generator).to(device)
    v = ops.focal_weights(torch.arange(1, classes + 1), 2.0, 1.1).to(device)
    losses, grad_u, grad_v = ops.focal_cross_entropy(logits, targets, v)
    z = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    tolerance = 20 * TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    for grad, weight in ((grad_u, 1 - v), (grad_v, v)):
        (wanted,) = torch.autograd.grad((weight[targets] * exact).sum() / rows, z, retain_graph=True)
        torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance / rows)


ADJUSTED = {
    "shift": {"shift": True},
    "scale, margin": {"scale": True, "margin": True, "weight": True},
    "smoothed": {"weight": True, "label_smoothing": 0.2, "shift": True},
    "focal": {"gamma": 2.0, "weight": True},
    "focal, detached": {"gamma": 1.5, "detach": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ADJUSTED)
@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (1, 2), (33, 7), (8, 1025)])
def test_adjusted_losses_and_both_gradients(rows, classes, kind, dtype, backend, device):
    generator = torch.Generator().manual_seed(rows)
    options = {
        name: torch.rand(classes, generator=generator).to(device) + 0.5 if value is True and name != "detach" else value
        for name, value in ADJUSTED[kind].items()
    }
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    targets = torch.randint(0, classes, (rows,), generator=generator).to(device)
    u, v = (torch.randn(classes, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    found = ops.focal_cross_entropy(logits, targets, v, u, **options)
    z = logits.double().requires_grad_()
    exact = reference.adjusted_cross_entropy(z, targets, **options)
    tolerance = 40 * TOLERANCE[dtype]
    torch.testing.assert_close(found[0].double(), exact.detach(), rtol=1e-4, atol=1e-4)
    for grad, weight in zip(found[1:], (u, v), strict=True):
        (wanted,) = torch.autograd.grad((weight[targets] * exact).sum() / max(rows, 1), z, retain_graph=True)
        torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance / max(rows, 1))


def test_overwriting_a_saved_weight_is_noticed(backend, device):
    w = torch.ones(3, device=device, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        ops.perturb_(
            [w], [torch.ones(3, device=device)], [torch.empty(3, device=device)], torch.ones((), device=device), rho=1.0
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moved_tensors_are_noticed(backend, device):
    w, g, b = ([torch.ones(1000, device=device)] for _ in range(3))
    one = torch.ones((), device=device)
    for round_ in range(4):
        ops.perturb_(w, g, b, one, rho=1.0)
        assert bool((w[0] == 2.0).all()) and bool((b[0] == 1.0).all()), round_
        w = [torch.ones(1000, device=device)] if round_ % 2 else w
        w[0].fill_(1.0)
        g[0].data = torch.ones(1000, device=device)


def test_memory_shared_by_two_of_thousands(generator):
    """So many addresses are sorted otherwise than a few."""
    memory = torch.randn(4 * 3000, generator=generator)
    pieces = [memory[4 * i : 4 * i + 4] for i in torch.randperm(3000, generator=generator).tolist()]
    table = TensorTable(ops.OPS["restore_"])
    for _ in range(3):
        w, backups = pieces[:1500], pieces[1500:]
        ops.restore_(w, backups, table=table)
        assert all(map(torch.equal, w, backups))
        pieces = pieces[700:] + pieces[:700]
    for one in (w[0], w[777], w[-1]):
        begin = min(one.storage_offset() + 1, 4 * 3000 - 4)
        backups[1234] = memory[begin : begin + 4]
        with pytest.raises(ValueError, match="share memory"):
            ops.restore_(w, backups, table=table)


def signals_of(case):
    """Those that the op takes."""
    return [
        name for name in SIGNALS if name in inspect.signature(getattr(ops, case.op.removeprefix("random_"))).parameters
    ]


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("case, signal", [(case, name) for case in RICHEST for name in signals_of(case)], ids=str)
def test_a_signal_in_memory_that_is_written_is_refused(case, signal, layout, backend, generator):
    """A pass reads it while it writes there. Where the signal is what is written, all others must lie elsewhere."""
    arguments = written(OPS[case.op]) or ({*case.lists.split()} if signal == "found_inf" else set())
    for argument in arguments:
        for index in range(2):
            call = build(replace(case, missing=False), generator, shapes=((5,), (2, 3)), layout=layout)
            wanted = {"combination": 4, "scales": 2}.get(signal, 1)
            tensor = call[argument][index]
            if tensor.numel() < wanted or (layout == "sliced" and wanted > 1):
                continue  # the latter is copied before anything is written
            call[signal] = tensor.as_strided((wanted,), (1,), tensor.storage_offset())
            before = snapshot(call)
            message = rf"{signal} and {argument}\[{index}\] share memory: give {signal} its own with .clone\(\)"
            with pytest.raises(ValueError, match=message):
                run(ops, case, call)
            assert_unchanged(before)
            if layout == "sliced" and argument != "steps":  # there is room between its elements
                call[signal] = tensor.as_strided((wanted,), (1,), tensor.storage_offset() + 1)
                run(ops, case, call)
            run(ops, case, call | {signal: torch.ones(wanted)})


def test_a_signal_is_looked_at_again_where_tensors_have_moved(backend):
    memory, table = torch.ones(8), TensorTable(OPS["perturb_"])
    w, g, norm = [memory[:4]], [torch.ones(4)], memory[4]
    for _ in range(2):
        ops.perturb_(w, g, None, norm, rho=0.1, table=table)
    for moved in (memory[4:], memory[1:5]):
        with pytest.raises(ValueError, match=r"norm and params\[0\] share memory"):
            ops.perturb_([moved], g, None, norm, rho=0.1, table=table)
    w[0].data = memory[4:]
    with pytest.raises(ValueError, match=r"norm and params\[0\] share memory"):
        ops.perturb_(w, g, None, norm, rho=0.1, table=table)
    ops.perturb_(w, g, None, memory[0], rho=0.1, table=table)


@pytest.fixture
def low(monkeypatch):
    """Copies tensors to addresses below 2^31, where torch then puts new ones, too."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("addresses are asked for as Linux has it on x86-64")
    map_32bit = 0x40
    memory = mmap.mmap(-1, 2**22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_32bit)
    whole, taken = torch.frombuffer(memory, dtype=torch.uint8), 0

    def copied(tensor):
        nonlocal taken
        begin, taken = taken, taken + -(-tensor.nbytes // 64) * 64
        return whole[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    for name in ("zeros", "empty"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, made=made, **named: copied(made(*args, **named)))
    return copied


@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_addresses_that_are_small_numbers(case, backend, device, low, generator):
    """Triton's interpreter gives small numbers 32 bits."""
    if device != "cpu":
        pytest.skip("its memory lies where it lies")
    call = build(case, generator, shapes=((1025,), (3, 2)))

    def lowered(one):
        return low(one) if isinstance(one, torch.Tensor) else one

    moved = {name: [*map(lowered, one)] if isinstance(one, list) else lowered(one) for name, one in call.items()}
    assert all(tensor.data_ptr() < 2**31 for _, tensor in tensors_of(moved))
    wanted, found = run(ops, case, call), run(ops, case, moved)
    for (name, one), (_, other) in zip(tensors_of(wanted), tensors_of(found), strict=True):
        assert_same_bits(one, other, name)


def test_cross_entropy_at_addresses_that_are_small_numbers(backend, device, low):
    if device != "cpu":
        pytest.skip("its memory lies where it lies")
    logits, targets, shift = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 0.5, 1.0])
    wanted = ops.adjusted_cross_entropy(logits, targets, shift=shift, gamma=2.0)
    assert_same_bits(ops.adjusted_cross_entropy(low(logits), low(targets), shift=low(shift), gamma=2.0), wanted)


X = torch.ones(3)
BAD = [
    (lambda: ops.perturb_([X], [X], [X.clone()], X.norm(), rho=-0.1), ValueError, "rho must be a finite number >= 0"),
    (lambda: ops.perturb_([X], [X], [X.clone()], X.norm(), rho=float("nan")), ValueError, "rho"),
    (lambda: ops.perturb_([X], [X.clone()], [X], X.norm(), rho=0.1), ValueError, "share memory"),
    (lambda: ops.perturb_([X], [torch.ones(4)], [X.clone()], X.norm(), rho=0.1), ValueError, "shape"),
    (lambda: ops.perturb_([X], [], [X.clone()], X.norm(), rho=0.1), ValueError, "grads has 0 entries"),
    (lambda: ops.perturb_([X.int()], [X], [X.clone()], X.norm(), rho=0.1), TypeError, "dtype torch.int32"),
    (lambda: ops.perturb_([X.cfloat()], [X], [X.clone()], X.norm(), rho=0.1), TypeError, "complex64"),
    (lambda: ops.perturb_([X], [X.to_sparse()], [X.clone()], X.norm(), rho=0.1), ValueError, "sparse"),
    (lambda: ops.perturb_([X.to("meta")], [X], [X.clone()], X.norm(), rho=0.1), ValueError, "meta"),
    (lambda: ops.sgd_step_([X], [X.clone()], lr=-1.0), ValueError, "lr must be"),
    (lambda: ops.sgd_step_([X], [X.clone()], lr=0.1, momentum=0.9), ValueError, "momentum_buffers"),
    (lambda: ops.sgd_step_([X], [X.clone()], lr=0.1, max_norm=1.0), ValueError, "norm must be given"),
    (lambda: ops.sgd_step_([X], [X.clone()], lr=[0.1, 0.2], groups=[2]), ValueError, "groups"),
    (lambda: ops.grad_norm([X], adaptive=True), ValueError, "params"),
    (lambda: ops.focal_weights([0, 0]), ValueError, "class_counts"),
    (lambda: ops.focal_weights([3, -1]), ValueError, "class_counts"),
    (lambda: ops.focal_cross_entropy(torch.ones(2, 3), torch.tensor([0, 3]), X), ValueError, "targets"),
]


@pytest.mark.parametrize("row", range(len(BAD)))
def test_bad_input_names_the_argument_and_changes_nothing(row):
    call, kind, message = BAD[row]
    with pytest.raises(kind, match=message):
        call()
    assert bool((X == 1).all())
