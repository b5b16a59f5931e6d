"""Several workers on the CPU, DistributedDataParallel and FSDP2, against one process that has the whole batch."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import ltsam_fast as lf

from .method_rows import EVERY, every
from .oracles import batches, flat, network, relative_error
from .workers import (
    BASES,
    CHECKPOINTED,
    CUT_OFF,
    CUTS,
    IN_PHASES,
    KINDS,
    MATRIX,
    MIXED_CUTS,
    MORE,
    ONE_PASS_OPTIONS,
    REFUSED_IN_JOIN,
    SCHEDULED,
    STEPS,
    TAIL_WISE,
    WEIGHED,
    Odd,
    alone,
    checkpoint,
    folder_of,
    joined_experts,
    make,
    results,
    shard,
    train,
    weighed,
)

WORLDS = pytest.mark.parametrize("world", [2, 4])


def assert_all(world, job, key, expected, bound=1e-9):
    """Every worker has it."""
    for one in results(world):
        assert relative_error(one[job][key], expected) < bound


@WORLDS
@pytest.mark.parametrize("job", ["synced", "shards"])
@pytest.mark.parametrize("name, base", MATRIX)
def test_workers_are_the_joined_batch(name, base, job, world):
    assert_all(world, job, (name, base), alone(name, base))


@pytest.mark.parametrize("job", ["synced", "shards"])
@pytest.mark.parametrize("name, base", MORE)
def test_more_methods_are_the_joined_batch(name, base, job):
    assert_all(2, job, (name, base), alone(name, base))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name, base", [row for row in (*MATRIX, *MORE) if row[0] != "GSAM"])
def test_steps_of_the_base_are_the_joined_batch(name, base, kind):
    """GSAM has a schedule of its own."""
    assert_all(2, "scheduled", (name, base, kind), alone(name, base, **SCHEDULED))


@WORLDS
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name, plan", WEIGHED)
def test_weights_of_samples(name, plan, kind, world):
    """Whose share may have no sharp sample."""
    assert_all(world, "weights_of_samples", (kind, name, plan), weighed(name, network()))


@WORLDS
@pytest.mark.parametrize(
    "key, name, base, more",
    [
        ("SAM", "SAM", "adamw", {}),
        ("GNM", "GNM", "adamw", {}),
        ("clipped", "FocalSAM", "rmsprop", {"max_grad_norm": 0.05}),
        ("WSAM", "WSAM", "rmsprop", {}),
    ],
)
def test_shards_of_unequal_size(key, name, base, more, world):
    """17 and 9 rows, fewer rows than workers, one number, nothing: GNM's noise is that of the whole tensors."""
    assert_all(world, "odd_shards", key, alone(name, base, kind=Odd, **more))


@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "ImbSAM", "GNM", "GSAM"])
def test_replicas_of_shards(name):
    """HSDP: norms are summed over the shards, once, and not over the replicas."""
    assert_all(4, "replicated_shards", name, alone(name, "sgd", kind=Odd))


def test_parameters_on_several_meshes():
    assert_all(4, "several_meshes", "SAM", alone("SAM", "adamw", adaptive=True, max_grad_norm=0.05))


def test_partial_gradients_of_tensor_parallelism():
    for one in results(2):
        torch.testing.assert_close(*one["partial_gradients"].values())


@pytest.mark.parametrize("name", ["SAM", "FocalSAM"])
def test_mixed_precision_policy(name):
    """As far from double precision as bfloat16 is, and the same on all workers."""
    assert_all(2, "mixed_precision", name, alone(name, "sgd"), 5e-3)
    assert torch.equal(*(one["mixed_precision"][name] for one in results(2)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "ImbSAM", "GNM", "LookSAM", "FriendlySAM", "WSAM"])
def test_an_overflow_in_one_shard_is_everybodys(name, last):
    for one in results(2):
        assert torch.equal(*one["overflow_in_one_shard"][name, last])


