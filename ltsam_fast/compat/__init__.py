"""The published classes' import names and call signatures: a script changes its import line and nothing else.

===============================================  ====================================================================
published                                        here, ``from ltsam_fast.compat import ...``
===============================================  ====================================================================
davda54/sam: ``sam.SAM``                         ``SAM(params, base_optimizer, rho, adaptive, **kwargs)``; phases, and
                                                 ``step(closure)`` with a closure that calls ``backward()``
SamsungLabs/ASAM: ``asam.ASAM``, ``asam.SAM``    ``ASAM``, ``SAM(optimizer, model, rho, eta)``; ``ascent_step``,
                                                 ``descent_step``
scongl/Focal-SAM: ``focal_sam.FocalSAM``         ``FocalSAM``
cool-xuan/Imbalanced_SAM: ``imbsam.ImbSAM``      ``ImbSAM``, ``SAM(optimizer, model, rho)``
and its ``SAM``
Zemdalk/SSE-SAM: ``ssesam.SSESAM`` and its       ``SSESAM``, ``ImbSAM``, ``SAM``
``ImbSAM``, ``SAM``
Keke921/GNM-PT: ``vtab.gnm.GNM``                 ``GNM`` (phases; its ``step`` cannot run as published)
nblt/F-SAM: ``utils.FriendlySAM`` and its        ``FriendlySAM``, ``SAM``
``SAM``
juntang-zhuang/GSAM: ``gsam.GSAM`` and its       ``GSAM`` with ``set_closure``, ``step``, ``update_rho_t``;
schedulers                                       ``LinearScheduler``, ``CosineScheduler``, ``PolyScheduler``,
                                                 ``ProportionScheduler``, ``SchedulerBase``
intelligent-machine-learning/dlrover:            ``WeightedSAM``, ``enable_running_stats``, ``disable_running_stats``
``atorch.optimizers.wsam.WeightedSAM``
rollovd/LookSAM: ``looksam.LookSAM``             ``LookSAM``
dydjw9/Efficient_SAM: ``utils.Esam.ESAM``        ``ESAM`` with ``paras``, ``step``, ``returnthings`` and its phases
===============================================  ====================================================================

Not here: SSAM's ``SSAMF`` and ``SSAMD`` (Mi-Peng), whose scripts build them from a registry and let them read the training set:
use ``ltsam_fast.SparseSAM``; CC-SAM's, m-SAM's and JAX's scripts, which have no optimizer class.

Where results depend on it, the published behaviour is kept: the tail's weight of 2 in today's ImbSAM script, GNM's double
noise in epoch 0, what each class adds to the norm, LookSAM's decomposition tensor by tensor, ESAM's choice by ``>``. Not kept
are defects: state that is lost on resume, parameters that are never restored, restoring by subtraction, a mean of no samples.
Under DistributedDataParallel gradients are averaged as by this package's class of the method.

Classes around an optimizer perturb the parameters that it has, each group with the ``rho`` given; ``opt.rho = x``, and a
``group["rho"]``, take effect with the next step.
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
