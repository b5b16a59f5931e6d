"""Captured steps against ordinary ones. Without a GPU a tape stands in for CUDA's graphs: it replays what it recorded."""

import contextlib
import copy
import functools
import gc
import types
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ltsam_fast as lf
from ltsam_fast import backend, ops
from ltsam_fast.launch_args import LaunchArgs
from ltsam_fast.ops import dispatch
from ltsam_fast.optim import capture, dry_run, unchanged
from ltsam_fast.optim.options import option
from ltsam_fast.optim.parallel import Single
from ltsam_fast.optim.step import AtPerturbed, AtWeights
from ltsam_fast.optim.trace import Trace

from . import oracles
from .method_rows import EVERY

COUNTS = [40, 20, 5]
METHODS = {name: {} for name, row in EVERY.items() if not row.make(oracles.network(), lr=0.1).host_only} | {
    "FocalSAM": {"class_counts": COUNTS},
    "ImbSAM": {"class_counts": COUNTS, "eta": 30},
    "SSESAM": {"class_counts": COUNTS, "eta": 30, "switch_step": 6},
    "GNM": {"decay_every": 3},
    "MicroBatchSAM": {"m": 3},
    "SparseSAM": {"mask": "dynamic", "refresh_every": 4},
    "LookSAM": {"k": 3},
    "GSAM": {"rho_min": 0.01, "rho_max": 0.1},
    "TailMomentumSAM": {"class_counts": COUNTS},
}
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "dampening": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def storages(tree):
    """The memory of all tensors, by its address."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


class Recorder(TorchDispatchMode):
    """Notes every torch operation, keeps its results where they are, and notes what memory was taken for them."""

    def __init__(self, tape):
        super().__init__()
        self.tape = tape
        self.pool = {}
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Labels on the CPU are looked at, those on a GPU are not. What torch.tensor() makes there is uploaded.
        looks = func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        looks |= func is torch.ops.aten.equal.default and args[0].is_floating_point()
        if looks or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, result))
        self.seen |= {address for address in storages((args, kwargs)) if address not in self.pool}
        self.pool |= {address: one for address, one in storages(result).items() if address not in self.seen}
        return result


class Tape:
    """CUDA's graphs on the CPU: what is captured runs only when it is replayed, on the same memory.

    A replay begins by writing over all memory that was taken during the capture: there CUDA's allocator lets what a step needs
    later lie where something else lay before.
    """

    device_type = "cpu"
    captures = 0
    state = staticmethod(list)  # what capturing must leave as it is; set by the test

    def __init__(self, device):
        self.aside = contextlib.nullcontext

    def space(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def capture(self, work):
        tape = []
        Tape.captures += 1
        before = [(tensor, tensor.detach().clone()) for tensor in self.state()]
        core = backend.backend_for(torch.device("cpu"))
        originals = {name: getattr(core, name) for name in ops.OPS}

        originals["cross_entropy"] = core.cross_entropy
        native = {name: functools.partial(self.native, tape, call) for name, call in originals.items()}

        try:
            for name in originals:
                setattr(core, name, native[name])
            with Recorder(tape) as recorder, mock.patch.object(unchanged, "_is_captured", lambda device: True):
                result = work()
        finally:
            for name, original in originals.items():
                setattr(core, name, original)
            with torch.no_grad():
                for tensor, old in before:
                    tensor.copy_(old)
        return functools.partial(self.replay, tape, recorder.pool), result

    @staticmethod
    def native(tape, call, args):
        """Notes what native code does, and does it."""
        if isinstance(args, LaunchArgs):
            args = copy.copy(args)
            args.pointers = args.pointers.copy()
            assert isinstance(args.hyper, torch.Tensor), "a graph would hold these numbers for ever"
            args.hyper = args.hyper.numpy()  # the same memory: what lies there when it is replayed
        tape.append((call, (args,), {}, None))
        call(args)

    @staticmethod
    @torch.no_grad()
    def replay(tape, pool):
        for storage in pool.values():
            storage.fill_(255)  # NaN, or an address that is none
        for func, args, kwargs, kept in tape:
            result = func(*args, **kwargs)
            if "empty" in str(func):
                continue
            for old, new in zip(tree_leaves(kept), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tape(monkeypatch):
    """Lets steps on the CPU be captured."""
    if backend.why_not("cpu"):
        pytest.skip("the tape needs the C++ core")
    monkeypatch.setattr(capture, "Machine", Tape)
    monkeypatch.setattr(Tape, "captures", 0)

    def watch(model, optimizer, scaler=None):
        def state():
            found = [*model.parameters(), *model.buffers()]
            found += [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
            found += [optimizer.skipped.memory] if optimizer.skipped.memory is not None else []
            return found + ([scaler._scale, scaler._growth_tracker] if scaler and scaler._scale is not None else [])

        monkeypatch.setattr(Tape, "state", staticmethod(state))

    return watch


def network(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers)


def batches(count, sizes=(9,)):
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        size = sizes[i % len(sizes)]
        yield torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


losses_of = functools.partial(F.cross_entropy, reduction="none")


def train(method, base, watch=None, steps=14, sizes=(9,), scaler=None, schedule=None, spoil=(), frozen=False, **more):
    """Losses and final state of a short run; with ``watch``, captured; ``frozen``: without the first layer."""
    model = network()
    model[0].requires_grad_(not frozen)
    cls, options = BASES[base]
    groups = [
        {"params": model[0].parameters(), "rho": 0.02},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ][frozen:]
    optimizer = getattr(lf, method)(groups, cls, rho=0.05, model=model, **METHODS[method], **options, **more)
    scheduler = schedule(optimizer) if schedule else None
    if watch:
        watch(model, optimizer, scaler)
        step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), scaler=scaler)
    seen = []
    for i, (x, y) in enumerate(batches(steps, sizes)):
        if i in spoil:
            x = x * torch.inf
        if watch:
            seen.append(step(x, y))
        else:
            closure = lambda index=slice(None): losses_of(model(x[index]), y[index])  # noqa: B023, E731
            seen.append(optimizer.step(closure, targets=y, scaler=scaler))
            if scaler:
                scaler.update()
        if scheduler:
            scheduler.step()
    return torch.stack(seen), model.state_dict(), optimizer.state_dict()


def assert_same(one, other):
    for mine, its in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == its and type(mine) is type(its)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_replays_are_the_steps_themselves(method, base, tape):
    assert_same(train(method, base, tape), train(method, base))
    assert Tape.captures > 0


@pytest.mark.parametrize("method", METHODS)
def test_what_perturbation_leaves_as_it_is_is_not_looked_at_in_a_capture(method, tape):
    """The pass that is captured, the fourth, is one of those in which everything would be checked."""
    assert_same(train(method, "sgd", tape, frozen=True), train(method, "sgd", frozen=True))
    assert Tape.captures > 0


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_the_base_have_a_graph_of_their_own(method, tape):
    """In a graph they are a fused pass, which torch's own step on the CPU rounds differently from."""
    options = {"active": ("every", 3), "rho_schedule": "linear", "total_steps": 25, "steps": 25}
    if method == "GSAM":
        del options["rho_schedule"]
    (losses, weights, state), wanted = train(method, "sgd", tape, **options), train(method, "sgd", **options)
    torch.testing.assert_close((losses, weights), wanted[:2], rtol=1e-4, atol=1e-5)
    assert [group["base_steps"] for group in state["param_groups"]] == [16, 16] and Tape.captures > 1


