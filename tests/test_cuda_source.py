"""The CUDA core without a GPU: its kernels run on the host (see cuda_on_host), and what nvcc makes of them.

How they are launched: test_cuda_launch.py. Left to a real GPU: its driver, and speed.
"""

import pytest
import torch

from ltsam_fast import ops, reference
from ltsam_fast.launch_args import CHUNK
from ltsam_fast.ops import cross_entropy
from ltsam_fast.table import TensorTable

from . import machine_code
from .on_host import Core, chosen

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [0, 1, 7, 4095, 4097, 0, 16384, 16385, 100003, 0]
FEWER = [0, 1, 7, 4095, 4097, 0, 130, 9]
MIXED = (F32, BF16, F16, F32, F16, BF16, F32)
SPLIT = (F32, F64, BF16, F64, F16)  # the fp64 ones make a part of their own, where numbers have gaps
NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.fixture(scope="session")
def cpu():
    """The C++ core: it shares the functors, so whole tensors are compared bit by bit."""
    return pytest.importorskip("ltsam_fast._cpu", reason="the C++ core is not built")


@pytest.fixture
def on(monkeypatch):
    """on(backend)(op, ...): calls a public op and has this backend run it."""

    def on(backend, device=1, seed=1, live=False):
        def call(op, *arguments, **named):
            monkeypatch.setenv("LTSAM_HOST_DEVICE", str(device))
            monkeypatch.setenv("LTSAM_HOST_SEED", str(seed))
            if isinstance(backend, Core):
                with backend.serving(monkeypatch, live):
                    return getattr(ops, op)(*arguments, **named)
            with chosen(monkeypatch, backend):
                return getattr(ops, op)(*arguments, **named)

        return call

    return on


