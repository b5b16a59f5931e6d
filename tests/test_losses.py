"""The losses against formulas in double precision that use nothing of the package, and everything around them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ltsam_fast as lf
from ltsam_fast import losses, ops, reference
from ltsam_fast.ops import differentiable as operators
from ltsam_fast.reference import draws

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-10, F32: 1e-5, BF16: 2e-2, F16: 2e-3}


def cross_entropies(a, y):
    """-ln softmax(a)_y, written out."""
    peak = a.max(1, keepdim=True).values
    return (a - peak).exp().sum(1).log() + peak[:, 0] - a[torch.arange(len(y)), y]


def at_label(values, y):
    """A value for each class, at the labels' places; zeros elsewhere."""
    return torch.zeros(len(y), len(values), dtype=F64).scatter(1, y[:, None], values[y][:, None])


def formula_ldam(z, y, n, w, max_m=0.5, s=30.0):
    margins = n**-0.25
    return w[y] * cross_entropies(s * (z - at_label(margins * (max_m / margins.max()), y)), y)


def formula_vs(z, y, n, w, gamma=0.3, tau=1.0):
    return w[y] * cross_entropies(z / (n.max() / n) ** gamma + tau * (n / n.sum()).log(), y)


def formula_class_balanced(z, y, n, w, beta=0.9999):
    effective = (1 - beta) / (1 - beta**n)
    return (effective * len(n) / effective.sum())[y] * cross_entropies(z, y)


def formula_focal(z, y, n, w, gamma=1.0):
    ce = cross_entropies(z, y)
    return w[y] * (1 - (-ce).exp()) ** gamma * ce


def formula_gcl(z, y, n, w, m=0.0, s=30.0, noise_mul=0.5, gamma=0.0, noise=0.0):
    margins = n.log().max() - n.log()
    rarity = margins / margins.max() if margins.max() > 0 else margins  # all counts may be equal
    a = z - noise_mul * noise * rarity - m * F.one_hot(y, len(n)).double()
    ce = cross_entropies(s * a, y)
    return w[y] * (1 - (-ce).exp()).detach() ** gamma * ce


FORMULAS = {
    "CrossEntropy": lambda z, y, n, w: w[y] * cross_entropies(z, y),
    "LogitAdjusted": lambda z, y, n, w, tau=1.0: w[y] * cross_entropies(z + tau * (n / n.sum() + 1e-9).log(), y),
    "BalancedSoftmax": lambda z, y, n, w: w[y] * cross_entropies(z + n.log(), y),
    "LDAM": formula_ldam,
    "VS": formula_vs,
    "ClassBalanced": formula_class_balanced,
    "Focal": formula_focal,
    "GCL": formula_gcl,
}
OPTIONS = {
    "LogitAdjusted": {"tau": 1.7},
    "LDAM": {"max_m": 0.3, "s": 12.0},
    "VS": {"gamma": 0.15, "tau": 0.75},
    "ClassBalanced": {"beta": 0.99},
    "Focal": {"gamma": 2.5},
    "GCL": {"m": 0.1, "s": 20.0, "gamma": 1.0, "noise_mul": 1.0},
}
NAMES = tuple(FORMULAS)
COSINES = ("LDAM", "GCL")


def interpreted(backend, device):
    """Triton's interpreter runs one program a row, in milliseconds: there a few rows stand for many."""
    return backend == "triton" and device == "cpu"


def draw(generator, name, rows, classes):
    """Logits that all element types can hold, labels, counts."""
    z = torch.randn(rows, classes, generator=generator, dtype=F64)
    z = (z.clamp(-2, 2) / 2 if name in COSINES else 3 * z).to(BF16).to(F16).double()
    n = (10 ** (4 * torch.rand(classes, generator=generator, dtype=F64))).ceil()
    return z, torch.randint(classes, (rows,), generator=generator), n


def gradients(losses, cotangent, logits):
    (gradient,) = torch.autograd.grad(losses, logits, cotangent.to(losses))
    return gradient


def check(criterion, name, z, y, n, w, device, dtypes=(F64, F32, BF16, F16), **options):
    """Losses and gradients by every element type."""
    exact_z = z.clone().requires_grad_()
    exact = FORMULAS[name](exact_z, y, n, w, **options)
    cotangent = torch.linspace(-1, 2, len(z), dtype=F64)
    exact_gradient = gradients(exact, cotangent, exact_z)
    for dtype in dtypes:
        logits = z.to(device, dtype).clone().requires_grad_()
        mine = criterion(logits, y.to(device))
        gradient = gradients(mine, cotangent.to(device), logits)
        assert mine.dtype == (F64 if dtype == F64 else F32) and gradient.dtype == dtype
        for one, other in ((mine.detach(), exact.detach()), (gradient, exact_gradient)):
            close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * max(1.0, float(other.abs().max()))}
            torch.testing.assert_close(one.cpu().double(), other, **close)


