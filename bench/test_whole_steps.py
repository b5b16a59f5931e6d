"""Times whole training steps, forwards and backwards included: the published way, ours, and ours in a CUDA graph, in turns."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ltsam_fast as lf
from bench.measure import BASE, DEVICE, interleaved, machine, timed
from ltsam_fast import data, models, plain

RATE = BASE | {"lr": 1e-3}  # with 0.1, rounding alone makes weights differ by 0.2 of their change in five steps
RHO = 0.05
BATCHES = 8
losses_of = functools.partial(F.cross_entropy, reduction="none")


class Network(NamedTuple):
    """A network, the shape of a batch, training samples per class (below ``eta``: tail), and the dtype of autocast."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    counts: list[int]
    eta: int
    autocast: torch.dtype | None = None


def mlp():
    """A perceptron with layer norms for the digits, 8 x 8 pixels in 10 classes."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 512), nn.LayerNorm(512), nn.GELU()),
        *(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU()),
        nn.Linear(512, 10),
    )


CIFAR = data.longtail_counts(500, 100, imbalance=100)
FEW = data.longtail_counts(500, 10, imbalance=100)
DIGITS = data.longtail_counts(134, 10, imbalance=50)
SMALL, LARGE = {"patch": 4, "dim": 192, "depth": 6, "heads": 3}, {"patch": 16, "dim": 768, "depth": 12, "heads": 12}
NETWORKS = {
    "small ViT": Network(lambda: models.small_vit(100, 32, **SMALL), (64, 3, 32, 32), CIFAR, 20),
    "ResNet-32": Network(lambda: models.resnet32(100), (64, 3, 32, 32), CIFAR, 20),
    "MLP": Network(mlp, (64, 1, 8, 8), DIGITS, 10),
    "CNN": Network(lambda: models.small_cnn(10, 3, 16), (64, 3, 16, 16), FEW, 20),
    "ViT-B/16": Network(lambda: models.small_vit(100, 224, **LARGE), (64, 3, 224, 224), CIFAR, 20, torch.bfloat16),
}


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of rank 8."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 8, False), nn.Linear(8, base.out_features, False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapter(nn.Module):
    """A frozen linear layer and a trained bottleneck of 16 dimensions."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.out_features, 16), nn.Linear(16, base.out_features)

    def forward(self, x):
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


def frozen(model, *trained):
    """Freezes the network but for some modules."""
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def wrapped(model, wrap, chosen=lambda layer: True):
    """Freezes the network but for its head, and wraps the other linear layers that ``chosen`` selects."""
    frozen(model, model.head)
    linear = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not model.head and chosen(child)
    ]
    for parent, name, child in linear:
        setattr(parent, name, wrap(child))