class Lists:
    """Lists of tensors for all roles, in buffers with something around each tensor that must stay."""

    def __init__(self, sizes, dtypes=(F32,), offsets=(0,)):
        self.sizes, self.dtypes, self.offsets = sizes, dtypes, offsets
        self.buffers, self.count = [], 0

    def new(self, positive=False):
        tensors = []
        for size in self.sizes:
            start = 16 + self.offsets[self.count % len(self.offsets)]  # 16 elements: a multiple of 16 bytes
            first = 64 + 7919 * self.count % (len(NOISE) - size - 128) - start
            values = NOISE[first : first + size + 64]
            buffer = (values.abs() if positive else values).to(self.dtypes[self.count % len(self.dtypes)], copy=True)
            tensors.append(buffer[start : start + size])
            self.buffers.append(buffer)
            self.count += 1
        return tensors

    def bitmaps(self):
        made = [
            NOISE[7 * i : 7 * i + -(-size // 8)].mul(1e9).long().to(torch.uint8) for i, size in enumerate(self.sizes)
        ]
        self.buffers += made
        return made

    def steps(self, first=0.0):
        steps = [torch.tensor(first + i % 3) for i in range(len(self.sizes))]
        self.buffers += steps
        return steps


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(cores, *arguments, **named):
    """Runs build(lists) -> (op, arguments, keywords) on equal inputs by every core; all buffers must end up equal."""
    build, *arguments = arguments
    results = []
    for call in cores:
        lists = Lists(*arguments, **named)
        op, positional, keywords = build(lists)
        before = [buffer.clone() for buffer in lists.buffers]
        returned = call(op, *positional, **keywords)
        results.append((lists.buffers, returned))
        changed = [not torch.equal(bits(x), bits(y)) for x, y in zip(before, lists.buffers, strict=True)]
        assert op == "grad_norm" or any(changed), "the op did nothing"
    for buffers, returned in results[1:]:
        for mine, theirs in zip(buffers, results[0][0], strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        if returned is not None:
            assert torch.equal(bits(returned), bits(results[0][1]))


def perturb(lists, **named):
    keywords = {"rho": 0.05, "norm": torch.tensor(3.7, dtype=ops_dtype(lists))} | named
    return "perturb_", (lists.new(), lists.new(), lists.new()), keywords


def perturb_all(lists, **named):
    """A perturbation with every role, anew from old weights."""
    combination = torch.tensor([0.5, -0.25, 0.0, 0.0], dtype=ops_dtype(lists))
    roles = {"original_params": lists.new(), "means": lists.new(), "mask": lists.bitmaps()}
    return perturb(lists, **roles, combination=combination, decay=0.9, grad_scale=scalar(4), **named)


def gaussian(lists, **named):
    return "gaussian_perturb_", (lists.new(), lists.new()), {"amplitude": 0.1, "seed": 2**40 + 3, "step": 5} | named


def by_class(lists):
    w, g = lists.new(), lists.new()
    scales = torch.linspace(-1, 1, len(w), dtype=ops_dtype(lists))[None]
    return "perturb_by_class_", (w, [g], scales), {}


def combine(lists):
    combination = torch.tensor([0.5, -0.25, 0.0, 0.0], dtype=ops_dtype(lists))
    return "combine_", (lists.new(), lists.new(), lists.new(), combination), {}


def restore(lists):
    return "restore_", (lists.new(), lists.new()), {}


def sgd(lists, *optional, **named):
    w, g = lists.new(), lists.new()
    made = {name: lists.steps() if name == "steps" else lists.new() for name in optional}
    return "sgd_step_", (w, g), {"lr": 0.1, "weight_decay": 5e-4} | made | named


def adam(lists, *optional, **named):
    w, g, m, v, steps = lists.new(), lists.new(), lists.new(), lists.new(positive=True), lists.steps(4.0)
    made = {name: lists.new(positive=name == "max_exp_avg_sqs") for name in optional}
    return "adam_step_", (w, g, m, v, steps), {"lr": 1e-3, "weight_decay": 1e-2} | made | named


def ops_dtype(lists):
    return F64 if F64 in lists.dtypes else F32


def scalar(value):
    return torch.tensor(float(value))


MAPS = {
    "perturb": perturb,
    "perturb adaptive": lambda x: perturb(x, adaptive=True, eta=0.01, grad_scale=scalar(512), found_inf=scalar(0)),
    "perturb means": lambda x: perturb(x, means=x.new(), combination=torch.ones(4, dtype=ops_dtype(x)), decay=0.5),
    "perturb mask": lambda x: perturb(x, mask=x.bitmaps()),
    "perturb all": perturb_all,
    "perturb random": lambda x: perturb(x, probability=0.6, stochastic=True, seed=7, step=2**31 + 1),
    "perturb random all": lambda x: perturb_all(x, probability=0.3, stochastic=True, seed=2**52 + 1),
    "gaussian": gaussian,
    "by class": by_class,
    "combine": combine,
    "restore": restore,
    "sgd": sgd,
    "sgd kept_grads": lambda x: sgd(x, "backups", "kept_grads", maximize=True),
    "sgd momentum": lambda x: sgd(x, "backups", "momentum_buffers", momentum=0.9, nesterov=True),
    "sgd all": lambda x: sgd(
        x, "backups", "kept_grads", "momentum_buffers", "steps", momentum=0.9, dampening=0.1, max_norm=1.0,
        norm=torch.tensor(900.0, dtype=ops_dtype(x)), grad_scale=scalar(256), found_inf=scalar(0),
    ),
    "sgd skip": lambda x: sgd(x, "backups", "momentum_buffers", "steps", momentum=0.9, found_inf=scalar(1)),
    "adam": adam,
    "adam kept_grads": lambda x: adam(x, "backups", "kept_grads", decoupled=True, max_norm=1.0,
                                 norm=torch.tensor(9.0, dtype=ops_dtype(x))),
    "adam amsgrad": lambda x: adam(x, "max_exp_avg_sqs", maximize=True),
    "adam all": lambda x: adam(x, "backups", "kept_grads", "max_exp_avg_sqs", grad_scale=scalar(4)),
    "adam skip": lambda x: adam(x, "backups", found_inf=scalar(1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtypes", "offsets"),
    [
        ((F32,), (0,)),
        ((F32,), (0, 1, 2)),
        ((BF16,), (0, 4, 1)),
        (MIXED, (0, 0, 0, 2)),
        ((F64, F64, F16), (0, 0, 1)),
        (SPLIT, (0, 1)),
    ],
    ids=["fp32", "fp32-views", "bf16", "mixed", "fp64", "two parts"],
)
@pytest.mark.parametrize("build", MAPS.values(), ids=MAPS)
def test_maps_match_the_cpu_core(on, core, cpu, build, dtypes, offsets):
    assert_same_bits([on(cpu), on(core)], build, SIZES, dtypes, offsets)


def holes(build):
    """Leaves out every third gradient and every other optional tensor."""

    def with_holes(lists):
        op, (w, g, *rest), keywords = build(lists)
        for name in ("kept_grads", "means", "mask", "momentum_buffers", "max_exp_avg_sqs", "steps"):
            if name in keywords and not (name == "momentum_buffers" and keywords["momentum"]):
                keywords[name] = [None if i % 2 else tensor for i, tensor in enumerate(keywords[name])]
        return op, (w, [None if i % 3 == 1 else tensor for i, tensor in enumerate(g)], *rest), keywords

    return with_holes


@pytest.mark.parametrize("name", ["perturb", "perturb all", "perturb random all", "combine", "sgd all", "adam all"])
def test_absent_tensors_read_as_zeros(on, core, cpu, name):
    assert_same_bits([on(cpu), on(core)], holes(MAPS[name]), SIZES, MIXED)


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_nothing_is_perturbed_by_a_norm_that_is_not_finite(on, core, norm):
    lists = Lists(SIZES)
    w, g, backup = lists.new(), lists.new(), lists.new()
    old = [x.clone() for x in w]
    for x in g:
        x.fill_(norm)
    on(core)("perturb_", w, g, backup, torch.tensor(norm), rho=0.05)
    for kept, now, saved in zip(old, w, backup, strict=True):
        assert torch.equal(kept, now) and torch.equal(kept, saved)


@pytest.mark.parametrize("name", ["perturb", "perturb random all", "gaussian", "sgd all", "adam all"])
def test_results_do_not_depend_on_device_or_schedule(on, core, narrow_core, name):
    calls = [on(core, device, seed) for device, seed in [(0, 0), (0, 1), (3, 2), (30, 3)]]
    assert_same_bits([*calls, on(narrow_core)], MAPS[name], SIZES)


@pytest.mark.parametrize("name", MAPS)
def test_hyperparameters_on_the_device(on, core, narrow_core, cpu, name):
    hyper = {"perturb": "rho", "sgd": "lr", "adam": "lr"}.get(name.split()[0])
    build = grouped(MAPS[name], 23, **{hyper: 0.01}) if hyper else MAPS[name]
    assert_same_bits([on(cpu), on(core, live=True), on(narrow_core, live=True)], build, FEWER * 5, MIXED)


@pytest.mark.parametrize("name", ["restore", "sgd momentum"])
def test_large_tables_take_whole_chunks(on, core, cpu, name):
    core.blocks()
    sizes = [33 * CHUNK, 5, CHUNK + 1]  # 36 chunks: more than 16 each for the two blocks of device 0, less for device 1
    assert_same_bits([on(cpu), on(core, device=0), on(core, device=1)], MAPS[name], sizes)
    assert core.blocks() == 2 + 4


TINY = [i % 5 for i in range(700)]


def grouped(build, count, **varied):
    def with_groups(lists):
        op, positional, keywords = build(lists)
        groups = [i % count for i in range(len(lists.sizes))]
        values = {name: [value * (1 + group) for group in range(count)] for name, value in varied.items()}
        return op, positional, keywords | values | {"groups": groups}

    return with_groups


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (restore, (1, 4)),
        (grouped(MAPS["perturb"], 16, rho=0.01), (1, 7)),
        (grouped(MAPS["perturb"], 23, rho=0.01), (35, 35)),  # the groups take turns: a launch ends at the 17th tensor
        (grouped(MAPS["perturb random all"], 3, probability=0.3), (2, 10)),
        (grouped(gaussian, 2, amplitude=0.1), (1, 6)),  # numbers count on from launch to launch
        (by_class, (1, 5)),
        (grouped(MAPS["sgd all"], 3, lr=0.1), (2, 11)),
        (grouped(MAPS["adam all"], 3, lr=1e-3), (2, 14)),
    ],
    ids=["restore", "perturb", "perturb 23 groups", "perturb random", "gaussian", "by class", "sgd", "adam"],
)
def test_tables_beyond_one_launch(on, core, narrow_core, cpu, build, expected):
    core.launches(), narrow_core.launches()
    assert_same_bits([on(cpu), on(core), on(narrow_core)], build, TINY)
    assert (core.launches(), narrow_core.launches()) == expected


@pytest.mark.parametrize(
    "name", [name for name in MAPS if name not in ("adam all", "adam amsgrad", "perturb random all")]
)
def test_one_launch_serves_500_tensors(on, core, name):
    op, positional, keywords = MAPS[name](Lists(TINY[:500]))
    core.launches()
    on(core)(op, *positional, **keywords)
    assert core.launches() == 1


def norm_inputs(*arguments, **named):
    lists = Lists(*arguments, **named)
    return lists.new(), lists.new(), lists.new()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), MIXED, (F64,)], ids=["fp32", "bf16", "mixed", "fp64"])