@pytest.mark.parametrize("classes", [2, 100, 8142])
@pytest.mark.parametrize("rows", [1, 64, 513])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_formula(name, rows, classes, backend, device, generator):
    if interpreted(backend, device) and (rows > 64 or rows * classes > 10000):
        pytest.skip("too much for Triton's interpreter")
    rows = min(rows, 5) if interpreted(backend, device) else rows
    z, y, n = draw(generator, name, rows, classes)
    criterion = getattr(losses, name)(n, reduction="none").to(device).eval()
    options = {"noise_mul": 0.0} if name == "GCL" else {}
    # All of them together only where it is quick; fp16 goes the way of bf16.
    dtypes = (F64, F32, BF16, F16) if rows * classes < 10**6 else (F32, BF16) if rows == 64 else (F64, F32, BF16)
    check(criterion, name, z, y, n, torch.ones(classes, dtype=F64), device, dtypes, **options)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_weights(name, backend, device, generator):
    z, y, n = draw(generator, name, 5 if interpreted(backend, device) else 37, 13)
    w = torch.rand(13, generator=generator, dtype=F64)
    options = OPTIONS.get(name, {})
    weight = {} if name == "ClassBalanced" else {"weight": w.tolist()}
    criterion = getattr(losses, name)(n.tolist(), **options, **weight, reduction="none").to(device).eval()
    check(criterion, name, z, y, n, w, device, **{**options, **({"noise_mul": 0.0} if name == "GCL" else {})})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_is_torchs(reduction, smoothing, weighted, backend, device, generator):
    z, y, n = draw(generator, "CrossEntropy", 5 if interpreted(backend, device) else 33, 70)
    w = torch.rand(70, generator=generator, dtype=F64) if weighted else None
    criterion = losses.CrossEntropy(n, weight=w, label_smoothing=smoothing, reduction=reduction).to(device)
    exact_z, mine_z = z.clone().requires_grad_(), z.to(device).clone().requires_grad_()
    exact = F.cross_entropy(exact_z, y, w, label_smoothing=smoothing, reduction=reduction)
    mine = criterion(mine_z, y.to(device))
    torch.testing.assert_close(mine.cpu(), exact, rtol=1e-12, atol=1e-12)
    exact.square().sum().backward(), mine.square().sum().backward()
    torch.testing.assert_close(mine_z.grad.cpu(), exact_z.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Focal", "GCL")])
def test_smoothing_is_of_the_adjusted_logits(name, backend, device, generator):
    z, y, n = draw(generator, name, 9, 6)
    smooth = getattr(losses, name)(n, label_smoothing=0.3, reduction="none").to(device)
    plain = getattr(losses, name)(n, reduction="none").to(device)
    adjusted = z.to(device)
    if plain.scale is not None:
        adjusted = adjusted * plain.scale
    if plain.shift is not None:
        adjusted = adjusted + plain.shift
    if plain.margin is not None:
        adjusted = adjusted - at_label(plain.margin.cpu(), y).to(device)
    wanted = F.cross_entropy(adjusted, y.to(device), plain.weight, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(smooth(z.to(device), y.to(device)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_reductions(name, backend, device, generator):
    rows = 5 if interpreted(backend, device) else 50
    z, y, n = draw(generator, name, rows, 7)
    z, y = z.to(device), y.to(device)
    make = lambda reduction: getattr(losses, name)(n, reduction=reduction).to(device).eval()  # noqa: E731
    every = make("none")(z, y)
    weights = torch.ones(rows, dtype=F64, device=device) if name != "ClassBalanced" else make("none").weight[y]
    assert every.shape == (rows,)
    torch.testing.assert_close(make("sum")(z, y), every.sum())
    torch.testing.assert_close(make("mean")(z, y), every.sum() / weights.sum())
    nothing = make("none")(z[:0], y[:0])
    assert nothing.shape == (0,) and make("sum")(z[:0], y[:0]) == 0 and make("mean")(z[:0], y[:0]).isnan()


# --- derivatives

SHAPED = {
    "plain": {},
    "smooth": {"label_smoothing": 0.2},
    "weights smooth": {"scale": 0, "shift": 0, "margin": 0, "weight": 0, "label_smoothing": 0.2},
    "focal": {"scale": 0, "weight": 0, "gamma": 1.5},
    "weakly focal": {"shift": 0, "gamma": 0.5},
    "clouded": {"scale": 0, "margin": 0, "spread": 0, "draw": torch.tensor(3), "seed": 2**45 + 1},
}


def filled(options, classes, generator, device):
    """Random vectors in place of zeros."""
    vectors = ("scale", "shift", "margin", "weight", "spread")
    make = lambda name: torch.rand(classes, generator=generator, dtype=F64).add(0.3).to(device)  # noqa: E731
    return {
        name: make(name) if name in vectors else value.to(device) if name == "draw" else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
def test_gradcheck(shaped, backend, device, generator):
    options = filled(shaped, 5, generator, device)
    slow = interpreted(backend, device)
    z = torch.randn(2 if slow else 3, 5, generator=generator, dtype=F64).to(device).requires_grad_()
    y = torch.tensor([4, 0, 2][: len(z)], device=device)
    call = lambda z: ops.adjusted_cross_entropy(z, y, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, z)
    assert slow or torch.autograd.gradgradcheck(
        call, z
    )  # by the reference implementation's derivatives, whatever the backend


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
def test_two_backwards_and_backends(shaped, backend, device, generator):
    """Backward may run elsewhere than forward, and more than once: what is kept means the same everywhere."""
    options = filled(shaped, 70, generator, device)
    z = torch.randn(6, 70, generator=generator, dtype=F64).to(device).requires_grad_()
    y = torch.arange(6, device=device) * 11
    cotangent = torch.rand(6, generator=generator, dtype=F64).to(device)
    exact = gradients(reference.adjusted_cross_entropy(z, y, **options), cotangent, z)
    mine = ops.adjusted_cross_entropy(z, y, **options)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(mine, z, cotangent, retain_graph=True)
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)
    with lf.use_backend("torch"):
        torch.testing.assert_close(gradients(mine, cotangent, z), exact, rtol=1e-10, atol=1e-12)
        vectors = [options.get(name) for name in ("scale", "shift", "margin", "weight", "spread", "draw")]
        numbers = [float(options.get(name, 0)) for name in ("label_smoothing", "gamma", "detach", "seed")]
        plain, state = operators.forward(z, y, *vectors, numbers)
    torch.testing.assert_close(plain, mine, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        operators.backward(cotangent, state, z, y, *vectors, numbers), exact, rtol=1e-10, atol=1e-12
    )


def test_operators_are_well_behaved(backend, device, generator):
    z = torch.randn(4, 6, generator=generator).to(device).requires_grad_()
    y = torch.randint(6, (4,), generator=generator).to(device)
    shift = torch.rand(6, generator=generator).to(device)
    torch.library.opcheck(operators.forward, (z, y, None, shift, None, None, None, None, [0.1, 0.0, 0.0, 0.0]))


def test_only_the_logits_are_kept(generator):
    if reason := lf.backend.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    kept = []
    z = torch.randn(40, 300, generator=generator).requires_grad_()
    criterion = losses.VS(torch.arange(1, 301), reduction="none")
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with lf.use_backend("cpu"), hooks:
        criterion(z, torch.arange(40))
    large = [tensor for tensor in kept if tensor.numel() >= z.numel()]
    assert [tensor.data_ptr() for tensor in large] == [z.data_ptr()]


class Made(TorchDispatchMode):
    """Memory that torch hands out in tensors of some size, by address."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.addresses = elements, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        large = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and one.numel() >= self.elements]
        self.addresses |= {tensor.untyped_storage().data_ptr() for tensor in large}
        return result


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_large_is_made_but_the_gradient(name, dtype, backend, device, generator):
    if backend == "torch":
        pytest.skip("the reference implementation may take what it needs")
    z, y, n = draw(generator, name, 4, 200)
    criterion = getattr(losses, name)(n, reduction="none").to(device)
    logits, y = z.to(device, dtype).requires_grad_(), y.to(device)
    with Made(400) as made:
        (gradient,) = torch.autograd.grad(criterion(logits, y).mean(), logits)
    assert made.addresses == {gradient.untyped_storage().data_ptr()}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_small_batches_on_a_cpu_are_torchs(name, dtype, reduction, generator, monkeypatch):
    """Unless a backend is chosen, which must give the same."""
    if reason := lf.backend.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    monkeypatch.delenv(lf.backend.VARIABLE, raising=False)
    z, y, n = draw(generator, name, 20, 7)
    criterion = getattr(losses, name)(n, **OPTIONS.get(name, {}), reduction=reduction)
    for weight in (None, torch.rand(7, generator=generator)):
        if name != "ClassBalanced":
            criterion.set_weight(weight)
        z = z.to(dtype).detach().requires_grad_()
        with criterion.hold() if name == "GCL" else contextlib.nullcontext():
            small, again = criterion(z, y), criterion(z, y)  # the constants are new, then ready
            with lf.use_backend("cpu"):
                fused = criterion(z, y)
        assert torch.equal(small, again)
        assert "Direct" in type(fused.grad_fn).__name__ and "Direct" not in type(small.grad_fn).__name__
        cotangent = torch.rand(small.shape, generator=generator)
        results = [(mine.detach(), gradients(mine, cotangent, z)) for mine in (small, fused)]
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(*results, **close)
    for wrong in (-100, -1, 7, -(2**61) - 1, -(2**63)):  # -100 is what torch ignores, the last what it makes of NaN
        y[3] = wrong
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 7\), got"):
            criterion(z, y)


@pytest.mark.parametrize("name", NAMES)
def test_up_to_where_batches_are_small(name, generator, monkeypatch):
    """As documented: twice as large where logits are at most shifted."""
    if reason := lf.backend.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    monkeypatch.delenv(lf.backend.VARIABLE, raising=False)
    few = name in ("CrossEntropy", "LogitAdjusted", "BalancedSoftmax", "ClassBalanced")
    for dtype, limit in ((F32, 262144 if few else 131072), (BF16, 131072)):
        for rows, fused in ((limit // 1024, False), (limit // 1024 + 1, True)):
            z = torch.zeros(rows, 1024, dtype=dtype, requires_grad=True)
            criterion = getattr(losses, name)(torch.arange(1, 1025), reduction="none")
            y = torch.arange(rows)
            for _ in range(2):
                assert ("Direct" in type(criterion(z, y).grad_fn).__name__) is fused


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_takes_otherwise(name, generator):
    """By the checks that begin once torch has refused it, or where it would not."""
    z, y, n = draw(generator, name, 4, 4)
    criterion = getattr(losses, name)(n, reduction="none").eval()
    wanted = criterion(z, y)
    for labels in (y.int(), y.to(torch.uint8), torch.stack([y, y], 1)[:, 0]):
        assert torch.equal(criterion(z, labels), wanted)
    odd = torch.zeros(4, 4, 2, dtype=F64)
    for logits, targets in (
        (z, z.softmax(1)), (z, y.double()), (z, y[:, None]), (z, y[:1]), (z, y[0]), (z, y.tolist()), (z[0], y[0]),
        (z[0], y), (odd, torch.zeros(4, 2, dtype=torch.long)), (z[:, :3], y), (z[:, :1], y), (z[:2, None], y[:2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^(logits|targets) must "):
            criterion(logits, targets)
    with pytest.raises(TypeError, match="logits has dtype"):
        criterion(z.int(), y)
    assert torch.equal(criterion(z, y), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_small_batches_have_two_derivatives(name, generator):
    z, y, n = draw(generator, name, 5, 4)
    criterion = getattr(losses, name)(n, **OPTIONS.get(name, {})).eval()
    z = z.requires_grad_()
    criterion(z, y)
    # A derivative does not flow through GCL's focus, which finite differences do see.
    assert name == "GCL" or torch.autograd.gradcheck(lambda z: criterion(z, y), z)
    assert name == "GCL" or torch.autograd.gradgradcheck(lambda z: criterion(z, y), z)
    each = torch.func.vmap(lambda z, y: criterion(z[None], y[None]))(z, y)
    torch.testing.assert_close(
        each, criterion.per_sample(z, y) / (n.new_ones(4) if criterion.weight is None else criterion.weight)[y]
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_per_sample(name, reduction, backend, device, generator):
    z, y, n = draw(generator, name, 5, 4)
    z, y = z.to(device), y.to(device)
    make = lambda reduction: getattr(losses, name)(n, reduction=reduction).to(device)  # noqa: E731
    assert torch.equal(make(reduction).per_sample(z, y), make("none")(z, y))


def test_constants_that_change_are_seen(generator):
    z, y, n = draw(generator, "VS", 20, 7)
    criterion, other = losses.VS(n), losses.VS(n.flip(0))
    before = criterion(z, y)
    criterion.scale.copy_(other.scale)
    criterion.shift = other.shift.clone()
    assert torch.equal(criterion(z, y), other(z, y)) and not torch.equal(criterion(z, y), before)
    third = losses.VS(n + 1, weight=torch.rand(7, generator=generator))
    buffers = dict(third.named_buffers())
    assert torch.equal(torch.func.functional_call(criterion, buffers, (z, y)), third(z, y))
    assert torch.equal(criterion(z, y), other(z, y))
    criterion.load_state_dict(third.state_dict())
    assert torch.equal(criterion(z, y), third(z, y))
    criterion.reduction = "sum"
    assert torch.equal(criterion(z, y), losses.VS(n + 1, weight=third.weight, reduction="sum")(z, y))
    criterion.label_smoothing = 0.5
    assert not torch.equal(criterion(z, y), other(z, y))
    with torch.inference_mode():
        criterion(z, y)
    criterion(z.requires_grad_(), y).backward()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_compiles(name, fullgraph, generator):
    z, y, n = draw(generator, name, 8, 5)
    criterion = getattr(losses, name)(n, reduction="mean")
    again = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(3):  # GCL draws its noise anew each time
        one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.testing.assert_close(compiled(one, y), again(other, y))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(one, y), one), torch.autograd.grad(again(other, y), other)
        )


class Reentrant(torch.autograd.Function):
    """Its backward does ``work`` from within as many backwards as it is told."""

    @staticmethod
    def forward(ctx, x, depth, work):
        ctx.depth, ctx.work = depth, work
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        within_backwards(ctx.depth - 1, ctx.work)
        return cotangent, None, None


def within_backwards(depth, work):
    if depth == 0:
        return work()
    with torch.enable_grad():
        Reentrant.apply(torch.zeros((), requires_grad=True), depth, work).backward()


def in_thread(work):
    """Does ``work`` in a new thread, as autograd does on a GPU."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize("how", ["in a thread", "deep", "compiled"])
def test_a_backward_runs_where_its_forward_did(how, backend, device, generator, monkeypatch):
    """In autograd's threads too, which do not know of use_backend(): a GPU's, on the CPU those for more than 60 levels."""
    ran = []
    backend_for = operators.backend_for
    monkeypatch.setattr(operators, "backend_for", lambda device: ran.append(backend_for(device)) or ran[-1])
    z = torch.randn(5, 4, generator=generator).to(device).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0], device=device)
    loss = lambda z: losses.CrossEntropy()(z, y)  # noqa: E731
    if how == "in a thread":
        in_thread(loss(z).backward)
    elif how == "deep":
        within_backwards(70, loss(z).backward)
    elif device == "cuda":
        pytest.skip("a compiled backward is run by autograd's thread, on the backend chosen for the process")
    else:
        torch.compile(loss, backend="aot_eager")(z).backward()
    assert ran == [lf.backend.backend_for(z.device)] * 2


def test_function_transforms(generator):
    z, y, n = draw(generator, "VS", 8, 5)
    criterion = losses.VS(n, reduction="sum")
    one = z.clone().requires_grad_()
    criterion(one, y).backward()
    torch.testing.assert_close(torch.func.grad(criterion)(z, y), one.grad)
    each = torch.func.vmap(torch.func.grad(lambda z, y: criterion(z[None], y[None])))(z, y)
    torch.testing.assert_close(each, one.grad)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: criterion(z, y[:1])))(z[:1])
    p = (z[0] * criterion.scale + criterion.shift).softmax(0) * 1.0
    wanted = criterion.scale[:, None] * (p.diag() - p[:, None] * p) * criterion.scale
    torch.testing.assert_close(hessian.reshape(5, 5), wanted)
    losses_of = losses.VS(n, reduction="none")(one, y)
    (jacobian,) = torch.autograd.grad(losses_of, one, torch.eye(8, dtype=F64), is_grads_batched=True)
    torch.testing.assert_close(jacobian.sum(0), one.grad)
    model = torch.nn.Linear(5, 5, dtype=F64)
    called = torch.func.functional_call(
        model, {"weight": torch.eye(5, dtype=F64), "bias": torch.zeros(5, dtype=F64)}, z
    )
    torch.testing.assert_close(criterion(called, y), criterion(z, y))


