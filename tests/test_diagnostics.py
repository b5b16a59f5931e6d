"""Diagnostics against formulas: linear and quadratic losses, and full Hessians of small networks by autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ltsam_fast import models
from ltsam_fast.diagnostics import class_grad_norms, class_sharpness, loss_slice, top_hessian_eigenvalue
from ltsam_fast.diagnostics.evaluator import Evaluator

CE = nn.CrossEntropyLoss(reduction="none")


def problem(seed, n=60, classes=4, absent=2):
    """A small network with batch norm, in training mode, and long-tailed samples; class ``absent`` has none."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, classes)).double()
    with torch.no_grad():
        model(torch.randn(50, 5, dtype=torch.float64))
    x = torch.randn(n, 5, dtype=torch.float64)
    y = torch.multinomial(torch.tensor([0.6, 0.25, 0.0, 0.15])[:classes], n, replacement=True)
    y[:3] = torch.tensor([0, 1, 3])
    assert absent not in y
    return model, x, y


def flat_loss(model, x, y):
    """The mean loss as a function of one flat vector, in evaluation mode; and the vector."""
    names, params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    vector = torch.cat([p.detach().flatten() for p in params])

    def loss(w):
        parts = w.split([p.numel() for p in params])
        weights = {name: part.view_as(p) for name, part, p in zip(names, parts, params, strict=True)}
        model.eval()
        out = functional_call(model, weights, (x,))
        model.train()
        return F.cross_entropy(out, y)

    return loss, vector


