"""How the CUDA core launches its kernels, under a runtime that checks each launch and each access: see cuda_on_host.

Most checks need no test of their own, for all runs of the core are under them. Here is shown that they find what they are
there for, and what only streams, graphs and failing launches bring.
"""

import copy
import functools
import re

import pytest
import torch

from ltsam_fast import launch_args, ops
from ltsam_fast.ops import dispatch
from ltsam_fast.optim import capture
from ltsam_fast.table import TensorTable

from . import oracles, test_capture
from .method_rows import BASES, EVERY, every
from .on_host import ROOT, STREAM, TRACED, chosen, tensors_of
from .test_capture import Tape
from .test_cuda_source import F32, MAPS, MIXED, Lists, bits, ops_dtype

FEW = [5, 0, 4097, 16385, 1]
MANY = [i % 5 for i in range(320)]  # more than one launch of the narrow core can take
traced = pytest.mark.skipif(not TRACED, reason="CXXFLAGS asks for a sanitizer, in whose place accesses would be traced")


@pytest.fixture
def here(core, monkeypatch):
    """The core, which runs the package's ops."""
    monkeypatch.setenv("LTSAM_HOST_SEED", "1")
    with core.serving(monkeypatch):
        yield core
    core.stream = STREAM


def inputs(name, *arguments):
    """A public op with its arguments, and the lists that they are of."""
    lists = Lists(*arguments)
    if name in MAPS:
        return lists, *MAPS[name](lists)
    if name == "grad_norm":
        keywords = {"kept_grads": lists.new(), "adaptive": True, "combination": torch.ones(4, dtype=ops_dtype(lists))}
        return lists, "grad_norm", (lists.new(), lists.new()), keywords
    return lists, "grad_dots", (lists.new(), lists.new()), {}


ALL = [*MAPS, "grad_norm", "grad_dots"]


def run(name, *arguments):
    """Runs an op; returns all that it left, and what it returned."""
    lists, op, positional, keywords = inputs(name, *arguments)
    returned = getattr(ops, op)(*positional, **keywords)
    return [bits(x) for x in lists.buffers] + ([] if returned is None else [bits(returned)])


def name_of(op, keywords):
    """The list-wise op behind a public one."""
    return "random_perturb_" if op == "perturb_" and {"probability", "stochastic"} & keywords.keys() else op


def loss_and_gradient():
    """A cross entropy with all that one can have, and the gradient."""
    logits = torch.randn(7, 130, generator=torch.Generator().manual_seed(2)).requires_grad_()
    vector = torch.rand(130, generator=torch.Generator().manual_seed(3))
    vectors = dict.fromkeys(("scale", "shift", "margin", "weight", "spread"), vector)
    draw = torch.ones((), dtype=torch.int64)
    losses = ops.adjusted_cross_entropy(logits, torch.arange(7), **vectors, draw=draw, label_smoothing=0.1)
    losses.sum().backward()
    return [bits(losses.detach()), bits(logits.grad)]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# ---- What the runtime finds


@traced
@pytest.mark.parametrize("less", ["without it", "a byte less"])
@pytest.mark.parametrize("name", ["perturb random all", "sgd all", "adam all", "grad_norm", "grad_dots", "by class"])
def test_memory_that_is_not_the_calls(name, less, here, monkeypatch):
    """Each of a call's tensors in turn is not named to the runtime, or but for its last byte."""
    _, op, positional, keywords = inputs(name, [5, 4097, 1], MIXED)
    tried = []

    def checking(op, args):
        args.hyper = torch.from_numpy(args.hyper.copy())
        named = list({one.data_ptr(): one for one in tensors_of(args) if one.numel()}.values())
        for hidden in named:
            counts = "step" in args.op.roles and less == "without it"  # in half of a cell
            if hidden is args.scratch_memory and not (counts or args.op.sums > 1 or args.op.name == "grad_norm"):
                continue
            sizes = [one.numel() * one.element_size() for one in named]
            sizes = [
                (size - 1 if less == "a byte less" else 0) if one is hidden else size
                for one, size in zip(named, sizes, strict=True)
            ]
            here.name_memory((one.data_ptr(), size) for one, size in zip(named, sizes, strict=True))
            with pytest.raises(RuntimeError, match=f"^{op}: in no tensor of the call: (read|write|atomic) of"):
                getattr(here.module, op)(args)
            args.scratch_memory.zero_()
            tried.append(hidden)

    for one in ops.OPS:
        monkeypatch.setattr(here, one, functools.partial(checking, one))
    getattr(ops, op)(*positional, **keywords)
    assert len(tried) >= 6