@pytest.mark.parametrize("kind", ("classes", "samples"))
@pytest.mark.parametrize("method", ("FocalSAM", "ImbSAM", "SSESAM"))
def test_weights_of_ones_own(method, kind, tape):
    """Of the samples they are inputs of the graph, as the batch is; without them the steps are of another kind."""
    generator, given = torch.Generator().manual_seed(3), {}

    def run(captured):
        model = network()
        if kind == "classes":
            given["class_weights"] = [1.0, 0.5, 0.0], [0.0, 0.5, 2.0]
        optimizer = getattr(lf, method)(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **given)
        if captured:
            tape(model, optimizer)
            step = lf.graph_step(model, losses_of, optimizer, next(batches(1)))
        generator.manual_seed(3)
        for x, y in batches(12, (9, 5)):
            weights = (torch.rand(len(y), generator=generator), torch.rand(len(y), generator=generator).round())
            more = {"weights": weights} if kind == "samples" else {}
            if captured:
                step(x, y, **more)
            else:
                optimizer.step(lambda: losses_of(model(x), y), None if more else y, **more)  # noqa: B023
        if captured and kind == "samples":
            with pytest.raises(ValueError, match="class_counts must be given"):
                step(x, y)
            with pytest.raises(ValueError, match="weights must be a pair"):
                step(x, y, weights=weights[0])
        return model.state_dict()

    assert_same(run(True), run(False))
    assert Tape.captures == 2


