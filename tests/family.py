"""The rows of the family's tests: methods, options and their oracles. A later method is one more row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import SGD

import ltsam_fast as lf
from ltsam_fast.reference import draws

from . import oracles_family as family
from .methods import BASES, METHODS
from .methods import EACH as FIRST
from .oracles import COUNTS, batches, network

RHO = 0.1
SEED = 5


def noise(step, number, shape, clip=1.0):
    words = draws.random_words(torch.empty(shape), number, SEED, step, None)
    return (draws.normal(words).double() / 3).clamp(-clip, clip)


def coordinates(step, number, shape, beta=0.6):
    words = draws.random_words(torch.empty(shape), number, SEED, step, None)
    return ((words & 0xFFFF) < int(beta * 65536 + 0.5)).double()


def tensors(step, number, shape, beta=0.6):
    count = len(list(network().parameters()))
    generator = torch.Generator().manual_seed(SEED + 0x9E3779B9 * step)
    return float((torch.rand(count, generator=generator) < beta)[number])


@dataclass(frozen=True)
class Row:
    """A method with its options, and the oracle with those that differ."""

    method: str
    oracle: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def make(self, model, base=SGD, params=None, /, **options):
        groups = model.parameters() if params is None else params
        return getattr(lf, self.method)(groups, base, **{"rho": RHO, **self.options, **options})

    def expected(self, base, options, data, groups=None):
        model = network()
        groups = groups(model) if groups else [{"params": list(model.parameters())}]
        adaptive = self.options.get("adaptive", False)
        groups = [{"rho": RHO, "adaptive": adaptive, **group} for group in groups]
        skip = {"adaptive", "seed", *self.drop}
        own = {name: value for name, value in self.options.items() if name not in skip} | self.others
        return self.oracle(model, groups, data, base, options, **own)


ROWS = {
    "ImbSAM": Row("ImbSAM", family.imb_sam, {"class_counts": COUNTS, "eta": 10}),
    "ImbSAM-2": Row(
        "ImbSAM", family.imb_sam, {"class_counts": COUNTS, "eta": 20, "tail_weight": 2.0, "adaptive": True}
    ),
    "SSESAM": Row("SSESAM", family.sse_sam, {"class_counts": COUNTS, "eta": 10, "tail_rho": 0.2, "switch_step": 12}),
    "SSESAM-1": Row("SSESAM", family.sse_sam, {"class_counts": COUNTS, "eta": 10}),
    "CCSAM": Row("CCSAM", family.cc_sam, {"class_counts": [50, 20, 2, 1], "scope": "all", "noise_ratio": 1e-2}),
    "GNM": Row("GNM", family.gnm, {"seed": SEED}, {"noise": noise, "loss_there": True}),
    "GNM-decay": Row(
        "GNM", family.gnm, {"seed": SEED, "dis_mul": 2.0, "decay_every": 7}, {"noise": noise, "loss_there": True}
    ),
    "FriendlySAM": Row("FriendlySAM", family.friendly_sam, {"sigma": 0.7, "lmbda": 0.6}),
    "FriendlyASAM": Row("FriendlySAM", family.friendly_sam, {"adaptive": True}),
    "MSAM": Row("MSAM", family.m_sam, {"m": 5}),
    "SparseSAM": Row("SparseSAM", family.sparse_sam, {"sparsity": 0.7, "refresh_every": 4, "num_samples": 6}),
    "ESAM": Row("ESAM", family.esam, {"seed": SEED}, {"mask": coordinates}),
    "ESAM-tensor": Row("ESAM", family.esam, {"seed": SEED, "granularity": "tensor"}, {"mask": tensors}),
    "LookSAM": Row("LookSAM", family.look_sam, {"k": 3}),
    "GSAM": Row("GSAM", family.gsam),
    "GSAM-lr": Row("GSAM", family.gsam, {"alpha": 0.2, "rho_min": 0.02, "rho_max": 0.2, "adaptive": True}),
    "WSAM": Row("WSAM", family.wsam),
    "WSAM-coupled": Row("WSAM", family.wsam, {"decouple": False, "gamma": 0.6}),
}
EACH = ("ImbSAM", "SSESAM", "CCSAM", "GNM", "FriendlySAM", "MSAM", "SparseSAM", "ESAM", "LookSAM", "GSAM", "WSAM")
EVERY = {name: METHODS[name] for name in FIRST} | {name: ROWS[name] for name in EACH}
"""Every method, one row each."""


def closure_of(model, x, y):
    return lambda index=slice(None): F.cross_entropy(model(x[index]), y[index], reduction="none")


def drive(opt, model, data):
    return [opt.step(closure_of(model, x, y), targets=y) for x, y in data]


@functools.cache
def expected(name, base):
    return ROWS[name].expected(*BASES[base], batches())
