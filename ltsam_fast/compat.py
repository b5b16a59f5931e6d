"""The published classes' import names and call signatures: a script changes its import line and nothing else.

===============================================  ====================================================================
published                                        here, ``from ltsam_fast.compat import ...``
===============================================  ====================================================================
davda54/sam: ``sam.SAM``                         ``SAM(params, base_optimizer, rho, adaptive, **kwargs)``; phases, and
                                                 ``step(closure)`` with a closure that calls ``backward()``
SamsungLabs/ASAM: ``asam.ASAM``, ``asam.SAM``    ``ASAM``, ``SAM(optimizer, model, rho, eta)``; ``ascent_step``,
                                                 ``descent_step``
scongl/Focal-SAM: ``focal_sam.FocalSAM``         ``FocalSAM``
cool-xuan/Imbalanced_SAM: ``imbsam.ImbSAM``      ``ImbSAM``, ``SAM(optimizer, model, rho)``
and its ``SAM``
Zemdalk/SSE-SAM: ``ssesam.SSESAM`` and its       ``SSESAM``, ``ImbSAM``, ``SAM``
``ImbSAM``, ``SAM``
Keke921/GNM-PT: ``vtab.gnm.GNM``                 ``GNM`` (phases; its ``step`` cannot run as published)
nblt/F-SAM: ``utils.FriendlySAM`` and its        ``FriendlySAM``, ``SAM``
``SAM``
juntang-zhuang/GSAM: ``gsam.GSAM`` and its       ``GSAM`` with ``set_closure``, ``step``, ``update_rho_t``;
schedulers                                       ``LinearScheduler``, ``CosineScheduler``, ``PolyScheduler``,
                                                 ``ProportionScheduler``, ``SchedulerBase``
intelligent-machine-learning/dlrover:            ``WeightedSAM``, ``enable_running_stats``, ``disable_running_stats``
``atorch.optimizers.wsam.WeightedSAM``
rollovd/LookSAM: ``looksam.LookSAM``             ``LookSAM``
dydjw9/Efficient_SAM: ``utils.Esam.ESAM``        ``ESAM`` with ``paras``, ``step``, ``returnthings`` and its phases
===============================================  ====================================================================

Not here: SSAM's ``SSAMF`` and ``SSAMD`` (Mi-Peng), whose scripts build them from a registry and let them read the training set:
use ``ltsam_fast.SparseSAM``; CC-SAM's, m-SAM's and JAX's scripts, which have no optimizer class.

Where results depend on it, the published behaviour is kept: the tail's weight of 2 in today's ImbSAM script, GNM's double
noise in epoch 0, what each class adds to the norm, LookSAM's decomposition tensor by tensor, ESAM's choice by ``>``. Not kept
are defects: state that is lost on resume, parameters that are never restored, restoring by subtraction, a mean of no samples.
Under DistributedDataParallel gradients are averaged as by this package's class of the method.

Classes around an optimizer perturb the parameters that it has, each group with the ``rho`` given; ``opt.rho = x``, and a
``group["rho"]``, take effect with the next step.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

import ltsam_fast
from ltsam_fast.optim.ascent import sign_of_all
from ltsam_fast.optim.checks import check_count, check_factor, check_share
from ltsam_fast.optim.focal_sam import FocalSAM
from ltsam_fast.optim.gradients import _swap_gradients
from ltsam_fast.optim.optimizer import SharpnessAware
from ltsam_fast.optim.state import check_base

__all__ = [
    "ASAM",
    "CosineScheduler",
    "ESAM",
    "FocalSAM",
    "FriendlySAM",
    "GNM",
    "GSAM",
    "ImbSAM",
    "LinearScheduler",
    "LookSAM",
    "PolyScheduler",
    "ProportionScheduler",
    "SAM",
    "SSESAM",
    "SchedulerBase",
    "WeightedSAM",
    "disable_running_stats",
    "enable_running_stats",
]


def _wrap(optimizer: Optimizer, **options: Any) -> tuple[list[dict[str, Any]], Callable[..., Optimizer]]:
    """Groups, with their options set, and a base that is there already, for the methods' constructors."""
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SharpnessAware):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, such as SGD, got {optimizer!r}")
    check_base(type(optimizer))
    for name in ("rho", "eta", "norm_eps"):
        check_factor(name, options.get(name, 0.0))
    for group in optimizer.param_groups:
        group.update(options)
    return optimizer.param_groups, lambda *_, **__: optimizer


