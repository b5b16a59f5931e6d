"""What runs in the workers of the distributed tests: jobs, all of them in one spawn for each number of workers."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, RMSprop

import ltsam_fast as lf
from ltsam_fast.optim import plan as plans

from .method_rows import EVERY, PHASED, closure_of, skip_step, two_groups
from .oracles import CLASSES, FEATURES, batches, flat, network

STEPS = 8
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (AdamW, {"lr": 0.01}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
    "plain": (SGD, {"lr": 0.1}),
}
MATRIX = [(name, base) for name in ("SAM", "FocalSAM", "ImbSAM", "GNM") for base in ("sgd", "adamw")]
"""What must be the joined batch with any number of workers."""
MORE = [(n, "sgd") for n, row in EVERY.items() if (n, "sgd") not in MATRIX and not row.by_parts and n != "CCSAM"]
"""The others, but for those that look at parts and classes of their own share."""
SCHEDULED: dict[str, Any] = {"active": ("every", 2), "rho_schedule": "linear", "total_steps": 25}
"""Every other step is the base optimizer's."""
CHECKPOINTED = [("SAM", "adamw"), ("FocalSAM", "sgd"), ("GNM", "plain"), ("FriendlySAM", "sgd"), ("LookSAM", "rmsprop")]

JOBS: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {}


def job(*worlds: int) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        JOBS[function.__name__] = worlds, function
        return function

    return register


class Odd(nn.Module):
    """Parameters that do not divide: 17 and 9 rows, fewer rows than workers, one number, nothing."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.scale = nn.Parameter(torch.full((1,), 1.1, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
        self.deep = nn.Parameter(torch.full((2, 3, 1, 2), 0.3, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.scale + self.shift * self.deep.sum()


def make(name, params, base, /, **more):
    kind, options = BASES[base]
    model, params = (params, None) if isinstance(params, nn.Module) else (None, params)
    return EVERY[name].make(model, kind, params, **options, **more)


def share(data):
    """This worker's part of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in data]


def train(model, opt, data):
    for x, y in data:
        opt.step(closure_of(model, x, y), targets=y)


def whole(model):
    """All weights, whole ones, as one vector."""
    return flat([p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()])


def alone(name, base, steps=STEPS, kind=network, **more):
    """The weights that one process gets from the joined batches."""
    model = kind()
    train(model, make(name, model, base, **more), batches(steps=steps))
    return flat(model)


@functools.cache
def line():
    """A mesh of all workers."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def replicas():
    """A mesh of two replicas, each of which is cut in two."""
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def shard(model, mesh=None, **options):
    mesh = mesh or line()
    fully_shard(next(one for one in model.modules() if isinstance(one, nn.Linear)), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def ddp(name, base, steps=STEPS, **more):
    model = DistributedDataParallel(network())
    train(model, make(name, model, base, model=model, **more), share(batches(steps=steps)))
    return flat(model)


def sharded(name, base, steps=STEPS, kind=network, mesh=None, **more):
    model = shard(kind(), mesh)
    train(model, make(name, model, base, **more), share(batches(steps=steps)))
    return whole(model)


@job(2, 4)
def synced():
    found = {row: ddp(*row, ascent_sync=True) for row in MATRIX}
    return found | {row: ddp(*row, ascent_sync=True) for row in MORE * (dist.get_world_size() == 2)}


@job(2)
def scheduled():
    """Under DDP, and under FSDP2."""
    rows = [(name, base) for name, base in (*MATRIX, *MORE) if name != "GSAM"]
    found = {(*row, "ddp"): ddp(*row, ascent_sync=True, **SCHEDULED) for row in rows}
    return found | {(*row, "fsdp"): sharded(*row, **SCHEDULED) for row in rows}


def weights_of(data):
    """Random weights of the samples of each batch; one of the batches has no sharp sample, one few."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number, (_, y) in enumerate(data):
        u, v = torch.rand(2, len(y), generator=generator, dtype=torch.float64)
        found.append((u, v * (torch.rand(len(y), generator=generator) < (1.0, 0.1, 0.0)[number % 3])))
    return found


