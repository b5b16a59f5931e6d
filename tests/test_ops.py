"""Ops x backends x cases: not further from the fp64 twin than the twin in working precision, plus a little."""

from __future__ import annotations

import pytest
import torch

import ltsam_fast as lf
from ltsam_fast import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = {
    "mixed": [(0,), (1,), (7,), (), (3, 0), (4097,), (64, 3, 3, 3), (0,)],
    "chunks": [(16384,), (0,), (16385,)],
    "large": [(2**20 + 3,), (5,)],
    "empty": [],
}


def draw(shapes, dtype, seed, device, positive=False):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [(t.abs() if positive else t).to(device, dtype) for t in made]


def close(ours, truth, working, tolerance):
    """|ours - truth| <= |working - truth| + tolerance (1 + |truth|) everywhere; prints the worst element."""
    for a, exact, plain in zip(ours, truth, working, strict=True):
        a, exact, plain = (t.detach().cpu().double() for t in (a, exact, plain))
        excess = (a - exact).abs() - (plain - exact).abs() - tolerance * (1 + exact.abs())
        if a.numel() and not bool((excess <= 0).all()):
            at = int(excess.nan_to_num(nan=1e300).argmax())
            values = [t.flatten()[at].item() for t in (a, exact, plain)]
            raise AssertionError(f"element {at}: ours {values[0]}, exact {values[1]}, plain {values[2]}")


def test_close_notices_one_wrong_element():
    right, wrong = torch.zeros(5), torch.tensor([0, 0, 1e-3, 0, 0])
    close([right], [right], [right], 1e-6)
    for bad in (wrong, wrong * float("nan")):
        with pytest.raises(AssertionError, match="element"):
            close([bad], [right], [right], 1e-6)


def _norm(lists, module):
    kw = {"extra": lists["extra"], "adaptive": True, "eta": 0.1}
    return [module.grad_norm(lists["g"], lists["w"], **kw), module.grad_norm(lists["g"])]


def _perturb(lists, module):
    norm = reference.grad_norm(lists["g"])
    module.perturb_(lists["w"], lists["g"], lists["b"], norm, rho=[2.0, 0.5], adaptive=[True, False], groups=lists["i"])
    return lists["w"] + lists["b"]


def _restore(lists, module):
    module.restore_(lists["w"], lists["b"])
    return lists["w"]


def _sgd(lists, module):
    norm = torch.full((), 3.0, dtype=lists["accumulator"], device=lists["steps"][0].device) if lists["w"] else None
    options = {"lr": 0.1, "momentum": [0.9, 0.5], "dampening": 0.2, "weight_decay": 0.01, "nesterov": [False, True]}
    module.sgd_step_(
        lists["w"], lists["g"], backups=lists["b"], extra=lists["extra"], momentum_buffers=lists["m"],
        steps=lists["steps"], groups=lists["i"], max_norm=1.0 if lists["w"] else 0.0, norm=norm, **options,
    )  # fmt: skip
    return lists["w"] + lists["m"]


def _adam(lists, module):
    module.adam_step_(
        lists["w"], lists["g"], lists["m"], lists["v"], lists["steps"], lr=0.1, weight_decay=0.1, decoupled=[True, False],
        max_exp_avg_sqs=lists["vmax"], backups=lists["b"], extra=lists["extra"], groups=lists["i"],
    )  # fmt: skip
    return lists["w"] + lists["m"] + lists["v"] + lists["vmax"]


OPS = {"grad_norm": _norm, "perturb_": _perturb, "restore_": _restore, "sgd_step_": _sgd, "adam_step_": _adam}


def lists_for(shapes, dtype, device, like=None):
    names = ("w", "g", "extra", "b", "m", "v", "vmax")
    made = {n: draw(shapes, like or dtype, k, device, n in ("v", "vmax")) for k, n in enumerate(names)}
    made = {n: [t.to(dtype) for t in tensors] for n, tensors in made.items()}
    made["steps"] = [torch.full((), float(k % 2), device=device) for k in range(len(shapes))]
    made["i"] = [k % 2 for k in range(len(shapes))]
    made["accumulator"] = torch.float64 if dtype == torch.float64 else torch.float32
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_agrees_with_the_twin(name, shapes, dtype, backend, device):
    if shapes == "large" and backend == "triton" and device == "cpu":
        pytest.skip("triton: the interpreter takes a minute for a million elements")
    sizes, run = SHAPES[shapes], OPS[name]
    ours = run(lists_for(sizes, dtype, device), ops)
    working = run(lists_for(sizes, dtype, device), reference)
    truth = run(lists_for(sizes, torch.float64, device, like=dtype), reference)
    close(ours, truth, working, TOLERANCE[dtype])


def test_every_op_has_a_row_and_native_code_agrees_about_it():
    assert set(OPS) == set(ops.OPS)
    assert all(hasattr(reference, name) for name in ops.__all__)
    for name in ("cpu", "cuda"):
        module = pytest.importorskip(f"ltsam_fast._{name}", reason=f"the {name} core is not built")
        assert module.SIGNATURES == {op.name: (op.roles, op.hyper) for op in ops.OPS.values()}
        assert module.CHUNK == lf.table.CHUNK


@pytest.mark.parametrize("name", OPS)
def test_same_bits_whatever_the_number_of_threads(name):
    if reason := lf.backend.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(OPS[name](lists_for([(300001,), (0,), (70000,)], torch.float32, "cpu"), ops))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_nothing_beside_a_tensor_at_any_offset(dtype, backend, device):
    for offset in range(16):
        buffers = {n: torch.full((80,), 42.0, dtype=dtype, device=device) for n in "wgb"}
        views = {n: buffer[offset : offset + 37] for n, buffer in buffers.items()}
        ops.perturb_([views["w"]], [views["g"]], [views["b"]], torch.ones((), device=device), rho=0.5)
        for name in "wb":
            buffers[name][offset : offset + 37] = 42.0
            assert bool((buffers[name] == 42.0).all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_perturbs_nothing(bad, backend, device):
    w, g, b = (draw([(100,)], torch.float32, k, device) for k in range(3))
    old = w[0].clone()
    ops.perturb_(w, g, b, torch.tensor(bad, device=device), rho=0.5)
    assert torch.equal(w[0], old) and torch.equal(b[0], old)


def test_overflow_skips_the_update_and_nothing_counts(backend, device):
    lists = lists_for(SHAPES["mixed"], torch.float32, device)
    kept = {n: [t.clone() for t in lists[n]] for n in ("m", "v", "steps", "b")}
    found = torch.ones((), device=device)
    ops.adam_step_(
        lists["w"], lists["g"], lists["m"], lists["v"], lists["steps"], lr=0.1, backups=lists["b"], found_inf=found
    )
    for name, other in (("m", "m"), ("v", "v"), ("steps", "steps"), ("w", "b")):
        assert all(torch.equal(a, b) for a, b in zip(lists[name], kept[other], strict=True)), name


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


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "holes"])
def test_elements_that_lie_differently(layout, backend, device):
    def lay(tensor):
        if layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    w, g, b = (draw([(3, 4, 5, 6)], torch.float32, k, device)[0] for k in range(3))
    norm, wanted = g.norm(), w.clone()
    reference.perturb_([wanted], [g], [b.clone()], norm, rho=1.0)
    odd = lay(w)
    ops.perturb_([odd], [g], [b], norm, rho=1.0)
    torch.testing.assert_close(odd, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(b, w)


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
