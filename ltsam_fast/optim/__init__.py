"""The optimizers: a method is a rule with options, in ``methods``; the rest runs rules, ``optimizer`` and ``step`` first."""

from ltsam_fast.optim.methods.cc_sam import CCSAM
from ltsam_fast.optim.methods.esam import ESAM
from ltsam_fast.optim.methods.focal_sam import FocalSAM
from ltsam_fast.optim.methods.friendly_sam import FriendlySAM
from ltsam_fast.optim.methods.gnm import GNM
from ltsam_fast.optim.methods.gsam import GSAM
from ltsam_fast.optim.methods.imb_sam import ImbSAM
from ltsam_fast.optim.methods.look_sam import LookSAM
from ltsam_fast.optim.methods.micro_batch_sam import MicroBatchSAM
from ltsam_fast.optim.methods.momentum_sam import MomentumSAM
from ltsam_fast.optim.methods.sam import SAM
from ltsam_fast.optim.methods.sparse_sam import SparseSAM
from ltsam_fast.optim.methods.sse_sam import SSESAM
from ltsam_fast.optim.methods.tail_momentum_sam import TailMomentumSAM
from ltsam_fast.optim.methods.vasso import VaSSO
from ltsam_fast.optim.methods.wsam import WSAM
from ltsam_fast.optim.optimizer import SharpnessAware
from ltsam_fast.optim.registry import create, list_methods

__all__ = [
    "CCSAM",
    "ESAM",
    "FocalSAM",
    "FriendlySAM",
    "GNM",
    "GSAM",
    "ImbSAM",
    "LookSAM",
    "MicroBatchSAM",
    "MomentumSAM",
    "SAM",
    "SSESAM",
    "SharpnessAware",
    "SparseSAM",
    "TailMomentumSAM",
    "VaSSO",
    "WSAM",
    "create",
    "list_methods",
]
