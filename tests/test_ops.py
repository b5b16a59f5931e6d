"""Every op on every backend: as near to fp64 as the reference implementation is; bit for bit where that is promised."""

import importlib
import inspect
import math
import os

import pytest
import torch

from ltsam_fast import backend as backends
from ltsam_fast import ops, reference
from ltsam_fast.launch_args import CHUNK
from ltsam_fast.ops import OPS

from .cases import (
    BF16,
    BIG_SHAPES,
    BY_NAME,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    FEW_SHAPES,
    KINDS,
    LAYOUTS,
    RICHEST,
    SHAPES,
    TOLERANCES,
    Tolerance,
    assert_as_good,
    assert_same_bits,
    assert_surroundings_untouched,
    build,
    check,
    place,
    plain,
    run,
    tensors_of,
)

HUGE = bool(os.environ.get("LTSAM_TEST_HUGE"))


def interpreted(backend, device):
    return backend == "triton" and device == "cpu"


# --- the helpers themselves


@pytest.mark.parametrize("wrong", [1.001, -1.0, math.nan, math.inf])
def test_a_single_wrong_element_fails(wrong):
    right = torch.ones(100)
    ours = right.clone()
    ours[41] = wrong
    with pytest.raises(AssertionError, match="1 of 100 elements are off, the worst is 41"):
        assert_as_good(ours, right, right.double(), TOLERANCES[F32])
    with pytest.raises(AssertionError, match="1 elements differ, the first is 41"):
        assert_same_bits(ours, right)
    assert_as_good(right, right, right.double(), TOLERANCES[F32])
    assert_same_bits(right, right.clone())


def test_the_references_error_is_allowed_and_no_more():
    exact, working = torch.zeros(3, dtype=F64), torch.tensor([0.0, 0.5, math.inf])
    assert_as_good(torch.tensor([0.0, -0.5, math.inf]), working, exact, Tolerance(0.0, 0.0))
    assert_as_good(torch.tensor([0.0, 0.5, math.nan]), working, torch.tensor([0.0, 0.5, math.nan]), Tolerance(0.0, 0.0))
    for ours in ([0.0, 0.6, math.inf], [1e-7, 0.5, math.inf], [0.0, 0.5, -math.inf]):
        with pytest.raises(AssertionError, match="the worst is"):
            assert_as_good(torch.tensor(ours), working, exact, Tolerance(0.0, 0.0))
    with pytest.raises(AssertionError, match="float64, not torch.float32"):
        assert_as_good(working.double(), working, exact, Tolerance(1.0, 1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_beside_a_tensor_fails(layout, generator):
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator)
        tensor = place(values, layout, offset=3)
        assert torch.equal(tensor, values)
        assert_surroundings_untouched(tensor)
        whole = torch.tensor([]).set_(tensor.untyped_storage())
        whole[18] = 0.0
        with pytest.raises(AssertionError, match="memory around"):
            assert_surroundings_untouched(tensor)


# --- one list of ops


def test_every_module_has_the_same_ops():
    assert set(ops.__all__) == {
        name for name, f in vars(reference).items() if inspect.isfunction(f) and not name.startswith("_")
    }
    assert {case.op for case in CASES} == {case.op for case in RICHEST} == set(OPS)
    for name in ops.__all__:
        parameters = inspect.signature(getattr(ops, name)).parameters
        references = inspect.signature(getattr(reference, name)).parameters
        ours = {key: (p.kind, p.default) for key, p in parameters.items() if key != "table"}
        assert ours == {key: (p.kind, p.default) for key, p in references.items() if key != "numbers"}, name
    for op in OPS.values():
        function = getattr(ops, op.name.removeprefix("random_"))
        assert {*op.arguments, *op.hyper} <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_has_the_ops(name):
    try:
        module = importlib.import_module(backends._MODULES[name])
    except ImportError as error:
        pytest.skip(str(error))
    assert all(callable(getattr(module, op)) for op in (*OPS, "cross_entropy"))
    assert module.CAPTURABLE is (name != "torch")
    if name in ("cpu", "cuda"):
        assert module.SIGNATURES == {op.name: (op.roles, op.hyper) for op in OPS.values()}
        assert module.CHUNK == CHUNK


# --- ops x backends x cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_the_reference(case, kind, backend, device, generator):
    mixed = kind in ("roles differ", "a role is fp64")
    if backend == "triton" and device == "cuda" and mixed and case not in RICHEST:
        pytest.skip("triton: each mixture of types is one more kernel to compile: the richest calls have to do")
    check(case, build(case, generator, device, SHAPES, kind))


@pytest.mark.parametrize("kind", ["fp32", "tensors differ", "roles differ"])
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "mixed"])
@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_elements_that_lie_otherwise(case, layout, kind, backend, device, generator):
    shapes = FEW_SHAPES if interpreted(backend, device) else SHAPES + FEW_SHAPES
    check(case, build(case, generator, device, shapes, kind, layout))


