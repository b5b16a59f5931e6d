"""The Triton backend: the ops of csrc/ops.h as kernels over the same tables. Installed as ``ltsam_fast.kernels``."""

from .cross_entropy import cross_entropy
from .norm import grad_dots, grad_norm
from .perturb import combine_, gaussian_perturb_, perturb_, perturb_by_class_, random_perturb_, restore_
from .step import adam_step_, sgd_step_

__all__ = [
    "adam_step_",
    "combine_",
    "cross_entropy",
    "gaussian_perturb_",
    "grad_dots",
    "grad_norm",
    "perturb_",
    "perturb_by_class_",
    "random_perturb_",
    "restore_",
    "sgd_step_",
]