def test_norm_is_right_and_repeatable(on, core, narrow_core, dtypes, adaptive):
    norms = []
    for offsets in ((0,), (0, 1, 2)):  # the order of summation must not depend on alignment either
        w, g, kept_grads = norm_inputs(SIZES, dtypes, offsets)
        for module, device, seed in [(core, 0, 0), (core, 3, 1), (core, 30, 2), (narrow_core, 1, 3)]:
            table = TensorTable(ops.OPS["grad_norm"])
            for _ in range(2):
                norms.append(
                    on(module, device, seed)(
                        "grad_norm", g, w, kept_grads=kept_grads, adaptive=adaptive, eta=0.01, table=table
                    )
                )
            assert not table.parts[0].scratch_memory[0], "the ticket must be back at zero"
    exact = [[x.double() for x in role] for role in (w, g, kept_grads)]
    right = reference.grad_norm(exact[1], exact[0], kept_grads=exact[2], adaptive=adaptive, eta=0.01)
    torch.testing.assert_close(norms[0].double(), right, rtol=1e-12 if dtypes == (F64,) else 3e-7, atol=0)
    assert all(torch.equal(bits(norm), bits(norms[0])) for norm in norms)


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), MIXED, (F64,)], ids=["fp32", "bf16", "mixed", "fp64"])
def test_inner_products_are_right_and_repeatable(on, core, narrow_core, dtypes):
    dots = []
    for offsets in ((0,), (0, 1, 2)):
        _, g, kept_grads = norm_inputs(SIZES, dtypes, offsets)
        calls = [on(module, device) for module, device in [(core, 0), (core, 30), (narrow_core, 1)]]
        dots += [call("grad_dots", g, kept_grads) for call in calls]
    right = reference.grad_dots([x.double() for x in g], [x.double() for x in kept_grads])
    exact = dtypes == (F64,)
    torch.testing.assert_close(dots[0].double(), right, rtol=1e-12 if exact else 3e-7, atol=1e-9 if exact else 1e-3)
    assert all(torch.equal(bits(other), bits(dots[0])) for other in dots)


