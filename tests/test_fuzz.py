"""Calls that nobody thought of: as good as the reference implementation in fp64, or refused in one line with nothing changed.

``make test`` takes the same few calls each time, ``make fuzz CASES=10000 SEED=1`` others. What fails is shrunk to the smallest
call that does, printed as it goes into ``FOUND``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import ltsam_fast as lf
from ltsam_fast import ops, reference
from ltsam_fast.ops import OPS
from ltsam_fast.table import TensorTable

from .cases import (
    DTYPES,
    F64,
    KINDS,
    LAYOUTS,
    RICHEST,
    TOLERANCES,
    Case,
    assert_as_good,
    assert_unchanged,
    bits,
    build,
    check,
    plain,
    rising,
    run,
    shuffled,
    snapshot,
    tensors_of,
    written,
)
from .method_rows import BASES, EVERY, PHASED, every
from .oracles import CLASSES, batches

CASES = int(os.environ.get("LTSAM_TEST_CASES", 0))
INF, NAN = float("inf"), float("nan")


def fuzzed(percent, sample):
    """So many percent of CASES; without, a sample that is always the same."""
    return hypothesis.settings(
        max_examples=int(CASES * percent / 100) + 1 if CASES else sample,
        derandomize=not CASES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )


GROUPS = {"rising": rising, "shuffled": shuffled}
SHAPES = (
    (0,),
    (1,),
    (),
    (7,),
    (13,),
    (5, 3),
    (2, 1, 33),
    (5, 3, 2, 4),
    (3, 0, 2),
    (1021,),
    (4099,),
    (16384,),
    (16411,),
)
FEW = 2000
"""Elements in all of a call's tensors of a role that Triton's interpreter, and a comparison of all addresses, get."""

OPTIONAL = {
    "grad_norm": ("kept_grads",),
    "grad_dots": (),
    "perturb_": ("original_params", "backups", "means", "mask"),
    "random_perturb_": ("original_params", "backups", "means", "mask"),
    "gaussian_perturb_": ("original_params", "backups"),
    "perturb_by_class_": (),
    "combine_": (),
    "restore_": (),
    "sgd_step_": ("backups", "kept_grads", "steps"),
    "adam_step_": ("backups", "kept_grads", "max_exp_avg_sqs"),
}
NEEDED = {
    "grad_norm": ("grads",),
    "grad_dots": ("grads", "other"),
    "perturb_": ("params", "grads"),
    "random_perturb_": ("params", "grads"),
    "gaussian_perturb_": ("params",),
    "perturb_by_class_": ("params", "class_grads"),
    "combine_": ("out", "grads", "kept_grads"),
    "restore_": ("params", "backups"),
    "sgd_step_": ("params", "grads"),
    "adam_step_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"),
}

# Zero, what is lost in fp32 or in its sums, what is usual, what overflows fp32 at once or when it is squared.
ANY = (0.0, 5e-324, 1e-42, 1e-12, 1e-3, 0.05, 0.5, 1.0, 3.0, 1e10, 1e25, 3.5e38, 1e300)
SHARES = (0.0, 1e-12, 0.5, 0.9, 0.999, 1 - 2.0**-53)
FLAGS = (False, True)
VALUES = {name: ANY for op in OPS.values() for name in op.hyper} | {
    "adaptive": FLAGS,
    "decay": (*SHARES, 1.0, 3.0),
    "probability": (0.0, 1e-6, 0.25, 0.999999, 1.0),
    "stochastic": FLAGS,
    "seed": (0, 1, 2**32, 2**53 - 1),
    "step": (0, 3, 2**31, 2**32 - 1),
    "momentum": SHARES,
    "beta1": SHARES,
    "beta2": SHARES,
    "dampening": (0.0, 0.5, 1.0, -1.0, 1e10, -1e300),
    "nesterov": FLAGS,
    "maximize": FLAGS,
    "decoupled": FLAGS,
}
FOR_ALL = ("stochastic", "seed", "step")
"""Hyperparameters that groups have in common."""
BAD = (-1.5, NAN, INF, -INF, "0.1", None)

NORMS = (0.0, 1e-42, 1e-3, 1.0, 3.0, 1e30, INF, NAN)
SCALES = (1.0, 1024.0, 65536.0, 1e-30, 3e38)
COMBINATIONS = ((1.0, 1.0, 0.0, 0.0), (0.7, -0.4, 0.3, 1.5), (0.0, 0.0, 0.0, 0.0), (1e30, -1e-30, 0.0, 1.0))

NOT_TINY = ("normal", "zeros", "huge", "not finite")  # Triton's interpreter knows no tiny bf16
CONTENTS = (*NOT_TINY, "tiny", "all sizes")


def rescaled(tensor, content, generator):
    """Fills a tensor of numbers from N(0, 1) with other ones."""
    limits = torch.finfo(tensor.dtype)
    if content == "zeros":
        tensor.zero_()
    elif content == "tiny":
        tensor.mul_(limits.tiny)
    elif content == "huge":
        tensor.mul_(limits.max / 8)
    elif content == "all sizes":
        low, high = np.log2(limits.tiny), np.log2(limits.max) - 3
        exponents = low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=F64)
        tensor.mul_(exponents.exp2().to(tensor.dtype))
    elif content == "not finite":
        chosen = torch.randint(0, 9, tensor.shape, generator=generator)
        for i, bad in enumerate((INF, -INF, NAN)):
            tensor[chosen == i] = bad


@dataclass(frozen=True)
class Call:
    """A call of an op, by plain values alone: what hypothesis prints can be pasted."""

    lists: str
    values: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ((7,),)
    groups: str | None = None
    missing: bool = False
    holes: int = 0
    """Every so many-th entry of what may be absent is."""
    kind: str = "fp32"
    layout: str = "contiguous"
    offsets: Any = False
    contents: tuple[str, ...] = ("normal",)
    """Of the roles in turn."""
    twists: tuple[tuple[str, int, int, int, int], ...] = ()
    """How memory is shared: see twist()."""
    threads: int = 1
    fresh: int = 1
    """Every so many-th tensor is another one than the call's before."""
    seed: int = 0

    def case(self, op):
        values = self.values | ({"groups": GROUPS[self.groups]} if self.groups else {})
        return Case(op, "fuzzed", self.lists, values, self.missing)

    def made(self, op, before):
        """The arguments; ``before``: those of the table's call before."""
        generator = torch.Generator().manual_seed(self.seed)
        call = build(self.case(op), generator, "cpu", self.shapes, self.kind, self.layout, self.offsets)
        for number, (name, one) in enumerate(call.items()):
            if not isinstance(one, list) or name in ("groups", "mask", "steps") or not isinstance(one[:1], list):
                continue
            for i, tensor in enumerate(one):
                if not isinstance(tensor, torch.Tensor):
                    continue
                if not (name == "backups" and "perturb" in op):
                    rescaled(tensor, self.contents[(number + i) % len(self.contents)], generator)
                    if name.endswith("_sqs"):
                        tensor.abs_()
                if self.holes and i % self.holes == 0 and name in ("means", "mask", "max_exp_avg_sqs", "kept_grads"):
                    one[i] = None
                old = (before.get(name) or [])[i : i + 1]
                if old and isinstance(old[0], torch.Tensor) and i % self.fresh and not self.twists:
                    if (old[0].dtype, old[0].shape) == (tensor.dtype, tensor.shape):
                        one[i] = old[0]
        for what in self.twists:
            twist(call, OPS[op], *what)
        return call