class ByHand:
    """Rates that rise and fall, with no note of it in the groups."""

    def __init__(self, opt):
        self.opt, self.count = opt, 0

    def step(self):
        self.count += 1
        for group in self.opt.param_groups:
            group["lr"] *= 1.3 if self.count < 8 else 0.7


@pytest.mark.parametrize("method", ["FocalSAM", "GSAM", "GNM", "LookSAM"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 14),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=15),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: float(i < 9)),
        ByHand,
    ],
    ids=["cosine", "one cycle", "to zero", "by hand"],
)
def test_schedules_reach_the_graph(method, schedule, tape):
    assert_same(train(method, "sgd", tape, schedule=schedule), train(method, "sgd", schedule=schedule))
    assert 1 <= Tape.captures <= 4


def test_adam_with_changing_betas(tape):
    schedule = lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=15)  # noqa: E731
    assert_same(train("SAM", "adamw", tape, schedule=schedule), train("SAM", "adamw", schedule=schedule))
    assert Tape.captures == 1


def test_each_batch_size_has_its_graph(tape):
    assert_same(train("FocalSAM", "sgd", tape, 16, (9, 5)), train("FocalSAM", "sgd", None, 16, (9, 5)))
    assert Tape.captures == 2


def test_clipping(tape):
    assert_same(train("SAM", "sgd", tape, max_grad_norm=0.1), train("SAM", "sgd", max_grad_norm=0.1))


@pytest.mark.parametrize("spoil", [(1, 7, 8), (0, 1, 2), (0, 1, 2, 3, 9)], ids=str)
@pytest.mark.parametrize("method", METHODS | {"fisher": {}})
def test_overflows_skip_the_step(method, spoil, tape, monkeypatch):
    """At the start too, where a method begins what it keeps."""
    if method == "fisher":
        method = "SparseSAM"
        monkeypatch.setitem(METHODS, method, {"mask": "fisher", "refresh_every": 100})

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    one = train(method, "adamw", tape, scaler=scaler(), spoil=spoil)
    assert_same(one, train(method, "adamw", scaler=scaler(), spoil=spoil))
    assert {float(state["step"]) for state in one[2]["state"].values()} == {14.0 - len(spoil)}
    assert Tape.captures > 0


def test_options_changed_by_hand(tape):
    def run(captured):
        model = network()
        optimizer = lf.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        if captured:
            tape(model, optimizer)
            step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=1)
        for i, (x, y) in enumerate(batches(20)):
            group = optimizer.param_groups[0]
            if i == 5:
                group["rho"] = 0.2
            if i == 8:
                group["weight_decay"] = 0.01
            if i == 11:
                group["momentum"] = 0.0
            if i == 14:
                group["nesterov"], group["momentum"] = True, 0.5
            if i == 16:
                model[0].bias.requires_grad_(False)
            if i == 18:
                model.eval()
            if captured:
                step(x, y)
            else:
                optimizer.step(lambda: losses_of(model(x), y))  # noqa: B023
        return model.state_dict()

    assert_same(run(True), run(False))


def test_a_loaded_checkpoint_starts_over(tape):
    model = network()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    tape(model, optimizer)
    step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=2)
    for x, y in batches(5):
        step(x, y)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = [step(x, y) for x, y in batches(5)]
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert_same([step(x, y) for x, y in batches(5)], first)
    assert Tape.captures == 2


def test_hooks_fire_once_a_step_and_are_not_captured(tape):
    model = network()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    tape(model, optimizer)
    step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=2)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda *_: before.append(model[0].weight.sum().item()))
    optimizer.register_step_post_hook(lambda *_: after.append(model[0].weight.sum().item()))
    everywhere = []
    handle = register_optimizer_step_pre_hook(lambda *_: everywhere.append(len(after)))
    for x, y in batches(6):
        step(x, y)
    handle.remove()
    assert len(before) == len(after) == 6 and before[1:] == after[:-1] and len(set(after)) == 6
    assert everywhere == [0, 1, 2, 3, 4, 5]


def test_a_hook_may_set_options(tape):
    def run(captured):
        model = network()
        optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        optimizer.register_step_pre_hook(
            lambda opt, *_: opt.param_groups[0].update(lr=0.1 / (1 + opt.param_groups[0]["steps"]))
        )
        if captured:
            tape(model, optimizer)
            step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=2)
        for x, y in batches(6):
            if captured:
                step(x, y)
            else:
                optimizer.step(lambda: losses_of(model(x), y))  # noqa: B023
        return model.state_dict()

    assert_same(run(True), run(False))


