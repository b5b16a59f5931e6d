"""The backend ``"torch"``: the reference implementation, called as :class:`ltsam_fast.backend.Backend` says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ltsam_fast import reference
from ltsam_fast.launch_args import NUMBER_BITS, LaunchArgs, RowArgs, version
from ltsam_fast.reference.softmax import cross_entropy_gradient, losses_and_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

CAPTURABLE = False  # it reads numbers on the host


def _arguments(args: LaunchArgs) -> dict[str, Any]:
    """The arguments of the reference implementation: lists of tensors, hyperparameters, signals, groups."""
    named: dict[str, Any] = {name: args.tensors(role) for role, name in enumerate(args.op.arguments)}
    for name, column in zip(args.op.hyper, args.hyper.T.tolist(), strict=True):
        named[name] = int(column[0]) if name in ("stochastic", "seed", "step") else column  # one for all groups
    if args.op.hyper:
        named["groups"] = args.groups.tolist()
    return named | args.signals


def _written(tensors: list[Tensor], versions: list[int]) -> NDArray[np.bool_]:
    return np.array([version(one) != before for one, before in zip(tensors, versions, strict=True)], np.bool_)


def _run(args: LaunchArgs, function: Callable[..., None], role: int = 0, **more: Any) -> None:
    """Runs a pass that writes a role of each tensor once: torch counts in the tensor that it has been written."""
    tensors: list[Any] = args.tensors(role) or []
    args.launched = functools.partial(_written, tensors, [version(one) for one in tensors])
    function(**_arguments(args) | more)


def perturb_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.perturb_`."""
    _run(args, reference.perturb_)


def random_perturb_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.perturb_`."""
    _run(args, reference.perturb_, numbers=args.positions)


def gaussian_perturb_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.gaussian_perturb_`."""
    offsets = [4 * quad for quad in (args.numbers >> NUMBER_BITS).tolist()]
    _run(args, reference.gaussian_perturb_, numbers=args.positions, offsets=offsets)


def perturb_by_class_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.perturb_by_class_`; here each tensor is one of a single class."""
    scales = args.signals["scales"][None, args.positions]
    _run(args, reference.perturb_by_class_, role=1, class_grads=[args.tensors(1)], scales=scales)


def combine_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.combine_`."""
    _run(args, reference.combine_)


def restore_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.restore_`."""
    _run(args, reference.restore_)


def sgd_step_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.sgd_step_`."""
    _run(args, reference.sgd_step_)


def adam_step_(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.adam_step_`."""
    _run(args, reference.adam_step_)


def grad_norm(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.grad_norm`."""
    named = _arguments(args)
    result = named.pop("norm")
    if args.bucket_count == 1:
        result.copy_(reference.grad_norm(**named))
    else:
        norms = reference.grad_norm(**named | {"groups": args.buckets.tolist()}, per_group=True)
        result.zero_()[: len(norms)] = norms


def grad_dots(args: LaunchArgs) -> None:
    """See :func:`ltsam_fast.ops.grad_dots`."""
    named = _arguments(args)
    named.pop("norm").copy_(reference.grad_dots(**named))


def cross_entropy(args: RowArgs) -> None:
    """See :class:`~ltsam_fast.launch_args.RowArgs`."""
    given, numbers, by_label = args.tensors.get, args.numbers.of_reference(), args.numbers.by_label
    logits: Any = given("logits")
    targets: Any = given("targets")
    named: dict[str, Any] = {name: given(name) for name in ("scale", "shift", "margin", "weight", "spread", "draw")}
    if (losses := given("losses")) is not None:
        result, new_state = losses_and_state(logits, targets, **named, **numbers)
        losses.copy_(result)
        if (state := given("state")) is not None:
            state.copy_(new_state)
    for weights, grad in ((given("cotangent_0"), given("grad_0")), (given("cotangent_1"), given("grad_1"))):
        if weights is not None and grad is not None:
            cotangent = weights[targets] / args.rows if by_label else weights
            grad.copy_(cross_entropy_gradient(cotangent, logits, targets, **named, **numbers))
