"""Options of the methods: declared once on the class, kept in ``param_groups``."""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from ltsam_fast.ops.checks import check_counts, plain, shown

COUNTS = {"steps": 0, "base_steps": 0, "skipped_steps": 0}
"""What every group counts besides its options, see :class:`ltsam_fast.optim.SharpnessAware`."""


class Option:
    """One option of a method: an entry of every group of ``param_groups``, and an attribute of the optimizer.

    Reading the attribute gives the first group's value; setting it checks the value and sets it in all groups.

    Attributes:
        name: What it is called: as a keyword, in the groups, as an attribute.
        default: Its default value.
        check: ``check(name, value)`` returns the value as it is kept, or raises ValueError.
        accepts: What is accepted, in words.
        doc: What it means.
        per_group: Whether groups may differ in it.
        keyword: Whether the constructor takes it; else it can only be set for a group.
        annotation: Its type, in words of Python.
        counted: Whether steps change it by themselves.
    """

    def __init__(
        self,
        default: Any,
        check: Callable[[str, Any], Any],
        accepts: str,
        doc: str,
        per_group: bool = False,
        keyword: bool = True,
        annotation: str = "Any",
        counted: bool = False,
    ) -> None:
        self.counted = counted
        self.annotation = annotation
        self.default, self.check, self.accepts, self.doc = default, check, accepts, doc
        self.per_group, self.keyword = per_group, keyword

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer.param_groups[0][self.name]

    def __set__(self, optimizer: Any, value: Any) -> None:
        value = self.check(self.name, value)
        before = [group[self.name] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group[self.name] = value
        try:
            for group in optimizer.param_groups:
                optimizer.check_group_options(group)
        except ValueError:
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group[self.name] = old
            raise


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    check: Callable[[str, Any], Any] | None = None,
    accepts: str = "",
    integer: bool = False,
    optional: bool = False,
    per_group: bool = False,
    keyword: bool = True,
    counted: bool = False,
    per_class: bool = False,
) -> Any:
    """Declares an option in the body of a method's class.

    Args:
        default: Its default value. With True or False the option is a flag.
        doc: What it means.
        ge: The least value, ...
        gt: ... or what it must exceed.
        le: The largest value, ...
        lt: ... or what it must stay below.
        choices: The values that are accepted, instead of numbers.
        check: ``check(name, value)`` returns the value to be kept or raises ValueError, instead of all that.
        accepts: What ``check`` accepts, in words.
        integer: Whether it is a whole number.
        optional: Whether None is accepted, too.
        per_group: Whether groups may differ in it.
        keyword: Whether the constructor takes it; else it can only be set for a group.
        counted: Whether steps change it by themselves.
        per_class: Whether a number may be given for each class instead, which is kept as a tuple.
    """
    annotation = "Any"
    if check is None and isinstance(default, bool):
        check, accepts, annotation = _flag, "True or False", "bool"
    elif check is None and choices is not None:
        check, accepts, annotation = _choice(choices), f"one of {', '.join(map(repr, choices))}", "str"
    elif check is None:
        accepts, annotation = _range(ge, gt, le, lt, integer), "int" if integer else "float"
        check = _number(ge, gt, le, lt, integer, accepts)
        if per_class:
            check, accepts = _or_one_per_class(check), f"{accepts}, or one for each class"
            annotation += " | Sequence[float] | torch.Tensor"
    if optional:
        check, annotation = _or_none(check), f"{annotation} | None"
    return Option(default, check, accepts, doc, per_group, keyword, annotation, counted)


def check_class_counts(name: str, value: Any) -> list[float]:
    """The numbers as a list; raises ValueError unless they are finite, >= 0 and not all 0."""
    return check_counts(value).tolist()  # type: ignore[no-any-return]


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or plain(value) in (0, 1):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {shown(value)}")