def test_steps_that_are_never_repeated_leave_the_graphs(tape, monkeypatch):
    monkeypatch.setattr(capture, "_KINDS", 6)
    monkeypatch.setitem(METHODS, "SparseSAM", {"mask": "dynamic", "refresh_every": 2})
    train("SparseSAM", "sgd", tape, steps=24)
    assert Tape.captures == 1


def test_what_cannot_be_captured_leaves_the_weights(tape):
    model = network()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    tape(model, optimizer)

    def waits(outputs, targets):
        if outputs.sum().item() > 1e9:
            raise AssertionError
        return losses_of(outputs, targets)

    step = lf.graph_step(model, waits, optimizer, next(batches(1)), warmup=1)
    (x, y), (x2, y2) = batches(2)
    step(x, y)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="SAM's step .* cannot be captured .* not permitted"):
        step(x2, y2)
    assert_same(model.state_dict(), weights)
    assert optimizer.state_dict()["param_groups"][0]["steps"] == 1
    optimizer.step(lambda: losses_of(model(x2), y2))


class Weighed:
    """A loss of somebody's own, an object that is called."""

    def __init__(self):
        self.weight, self.smoothing = None, 0.0

    def __call__(self, outputs, targets):
        return F.cross_entropy(outputs, targets, self.weight, reduction="none", label_smoothing=self.smoothing)

    forward = __call__


def change_losses():
    """Losses as users have them, each with something that changes it."""
    counts = {"class_counts": COUNTS, "reduction": "none"}
    weights = lf.losses.deferred_reweighting(1, COUNTS, 0)

    def weighed(how):
        ldam = lf.losses.LDAM(**counts, s=2.0)
        return how(ldam), lambda: ldam.set_weight(weights)

    yield "a module", weighed(lambda ldam: ldam)
    yield "a lambda", weighed(lambda ldam: lambda outputs, targets: ldam(outputs, targets))
    yield "a method", weighed(lambda ldam: ldam.forward)
    yield "a partial", weighed(lambda ldam: functools.partial(lambda scale, z, y: scale * ldam(z, y), 0.5))
    nested = torch.nn.ModuleDict({"loss": lf.losses.LogitAdjusted(**counts, weight=weights)})
    yield "in a module", (lambda z, y: nested["loss"](z, y), lambda: nested["loss"].set_weight(None))
    cloud = lf.losses.GCL(**counts, s=2.0)
    yield "a flag", (cloud, cloud.eval)
    focal = lf.losses.Focal(**counts)
    yield "a number", (focal, lambda: setattr(focal, "gamma", 2.0))
    for name, value in (("weight", weights.float()), ("smoothing", 0.2)):
        own = Weighed()
        yield f"an object's {name}", (own, lambda own=own, name=name, value=value: setattr(own, name, value))
        own = Weighed()
        yield f"a method's {name}", (own.forward, lambda own=own, name=name, value=value: setattr(own, name, value))
    rebound = functools.partial(F.cross_entropy, reduction="none")
    yield "a keyword", (rebound, lambda: rebound.keywords.update(weight=weights.float()))
    factor = 1.0

    def scaled(outputs, targets):
        return factor * losses_of(outputs, targets)

    def change():
        nonlocal factor
        factor = 3.0

    yield "a variable", (scaled, change)


@pytest.mark.parametrize("name", [name for name, _ in change_losses()])
def test_a_changed_loss_is_another_step(name, tape):
    def run(captured):
        loss, change = dict(change_losses())[name]
        model = network()
        optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        if captured:
            tape(torch.nn.ModuleList([model, *([loss] if isinstance(loss, torch.nn.Module) else [])]), optimizer)
            step = lf.graph_step(model, loss, optimizer, next(batches(1)), warmup=2)
        seen = []
        for i, (x, y) in enumerate(batches(12)):
            if i == 6:
                change()
            seen.append(step(x, y) if captured else optimizer.step(lambda: loss(model(x), y)))  # noqa: B023
        return torch.stack(seen), model.state_dict()

    with lf.use_backend("cpu"):  # small losses on a CPU go past the ops, which the tape knows
        assert_same(run(True), run(False))
    assert Tape.captures == 2