def weighed(name, model, wrapped=None, plan="auto", **more):
    """Steps with weights of the samples: of this worker's share where the network is wrapped."""
    data, base = batches(steps=STEPS), BASES["sgd"]
    given = weights_of(data)
    if wrapped is not None:
        given = share(given)
        data = share(data)
    net = model if wrapped is None else wrapped
    opt = getattr(lf, name)(net.parameters(), base[0], rho=0.1, model=net, plan=plan, **base[1], **more)
    for (x, y), weights in zip(data, given, strict=True):
        opt.step(closure_of(net, x, y), weights=weights)
    return whole(net)


WEIGHED = [(name, plan) for name in ("FocalSAM", "ImbSAM", "SSESAM") for plan in ("auto", "published")]


@job(2, 4)
def weights_of_samples():
    found = {}
    for name, plan in WEIGHED:
        model = network()
        found["ddp", name, plan] = weighed(name, model, DistributedDataParallel(model), plan, ascent_sync=True)
        found["fsdp", name, plan] = weighed(name, None, shard(network()), plan)
    return found


@job(2, 4)
def shards():
    found = {row: sharded(*row) for row in MATRIX}
    return found | {row: sharded(*row) for row in MORE * (dist.get_world_size() == 2)}


@job(2, 4)
def odd_shards():
    return {name: sharded(name, "adamw", STEPS, Odd) for name in ("SAM", "GNM")} | {
        "clipped": sharded("FocalSAM", "rmsprop", STEPS, Odd, max_grad_norm=0.05),
        "WSAM": sharded("WSAM", "rmsprop", STEPS, Odd),
    }


@job(4)
def replicated_shards():
    return {name: sharded(name, "sgd", STEPS, Odd, replicas()) for name in ("SAM", "FocalSAM", "ImbSAM", "GNM", "GSAM")}


@job(4)
def several_meshes():
    """Layers cut over all workers, over two of them, and one that every worker has whole and averages by itself."""
    model = network()
    fully_shard(model[0], mesh=replicas())
    fully_shard(model[2], mesh=line())
    groups = [{"params": list(layer.parameters())} for layer in model if isinstance(layer, nn.Linear)]
    opt = make("SAM", groups, "adamw", adaptive=True, max_grad_norm=0.05)
    for parameter in model[4].parameters():

        def average(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

        parameter.register_post_accumulate_grad_hook(average)
    train(model, opt, share(batches(steps=STEPS)))
    return {"SAM": whole(model)}


@job(2)
def partial_gradients():
    """Gradients as tensor parallelism leaves them: sums over the workers that nobody has added up yet."""
    mesh = line()
    start = torch.arange(1.0, 6.0, dtype=torch.float64)
    whole_one, replica = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    for step in range(3):
        grad = start.cos() + step
        if step == 0:
            one, other = (lf.SAM([p], SGD, lr=0.1, momentum=0.9, max_grad_norm=0.5) for p in (whole_one, replica))
        for phase in ("first_step", "second_step"):
            whole_one.grad = grad.clone()
            mine = grad * (0.25 if dist.get_rank() else 0.75)
            replica.grad = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
            getattr(one, phase)()
            getattr(other, phase)()
            grad = grad * 0.7
    return {"expected": whole_one.detach(), "result": replica.full_tensor().detach()}


@job(2)
def mixed_precision():
    """Weights gathered in bfloat16; shards, gradients and norms in float32."""
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    found = {}
    for name in ("SAM", "FocalSAM"):
        model = shard(network(torch.float32), **policy)
        opt = make(name, model, "sgd")
        for x, y in share(batches(torch.float32, steps=STEPS)):
            opt.step(lambda x=x, y=y, model=model: F.cross_entropy(model(x).float(), y, reduction="none"), targets=y)
        found[name] = whole(model)
    return found


class Spoiled(torch.autograd.Function):
    """The weights as they are; in the backward one element's gradient overflows, which is in one worker's shard."""

    @staticmethod
    def forward(ctx, weight, spoil):
        ctx.spoil = spoil
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        if ctx.spoil:
            grad[0, 0] = torch.inf
        return grad, None


class Spoilable(nn.Linear):
    spoil = False

    def forward(self, x):
        return F.linear(x, Spoiled.apply(self.weight, self.spoil), self.bias)


@job(2)
def overflow_in_one_shard():
    """Some steps overflow, in the first pass or in the last; the others are those of a run without them."""
    found, overflows = {}, (1, 6, 7)  # LookSAM looks at step 6 and uses an older look at step 8
    for name in (*(name for name, base in MATRIX if base == "sgd"), "LookSAM", "FriendlySAM", "WSAM"):
        for last in (False, True):
            results = []
            for scaled in (True, False):
                torch.manual_seed(0)
                model = shard(nn.Sequential(Spoilable(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES)))
                opt = make(name, model, "sgd", model=model, max_grad_norm=1.0)
                scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, enabled=scaled)
                for step, (x, y) in enumerate(share(batches(torch.float32, steps=11))):
                    if step in overflows and not scaled:
                        if EVERY[name].counts_tried:
                            skip_step(opt)
                        continue
                    bad = scaled and step in overflows
                    one = name == "GNM" or (name == "LookSAM" and step % 3)
                    passes = iter([bad] if one else [bad and not last, bad and last])

                    def closure(x=x, y=y, model=model, passes=passes):
                        model[0].spoil = next(passes)
                        return F.cross_entropy(model(x), y, reduction="none")

                    opt.step(closure, targets=y, scaler=scaler)
                    scaler.update(8.0) if scaled else None
                results.append(whole(model))
            found[name, last] = tuple(results)
    return found