TWISTS = ("the same", "shifted", "expanded", "overlapping", "interleaved", "of one storage", "a parameter", "unaligned")


def twist(call, op, what, role, row, other_role, other_row):
    """Puts a tensor in memory that others, or its own elements, may share."""
    names = [name for name in op.arguments if isinstance(call.get(name), list) and name not in ("mask", "steps")]
    name, other_name = names[role % len(names)], names[other_role % len(names)]
    if not call[name]:
        return
    row, other_row = row % len(call[name]), other_row % len(call[name])
    tensor, other = call[name][row], call[other_name][other_row]
    if tensor is None or other is None:
        return
    shape, count = tensor.shape, tensor.numel()
    if what == "the same":
        if other.shape == shape:
            call[name][row] = other
    elif what == "shifted":
        if other.shape == shape and count:
            memory = torch.cat([other.reshape(-1), other.reshape(-1)[:1]]).abs()  # squares it may be
            call[other_name][other_row] = memory[:-1].view(shape)
            call[name][row] = memory[1:].view(shape)
    elif what == "expanded":
        if count:
            call[name][row] = tensor.reshape(-1)[0].clone().expand(shape)
    elif what == "overlapping":
        call[name][row] = tensor.new_zeros(count + 1).as_strided(shape, [1] * len(shape))
    elif what == "interleaved":
        if other.shape == shape and (name, row) != (other_name, other_row):
            memory = torch.stack([tensor.reshape(-1), other.to(tensor.dtype).reshape(-1)], 1)
            call[name][row], call[other_name][other_row] = (memory[:, i].view(shape) for i in (0, 1))
    elif what == "of one storage":
        present = [(i, one) for i, one in enumerate(call[name]) if one is not None and one.dtype == tensor.dtype]
        memory = torch.cat([one.reshape(-1) for _, one in present])
        for (i, _), part in zip(present, memory.split([one.numel() for _, one in present]), strict=True):
            call[name][i] = part.view(call[name][i].shape)
    elif what == "a parameter":
        call[name][row] = torch.nn.Parameter(tensor)
    elif what == "unaligned":
        call[name][row] = unaligned(tensor)