def test_a_loss_that_always_changes_is_not_captured_and_said_so(tape):
    model, loss = network(), Weighed()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = lf.graph_step(model, loss, optimizer, next(batches(1)), warmup=1)
    with pytest.warns(UserWarning, match="32 kinds of steps, none of them often enough") as seen:
        for i, (x, y) in enumerate(batches(40)):
            loss.smoothing = i / 100
            step(x, y)
    assert Tape.captures == 0 and seen[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=1.0)}, TypeError, "optimizer .* got SGD"),
        ({"optimizer": lambda m: lf.SAM(m.parameters(), torch.optim.RMSprop)}, ValueError, "got RMSprop"),
        (
            {"optimizer": lambda m: lf.CCSAM(m.parameters(), torch.optim.SGD, class_counts=COUNTS)},
            ValueError,
            "CCSAM: it looks up the classes",
        ),
        (
            {"optimizer": lambda m: lf.SAM(m.parameters(), torch.optim.SGD, lr=torch.tensor(0.1))},
            ValueError,
            "numbers as options",
        ),
        ({"warmup": 0}, ValueError, "warmup .* got 0"),
        ({"example_batch": (torch.zeros(2, 4),)}, ValueError, "inputs and targets"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_refusals(change, error, words, tape):
    model = network()
    make = change.pop("optimizer", lambda m: lf.SAM(m.parameters(), torch.optim.SGD))
    example = change.pop("example_batch", next(batches(1)))
    with pytest.raises(error, match=words):
        lf.graph_step(model, losses_of, make(model), example, **change)


def test_needs_a_gpu_and_a_fused_backend(tape, monkeypatch):
    model = network()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD)
    with lf.use_backend("torch"), pytest.raises(ValueError, match="backend must be a fused one"):
        lf.graph_step(model, losses_of, optimizer, next(batches(1)))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model must be on one CUDA device, got \['cpu'\]"):
        lf.graph_step(model, losses_of, optimizer, next(batches(1)))


def test_batches_of_another_kind_are_refused(tape):
    model = network()
    step = lf.graph_step(model, losses_of, lf.SAM(model.parameters(), torch.optim.SGD), next(batches(1)))
    with pytest.raises(ValueError, match="dimensions and dtypes of example_batch"):
        step(torch.zeros(9, 4, dtype=torch.float64), torch.zeros(9, dtype=torch.long))