def test_inner_products_beyond_one_launch(on, core, narrow_core):
    _, g, kept_grads = norm_inputs(TINY)
    kept_grads[1::3] = [None] * len(kept_grads[1::3])
    right = reference.grad_dots(g, kept_grads)
    core.launches(), narrow_core.launches()
    for module, launches in ((core, 1), (narrow_core, 4)):
        table = TensorTable(ops.OPS["grad_dots"])
        for _ in range(2):
            dots = on(module)("grad_dots", g, kept_grads, table=table)
            torch.testing.assert_close(dots, right, rtol=1e-6, atol=1e-4)
            assert not table.parts[0].scratch_memory[0], "the ticket must be back at zero"
            assert module.launches() == launches


def test_norm_of_nothing(on, core):
    for sizes in ([0], [0, 0, 0]):
        assert on(core)("grad_norm", Lists(sizes).new()) == 0


def test_norms_of_groups(on, core, narrow_core):
    w, g, kept_grads = norm_inputs(SIZES * 4, MIXED)
    groups = [(7 * i) % 20 if i % 20 != 11 else 3 for i in range(len(g))]
    etas = [0.01 * group for group in range(20)]
    named = {"kept_grads": kept_grads, "adaptive": True, "eta": etas, "groups": groups, "per_group": True}
    right = reference.grad_norm(g, w, **named)
    for module in (core, narrow_core):
        norms = [on(module, device)("grad_norm", g, w, **named) for device in (0, 5)]
        torch.testing.assert_close(norms[0], right, rtol=1e-6, atol=0)
        assert torch.equal(*norms)