class _Around(SharpnessAware):
    """Base of the classes that are published as wrappers of an optimizer, with a radius of their own."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that takes the step."""
        return self.base_optimizer

    @property
    def rho(self) -> float:
        """The radius, in units of the weights; setting it sets that of all groups."""
        return self.param_groups[0]["rho"]  # type: ignore[no-any-return]

    @rho.setter
    def rho(self, value: float) -> None:
        self._set("rho", value)

    def _set(self, name: str, value: Any) -> None:
        value = value.item() if hasattr(value, "item") else value
        check_factor(name, value)
        for group in self.param_groups:
            group[name] = value


class _Published(SharpnessAware):
    """Base of the classes whose ``step`` has closures that run forward and backward."""

    def _check_free(self) -> None:
        """Raises ValueError where a step cannot begin."""
        if self._phase:
            self._enter("step")
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "scaler.step(optimizer, ...) is not supported here: use the phases, or ltsam_fast's own class"
            )

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        """Puts the unperturbed weights back, and clears gradients, if a step fails."""
        try:
            yield
        except BaseException:
            self.restore()
            self._clear_gradients()
            raise

    def _gradient_of(self, closure: Callable[[], Any]) -> Any:
        """Runs a closure that calls ``backward()``; returns what it returns."""
        with torch.enable_grad():
            result = closure()
        if isinstance(result, Tensor) and result.dim() == 1 and len(result) > 1:
            raise ValueError(
                f"closure must call backward() and return a scalar, got {tuple(result.shape)}: per-sample losses are for "
                "ltsam_fast's own classes, such as ltsam_fast.SAM"
            )
        if all(param.grad is None for param in self._parameters()[0]):
            raise ValueError(
                "closure must call backward(), but left no gradient; one that returns per-sample losses is for ltsam_fast.SAM"
            )
        return result

    def _climb_and_step(self, closure: Callable[[], Any]) -> Any:
        """Climbs along the present gradients and steps with those that ``closure`` makes there."""
        self._climb()
        self._clear_gradients()
        result = self._gradient_of(closure)
        self._descend()
        return result


class _WithGradients(_Published):
    """``step`` as davda54's SAM has it."""

    @torch.no_grad()
    def step(self, closure: Any = None, targets: Any = None, scaler: Any = None) -> Any:  # type: ignore[override]
        """The published step: climbs along the gradients that are there, runs ``closure``, goes back and steps.

        Args:
            closure: Runs forward and backward. What it returns, detached, is returned.
            targets: Must be None: it belongs to closures that return per-sample losses.
            scaler: Must be None, too.

        Raises:
            ValueError: There is no gradient to climb along, ``closure`` does not call ``backward()``, or it returns per-sample
                losses: that is what :class:`ltsam_fast.SAM` takes. The weights are the unperturbed ones afterwards.
        """
        if self._ends(closure):
            return self._last_phase()
        if not callable(closure) or targets is not None or scaler is not None:
            raise ValueError(
                "closure must be given alone: step(closure), with a function that calls backward(); per-sample losses, targets "
                "and a scaler are for ltsam_fast's own classes, such as ltsam_fast.SAM"
            )
        self._check_free()
        if all(param.grad is None for param in self._parameters()[0]):
            raise ValueError(
                "no parameter has a gradient: call backward() before step(closure), as the published script does; a closure "
                "that returns per-sample losses is for ltsam_fast.SAM, which needs no gradient"
            )
        with self._restoring():
            loss = self._climb_and_step(closure)
        return loss.detach() if isinstance(loss, Tensor) else loss


class SAM(_WithGradients, _Around, ltsam_fast.SAM):
    """The published SAM: ``(params, base_optimizer, rho, adaptive, **kwargs)``, or ``(optimizer, model, rho, eta)``.

    Args:
        params: Parameters or groups; or an optimizer, then the next argument is the model, which is not looked at.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        adaptive: ASAM. Around an optimizer a number in this place is Samsung's ``eta``, which SAM does not look at.
        optimizer: The optimizer by its name; with ``model`` and maybe ``eta``.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        TypeError: Arguments of both forms are mixed.

    Source: davda54/sam, sam.py; cool-xuan/Imbalanced_SAM, imbsam.py; SamsungLabs/ASAM, asam.py.
    """

    def __init__(
        self,
        params: Any = None,
        base_optimizer: Any = None,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        self._wraps = optimizer is not None or isinstance(params, Optimizer)
        if self._wraps:
            both = optimizer is not None and (params is not None or base_optimizer is not None)
            if both or kwargs.keys() - {"model", "eta"} or (base_optimizer is not None and "model" in kwargs):
                raise TypeError(
                    f"around an optimizer SAM takes optimizer, model, rho and eta, got also {sorted(kwargs)}"
                )
            adaptive, kwargs = adaptive is True, {}
            around = params if optimizer is None else optimizer
            params, base_optimizer = _wrap(around, rho=rho, adaptive=adaptive, norm_eps=1e-16)
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)

    _kept = (*ltsam_fast.SAM._kept, "_wraps")

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Climbs. Around an optimizer gradients are always cleared."""
        super().first_step(zero_grad or self._wraps, scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """Goes back and steps. Around an optimizer gradients are always cleared."""
        super().second_step(zero_grad or self._wraps)

    def ascent_step(self) -> None:
        """Samsung's name of the first step."""
        self.first_step(zero_grad=True)

    def descent_step(self) -> None:
        """Samsung's name of the second step."""
        self.second_step(zero_grad=True)