@pytest.mark.parametrize("name", ["SAM", "GNM"])
def test_fsdp_uses_no_copies_of_other_weights(name):
    assert_all(2, "interrupted", name, alone(name, "sgd", 4, Odd))


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("name, wrap", CUT_OFF)
def test_after_an_exception_in_a_pass_workers_go_on_as_if_it_had_never_been(name, wrap, mixed):
    undisturbed, *others = results(2)[0]["cut_off"][name, wrap, mixed]
    cuts = MIXED_CUTS if mixed else CUTS
    found = {cut: weights for cut, weights in zip(cuts, others, strict=True) if weights is not None}
    assert len(found) >= len(cuts) / 3
    bound = 1e-14 if not mixed else 1e-3 if name == "CCSAM" else 1e-7  # its plan may be another, and bfloat16 rounds
    for cut, weights in found.items():
        assert EVERY[name].averages or relative_error(weights, undisturbed) < bound, cut
    for mine, theirs in zip(others, results(2)[1]["cut_off"][name, wrap, mixed][1:], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("interface, name", [("closure", "FocalSAM"), ("phases", "SAM")])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_batch_in_parts(kind, interface, name):
    more = {"ascent_sync": True} if kind == "ddp" else {}
    assert_all(2, "in_parts", (kind, interface), alone(name, "sgd", **more), 1e-12)


def test_workers_with_shares_of_unequal_size():
    assert_all(2, "unequal_shares", "SAM", alone("SAM", "sgd"))


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if not row.joined])
def test_workers_stay_together(name):
    assert torch.equal(*(one["local"][name] for one in results(2)))


def test_workers_ascend_along_their_own_gradients():
    """The mean over workers of g(w + eps_i), as in the SAM paper."""
    model = network()
    opt = SGD(model.parameters(), **BASES["sgd"][1])
    params = list(model.parameters())
    for x, y in batches(steps=6):
        total = [torch.zeros_like(p) for p in params]
        for one, label in zip(x.chunk(2), y.chunk(2), strict=True):
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
                    t += g / 2
        for p, t in zip(params, total, strict=True):
            p.grad = t
        opt.step()
    assert relative_error(results(2)[0]["local"]["SAM"], flat(model)) < 1e-9


def test_one_workers_overflow_is_everybodys():
    one, other = (one["overflow"]["FocalSAM"] for one in results(2))
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())


@pytest.mark.parametrize("name", ["CCSAM", "SparseSAM"])
def test_methods_that_need_whole_gradients_refuse_shards(name):
    said = results(2)[0]["refusals"][name]
    assert len(said) == 2 and all("must not be sharded" in one for one in said)


def test_a_step_averages_once():
    """With DDP one all-reduce of the gradients a step, one more for a synced ascent; Focal-SAM's two at w cost nothing more."""
    found = results(2)[0]["reductions"]
    for name, synced, in_all in (("SAM", False, 1), ("SAM", True, 2), ("FocalSAM", False, 1), ("FocalSAM", True, 2)):
        assert found[name, synced]["by DDP"] == 1 and found[name, synced]["in all"] == in_all
        assert found[name, synced]["whole"] == synced
    assert found["GNM", False]["by DDP"] == found["GNM", False]["in all"] == 1
    assert [found[name, "fsdp"] for name in ("SAM", "FocalSAM", "GNM")] == [2, 3, 1]  # one for each backward


@pytest.mark.parametrize("key", [("SAM", False), ("FocalSAM", False), ("FocalSAM", True), ("GNM", False)])
def test_averaging_overlaps_the_backward(key):
    order = results(2)[0]["reductions"][key]["order"]
    last = len(order) - 1 - order[::-1].index("backward ends")
    assert "reduce" in order[last - 2 : last]


def assert_together(found):
    """The workers' weights are equal bit for bit."""
    assert all(torch.equal(found[0], one) for one in found[1:])