@job(2)
def interrupted():
    """An exception after the forward at perturbed weights: copies that FSDP2 holds of those must not be used again."""
    model, results = shard(Odd()), {}
    opt = make("SAM", model, "sgd", model=model)
    for step, (x, y) in enumerate(share(batches(steps=4))):
        closure = closure_of(model, x, y)

        def failing(closure=closure):
            losses = closure()
            if opt.is_perturbed:
                raise KeyboardInterrupt
            return losses

        if step == 2:
            with contextlib.suppress(KeyboardInterrupt):
                opt.step(failing)
        opt.step(closure)
    results["SAM"] = whole(model)
    model = shard(Odd())
    opt = make("GNM", model, "sgd", model=model)
    for x, y in share(batches(steps=4)):
        with torch.no_grad():  # an evaluation leaves the root's weights gathered
            model(x)
        opt.step(closure_of(model, x, y))
    return results | {"GNM": whole(model)}


SHARDABLE = [name for name in EVERY if name not in ("CCSAM", "SparseSAM")]
CUT_OFF = [(name, wrap) for wrap, names in (("ddp", EVERY), ("fsdp", SHARDABLE)) for name in names]
CUTS = [(at, layer, perturbed) for at in ("forward", "backward") for layer in (0, 2, 4) for perturbed in (False, True)]


MIXED_CUTS = [CUTS[2], CUTS[3], CUTS[9]]


def steps_with_a_cut(name, wrap, cut=None, mixed=False):
    """The weights after 4 steps, before the third of which another fails: in a layer's forward or backward, at w or w + eps.

    ``mixed``: with autocast, a GradScaler, two groups and the batch in two parts, in the latter of which it fails.
    """
    inner, failing, part = network(torch.float32 if mixed else torch.float64), [], [0]
    model = shard(inner) if wrap == "fsdp" else DistributedDataParallel(inner)
    opt = make(name, two_groups(model) if mixed else model, "sgd", model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, enabled=mixed)

    def fail(*_):
        if failing and opt.is_perturbed == cut[2] and part[0] == int(mixed):
            raise MemoryError("out of memory")

    def in_forward(layer, inputs, output):
        if cut[0] == "forward":
            fail()
        elif output.requires_grad:
            output.register_hook(fail)

    def closure(number, x, y, index=slice(None)):
        part[0] = number
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return F.cross_entropy(model(x[index]), y[index], reduction="none")

    def step(x, y):
        parts = [*zip(x.split([3, 5]), y.split([3, 5]), strict=True)] if mixed else [(x, y)]
        closures = [functools.partial(closure, number, *one) for number, one in enumerate(parts)]
        opt.step(closures, targets=[one for _, one in parts], scaler=scaler)

    if cut is not None:
        inner[cut[1]].register_forward_hook(in_forward)
    for number, (x, y) in enumerate(share(batches(inner[0].weight.dtype, steps=4))):
        if cut is not None and number == 2:
            before = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
            failing.append(True)
            with contextlib.suppress(MemoryError):
                step(x, y)
                return None  # a method without such a pass
            failing.clear()
            now = [getattr(p, "_local_tensor", p) for p in model.parameters()]
            assert all(map(torch.equal, before, now))
        step(x, y)
        scaler.update()
    return whole(model)


