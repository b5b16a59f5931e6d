"""juntang-zhuang/GSAM: numbers that change with the steps, such as its radius."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer


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