@pytest.mark.parametrize("offsets", ["alike", "mixed"])
@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_every_offset(case, kind, offsets, backend, device, generator):
    check(case, build(case, generator, device, [(1100 + i,) for i in range(16)], kind, offsets=offsets))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_a_million_elements(case, kind, backend, device, generator):
    if interpreted(backend, device):
        pytest.skip("triton: the interpreter takes 0.6 ms for each of 64 chunks")
    check(case, build(case, generator, device, BIG_SHAPES, kind))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tensors(case, backend, device, generator):
    if not isinstance(case.values.get("lr", 0.0), list):
        check(case, build(case, generator, device, ()))


@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("case", RICHEST[1:], ids=str)
def test_every_offset_with_streaming_stores(case, kind, generator):
    """A pass over more than the last cache holds stores past the caches, which only aligned stores can."""
    if reason := backends.why_not("cpu"):
        pytest.skip(f"cpu: {reason}")
    cache = max(os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0, 32 << 20)
    if cache > 1 << 30:
        pytest.skip("cpu: a pass over the last cache's size would need gigabytes")
    call = build(case, generator, shapes=[(1100 + i,) for i in range(16)], kind=kind, offsets="mixed")
    expected = run(ops, case, plain(call))
    op = OPS[case.op]
    role_of = {
        name: role
        for name, role in zip(op.arguments, op.roles, strict=True)
        if call.get(name) is not None and name not in ("steps", "mask")
    }
    dtype = F64 if kind == "fp64" else F32
    moved = dtype.itemsize * sum((role in op.reads) + (role in op.writes) for role in role_of.values())
    filler = torch.zeros(cache // moved + CHUNK, dtype=dtype)
    for name, role in role_of.items():
        call[name].append(filler.clone() if role in op.writes else filler)
    if "steps" in call:
        call["steps"].append(torch.zeros(()))
    if "mask" in call:
        call["mask"].append(torch.zeros(-(-len(filler) // 8), dtype=torch.uint8))
    if "scales" in call:
        call["scales"] = torch.cat([call["scales"], torch.zeros(1)])
    run(ops, case, call)
    for name in role_of:
        for tensor, other in zip(call[name], expected[name], strict=False):
            assert_same_bits(tensor, other, name)
            assert_surroundings_untouched(tensor)


# --- the same bits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_input_same_bits(case, backend, device, generator):
    shapes = (*SHAPES, (70000,)) if not interpreted(backend, device) else FEW_SHAPES
    call = build(case, generator, device, shapes, "tensors differ")
    first, second = (run(ops, case, plain(call)) for _ in range(2))
    for (name, one), (_, other) in zip(tensors_of(first), tensors_of(second), strict=True):
        assert_same_bits(one, other, name)


@pytest.mark.parametrize("case", [*RICHEST, BY_NAME["grad_norm per group shuffled"]], ids=str)
def test_same_bits_for_any_number_of_threads(case, generator, threads):
    reason = backends.why_not("cpu")
    if reason:
        pytest.skip(f"cpu: {reason}")
    call = build(case, generator, shapes=((300001,), (0,), (7,), *[(40000,)] * 5), kind="tensors differ")
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(ops, case, plain(call)))
    for other in results[1:]:
        for (name, one), (_, two) in zip(tensors_of(results[0]), tensors_of(other), strict=True):
            assert_same_bits(one, two, name)


def test_focal_cross_entropy_same_bits_for_any_number_of_threads(generator, threads):
    logits, targets = torch.randn(513, 1025, generator=generator), torch.randint(1025, (513,), generator=generator)
    v = torch.rand(1025, generator=generator)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.focal_cross_entropy(logits, targets, v))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


BIT_PATTERNS = {
    BF16: torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16),
    F16: torch.arange(-(2**15), 2**15, dtype=torch.int16).view(F16),
    F32: (torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65537).view(F32),
    F64: (torch.arange(-(2**15), 2**15, dtype=torch.int64) * 281479271743489).view(F64),
}


def assert_copied(copied, source, backend):
    if backend == "triton":  # it widens and narrows: a NaN stays one, but which? And its interpreter knows no tiny bf16
        assert torch.equal(copied.isnan(), source.isnan())
        lost = source.isnan() | ((source.abs() < torch.finfo(BF16).tiny) & (source.dtype == BF16))
        copied, source = (torch.where(lost, 0, tensor) for tensor in (copied, source))
    assert_same_bits(copied, source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_the_bits_they_come_back(dtype, backend, device):
    old, gradient = BIT_PATTERNS[dtype].to(device), torch.full((65536,), math.nan, dtype=dtype, device=device)
    one, infinite = torch.ones((), device=device), torch.tensor(math.inf, device=device)
    for signals in ({"norm": infinite}, {"norm": one, "found_inf": one}):
        w, backup = old.clone(), torch.empty_like(old)
        ops.perturb_([w], [gradient], [backup], rho=0.1, **signals)
        assert_copied(w, old, backend)
        assert_copied(backup, old, backend)
    ops.restore_([w.fill_(1.0)], [backup])
    assert_copied(w, old, backend)
    m, step = old.clone(), torch.zeros((), device=device)
    options = {"momentum": 0.9, "momentum_buffers": [m], "steps": [step], "found_inf": one}
    ops.sgd_step_([w.fill_(1.0)], [gradient], lr=0.1, backups=[old.clone()], **options)
    assert_copied(w, old, backend)
    assert_copied(m, old, backend)
    assert step == 0


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_gives_no_scale_perturbs_nothing(dtype, norm, backend, device, generator):
    old = torch.randn(5000, generator=generator, dtype=F64).to(device, dtype)
    gradient = torch.zeros_like(old) if norm == 0 else old * math.nan
    w, backup = old.clone(), torch.empty_like(old)
    ops.perturb_([w], [gradient], [backup], torch.tensor(norm, device=device), rho=0.1, eps=0.0)
    assert_same_bits(w, old)
    assert_same_bits(backup, old)


@pytest.mark.parametrize("case", [case for case in CASES if case.values.get("found_inf") == 1.0], ids=str)
def test_overflow_restores_and_does_nothing_else(case, backend, device, generator):
    call = build(case, generator, device, kind="tensors differ")
    call["grads"][1] = torch.full_like(call["grads"][1], math.inf)
    before = plain(call)
    run(ops, case, call)
    for name, tensors in call.items():
        if isinstance(tensors, list):
            source = {"params": "backups", "backups": "params"}.get(name, name) if case.op != "perturb_" else name
            source = "params" if (case.op, name) == ("perturb_", "backups") else source
            if (case.op, name) == ("adam_step_", "backups") or (case.op, name) == ("sgd_step_", "backups"):
                source = "backups"
            for tensor, old in zip(tensors, before[source], strict=True):
                assert_same_bits(tensor, old, name)