MEETINGS = [
    f"{file.name}:{number}"
    for file in sorted((ROOT / "csrc/cuda").iterdir())
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if re.search(r"__(syncthreads|threadfence)\(\)", line)
]


WORK = [
    lambda: run("grad_norm", [40000, 16385, 5]),
    lambda: run("sgd all", [40000, 5, 4097]),
    lambda: run("perturb", [9000, 5, 4097]),
    loss_and_gradient,
]
"""All ways in which threads meet."""


@traced
@pytest.mark.parametrize("place", MEETINGS)
def test_every_barrier_and_fence_is_needed(place, here, monkeypatch):
    """Without any one of them a race is found."""
    monkeypatch.setenv("LTSAM_HOST_WITHOUT", place)
    found = []
    for number in range(1, 4):
        monkeypatch.setenv("LTSAM_HOST_SEED", str(number))
        for one in WORK:
            try:
                one()
            except RuntimeError as error:
                found.append(str(error))
    assert found and all(re.search(": race with|without a value|same barrier", error) for error in found)


def test_any_order_of_blocks_and_threads_leaves_the_same(seed, here, monkeypatch):
    """A new one each time. That there is no race is seen on the way."""
    for one in WORK:
        results = []
        for number in (0, seed, seed // 2 + 1):
            monkeypatch.setenv("LTSAM_HOST_SEED", str(number))
            results.append(one())
        assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize(
    ("blocks", "threads", "size", "message"),
    [
        (0, 256, 8, "invalid grid: 0"),
        (2**31, 256, 8, "invalid grid: 2147483648"),
        (1, 0, 8, "invalid block: 0"),
        (1, 33, 8, "invalid block: 33"),
        (1, 1056, 8, "invalid block: 1056"),
        (1, 32, 32768, "argument too large: 32768"),
    ],
)
def test_launches_that_cannot_be(blocks, threads, size, message, core):
    with pytest.raises(RuntimeError, match=message):
        core.check(core.library.on_host_try(blocks, threads, size))


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("stream", [0, 1, 2, 0x58], ids=["default", "legacy", "per thread", "another"])
@pytest.mark.parametrize("name", ["restore", "grad_norm", "loss"])
def test_other_streams_than_the_current_one(name, stream, capturing, here, monkeypatch):
    for caller in (dispatch, launch_args):
        monkeypatch.setattr(caller, "stream_or_threads", lambda _: stream)
    call = loss_and_gradient if name == "loss" else functools.partial(run, name, FEW)
    if capturing:
        here.library.on_host_begin_capture()
    with pytest.raises(RuntimeError, match=f"not the current stream: {stream}"):
        call()
    here.library.on_host_end_capture()


# ---- Streams and graphs


@pytest.mark.parametrize("name", ALL)
def test_a_launch_goes_to_the_stream_that_is_current_then(name, here):
    """Not to the one that was when its table was made."""
    _, op, positional, keywords = inputs(name, FEW)
    if op != "perturb_by_class_":  # which takes no table
        keywords["table"] = TensorTable(ops.OPS[name_of(op, keywords)])
    here.launches()
    for stream in (STREAM, STREAM + 1, STREAM):
        here.stream = stream
        getattr(ops, op)(*positional, **keywords)
    assert here.launches() == 3


@pytest.mark.parametrize("name", ALL)
def test_a_launch_needs_nothing_of_the_hosts_afterwards(name, narrow_core, monkeypatch):
    """The device comes to a large table's launches when all are under way and the call's arrays are written over."""
    core = narrow_core
    now = core.run

    def spoiling(op, args):
        args.hyper = args.hyper.copy()
        now(op, args)
        for array in ("pointers", "dtypes", "numels", "groups", "numbers", "buckets", "first_chunk", "hyper"):
            getattr(args, array).fill(85)

    with core.serving(monkeypatch):
        core.launches()
        wanted = run(name, MANY)
        assert core.launches() > 1
        for op in ops.OPS:
            monkeypatch.setattr(core, op, functools.partial(spoiling, op))
        lists, op, positional, keywords = inputs(name, MANY)
        before = [bits(x).clone() for x in lists.buffers]
        with core.deferring():
            returned = getattr(ops, op)(*positional, **keywords)
            assert same(before, [bits(x) for x in lists.buffers]), "nothing has run yet"
    assert same([bits(x) for x in lists.buffers] + ([] if returned is None else [bits(returned)]), wanted)


@pytest.mark.parametrize("name", ALL)
def test_replays_read_their_numbers_anew(name, narrow_core, monkeypatch):
    """An op that is captured once and replayed with other hyperparameters leaves what one does that is called with them."""
    core, results = narrow_core, []
    for captured in (True, False):
        lists, op, positional, keywords = inputs(name, MANY)
        replays, rows = [], []

        def native(op, args, factor, captured=captured, replays=replays, rows=rows):
            args.hyper = args.hyper.copy()
            args.hyper[:, :1] *= factor
            if not captured:
                return core.run(op, args)
            rows.append(args.hyper)
            args.hyper = torch.from_numpy(args.hyper)
            replays.append(core.captured(lambda args: core.run(op, args), args))

        with core.serving(monkeypatch):
            for factor in (1.0, 0.5, 4.0):
                if not replays:
                    with monkeypatch.context() as patch:
                        for one in ops.OPS:
                            patch.setattr(core, one, functools.partial(native, one, factor=factor))
                        returned = getattr(ops, op)(*positional, **keywords)
                for replay, row in zip(replays, rows, strict=True):
                    old = row.copy()
                    row[:, :1] *= factor
                    replay()
                    row[...] = old
        results.append([bits(x) for x in lists.buffers] + ([] if returned is None else [bits(returned)]))
    assert same(*results)


@traced
def test_a_replay_without_its_tensors_is_found(here):
    weights, backups = [torch.randn(5), torch.randn(7)], [torch.randn(5), torch.randn(7)]
    kept = []
    native = here.restore_

    def capturing(args):
        args.hyper = torch.from_numpy(args.hyper.copy())
        kept.append(here.captured(native, args))

    here.restore_ = capturing
    try:
        ops.restore_(weights, backups)
    finally:
        here.restore_ = native
    kept[0]()
    assert all(torch.equal(x, y) for x, y in zip(weights, backups, strict=True))
    here.named = []
    dispatch._TABLES.clear()
    backups.pop()
    with pytest.raises(RuntimeError, match="in no tensor of the call: read"):
        kept[0]()


class Graphs(Tape):
    """With the core's launches as the runtime captured them: replayed as they were, on memory that must still be there."""

    @staticmethod
    def native(tape, call, args):
        numbers = getattr(args, "hyper", None)
        assert numbers is None or isinstance(numbers, torch.Tensor), "a graph would hold these numbers for ever"
        replay = call.func.__self__.captured(call, args)
        tape.append((replay, (), {}, None))
        replay()


tape = test_capture.tape


@pytest.mark.parametrize("base", test_capture.BASES)
@pytest.mark.parametrize("method", test_capture.METHODS)
def test_whole_steps_as_graphs(method, base, here, tape, monkeypatch):
    """Every method's launches, captured in the order of a step, are the eager steps bit by bit."""
    monkeypatch.setattr(capture, "Machine", Graphs)
    monkeypatch.setattr(Graphs, "captures", 0)
    test_capture.assert_same(test_capture.train(method, base, tape, steps=7), test_capture.train(method, base, steps=7))
    assert Tape.captures > 0


@every
@pytest.mark.parametrize("base", ["nesterov", "adamw"])
def test_whole_steps(name, base, core, monkeypatch):
    """Every method takes the C++ core's steps; norms are summed in another order."""
    cpu = pytest.importorskip("ltsam_fast._cpu", reason="the C++ core is not built")
    results = []
    for serving in (core.serving(monkeypatch), chosen(monkeypatch, cpu)):
        with serving:
            model = oracles.network(F32)
            cls, options = BASES[base]
            opt = EVERY[name].make(model, cls, **options)
            results.append(EVERY[name].drive("closure", opt, model, oracles.batches(F32, steps=4)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# ---- Launches that fail


@pytest.mark.parametrize("name", [name for name in MAPS if name != "by class"])
def test_a_table_knows_which_launches_came_before_one_that_failed(name, narrow_core, monkeypatch):
    core = narrow_core
    with core.serving(monkeypatch):
        core.launches()
        _, op, (after, *rest), keywords = inputs(name, MANY)
        getattr(ops, op)(after, *rest, **keywords)
        total = core.launches()
        for fails in sorted({0, 1, total - 1}):
            _, op, positional, keywords = inputs(name, MANY)
            before = [x.clone() for x in positional[0]]
            table = TensorTable(ops.OPS[name_of(op, keywords)])
            core.library.on_host_fail_after(fails)
            with pytest.raises(
                RuntimeError, match=f"^{name_of(op, keywords)}: too many resources requested for launch$"
            ):
                getattr(ops, op)(*positional, **keywords, table=table)
            launched = table.launched()
            assert launched == list(range(len(launched))) and (len(launched) > 0) == (fails > 0)
            assert len(launched) < len(MANY)
            # What was launched is as after the whole call, what was not as before.
            for i, (now, old, new) in enumerate(zip(positional[0], before, after, strict=True)):
                assert torch.equal(bits(now), bits(new if i in launched else old))
    assert total > 1


def deep(dtype=F32):
    """A network whose parameters, each in a group of its own, take two launches."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(oracles.FEATURES, oracles.FEATURES) for _ in range(8)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(oracles.FEATURES, oracles.CLASSES)).to(dtype)


@every
def test_no_launch_that_fails_leaves_perturbed_weights(name, here):
    """Whichever of a step's launches fails: each weight is as it was or, where the update came to it, as after the step."""
    row, ((x, y), (x2, y2)) = EVERY[name], oracles.batches(F32, steps=2)
    model = deep()
    opt = row.make(model, *BASES["nesterov"][:1], [{"params": [p]} for p in model.parameters()], **BASES["nesterov"][1])
    for _ in range(row.options.get("k", 1)):  # LookSAM perturbs in every k-th step
        row.step("closure", opt, model, x, y)
    begun = model, opt
    model, opt = copy.deepcopy(begun)
    here.launches()
    row.step("closure", opt, model, x2, y2)
    count, done = here.launches(), list(model.parameters())
    assert count > 3
    for fails in range(count):
        model, opt = copy.deepcopy(begun)
        here.library.on_host_fail_after(fails)
        with pytest.raises(RuntimeError, match="^[a-z_]+: too many resources requested for launch"):
            row.step("closure", opt, model, x2, y2)
        for now, old, new in zip(model.parameters(), begun[0].parameters(), done, strict=True):
            assert torch.equal(now, old) or torch.equal(now, new), f"launch {fails} of {count}"
        assert not opt.is_perturbed
        row.step("closure", opt, model, x, y)