def test_autocast(device, generator):
    model = torch.nn.Linear(6, 9).to(device)
    x, y = torch.randn(16, 6, generator=generator).to(device), torch.randint(9, (16,), generator=generator).to(device)
    criterion = losses.LogitAdjusted(torch.arange(1, 10), reduction="none").to(device)
    with torch.autocast(device, BF16):
        logits = model(x)
        mine = criterion(logits, y)
    assert logits.dtype == BF16 and mine.dtype == F32
    mine.mean().backward()
    assert model.weight.grad.dtype == F32
    exact = FORMULAS["LogitAdjusted"](
        logits.detach().cpu().double(), y.cpu(), torch.arange(1, 10).double(), torch.ones(9, dtype=F64)
    )
    torch.testing.assert_close(mine.detach().cpu().double(), exact, rtol=1e-5, atol=1e-5)


# --- odd input


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_logits_that_lie_otherwise(layout, dtype, backend, device, generator):
    z = torch.randn(12, 40, generator=generator).to(device, dtype)
    laid = {
        "transposed": lambda: z.t().contiguous().t(),
        "strided": lambda: torch.stack([z, -z], 2)[:, :, 0],
        "expanded": lambda: z[:1].expand(12, 40),
        "offset": lambda: torch.cat([z, z], 1)[:, 3:43],
    }[layout]()
    y = torch.arange(24, device=device, dtype=torch.int32)[::2]
    criterion = losses.LDAM(torch.arange(1, 41), reduction="none").to(device)
    one, other = laid.detach().requires_grad_(), laid.detach().clone(memory_format=torch.contiguous_format)
    other.requires_grad_()
    mine, same = criterion(one, y), criterion(other, y)
    assert torch.equal(mine, same)
    assert torch.equal(gradients(mine.sum(), torch.ones(()), one), gradients(same.sum(), torch.ones(()), other))


