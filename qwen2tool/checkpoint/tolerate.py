"""Damage that hides nothing else: what cannot be read beside the weights is noted, and all else is still told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwen2tool.checkpoint.header import COPY_THE_FILE, refuse_dead_link
from qwen2tool.errors import UserError

Damaged = dict[str, str]
"""File name (or key of a GGUF's metadata) -> why it cannot be read, and what to do."""
T = TypeVar("T")


def is_there(file: Path) -> bool:
    """Whether anything has the name of `file`, a link that leads nowhere included: that is no file, and no absence."""
    return file.exists() or file.is_symlink()


def tolerate(read: Callable[[Path], T], file: Path, damaged: Damaged | None, key: str | None = None) -> T | None:
    """`read(file)`, or None where it refuses, with the reason in `damaged` under `key` (the file's name).

    Raises:
        UserError: it refuses, and `damaged` is None.
    """
    try:
        refuse_dead_link(file)
        if file.exists() and not file.is_file():
            raise UserError(f"{file}: no file", COPY_THE_FILE)
        return read(file)
    except UserError as error:
        if damaged is None:
            raise
        why = error.what.removeprefix(f"{file}: ").removeprefix(f"{key} ")
        damaged[key or file.name] = f"{why}; {error.fix[:1].lower()}{error.fix[1:]}"
    except OSError as error:
        if damaged is None:
            raise
        damaged[key or file.name] = f"cannot be read ({error.strerror}); check its permissions"
    return None
