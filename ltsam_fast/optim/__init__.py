"""The methods, one file each; what they share is in ``base`` and ``class_wise``."""

from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.cc_sam import CCSAM
from ltsam_fast.optim.esam import ESAM
from ltsam_fast.optim.focal_sam import FocalSAM
from ltsam_fast.optim.friendly_sam import FriendlySAM
from ltsam_fast.optim.gnm import GNM
from ltsam_fast.optim.gsam import GSAM
from ltsam_fast.optim.imb_sam import ImbSAM
from ltsam_fast.optim.look_sam import LookSAM
from ltsam_fast.optim.m_sam import MSAM
from ltsam_fast.optim.sam import SAM
from ltsam_fast.optim.sparse_sam import SparseSAM
from ltsam_fast.optim.sse_sam import SSESAM
from ltsam_fast.optim.wsam import WSAM

__all__ = [
    "CCSAM",
    "ESAM",
    "FocalSAM",
    "FriendlySAM",
    "GNM",
    "GSAM",
    "ImbSAM",
    "LookSAM",
    "MSAM",
    "SAM",
    "SSESAM",
    "SharpnessAware",
    "SparseSAM",
    "WSAM",
]
