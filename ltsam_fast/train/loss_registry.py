"""Makes the losses that ``--loss`` names; each returns one value per sample."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ltsam_fast import losses
from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.train.config import Config, ConfigError

LOSSES: dict[str, tuple[str, type[losses.Loss]]] = {
    "ce": ("CE", losses.CrossEntropy),
    "la": ("LA", losses.LogitAdjusted),
    "ldam": ("LDAM", losses.LDAM),
    "vs": ("VS", losses.VS),
    "balanced_softmax": ("balanced softmax", losses.BalancedSoftmax),
    "class_balanced": ("class-balanced", losses.ClassBalanced),
    "focal": ("focal", losses.Focal),
    "gcl": ("GCL", losses.GCL),
}
"""Name on the command line -> name in print and class."""
COSINE_LOSSES = ("ldam", "gcl")
"""Losses that expect cosines as logits."""
_SUPPLIED = ("class_counts", "reduction", "weight")


def label(loss: str) -> str:
    """Returns the loss's name in print.

    >>> label("la")
    'LA'
    """
    return LOSSES[loss][0]


def options_of(loss: str) -> dict[str, Any]:
    """Returns the options of a loss with their defaults.

    Raises:
        ConfigError: There is no such loss.

    >>> options_of("ldam")
    {'max_m': 0.5, 's': 30.0, 'label_smoothing': 0.0}
    """
    if loss not in LOSSES:
        raise ConfigError(f"there is no loss {loss!r}{did_you_mean(loss, LOSSES)} There are {', '.join(LOSSES)}")
    parameters = inspect.signature(LOSSES[loss][1]).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _SUPPLIED}


def check_options(config: Config) -> None:
    """Raises ConfigError unless the loss exists and has all options of the config."""
    known = options_of(config.loss)
    if unknown := [name for name in config.loss_options if name not in known]:
        raise ConfigError(
            f"{config.loss} has no option {unknown[0]!r}{did_you_mean(unknown[0], known)} It takes {', '.join(known)}"
        )


def criterion(config: Config, counts: Sequence[int], rank: int = 0) -> losses.Loss:
    """Returns the loss of a run, which maps logits (B, C) and labels (B,) to losses (B,).

    Its noise has the seed of the run plus ``rank``.

    Raises:
        ConfigError: There is no such loss, or an option is not accepted.
    """
    check_options(config)
    supplied = {"seed": config.seed + rank} if "seed" in options_of(config.loss) else {}
    try:
        loss = LOSSES[config.loss][1](list(counts), reduction="none", **{**supplied, **config.loss_options})
        reweight(loss, config, counts, 0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.loss}: {error}") from error
    return loss


def reweight(loss: losses.Loss, config: Config, counts: Sequence[int], epoch: int) -> None:
    """Sets the class weights of deferred reweighting for an epoch, counted from 0, if the config asks for it.

    Before ``drw_start`` they are ones: the loss's graph is the same in all epochs, so a resumed run takes the same passes.
    """
    if config.drw_start is not None:
        weight = losses.deferred_reweighting(epoch, list(counts), config.drw_start, config.drw_beta)
        if loss.weight is None or not torch.equal(loss.weight.cpu(), weight):  # a graph is captured for one tensor
            loss.set_weight(weight)


def same_noise(loss: losses.Loss) -> contextlib.AbstractContextManager[None]:
    """A context for one step, in which GCL draws the same noise in all passes."""
    return loss.hold() if isinstance(loss, losses.GCL) else contextlib.nullcontext()