def steps_with_outlines(method, base, count=8, scaler=None, dtype=torch.float32, **more):
    """Ordinary steps, each with what its dry run says of it and what it then does."""
    model = network().to(dtype)
    cls, options = BASES[base]
    groups = [
        {"params": model[0].parameters(), "rho": 0.02},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    optimizer = getattr(lf, method)(groups, cls, rho=0.05, model=model, **METHODS.get(method, {}), **options, **more)
    workers = Single()
    for i, (x, y) in enumerate(batches(count)):
        x = x.to(dtype)
        for group in optimizer.param_groups:
            group["lr"] *= 1.1 if i % 2 else 0.9
        optimizer.skipped.drop_doubtful()
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        planned = dry_run.outline(optimizer, len(y), scaler is not None, workers)
        assert_same((model.state_dict(), optimizer.state_dict()), before)
        assert all(module.training for module in model.modules()) and model[1].track_running_stats
        trace = Trace()
        with trace.recording():
            optimizer.step(lambda index=slice(None): losses_of(model(x[index]), y[index]).float(), y, scaler)  # noqa: B023
        if scaler:
            scaler.update()
        yield optimizer, planned, trace


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_changes_nothing_and_knows_the_step(method, base):
    seen = set()
    for _, planned, trace in steps_with_outlines(method, base, adaptive=method != "GNM", max_grad_norm=0.5):
        assert planned.calls and trace.agrees(planned.calls)
        seen.add(planned.key)
    several = {"SSESAM": 2, "LookSAM": 3, "SparseSAM": 3, "FriendlySAM": 2, "VaSSO": 2}
    several |= {"MomentumSAM": 2, "TailMomentumSAM": 2}
    assert len(seen) == several.get(method, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_knows_steps_with_a_scaler_and_in_low_precision(method):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rows = list(steps_with_outlines(method, "sgd", scaler=scaler))[1:]
    assert all(trace.agrees(planned.calls) for _, planned, trace in rows)
    rows = list(steps_with_outlines(method, "sgd", dtype=torch.bfloat16))[
        2:
    ]  # the first that perturbs has no backups yet
    assert all(trace.agrees(planned.calls) for _, planned, trace in rows)


def test_a_dry_run_tells_drawn_tensors_apart():
    keys = {planned.key for _, planned, _ in steps_with_outlines("ESAM", "sgd", granularity="tensor")}
    assert len(keys) == 8


class Alternating(lf.optim.SharpnessAware):
    """Decides by the number of the step what is not a hyperparameter of any pass."""

    how = option("direction", "What alternates.", choices=("direction", "factor", "tensor"))

    def rule(self, step):
        odd, g = step.number % 2, (yield AtWeights(averaged=True))
        step.ascend(g)
        g_p = yield AtPerturbed()
        if self.how == "direction":
            step.descend(g if odd else g_p)
        elif self.how == "factor":
            step.descend(0.5 * g + (0.5 + 0.25 * odd) * g_p)
        else:
            pp, _, gp = step.dots(g_p, g)
            step.descend(g_p + (0.5 + 0.25 * odd) * gp / pp * g)


@pytest.mark.parametrize("how", ["direction", "factor", "tensor"])
def test_what_no_pass_shows_tells_steps_apart(how, tape):
    def run(captured):
        model = network()
        optimizer = Alternating(model.parameters(), torch.optim.SGD, how=how, lr=0.1, momentum=0.5)
        if captured:
            tape(model, optimizer)
            step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=1)
        for x, y in batches(8):
            if captured:
                step(x, y)
            else:
                optimizer.step(lambda: losses_of(model(x), y))  # noqa: B023
        return model.state_dict()

    assert_same(run(True), run(False))
    assert Tape.captures == 2


class Filled(Trace):
    """A trace whose arrays are there at once, and which remembers what they were when a kernel was launched."""

    def __init__(self, space):
        super().__init__(space)
        self.launched = []

    def place(self, array):
        place = super().place(array)
        place.copy_(torch.from_numpy(array))
        self.launched.append((place, place.clone()))
        return place


@pytest.mark.parametrize("method", METHODS)
def test_triton_reads_what_a_trace_keeps(method):
    """Tables and numbers lie in the trace's memory, as they were at the launch, though a table may be bound again since."""
    if reason := backend.why_not("triton"):
        pytest.skip(f"triton: {reason}")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def steps(traced):
        model = network().to(device)
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[3].parameters()}]
        optimizer = getattr(lf, method)(groups, torch.optim.AdamW, lr=0.1, **METHODS[method])
        with lf.use_backend("triton"):
            for x, y in batches(2):
                x, y = x.to(device), y.to(device)
                closure = lambda index=slice(None): losses_of(model(x[index]), y[index])  # noqa: B023, E731
                trace = Trace()
                if traced:
                    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                    with trace.recording():
                        optimizer.step(closure, targets=y)
                    model.load_state_dict(before[0])
                    optimizer.load_state_dict(before[1])
                    trace = Filled(torch.zeros(trace.asked, dtype=torch.uint8, device=device))
                with trace.recording() if traced else contextlib.nullcontext():
                    optimizer.step(closure, targets=y)
                if traced:
                    assert len(trace.launched) >= 4
                    trace.upload()
                    for place, then in trace.launched:
                        assert torch.equal(place.view(torch.int64), then.view(torch.int64))
        return model.state_dict()

    assert_same(steps(True), steps(False))


class FakeCuda:
    """What graph_step asks of torch.cuda, with torch's behaviour where a capture fails: no device is needed."""

    class Graph:
        """A CUDAGraph."""

        replayed = 0

        def replay(self):
            self.replayed += 1

    def __init__(self):
        self.streams = [0]
        self.devices = []
        self.waits = []
        self.pools = {}  # how often each is in use; one whose graphs are all gone must not be used again
        self.stuck = set()  # pools of captures that could not be ended
        self.invalid = False
        self.Stream, self.CUDAGraph = self.make_stream, self.Graph

    def make_stream(self, device):
        cuda, number = self, 1 + len(self.waits)
        stream = types.SimpleNamespace(wait_stream=lambda other: cuda.waits.append((stream.number, other.number)))
        stream.number = number
        return stream

    def current_stream(self, device):
        stream = types.SimpleNamespace(wait_stream=lambda other: self.waits.append((stream.number, other.number)))
        stream.number = self.streams[-1]
        return stream

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream.number)
        try:
            yield
        finally:
            self.streams = before

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    def graph_pool_handle(self):
        return object()

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert self.devices, "torch.cuda.graph waits for the current device"
        assert self.pools.get(pool, 1) > 0, "use_count > 0"
        assert pool not in self.stuck, "already recording to mempool_id"
        self.streams.append(stream.number)  # as graph does: by hand
        self.invalid = False
        try:
            yield
        finally:
            if self.invalid:
                self.stuck.add(pool)
                raise RuntimeError("operation failed due to a previous error during capture")
            self.streams.pop()
        self.pools[pool] = self.pools.get(pool, 0) + 1
        weakref.finalize(graph, self.leave, pool)

    def leave(self, pool):
        self.pools[pool] -= 1


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(capture.torch, "cuda", fake)
    return fake