def test_norms_of_more_classes_than_one_launch_can_finish(on, core, narrow_core):
    lists = Lists([3, 0, 5])
    gradients = [lists.new() for _ in range(1500)]
    right = torch.stack([torch.cat(gradient).double().norm() for gradient in gradients])
    core.launches(), narrow_core.launches()
    for module, launches in ((core, 2), (narrow_core, 16)):
        norms = on(module, seed=0)("class_grad_norms", gradients)
        torch.testing.assert_close(norms.double(), right, rtol=1e-6, atol=0)
        assert module.launches() == launches


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_gradients_are_found(on, core, bad):
    g = Lists(SIZES).new()
    found = torch.zeros(())
    on(core)("grad_norm", g, found_inf=found)
    assert found == 0
    g[4][4096] = bad
    assert not on(core)("grad_norm", g, found_inf=found).isfinite()
    assert found == 1
    g[4][4096] = 0
    on(core)("grad_norm", g, found_inf=found)
    assert found == 1, "never reset"


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (7, 2), (5, 33), (3, 1000), (2, 20000)])
def test_cross_entropy(on, core, rows, classes, dtype):
    size = rows * classes
    logits = (4 * NOISE[3 : 3 + size]).to(dtype).reshape(rows, classes)
    targets = torch.arange(rows) * 31 % classes
    v = NOISE[:classes].abs()
    results = [on(core, seed=seed)("focal_cross_entropy", logits, targets, v) for seed in (0, 1)]
    accumulator = F64 if dtype == F64 else F32
    right = reference.focal_cross_entropy(logits.double(), targets, v.to(accumulator).double())
    tolerance = {F64: 1e-13, F32: 3e-6, BF16: 5e-3, F16: 1e-3}[dtype]
    for mine, exact, again in zip(results[0], right, results[1], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance if dtype == F16 else 1e-7)
        assert torch.equal(bits(mine), bits(again))


def test_cross_entropy_of_an_unknown_label_is_nan(on, core, monkeypatch):
    monkeypatch.setattr(cross_entropy, "check_range", lambda *_: None)  # on a GPU nobody looks
    logits, v = NOISE[:30].float().reshape(3, 10), torch.rand(10)
    good = on(core)("focal_cross_entropy", logits, torch.tensor([1, 2, 3]), v)
    for label in (-1, 10, 2**40):
        bad = on(core)("focal_cross_entropy", logits, torch.tensor([1, label, 3]), v)
        for mine, usual in zip(bad, good, strict=True):
            assert mine[1].isnan().all()
            assert torch.equal(mine[::2], usual[::2])


