"""Shards that outlive a kill: finished ones are kept with their hashes, and the same command goes on behind them.

A conversion works in a hidden folder beside its target, named after the source and the options. A shard is written
under another name, synced, renamed, and entered in a journal with the sha256 of each of its tensors; the next run
with the same key reads it again and believes it only if every hash holds. Another key starts afresh and removes what it
finds. The folder's name is none that `atomic_folder` sweeps; a lock in it keeps two runs apart.

Cost: several tensors at once, each read, hashed and written piece by piece (0.6 to 0.9 GB/s a core).
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.checkpoint.raw import copy_tensor, raw_chunks
from qwen2tool.checkpoint.writer import Slot, write_json, write_safetensors
from qwen2tool.console import Advance, remark
from qwen2tool.errors import UserError

JOURNAL, LOCK = ".journal.json", ".lock"
UNFINISHED = ".unfinished"
BEHIND = 3
"""Pieces that hashing may lag behind; with one, two threads wait for each other's turn on a busy machine."""
WORKERS = min(4, os.cpu_count() or 2)
PIECE = 1 << 20
Write = Callable[[Slot, BinaryIO], None]
Hashes = dict[str, str]


class Working(Protocol):
    """What works in a folder that may outlive a kill."""

    @property
    def kept(self) -> str:
        """What of it the same command would go on behind, in words; nothing where there is nothing."""


Kind = TypeVar("Kind", bound=Working)