@job(2)
def cut_off():
    """All workers have an exception in the same pass, as where memory runs out, and go on."""
    return {
        (name, wrap, mixed): [
            steps_with_a_cut(name, wrap, mixed=mixed),
            *(steps_with_a_cut(name, wrap, cut, mixed) for cut in (MIXED_CUTS if mixed else CUTS)),
        ]
        for name, wrap in CUT_OFF
        for mixed in (False, True)
    }


def sam_in_parts(model, opt, parts, synced):
    """One SAM step of micro-batches in the phases, of which all but the last keep their gradients to themselves."""
    size = sum(len(y) for _, y in parts)
    for phase in (opt.first_step, opt.second_step):
        for number, (x, y) in enumerate(parts):
            with synced(number == len(parts) - 1):
                (F.cross_entropy(model(x), y, reduction="sum") / size).backward()
        phase(zero_grad=True)


@job(2)
def in_parts():
    """A batch in parts of unequal size on each worker, in both interfaces."""
    found = {}
    for kind in ("ddp", "fsdp"):
        model = DistributedDataParallel(network()) if kind == "ddp" else shard(network())
        more = {"ascent_sync": True} if kind == "ddp" else {}
        opt = make("FocalSAM", model, "sgd", model=model, **more)
        for x, y in share(batches(steps=STEPS)):
            pieces = list(zip(x.split([1, 5, 2]), y.split([1, 5, 2]), strict=True))
            opt.step([closure_of(model, *piece) for piece in pieces], [piece[1] for piece in pieces])
        found[kind, "closure"] = whole(model)

        model = DistributedDataParallel(network()) if kind == "ddp" else shard(network())

        @contextlib.contextmanager
        def synced(last, model=model, kind=kind):
            if kind == "fsdp":
                model.set_requires_gradient_sync(last)
                yield
            else:
                with contextlib.nullcontext() if last else model.no_sync():
                    yield

        opt = make("SAM", model, "sgd", model=model)
        for x, y in share(batches(steps=STEPS)):
            sam_in_parts(model, opt, list(zip(x.split([1, 5, 2]), y.split([1, 5, 2]), strict=True)), synced)
        found[kind, "phases"] = whole(model)
    return found


@job(2)
def unequal_shares():
    """Workers with 12 and 4 of a batch's 16 samples: losses weighed by B_i * world / B make it the joined batch."""
    model = DistributedDataParallel(network())
    opt = make("SAM", model, "sgd", model=model, ascent_sync=True)
    for x, y in batches(steps=STEPS):
        x, y = (one.split([12, 4])[dist.get_rank()] for one in (x, y))
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none") * (len(y) * 2 / 16))
    return {"SAM": flat(model)}


@job(2)
def local():
    return {name: ddp(name, "sgd", 6) for name, row in EVERY.items() if not row.joined}