class ASAM(_Around, ltsam_fast.SAM):
    """The authors' ASAM: ``(optimizer, model, rho, eta)``, ``ascent_step`` and ``descent_step``.

    Parameters with "weight" in their name are scaled by |w| + eta, the others not at all.

    Args:
        optimizer: The optimizer that takes the step.
        model: Names the parameters.
        rho: Radius, >= 0.
        eta: Added to |w|, >= 0. ``opt.eta = x`` takes effect too.

    Source: SamsungLabs/ASAM, asam.py.
    """

    phases = ("ascent_step", "descent_step")
    _kept = (*ltsam_fast.SAM._kept, "_scaled")

    def __init__(self, optimizer: Optimizer, model: torch.nn.Module, rho: float = 0.5, eta: float = 0.01) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, whose parameters' names count, got {model!r}")
        params, base = _wrap(optimizer, rho=rho, adaptive=True, eta=eta, norm_eps=1e-16)
        self._scaled = {param for name, param in model.named_parameters() if "weight" in name}
        super().__init__(params, base, rho, adaptive=True)

    @property
    def eta(self) -> float:
        """Added to |w|; setting it sets that of all groups."""
        return self.param_groups[0]["eta"]  # type: ignore[no-any-return]

    @eta.setter
    def eta(self, value: float) -> None:
        self._set("eta", value)

    # In the ascent each group counts for two: its parameters that are scaled, and the others.
    def _parameters(self, ascent: bool = False) -> tuple[list[Tensor], list[int]]:
        params, groups = super()._parameters(ascent)
        if ascent:
            groups = [2 * group + (param not in self._scaled) for param, group in zip(params, groups, strict=True)]
        return params, groups

    def _hyper(self, name: str) -> Any:
        return tuple(half for v in super()._hyper(name) for half in (v, False if name == "adaptive" else v))

    @torch.no_grad()
    def ascent_step(self) -> None:
        """Climbs along the present gradients and clears them.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient.
        """
        self._run("ascent_step", self._climb)
        self._clear_gradients()

    @torch.no_grad()
    def descent_step(self) -> None:
        """Goes back and takes the optimizer's step with the present gradients, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._run("descent_step", self._descend)
        self._clear_gradients()


class FriendlySAM(_WithGradients, ltsam_fast.FriendlySAM):
    """F-SAM as published: ``(params, base_optimizer, rho, sigma, lmbda, adaptive, **kwargs)``, phases and ``step(closure)``.

    Args:
        params: Parameters or groups.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        sigma: How much of the gradient's running mean is left out, >= 0.
        lmbda: Decay of the mean, in [0, 1).
        adaptive: Scale the perturbation by the weights, as ASAM does.
        **kwargs: Options of ``base_optimizer``.

    Source: nblt/F-SAM, utils.py.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rho: float = 0.05,
        sigma: float = 1,
        lmbda: float = 0.9,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, adaptive, sigma=sigma, lmbda=lmbda, **kwargs)


