"""The published classes' import names and call signatures: a script changes its import line and nothing else.

Which class of which repository has which calls here, and what is not here, is a table in ``docs/guides/migrate.md``. Each
class's docstring names its source.

Where results depend on it, the published behaviour is kept: the tail's weight of 2 in today's ImbSAM script, GNM's double
noise in epoch 0, what each class adds to the norm, LookSAM's decomposition tensor by tensor, ESAM's choice by ``>``. Not kept
are defects: state that is lost on resume, parameters that are never restored, restoring by subtraction, a mean of no samples.
Under DistributedDataParallel gradients are averaged as by this package's class of the method.

Classes around an optimizer perturb the parameters that it has, each group with the ``rho`` given; ``opt.rho = x``, and a
``group["rho"]``, take effect with the next step.

>>> import torch
>>> from ltsam_fast.compat import SAM
>>> model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
>>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
>>> model(x).square().mean().backward()
>>> opt.first_step(zero_grad=True)
>>> model(x).square().mean().backward()
>>> opt.second_step(zero_grad=True)
"""

from __future__ import annotations

from ltsam_fast.compat.davda54 import SAM
from ltsam_fast.compat.dlrover_wsam import WeightedSAM, disable_running_stats, enable_running_stats
from ltsam_fast.compat.dydjw9_esam import ESAM
from ltsam_fast.compat.gnm_pt import GNM
from ltsam_fast.compat.imbalanced_sam import ImbSAM
from ltsam_fast.compat.nblt_f_sam import FriendlySAM
from ltsam_fast.compat.rollovd_look_sam import LookSAM
from ltsam_fast.compat.samsung_asam import ASAM
from ltsam_fast.compat.schedulers import (
    CosineScheduler,
    LinearScheduler,
    PolyScheduler,
    ProportionScheduler,
    SchedulerBase,
)
from ltsam_fast.compat.zemdalk_sse_sam import SSESAM
from ltsam_fast.compat.zhuang_gsam import GSAM
from ltsam_fast.optim import FocalSAM

__all__ = [
    "ASAM",
    "CosineScheduler",
    "ESAM",
    "FocalSAM",
    "FriendlySAM",
    "GNM",
    "GSAM",
    "ImbSAM",
    "LinearScheduler",
    "LookSAM",
    "PolyScheduler",
    "ProportionScheduler",
    "SAM",
    "SSESAM",
    "SchedulerBase",
    "WeightedSAM",
    "disable_running_stats",
    "enable_running_stats",
]