@job(2)
def overflow():
    """One worker's gradients overflow in one pass of one step: nobody takes that step."""
    model = DistributedDataParallel(network(torch.float32))
    opt = make("FocalSAM", model, "sgd", model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    for step, (x, y) in enumerate(share(batches(torch.float32, steps=6))):
        bad = step == 3 and dist.get_rank() == 1

        def closure(x=x, y=y, bad=bad):
            losses = F.cross_entropy(model(x), y, reduction="none")
            return losses * float("inf") if bad and not opt.is_perturbed else losses

        opt.step(closure, targets=y, scaler=scaler)
        scaler.update(8.0)
    return {"FocalSAM": flat(model)}


@contextlib.contextmanager
def counted(name):
    """Calls of one of torch.distributed's collectives."""
    plain, calls = getattr(dist, name), []

    def counting(*args, **kwargs):
        calls.append(next(one.numel() for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)))
        return plain(*args, **kwargs)

    setattr(dist, name, counting)
    try:
        yield calls
    finally:
        setattr(dist, name, plain)


@job(2)
def reductions():
    """How many times a step averages gradients over the workers, and when."""
    found = {}
    for name in ("SAM", "FocalSAM", "GNM"):
        for synced in (False, True) if name != "GNM" else (False,):
            model = DistributedDataParallel(network(), bucket_cap_mb=1e-4)
            buckets, order = [], []

            def hook(state, bucket, buckets=buckets, order=order):
                buckets.append(bucket.index())
                order.append("reduce")
                return default_hooks.allreduce_hook(None, bucket)

            model.register_comm_hook(None, hook)
            opt = make(name, model, "sgd", model=model, ascent_sync=synced)
            data = share(batches(steps=3))
            train(model, opt, data[:2])  # DDP orders its buckets in the first passes
            buckets.clear(), order.clear()
            first = model.module[0].weight
            first.register_post_accumulate_grad_hook(lambda _, order=order: order.append("backward ends"))
            with counted("all_reduce") as calls:
                train(model, opt, data[2:])
            numbers = sum(p.numel() for p in model.parameters())
            by_ddp = sum(index == 0 for index in buckets)
            found[name, synced] = {"by DDP": by_ddp, "in all": sum(calls) / numbers, "order": order}
            found[name, synced]["whole"] = calls.count(numbers)
    for name in ("SAM", "FocalSAM", "GNM"):
        model = network()
        fully_shard(model, mesh=line())
        opt = make(name, model, "sgd")
        x, y = share(batches(steps=1))[0]
        name_of_call = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        with counted(name_of_call) as calls:
            opt.step(closure_of(model, x, y), targets=y)
        found[name, "fsdp"] = len(calls)
    return found


@job(2)
def refusals():
    """What the methods say that need whole gradients."""
    said = {}
    model = shard(network())
    for name in ("CCSAM", "SparseSAM"):
        for params in (model.parameters(), [torch.nn.Parameter(torch.zeros(2))]):
            try:
                opt = make(name, params, "sgd")
                opt.add_param_group({"params": list(model.parameters())})
            except ValueError as error:
                said.setdefault(name, []).append(str(error))
    return said