class Unchanged:
    """Checks at the end that weights, gradients, buffers and modes are as they were, to the last bit."""

    def __init__(self, model):
        self.model = model
        for param in model.parameters():
            param.grad = torch.full_like(param, 7.0)

    def state(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [t.detach().clone() for t in tensors], [module.training for module in self.model.modules()]

    def __enter__(self):
        self.before = self.state()

    def __exit__(self, *_):
        tensors, modes = self.state()
        assert all(torch.equal(a, b) for a, b in zip(tensors, self.before[0], strict=True))
        assert modes == self.before[1]
        assert all((param.grad == 7.0).all() for param in self.model.parameters())


@pytest.fixture(params=[7, 256], ids=["in batches", "at once"])
def batch_size(request):
    return request.param


def test_class_grad_norms(seed, batch_size, backend):
    if backend in ("triton", "cuda"):
        pytest.skip("the norms' kernels have tests of their own")
    model, x, y = problem(seed)
    model[1].eval()
    with Unchanged(model):
        got = class_grad_norms(model, CE, x, y, num_classes=4, batch_size=batch_size)
    assert got.counts.tolist() == y.bincount(minlength=4).tolist()
    for c in range(4):
        if c == 2:
            assert got.norms[c].isnan()
            continue
        loss, w = flat_loss(model, x[y == c], y[y == c])
        torch.testing.assert_close(got.norms[c], torch.func.grad(loss)(w).norm(), rtol=1e-10, atol=1e-12)


def test_class_grad_norms_of_one_class_at_a_time(seed, monkeypatch):
    from ltsam_fast.diagnostics import per_class

    model, x, y = problem(seed)
    expected = class_grad_norms(model, CE, x, y, num_classes=4).norms
    monkeypatch.setattr(per_class, "_GRADIENT_BYTES", 0)
    torch.testing.assert_close(class_grad_norms(model, CE, x, y, num_classes=4).norms, expected, equal_nan=True)


@pytest.mark.parametrize("shared", [False, True])
def test_sharpness_of_a_linear_loss_is_rho_times_the_slope(seed, shared):
    """l_i = w . x_i: the mean over class c rises by rho ||m_c||, along the common direction by rho m_c . m / ||m||."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    got = class_sharpness(
        model, lambda out, _: out.flatten(), x, y, rho=0.3, num_classes=3, shared=shared, batch_size=6
    )
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    along = x.mean(0).expand(3, -1) if shared else means
    torch.testing.assert_close(got.sharpness, 0.3 * (means * along).sum(1) / along.norm(dim=1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.loss, means @ model.weight.detach()[0])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_sharpness_of_a_network(seed, shared, adaptive, batch_size):
    model, x, y = problem(seed)
    with Unchanged(model):
        got = class_sharpness(
            model, CE, x, y, rho=0.2, num_classes=4, shared=shared, adaptive=adaptive, batch_size=batch_size
        )
    for c in (0, 1, 3):
        loss, w = flat_loss(model, x[y == c], y[y == c])
        climbed, _ = flat_loss(model, x, y) if shared else (loss, w)
        g = torch.func.grad(climbed)(w)
        scale = w.abs() if adaptive else torch.ones_like(w)
        step = 0.2 * scale**2 * g / (scale * g).norm()
        torch.testing.assert_close(got.loss[c], loss(w), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.perturbed[c], loss(w + step), rtol=1e-7, atol=1e-9)
    assert got.sharpness[2].isnan() and got.counts[2] == 0


def symmetric(eigenvalues, seed):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))[0]
    return basis, basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


class Quadratic(nn.Module):
    """The loss of each sample is half w^T A w times the sample's own factor, in two weights."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
        self.a, self.b = (nn.Parameter(torch.randn(2, 1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        w = torch.cat([self.a, self.b]).flatten()
        return x.flatten() * (w @ self.matrix @ w) / 2


def first(out, _):
    return out


@pytest.mark.parametrize(
    ("eigenvalues", "top"),
    [([1.0, 2.0, 5.0, 9.0], 9.0), ([-1.0, 0.0, 0.5, 3.0], 3.0), ([-9.0, 0.5, 1.0, 4.0], 4.0), ([-9.0, -6.0, -5.0, -2.0], -2.0)],
)  # fmt: skip
def test_top_eigenvalue_of_a_known_hessian(eigenvalues, top, seed):
    basis, matrix = symmetric(eigenvalues, seed)
    model = Quadratic(matrix)
    x, y = torch.tensor([[2.0], [2.0], [3.0]], dtype=torch.float64), torch.tensor([0, 0, 1])
    with Unchanged(model):
        got = top_hessian_eigenvalue(model, first, x, y, tolerance=1e-6, iterations=500, batch_size=2)
    mean = 7 / 3
    assert got.converged and got.residual <= 1e-6 * 9 * mean
    assert abs(got.value - mean * top) < 1e-6 * 9 * mean and got.value == got.history[-1]
    vector = torch.cat(got.vector).flatten()
    expected = basis[:, eigenvalues.index(top)]
    assert abs(abs(float(vector @ expected)) - 1) < 1e-6
    assert [one.shape for one in got.vector] == [model.a.shape, model.b.shape]
    for c, factor in ((0, 2.0), (1, 3.0)):
        of_class = top_hessian_eigenvalue(model, first, x, y, classes=[c], tolerance=1e-6, iterations=500)
        assert abs(of_class.value - factor * top) < 1e-6 * 9 * factor


def test_top_eigenvalue_of_a_network(seed, batch_size):
    model, x, y = problem(seed)
    loss, w = flat_loss(model, x, y)
    expected = torch.linalg.eigvalsh(torch.func.hessian(loss)(w))[-1]
    with Unchanged(model):
        got = top_hessian_eigenvalue(model, CE, x, y, tolerance=1e-4, iterations=2000, batch_size=batch_size)
    assert got.converged
    assert abs(got.value - expected) <= max(2 * got.residual, 1e-9)


def test_top_eigenvalue_through_attention_and_a_resnet(seed):
    """Fused attention has no second derivative; the ResNet is in training mode and stays as it is."""
    torch.manual_seed(seed)
    for model in (models.small_vit(3, 8, dim=12, depth=1), models.resnet(3, depth=8)):
        with Unchanged(model):
            got = top_hessian_eigenvalue(model, CE, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), iterations=3)
        assert math.isfinite(got.value) and len(got.history) == 3


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1)
    got = top_hessian_eigenvalue(
        model, lambda out, _: out.flatten(), torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    )
    assert (got.value, got.residual, got.converged) == (0.0, 0.0, True)


def test_too_few_iterations_are_said(seed):
    _, matrix = symmetric([1.0, 2.0, 5.0, 5.1], seed)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    got = top_hessian_eigenvalue(Quadratic(matrix), first, x, y, tolerance=1e-9, iterations=4)
    assert not got.converged and len(got.history) == 4


def test_the_generator_decides(seed):
    model, x, y = problem(seed)
    runs = [
        (
            top_hessian_eigenvalue(model, CE, x, y, iterations=2, generator=torch.Generator().manual_seed(s)).value,
            loss_slice(model, CE, x, y, steps=3, generator=torch.Generator().manual_seed(s)).loss.tolist(),
        )
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0] and runs[0][1] != runs[2][1]


@pytest.mark.parametrize("count", [1, 2])
def test_slice_along_random_directions(count, seed, batch_size):
    model, x, y = problem(seed)
    with Unchanged(model):
        got = loss_slice(model, CE, x, y, directions=count, radius=0.5, steps=5, classes=[0, 3], batch_size=batch_size)
    assert got.coordinates.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    chosen = (y == 0) | (y == 3)
    loss, w = flat_loss(model, x[chosen], y[chosen])
    vectors = [torch.cat([d.flatten() for d in one]) for one in got.directions]
    for index in [(0,) * count, (2,) * count, (4, 1)[:count]]:
        point = w + sum(float(got.coordinates[i]) * d for i, d in zip(index, vectors, strict=True))
        torch.testing.assert_close(got.loss[index], loss(point), rtol=1e-9, atol=1e-12)
    for direction in got.directions:
        for param, move in zip(model.parameters(), direction, strict=True):
            if param.ndim == 1:
                assert not move.any()
            else:
                torch.testing.assert_close(move.flatten(1).norm(dim=1), param.detach().flatten(1).norm(dim=1))


def test_slice_along_given_directions(seed):
    """Half a^2 times the eigenvalue on the line of an eigenvector, from the minimum."""
    basis, matrix = symmetric([1.0, 2.0, 5.0, 9.0], seed)
    model = Quadratic(matrix)
    with torch.no_grad():
        model.a.zero_(), model.b.zero_()
    directions = [[basis[:2, i : i + 1].clone(), basis[2:, i : i + 1].clone()] for i in (3, 0)]
    x, y = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    got = loss_slice(model, first, x, y, directions=directions, radius=2, steps=5)
    a = got.coordinates
    torch.testing.assert_close(got.loss, (9 * a[:, None] ** 2 + 1 * a**2) / 2)


class Breaks(nn.Module):
    """Fails in forward pass number ``at``, as Ctrl-C or a full memory would."""

    def __init__(self, inner, at, error):
        super().__init__()
        self.inner, self.at, self.error, self.calls = inner, at, error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: class_grad_norms(m, CE, x, y, num_classes=4, batch_size=5),
        lambda m, x, y: class_sharpness(m, CE, x, y, rho=0.5, num_classes=4),
        lambda m, x, y: class_sharpness(m, CE, x, y, rho=0.5, num_classes=4, shared=True, batch_size=20),
        lambda m, x, y: top_hessian_eigenvalue(m, CE, x, y, tolerance=1e-12),
        lambda m, x, y: loss_slice(m, CE, x, y),
    ],
    ids=["norms", "sharpness", "shared", "eigenvalue", "slice"],
)
def test_errors_leave_everything_as_it_was(call, at, error, seed):
    inner, x, y = problem(seed)
    model = Breaks(inner, at, error)
    with Unchanged(model), pytest.raises(type(error)):
        call(model, x, y)