def test_graphs_share_memory_as_long_as_one_is_left(cuda):
    machine = capture.Machine("cuda:1")
    replays = [machine.capture(lambda: torch.ones(()))[0] for _ in range(3)]
    assert list(cuda.pools.values()) == [3]
    del replays[:]
    gc.collect()
    replay, _ = machine.capture(lambda: torch.ones(()))
    assert sorted(cuda.pools.values()) == [0, 1]
    replay()


def test_no_garbage_is_collected_in_a_capture(cuda, monkeypatch):
    """It may be a graph, whose memory CUDA takes back: not while another is captured."""
    order = []
    monkeypatch.setattr(gc, "collect", lambda: order.append("collected"))
    capture.Machine("cuda:1").capture(lambda: order.append(gc.isenabled()) or torch.ones(()))
    assert order[0] == "collected" and order[-1] is False and gc.isenabled()


def test_a_failed_capture_leaves_streams_and_devices(cuda):
    machine = capture.Machine("cuda:1")

    def fails():
        cuda.invalid = True
        raise ValueError("the cause")

    with pytest.raises(RuntimeError, match="previous error during capture") as raised:
        machine.capture(fails)
    assert cuda.streams == [0] and not cuda.devices
    assert (
        capture._what_failed(raised.value) == "the cause, then: operation failed due to a previous error during capture"
    )
    waits = len(cuda.waits)
    with pytest.raises(ValueError, match="oh"), machine.aside():
        assert cuda.streams != [0]
        raise ValueError("oh")
    assert cuda.streams == [0] and len(cuda.waits) == waits + 2


def test_after_a_failed_capture_another_can_be_taken(tape, monkeypatch):
    """Restoring fails too while a capture is invalid; batch norm learns on, no gradient stays, and the cause is told."""
    model = network()
    optimizer = lf.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    tape(model, optimizer)
    failing, perturbation = [False], optimizer._perturbation

    def look(grad):
        if failing[0] and optimizer.is_perturbed:
            monkeypatch.setattr(perturbation, "abandon", come_back)
            raise RuntimeError("operation not permitted when stream is capturing")

    def come_back(workers):
        raise RuntimeError("the capture is invalid")

    model[0].weight.register_hook(look)  # when the other layers have their gradients
    step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=1)
    machines = [step._machine]
    for i, (x, y) in enumerate(batches(8)):
        failing[0] = i == 1
        if failing[0]:
            weights = copy.deepcopy(model.state_dict())
            with pytest.raises(
                RuntimeError, match=r"cannot be captured .*: operation not permitted .*, then: the capture is"
            ):
                step(x, y)
            assert_same(model.state_dict(), weights)
            assert model[1].track_running_stats and all(param.grad is None for param in model.parameters())
            assert step._machine is not machines[0]
            monkeypatch.delattr(perturbation, "abandon")
        else:
            step(x, y)
    assert Tape.captures == 2
    twin = network()
    other = lf.SAM(twin.parameters(), torch.optim.SGD, lr=0.1, model=twin)
    for i, (x, y) in enumerate(batches(8)):
        if i != 1:
            other.step(lambda: losses_of(twin(x), y))  # noqa: B023
    assert_same(model.state_dict(), twin.state_dict())


def test_a_trace_does_not_hand_out_more_than_there_is():
    trace = Trace(torch.zeros(24, dtype=torch.uint8))
    place = trace.place(np.array([[1.0, 2.0]]))
    assert place.dtype == torch.float64 and place.shape == (1, 2)
    with pytest.raises(RuntimeError, match="reads more than the 24 bytes"):
        trace.place(np.array([1, 2]))


