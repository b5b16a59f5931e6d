"""Imports optional dependencies, and shows progress bars."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def needed(module: str, package: str) -> ModuleType:
    """Imports an optional dependency.

    Raises:
        ModuleNotFoundError: It is not installed; the message names what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"this needs {package}: pip install 'ltsam_fast[train]'"
        raise ModuleNotFoundError(message, name=error.name) from error


@contextlib.contextmanager
def progress_bars() -> Iterator[Any]:
    """Gives the bars in the terminal, a ``rich.progress.Progress``: those that it shows already, else new ones.

    Where the output is no terminal they show nothing.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    global _on_screen
    if _on_screen is not None:
        yield _on_screen
        return
    rich, terminal = needed("rich.progress", "rich"), needed("rich.console", "rich").Console()
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bars:
        _on_screen = bars
        try:
            yield bars
        finally:
            _on_screen = None


_on_screen: Any = None


@contextlib.contextmanager
def progress_bar(shown: bool, total: int | None, description: str) -> Iterator[Callable[[], Any]]:
    """Shows one more bar, unless ``shown`` is False; gives the function that moves it on by one.

    Raises:
        ModuleNotFoundError: ``shown`` is True and rich is not installed.
    """
    if not shown:
        yield lambda: None
        return
    with progress_bars() as bars:
        task = bars.add_task(description, total=total)
        try:
            yield lambda: bars.advance(task)
        finally:
            bars.refresh()  # the last image is seen, too
            bars.remove_task(task)
