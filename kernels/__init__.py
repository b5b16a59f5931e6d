"""The Triton backend: the ops of csrc/ops.h as kernels, called as :class:`ltsam_fast.backend.Backend` says.

Installed as ``ltsam_fast.kernels``. A kernel runs to its end once it is under way, except in Triton's interpreter: an interrupt
there may leave the tensors of one launch half written.
"""

from .cross_entropy_kernels import cross_entropy
from .norm_kernels import grad_dots, grad_norm
from .perturb_kernels import combine_, gaussian_perturb_, perturb_, perturb_by_class_, random_perturb_, restore_
from .step_kernels import adam_step_, sgd_step_

CAPTURABLE = True

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