def _choice(choices: Sequence[Any]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
        return value

    return check


def _range(ge: float | None, gt: float | None, le: float | None, lt: float | None, integer: bool) -> str:
    """The range in words: "a finite number >= 0", "a number in [0, 1)"."""
    low = next((end for end in (ge, gt) if end is not None), -math.inf)
    high = next((end for end in (le, lt) if end is not None), math.inf)
    if high < math.inf:
        end = f"{high:g}" if high < 2**53 else "2^53"
        inside = f"{'(' if ge is None else '['}{low:g}, {end}{')' if le is None else ']'}"
        return f"{'an integer' if integer else 'a number'} in {inside}"
    sign = "" if low == -math.inf else f" {'>' if ge is None else '>='} {low:g}"
    return ("an integer" if integer else "a finite number") + sign


def _number(
    ge: float | None, gt: float | None, le: float | None, lt: float | None, integer: bool, accepts: str
) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        number = plain(value)
        inside = (
            -math.inf < number < math.inf
            and (ge is None or number >= ge)
            and (gt is None or number > gt)
            and (le is None or number <= le)
            and (lt is None or number < lt)
        )
        if not inside or (integer and not isinstance(number, int)):
            raise ValueError(f"{name} must be {accepts}, got {shown(value)}")
        return number

    return check


def _or_one_per_class(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    def checked(name: str, value: Any) -> Any:
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1:
            value = value.tolist()
        if isinstance(value, (list, tuple)) and value:
            return tuple(float(check(name, one)) for one in value)
        return check(name, value)

    return checked


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """Goes between "there is no x" and what there is: the name among the known ones that is most like it."""
    found = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f": did you mean {found[0]!r}?" if found else "."


def check_spelling(group: dict[str, Any], known: Collection[str]) -> None:
    """Raises ValueError if a key of a group is nearly an option's name. Others may be the script's, as in torch."""
    for name in group:
        near = [] if name in known else difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.8)
        if near and abs(len(near[0]) - len(name)) <= 1 and name not in COUNTS:
            raise ValueError(
                f"a group has no option {name!r}: did you mean {near[0]!r}? A key of your own needs another name"
            )


class Configurable:
    """A class with options: collects them, and shows them in its signature and docstring."""

    options: dict[str, Option] = {}
    """The options by name, those of the base classes included."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.options = {}
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if isinstance(value, Option):
                    cls.options.setdefault(name, value)
        if "__init__" in vars(cls):  # its own signature counts, not an inherited one
            cls.__signature__ = None  # type: ignore[attr-defined]
        elif "rule" in vars(cls):
            cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]
        if cls.__doc__ and "rule" in vars(cls) and "Args:" not in cls.__doc__:
            cls.__doc__ = _documented(cls)


def _signature(cls: type[Configurable]) -> inspect.Signature:
    """The constructor's signature with every option by name: the method's own, then those that all methods have."""
    given = [
        one.replace(default=one.empty, annotation="Callable[..., Optimizer]") if one.name == "base_optimizer" else one
        for one in inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        if one.name != "self"
    ]
    first = [one for one in given if one.kind is one.POSITIONAL_OR_KEYWORD]
    rest = [one for one in given if one.kind is one.KEYWORD_ONLY]
    *_, more = given
    named = {one.name for one in given}
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.annotation)
        for name, one in cls.options.items()
        if one.keyword and name not in named
    ]
    return inspect.Signature([*first, *own, *rest, more])


def _documented(cls: type[Configurable]) -> str:
    """The docstring with a list of the constructor's arguments."""
    indent = "\n        "
    lines = [
        "params: Parameters or groups, as for any torch optimizer.",
        "base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.",
        *(f"{name}: {_described(one)}" for name, one in cls.options.items() if one.keyword),
        "model: The network, if it is to be known, see :class:`ltsam_fast.optim.SharpnessAware`.",
        "**base_kwargs: Options of ``base_optimizer``.",
    ]
    text = inspect.cleandoc(cls.__doc__ or "")
    return text + f"\n\nArgs:{indent[:-4]}" + indent[:-4].join(lines) + "\n"


def _described(one: Option) -> str:
    text = f"{one.doc} {one.accepts[:1].upper()}{one.accepts[1:]}; default {one.default!r}."
    return textwrap.fill(text, 110, subsequent_indent=" " * 8)