def checkpoint(model, opt, folder, load=False):
    weights, state = get_state_dict(model, opt)
    saved = {"model": weights, "optimizer": state}
    if load:
        dcp.load(saved, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    else:
        dcp.save(saved, checkpoint_id=folder)


def folder_of(name):
    """Where a method's checkpoints are."""
    return pathlib.Path(os.environ["LTSAM_CHECKPOINTS"]) / name


@job(2)
def saved():
    """Steps, a checkpoint, and more steps, which show that saving changed nothing."""
    found = {}
    for name, base in CHECKPOINTED:
        model, data = shard(network()), share(batches(steps=STEPS))
        opt = make(name, model, base)
        checkpoint(model, opt, folder_of(name) / "fresh")
        train(model, opt, data[:5])
        checkpoint(model, opt, folder_of(name) / "later")
        train(model, opt, data[5:])
        found[name, base] = whole(model)
    return found


@job(4)
def reloaded():
    found = {}
    for name, base in CHECKPOINTED:
        for kind, begin in (("fresh", 0), ("later", 5)):
            model = shard(network(seed=5))
            opt = make(name, model, base)
            checkpoint(model, opt, folder_of(name) / kind, load=True)
            train(model, opt, share(batches(steps=STEPS))[begin:])
            found[name, base, kind] = whole(model)
    return found


JOINED = {"ESAM": {"gamma": 1.0}, "SparseSAM": {"num_samples": 24}, "MicroBatchSAM": {"m": 6}}
"""Options with which each sample of the joined batch counts as it does in its worker's share."""


class Experts(nn.Module):
    """Experts, of which a pass uses those that its samples ask for; for the last one nobody asks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.ModuleList([nn.Linear(FEATURES, 6) for _ in range(4)])
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x, who):
        hidden = x.new_zeros(len(x), 6)
        for k in who.unique().tolist():
            index = (who == k).nonzero().flatten()
            hidden = hidden.index_copy(0, index, self.experts[k](x[index]))
        return self.head(torch.tanh(hidden))


def asked(step, world, size):
    """The experts of a joined batch's samples: each worker its own, all the same, another each, two in one share."""
    sample = torch.arange(size)
    rank = sample * world // size
    return (rank % 3, 0 * rank, (rank + 1) % 3, torch.where(rank == 0, 2, sample % 2))[step % 4]


def some_left_alone(model):
    """One expert and the head's bias are not perturbed."""
    alone = [*model.experts[0].parameters(), model.head.bias]
    rest = [p for p in model.parameters() if all(p is not one for one in alone)]
    return [{"params": alone, "perturb": False}, {"params": rest}]


def train_experts(name, base, world, rank=None, group=None, kind="", wrap=None, **more):
    """The weights after 8 steps of worker ``rank`` of ``world``, or of one process that has the joined batches.

    Kinds: "parts": a batch comes in parts; "phases": those of the method; "overflow": two passes of worker 0 overflow;
    "alone": some weights are not perturbed; "redrawn": other experts at perturbed weights; else an option of DDP.
    """
    module = model = Experts()
    more = JOINED.get(name, {}) | ({} if name == "SGD" else more)
    if rank is not None:
        view = kind == "gradient_as_bucket_view"
        model = DistributedDataParallel(
            module, find_unused_parameters=True, process_group=group, gradient_as_bucket_view=view
        )
        model = wrap(model) if wrap else model
    if name == "SGD":
        opt = BASES[base][0](module.parameters(), **BASES[base][1])
    else:
        if kind == "alone":
            opt = make(name, some_left_alone(module), base, **more)
            opt.model = model
        else:
            opt = make(name, module, base, model=model, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, enabled=kind == "overflow")
    for step, (x, y) in enumerate(batches(steps=STEPS, size=24)):
        y = y.sort().values if step % 2 else y  # a worker has the head, another the tail
        who, first = asked(step, world, 24), torch.arange(24) < 24 // world
        if rank is not None:
            x, y, who, first = (one.chunk(world)[rank] for one in (x, y, who, first))
        passes = []

        def losses(x, y, who, first, step=step, passes=passes):
            passes.append(step)
            if kind == "redrawn" and opt.is_perturbed:
                who = (who + 1) % 3
            found = F.cross_entropy(model(x, who), y, reduction="none")
            spoilt = kind == "overflow" and (step, len(passes)) in ((2, 1), (5, 2))
            return torch.where(first, found * torch.inf, found) if spoilt else found

        if name == "SGD":
            opt.zero_grad()
            losses(x, y, who, first).mean().backward()
            opt.step()
            continue
        if kind == "phases":
            for number, phase in enumerate(opt.phases):
                local = rank is not None and number < len(opt.phases) - 1
                with model.no_sync() if local else contextlib.nullcontext():
                    if not (name == "GNM" and number == 0):
                        losses(x, y, who, first).mean().backward()
                getattr(opt, phase)(zero_grad=True)
            continue
        sizes = [1, 3, len(y) - 4] if kind == "parts" else [len(y)]
        pieces = list(zip(*(one.split(sizes) for one in (x, y, who, first)), strict=True))
        closures = [lambda index=slice(None), piece=piece: losses(*(one[index] for one in piece)) for piece in pieces]
        opt.step(closures, [piece[1] for piece in pieces], scaler=scaler)
        scaler.update(8.0) if kind == "overflow" else None
    return flat(module)


@functools.cache
def joined_experts(name, base, world, kind="", **more):
    return train_experts(name, base, world, kind=kind, **more)


def of_experts(*args, **more):
    return train_experts(*args, dist.get_world_size(), dist.get_rank(), **more)


@job(2, 4)
def experts():
    """Parameters that only some workers use."""
    return {
        (name, base): of_experts(name, base, ascent_sync=not EVERY[name].joined)
        for name in EVERY
        for base in ("sgd", "rmsprop")
    }


@job(2, 4)
def experts_at_radius_zero():
    """Without ``ascent_sync``, and without a perturbation, all methods are the base optimizer under plain DDP."""
    return {
        name: of_experts(name, "sgd", **({} if name == "SGD" else EVERY[name].unperturbed)) for name in ("SGD", *EVERY)
    }


KINDS = ("parts", "overflow", "alone", "redrawn", "gradient_as_bucket_view")


IN_PHASES = [name for name in PHASED if not EVERY[name].told and not EVERY[name].by_parts]


@job(2)
def experts_in_phases():
    return {name: of_experts(name, "rmsprop", kind="phases", ascent_sync=not EVERY[name].joined) for name in IN_PHASES}


@job(2)
def experts_otherwise():
    return {
        (name, kind): of_experts(name, "sgd", kind=kind, ascent_sync=not EVERY[name].joined)
        for name in EVERY
        for kind in KINDS
    }


@job(4)
def experts_of_a_group():
    """Two of four workers share the model, which is compiled."""
    group = dist.new_group([0, 1])
    wrap = functools.partial(torch.compile, backend="eager")
    if dist.get_rank() >= 2:
        return None
    return {
        name: train_experts(name, "sgd", 2, dist.get_rank(), group, wrap=wrap, ascent_sync=not EVERY[name].joined)
        for name in EVERY
    }


def error_of(call, *args, **options):
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)