@pytest.mark.parametrize("classes", [3, 64, 130])
def test_a_nan_is_seen_wherever_it_stands(classes, backend, device):
    """It is no maximum of a row, first or last, but its loss; the rows beside it stay as they are."""
    y = torch.zeros(3, dtype=torch.int64, device=device)
    for where in (0, 1, classes - 1):
        z = torch.linspace(-1, 1, 3 * classes, device=device).view(3, classes)
        z[1, where] = math.nan
        mine = losses.CrossEntropy(reduction="none").to(device)(z, y)
        torch.testing.assert_close(mine, F.cross_entropy(z, y, reduction="none"), equal_nan=True)
        assert mine.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_huge_and_masked_logits(dtype, backend, device):
    inf = math.inf
    z = [
        [1e4, -1e4, 0.0, 9e3],
        [-1e4, -1e4, -1e4, -1e4],
        [-inf, 1.0, 2.0, -inf],
        [-inf, -inf, 3.0, -inf],
        [1e4, 1e4, -inf, 0.0],
        [3.0, -inf, 1.0, 2.0],
    ]
    y = torch.tensor([0, 3, 1, 2, 1, 1], device=device)
    for options in ({}, {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0])}):
        one = torch.tensor(z, dtype=dtype, device=device).requires_grad_()
        other = torch.tensor(z, device=device).to(dtype).double().requires_grad_()
        mine = losses.CrossEntropy(**options, reduction="none").to(device)(one, y)
        weight = options["weight"].double().to(device) if options else None
        exact = F.cross_entropy(other, y, weight, reduction="none")
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
        assert mine[-1] == inf and mine[:-1].isfinite().all()
        some, same = (
            gradients(values[:-1], torch.ones(5, device=device), z) for values, z in ((mine, one), (exact, other))
        )
        torch.testing.assert_close(some.double(), same, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_focal_loss_of_what_is_certain(dtype, gamma, backend, device):
    z = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 0.0], [17.0, 0.0]], dtype=dtype, device=device).requires_grad_()
    mine = losses.Focal(gamma=gamma, reduction="none")(z, torch.zeros(4, dtype=torch.long, device=device))
    ce = torch.tensor([math.log1p(math.exp(-200)), 200.0, math.log(2), math.log1p(math.exp(-17))], dtype=F64)
    factor = (-torch.expm1(-ce)) ** gamma
    torch.testing.assert_close(mine.detach().cpu().double(), factor * ce, rtol=1e-5, atol=1e-10)
    gradient = gradients(mine, torch.ones(4, device=device), z).cpu().double()
    slope = factor * (1 + gamma * torch.exp(-ce) * ce / -torch.expm1(-ce))
    wanted = slope * torch.expm1(-ce)
    torch.testing.assert_close(gradient, torch.stack([wanted, -wanted], 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "shape", [(257, 1025), (129, 1000), (64, 10)], ids=str
)  # one is fused on a CPU, two are torch's
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(name, shape, reduction, generator, threads):
    z, y, n = draw(generator, name, *shape)
    results = []
    for count in (1, 2, 3):
        criterion, logits = getattr(losses, name)(n, reduction=reduction), z.float().requires_grad_()
        with threads(count):
            mine = criterion(logits, y)
            results.append((mine, gradients(mine, torch.ones(mine.shape), logits)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


COUNTS = [50, 20, 3]
Z, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
BAD = {
    "no counts": (lambda: losses.LDAM([]), ValueError, "class_counts"),
    "negative count": (lambda: losses.VS([3, -1]), ValueError, "class_counts"),
    "nothing but zeros": (lambda: losses.LogitAdjusted([0, 0]), ValueError, "class_counts"),
    "infinite count": (lambda: losses.CrossEntropy([1, math.inf]), ValueError, "class_counts"),
    "counts in words": (lambda: losses.BalancedSoftmax(["many", "few"]), ValueError, "class_counts"),
    "reduction": (lambda: losses.Focal(reduction="avg"), ValueError, "reduction must be one of 'none', 'mean', 'sum'"),
    "smoothing": (lambda: losses.CrossEntropy(label_smoothing=1.5), ValueError, "label_smoothing .* got 1.5"),
    "tau": (lambda: losses.LogitAdjusted(COUNTS, tau=-1), ValueError, "tau .* got -1"),
    "max_m": (lambda: losses.LDAM(COUNTS, max_m=math.nan), ValueError, "max_m .* got nan"),
    "s": (lambda: losses.LDAM(COUNTS, s=0), ValueError, "s must be .* got 0"),
    "gamma": (lambda: losses.Focal(gamma=-0.5), ValueError, "gamma .* got -0.5"),
    "beta": (lambda: losses.ClassBalanced(COUNTS, beta=1.0), ValueError, r"beta must be a number in \[0, 1\), got 1"),
    "noise": (lambda: losses.GCL(COUNTS, noise_mul=math.inf), ValueError, "noise_mul .* got inf"),
    "seed": (lambda: losses.GCL(COUNTS, seed=-1), ValueError, "seed .* got -1"),
    "few weights": (lambda: losses.VS(COUNTS, weight=[1, 2]), ValueError, "weight has 2 numbers, but .* 3"),
    "negative weight": (lambda: losses.VS(COUNTS, weight=[1, 2, -1]), ValueError, "weight must be a list of finite"),
    "start": (lambda: losses.deferred_reweighting(3, COUNTS, start=-1), ValueError, "start"),
    "epoch": (lambda: losses.deferred_reweighting("3", COUNTS), ValueError, "epoch .* got '3'"),
    "other classes": (lambda: losses.VS(COUNTS)(torch.zeros(4, 5), Y), ValueError, r"\(B, 3\).*got \(4, 5\)"),
    "1-D logits": (lambda: losses.CrossEntropy()(torch.zeros(4), Y), ValueError, "logits must have shape"),
    "no logits": (lambda: losses.CrossEntropy()([[0.0]], Y), ValueError, "logits must have shape .* got list"),
    "integer logits": (lambda: losses.CrossEntropy()(Z.int(), Y), TypeError, "logits has dtype torch.int32"),
    "label too large": (
        lambda: losses.CrossEntropy()(Z, Y + 1),
        ValueError,
        r"targets must lie in \[0, 3\), got 1...3",
    ),
    "label too small": (
        lambda: losses.CrossEntropy()(Z, Y - 1),
        ValueError,
        r"targets must lie in \[0, 3\), got -1...1",
    ),
    "floating labels": (lambda: losses.CrossEntropy()(Z, Y.float()), ValueError, "targets must be a 1-D integer"),
    "2-D labels": (lambda: losses.CrossEntropy()(Z, Y[:, None]), ValueError, r"targets must be .* got \(4, 1\)"),
    "few labels": (lambda: losses.CrossEntropy()(Z, Y[:3]), ValueError, r"of 4 labels, .* got \(3,\)"),
    "vector": (lambda: ops.adjusted_cross_entropy(Z, Y, shift=torch.ones(4)), ValueError, r"shift must be .* \(3,\)"),
    "learned": (
        lambda: ops.adjusted_cross_entropy(Z, Y, scale=torch.ones(3, requires_grad=True)),
        ValueError,
        r"scale requires a gradient, but none flows to it: give scale.detach\(\)",
    ),
    "draw": (lambda: ops.adjusted_cross_entropy(Z, Y, spread=torch.ones(3)), ValueError, "draw must be"),
    "both": (lambda: ops.adjusted_cross_entropy(Z, Y, label_smoothing=0.1, gamma=1.0), ValueError, "no smoothed form"),
}


@pytest.mark.parametrize("backend_name", ["torch", "cpu"])
@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, kind, message, backend_name):
    if reason := lf.backend.why_not(backend_name):
        pytest.skip(f"{backend_name}: {reason}")
    with lf.use_backend(backend_name), pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["LDAM", "VS", "BalancedSoftmax", "ClassBalanced", "GCL"])
def test_a_class_without_samples_is_refused_where_the_formula_has_no_value(name):
    with pytest.raises(ValueError, match=r"class_counts\[1\] is 0, but a class without samples has"):
        getattr(losses, name)([5, 0, 2])
    with pytest.raises(ValueError, match=r"class_counts\[1\] is 0"):
        losses.deferred_reweighting(0, [5, 0, 2])


@pytest.mark.parametrize("name", ["LogitAdjusted", "CrossEntropy", "Focal"])
def test_a_class_without_samples_is_finite_elsewhere(name, backend, device):
    z = torch.zeros(3, 3, device=device).requires_grad_()
    mine = getattr(losses, name)([5, 0, 2], reduction="none").to(device)(z, torch.tensor([0, 1, 2], device=device))
    assert mine.isfinite().all() and gradients(mine, torch.ones(3, device=device), z).isfinite().all()


# --- modules


def test_deferred_reweighting():
    counts = [5000, 2997, 50]
    assert torch.equal(losses.deferred_reweighting(159, counts), torch.ones(3, dtype=F64))
    weights = losses.deferred_reweighting(160, counts)
    raw = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in counts], dtype=F64)
    torch.testing.assert_close(weights, raw / raw.sum() * 3, rtol=1e-10, atol=0)
    assert torch.equal(losses.deferred_reweighting(7, counts, start=7, beta=0.0), torch.ones(3, dtype=F64))
    criterion = losses.LDAM(counts, reduction="none")
    z, y = torch.rand(4, 3, dtype=F64), torch.tensor([0, 1, 2, 0])
    before = criterion(z, y)
    criterion.set_weight(weights)
    torch.testing.assert_close(criterion(z, y), before * weights[y])
    criterion.set_weight(None)
    assert torch.equal(criterion(z, y), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_labels_of_the_batch_make_the_mean_of_parts_the_weighted_mean(name, generator):
    z, y, n = draw(generator, name, 9, 4)
    make = functools.partial(getattr(losses, name), n, **OPTIONS.get(name, {}))
    every, mean = make(reduction="none").eval(), make(reduction="mean").eval()
    if name != "ClassBalanced":
        assert torch.equal(every(z, y, batch=y), every(z, y))  # nothing to divide by
        for criterion in (every, mean):
            criterion.set_weight(torch.tensor([0.1, 0.2, 3.0, 0.7]))
    wanted = mean(z, y)
    for batch in (y, [y[:2], y[2:]], y.int()):
        parts = [
            every(z[part], y[part], batch=batch) for part in (slice(2), torch.tensor([5, 4, 2, 3]), slice(6, None))
        ]
        torch.testing.assert_close(torch.cat(parts).mean(), wanted)
    torch.testing.assert_close(every(z.float(), y, batch=y).mean(), wanted.float())
    if name == "CrossEntropy":
        torch.testing.assert_close(wanted, F.cross_entropy(z, y, every.weight))
    with pytest.raises(ValueError, match="batch must be None with reduction='mean'"):
        mean(z, y, batch=y)
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\), got 0...4"):
        every(z[:1], y[:1], batch=torch.tensor([0, 4]))
    for criterion in (
        every,
        getattr(losses, name)(n, reduction="none", **OPTIONS.get(name, {})),
    ):  # with and without weights
        for wrong in (y[:0], [], 9, True, y.tolist(), y.numpy(), torch.tensor(3), y.float(), [y, y[:, None]]):
            with pytest.raises(ValueError, match="^batch must be the labels of the step's samples"):
                criterion(z, y, batch=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_checkpoints(name, generator):
    z, y, n = draw(generator, name, 6, 4)
    criterion = getattr(losses, name)(n, **OPTIONS.get(name, {}))
    criterion.set_weight(torch.rand(4, generator=generator))
    criterion(z, y)
    other = getattr(losses, name)(n.flip(0), **OPTIONS.get(name, {}))
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), other]
    wanted = criterion(z, y)
    for same in others:
        assert torch.equal(same(z, y), wanted)
    criterion.set_weight(None)
    other.load_state_dict(criterion.state_dict())
    assert other.weight is None
    assert f"classes=4, reduction={criterion.reduction!r}" in repr(criterion)


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_not_rounded(name, generator):
    z, y, n = draw(generator, name, 6, 4)
    model = torch.nn.Sequential(getattr(losses, name)(n))
    wanted = model.eval()[0](z, y)
    for cast in (model.half(), model.float(), model.to(BF16), model.double()):
        assert torch.equal(cast[0](z, y), wanted)
    assert all(buffer.device.type == "meta" for buffer in model.to("meta").buffers())


