"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch


def write(path: Path, content: bytes | dict[str, Any], keep: Path | None = None) -> None:
    """Writes a temporary file and renames it to ``path``, so that a kill at any time leaves the old file or the new one.

    Args:
        path: The file.
        content: Bytes, or what torch saves.
        keep: The new name of the old file; a kill may leave only this.

    Raises:
        OSError: The file can't be written, e.g. because the disk is full; the old one stays.
    """
    if not isinstance(content, bytes):
        buffer = io.BytesIO()  # torch.save into a file would replace the error of a full disk by its own
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # of names there is the old or the new one in any case
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
