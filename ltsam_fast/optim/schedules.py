"""When a method perturbs the weights, ``active``, and how far, ``rho_schedule``."""

from __future__ import annotations

import math
from typing import Any

from ltsam_fast.ops.checks import plain, shown

ACTIVE = '"all", a share of total_steps in [0, 1], ("every", k), a range of steps, or a function of the step'


def check_active(name: str, value: Any) -> Any:
    """What steps are active, as it is kept: plain values, ranges as ``("range", start, stop, step)``; or a function.

    Raises:
        ValueError: It is nothing of that kind.
    """
    if value == "all" or callable(value):
        return value
    if isinstance(value, range):
        return ("range", value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)) and value:
        kind, *numbers = value
        counts = [plain(one) for one in numbers]
        whole = all(isinstance(one, int) and one >= 0 for one in counts)
        if whole and kind == "every" and len(counts) == 1 and counts[0]:
            return ("every", *counts)
        if whole and kind == "range" and len(counts) in (2, 3) and counts[2:] != [0]:
            return ("range", *counts, *([] if counts[2:] else [1]))
    elif not isinstance(value, (str, bool)) and 0 <= (share := plain(value)) <= 1:
        return share
    raise ValueError(f"{name} must be {ACTIVE}, got {shown(value)}")


def is_active(active: Any, number: int, total_steps: int | None) -> bool:
    """Whether the step ``number``, counted from 0, is one that perturbs the weights."""
    if active == "all":
        return True
    if callable(active):
        return bool(active(number))
    if isinstance(active, tuple):
        kind, *numbers = active
        return number % numbers[0] == 0 if kind == "every" else number in range(*numbers)
    return number >= total_steps - round(active * total_steps)  # type: ignore[operator]


RAMPS = {
    "linear": lambda progress: progress,
    "quadratic": lambda progress: progress**2,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Schedules over the whole run: what the radius is multiplied by, when a share ``progress`` of ``total_steps`` was taken."""
SCHEDULES = ("constant", *RAMPS, "lr")


def check_schedule(name: str, value: Any) -> Any:
    """Raises ValueError unless it is one of ``SCHEDULES`` or a function."""
    if not callable(value) and value not in SCHEDULES:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, SCHEDULES))} or a function of the step, got {shown(value)}"
        )
    return value


def check_schedules(options: Any) -> None:
    """Raises ValueError if a schedule needs the number of all steps, and it is not there."""
    for name in ("active", "rho_schedule"):
        value = options[name]
        if options["total_steps"] is None and (
            value in RAMPS if isinstance(value, str) else isinstance(value, (int, float))
        ):
            raise ValueError(
                f"total_steps must be given with {name}={value!r}: the number of steps of the run, got None"
            )


def factor(schedule: Any, number: int, total_steps: int | None) -> float:
    """What the radius is multiplied by in step ``number``, by a schedule that is the same for all groups.

    Raises:
        ValueError: A function returned something else than a finite number >= 0.
    """
    if callable(schedule):
        found = plain(schedule(number))
        if not 0 <= found < math.inf:
            raise ValueError(f"rho_schedule must return a finite number >= 0, got {found!r} for step {number}")
        return float(found)
    return RAMPS[schedule](min(1.0, number / total_steps))  # type: ignore[operator]
