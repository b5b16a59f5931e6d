"""DistributedDataParallel with two workers on the CPU, against one process that has the whole batch."""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import ltsam_fast as lf

from .family import ROWS, closure_of
from .methods import METHODS
from .oracles import batches, flat, network, relative_error

WORLD, STEPS = 2, 20
BASES = {"sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}), "adamw": (AdamW, {"lr": 0.01})}
SYNCED = ("SAM", "FocalSAM", "ImbSAM", "SSESAM", "GNM", "FriendlySAM", "LookSAM", "GSAM", "WSAM")
"""Methods that with a synced ascent are those of the joined batch."""
SHARDED = ("SAM", "FocalSAM", "ImbSAM", "SSESAM", "FriendlySAM", "LookSAM", "GSAM", "WSAM")
LOCAL = ("SAM", "FocalSAM", "ImbSAM", "SSESAM", "CCSAM", "MSAM", "SparseSAM", "ESAM", "FriendlySAM")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def make(name, model, base, options, /, **more):
    return (METHODS | ROWS)[name].make(model, base, **options, **more)


def halves(data, rank):
    return [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in data]


def run(name, base, rank=None, steps=STEPS, **more):
    """The weights after training on this worker's share, or on everything."""
    kind, options = BASES[base]
    data, model = batches(steps=steps), network()
    if rank is not None:
        data, model = halves(data, rank), DistributedDataParallel(model)
        more["model"] = model
    opt = make(name, model, kind, options, **more)
    for x, y in data:
        opt.step(closure_of(model, x, y), targets=y)
    return flat(model)


def sharded(name, base):
    """FSDP2: weights, gradients and state in shards; gradients of every pass are averaged."""
    kind, options = BASES[base]
    rank, model = dist.get_rank(), network()
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for layer in (*(one for one in model if isinstance(one, torch.nn.Linear)), model):
        fully_shard(layer, mesh=mesh)
    opt = make(name, model, kind, options)
    for x, y in halves(batches(steps=STEPS), rank):
        opt.step(closure_of(model, x, y), targets=y)
    return flat([p.full_tensor() for p in model.parameters()])


def refusals():
    """What the methods say that need whole gradients."""
    said = {}
    model = network()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    for name in ("CCSAM", "SparseSAM"):
        try:
            make(name, model, *BASES["sgd"])
        except ValueError as error:
            said[name] = str(error)
    return said


def in_parts(rank):
    """A batch in two parts on each worker."""
    model = DistributedDataParallel(network())
    opt = make("FocalSAM", model, *BASES["sgd"], model=model, ascent_sync=True)
    for x, y in halves(batches(steps=STEPS), rank):
        pieces = list(zip(x.split(3), y.split(3), strict=True))
        opt.step([closure_of(model, *piece) for piece in pieces], [piece[1] for piece in pieces])
    return flat(model)


def overflowing(rank):
    """One worker's gradients overflow in one pass of one step: nobody takes that step."""
    model = DistributedDataParallel(network(torch.float32))
    opt = make("FocalSAM", model, *BASES["sgd"], model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    for step, (x, y) in enumerate(halves(batches(torch.float32, steps=6), rank)):

        def closure(x=x, y=y, bad=step == 3 and rank == 1):
            losses = F.cross_entropy(model(x), y, reduction="none")
            return losses * float("inf") if bad and not opt._climbed else losses

        opt.step(closure, targets=y, scaler=scaler)
        scaler.update(8.0)
    return flat(model)


def reductions(rank):
    """How many times a step averages gradients over the workers."""
    counts = {}
    for name in ("SAM", "FocalSAM", "GNM"):
        model = DistributedDataParallel(network())
        calls = []

        def hook(state, bucket):
            calls.append(bucket.index())  # noqa: B023
            return default_hooks.allreduce_hook(None, bucket)

        model.register_comm_hook(None, hook)
        opt = make(name, model, *BASES["sgd"], model=model)
        (x, y), *_ = halves(batches(steps=1), rank)
        opt.step(closure_of(model, x, y), targets=y)
        counts[name] = sum(index == 0 for index in calls)
    return counts


def worker(rank, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60))
    results = {("synced", n, base): run(n, base, rank, ascent_sync=True) for n in SYNCED for base in BASES}
    results |= {("local", name): run(name, "sgd", rank, steps=6) for name in LOCAL}
    results |= {("sharded", name, base): sharded(name, base) for name in SHARDED for base in BASES}
    results |= {("parts",): in_parts(rank), ("overflow",): overflowing(rank), ("reductions",): reductions(rank)}
    results |= {("refusals",): refusals()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SYNCED)
def test_a_synced_ascent_is_the_joined_batch(name, base, results):
    expected = run(name, base)
    for one in results:
        assert relative_error(one["synced", name, base], expected) < 1e-9


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_the_joined_batch(name, base, results):
    expected = run(name, base)
    for one in results:
        assert relative_error(one["sharded", name, base], expected) < 1e-9


@pytest.mark.parametrize("name", LOCAL)
def test_workers_stay_together(name, results):
    assert torch.equal(results[0]["local", name], results[1]["local", name])


def test_workers_climb_along_their_own_gradients(results):
    """The mean over workers of g(w + eps_i), as in the SAM paper."""
    model = network()
    opt = SGD(model.parameters(), **BASES["sgd"][1])
    params = list(model.parameters())
    for x, y in batches(steps=6):
        total = [torch.zeros_like(p) for p in params]
        for one, label in zip(x.chunk(WORLD), y.chunk(WORLD), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(one), label), params)
            norm = torch.stack([g.norm() for g in grads]).norm()
            old = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += 0.1 * g / (norm + 1e-12)
            there = torch.autograd.grad(F.cross_entropy(model(one), label), params)
            with torch.no_grad():
                for p, before, t, g in zip(params, old, total, there, strict=True):
                    p.copy_(before)
                    t += g / WORLD
        for p, t in zip(params, total, strict=True):
            p.grad = t
        opt.step()
    assert relative_error(results[0]["local", "SAM"], flat(model)) < 1e-9


def test_a_batch_in_parts(results):
    assert relative_error(results[0]["parts",], run("FocalSAM", "sgd")) < 1e-9


def test_one_workers_overflow_is_everybodys(results):
    assert torch.equal(results[0]["overflow",], results[1]["overflow",])
    assert bool(results[0]["overflow",].isfinite().all())


def test_methods_that_need_whole_gradients_refuse_shards(results):
    said = results[0]["refusals",]
    assert set(said) == {"CCSAM", "SparseSAM"} and all("must not be sharded" in one for one in said.values())


def test_a_step_averages_once(results):
    assert results[0]["reductions",] == {"SAM": 1, "FocalSAM": 1, "GNM": 1}


def failing(rank, folder):
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=20))
    model = DistributedDataParallel(network())
    opt = lf.SAM(model.parameters(), SGD, lr=0.1, model=model)
    (x, y), *_ = halves(batches(steps=1), rank)

    def closure():
        if rank == 1:
            raise RuntimeError("this worker dies")
        return F.cross_entropy(model(x), y, reduction="none")

    opt.step(closure)


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match="this worker dies"):
        mp.spawn(failing, (tmp_path,), nprocs=WORLD)
