"""The Triton backend: the ops of csrc/ops.h as kernels over the same tables. Installed as ``ltsam_fast.kernels``."""

from .focal import focal_cross_entropy
from .norm import grad_norm
from .perturb import perturb_, restore_
from .step import adam_step_, sgd_step_

__all__ = ["adam_step_", "focal_cross_entropy", "grad_norm", "perturb_", "restore_", "sgd_step_"]
