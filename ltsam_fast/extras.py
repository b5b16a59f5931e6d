"""Imports optional dependencies, and makes the progress bar."""

from __future__ import annotations

import importlib
from types import ModuleType, TracebackType
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


def progress_bar(shown: bool, total: int, description: str, unit: str) -> Any:
    """Returns tqdm's bar, or one that shows nothing and does not need tqdm.

    Raises:
        ModuleNotFoundError: ``shown`` is True and tqdm is not installed.
    """
    if not shown:
        return _NoBar()
    return needed("tqdm", "tqdm").tqdm(total=total, desc=description, unit=unit)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self) -> None:
        """Does nothing."""