@job(2)
def joined_early():
    """Worker 1 has two batches more: what its steps become, or what is said, with the weights before and after."""
    found = {}
    data = share(batches(steps=6))[: 4 + 2 * dist.get_rank()]
    for name in ("SGD", *EVERY):
        model = DistributedDataParallel(network())
        opt = SGD(model.parameters(), **BASES["sgd"][1])
        opt = (
            opt
            if name == "SGD"
            else make(name, model, "sgd", model=model, **(JOINED.get(name, {}) | EVERY[name].unperturbed))
        )
        with model.join():
            for x, y in data:
                if name == "SGD":
                    opt.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    opt.step()
                    continue
                found[name, "said"] = error_of(train, model, opt, [(x, y)])
        found[name] = flat(model)
    for name, options in (("ESAM", {}), ("FriendlySAM", {"find_unused_parameters": True})):
        model = DistributedDataParallel(network(), **options)
        opt = make(name, model, "sgd", model=model)
        with model.join():
            train(model, opt, data)
        found[name, "together"] = flat(model)
    return found


REFUSED_IN_JOIN = ("GSAM", "ascent_sync=True", "compiled", "phases", "scaler", "scaler of the phases")


@job(2)
def refused_in_join():
    """What is said to both workers, whether their weights were left alone, and steps afterwards, out of it."""
    found = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (x, y), *data = share(batches(steps=4))
    for kind in REFUSED_IN_JOIN:
        model = DistributedDataParallel(network())
        synced = kind in ("ascent_sync=True", "compiled", "phases")
        opt = make("GSAM" if kind == "GSAM" else "SAM", model, "sgd", model=model, ascent_sync=synced)
        opt.model = torch.compile(model, backend="eager") if kind == "compiled" else model
        before, scaled = flat(model), {"scaler": scaler} if "scaler" in kind else {}
        with model.join():
            if "phases" in kind:
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
                said = error_of(opt.first_step, **scaled)
            else:
                said = error_of(opt.step, closure_of(model, x, y), **scaled)
        alone = torch.equal(flat(model), before)
        with model.join(enable=False):
            train(model, opt, data)
        found[kind] = {"said": said, "left alone": alone, "after": flat(model)}
    return found


ONE_PASS_OPTIONS = ("static_graph", "mixed_precision", "delay_all_reduce_named_params")


