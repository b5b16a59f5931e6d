r"""Losses for imbalanced classes: modules that are called with logits (B, C) and integer targets (B,).

Each is one fused pass over the logits forward and one backward, or torch's own functions for small batches on a CPU: see
:func:`ltsam_fast.ops.adjusted_cross_entropy`. In the formulas :math:`n_c` are the training counts, n is their sum, and
:math:`\pi_c = n_c / n`. All losses have:

* ``class_counts``: C finite numbers >= 0, not all 0. A count of 0 is an error in losses that have no finite value for a class
  without samples. Losses that do not use the counts only check that logits have C columns.
* ``reduction``: ``"none"`` returns the losses of the samples, (B,), each multiplied by its class's weight, as the optimizers of
  this package expect from a closure. ``"sum"`` is their sum. ``"mean"`` divides the sum by the sum of the samples' weights, as
  torch does; without weights that is B.
* ``weight``: C weights >= 0, or ``None``; :meth:`Loss.set_weight` changes them during training.
* ``batch``, an argument of the call: the labels of all samples of the step. With ``reduction="none"`` the losses are then
  scaled so that their mean over the step equals ``"mean"`` of the whole batch, as in published code. Without it the mean
  divides by B, and the length of a step varies with the classes in the batch.
* ``label_smoothing``: in [0, 1], as in torch, applied to the adjusted logits.
* Dtypes: logits in float32, bfloat16 and float16 (those of ``torch.autocast``, too) give float32 losses, float64 gives
  float64. Constants are float64 buffers: they move with ``.to(device)``, stay float64 under ``.half()`` and are in the
  ``state_dict``.
* Targets out of range: an error on the CPU; on a GPU, which is not synchronized, the sample's loss is NaN.

Use any of them in a closure:

>>> import ltsam_fast as lf
>>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
>>> criterion = lf.losses.LogitAdjusted([50, 10, 2], reduction="none")
>>> opt = lf.FocalSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, class_counts=[50, 10, 2])
>>> loss = opt.step(lambda: criterion(model(x), y), targets=y)

With weights, here those of deferred reweighting:

>>> def losses(index=slice(None)):
...     return criterion(model(x[index]), y[index], batch=y)
>>> for epoch in range(2):
...     criterion.set_weight(deferred_reweighting(epoch, [50, 10, 2], start=1))
...     loss = opt.step(losses, targets=y)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ltsam_fast.backend import is_chosen
from ltsam_fast.launch_args import Numbers
from ltsam_fast.ops.checks import check_counts, check_logits, check_reduction, shown
from ltsam_fast.ops.cross_entropy import focal_cross_entropy, prepared
from ltsam_fast.ops.differentiable import Small, Vectors, adjusted_cross_entropy, are_transformed, is_watched

__all__ = [
    "GCL",
    "LDAM",
    "VS",
    "BalancedSoftmax",
    "ClassBalanced",
    "CrossEntropy",
    "Focal",
    "LogitAdjusted",
    "Loss",
    "deferred_reweighting",
]


_CONSTANTS = ("scale", "shift", "margin", "spread", "weight")


def _check_number(name: str, value: Any, accepts: str = "a finite number >= 0") -> None:
    low, last = _ENDS[accepts]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= last:
        raise ValueError(f"{name} must be {accepts}, got {shown(value)}")


_LEAST, _MOST = math.nextafter(0.0, 1.0), math.nextafter(math.inf, 0.0)
_ENDS = {
    "a finite number >= 0": (0.0, _MOST),
    "a finite number > 0": (_LEAST, _MOST),
    "a number in [0, 1]": (0.0, 1.0),
    "a number in [0, 1)": (0.0, math.nextafter(1.0, 0.0)),
}


def _sampled(class_counts: Any, why: str) -> Tensor:
    """Returns the counts; raises ValueError unless all are positive."""
    counts = check_counts(class_counts).cpu()
    if not bool((counts > 0).all()):
        empty = int((counts == 0).int().argmax())
        raise ValueError(
            f"class_counts[{empty}] is 0, but a class without samples has {why}: leave the class out or count it as 1"
        )
    return counts


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _labels_of(batch: Tensor | Sequence[Tensor], classes: int) -> Tensor:
    """Returns the labels of a batch, or of its chunks, concatenated."""
    chunks = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, (list, tuple)) else []
    if not all(
        isinstance(chunk, Tensor) and chunk.dim() == 1 and chunk.dtype in _INTEGERS for chunk in chunks
    ) or not sum(map(len, chunks)):
        raise ValueError(
            "batch must be the labels of the step's samples, an integer tensor of shape (B,) or a list of such chunks, "
            f"got {type(batch).__name__} {getattr(batch, 'dtype', '')} {tuple(getattr(batch, 'shape', ()))}"
        )
    labels = torch.cat(chunks)
    if labels.device.type == "cpu":
        low, high = map(int, labels.aminmax())
        if not 0 <= low <= high < classes:
            raise ValueError(f"batch must lie in [0, {classes}), got {low}...{high}")
    return labels


class _Ready:
    """A loss's constants as the ops take them, for logits of one dtype and number of classes on a CPU."""

    def __init__(self, logits: Tensor, buffers: dict[str, Any], vectors: Vectors, numbers: Numbers) -> None:
        self.dtype, self.classes = logits.dtype, logits.shape[1]
        self.vectors, self.numbers, self.small = vectors, numbers, Small(vectors, numbers, logits)
        self.draws, self.weight = buffers.get("draws"), buffers["weight"]
        constants = [(name, one) for name in _CONSTANTS if (one := buffers[name]) is not None]
        # Writes of an inference tensor are not counted.
        self.watched = [(name, one, None if one.is_inference() else one._version) for name, one in constants]

    def fits(self, logits: Tensor, buffers: dict[str, Any]) -> bool:
        """Whether the logits are of that kind, and the constants still the same."""
        _, classes = logits.shape
        if classes != self.classes or logits.dtype is not self.dtype or buffers["weight"] is not self.weight:
            return False
        for name, constant, version in self.watched:  # a generator would take three times as long
            if buffers[name] is not constant or (version is not None and constant._version != version):
                return False
        return True


