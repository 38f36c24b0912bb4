"""A GGUF file that outlives a kill: what was written of it is kept, and the same command goes on behind it.

The file grows in the hidden folder that `store.resumable` gives it, under a name that no reader takes, beside a journal
with one line for each tensor whose bytes are in it: its name and their sha256. The next run reads those bytes again and
goes on behind the last tensor up to which every hash holds, so that the journal needs no sync of its own: what a lost
page of either would say is not believed. A header that is not the same byte for byte (another tokenizer, config or
type) starts anew.

Cost: a thread hashes beside the writing; a run that goes on hashes what it finds, 2 GB/s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from qwen2tool.checkpoint.gguf_header import ALIGNMENT
from qwen2tool.convert.gguf_pack import Planned, write_data
from qwen2tool.convert.store import UNFINISHED, Hashes, HashingFile, pieces, sync

JOURNAL = ".journal.jsonl"


class GgufStore:
    """The working folder of one GGUF; `resumed` counts the tensors that an earlier run had written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed = 0
        self._hashes = Hashes()

    @property
    def kept(self) -> str:
        return f"{len(self._hashes)} finished tensors" if self._hashes else ""

    def write(
        self, name: str, header: bytes, plan: Sequence[Planned], on_tensor: Callable[[str, int], None] | None
    ) -> tuple[Path, Mapping[str, str]]:
        """The whole file, called `name`, on the disk; returns its path and the sha256 of each tensor, by name in GGUF.

        Raises:
            UserError: a number that the planned type cannot hold.
        """
        unfinished = self.folder / (name + UNFINISHED)
        finished = self.folder / name
        if finished.exists():
            finished.rename(unfinished)
        end = self._resume(unfinished, header, plan)
        with unfinished.open("r+b") as handle, (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
            handle.truncate(end)
            handle.seek(end)
            for planned in plan[: self.resumed]:
                _report(planned, on_tensor)
            self._write_rest(handle, journal, plan[self.resumed :], on_tensor)
            handle.write(bytes(-handle.tell() % ALIGNMENT))
        sync(unfinished)
        unfinished.rename(finished)
        return finished, dict(self._hashes)

    def _write_rest(
        self,
        handle: BinaryIO,
        journal: TextIO,
        plan: Sequence[Planned],
        on_tensor: Callable[[str, int], None] | None,
    ) -> None:
        """The hash of a tensor is waited for when the next one is written, and entered then."""
        behind: tuple[Planned, HashingFile] | None = None
        with ThreadPoolExecutor(1) as pool:
            for planned in plan:
                handle.write(bytes(-handle.tell() % ALIGNMENT))
                begin, hashing = handle.tell(), HashingFile(handle, pool)
                write_data(planned, hashing)
                handle.flush()
                if handle.tell() - begin != planned.nbytes:
                    raise AssertionError(f"{planned.name}: wrote {handle.tell() - begin} bytes of {planned.nbytes}")
                if behind:
                    self._enter(journal, *behind)
                behind = planned, hashing
                _report(planned, on_tensor)
            if behind:
                self._enter(journal, *behind)

    def _enter(self, journal: TextIO, planned: Planned, hashing: HashingFile) -> None:
        self._hashes[planned.name] = hashing.digest
        journal.write(_line(planned.name, hashing.digest))
        journal.flush()

    def _resume(self, file: Path, header: bytes, plan: Sequence[Planned]) -> int:
        """Makes file and journal agree on as many tensors as are there; returns where the last of them ends."""
        entries, end = [], len(header)
        if _starts_with(file, header):
            for planned, entry in zip(plan, _read_journal(self.folder / JOURNAL), strict=False):
                begin = end + -end % ALIGNMENT
                if entry != (planned.name, _hash_of(file, begin, planned.nbytes)):
                    break
                entries.append(entry)
                end = begin + planned.nbytes
        else:
            file.write_bytes(header)
        self.resumed, self._hashes = len(entries), dict(entries)
        (self.folder / JOURNAL).write_text("".join(_line(*entry) for entry in entries), encoding="utf-8")
        return end


def _report(planned: Planned, on_tensor: Callable[[str, int], None] | None) -> None:
    if on_tensor:
        on_tensor(planned.tensor.name, planned.nbytes)


def _line(name: str, digest: str) -> str:
    return json.dumps([name, digest]) + "\n"


def _read_journal(file: Path) -> list[tuple[str, str]]:
    """The entries up to the first that is none, as the last of a killed run may be."""
    entries: list[tuple[str, str]] = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            entry: Any = json.loads(line)
        except ValueError:
            break
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            break
        entries.append((entry[0], entry[1]))
    return entries


def _starts_with(file: Path, header: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        return handle.read(len(header)) == header


def _hash_of(file: Path, begin: int, count: int) -> str:
    """The sha256 of a range of a file, nothing where the file ends before."""
    if file.stat().st_size < begin + count:
        return ""
    digest = hashlib.sha256()
    for piece in pieces(file, begin, count):
        digest.update(piece)
    return digest.hexdigest()
