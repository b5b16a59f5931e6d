"""Checkpoints of other classes and of version 0.1.0: a plain base optimizer's, and those of the published wrappers.

A published wrapper has ``rho`` and ``adaptive`` in its groups. Its state is what lives within a step (``old_p``, ``e_w``,
``eps``, ``grad`` and the like); that of its base optimizer, under other names, is mostly missing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast.optim.base_step import call_step
from ltsam_fast.optim.options import COUNTS

if TYPE_CHECKING:
    from ltsam_fast.optim.optimizer import SharpnessAware

VERSION = 1
"""Version of ``state_dict()``; increase it with every change that an earlier reader would misunderstand."""
_PLAIN = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), False)


def completed(optimizer: SharpnessAware, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as ``optimizer`` loads it: options that it lacks are the present ones, state that is nobody's is dropped.

    Raises:
        ValueError: It does not fit.
    """
    there = state_dict if isinstance(state_dict, Mapping) else {}
    if missing := [name for name in ("state", "param_groups") if name not in there]:
        raise ValueError(
            f"state_dict must have state and param_groups, as state_dict() returns them, but this {type(state_dict).__name__} "
            f"lacks {missing}"
        )
    if isinstance(version := there.get("version"), int) and version > VERSION:
        raise ValueError(
            f"state_dict is of format {version}, of a later version of ltsam_fast; this one reads {VERSION}: update the package"
        )
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if [len(saved["params"]) for saved in saved_groups] != [len(group["params"]) for group in groups]:
        return state_dict  # torch says so
    foreign = any("perturb" not in saved for saved in saved_groups)
    old = not foreign and any("steps" not in saved for saved in saved_groups)
    saved_groups = [_group(optimizer, saved, group) for saved, group in zip(saved_groups, groups, strict=True)]
    groups = [{**saved, "params": group["params"]} for saved, group in zip(saved_groups, groups, strict=True)]
    base, state = optimizer.base_optimizer, dict(state_dict["state"])
    try:
        names, loose, begun = _state_of(base, groups)
    except Exception:  # a base that cannot be made, or stepped, like that: what it keeps is not known
        return {**state_dict, "param_groups": saved_groups}
    kept, lost, stepped = {}, False, False
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        for key, param in zip(saved["params"], group["params"], strict=True):
            entry, wanted = state.pop(key, {}), names[number, param.dim()]
            if foreign:
                entry = {optimizer.published_state.get(name, name): value for name, value in entry.items()}
            elif old:
                entry = {_RENAMED.get(name, name): value for name, value in entry.items()}
            _check(base, entry, wanted, param)
            if foreign:
                lost |= bool(entry and wanted) and entry.keys().isdisjoint(wanted)
                entry = {name: entry[name] for name in entry if name in wanted or name in optimizer.buffers}
                entry = {**begun.get(param, {}), **entry}
                stepped |= not entry.keys().isdisjoint(optimizer.buffers)
            if entry:
                kept[key] = entry
    if lost:
        warnings.warn(
            f"state_dict has no state of {type(base).__name__}, which the published classes do not save: its momentum, or what "
            "else it keeps, starts afresh",
            stacklevel=3,
        )
    if stepped:
        saved_groups = [{**saved, "steps": max(1, saved["steps"])} for saved in saved_groups]
    rest = {key: value for key, value in state.items() if not foreign or key in loose}
    return {**state_dict, "state": {**rest, **kept}, "param_groups": saved_groups}


