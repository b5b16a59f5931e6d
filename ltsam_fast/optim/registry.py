"""The methods by name: the commands, the trainers' examples, the benchmarks and the tests go through this list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer

from ltsam_fast.optim.options import did_you_mean

if TYPE_CHECKING:
    from ltsam_fast.optim.optimizer import SharpnessAware

_Class = TypeVar("_Class", bound="type[SharpnessAware]")


@dataclass(frozen=True)
class Method:
    """A class with a name.

    Attributes:
        name: As :func:`create` and the commands take it.
        title: Its name in print.
        cls: Its class.
        options: The options that make it what it is: ASAM is SAM with ``adaptive=True``.
    """

    name: str
    title: str
    cls: type[SharpnessAware]
    options: Mapping[str, Any]

    def options_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options given and the method's own.

        Raises:
            ValueError: They contradict each other.
        """
        for option, value in self.options.items():
            if given.get(option, value) != value:
                raise ValueError(f"{option} must be {value!r} for {self.name}, got {given[option]!r}")
        return {**given, **self.options}


METHODS: dict[str, Method] = {}
"""Every method by its name; :func:`registered` enters them."""


def registered(name: str, title: str, **options: Any) -> Callable[[_Class], _Class]:
    """Enters the class below under a name; a class may have several, with other options.

    Args:
        name: As in :class:`Method`.
        title: As in :class:`Method`.
        **options: As in :class:`Method`.
    """

    def enter(cls: _Class) -> _Class:
        METHODS[name] = Method(name, title, cls, options)
        return cls

    return enter


def list_methods(pattern: str | None = None) -> list[str]:
    """Returns the names of the methods that :func:`create` takes, in alphabetical order.

    Args:
        pattern: As in a shell: ``*`` is any text, ``?`` any character, ``[ab]`` one of these. None: all methods.

    >>> list_methods("*b*_sam")
    ['imb_sam', 'micro_batch_sam']
    """
    return sorted(name for name in METHODS if pattern is None or fnmatchcase(name, pattern))


def method_named(name: str) -> Method:
    """Returns the method of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in METHODS:
        names = list_methods()
        raise ValueError(f"there is no method {name!r}{did_you_mean(name, names)} There are {', '.join(names)}")
    return METHODS[name]


def create(
    name: str, params: Any, base_optimizer: Callable[..., Optimizer] | None = None, *args: Any, **options: Any
) -> SharpnessAware:
    """Makes a method by its name: ``create("focal_sam", ...)`` is ``FocalSAM(...)``.

    Args:
        name: One of :func:`list_methods`.
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        *args: ``rho`` and ``adaptive``, if they are not given by name.
        **options: Options of the method and of ``base_optimizer``.

    Raises:
        ValueError: There is no such method, or an option is out of its range.
        TypeError: Neither the method nor ``base_optimizer`` has an option of this name, or ``base_optimizer`` is no class.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = create("focal_sam", model.parameters(), torch.optim.SGD, rho=0.2, class_counts=[90, 10], lr=0.1)
    >>> type(opt).__name__, opt.rho
    ('FocalSAM', 0.2)
    """
    method = method_named(name)
    return method.cls(params, base_optimizer, *args, **method.options_with(options))