class ImbSAM(_Around, ltsam_fast.ImbSAM):
    """ImbSAM as published: ``(optimizer, model, rho)``, with three phases; the script weighs the losses.

    Args:
        optimizer: The optimizer that takes the step.
        model: Not looked at: the optimizer has the parameters.
        rho: Radius, in units of the weights, >= 0. ``opt.rho = x`` takes effect too.
        class_counts: If given, ``step(closure, targets)`` works too, with a tail weight of 2 as in today's script.
        eta: Classes with fewer samples than this are tail.
        tail_weight: The tail's weight in ``step(closure, targets)``.

    Source: cool-xuan/Imbalanced_SAM, imbsam.py and utils/trainval.py.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module | None = None,
        rho: float = 0.05,
        *,
        class_counts: Any = None,
        eta: float = 20,
        tail_weight: float = 2.0,
    ) -> None:
        params, base = _wrap(optimizer, rho=rho, norm_eps=1e-16)
        super().__init__(params, base, rho, class_counts=class_counts, eta=eta, tail_weight=tail_weight)


class SSESAM(_Around):
    """SSE-SAM as published: ``compute_and_add_epsilon``, ``compute_grad_sum_and_restore_p``, ``update``, ``update_rho``.

    Args:
        optimizer: The optimizer that takes the step.
        model: Not looked at: the optimizer has the parameters.
        head_rho: The head's radius, >= 0, until the switch.
        tail_rho: The tail's radius, >= 0.
        gamma: The share of the epochs before the switch; 0: it never comes.
        total_epochs: Number of epochs.

    Source: Zemdalk/SSE-SAM, ssesam.py (MIT).
    """

    phases = (
        "compute_and_add_epsilon", "compute_grad_sum_and_restore_p", "compute_and_add_epsilon",
        "compute_grad_sum_and_restore_p", "update",
    )  # fmt: skip
    _kept = (*SharpnessAware._kept, "rho_is", "gamma", "total_epochs", "epoch_count")
    rho = None  # type: ignore[assignment]
    """Published as ``rho_is``: the head's radius and the tail's."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module | None,
        head_rho: float,
        tail_rho: float,
        gamma: float = 0.0,
        total_epochs: int = 200,
    ) -> None:
        check_factor("tail_rho", tail_rho)
        params, base = _wrap(optimizer, rho=head_rho, norm_eps=1e-16)
        super().__init__(params, base, head_rho)
        self.rho_is = [head_rho, tail_rho]
        self.gamma, self.total_epochs, self.epoch_count = gamma, total_epochs, 0

    def _hyper(self, name: str) -> Any:
        values = super()._hyper(name)
        return (self._radius,) * len(values) if name == "rho" else values

    def _forget(self) -> None:
        super()._forget()
        self._radius = 0.0
        self._sum: list[Tensor | None] = []

    @torch.no_grad()
    def compute_and_add_epsilon(self, n_i: int) -> None:
        """Climbs along the present gradients, with the head's radius (0) or the tail's (1), and clears them."""
        self._radius = self.rho_is[n_i]
        self._run("compute_and_add_epsilon", self._climb)
        self._clear_gradients()

    @torch.no_grad()
    def compute_grad_sum_and_restore_p(self) -> None:
        """Takes the gradients over and goes back."""
        self._run("compute_grad_sum_and_restore_p", self._take_over)

    def _take_over(self, *signals: Tensor | None) -> None:
        params, _ = self._parameters()
        grads = _swap_gradients(params, [None] * len(params))
        if self._sum:
            grads = [b if a is None else a if b is None else b.add_(a) for a, b in zip(self._sum, grads, strict=True)]
        self._sum = grads
        self._come_back()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the base optimizer's step with the sum of the gradients."""
        self._run("update", self._step_with_sum)
        self._clear_gradients()

    def _step_with_sum(self, *signals: Tensor | None) -> None:
        _swap_gradients(self._parameters()[0], self._sum)
        self._sum = []
        self._descend(*signals)

    def update_rho(self) -> None:
        """Counts an epoch; after ``gamma * total_epochs`` of them the head's radius is 0."""
        self.epoch_count += 1
        if 0 < self.gamma < 1 and self.epoch_count >= self.gamma * self.total_epochs:
            self.rho_is[0] = 0.0


class GNM(ltsam_fast.GNM):
    """GNM as published: ``(config, params, base_optimizer, rho, adaptive, **kwargs)`` and ``first_step(epoch)``.

    Args:
        config: Has ``dis_mul`` and ``loss.GCL.reweight_epoch``.
        params: Parameters or groups.
        base_optimizer: The class that takes the step.
        rho: Radius, in units of the weights, >= 0.
        adaptive: Not looked at, as published.
        **kwargs: Options of ``base_optimizer``.

    Source: Keke921/GNM-PT, vtab/gnm.py (MIT).
    """

    def __init__(
        self, config: Any, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any
    ) -> None:
        every = config.loss.GCL.reweight_epoch
        super().__init__(params, base_optimizer, rho, dis_mul=config.dis_mul, decay_every=every, **kwargs)

    def _halvings(self, epoch: int | None) -> int:
        # Rounded down, as published: in epoch 0 that is -1, and the noise has twice its size.
        return super()._halvings(epoch) if epoch is None else (epoch - 1) // int(self.decay_every or 1)