def unaligned(tensor):
    """A copy between the places for numbers of its type."""
    if not tensor.numel():
        return tensor
    memory = np.zeros((tensor.numel() + 1) * tensor.element_size(), np.uint8)
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1).view(tensor.shape).copy_(tensor)


def places(tensor):
    """The address of each element."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return tensor.data_ptr() + offsets.ravel() * tensor.element_size()


def shares_memory(call, op):
    """Whether something that is written lies where another tensor, or another of its elements, does."""
    arrays, writes = [], []
    for role, name in enumerate(op.arguments):
        for row, tensor in enumerate(call.get(name) or []):
            if tensor is None or not tensor.numel():
                continue
            first = call[op.arguments[0]][row]
            read_only = role and name not in written(op)
            if read_only and first is not None and (tensor.data_ptr(), tensor.dtype) == (first.data_ptr(), first.dtype):
                continue  # elements are read before they are written
            arrays.append((places(tensor)[:, None] + np.arange(tensor.element_size())).ravel())
            writes.append(np.full(len(arrays[-1]), name in written(op)))
    if not arrays:
        return False
    addresses, places_of, counts = np.unique(np.concatenate(arrays), return_inverse=True, return_counts=True)
    return bool((np.concatenate(writes) & (counts[places_of] > 1)).any())


def is_bad(op, call):
    """Whether a hyperparameter is none."""
    return any(call.values.get(name, 0) is one for name in op.hyper for one in BAD[name == "dampening" :])


ABSOLUTE = {"lr": lambda x: -x, "dampening": lambda x: -abs(x), "maximize": lambda _: False}


def absolute(name, value):
    """An argument that adds where the original one subtracts; what is not finite needs no tolerance."""
    if isinstance(value, list) and name != "groups":
        return [absolute(name, one) for one in value]
    if isinstance(value, torch.Tensor):
        return value if name in ("mask", "steps", "found_inf") else value.abs().nan_to_num(0.0, 0.0)
    return ABSOLUTE.get(name, lambda x: x)(value)


def agree(case, call, table):
    """Checks a call; the absolute tolerance is for what the terms of a sum come to if none cancels."""
    terms = run(reference, case, {name: absolute(name, value) for name, value in plain(call, double=True).items()})
    sizes = {name: tensor.double().abs().flatten().nan_to_num(INF, INF) for name, tensor in tensors_of(terms)}
    check(case, call, lambda name, _: sizes[name], placed=False, table=table)


def fuzz(op, backend, calls):
    table, before, threads, twisted = TensorTable(OPS[op]), {}, torch.get_num_threads(), False
    try:
        for one in calls:
            torch.set_num_threads(one.threads)
            call, case = one.made(op, before), one.case(op)
            twisted |= bool(one.twists)  # the next call may go on with the same tensors
            with lf.use_backend(backend):
                if not (is_bad(OPS[op], one) or (twisted and shares_memory(call, OPS[op]))):
                    agree(case, call, table)
                else:
                    old = snapshot(call)
                    with pytest.raises((TypeError, ValueError)) as raised:
                        run(ops, case, call, table=table)
                    assert len(str(raised.value).splitlines()) == 1
                    assert_unchanged(old)
            before = call
    finally:
        torch.set_num_threads(threads)


# The interpreter of "triton" takes long.
OFTEN = [name for name in ("cpu", "torch") * 4 + ("triton",) if name in lf.backends()]
if torch.cuda.is_available():
    OFTEN.remove("triton")
SIGNALS = {
    "norm": NORMS,
    "grad_scale": SCALES,
    "found_inf": (0.0, 1.0),
    "combination": COMBINATIONS,
    "skipped": (0.0, 2.0),
}
SIGNALS_OF = {
    "grad_norm": ("found_inf", "combination"),
    "perturb_": ("grad_scale", "found_inf", "combination"),
    "random_perturb_": ("grad_scale", "found_inf", "combination", "skipped"),
    "gaussian_perturb_": ("skipped",),
    "combine_": ("found_inf",),
    "sgd_step_": ("grad_scale", "found_inf", "combination"),
    "adam_step_": ("grad_scale", "found_inf", "combination"),
}
ALWAYS = {
    "grad_norm": {},
    "perturb_": {"rho": 0.05, "norm": 1.0},
    "random_perturb_": {"rho": 0.05, "norm": 1.0, "seed": 0},
    "gaussian_perturb_": {"amplitude": 0.05},
    "perturb_by_class_": {"scales": 0.5},
    "combine_": {"combination": COMBINATIONS[0]},
    "sgd_step_": {"lr": 0.1},
    "adam_step_": {"lr": 0.1},
}


@st.composite
def one_call(draw, op, few):
    def often(values):
        return draw(st.sampled_from(values))

    twists = tuple(
        (often(TWISTS), *(draw(st.integers(0, 5)) for _ in range(4))) for _ in range(often((0, 0, 0, 1, 1, 2)))
    )
    limit = FEW if few or twists else 20 * FEW
    palette = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    shapes, total = [], 0
    for i in range(often((1, 0, 2, 3, 6, 20, 300))):
        shape = palette[i % len(palette)]
        total += torch.Size(shape).numel()
        if total > limit:
            break
        shapes.append(shape)
    groups = often((None, *GROUPS)) if OPS[op].hyper else None
    hyper = {name: VALUES[name] for name in OPS[op].hyper}
    values = {}
    for name, choices in (hyper | {name: SIGNALS[name] for name in SIGNALS_OF.get(op, ())}).items():
        usual = ALWAYS.get(op, {}).get(name)
        if usual is None and not draw(st.booleans()):
            continue
        by_group = groups and name in hyper and name not in FOR_ALL and draw(st.booleans())
        values[name] = [often(choices) for _ in range(3)] if by_group else often(choices)
    values = ALWAYS.get(op, {}) | values
    lists = [*NEEDED[op], *(name for name in OPTIONAL[op] if draw(st.booleans()))]
    if op == "grad_norm":
        if groups and draw(st.booleans()):
            values["per_group"] = True
        if values.get("adaptive"):
            lists.append("params")
        if "kept_grads" not in lists:
            values.pop("combination", None)
    if values.get("momentum"):
        lists.append("momentum_buffers")
    if values.get("max_norm"):
        values["norm"] = often(NORMS)
    if "norm" in values:
        values["norm"] = often(NORMS)
    if hyper and draw(st.integers(0, 19)) == 19:
        values[often(tuple(name for name in hyper))] = often(BAD)
    return Call(
        " ".join(lists),
        values,
        tuple(shapes),
        groups,
        draw(st.booleans()),
        often((0, 1, 2)),
        often(tuple(KINDS)),
        often((*LAYOUTS, "mixed")),
        often((False, True, "mixed")),
        tuple(draw(st.lists(st.sampled_from(NOT_TINY if few else CONTENTS), min_size=1, max_size=3))),
        twists,
        often((1, 2, 3)),
        often((1, 2, 3)),
        draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("op", OPS)
@hypothesis.given(data=st.data())
@fuzzed(7, 20)
def test_ops(op, data):
    backend = data.draw(st.sampled_from(OFTEN), "backend")
    calls = data.draw(st.lists(one_call(op, backend == "triton"), min_size=1, max_size=3), "calls")
    fuzz(op, backend, calls)


@pytest.mark.skipif(not CASES, reason="gigabytes, and seconds each: make fuzz runs them")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_more_elements_than_fp32_can_count(case, kind, generator):
    with lf.use_backend(OFTEN[0]):
        check(case, build(case, generator, shapes=((2**24 + 3,),), kind=kind))


FOUND = {
    "elements of one tensor overlap": (
        "restore_",
        Call("params backups", {}, ((5, 3),), twists=(("overlapping", 0, 0, 0, 0),)),
    ),
    "between the places for numbers": ("restore_", Call("params backups", {}, twists=(("unaligned", 0, 0, 0, 0),))),
    "clipped beyond fp32": ("gaussian_perturb_", Call("params", {"amplitude": 1.0, "clip": 3.5e38})),
    "clipped to a norm that is none": (
        "adam_step_",
        Call("params grads exp_avgs exp_avg_sqs steps", {"lr": 0.1, "max_norm": 1.0, "norm": NAN}),
    ),
    "clipped to a norm that is none, by SGD": (
        "sgd_step_",
        Call("params grads", {"lr": 0.1, "max_norm": [1.0, 0.0, 2.0], "norm": NAN}, groups="rising"),
    ),
    "means that are not finite and do not count": (
        "random_perturb_",
        Call("params grads means", {"rho": 0.1, "norm": 1.0, "seed": 0}, contents=("normal", "normal", "not finite")),
    ),
    "weights without decay that are not finite": (
        "adam_step_",
        Call("params grads exp_avgs exp_avg_sqs steps", {"lr": 0.1, "decoupled": True}, contents=("not finite",)),
    ),
    "nesterov without momentum": (
        "sgd_step_",
        Call("params grads", {"lr": 0.1, "nesterov": True}, ((13,),), contents=("not finite",)),
    ),
    "a largest square that is none": (
        "adam_step_",
        Call(
            "params grads exp_avgs exp_avg_sqs steps max_exp_avg_sqs", {"lr": 0.1}, ((13,),), contents=("not finite",)
        ),
    ),
    "means that take little in": (
        "perturb_",
        Call("params grads means", {"rho": 0.0, "norm": 1.0, "decay": 0.9999}, ((1021,),)),
    ),
    "momentum that takes little in": (
        "sgd_step_",
        Call("params grads momentum_buffers", {"lr": 0.1, "momentum": 0.5, "dampening": 0.9999}, ((1021,),)),
    ),
    "rounded at random where a unit is subnormal": (
        "random_perturb_",
        Call(
            "params grads",
            {"rho": 0.0, "norm": 0.0, "seed": 0, "stochastic": True},
            ((1,),),
            kind="bf16",
            contents=("tiny",),
        ),
    ),
    "weights with a decay that is zero in fp32 and that are not finite": (
        "sgd_step_",
        Call(
            "params grads momentum_buffers",
            {"lr": 0.1, "momentum": 0.5, "weight_decay": 5e-324},
            ((13,),),
            contents=("not finite", "normal", "normal"),
        ),
    ),
    "weights with a decay that is zero in fp32 and that are not finite, by Adam": (
        "adam_step_",
        Call(
            "params grads exp_avgs exp_avg_sqs steps",
            {"lr": 0.1, "weight_decay": 5e-324},
            ((13,),),
            contents=("not finite", "normal", "normal", "normal"),
        ),
    ),
    "a share and a scale whose product is none": (
        "sgd_step_",
        Call(
            "params grads momentum_buffers",
            {"lr": 0.0, "momentum": 1e-12, "max_norm": 5e-324, "grad_scale": 1024.0, "norm": 0.0},
            ((0,), (1,)),
            kind="fp64",
            contents=("all sizes",),
        ),
    ),
    "a share and a scale whose product is zero": (
        "adam_step_",
        Call(
            "params grads exp_avgs exp_avg_sqs steps",
            {"lr": 0.0, "max_norm": 5e-324, "grad_scale": 3e38, "norm": 0.0},
            ((1,),),
            kind="fp64",
            contents=("not finite",),
        ),
    ),
}
"""What was found and mended: ops, and the calls one after the other that share a table."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, backend):
    op, *calls = FOUND[name]
    fuzz(op, backend, calls)


