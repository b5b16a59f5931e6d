"""The ops in plain PyTorch: their definition, short enough to check by eye, exact enough for fp64 tests.

Same names and arguments as :mod:`ltsam_fast.ops`, where they are documented. Sums are kept in fp32, and in fp64 for fp64
tensors. The backend ``"torch"`` runs these where nothing could be compiled.
"""

from ltsam_fast.reference.passes import (
    adam_step_,
    combine_,
    gaussian_perturb_,
    perturb_,
    perturb_by_class_,
    restore_,
    sgd_step_,
)
from ltsam_fast.reference.reductions import class_grad_norms, grad_dots, grad_norm
from ltsam_fast.reference.softmax import adjusted_cross_entropy, focal_cross_entropy, focal_weights

__all__ = [
    "adam_step_",
    "adjusted_cross_entropy",
    "class_grad_norms",
    "combine_",
    "focal_cross_entropy",
    "focal_weights",
    "gaussian_perturb_",
    "grad_dots",
    "grad_norm",
    "perturb_",
    "perturb_by_class_",
    "restore_",
    "sgd_step_",
]
