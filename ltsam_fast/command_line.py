"""What all commands and examples share: wrong input is one line on stderr and exit code 2."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from ltsam_fast.backend import check_variable
from ltsam_fast.optim.options import did_you_mean

WRONG = 2
"""The exit code."""
EXTRAS = {
    "sklearn": "demo",
    "matplotlib": "demo",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "hugging-face",
    "peft": "hugging-face",
    "rich": "train",
    "pydantic": "train",
    "pydantic_settings": "train",
    "ruamel": "train",
    "tomli": "train",
}
"""Optional packages -> the extra of this package that has them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which says what a misspelt flag may have been."""

    def error(self, message: str) -> NoReturn:
        """Exits."""
        self.exit(WRONG, f"{self.prog}: {' '.join(message.split())}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            meant = did_you_mean(name, self._option_string_actions) if name.startswith("-") else "."
            self.error(f"there is no argument {name!r}{meant} --help lists all")
        return options


def in_words(error: Exception, extra: str | None = None) -> str:
    """Returns what an error says: of a missing package the extra that has it, ``extra`` or by ``EXTRAS``."""
    if isinstance(error, ModuleNotFoundError) and (package := str(error.name).partition(".")[0]) in EXTRAS:
        return f"needs {package}: pip install 'ltsam_fast[{extra or EXTRAS[package]}]'"
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
    return str(error)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context in which no Ctrl-C is lost: where Python drops exceptions, as in destructors, it is raised a moment later."""
    before = sys.unraisablehook

    def again() -> None:
        if sys.unraisablehook is hook:
            _thread.interrupt_main()

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return before(dropped)
        timer = threading.Timer(0.01, again)  # here it would be dropped again
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """A context that ends the program with one line where a package is missing or an argument is wrong.

    Args:
        name: What the line begins with.
    """
    try:
        check_variable()
        yield
    except (ModuleNotFoundError, OSError, ValueError, TypeError) as error:
        message = in_words(error)
        if isinstance(error, ModuleNotFoundError) and message == str(error):
            raise
    else:
        return
    argparse.ArgumentParser(prog=name).exit(WRONG, f"{name}: {' '.join(message.split())}\n")