def on_a_gpu(monkeypatch, stream=1, capturing=False):
    """Has ops take tensors for a GPU's; returns what the stream is, to be changed."""
    now = types.SimpleNamespace(stream=stream, capturing=capturing)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    current = lambda device=None: types.SimpleNamespace(cuda_stream=now.stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    return now


def test_each_stream_and_each_capture_has_scratch_memory_of_its_own(monkeypatch):
    now = on_a_gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_TABLES", {})  # a full one would be cleared
    lists = ([torch.zeros(3)], None, None)
    op = ops.OPS["grad_norm"]
    table = dispatch.table_for(op, lists)
    assert dispatch.table_for(op, lists) is table
    now.stream = 2
    assert dispatch.table_for(op, lists) is not table
    now.stream, now.capturing = 1, True
    captured = dispatch.table_for(op, lists)
    assert captured is not table and dispatch.table_for(op, lists) is not captured
    assert dispatch.table_for(op, lists, table) is not table  # an optimizer's, in a graph of somebody's own
    with Trace().recording():
        assert dispatch.table_for(op, lists, table) is table  # graph_step's are made for the graph
    now.capturing = False
    assert dispatch.table_for(op, lists) is table


def test_triton_refuses_graphs_of_somebodys_own(monkeypatch):
    if reason := backend.why_not("triton"):
        pytest.skip(f"triton: {reason}")
    from ltsam_fast.kernels.chunks import launch

    on_a_gpu(monkeypatch, capturing=True)
    part = types.SimpleNamespace(device=torch.device("cuda"), cache={})
    with pytest.raises(RuntimeError, match=r"backend must not be 'triton' in a CUDA graph of your own.*lf.graph_step"):
        launch(None, part, (), 2)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_graph_has_tables_of_its_own(layout, tape):
    """What it points to stays, whatever other steps make of the optimizer's tables since."""
    model = network()
    if layout == "transposed":
        model[0].weight = torch.nn.Parameter(torch.randn(4, 8).T)
    optimizer = lf.FocalSAM(model.parameters(), torch.optim.SGD, class_counts=COUNTS, lr=0.1, momentum=0.9)
    tape(model, optimizer)
    step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=2)
    for x, y in batches(2):
        step(x, y)
    parts = {id(part) for table in optimizer._workers.tables.values() for part in table.parts}
    x, y = next(batches(1))
    step(x, y)
    assert parts == {id(part) for table in optimizer._workers.tables.values() for part in table.parts}
    (kind,) = next(iter(step._kinds.values()))
    taped = {id(one.scratch_memory) for _, args, _, _ in kind.replay.args[0] if isinstance(one := args[0], LaunchArgs)}
    parts = [part for table in optimizer._workers.tables.values() for part in table.parts]
    assert taped and taped.isdisjoint(id(part.scratch_memory) for part in parts)


def test_constants_are_kept_and_a_graph_holds_its_own(tape):
    model = network()
    optimizer = lf.FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1)
    tape(model, optimizer)
    step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), warmup=1)
    for x, y in batches(4):
        step(x, y)
    held = list(optimizer._constants.values())
    one, other = optimizer.constant((1.0, 2.0)), optimizer.constant((3.0, 4.0))
    assert optimizer.constant((1.0, 2.0)) is one and optimizer.constant((3.0, 4.0)) is other
    for i in range(100):
        optimizer.constant((float(i), 0.0))
    assert len(optimizer._constants) == 64 and (1.0, 2.0) not in {key[0] for key in optimizer._constants}
    kind = next(kind for kinds in step._kinds.values() for kind in kinds if kind.replay)
    assert {id(one) for one in held} <= {id(one) for one in kind.alive}


@contextlib.contextmanager
def no_waiting(forbidden):
    """Makes waiting for the device an error, and never longer than in here."""
    torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("scaled", "frozen"), [(False, False), (True, False), (False, True)], ids=["", "scaled", "frozen"]
)
@pytest.mark.parametrize(
    "name", [name for name in ("cuda", "triton") if torch.cuda.is_available() and name in lf.backends()]
)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method, name, scaled, frozen):
    def run(captured):
        model = network().cuda()
        model[0].requires_grad_(not frozen)
        params = [param for param in model.parameters() if param.requires_grad]
        options = {"lr": 0.05, "momentum": 0.9, "model": model, **METHODS[method]}
        optimizer = getattr(lf, method)(params, torch.optim.SGD, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 14)
        scaler = torch.amp.GradScaler(init_scale=2.0**10, growth_interval=3) if scaled else None
        step = lf.graph_step(model, losses_of, optimizer, next(batches(1)), scaler=scaler) if captured else None
        seen = []
        for x, y in batches(14):
            x, y = x.cuda(), y.cuda()
            if step:
                with no_waiting(len(seen) > 4 and not frozen):  # what is reused is compared now and then
                    seen.append(step(x, y))
            else:
                closure = lambda index=slice(None): losses_of(model(x[index]), y[index])  # noqa: B023, E731
                seen.append(optimizer.step(closure, targets=y, scaler=scaler))
                if scaler:
                    scaler.update()
            scheduler.step()
        return torch.stack(seen).cpu(), {name: value.cpu() for name, value in model.state_dict().items()}

    with lf.use_backend(name):
        torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


def test_waiting_is_allowed_again_after_an_error(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ValueError, match="oh"), no_waiting(True):
        raise ValueError("oh")
    assert modes == ["error", "default"]
