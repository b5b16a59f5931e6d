"""Long-tailed data: profiles and subsets, readers for common data sets, augmentation on the device."""

from __future__ import annotations

from ltsam_fast.data.augment import Augment, batches
from ltsam_fast.data.embedded import LongTailed, digits
from ltsam_fast.data.images import DataError, Images
from ltsam_fast.data.longtail import longtail_counts, longtail_subset, shot_limits, shot_split
from ltsam_fast.data.readers import load

__all__ = [
    "Augment",
    "DataError",
    "Images",
    "LongTailed",
    "batches",
    "digits",
    "load",
    "longtail_counts",
    "longtail_subset",
    "shot_limits",
    "shot_split",
]
