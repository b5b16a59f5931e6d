"""Every fused op as a plain function on lists of tensors.

Each op checks its arguments, then runs on the backend that serves the tensors' device (see :mod:`ltsam_fast.backend`) in
one pass. All are defined by the reference implementation of the same name in :mod:`ltsam_fast.reference`. What holds for all:

* Tensors are dense, on cpu or cuda, in float32, bfloat16, float16 (sums and arithmetic in fp32) or float64 (in fp64). Sizes
  may be zero, dtypes and devices may differ from tensor to tensor. Tensors of one index have one shape; they need not be
  contiguous, but the pass is fastest when their elements lie alike in memory.
* ``None`` in a list of gradients reads as zeros.
* ``groups``: one int per tensor; a hyperparameter may then be a sequence with one value per group.
* ``grad_scale``, ``found_inf``: one-element float32 tensors, with the meaning that ``torch.amp.GradScaler`` gives them:
  gradients are ``grad_scale`` times too large; non-zero ``found_inf`` skips the update. They are read on the device.
* Same input, same bits, whatever the number of threads.
* Bad input is a ``ValueError`` or ``TypeError`` that names the argument, before anything is changed.
"""

from ltsam_fast.ops.cross_entropy import adjusted_cross_entropy, focal_cross_entropy, focal_weights
from ltsam_fast.ops.dispatch import OPS as OPS
from ltsam_fast.ops.norms import class_grad_norms, grad_dots, grad_norm
from ltsam_fast.ops.perturb import combine_, gaussian_perturb_, perturb_, perturb_by_class_, restore_
from ltsam_fast.ops.update import adam_step_, sgd_step_

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