def restore_numbers(optimizer: SharpnessAware, state_dict: dict[str, Any]) -> None:
    """Puts numbers in the state back as they were saved, such as NAdam's product: torch rounds them as their parameter is."""
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, param in zip(saved["params"], group["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                loaded = optimizer.state[param].get(name)
                if isinstance(value, Tensor) and not value.dim() and param.dim() and isinstance(loaded, Tensor):
                    optimizer.state[param][name] = value.to(loaded.device, copy=True)


def _group(optimizer: SharpnessAware, saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A saved group with all options; those that it lacks have their present values.

    What a base saved under one of the method's names is the base's own: see ``SharpnessAware.base_alone``.
    """
    if "steps" in saved and "perturb" in saved:
        group = {**{name: now[name] for name in optimizer.options}, **COUNTS, **saved}
        if group["class_counts"] is None:  # of a method that ignores them
            group["class_counts"] = now["class_counts"]
        optimizer.check_group_options(group)
        return group
    if "perturb" in saved:  # version 0.1.0, which kept these in the groups, and other options in attributes
        own = {name: saved[before] for before, name in _OLD.items() if before in saved}
        own[optimizer.asam_constant] = own.pop("eta")
        kept = {*_OLD, "lr_max", "lr_seen"}
    else:
        # An option of a plain base of the same name (Adadelta's rho) is another thing. A wrapper's comes with ``adaptive``.
        its = {*_OLD} | {*optimizer.options} - {*optimizer.base_optimizer.defaults} if "adaptive" in saved else set()
        own = {name: saved[name] for name in optimizer.options if name in saved and name in its}
        own = {name: value.item() if hasattr(value, "item") else value for name, value in own.items()}
        kept = {*own}
    theirs = {name: saved[name] for name in optimizer._base_only if name in saved and name not in kept}
    optimizer._base_only = {**optimizer._base_only, **theirs}
    names = {*optimizer.options, *COUNTS}
    rest = {name: value for name, value in saved.items() if name not in {*_OLD, *names} or name == "params"}
    also: dict[str, Any] = {name: saved[name] for name in ("lr_max", "lr_seen") if name in saved and name in kept}
    group = {**rest, **{name: now[name] for name in names}, **also, **own}
    optimizer.check_group_options(group)
    return group


_OLD = {
    "rho": "rho",
    "adaptive": "adaptive",
    "eta": "eta",
    "norm_eps": "norm_eps",
    "perturb": "perturb",
    "taken": "steps",
    "skipped": "skipped_steps",
}
"""Entries of a group in version 0.1.0, and what they are now."""
_RENAMED = {"frozen": "mask"}
"""State of version 0.1.0, and what it is now."""


def _state_of(base: Optimizer, groups: list[dict[str, Any]]) -> tuple[dict[Any, Any], set[Any], dict[Any, Any]]:
    """What a base optimizer keeps, seen in a step with small tensors.

    Returns:
        For each number of a group and number of dimensions the names of a parameter's state, each with whether it has the
        parameter's shape; the keys of state that is no parameter's; and the state of parameters that is there before the first
        step.
    """
    small = {
        (number, dim): torch.ones(tuple(range(2, 2 + dim)), dtype=torch.float32, requires_grad=True)
        for number, group in enumerate(groups)
        for dim in {param.dim() for param in group["params"]}
    }
    options = [
        {name: float(v) if isinstance(v, Tensor) else v for name, v in g.items() if name != "params"} for g in groups
    ]
    options = [{**one, **{name: False for name in _PLAIN if name in one}} for one in options]
    with torch.random.fork_rng(devices=[]):
        probe = _made(
            base, [{**one, "params": [p for (n, _), p in small.items() if n == i]} for i, one in enumerate(options)]
        )
        begun = _made(base, groups).state if probe.state else {}
        for param in small.values():
            param.grad = torch.ones_like(param)
        call_step(probe)
    names = {
        key: {
            name: isinstance(value, Tensor) and value.shape == param.shape and param.dim() > 0
            for name, value in probe.state.get(param, {}).items()
        }
        for key, param in small.items()
    }
    return names, {key for key in probe.state if not isinstance(key, Tensor)}, begun


def _made(base: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Another optimizer of the base's class."""
    named = inspect.signature(type(base)).parameters
    groups = [{name: value for name, value in group.items() if name != "param_names"} for group in groups]
    return type(base)(groups, **{name: value for name, value in base.defaults.items() if name in named})


def _check(base: Optimizer, entry: dict[str, Any], wanted: dict[str, bool], param: Tensor) -> None:
    """Raises ValueError if a parameter's state is incomplete or another parameter's."""
    lacking = [name for name in wanted if name not in entry]
    if lacking and len(lacking) < len(wanted):
        raise ValueError(
            f"state_dict must have all of a parameter's state in {type(base).__name__}, or nothing of it, but lacks {lacking}"
        )
    for name, like in wanted.items():
        value = entry.get(name)
        if like and isinstance(value, Tensor) and value.shape != param.shape:
            raise ValueError(
                f"state_dict has a {name} of shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}"
            )
