"""Passes that restore the weights, add gradients up and take the base optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ltsam_fast.lists import has_none
from ltsam_fast.ops.checks import check_clipping, check_momentum_buffers
from ltsam_fast.ops.dispatch import OPS, Hyper, Tensors, run
from ltsam_fast.table import TensorTable


def sgd_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    *,
    lr: Hyper,
    momentum: Hyper = 0.0,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    nesterov: Hyper = False,
    maximize: Hyper = False,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    momentum_buffers: Tensors | None = None,
    steps: Tensors | None = None,
    max_norm: Hyper = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Restores, adds up gradients and takes the step of torch.optim.SGD, in one pass: 24 bytes per fp32 element.

    .. math:: d = s (g + g') + \lambda b, \quad m \leftarrow \mu m + (1 - \tau) d, \quad w \leftarrow b - \alpha m

    with the old weights ``b``, and ``d + mu m`` in place of ``m`` in the last term when nesterov. ``s`` unscales, clips to
    ``max_norm`` and turns around to maximize.

    Args:
        params: T weights ``w``, overwritten.
        grads: T gradients ``g``.
        lr: Learning rate, >= 0.
        momentum: ``mu`` >= 0; without momentum no buffers are needed.
        dampening: ``tau``; not applied in a tensor's first step, see ``steps``.
        weight_decay: ``lambda`` >= 0, acts on the old weights.
        nesterov: Nesterov's momentum.
        maximize: Ascend instead.
        backups: T old weights ``b``; ``None``: the weights are not perturbed and ``b = w``.
        kept_grads: T gradients ``g'`` to be added.
        momentum_buffers: T buffers ``m``, updated; zeros before the first step.
        steps: T float32 numbers that count steps taken; needed with dampening only.
        max_norm: Clip the gradient's norm to this; 0: do not.
        norm: Norm of ``g + g'``, still scaled, as :func:`grad_norm` gives it; needed with ``max_norm``.
        combination: Four numbers ``c``: the gradient is ``c0 g + c1 g'``, and weights also move by ``-lr s (c2 g + c3 g')``,
            without momentum, decay and clipping; ``None``: 1, 1, 0, 0.
        groups: Group of each tensor.
        grad_scale: What gradients and norm are too large by.
        found_inf: When not zero, weights are restored and nothing else happens.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.
    """
    values = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "max_norm": max_norm,
    }
    if momentum_buffers is None or has_none(momentum_buffers):
        check_momentum_buffers(momentum_buffers, momentum, groups)
    if norm is None and max_norm:
        check_clipping(max_norm, norm)
    roles = (params, backups, grads, kept_grads, momentum_buffers, steps)
    run(
        OPS["sgd_step_"],
        roles,
        values,
        groups,
        table,
        norm=norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        combination=combination,
    )


def adam_step_(
    params: Sequence[Tensor],
    grads: Tensors,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Hyper,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled: Hyper = False,
    maximize: Hyper = False,
    max_exp_avg_sqs: Tensors | None = None,
    backups: Tensors | None = None,
    kept_grads: Tensors | None = None,
    max_norm: Hyper = 0.0,
    norm: Tensor | None = None,
    combination: Tensor | None = None,
    groups: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    r"""Restores, adds up gradients and takes the step of torch.optim.Adam or AdamW, in one pass: 32 bytes per element.

    .. math:: m \leftarrow m + (1 - \beta_1)(d - m), \quad v \leftarrow \beta_2 v + (1 - \beta_2) d^2, \quad
        w \leftarrow b - \frac{\alpha}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    with the old weights ``b`` and ``d`` as for :func:`sgd_step_`; decoupled decay multiplies ``b`` by
    ``1 - lr weight_decay`` instead.

    Args:
        params: T weights ``w``, overwritten.
        grads: T gradients ``g``.
        exp_avgs: T buffers ``m``, updated.
        exp_avg_sqs: T buffers ``v``, updated.
        steps: T float32 numbers ``t - 1``, counted up unless the step is skipped.
        lr: Learning rate, >= 0.
        beta1: In [0, 1).
        beta2: In [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: >= 0.
        decoupled: Decay as AdamW does.
        maximize: Ascend instead.
        max_exp_avg_sqs: T buffers with the largest ``v`` so far: amsgrad.
        backups: T old weights ``b``; ``None``: the weights are not perturbed and ``b = w``.
        kept_grads: T gradients to be added.
        max_norm: Clip the gradient's norm to this; 0: do not.
        norm: Norm of the summed gradient, still scaled; needed with ``max_norm``.
        combination: As for :func:`sgd_step_`.
        groups: Group of each tensor.
        grad_scale: What gradients and norm are too large by.
        found_inf: When not zero, weights are restored and nothing else happens.
        table: A table to reuse, for callers that keep one.

    Raises:
        ValueError: Lengths, shapes, devices or hyperparameters do not fit, or tensors share memory.
        TypeError: A dtype is not supported.

    Source: Kingma & Ba 2015, Alg. 1; Loshchilov & Hutter 2019, Alg. 2; Reddi et al. 2018, Alg. 2 (amsgrad).
    """
    values = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
        "maximize": maximize,
        "max_norm": max_norm,
    }
    for name, buffers in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("steps", steps)):
        if buffers is None:
            raise ValueError(f"{name} must hold one tensor per weight, got None")
    if norm is None and max_norm:
        check_clipping(max_norm, norm)
    roles = (params, backups, grads, kept_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    run(
        OPS["adam_step_"],
        roles,
        values,
        groups,
        table,
        norm=norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        combination=combination,
    )
