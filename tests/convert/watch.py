"""Which paths this process changes, wherever they lie: Python's audit events, which no call in Python can avoid.

What compiled code writes makes no events: a test looks into the folders concerned as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = {
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, 0),), "os.chmod": ((0, 2),),
}  # fmt: skip
"""Audit events that change a path -> which of their arguments are it and the open folder it is relative to."""


class Watch:
    """Paths that this process opens for writing, makes, moves or removes; a hook for audit events cannot be removed."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is None:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._add(arguments[0])
        for path, folder in WRITES.get(event, ()):
            self._add(arguments[path], arguments[folder])

    def _add(self, path: Any, folder: Any = None) -> None:
        if isinstance(path, str | bytes) and self.paths is not None:
            top = Path(f"/proc/self/fd/{folder}").resolve() if isinstance(folder, int) and folder >= 0 else Path.cwd()
            self.paths.append(str((top / os.fsdecode(path)).resolve()))

    @contextmanager
    def written(self) -> Iterator[list[str]]:
        self.paths = found = []
        try:
            yield found
        finally:
            self.paths = None


WATCH = Watch()
sys.addaudithook(WATCH)
