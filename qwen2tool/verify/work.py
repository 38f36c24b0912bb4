"""A folder in which a long comparison can be taken up again after a kill: what is finished, and hidden states so far.

`state.json` is replaced in one step whenever a piece is finished, and says for which sources and settings it holds. A
source that changed since (size or time of a file) makes the run start afresh; a finished run leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.console import remark
from qwen2tool.errors import UserError

STATE, FRESH, ROWS = "state.json", "state.json.new", "rows"


class Work:
    """Finished pieces by name; kept nowhere where `folder` is None."""

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        """Takes up what is in `folder`, if it was made for the same `key`.

        Raises:
            UserError: the folder holds other things.
        """
        self.folder = folder
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._done: dict[str, Any] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if any(file.name not in (STATE, FRESH, ROWS) for file in folder.iterdir()):
            raise UserError(f"{folder}: holds other files than those of a comparison", "Name a new folder for --work")
        state = read_json(folder / STATE) if (folder / STATE).is_file() else {}
        if state.get("key") == self._key:
            self._done = state["done"]
        elif state:
            remark("note: the sources or settings changed since the work folder was written; starting afresh")
            shutil.rmtree(folder / ROWS, ignore_errors=True)

    @property
    def rows(self) -> Path | None:
        """Where hidden states are kept."""
        return self.folder / ROWS if self.folder else None

    def get(self, name: str) -> Any:
        """A finished piece as JSON values, None where it is not finished."""
        return self._done.get(name)

    def put(self, name: str, value: Any) -> None:
        """Records a finished piece."""
        if self.folder is None:
            return
        self._done[name] = value
        fresh = self.folder / FRESH
        fresh.write_text(json.dumps({"key": self._key, "done": self._done}), encoding="utf-8")
        fresh.replace(self.folder / STATE)

    def finish(self) -> None:
        """Deletes what was kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


def stamp(files: list[Path]) -> list[tuple[str, int, int]]:
    """(path, size, time of change in ns): what a source is recognised by; reading it would be the run itself."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