class GSAM(_Published, _Around, ltsam_fast.GSAM):
    """GSAM as published in PyTorch: around an optimizer, with a schedule of the radius.

    Args:
        params: Not looked at: the optimizer has the parameters.
        base_optimizer: The optimizer that takes the step.
        model: The network. Running statistics see the unperturbed pass only.
        gsam_alpha: How much of the part of the clean gradient that the perturbed one does not have is left out, >= 0.
        rho_scheduler: Its ``step()`` returns the radius; called once here, and by ``update_rho_t()``.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        perturb_eps: Added to the norm, >= 0.
        **kwargs: Not looked at, as published.

    Source: juntang-zhuang/GSAM, gsam/gsam.py (MIT).
    """

    forward_backward_func: Callable[[], Any] | None = None
    """What :meth:`set_closure` made."""
    _kept = (*ltsam_fast.GSAM._kept, "rho_scheduler")

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        model: torch.nn.Module,
        gsam_alpha: float,
        rho_scheduler: Any,
        adaptive: bool = False,
        perturb_eps: float = 1e-12,
        **kwargs: Any,
    ) -> None:
        check_factor("gsam_alpha", gsam_alpha)
        groups, base = _wrap(base_optimizer, rho=0.0, adaptive=adaptive, norm_eps=perturb_eps)
        super().__init__(groups, base, 0.0, adaptive, alpha=gsam_alpha, model=model)
        self.rho_scheduler = rho_scheduler
        self.update_rho_t()

    @property
    def rho_t(self) -> float:
        """The radius; setting it sets that of all groups."""
        return self.rho

    @rho_t.setter
    def rho_t(self, value: float) -> None:
        self.rho = value

    def update_rho_t(self) -> float:
        """Takes the schedule's next radius, and returns it."""
        self.rho = self.rho_scheduler.step()
        return self.rho

    def set_closure(self, loss_fn: Any, inputs: Any, targets: Any, **kwargs: Any) -> None:
        """Sets the batch, and the loss ``loss_fn(model(inputs), targets, **kwargs)``, a scalar, for the next steps."""

        def forward_backward() -> tuple[Any, Tensor]:
            outputs = self.model(inputs)  # type: ignore[misc]
            loss = loss_fn(outputs, targets, **kwargs)
            loss.backward()
            return outputs, loss.detach().clone()

        self.forward_backward_func = forward_backward

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs forward and backward and returns (outputs, loss); ``None``: what :meth:`set_closure` has set.

        Returns:
            What it returned at the unperturbed weights.

        Raises:
            ValueError: Neither is there, or it left no gradient.
        """
        if self._ends(closure):
            return self._last_phase()
        run = closure or self.forward_backward_func
        if run is None:
            raise ValueError("closure must be given, or set_closure(loss_fn, inputs, targets) be called, before step()")
        self._check_free()
        with self._restoring():
            self._clear_gradients()
            with self._local():
                result = self._gradient_of(run)
            self._climb_and_step(run)
        return result


class SchedulerBase:
    """A number that changes with the steps: warm-up from ``init_value``, then :meth:`step_func`.

    Args:
        T_max: Number of steps in all.
        max_value: The value after the warm-up.
        min_value: The value at the end.
        init_value: The value at the beginning, if there is a warm-up.
        warmup_steps: Steps of the warm-up.
        optimizer: If given, it is the learning rate of this optimizer's groups too.

    Source: juntang-zhuang/GSAM, gsam/scheduler.py (MIT).
    """

    def __init__(
        self,
        T_max: float,
        max_value: float,
        min_value: float = 0.0,
        init_value: float = 0.0,
        warmup_steps: int = 0,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.t, self.total_steps, self.warmup_steps = 0, T_max, warmup_steps
        self.max_value, self.min_value, self.init_value = max_value, min_value, init_value
        self.optimizer = optimizer

    def step(self) -> float:
        """The value now; then goes a step further."""
        if self.t < self.warmup_steps:
            value = self.init_value + (self.max_value - self.init_value) * self.t / self.warmup_steps
        else:
            value = self.max_value if self.t == self.warmup_steps else self.step_func()
        self.t += 1
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = value
        return value

    def step_func(self) -> float:
        """The value after the warm-up."""
        raise NotImplementedError

    @property
    def _done(self) -> float:
        """The share of the steps after the warm-up."""
        return (self.t - self.warmup_steps) / (self.total_steps - self.warmup_steps)


class LinearScheduler(SchedulerBase):
    """Falls along a line."""

    def step_func(self) -> float:
        """The value after the warm-up."""
        return self.max_value + (self.min_value - self.max_value) * self._done


class CosineScheduler(SchedulerBase):
    """Falls along a cosine."""

    def step_func(self) -> float:
        """The value after the warm-up."""
        return self.min_value + (self.max_value - self.min_value) * (math.cos(math.pi * self._done) + 1) / 2


class PolyScheduler(SchedulerBase):
    """Falls with the power ``poly_order`` <= 0 of the number of steps."""

    def __init__(self, poly_order: float = -0.5, *args: Any, **kwargs: Any) -> None:
        if poly_order > 0:
            raise ValueError(f"poly_order must be a number <= 0, so that the value falls, got {poly_order!r}")
        super().__init__(*args, **kwargs)
        self.poly_order = poly_order

    def step_func(self) -> float:
        """The value after the warm-up."""
        fallen: float = (self.t - self.warmup_steps) ** self.poly_order
        return self.min_value + (self.max_value - self.min_value) * fallen


class ProportionScheduler:
    """A value that moves with a learning rate, from ``min_value`` at ``min_lr`` to ``max_value`` at ``max_lr``.

    The learning rate is the first group's (the published class takes the list of all and fails); the value stays in
    [min_value, max_value].

    Args:
        pytorch_lr_scheduler: Any of torch.optim.lr_scheduler.
        max_lr: The learning rate at ``max_value``.
        min_lr: The learning rate at ``min_value``.
        max_value: The largest value.
        min_value: The smallest.

    Source: juntang-zhuang/GSAM, gsam/scheduler.py (MIT).
    """

    def __init__(
        self, pytorch_lr_scheduler: Any, max_lr: float, min_lr: float, max_value: float, min_value: float
    ) -> None:
        if max_value < min_value or max_lr < min_lr or (max_lr == min_lr and max_value != min_value):
            raise ValueError(
                "max_lr and max_value must not be below min_lr and min_value, nor may max_value be above where max_lr is not, "
                f"got {max_lr!r}, {min_lr!r}, {max_value!r} and {min_value!r}"
            )
        self.t, self.pytorch_lr_scheduler = 0, pytorch_lr_scheduler
        self.max_lr, self.min_lr, self.max_value, self.min_value = max_lr, min_lr, max_value, min_value

    def step(self) -> float:
        """The value at the present learning rate."""
        self.t += 1
        if self.max_lr == self.min_lr:
            return self.max_value
        share = (float(self.pytorch_lr_scheduler.get_last_lr()[0]) - self.min_lr) / (self.max_lr - self.min_lr)
        return self.min_value + (self.max_value - self.min_value) * min(1.0, max(0.0, share))


class WeightedSAM(_Published, _Around, ltsam_fast.WSAM):
    """WSAM as published: ``(model, base_optimizer, rho, gamma, ...)``, phases and ``step(closure)``.

    Args:
        model: The network. Running statistics see the unperturbed pass only.
        base_optimizer: The optimizer that takes the step.
        rho: Radius, in units of the weights, >= 0.
        gamma: Weight of the sharpness, in [0, 1); its ``alpha`` = gamma / (1 - gamma) is in the groups, unless the base
            optimizer has an option of this name.
        sam_eps: Added to the norm, >= 0.
        adaptive: Scale the perturbation by the weights, as ASAM does.
        decouple: The sharpness takes a step of its own.
        max_norm: Clip the gradients of both passes to this norm, each; ``None``: do not.
        **kwargs: Not looked at, as published.

    Raises:
        ValueError: A number is out of its range; in a step, groups differ in ``alpha``.

    Source: intelligent-machine-learning/dlrover, atorch/optimizers/wsam.py. An older version's defaults were gamma=0.88 and
    max_norm=1.0.
    """

    _kept = (*ltsam_fast.WSAM._kept, "max_norm")

    def __init__(
        self,
        model: torch.nn.Module,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        sam_eps: float = 1e-12,
        adaptive: bool = False,
        decouple: bool = True,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_factor("gamma", gamma, below=1.0)
        check_factor("sam_eps", sam_eps)
        if max_norm is not None:
            check_factor("max_norm", max_norm)
        self.max_norm = max_norm
        groups, base = _wrap(base_optimizer, rho=rho, adaptive=adaptive, norm_eps=sam_eps)
        if "alpha" not in base_optimizer.defaults:
            for group in groups:
                group["alpha"] = gamma / (1 - gamma)
        super().__init__(groups, base, rho, adaptive, gamma=gamma, decouple=decouple, model=model)

    def _mix(self, grads: list[Tensor | None], kept: list[Tensor | None]) -> Tensor:
        theirs = "alpha" in self.base_optimizer.defaults
        alphas = {self.gamma / (1 - self.gamma) if theirs else float(group["alpha"]) for group in self.param_groups}
        if len(alphas) > 1:
            raise ValueError(f"alpha must be the same in all groups, got {sorted(alphas)}")
        (a,) = alphas
        return self._constant((0.0, 1.0, a, -a) if self.decouple else (a, 1 - a, 0.0, 0.0))

    def _clip(self, grads: list[Tensor | None], grad_scale: Tensor | None) -> None:
        """Clips one pass's gradients, in place."""
        if self.max_norm is not None:
            norm = self._norm(grads, use=" of a pass")
            factor = (self.max_norm / (norm / (1.0 if grad_scale is None else grad_scale) + 1e-6)).clamp(max=1.0)
            for grad in grads:
                if grad is not None:
                    grad.mul_(factor.to(grad))

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        super()._climb(grad_scale, found_inf)
        self._clip(self._clean, grad_scale)

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self._clip([param.grad for param in self._parameters()[0]], grad_scale)
        super()._descend(grad_scale, found_inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs forward and backward, and is called twice. As published, gradients that are there already count: the
                first call adds to them.

        Returns:
            What it returned at the unperturbed weights, detached.

        Raises:
            ValueError: There is no closure, it returns per-sample losses, or it left no gradient.
        """
        if self._ends(closure):
            return self._last_phase()
        if not callable(closure):
            raise ValueError("closure must be given: step(closure), with a function that calls backward()")
        self._check_free()
        with self._restoring():
            with self._local():
                loss = self._gradient_of(closure)
            self._climb_and_step(closure)
        return loss.detach() if isinstance(loss, Tensor) else loss


def disable_running_stats(model: torch.nn.Module) -> None:
    """Keeps batch norm's running statistics as they are, until :func:`enable_running_stats`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not hasattr(module, "backup_momentum"):
            module.backup_momentum = module.momentum  # type: ignore[assignment]
            module.momentum = 0.0


def enable_running_stats(model: torch.nn.Module) -> None:
    """Undoes :func:`disable_running_stats`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and hasattr(module, "backup_momentum"):
            module.momentum = module.backup_momentum  # type: ignore[assignment]
            del module.backup_momentum


class LookSAM(_Published):
    """LookSAM as published by rollovd: ``step(t, samples, targets)``, after a ``backward()`` of the caller's.

    The decomposition is tensor by tensor; where a gradient is zero, so is its direction. Every pass updates running statistics.

    Args:
        k: Climb every k-th step, >= 1.
        alpha: Weight of the part that is reused, >= 0. ``opt.alpha = x`` and ``opt.k = x`` take effect too.
        model: The network, with the parameters.
        base_optimizer: The class that takes the step.
        criterion: ``criterion(model(samples), targets)`` is the loss, a scalar.
        rho: Radius, in units of the weights, >= 0.
        **kwargs: Options of ``base_optimizer``.

    Source: rollovd/LookSAM, looksam.py.
    """

    _buffers = ("grad_v",)
    _kept = (*SharpnessAware._kept, "k", "alpha", "criterion")

    def __init__(
        self,
        k: int,
        alpha: float,
        model: torch.nn.Module,
        base_optimizer: Any,
        criterion: Callable[[Any, Any], Tensor],
        rho: float = 0.05,
        **kwargs: Any,
    ) -> None:
        check_count("k", k)
        check_factor("alpha", alpha)
        self.k, self.alpha, self.criterion = k, alpha, criterion
        params = [{"params": model.parameters(), "norm_eps": 1e-8}]
        super().__init__(params, base_optimizer, rho, model=model, **kwargs)

    def _freeze_statistics(self) -> None:
        """As published they see every pass."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        t: int | None = None,
        samples: Any = None,
        targets: Any = None,
        zero_sam_grad: bool = True,
        zero_grad: bool = True,
    ) -> Any:
        """One step with the gradients that are there.

        Args:
            t: The number of the step, from 0: multiples of k climb.
            samples: The batch, for the pass at the perturbed weights.
            targets: Its targets.
            zero_sam_grad: Clear the gradients before that pass; else it adds to them.
            zero_grad: Clear the gradients at the end.

        Raises:
            ValueError: There is no gradient, or the first step of all does not climb.
        """
        if t is None and self._ends(None):
            return self._last_phase()
        if t is None:
            raise ValueError("t must be given: step(t, samples, targets), with the number of the step")
        self._check_free()
        params, _ = self._parameters()
        moving = [param for param in params if param.grad is not None]
        if not moving:
            raise ValueError("no parameter has a gradient: call backward() before step(t, samples, targets)")
        looks = t % self.k == 0
        if not looks and not any("grad_v" in self.state[param] for param in moving):
            raise ValueError(
                f"t must be a multiple of k = {self.k} in the first step, got {t}: nothing is there to be reused"
            )
        with self._restoring():
            if looks:
                clean = {param: param.grad.clone() for param in moving}  # type: ignore[union-attr]
                self._climb()
                if zero_sam_grad:
                    self._clear_gradients()
                with torch.enable_grad():
                    self.criterion(self.model(samples), targets).backward()  # type: ignore[misc]
                for param, g in clean.items():
                    if param.grad is not None:
                        self.state[param]["grad_v"] = param.grad - _share(param.grad, g) * g
            else:
                for param in moving:
                    if (grad_v := self.state[param].get("grad_v")) is not None:
                        param.grad.add_(grad_v * (self.alpha * param.grad.norm() / (grad_v.norm() + 1e-8)))  # type: ignore[union-attr]
            self._descend()
        if zero_grad:
            self._clear_gradients()
        return None