# --- GCL's noise


def test_noise(backend, device, generator):
    rows = 5 if interpreted(backend, device) else 40
    z, y, n = draw(generator, "GCL", rows, 50)
    criterion = losses.GCL(n, m=0.1, noise_mul=0.7, seed=2**50 + 3, reduction="none").to(device)
    w = torch.ones(50, dtype=F64)
    seen = []
    for number in (1, 2):
        noise = draws.noise(rows, 50, 2**50 + 3, torch.tensor(number)).double()
        one = z.to(device).clone().requires_grad_()
        mine = criterion(one, y.to(device))
        exact_z = z.clone().requires_grad_()
        exact = formula_gcl(exact_z, y, n, w, m=0.1, noise_mul=0.7, noise=noise)
        torch.testing.assert_close(mine.cpu(), exact, rtol=1e-10, atol=1e-10)
        seen.append((mine, exact, one, exact_z))
    for mine, exact, one, exact_z in seen:  # each backward with the noise of its forward
        exact.sum().backward()
        torch.testing.assert_close(gradients(mine, torch.ones(rows, device=device), one).cpu(), exact_z.grad)
    quiet = formula_gcl(z, y, n, w, m=0.1, noise_mul=0.0)
    torch.testing.assert_close(criterion.eval()(z.to(device), y.to(device)).cpu(), quiet)