@WORLDS
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
@every
def test_parameters_that_some_workers_use_are_the_joined_batch(name, base, world):
    """Weight decay and momentum do not move what no worker uses."""
    found = [one["experts"][name, base] for one in results(world)]
    assert_together(found)
    expected = joined_experts(name, base, world, ascent_sync=not EVERY[name].joined)
    assert relative_error(found[0], expected) < 1e-9


@WORLDS
@every
def test_parameters_that_some_workers_use_without_a_perturbation(name, world):
    found = [one["experts_at_radius_zero"] for one in results(world)]
    assert_together([one[name] for one in found])
    assert relative_error(found[0][name], found[0]["SGD"]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@every
def test_parameters_that_some_workers_use_otherwise(name, kind):
    """Batches in parts, overflows, weights left alone, other experts at the perturbed weights, DDP's buckets as gradients."""
    found = [one["experts_otherwise"][name, kind] for one in results(2)]
    assert_together(found)
    if kind == "parts" and name in ("MicroBatchSAM", "SparseSAM"):  # these look at the parts
        return
    same = "" if kind in ("parts", "gradient_as_bucket_view") else kind
    expected = joined_experts(name, "sgd", 2, same, ascent_sync=not EVERY[name].joined)
    assert relative_error(found[0], expected) < 1e-9


@pytest.mark.parametrize("name", IN_PHASES)
def test_parameters_that_some_workers_use_in_the_phases(name):
    found = [one["experts_in_phases"][name] for one in results(2)]
    assert_together(found)
    expected = joined_experts(name, "rmsprop", 2, "phases", ascent_sync=not EVERY[name].joined)
    assert relative_error(found[0], expected) < 1e-9


@every
def test_a_group_of_the_workers_and_a_compiled_model(name):
    found = [one["experts_of_a_group"][name] for one in results(4)[:2]]
    assert_together(found)
    expected = joined_experts(name, "sgd", 2, ascent_sync=not EVERY[name].joined)
    assert relative_error(found[0], expected) < 1e-9


@every
def test_workers_with_more_batches_than_others(name):
    """In DDP's join() a step is what it is for plain DDP, or refused before anything has changed."""
    found = [one["joined_early"] for one in results(2)]
    assert_together([one[name] for one in found])
    said = found[0][name, "said"]
    if said is None:
        assert relative_error(found[0][name], found[0]["SGD"]) < 1e-9
    else:
        assert all(one[name, "said"] == said for one in found)
        assert name in ("GSAM", "WSAM", "LookSAM", "CCSAM", "MicroBatchSAM", "TailMomentumSAM")
        assert f"join() must not be enabled with {name}" in said and "join(enable=False)" in said
        assert torch.equal(found[0][name], flat(network()))


@pytest.mark.parametrize("name", ["ESAM", "FriendlySAM"])
def test_a_pass_without_a_graph_and_unused_parameters_in_join(name):
    assert_together([one["joined_early"][name, "together"] for one in results(2)])


@pytest.mark.parametrize("kind", REFUSED_IN_JOIN)
def test_reductions_of_the_methods_are_refused_in_join(kind):
    found = [one["refused_in_join"][kind] for one in results(2)]
    reason = {"compiled": "ascent_sync=True", "phases": "ascent_sync=True", "scaler of the phases": "scaler"}
    for one in found:
        assert f"model.join() must not be enabled with {reason.get(kind, kind)}: " in one["said"] and one["left alone"]
    assert_together([one["after"] for one in found])


@pytest.mark.parametrize("option", ONE_PASS_OPTIONS)
@every
def test_options_of_ddp_for_one_pass_are_refused(name, option):
    for said in results(2)[0]["options_for_one_pass"][option, name]:
        assert f"model must not be DistributedDataParallel with {option}=" in said and "leave it out" in said


def test_micro_batches_that_ascend_along_their_average():
    found = [one["synced_parts"] for one in results(2)]
    assert_together([one["weights"] for one in found])
    data = [
        (x[order], y[order])
        for x, y in batches(steps=STEPS)
        for order in [[*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]]
    ]
    model = network()
    train(model, make("MicroBatchSAM", model, "sgd", m=8), data)
    assert relative_error(found[0]["weights"], flat(model)) < 1e-9
    for one in found:
        assert "ascent_sync must be False" in one["said"] and "got 1 to 2" in one["said"] and one["left alone"]


@every
def test_workers_stay_together_with_compressed_gradients(name):
    assert_together([one["compressed"][name] for one in results(2)])


@pytest.mark.parametrize("name, base", CHECKPOINTED)
def test_a_checkpoint_disturbs_nothing(name, base):
    assert_all(2, "saved", (name, base), alone(name, base))


@pytest.mark.parametrize("kind", ["fresh", "later"])
@pytest.mark.parametrize("name, base", CHECKPOINTED)
def test_a_checkpoint_of_two_workers_for_four(name, base, kind):
    assert_all(4, "reloaded", (name, base, kind), alone(name, base))


@pytest.mark.parametrize("name, base", CHECKPOINTED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about itself
def test_a_checkpoint_of_two_workers_for_one(name, base):
    results(2)
    model = network(seed=5)
    opt = make(name, model, base)
    checkpoint(model, opt, folder_of(name) / "later", load=True)
    train(model, opt, batches(steps=STEPS)[5:])
    assert relative_error(flat(model), alone(name, base)) < 1e-9


def bereft(rank, folder):
    """Worker 1 goes without a word in the middle of a step; worker 0 notes what becomes of it."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=10))
    model = DistributedDataParallel(network())
    opt = lf.SAM(model.parameters(), SGD, lr=0.1, model=model, ascent_sync=True)
    ((x, y),) = batches(steps=1)
    before, start = flat(model), time.monotonic()

    def closure():
        if rank == 1 and opt.is_perturbed:
            os._exit(3)
        return F.cross_entropy(model(x), y, reduction="none")

    try:
        opt.step(closure)
    except RuntimeError as error:
        torch.save((str(error), time.monotonic() - start, torch.equal(flat(model), before)), folder / "notes.pt")
    os._exit(0)


def test_a_worker_that_dies_is_an_error_in_the_others(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=bereft, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [0, 3]
    message, seconds, unperturbed = torch.load(tmp_path / "notes.pt")
    assert message and seconds < 30 and unperturbed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP2 offloads from an accelerator")
@pytest.mark.parametrize("name", ["SAM", "FocalSAM", "GNM"])
def test_weights_offloaded_to_the_cpu(name, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cuda:nccl,cpu:gloo", store=store, rank=0, world_size=1)
    try:
        model = shard(network(), init_device_mesh("cuda", (1,)), offload_policy=CPUOffloadPolicy())
        opt = make(name, model, "adamw", max_grad_norm=0.05)
        for x, y in batches(steps=STEPS):
            x, y = x.cuda(), y.cuda()
            opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"), targets=y)
        assert all(p.device.type == "cpu" for p in model.parameters())
        result = flat([p.full_tensor().cpu() for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    assert relative_error(result, alone(name, "adamw", max_grad_norm=0.05)) < 1e-9


@WORLDS
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("synced", [False, True], ids=("", "ascent_sync"))
@pytest.mark.parametrize("key", TAIL_WISE)
def test_uneven_tails_take_the_published_step(key, synced, parts, world):
    found = [one["uneven_tails"] for one in results(world)]
    wanted, _ = found[0][key, synced, parts, "published"]
    for one in found:
        assert relative_error(one[key, synced, parts, "auto"][0], wanted) < 1e-11
    if key not in ("Focal-SAM", "CC-SAM"):  # whose classes all count
        sizes = [set().union(*(one[key, synced, parts, plan][1] for one in found)) for plan in ("auto", "published")]
        assert sizes[0] > sizes[1]  # sub-batches