class Loss(nn.Module):
    """Base class of the losses: class constants, call and reduction.

    Attributes: ``scale``, ``shift``, ``margin``, ``spread`` and ``weight``, buffers of shape (C,), float64, or ``None``: see
    :func:`ltsam_fast.ops.adjusted_cross_entropy`; ``classes``: C, or ``None`` for any number; ``reduction``.
    """

    scale: Tensor | None
    shift: Tensor | None
    margin: Tensor | None
    spread: Tensor | None
    weight: Tensor | None
    _ready: _Ready | None = None  # here, for losses pickled by earlier versions have none

    def __init__(
        self,
        class_counts: Any,
        weight: Any,
        reduction: str,
        label_smoothing: float = 0.0,
        gamma: float = 0.0,
        detach: bool = False,
        **constants: Tensor,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check_number("label_smoothing", label_smoothing, "a number in [0, 1]")
        _check_number("gamma", gamma)
        self.classes = None if class_counts is None else len(check_counts(class_counts))
        self.reduction, self.label_smoothing, self.gamma = reduction, label_smoothing, gamma
        self._detach = detach
        for name in _CONSTANTS:
            self.register_buffer(name, constants.get(name))
        self.set_weight(weight)

    def set_weight(self, weight: Any) -> None:
        """Sets the weights of the classes.

        Args:
            weight: C finite numbers >= 0, e.g. from :func:`deferred_reweighting`; ``None``: all weights are 1.

        Raises:
            ValueError: A weight is negative or not finite, or there is not one per class.
        """
        if weight is None:
            self.weight = None
            return
        try:
            values = torch.as_tensor(weight, dtype=torch.float64).detach().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"weight must be numbers, one per class, got {shown(weight)}") from error
        if values.dim() != 1 or not len(values) or not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"weight must be a list of finite numbers >= 0, one per class, got {shown(weight)}")
        if self.classes not in (None, len(values)):
            raise ValueError(
                f"weight has {len(values)} numbers, but class_counts has {self.classes}: give one per class"
            )
        self.classes = len(values)
        like = next((buffer for buffer in self.buffers() if buffer is not None), values)
        self.weight = values.to(like.device)

    def forward(self, logits: Tensor, targets: Tensor, *, batch: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Returns the loss.

        Args:
            logits: (B, C), floating point, contiguous or not.
            targets: (B,), integers in [0, C).
            batch: With ``reduction="none"``: the labels of the whole batch to which these samples belong, or a sequence of its
                chunks. The losses are divided by the mean weight of these labels. Under DDP the labels of all processes give
                the mean of the global batch; those of each process give the mean of the processes' means, as in published
                code.

        Returns:
            (B,) with ``reduction="none"``, else 0-d; float32, or float64 for float64 logits.

        Raises:
            ValueError: Shapes do not match, C differs from that of ``class_counts``, a target is out of range (on the CPU), or
                ``batch`` is given with another reduction.
            TypeError: The logits' dtype is not supported.
        """
        if batch is None:
            return self._losses(logits, targets, self.reduction)
        if self.reduction != "none":
            raise ValueError(f"batch must be None with reduction={self.reduction!r}, it is for reduction='none'")
        losses = self._losses(logits, targets, "none")
        labels = _labels_of(batch, logits.shape[1]).to(losses.device, torch.int64, non_blocking=True)
        return losses if self.weight is None else losses / self.weight.to(losses, non_blocking=True)[labels].mean()

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses of the samples, (B,), each multiplied by its class's weight, whatever the ``reduction``."""
        return self._losses(logits, targets, "none")

    def _losses(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        # Of a small batch's time each line takes a hundredth, a check some: torch looks at shapes and labels itself.
        if not is_dynamo_compiling() and (ready := self._ready) is not None:
            try:
                if (
                    type(logits) is Tensor
                    and targets.dtype is torch.int64
                    and ready.fits(logits, self._buffers)
                    and logits.numel() <= ready.small.up_to
                    and logits.is_cpu
                    and not is_chosen()
                    and not are_transformed()
                ):
                    return ready.small(logits, targets, reduction, ready.draws)
            except Exception:  # what torch says names no argument: the checks do, or it comes again
                pass
        logits, targets = check_logits(logits, targets)
        if self.classes is not None and logits.shape[1] != self.classes:
            raise ValueError(
                f"logits must have shape (B, {self.classes}), for the loss was made for {self.classes} classes, "
                f"got {tuple(logits.shape)}"
            )
        noise = self._noise()
        if logits.is_cpu and not is_watched(logits):
            kept = self._kept(logits, noise)
            vectors: Vectors = (*kept.vectors[:-1], noise.get("draw"))
            numbers = kept.numbers
        else:
            vectors, numbers = self._prepared(logits, noise)
        return adjusted_cross_entropy(logits, targets, vectors, numbers, reduction)

    def _noise(self) -> dict[str, Any]:
        return {}

    def _prepared(self, logits: Tensor, noise: dict[str, Any]) -> tuple[Vectors, Numbers]:
        return prepared(
            logits, scale=self.scale, shift=self.shift, margin=self.margin, weight=self.weight,
            label_smoothing=self.label_smoothing, gamma=self.gamma, detach=self._detach, **noise,
        )  # fmt: skip

    def _kept(self, logits: Tensor, noise: dict[str, Any]) -> _Ready:
        """The constants, made anew when something has changed: on a CPU a conversion takes as long as a small loss."""
        ready = self._ready
        if ready is None or not ready.fits(logits, self._buffers):
            with torch.inference_mode(False):  # its tensors would not do for a later backward
                ready = _Ready(logits, self._buffers, *self._prepared(logits, noise))
            self.__dict__["_ready"] = ready
        return ready

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            self.__dict__["_ready"] = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}

    def weighted(self, logits: Tensor, targets: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns the losses of the samples and the gradients of two weighted means of them, from one pass over the logits.

        Args:
            logits: (B, C)
            targets: (B,)
            u: C weights of the classes in the first mean, sum_j u[y_j] loss_j / B.
            v: C weights in the second.

        Returns:
            Losses (B,), each multiplied by its class's weight, and two gradients (B, C), without a graph, as
            :func:`ltsam_fast.ops.focal_cross_entropy`; ``None`` for a loss with noise, or of other classes.
        """
        if self.spread is not None or self.classes not in (None, logits.shape[1]):
            return None
        return focal_cross_entropy(
            logits, targets, v, u, scale=self.scale, shift=self.shift, margin=self.margin, weight=self.weight,
            label_smoothing=self.label_smoothing, gamma=self.gamma, detach=self._detach,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Returns what ``print`` shows."""
        shown = [f"classes={self.classes}", f"reduction={self.reduction!r}"]
        shown += [f"{name}={value:g}" for name in ("label_smoothing", "gamma") if (value := getattr(self, name))]
        return ", ".join(shown)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        # Constants move to a device, but keep their dtype, which another one would round.
        return super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Weights may have been set, or removed, after construction.
        saved = state_dict.get(f"{prefix}weight")
        if saved is None:
            self.weight = None
        elif self.weight is None:
            self.set_weight(torch.ones_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class CrossEntropy(Loss):
    r"""Cross entropy, as torch's, fused.

    .. math:: \ell = w_y \Big(\log \sum_k e^{z_k} - z_y\Big)

    Args:
        class_counts: C training counts; only C is used, to check the logits.
        weight: C weights of the classes, or ``None``.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    >>> CrossEntropy(reduction="none")(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """

    def __init__(
        self, class_counts: Any = None, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(class_counts, weight, reduction, label_smoothing)


class LogitAdjusted(Loss):
    r"""Logit adjustment: cross entropy of logits shifted by the classes' log priors.

    .. math:: \ell = w_y \, \mathrm{CE}(z_c + \tau \ln(\pi_c + 10^{-9}), y)

    Args:
        class_counts: C training counts; a class without samples is shifted by :math:`\tau \ln 10^{-9}`.
        tau: Strength, >= 0.
        weight: C weights of the classes, or ``None``.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10, with the 1e-9 of Focal-SAM's code.

    >>> LogitAdjusted([3, 1])(torch.zeros(1, 2), torch.tensor([1]))
    tensor(1.3863)
    """

    def __init__(
        self,
        class_counts: Any,
        tau: float = 1.0,
        *,
        weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        _check_number("tau", tau)
        counts = check_counts(class_counts).cpu()
        shift = tau * (counts / counts.sum() + 1e-9).log()
        super().__init__(class_counts, weight, reduction, label_smoothing, shift=shift)


class BalancedSoftmax(Loss):
    r"""Balanced softmax: each class's exponential is multiplied by its count.

    .. math:: \ell = w_y \, \mathrm{CE}(z_c + \ln n_c, y)

    Args:
        class_counts: C training counts > 0.
        weight: C weights of the classes, or ``None``.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020.

    >>> BalancedSoftmax([3, 1])(torch.zeros(1, 2), torch.tensor([1]))
    tensor(1.3863)
    """

    def __init__(
        self, class_counts: Any, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        shift = _sampled(class_counts, "a shift of ln 0").log()
        super().__init__(class_counts, weight, reduction, label_smoothing, shift=shift)


class LDAM(Loss):
    r"""Label-distribution-aware margins: rare classes have larger margins.

    .. math:: \ell = w_y \, \mathrm{CE}(s (z_c - m_y [c = y]), y), \qquad m_c = m_\max (n_\min / n_c)^{1/4}

    Logits should be cosines: features and weights of the last layer are normalized.

    Args:
        class_counts: C training counts > 0.
        max_m: Margin of the rarest class, >= 0.
        s: Scale of the logits, > 0.
        weight: C weights of the classes, or ``None``; the paper's come from :func:`deferred_reweighting`.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.

    >>> LDAM([16, 1], max_m=0.5, s=1.0)(torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor(0.9000)
    """

    def __init__(
        self,
        class_counts: Any,
        max_m: float = 0.5,
        s: float = 30.0,
        *,
        weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        _check_number("max_m", max_m)
        _check_number("s", s, "a finite number > 0")
        counts = _sampled(class_counts, "an infinite margin")
        margin = max_m * (counts.min() / counts) ** 0.25
        scale = torch.full_like(counts, s)
        super().__init__(class_counts, weight, reduction, label_smoothing, scale=scale, margin=s * margin)


class VS(Loss):
    r"""Vector scaling: logits of rare classes are divided and shifted.

    .. math:: \ell = w_y \, \mathrm{CE}(z_c / \Delta_c + \tau \ln \pi_c, y), \qquad \Delta_c = (n_\max / n_c)^\gamma

    Args:
        class_counts: C training counts > 0.
        gamma: Exponent of the division, >= 0.
        tau: Strength of the shift, >= 0.
        weight: C weights of the classes, or ``None``.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Kini et al., "Label-imbalanced and group-sensitive classification under overparameterization", NeurIPS 2021.

    >>> VS([3, 1], gamma=0.0)(torch.zeros(1, 2), torch.tensor([1]))
    tensor(1.3863)
    """

    def __init__(
        self,
        class_counts: Any,
        gamma: float = 0.3,
        tau: float = 1.0,
        *,
        weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        _check_number("gamma", gamma)
        _check_number("tau", tau)
        counts = _sampled(class_counts, "a shift of ln 0")
        scale = (counts / counts.max()) ** gamma
        shift = tau * (counts / counts.sum()).log()
        super().__init__(class_counts, weight, reduction, label_smoothing, scale=scale, shift=shift)


class ClassBalanced(Loss):
    r"""Cross entropy with weights from the effective number of samples.

    .. math:: \ell = w_y \, \mathrm{CE}(z_c, y), \qquad w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \quad \sum_c w_c = C

    Difference from the authors' code: ``"mean"`` divides by the sum of the samples' weights, as torch and LDAM's code do;
    theirs divides by B, which is the plain mean of ``"none"``.

    Args:
        class_counts: C training counts > 0.
        beta: In [0, 1); 0: equal weights.
        label_smoothing: In [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019.

    >>> ClassBalanced([9000, 1000]).weight
    tensor([0.2764, 1.7236], dtype=torch.float64)
    """

    def __init__(
        self, class_counts: Any, beta: float = 0.9999, *, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(class_counts, _balancing(class_counts, beta), reduction, label_smoothing)


class Focal(Loss):
    r"""Focal loss: samples with a high probability of their class have a smaller loss.

    .. math:: \ell = w_y (1 - p)^\gamma (-\ln p), \qquad p = \mathrm{softmax}(z)_y

    ``"mean"`` is the mean over samples, or weights, as for all losses here; it is not normalized by the number of positives.

    Differences from LDAM's code: with weights, p is the softmax, as in the paper. There p = exp(-w_y CE), so that weights
    change the focus, too, and the mean divides by B.

    Args:
        class_counts: C training counts; only C is used, to check the logits.
        gamma: Focus, >= 0; 0 is cross entropy.
        weight: C weights of the classes, or ``None``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 5, with softmax instead of sigmoid; gamma as in
    LDAM's code.

    >>> Focal(gamma=2.0)(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.1733)
    """

    def __init__(
        self, class_counts: Any = None, gamma: float = 1.0, *, weight: Any = None, reduction: str = "mean"
    ) -> None:
        super().__init__(class_counts, weight, reduction, gamma=gamma)


class GCL(Loss):
    r"""Gaussian clouded logits: noise lowers the logits of rare classes in training.

    .. math:: z'_c = z_c - \nu |e_c| \frac{m_c}{\max_k m_k} - m [c = y], \quad m_c = \max_k \ln n_k - \ln n_c, \quad
        \ell = w_y (1 - p)^\gamma \, \mathrm{CE}(s z', y)

    with e ~ clamp(N(0, 1/9), -1, 1) for each sample and class, in training mode only; no gradient flows through
    (1 - p)^gamma. Logits should be cosines.

    The noise is a function of ``seed``, the buffer ``draws``, the sample's index in the batch and the class: it is the same
    on every backend, and stored nowhere but for the backward of a small batch on a CPU. Every call in training mode
    increments ``draws``, so each pass of a sharpness-aware step would have another loss. Take steps inside :meth:`hold`,
    where all calls have the same noise:

    >>> import ltsam_fast as lf
    >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    >>> criterion = GCL([50, 10, 2], reduction="none")
    >>> opt = lf.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    >>> with criterion.hold():
    ...     loss = opt.step(lambda: criterion(model(x), y))

    Args:
        class_counts: C training counts > 0.
        m: Margin of the label, >= 0.
        s: Scale of the logits, > 0.
        noise_mul: Amplitude ``nu`` of the noise of the rarest class, >= 0.
        gamma: Focus, >= 0.
        weight: C weights of the classes, or ``None``.
        seed: Seed of the noise, in [0, 2^53); each process of a distributed run needs another one.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Li et al., "Long-tailed visual recognition via Gaussian clouded logit adjustment", CVPR 2022, with the
    defaults of its first stage.
    """

    draws: Tensor

    def __init__(
        self,
        class_counts: Any,
        m: float = 0.0,
        s: float = 30.0,
        noise_mul: float = 0.5,
        *,
        gamma: float = 0.0,
        weight: Any = None,
        seed: int = 0,
        reduction: str = "mean",
    ) -> None:
        _check_number("m", m)
        _check_number("s", s, "a finite number > 0")
        _check_number("noise_mul", noise_mul)
        if not isinstance(seed, int) or not 0 <= seed < 2**53:
            raise ValueError(f"seed must be an integer in [0, 2^53), got {shown(seed)}")
        logs = _sampled(class_counts, "an infinite margin").log()
        rarity = logs.max() - logs
        spread = (
            noise_mul * rarity / rarity.max().clamp(min=torch.finfo(torch.float64).tiny)
        )  # no noise for equal counts
        scale, margin = torch.full_like(logs, s), torch.full_like(logs, s * m)
        super().__init__(
            class_counts, weight, reduction, gamma=gamma, detach=True, scale=scale, margin=margin, spread=spread
        )
        self.seed, self._held = seed, False
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A context in which all calls have the same noise, newly drawn."""
        if self._held:
            raise RuntimeError("hold() contexts do not nest")
        self.draws += 1
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _losses(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        if self.training and not self._held:
            self._buffers["draws"].add_(1)  # type: ignore[union-attr]
        return super()._losses(logits, targets, reduction)

    def _noise(self) -> dict[str, Any]:
        if not self.training:
            return {}
        # A copy, since the backward reads it after further calls.
        return {"spread": self.spread, "draw": self.draws.clone(), "seed": self.seed}


def _balancing(class_counts: Any, beta: float) -> Tensor:
    """Returns weights by the effective number of samples; their sum is C."""
    _check_number("beta", beta, "a number in [0, 1)")
    counts = _sampled(class_counts, "an infinite weight")
    # 1 - beta^n without cancellation; for beta = 0 the logarithm is -inf, which gives the right result.
    effective = -torch.expm1(counts * torch.tensor(beta, dtype=torch.float64).log())
    weights = (1 - beta) / effective
    return weights * (len(weights) / weights.sum())


def deferred_reweighting(epoch: int, class_counts: Any, start: int = 160, beta: float = 0.9999) -> Tensor:
    r"""Returns class weights for an epoch: 1 before epoch ``start``, then those of :class:`ClassBalanced`.

    Args:
        epoch: Index of the epoch, from 0.
        class_counts: C training counts > 0.
        start: First epoch with weights.
        beta: In [0, 1).

    Returns:
        Shape (C,), float64, with sum C. Pass them to :meth:`Loss.set_weight`, and ``batch=y`` to the loss: as in the published
        code, the mean of a closure's losses must be divided by the sum of the batch's weights. With a loss of torch,
        ``reduction="none"`` and ``w = weights.float()``, divide by ``w[y].mean()``, where y is the whole batch.

    Raises:
        ValueError: An argument is out of its range, at any epoch.

    Source: Cao et al. 2019 (LDAM) and its code: from epoch 160 of 200.

    >>> deferred_reweighting(159, [9000, 1000])
    tensor([1., 1.], dtype=torch.float64)
    >>> deferred_reweighting(160, [9000, 1000])
    tensor([0.2764, 1.7236], dtype=torch.float64)
    """
    _check_number("epoch", epoch)
    _check_number("start", start)
    weights = _balancing(class_counts, beta)
    return weights if epoch >= start else torch.ones_like(weights)
