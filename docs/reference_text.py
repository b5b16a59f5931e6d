"""Makes Markdown of the docstrings, for mkdocstrings: an extension of Griffe.

The docstrings use a few marks of reStructuredText: double backticks, roles, ``code-block``, ``math``. A method's arguments
come from its options, so its docstring and signature are those that Python has at run time.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert


class ReferenceText(griffe.Extension):
    """Replaces each docstring by its Markdown, and the signature of a class with options by that at run time."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Goes through a package once it is loaded."""
        _walk(pkg)


def _walk(found: griffe.Object) -> None:
    if found.is_class and found.path.startswith("ltsam_fast.optim."):
        _take_from_python(found)  # type: ignore[arg-type]
    if found.docstring:
        found.docstring.value = markdown(found.docstring.value)
    for member in list(found.members.values()):
        if not member.is_alias:
            _walk(member)  # type: ignore[arg-type]


def _take_from_python(found: griffe.Class) -> None:
    cls = getattr(importlib.import_module(found.module.path), found.name, None)
    if not hasattr(cls, "options") or not cls.__doc__:
        return
    found.docstring = griffe.Docstring(inspect.cleandoc(cls.__doc__), parent=found)
    if "rule" in vars(cls):
        found.set_member("__init__", _constructor(cls))


def _constructor(cls: type) -> griffe.Function:
    kinds = {kind: griffe.ParameterKind[kind.name.lower()] for kind in inspect._ParameterKind}
    parameters = [
        griffe.Parameter(
            one.name, kind=kinds[one.kind], default=None if one.default is one.empty else repr(one.default)
        )
        for one in inspect.signature(cls).parameters.values()
    ]
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters))


def markdown(text: str) -> str:
    """Returns a docstring with Markdown's marks.

    >>> markdown("``w``, :class:`~a.b.C` and :math:`x`")[:6]
    '`w`, <'
    """
    text = re.sub(r"(?m)^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n?|\n)+)", _fenced, text)
    text = re.sub(r"(?m)^( *)\.\. math:: (.*(?:\n\1 +.*)*)", _formula, text)
    text = re.sub(r"(?m)^( *)>>> .*\n(?:\1(?:>>>|\.\.\.|[^\s>]).*\n?)*", _doctest, text)
    parts = re.split(r"(?ms)(^ *```\w+$.*?^ *```$)", text)
    return "".join(part if part.lstrip().startswith("```") else _inline(part) for part in parts)


def _fenced(found: re.Match[str]) -> str:
    indent, language, code = found.groups()
    lines = textwrap.dedent(code).strip("\n")
    return textwrap.indent(f"```{language}\n{lines}\n```", indent) + "\n\n"


def _formula(found: re.Match[str]) -> str:
    return found[1] + convert(" ".join(found[2].split()), display="block")


def _doctest(found: re.Match[str]) -> str:
    return f"{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n"


def _inline(text: str) -> str:
    text = re.sub(r":math:`([^`]+)`", lambda found: convert(found[1]), text)
    text = re.sub(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`", _link, text)
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _link(found: re.Match[str]) -> str:
    short, name = found.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'