def test_frozen_weights_stay_out(seed):
    model, x, y = problem(seed)
    for param in model[0].parameters():
        param.requires_grad_(False)
    loss, w = flat_loss(model, x[y == 1], y[y == 1])
    got = class_grad_norms(model, CE, x, y, num_classes=4).norms[1]
    torch.testing.assert_close(got, torch.func.grad(loss)(w).norm(), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="weights that require gradients"):
        class_grad_norms(model.requires_grad_(False), CE, x, y, num_classes=4)


def test_prepare_makes_input_of_samples(seed):
    model, x, y = problem(seed)
    expected = class_sharpness(model, CE, x / 2, y, rho=0.1, num_classes=4)
    got = class_sharpness(model, CE, x, y, rho=0.1, num_classes=4, prepare=lambda one: one / 2)
    torch.testing.assert_close(got.perturbed, expected.perturbed, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: class_sharpness(m, CE, x, y, rho=-0.1, num_classes=4), "rho must be a finite number >= 0, got -0.1"),
        (lambda m, x, y: class_sharpness(m, CE, x, y, rho=math.inf, num_classes=4), "rho must be a finite number"),
        (lambda m, x, y: class_grad_norms(m, CE, x, y[:-1], num_classes=4), "y must be one label for each of 60"),
        (lambda m, x, y: class_grad_norms(m, CE, x, y, num_classes=3), r"y must lie in \[0, 3\), got 0\.\.3"),
        (lambda m, x, y: class_grad_norms(m, F.cross_entropy, x, y, num_classes=4), "loss_fn must return one loss per sample"),
        (lambda m, x, y: class_grad_norms(m, CE, x, y, num_classes=4, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m, x, y: top_hessian_eigenvalue(m, CE, x, y, iterations=0), "iterations must be at least 1, got 0"),
        (lambda m, x, y: top_hessian_eigenvalue(m, CE, x, y, tolerance=0), "tolerance must be > 0, got 0"),
        (lambda m, x, y: top_hessian_eigenvalue(m, CE, x, y, classes=[2]), r"classes must have a sample in y, got \[2\]"),
        (lambda m, x, y: loss_slice(m, CE, x, y, directions=3), "directions must be 1, 2 or such lists"),
        (lambda m, x, y: loss_slice(m, CE, x, y, directions=[[torch.zeros(2)]]), "directions must be one or two lists of 6"),
        (lambda m, x, y: loss_slice(m, CE, x, y, radius=0.0), "radius must be a finite number > 0, got 0.0"),
        (lambda m, x, y: loss_slice(m, CE, x, y, steps=1), "steps must be at least 2, got 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_changes(call, message, seed):
    model, x, y = problem(seed)
    with Unchanged(model), pytest.raises(ValueError, match=message):
        call(model, x, y)


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        hidden = checkpoint(self.model[:3], x.clone().requires_grad_(), use_reentrant=self.reentrant)
        return self.model[3](hidden)


@pytest.mark.parametrize("exact", [False, True])
def test_reentrant_checkpoints_are_looked_into_or_refused(exact, seed):
    model, x, y = problem(seed)
    plain, hidden = (Checkpointed(model, reentrant) for reentrant in (False, True))
    norms = class_grad_norms(plain, CE, x, y, num_classes=4)
    with Unchanged(hidden):
        if exact:
            with pytest.raises(ValueError, match="use_reentrant=True"):
                class_grad_norms(hidden, CE, x, y, num_classes=4, exact=True)
        else:
            found = class_grad_norms(hidden, CE, x, y, num_classes=4)
            torch.testing.assert_close(found.norms, norms.norms, equal_nan=True)
    for shared in (False, True):
        rises = [class_sharpness(m, CE, x, y, rho=0.3, num_classes=4, shared=shared) for m in (plain, hidden)]
        torch.testing.assert_close(rises[1].perturbed, rises[0].perturbed, equal_nan=True)
    with Unchanged(hidden), pytest.raises(ValueError, match="use_reentrant=True, which has no second derivative"):
        top_hessian_eigenvalue(hidden, CE, x, y)


def test_batch_norm_without_running_statistics_is_refused_by_name(seed):
    _, x, y = problem(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)).double()
    for call in (
        lambda: class_grad_norms(model, CE, x, y, num_classes=4),
        lambda: class_sharpness(model, CE, x, y, rho=0.1, num_classes=4),
        lambda: top_hessian_eigenvalue(model, CE, x, y),
        lambda: loss_slice(model, CE, x, y),
    ):
        with Unchanged(model), pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) has track_running_stats=False"):
            call()


def test_plots(tmp_path, seed):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model, x, y = problem(seed)
    drawn = {
        "norms": class_grad_norms(model, CE, x, y, num_classes=4),
        "sharpness": class_sharpness(model, CE, x, y, rho=0.1, num_classes=4),
        "eigenvalue": top_hessian_eigenvalue(model, CE, x, y, iterations=3),
        "line": loss_slice(model, CE, x, y, steps=3),
        "plane": loss_slice(model, CE, x, y, directions=2, steps=3, progress=True),
    }
    for name, result in drawn.items():
        result.plot(tmp_path / f"{name}.png")
        with image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 5
    drawn["norms"].plot(tmp_path / "named.svg", names=["ant", "bee", "cat", "dog"])
    with pytest.raises(ValueError, match="names must be one for each of 4 classes, got 1"):
        drawn["norms"].plot(tmp_path / "named.svg", names=["ant"])


def test_the_probe_puts_weights_back_by_value(seed):
    """The storage stays the same: an optimizer or a view may hold it."""
    model, x, y = problem(seed)
    addresses = [param.data_ptr() for param in model.parameters()]
    with Evaluator(model, CE, x, y).restored_afterwards(), torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    assert addresses == [param.data_ptr() for param in model.parameters()]
