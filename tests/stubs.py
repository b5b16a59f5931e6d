"""Writes ``ltsam_fast/optim/__init__.pyi``, from which editors know the constructors: their options are made at run time.

python -m tests.stubs
"""

import inspect
import json
from pathlib import Path

from ltsam_fast import optim
from ltsam_fast.optim.registry import METHODS

STUB = Path(optim.__file__).with_suffix(".pyi")
HEAD = """# Made by `python -m tests.stubs` from the options that the methods declare.
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

"""


def stub():
    """The file's text."""
    names = sorted({method.cls.__name__ for method in METHODS.values()}, key=module_of)
    imports = [f"from {module_of(name)} import {name} as _{name}" for name in names]
    imports.append("from ltsam_fast.optim.optimizer import SharpnessAware as SharpnessAware")
    imports += [f"from {module_of(name)} import {name} as {name}" for name in ("create", "list_methods")]
    return HEAD + "\n".join(imports) + "\n\n" + "\n".join(map(stub_of, sorted(names)))


def module_of(name):
    return getattr(optim, name).__module__


def stub_of(name):
    """A class with its options and its constructor."""
    cls = getattr(optim, name)
    own = [f"    {option}: {one.annotation}" for option, one in cls.options.items() if option in vars(cls)]
    arguments, positional = [], True
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and positional:
            positional = False
            arguments.append("*")
        mark = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        value = parameter.default
        default = "" if value is parameter.empty else f" = {json.dumps(value) if isinstance(value, str) else value}"
        arguments.append(f"{mark}{parameter.name}: {parameter.annotation}{default}")
    lines = ["    def __init__(", "        self,", *(f"        {one}," for one in arguments), "    ) -> None: ..."]
    return "\n".join([f"class {name}(_{name}):", *own, *lines]) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub())