@job(2)
def options_for_one_pass():
    """What methods say of DDP's options that count on one pass a step."""
    found = {}
    for option in ONE_PASS_OPTIONS:
        inner = network()
        if option == "static_graph":
            model = DistributedDataParallel(inner, static_graph=True)
        elif option == "mixed_precision":  # on the CPU it cannot be made
            model = DistributedDataParallel(inner)
            model.mixed_precision = "bfloat16"
        else:
            late = list(inner.named_parameters())[:2]
            hooked = {"param_to_hook_all_reduce": inner[2].weight}
            model = DistributedDataParallel(inner, delay_all_reduce_named_params=late, **hooked)
        for name in EVERY:
            later = make(name, inner, "sgd")
            found[option, name] = [
                error_of(make, name, model, "sgd", model=model),
                error_of(make, name, model, "sgd", model=torch.compile(model)),
                error_of(setattr, later, "model", model),
            ]
    return found


@job(2)
def synced_parts():
    """MicroBatchSAM's parts are perturbed along their averages, if all workers have as many."""
    model = DistributedDataParallel(network())
    opt = make("MicroBatchSAM", model, "sgd", model=model, m=4, ascent_sync=True)
    train(model, opt, share(batches(steps=STEPS)))
    weights = flat(model)
    x, y = (one[: 8 - 4 * dist.get_rank()] for one in batches(steps=1)[0])
    said = error_of(opt.step, closure_of(model, x, y), y)
    return {"weights": weights, "said": said, "left alone": torch.equal(flat(model), weights)}


@job(2)
def compressed():
    """A communication hook that rounds to float16."""
    found = {}
    for name in EVERY:
        model = DistributedDataParallel(network())
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        train(model, make(name, model, "sgd", model=model), share(batches(steps=4)))
        found[name] = flat(model)
    return found


TAIL_WISE = {
    "ImbSAM": ("ImbSAM", {}),
    "SSE-SAM, stage 1": ("SSESAM", {"switch_step": None}),
    "SSE-SAM, stage 2": ("SSESAM", {"switch_step": 0}),
    "Focal-SAM": ("FocalSAM", {}),
    "CC-SAM": ("CCSAM", {}),
}
PLANS = ("published", "auto")


@job(2, 4)
def uneven_tails():
    """Workers of which one has the head, another the tail, in one batch or in parts, as published and by sub-batches."""
    found = {}
    for key, (name, options) in TAIL_WISE.items():
        for synced in (False, True):
            for parts in (1, 2):
                for plan in PLANS:
                    model = DistributedDataParallel(network())
                    opt = make(name, model, "sgd", model=model, plan=plan, ascent_sync=synced, **options)
                    calls = []
                    for step, (x, y) in enumerate(batches(steps=4, size=24)):
                        x, y = share([(x, y.sort(descending=bool(step % 2)).values)])[0]
                        pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))

                        def losses(x, y, index, model=model, calls=calls):
                            calls.append(len(y[index]))
                            return F.cross_entropy(model(x[index]), y[index], reduction="none")

                        closures = [lambda index=slice(None), x=x, y=y: losses(x, y, index) for x, y in pieces]
                        opt.step(closures, [y for _, y in pieces])
                    found[key, synced, parts, plan] = flat(model), {*calls}
    return found


def work(rank, world, folder):
    torch.set_num_threads(1)
    plans.LEAST_WORK = -1.0 if rank % 2 == 0 else 100.0  # workers need not agree on whether a sweep is shared
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    results = {name: function() for name, (worlds, function) in JOBS.items() if world in worlds}
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads may abort an interpreter that ends in good order (pytorch/pytorch#190489)


@functools.cache
def results(world: int) -> list[dict[str, Any]]:
    """What each of ``world`` workers has found in its jobs; two of them save checkpoints, which four load."""
    if world == 2:
        checkpoints = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, checkpoints)
        os.environ["LTSAM_CHECKPOINTS"] = checkpoints
    else:
        results(2)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, pathlib.Path(folder)), nprocs=world)
        return [torch.load(pathlib.Path(folder) / f"{rank}.pt") for rank in range(world)]
