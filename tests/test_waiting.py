"""What must not wait for a GPU does not, seen without one: torch's device "meta" stands in for it."""

from __future__ import annotations

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ltsam_fast as lf
from ltsam_fast import torch_backend
from ltsam_fast.ops import differentiable

COUNTS = [40, 20, 5]
GPU = torch.device("meta")


class Waiting(TorchDispatchMode):
    """Notes copies between the host and the GPU for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        patient = (kwargs or {}).get("non_blocking") or (func is torch.ops.aten.copy_.default and True in args[2:])
        if len(places) > 1 and copies and not patient:
            self.waits.append(str(func))
        return result


def test_what_waits_is_seen():
    here = torch.zeros(3)
    with Waiting() as mode:
        x = torch.zeros(3, device=GPU)
        x.copy_(here, non_blocking=True)
        here.to(GPU, non_blocking=True)
        assert not mode.waits
        here.to(GPU)
        x.copy_(here)
    assert len(mode.waits) == 2


def test_an_epoch_of_training(monkeypatch):
    loop = pytest.importorskip("ltsam_fast.train.loop")
    monkeypatch.setattr(loop, "take_step", lambda run, x, y: (x.mean() + y.float().mean()).detach())
    monkeypatch.setattr(loop, "_on_device_if_small", lambda pixels, device: pixels.to(device))
    monkeypatch.setattr(loop, "reweight", lambda *_: None)
    monkeypatch.setattr(loop.data, "batches", lambda *_, **__: torch.arange(64).split(16))
    begun, ended = [], []
    all_reduce = lambda values: ended.append(len(mode.waits)) or torch.ones(2)  # noqa: E731
    run = types.SimpleNamespace(
        dist=types.SimpleNamespace(device=GPU, world_size=1, rank=0, all_reduce=all_reduce),
        config=types.SimpleNamespace(batch_size=16, channels_last=True),
        train=types.SimpleNamespace(pixels=torch.zeros(64, 3, 8, 8, dtype=torch.uint8), labels=torch.arange(64) % 10),
        model=torch.nn.Linear(1, 1),
        train_transform=lambda pixels, noise: pixels.float(),
        **dict.fromkeys(("loss", "counts", "epoch", "sampler_generator", "augment_generator")),
    )
    with Waiting() as mode:
        loop.train_epoch(run, lambda _: begun.append(len(mode.waits)))
    assert begun == [2] * 4 and ended == [2]  # the images and the labels, once an epoch


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_labels_and_weights_on_the_cpu(reduction, monkeypatch):
    monkeypatch.setattr(differentiable, "backend_for", lambda device: torch_backend)
    criterion, y = lf.losses.LDAM(COUNTS, weight=torch.ones(3), reduction=reduction), torch.tensor([0, 1, 2, 0])
    with Waiting() as mode:
        assert criterion(torch.zeros(4, 3, device=GPU), y).is_meta
    assert not mode.waits


@pytest.mark.parametrize("method", ["FocalSAM", "ImbSAM", "SSESAM"])
def test_the_classes_of_the_samples(method):
    """A step looks them up before it comes to the ops, which refuse the stand-in."""
    weight, y = torch.nn.Parameter(torch.zeros(4, device=GPU)), torch.tensor([0, 1, 2, 0])
    optimizer = getattr(lf, method)([weight], torch.optim.SGD, class_counts=COUNTS, lr=0.1)
    with Waiting() as mode, pytest.raises(ValueError, match="on device meta"):
        optimizer.step(lambda: weight.square(), targets=y)
    assert not mode.waits