NORMS, SSE_1, SSE_2 = "SAM, norm layers perturbed", "SSE-SAM, stage 1", "SSE-SAM, stage 2"
LATE, PERIOD = "SAM, 30 % of the steps", 10
TRAINED = {
    "all": lambda model: None,
    "LoRA": lambda model: wrapped(model, LoRA),
    "adapters": lambda model: wrapped(model, Adapter, lambda layer: layer.in_features > layer.out_features),
    "last block": lambda model: frozen(model, model.blocks[-1], model.norm, model.head),
    "head": lambda model: frozen(model, model.head),
}
CASES = [
    ("small ViT", "all", ("SGD", "SAM", NORMS, "ImbSAM", SSE_1, SSE_2, "Focal-SAM", "CC-SAM, head", "GNM"), 9),
    ("small ViT", "all", ("SGD", "SAM", LATE, "MomentumSAM"), 9),
    ("small ViT", "all", ("CC-SAM, all",), 3),  # takes as long as 60 steps of SGD
    ("small ViT", "LoRA", ("SGD", "SAM", "ImbSAM", SSE_1, "Focal-SAM"), 7),
    ("small ViT", "adapters", ("SGD", "SAM", "ImbSAM", "Focal-SAM"), 7),
    ("small ViT", "last block", ("SGD", "SAM", "ImbSAM", "Focal-SAM"), 9),
    ("small ViT", "head", ("SGD", "SAM", "ImbSAM", "Focal-SAM", "CC-SAM, head"), 9),
    ("ResNet-32", "all", ("SGD", "SAM", "ImbSAM", SSE_1, SSE_2, "Focal-SAM", "GNM", "Friendly SAM", "GSAM"), 7),
    ("ResNet-32", "all", ("SGD", "SAM", LATE, "MomentumSAM"), 7),
    ("MLP", "all", ("SGD", "SAM", "ImbSAM", SSE_1, SSE_2, "Focal-SAM", "GNM"), 100),
    ("CNN", "all", ("SGD", "SAM", "ImbSAM", SSE_1, SSE_2, "Focal-SAM"), 100),
    ("ViT-B/16", "all", ("SGD", "SAM", "ImbSAM", "Focal-SAM"), 0),
    ("ViT-B/16", "LoRA", ("SGD", "SAM", "ImbSAM", "Focal-SAM"), 0),
]
"""Network, what is trained, methods, and rounds on a CPU."""
WAYS = ("published", "ours", *(("captured",) if DEVICE == "cuda" else ()))
METHODS = {
    "SGD": ("SGD", lambda n, head: {}),
    "SAM": ("SAM", lambda n, head: {}),
    NORMS: ("SAM", lambda n, head: {}),
    LATE: ("SAM", lambda n, head: {"active": lambda step: step % PERIOD >= 7}),
    "MomentumSAM": ("MomentumSAM", lambda n, head: {}),
    "ImbSAM": ("ImbSAM", lambda n, head: {"class_counts": n.counts, "eta": n.eta}),
    SSE_1: ("SSESAM", lambda n, head: {"class_counts": n.counts, "eta": n.eta}),
    SSE_2: ("SSESAM", lambda n, head: {"class_counts": n.counts, "eta": n.eta, "switch_step": 0}),
    "Focal-SAM": ("FocalSAM", lambda n, head: {"class_counts": n.counts, "gamma": 3.0, "lam": 0.5}),
    "CC-SAM, head": ("CCSAM", lambda n, head: {"class_counts": n.counts, "head": head, "noise_ratio": 0.1}),
    "CC-SAM, all": (
        "CCSAM",
        lambda n, head: {"class_counts": n.counts, "head": head, "noise_ratio": 1e-3, "scope": "all"},
    ),
    "GNM": ("GNM", lambda n, head: {}),
    "Friendly SAM": ("FriendlySAM", lambda n, head: {}),
    "GSAM": ("GSAM", lambda n, head: {}),
}
"""Method -> its class, of the same name in ``plain`` and in ``ltsam_fast``, and its options for a network and its head."""


class Training:
    """Steps of one method, in one of the ``WAYS``; all trainings take the same batches.

    Args:
        network: The network.
        model: Its weights, and which of them are trained.
        method: One of ``METHODS``.
        way: One of ``WAYS``.
        batches: Images and labels, in turns.
    """

    def __init__(self, network, model, method, way, batches):
        self.model, self.autocast = copy.deepcopy(model), network.autocast
        name, options_for = METHODS[method]
        options = {"rho": RHO, **options_for(network, models.classifier(self.model)), **RATE}
        groups = groups_of(self.model, norms_only=method == NORMS)
        if name == "SGD":
            self.optimizer = plain.SGD(groups, **RATE)
        elif way == "published":
            self.optimizer = getattr(plain, name)(groups, torch.optim.SGD, **options)
        else:
            self.optimizer = getattr(lf, name)(groups, torch.optim.SGD, model=self.model, **options)
        self.run = self.step
        if way == "captured":
            self.run = lf.graph_step(self.model, losses_of, self.optimizer, batches[0], autocast=self.autocast)
        self.batches = itertools.cycle(batches)
        self.steps = PERIOD if method == LATE else 1

    def step(self, x, y):
        def losses(index=slice(None)):
            with torch.autocast(DEVICE, self.autocast) if self.autocast else contextlib.nullcontext():
                return losses_of(self.model(x[index]), y[index])

        self.optimizer.step(losses, targets=y)

    def __call__(self):
        """The time of a step; where steps differ, their mean over a period."""
        batches = [next(self.batches) for _ in range(self.steps)]
        return timed(lambda: [self.run(*batch) for batch in batches]) / self.steps

    def weights(self):
        """The trained weights, concatenated."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.nn.utils.parameters_to_vector(trained).detach()

    def peak_mb(self):
        """The peak memory of a step in MB, on a GPU."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def groups_of(model, norms_only):
    """The trained parameters; in two groups, if only those of layer norms are to be perturbed."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not norms_only:
        return params
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return [
        {"params": [p for p in params if p in norms]},
        {"params": [p for p in params if p not in norms], "perturb": False},
    ]


def batches_of(network, small):
    """Random images, and labels as frequent as in training; ``small``: a few samples, of any class.

    Every batch has as many tail samples as the tail's share says: without any, ImbSAM and SSE-SAM have less to do.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, *network.shape[1:]) if small else network.shape
    shares = torch.tensor(network.counts, dtype=torch.double)
    tail = shares < network.eta
    wanted = round(float(shares[tail].sum() / shares.sum()) * shape[0])
    found = []
    while len(found) < BATCHES:
        y = torch.multinomial(torch.ones_like(shares) if small else shares, shape[0], True, generator=generator)
        if small or tail[y].sum() == wanted:
            found.append((torch.randn(shape, generator=generator).to(DEVICE), y.to(DEVICE)))
    return found