def _share(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / |b|^2, 0-d; 0 where b is zero."""
    square = (b * b).sum()
    return torch.where(square > 0, (a * b).sum() / square, torch.zeros_like(square))


class ESAM(_Published, _Around):
    """ESAM as published: ``opt.paras = [inputs, targets, loss_fct, model, defined_backward]``, ``opt.step()``.

    At the end of a step each parameter tensor with a gradient is frozen with probability 1 - beta, by ``random.random()``,
    until the next ascent, but never all of them. The samples whose loss rises more than the int(gamma B)-th most are kept, or
    the first if there is none; with gamma >= 0.99 all are. Every pass updates running statistics.

    Args:
        params: Not looked at: the optimizer has the parameters.
        base_optimizer: The optimizer that takes the step.
        rho: Radius, in units of the weights, >= 0; it is divided by ``beta``.
        beta: Share of the tensors that are perturbed, in (0, 1].
        gamma: Share of the samples that are kept, in (0, 1].
        adaptive: Scale the perturbation by the weights, as ASAM does.
        **kwargs: Not looked at, as published.

    Tensors that the caller froze stay frozen, unlike in the published class.

    Source: dydjw9/Efficient_SAM, utils/Esam.py.
    """

    phases = ("first_step", "second_step")
    _kept = (*SharpnessAware._kept, "beta", "gamma", "_frozen")

    paras: Any = None
    """Inputs, targets, the loss, which returns per-sample losses (B,), the network, and ``defined_backward(loss)``."""
    returnthings: Any = None
    """Predictions and per-sample losses (B,) at w, of the last step."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        check_share("beta", beta)
        check_share("gamma", gamma)
        self.beta, self.gamma = beta, gamma
        self._frozen: list[Tensor] = []
        groups, base = _wrap(base_optimizer, rho=rho, adaptive=adaptive, norm_eps=1e-7)
        super().__init__(groups, base, rho, adaptive)

    def _ascent(self, *_: Any) -> dict[str, Any]:
        return {"rho": tuple(radius / self.beta for radius in self._hyper("rho"))}

    def _climb(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        for param in self._frozen:
            param.requires_grad_(True)
        self._frozen = []
        super()._climb(grad_scale, found_inf)

    def _descend(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        moving = [param for param in self._parameters()[0] if param.grad is not None and param.requires_grad]
        super()._descend(grad_scale, found_inf)
        frozen = [param for param in moving if random.random() > self.beta]
        self._frozen = frozen[: len(moving) - 1]  # without any the next backward could not be
        for param in self._frozen:
            param.requires_grad_(False)

    first_step = ltsam_fast.SAM.first_step
    second_step = ltsam_fast.SAM.second_step

    @torch.no_grad()
    def step(self) -> Any:  # type: ignore[override]
        """One step with ``paras``; leaves predictions and losses at w in ``returnthings``.

        Raises:
            ValueError: ``paras`` is not set, or the loss is not per sample.
        """
        if self._ends(None):
            return self._last_phase()
        if self.paras is None:
            raise ValueError("paras must be set before step(): [inputs, targets, loss_fct, model, defined_backward]")
        self._check_free()
        inputs, targets, loss_fct, model, defined_backward = self.paras
        sign = sign_of_all(self.param_groups)
        with self._restoring():
            with torch.enable_grad(), model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                predictions = model(inputs)
                losses = loss_fct(predictions, targets)
                if losses.shape != (len(targets),):
                    raise ValueError(
                        f"loss_fct must return the per-sample losses, shape (B,), got {tuple(losses.shape)}"
                    )
                defined_backward(losses.mean())
            before = losses.detach().clone()
            self._climb()
            self._clear_gradients()
            rise = sign * (loss_fct(model(inputs), targets) - before)
            chosen: Any = slice(None)
            if self.gamma < 0.99:
                largest = rise.topk(max(1, int(len(targets) * self.gamma))).values
                chosen = rise > largest[-1]
                if not bool(chosen.any()):
                    chosen = rise.topk(1).indices
            with torch.enable_grad():
                defined_backward(loss_fct(model(inputs[chosen]), targets[chosen]).mean())
            self._descend()
        self._clear_gradients()
        self.returnthings = (predictions, before)
        return None
