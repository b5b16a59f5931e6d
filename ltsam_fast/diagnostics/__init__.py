"""Gradient norm and sharpness of each class, Hessian eigenvalues and slices of the loss, as data and plots."""

from __future__ import annotations

from ltsam_fast.diagnostics.curvature import LossSlice, TopEigenvalue, loss_slice, top_hessian_eigenvalue
from ltsam_fast.diagnostics.per_class import ClassGradNorms, ClassSharpness, class_grad_norms, class_sharpness

__all__ = [
    "ClassGradNorms",
    "ClassSharpness",
    "LossSlice",
    "TopEigenvalue",
    "class_grad_norms",
    "class_sharpness",
    "loss_slice",
    "top_hessian_eigenvalue",
]