# --- cross entropies

VECTORS = {
    "scale": (1.0, 0.0, 30.0),
    "shift": (0.0, -1.0, 1e4),
    "margin": (0.0, 0.5, 1e4),
    "weight": (1.0, 0.0, 1e-30),
    "spread": (0.0, 1.0),
}
LOGITS = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.T.contiguous().T,
    "sliced": lambda z: torch.stack([z, z], 2)[:, :, 1],
    "expanded": lambda z: z[:1].expand(z.shape),
    "unaligned": lambda z: unaligned(z),
}


def cross_entropies(module, logits, targets, cotangent, vectors, numbers):
    """The losses and their gradient."""
    logits = logits.detach().requires_grad_()
    losses = module.adjusted_cross_entropy(logits, targets, **vectors, **numbers)
    (grad,) = torch.autograd.grad((losses * cotangent.to(losses)).sum(), logits)
    return losses.detach(), grad


@hypothesis.given(
    backend=st.sampled_from(OFTEN),
    rows=st.sampled_from((1, 0, 3, 70)),
    classes=st.sampled_from((2, 1, 16, 17, 65, 1025)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(tuple(LOGITS)),
    size=st.sampled_from((1.0, 0.0, 1e-30, 100.0, 1e4)),
    chosen=st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VECTORS.items()}),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    gamma=st.sampled_from((0.0, 1e-3, 2.0, 30.0)),
    detach=st.booleans(),
    seed=st.integers(0, 2**16),
)
@fuzzed(10, 60)
def test_cross_entropies(backend, rows, classes, dtype, layout, size, chosen, label_smoothing, gamma, detach, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS[layout]((size * torch.randn(rows, classes, generator=generator, dtype=F64)).to(dtype))
    targets, cotangent = torch.randint(classes, (rows,), generator=generator), torch.randn(rows, generator=generator)
    vectors = {name: value * torch.rand(classes, generator=generator) for name, value in chosen.items()}
    largest = 1 + max(float(one.abs().max()) for one in (*vectors.values(), logits, torch.zeros(1)) if one.numel())
    if "spread" in vectors:
        vectors["draw"] = torch.tensor(seed)
    numbers = {"label_smoothing": label_smoothing, "gamma": 0.0 if label_smoothing else gamma, "detach": detach}
    wide = {name: one if name == "draw" else one.double() for name, one in vectors.items()}
    exact = cross_entropies(reference, logits.double(), targets, cotangent, wide, numbers)
    working = cross_entropies(reference, logits, targets, cotangent, vectors, numbers)
    with lf.use_backend(backend):
        ours = cross_entropies(ops, logits, targets, cotangent, vectors, numbers)
    for one, plainly, truth in zip(ours, working, exact, strict=True):
        assert_as_good(one, plainly, truth, TOLERANCES[one.dtype], scale=31 * largest)


# --- optimizers


class Odd(torch.nn.Module):
    """Logits to which each parameter, of whatever shape, adds the sine of a weighted sum of its elements' sines."""

    def __init__(self, tensors, unused=0):
        super().__init__()
        self.all = torch.nn.ParameterList(torch.nn.Parameter(tensor) for tensor in tensors)
        self.used = [i + 1 == len(tensors) or not unused or i % unused > 0 for i in range(len(tensors))]

    def forward(self, x):
        z = torch.zeros_like(x[:, :CLASSES])
        for i, param in enumerate(self.all):
            if self.used[i]:
                factors = torch.arange(param.numel(), dtype=F64).add(i + 1).cos().view(param.shape)
                total = (factors * param.double().sin()).sum() / max(param.numel(), 1) ** 0.5
                z = z + (total + i).sin() * x.roll(i, 1)[:, :CLASSES]
        return z


@dataclass(frozen=True)
class Training:
    """A few steps of an optimizer, by plain values alone."""

    method: str
    base: str
    interface: str = "closure"
    shapes: tuple[tuple[int, ...], ...] = ((7,),)
    kind: str = "fp64"
    layout: str = "contiguous"
    groups: tuple[dict[str, Any], ...] = ({},)
    options: dict[str, Any] = field(default_factory=dict)
    unused: int = 0
    twists: tuple[tuple[str, int, int, int, int], ...] = ()
    seed: int = 0

    def split(self, params):
        """The groups: so many runs of parameters; some may be empty."""
        parts = np.array_split(np.arange(len(params)), len(self.groups))
        return [{"params": [params[i] for i in part], **group} for part, group in zip(parts, self.groups, strict=True)]


def train(backend, given):
    """Compares the weights with those of the method's oracle, in fp64."""
    generator = torch.Generator().manual_seed(given.seed)
    case = Case("restore_", "fuzzed", "params")
    call = build(case, generator, "cpu", given.shapes, given.kind, given.layout, offsets=True)
    for what in given.twists:
        twist(call, OPS["restore_"], *what)
    shared = shares_memory(call, OPS["restore_"])
    model = Odd([tensor.detach() for tensor in call["params"]], given.unused)
    exact = Odd([param.detach().double().clone() for param in model.parameters()], given.unused)
    row = EVERY[given.method].of(given.interface).having(**given.options)
    data, (base, options) = batches(steps=3), BASES[given.base]
    with lf.use_backend(backend):
        opt = row.make(model, base, given.split(list(model.all)), **options)
        if shared:
            old = [bits(param).clone() for param in model.all]
            with pytest.raises(ValueError, match="share memory") as raised:
                row.drive(given.interface, opt, model, data)
            assert len(str(raised.value).splitlines()) == 1
            assert all(torch.equal(bits(param), before) for param, before in zip(model.all, old, strict=True))
            return
        found = row.drive(given.interface, opt, model, data)
    expected, _ = row.expected(base, options, data, lambda of: given.split(list(of.all)), exact)
    if expected.isfinite().all():
        assert (found - expected).norm() <= NEAR[given.kind] * (1 + expected.norm())


NEAR = {"fp64": 1e-9, "fp32": 2e-4, "a role is fp64": 2e-4, "tensors differ": 0.05, "bf16": 0.05, "fp16": 0.01}
SIXTEEN = ("tensors differ", "bf16", "fp16")  # in which the squares that torch's other optimizers keep are lost
LIMITS = {
    "FocalSAM": {"gamma": (0.0, 30.0), "lam": (0.0, 1.1)},
    "ImbSAM": {"eta": (0, 10**9), "tail_weight": (0.0, 2.0)},
    "SSESAM": {"eta": (0, 10**9), "tail_rho": (0.0, 3.0), "switch_step": (0, 1)},
    "CCSAM": {"noise_ratio": (0.0, 1.0), "flat_ratio": (0.0, 1.0)},
    "FriendlySAM": {"sigma": (0.0, 2.0), "lmbda": (0.0, 0.999)},
    "MicroBatchSAM": {"m": (1, 16, 100)},
    "SparseSAM": {"sparsity": (0.0, 0.99), "num_samples": (1, 100), "refresh_every": (1, 2)},
    "ESAM": {"gamma": (1e-3, 1.0)},
    "LookSAM": {"k": (1, 2), "alpha": (0.0, 2.0)},
    "GSAM": {"alpha": (0.0, 2.0)},
    "WSAM": {"gamma": (0.0, 0.99), "decouple": FLAGS},
    "TailMomentumSAM": {"gamma": (0.0, 30.0), "lam": (0.0, 1.1), "decay": (0.0, 0.999)},
    "VaSSO": {"theta": (0.0, 1.0)},
}


@st.composite
def training(draw, name):
    def often(values):
        return draw(st.sampled_from(values))

    interface = often(("closure", "phases")) if name in PHASED else "closure"
    chosen = {key: often(values) for key, values in LIMITS.get(name, {}).items() if draw(st.booleans())}
    row, twisted = EVERY[name], draw(st.integers(0, 3)) == 3
    palette = draw(st.lists(st.sampled_from(SHAPES[:-3]), min_size=1, max_size=4))
    shapes = tuple(palette[i % len(palette)] for i in range(often((1, 2, 3, 6, 40))))
    if name == "LookSAM":
        shapes += ((13,),)  # in one dimension nothing is left across the gradient
    kind = "fp64" if name in ("SparseSAM", "ESAM") else often(tuple(NEAR))  # they choose elements, or samples
    groups = []
    for _ in range(often((1, 2, 3))):
        group = {"lr": (0.0, 0.01, 0.1), "weight_decay": (0.0, 0.01)}
        if name != "CCSAM":
            group["rho"] = (0.05, 3.0) if name == "LookSAM" else (0.0, 1e-12, 0.05, 3.0)
        if row.adaptive:
            group["adaptive"] = FLAGS
        if row.adaptive and "eta" not in row.options:  # where it is not what makes a class tail
            group["eta"] = (0.0, 0.01)
        groups.append({key: often(values) for key, values in group.items() if draw(st.booleans())})
    return Training(
        name,
        often(("sgd", "momentum", "nesterov", "maximize") if kind in SIXTEEN else tuple(BASES)),
        interface,
        shapes,
        kind,
        often((*LAYOUTS, "mixed")),
        tuple(groups),
        {key: value for key, value in chosen.items() if key not in row.in_phases or interface == "closure"},
        0 if twisted else often((0, 2, 3)),
        tuple((often(TWISTS), *(draw(st.integers(0, 5)) for _ in range(4))) for _ in range(twisted)),
        draw(st.integers(0, 2**16)),
    )


@every
@hypothesis.given(data=st.data())
@fuzzed(1.25, 5)
def test_optimizers(name, data):
    train(data.draw(st.sampled_from(OFTEN[:2]), "backend"), data.draw(training(name), "training"))


FOUND_TRAININGS = (
    Training(
        "ImbSAM", "sgd", shapes=((1,),), groups=({"weight_decay": 0.01},), options={"eta": 10**9, "tail_weight": 0.0}
    ),
    Training("CCSAM", "sgd", twists=(("expanded", 0, 0, 0, 0),)),
    Training("MomentumSAM", "rmsprop", twists=(("expanded", 0, 0, 0, 0),)),
    Training("TailMomentumSAM", "rmsprop", shapes=((1,), (1,)), twists=(("the same", 0, 0, 0, 1),)),
)


@pytest.mark.parametrize("given", FOUND_TRAININGS, ids=lambda given: given.method)
def test_trainings_that_were_found(given):
    train(OFTEN[0], given)