def test_noise_is_a_clamped_normal():
    noise = draws.noise(1000, 1000, 5, torch.tensor(1)).double()
    assert noise.min() >= 0 and noise.max() == 1
    # E min(|N|/3, 1) and P(|N| > 3)
    mean = (math.sqrt(2 / math.pi) * (1 - math.exp(-4.5))) / 3 + math.erfc(3 / math.sqrt(2))
    assert abs(noise.mean() - mean) < 1e-3
    assert abs((noise == 1).double().mean() - math.erfc(3 / math.sqrt(2))) < 3e-4
    assert abs(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]) < 5e-3
    assert not torch.equal(noise, draws.noise(1000, 1000, 5, torch.tensor(2)))


def test_noise_held():
    criterion = losses.GCL(COUNTS, reduction="none")
    z, y = torch.rand(4, 3), Y.clone()
    y[:] = 0
    first, second = criterion(z, y), criterion(z, y)
    assert not torch.equal(first, second)
    with criterion.hold():
        third, fourth = criterion(z, y), criterion(z, y)
        with pytest.raises(RuntimeError, match="do not nest"), criterion.hold():
            pass
    assert torch.equal(third, fourth) and not torch.equal(second, third)
    assert not torch.equal(criterion(z, y), third)
    assert criterion.draws == 4
    fresh = losses.GCL(COUNTS, reduction="none")
    assert torch.equal(fresh(z, y), first)


@pytest.mark.parametrize("name", NAMES)
def test_as_the_closure_of_an_optimizer(name, generator):
    _, y, n = draw(generator, name, 16, 4)
    x = torch.randn(16, 5, generator=generator, dtype=F64)
    weight = torch.randn(4, 5, generator=generator, dtype=F64) / 5
    results = []
    ones = torch.ones(4, dtype=F64)
    for closure_of in (
        lambda criterion, w: lambda: criterion(x @ w.t(), y),
        lambda criterion, w: (
            lambda: FORMULAS[name](x @ w.t(), y, n, ones, **{} if name != "GCL" else {"noise_mul": 0.0})
        ),
    ):
        w = weight.clone().requires_grad_()
        criterion = getattr(losses, name)(n, reduction="none").eval()
        opt = lf.FocalSAM([w], torch.optim.SGD, rho=0.2, class_counts=n, gamma=2.0, lam=0.7, lr=0.1, momentum=0.9)
        for _ in range(3):
            loss = opt.step(closure_of(criterion, w), targets=y)
        results.append((w.detach(), loss))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
