"""The methods, one file each."""

from ltsam_fast.optim.base import SharpnessAware
from ltsam_fast.optim.focal_sam import FocalSAM
from ltsam_fast.optim.sam import SAM

__all__ = ["SAM", "FocalSAM", "SharpnessAware"]