class Store:
    """The working folder of one conversion; `resumed` counts the shards that an earlier run had finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed = 0
        self._shards = _read_journal(folder / JOURNAL)

    @property
    def kept(self) -> str:
        return f"{len(self._shards)} finished shards" if self._shards else ""

    def write(self, shards: Mapping[str, Sequence[Slot]], write: Write, advance: Advance) -> Hashes:
        """Writes the shards that are not there yet; returns the sha256 of every tensor's bytes.

        One shard goes to the disk and into the journal while the next is written: on a disk of 0.6 GB/s, shards of
        300 MB then take as little time as one file would.
        """
        self._shards = {file: self._shards[file] for file in shards if self._holds(file, shards[file])}
        self.resumed = len(self._shards)
        advance(sum(slot.nbytes for file in self._shards for slot in shards[file]))
        missing = [file for file in shards if file not in self._shards]
        with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as beside:
            behind: Future[None] | None = None
            for file in missing:
                shard = _Shard(self.folder / (file + UNFINISHED), pool, advance)
                write_safetensors(shard.file, shards[file], shard.writes(write))
                if behind:
                    behind.result()
                behind = beside.submit(self._finish, file, shard)
            if behind:
                behind.result()
        return {name: digest for hashes in self._shards.values() for name, digest in hashes.items()}

    def move_into(self, target: Path) -> None:
        """Gives the finished files to a folder on the same disk."""
        for file in self.folder.iterdir():
            if file.name not in (JOURNAL, LOCK) and not file.name.endswith(UNFINISHED):
                file.rename(target / file.name)

    def _holds(self, file: str, slots: Sequence[Slot]) -> bool:
        """Whether a shard is in the journal and still what was entered, tensor by tensor."""
        if file not in self._shards:
            return False
        try:
            found = read_header(self.folder / file).tensors
            wanted = {slot.name: (slot.dtype, slot.shape) for slot in slots}
            if {name: (info.dtype, info.shape) for name, info in found.items()} != wanted:
                return False
            return {name: _digest(raw_chunks(info)) for name, info in found.items()} == self._shards[file]
        except (UserError, OSError):
            return False

    def _finish(self, file: str, shard: _Shard) -> None:
        """Complete, on the disk, under its own name and in the journal, in this order."""
        hashes = shard.hashes()
        sync(shard.file)
        shard.file.rename(self.folder / file)
        self._shards[file] = hashes
        self._save()

    def _save(self) -> None:
        """The journal, replaced whole: it never holds half an entry."""
        unfinished = self.folder / (JOURNAL + UNFINISHED)
        write_json(unfinished, self._shards)
        sync(unfinished)
        unfinished.replace(self.folder / JOURNAL)


class _Shard:
    """A file that is being written: a few of its tensors at a time are still under way in `pool`."""

    def __init__(self, file: Path, pool: ThreadPoolExecutor, advance: Advance) -> None:
        self.file = file
        self._pool, self._advance = pool, advance
        self._under_way: deque[tuple[Slot, HashingFile]] = deque()
        self._hashes: Hashes = {}

    def writes(self, write: Write) -> Write:
        """`write`, hashed, not waited for, and at most one tensor a worker ahead of the disk."""

        def write_hashed(slot: Slot, handle: BinaryIO) -> None:
            hashing = HashingFile(handle, self._pool)
            self._under_way.append((slot, hashing))
            write(slot, cast(BinaryIO, hashing))
            if len(self._under_way) > WORKERS:
                self._settle()

        return write_hashed

    def hashes(self) -> Hashes:
        """The sha256 of every tensor, when all of them are written."""
        while self._under_way:
            self._settle()
        return self._hashes

    def _settle(self) -> None:
        slot, hashing = self._under_way.popleft()
        self._hashes[slot.name] = hashing.digest
        self._advance(slot.nbytes)


class HashingFile:
    """Hands one tensor's bytes on to `handle`, and hashes them in `pool` meanwhile and after.

    What is written waits in memory, at most `BEHIND` pieces. What is copied goes from file to file in `pool`, while the
    caller goes on behind the place that it will fill.
    """

    def __init__(self, handle: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._handle, self._pool = handle, pool
        self._hash = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> int:
        while len(self._pending) >= BEHIND:
            self._pending.popleft().result()
        self._submit(self._hash.update, data)
        return self._handle.write(data)

    def copy(self, info: TensorInfo) -> None:
        """The bytes of `info`, all that this tensor has; a source that ends early shows in `digest`."""
        self._handle.flush()
        begin = self._handle.tell()
        self._handle.seek(begin + info.nbytes)
        self._submit(self._copy, info, os.dup(self._handle.fileno()), begin)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        before = self._pending[-1] if self._pending else None

        def after_what_came_before() -> None:
            if before is not None:  # handed out earlier, so at work already: pieces keep their order
                before.result()
            work(*arguments)

        self._pending.append(self._pool.submit(after_what_came_before))

    def _copy(self, info: TensorInfo, target: int, begin: int) -> None:
        """Hashed and written from one buffer that stays in a core's cache: a copy inside the kernel would save one of
        three passes, and a second reading for the hash costs two."""
        done = 0
        try:
            for piece in pieces(info.file, info.start, info.nbytes):
                self._hash.update(piece)
                written = 0
                while written < len(piece):
                    written += os.pwrite(target, piece[written:], begin + done + written)
                done += len(piece)
        finally:
            os.close(target)
        if done < info.nbytes:
            raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")

    @property
    def digest(self) -> str:
        """The sha256 of all that was written and copied, when all of it is.

        Raises:
            UserError: the source of a copy ends early.
        """
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()


def copy_stored(info: TensorInfo, handle: BinaryIO | HashingFile) -> None:
    """The bytes of a stored tensor to `handle`, by the shortest way that it has."""
    handle.copy(info) if isinstance(handle, HashingFile) else copy_tensor(info, handle)


def pieces(file: Path, begin: int, count: int) -> Iterator[memoryview]:
    """`count` bytes of `file` from `begin`, or those up to its end, in one buffer: a piece is valid until the next."""
    buffer = memoryview(bytearray(min(PIECE, count)))
    with file.open("rb", buffering=0) as source:
        while count and (step := os.preadv(source.fileno(), [buffer[:count]], begin)):
            yield buffer[:step]
            begin, count = begin + step, count - step


@contextmanager
def resumable(target: Path, key: str, kind: Callable[[Path], Kind]) -> Iterator[Kind]:
    """A `kind` in the working folder for `target` and `key` (hexadecimal); what an error of the system leaves is kept.

    Raises:
        UserError: another run is writing the same target. A UserError from inside removes the folder: the same command
            would come to the same end.
    """
    beside = target.absolute().parent
    folder = beside / f".{target.name}.resume-{key[:16]}"
    for other in sorted(beside.glob(f".{glob.escape(target.name)}.resume-*")):
        if other != folder:
            with _locked(other, target):
                shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    with _locked(folder, target):
        working = kind(folder)
        try:
            yield working
        except UserError:
            shutil.rmtree(folder)
            raise
        except BaseException:
            if working.kept:
                remark(f"{working.kept} are kept in {folder}: the same command goes on behind them")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    with (folder / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target}: another run is writing it", "Wait for it, or choose another output") from None
        yield


def _read_journal(file: Path) -> dict[str, Hashes]:
    """What an earlier run entered; a journal that is none counts as empty, since the shards can be written again."""
    if not file.is_file():
        return {}
    try:
        entries: dict[str, Any] = read_json(file)
    except UserError:
        return {}
    return {name: hashes for name, hashes in entries.items() if isinstance(hashes, dict)}


def _digest(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sync(file: Path) -> None:
    """Returns when the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
