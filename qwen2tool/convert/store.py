"""Shards that outlive a kill: finished ones are kept with their hashes, and the same command goes on behind them.

A conversion works in a hidden folder beside its target, named after the source and the options. A shard is written
under another name, synced, renamed, and entered in a journal with the sha256 of each of its tensors; the next run
with the same key reads it again and believes it only if every hash holds. Another key starts afresh and removes what it
finds. The folder's name is none that `atomic_folder` sweeps; a lock in it keeps two runs apart.

Cost: stored tensors are copied inside the kernel; hashing runs beside it, several tensors at once (2 GB/s a core).
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
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.header import TensorInfo, read_header
from qwen2tool.checkpoint.raw import copy_tensor, raw_chunks
from qwen2tool.checkpoint.writer import FULL_DISK, Slot, write_json, write_safetensors
from qwen2tool.console import Advance, remark
from qwen2tool.errors import UserError

JOURNAL, LOCK = ".journal.json", ".lock"
UNFINISHED = ".unfinished"
BEHIND = 3
"""Pieces that hashing may lag behind; with one, two threads wait for each other's turn on a busy machine."""
STEP, HASH_BYTES = 1 << 26, 1 << 20
Write = Callable[[Slot, BinaryIO], None]
Hashes = dict[str, str]


class Digest(Protocol):
    """What hashing needs of hashlib's objects."""

    def update(self, data: memoryview, /) -> None: ...


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
        """Writes the shards that are not there yet; returns the sha256 of every tensor's bytes."""
        for stale in set(self._shards) - set(shards):
            del self._shards[stale]
        # One core copies; a second hashing thread on two cores was seen to hold it up (1.35 GB/s instead of 1.57).
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
            for file, slots in shards.items():
                if file in self._shards and self._holds(file, slots):
                    self.resumed += 1
                    advance(sum(slot.nbytes for slot in slots))
                    continue
                self._shards.pop(file, None)
                self._shards[file] = self._write_shard(file, slots, write, advance, pool)
                self._save()
        return {name: digest for hashes in self._shards.values() for name, digest in hashes.items()}

    def move_into(self, target: Path) -> None:
        """Gives the finished files to a folder on the same disk."""
        for file in self.folder.iterdir():
            if file.name not in (JOURNAL, LOCK) and not file.name.endswith(UNFINISHED):
                file.rename(target / file.name)

    def _holds(self, file: str, slots: Sequence[Slot]) -> bool:
        """Whether a shard of the journal still is what was entered, tensor by tensor."""
        try:
            found = read_header(self.folder / file).tensors
            wanted = {slot.name: (slot.dtype, slot.shape) for slot in slots}
            if {name: (info.dtype, info.shape) for name, info in found.items()} != wanted:
                return False
            return {name: _digest(raw_chunks(info)) for name, info in found.items()} == self._shards[file]
        except (UserError, OSError):
            return False

    def _write_shard(
        self, file: str, slots: Sequence[Slot], write: Write, advance: Advance, pool: ThreadPoolExecutor
    ) -> Hashes:
        hashing: dict[str, HashingFile] = {}
        unfinished = self.folder / (file + UNFINISHED)

        def write_hashed(slot: Slot, handle: BinaryIO) -> None:
            hashing[slot.name] = HashingFile(handle, pool)
            write(slot, cast(BinaryIO, hashing[slot.name]))
            advance(slot.nbytes)

        write_safetensors(unfinished, slots, write_hashed)
        sync(unfinished)
        hashes = {name: hashed.digest for name, hashed in hashing.items()}
        unfinished.rename(self.folder / file)
        return hashes

    def _save(self) -> None:
        """The journal, replaced whole: it never holds half an entry."""
        unfinished = self.folder / (JOURNAL + UNFINISHED)
        write_json(unfinished, self._shards)
        sync(unfinished)
        unfinished.replace(self.folder / JOURNAL)


class HashingFile:
    """Hands one tensor's bytes on to `handle`, and hashes them in `pool` meanwhile and after.

    What is written waits in memory, at most `BEHIND` pieces; what is copied from a file is read from there once more.
    """

    def __init__(self, handle: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._handle, self._pool = handle, pool
        self._hash = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> int:
        while len(self._pending) >= BEHIND:
            self._pending.popleft().result()
        before = self._pending[-1] if self._pending else None
        self._pending.append(self._pool.submit(self._update, data, before))
        return self._handle.write(data)

    def _update(self, data: bytes | memoryview, before: Future[None] | None) -> None:
        if before is not None:  # handed out earlier, so at work already: pieces keep their order
            before.result()
        self._hash.update(data)

    def copy(self, info: TensorInfo) -> None:
        """The bytes of `info`, all that this tensor has, from file to file inside the kernel; else read and written.

        Raises:
            UserError: the source ends early.
        """
        with info.file.open("rb") as source:
            self._handle.flush()
            begin = self._handle.tell()
            done = _copy_range(source.fileno(), info.start, self._handle.fileno(), begin, info.nbytes)
        self._handle.seek(begin + done)
        self._pending.append(self._pool.submit(hash_range, self._hash, info.file, info.start, done))
        if done < info.nbytes:
            for piece in raw_chunks(replace(info, start=info.start + done)):
                self.write(piece)

    @property
    def digest(self) -> str:
        """The sha256 of all that was written and copied, waited for.

        Raises:
            OSError: what was copied could not be read again.
        """
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()


def copy_stored(info: TensorInfo, handle: BinaryIO | HashingFile) -> None:
    """The bytes of a stored tensor to `handle`, by the shortest way that it has."""
    handle.copy(info) if isinstance(handle, HashingFile) else copy_tensor(info, handle)


def _copy_range(source: int, begin: int, target: int, offset: int, count: int) -> int:
    """Copies inside the kernel as far as it goes; returns how many bytes are done."""
    done = 0
    try:
        while done < count:
            step = os.copy_file_range(source, target, min(count - done, STEP), begin + done, offset + done)
            if step == 0:
                break
            done += step
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise
    return done


def hash_range(digest: Digest, file: Path, begin: int, count: int) -> None:
    """Hands `count` bytes of `file` from `begin` on to `digest`.

    Raises:
        OSError: the file ends before.
    """
    buffer = memoryview(bytearray(min(HASH_BYTES, count)))
    done = 0
    with file.open("rb", buffering=0) as source:
        while done < count:
            step = os.preadv(source.fileno(), [buffer[: count - done]], begin + done)
            if step == 0:
                raise OSError(f"{file}: became shorter while it was copied (at byte {begin + done})")
            digest.update(buffer[:step])
            done += step


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