def assert_same_steps(trainings, start):
    """Checks the results before they are timed: the published steps must have changed the weights as ours have."""
    for (method, way), training in trainings.items():
        if method == "GNM" or way == "published" or (method, "published") not in trainings:
            continue  # GNM's published noise is another
        wanted, moved = (one.weights() - start for one in (trainings[method, "published"], training))
        difference = float((moved - wanted).norm() / wanted.norm())
        # 16 bits round the gradients of two losses differently, and batch norm magnifies rounding.
        normed = any(isinstance(module, nn.BatchNorm2d) for module in training.model.modules())
        limit = 0.3 if training.autocast else 0.05 if normed else 1e-3
        assert difference < limit, f"{method}, {way}: differs by {difference:.2g} of the change, limit {limit}"


@pytest.mark.parametrize(
    ("name", "trained", "methods", "rounds"), CASES, ids=lambda value: value if type(value) is str else ""
)
def test_whole_step(benchmark, name, trained, methods, rounds, request):
    if name == "ViT-B/16" and DEVICE == "cpu":
        pytest.skip("a step takes minutes without a GPU")
    network, small = NETWORKS[name], benchmark.disabled
    torch.manual_seed(0)
    model = network.make().to(DEVICE)
    TRAINED[trained](model)
    model.to(DEVICE)
    batches = batches_of(network, small)
    trainings = {}
    for method, way in [("SGD", "published"), ("SAM", "ours"), *itertools.product(methods, WAYS)]:
        if method == "SGD" and way != "published" or (method.startswith("CC-SAM") and way == "captured"):
            continue  # SGD is torch's, and CC-SAM looks at the labels on the host
        if method == LATE and way == "published":
            continue  # SGD's steps and SAM's, which have rows of their own
        trainings[method, way] = Training(network, model, method, way, batches)
    start = next(iter(trainings.values())).weights().clone()
    for training in trainings.values():
        for _ in range(5 if DEVICE == "cuda" else 2):  # graphs are captured in the fourth step
            training()
    assert_same_steps(trainings, start)
    for (_, way), training in trainings.items():
        if way == "ours" and DEVICE == "cpu":  # in steps 1, 2 and 4 the network is looked at
            training()
            training()
    columns = interleaved(list(trainings.values()), 1 if small else 20 if DEVICE == "cuda" else rounds, warmup=0)
    times = dict(zip(trainings, columns, strict=True))
    benchmark.pedantic(trainings["SGD", "published"], rounds=1)
    if small:
        return

    def ratio(one, other):
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    for method in methods:
        row = {"network": name, "trained": trained, "method": method}
        for way in WAYS:
            if (key := (method, way)) in times:
                row |= {
                    f"{way}_ms": 1e3 * statistics.median(times[key]),
                    f"{way}_sgd": ratio(key, ("SGD", "published")),
                }
                if DEVICE == "cuda" and way != "captured":
                    row[f"{way}_peak_mb"] = trainings[key].peak_mb()
        if method != "SGD":
            row["ours_sam"] = ratio((method, "ours"), ("SAM", "ours"))
            if (method, "published") in times:
                row["published_ours"] = ratio((method, "published"), (method, "ours"))
        benchmark.extra_info.setdefault("rows", []).append(row)
    benchmark.extra_info.update(machine(request), table="whole steps")