def test_errors_name_the_op(on, core):
    with pytest.raises(RuntimeError, match="^restore_: no CUDA-capable device is detected"):
        on(core, device=-1)("restore_", [torch.zeros(1)], [torch.zeros(1)])
    with pytest.raises(RuntimeError, match="^cross_entropy: no CUDA-capable device is detected"):
        on(core, device=-1)("focal_cross_entropy", torch.zeros(1, 2), torch.tensor([0]), torch.ones(2))


@pytest.fixture(scope="module")
def kernels():
    """The kernels as nvcc compiles them, by name and architecture."""
    if machine_code.NVCC is None:
        pytest.skip("no nvcc on PATH")
    if machine_code.CUOBJDUMP is None:
        pytest.skip("no cuobjdump, on PATH or in triton")
    return machine_code.compiled()


VARIANTS = {"Perturb": 5, "RandomPerturb": 5, "GaussianPerturb": 2, "SgdStep": 4, "AdamStep": 4, "GradNorm": 4}
FUNCTORS = {name: VARIANTS.get(name, 1) for name in [*VARIANTS, "ClassPerturb", "Combine", "Restore", "GradDots"]}


def test_the_page_of_the_machine_code_is_up_to_date(kernels):
    """``python -m tests.machine_code`` writes it. Another nvcc makes other code, which the other tests look at."""
    text = machine_code.PAGE.read_text()
    if f"nvcc {machine_code.nvcc_version()}," not in text:
        pytest.skip(f"nvcc is {machine_code.nvcc_version()}, the page is of another one")
    assert text == machine_code.page()


def test_all_kernels_are_compiled_and_none_spills(kernels):
    names = {f"{name}<{number}>" for name in (*FUNCTORS, "CrossEntropy") for number in ("float", "double")}
    assert kernels.keys() == {(name, arch) for name in names for arch in machine_code.ARCHS}
    assert not [key for key, kernel in kernels.items() if kernel.on_stack or kernel.local]


def test_enough_blocks_fit_a_multiprocessor(kernels):
    """Half of its threads, or three eighths where a kernel holds many tensors; half of that in double precision."""
    for (name, arch), kernel in kernels.items():
        least = (3 if name.startswith("AdamStep") else 4) // (2 if "double" in name else 1)
        assert kernel.blocks(arch) >= least and kernel.shared <= 48 << 10, (name, arch)


def test_whole_aligned_tensors_are_accessed_16_bytes_at_a_time(kernels):
    """In a loop of its own for each set of roles, whose arithmetic leaves the memory time, but for the random noise.

    An H100 has time for 128 instructions of a thread while an SM moves 15 bytes: it waits for memory from 0.12 on.
    """
    least_of = {"GaussianPerturb": 0.06, "RandomPerturb": 0.15}
    for (name, arch), kernel in kernels.items():
        functor = name.partition("<")[0]
        assert not kernel.generic, f"{name} does not know that its tensors are in global memory on sm_{arch}"
        if functor == "CrossEntropy":
            continue
        plain = kernel.plain
        if arch == "100" and "double" in name:  # the page says why
            plain = [loop for loop in kernel.loops if not loop.widths & {2, 4}]
        assert len(plain) >= FUNCTORS[functor], (name, arch)
        least = min(loop.moved / loop.instructions for loop in plain)
        assert least > least_of.get(functor, 0.2), (name, arch, least)


@pytest.mark.parametrize(
    ("access", "size"),
    [(".E.128", 16), (".E.64.CONSTANT", 8), (".E", 4), (".E.U16", 2), (".E.S8", 1)],
)
def test_widths_are_read_off(access, size):
    assert machine_code.width(access) == size
