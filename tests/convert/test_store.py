"""A kill in the middle: what was finished is kept, checked and used; what another run left is not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.checkpoint.raw import raw_chunks
from qwen2tool.convert import store
from qwen2tool.convert.run import Options, convert
from qwen2tool.convert.store import JOURNAL, LOCK, HashingFile, Store, resumable
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_json
from tests.convert.common import hashes

FIVE = Options(max_shard_bytes=65_000)
KILLED = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it, and so would we
from pathlib import Path
from qwen2tool.convert import plan
from qwen2tool.convert.run import Options, convert

copy, calls = plan.copy_stored, []

def copy_and_die(info, handle):
    calls.append(info)
    if len(calls) == 25:  # in the fourth shard; the third is put on the disk meanwhile
        (journal,) = Path(sys.argv[2]).parent.glob(".out.resume-*/.journal.json")
        while len(json.loads(journal.read_text())) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    copy(info, handle)

plan.copy_stored = copy_and_die
convert(sys.argv[1], Path(sys.argv[2]), Options(max_shard_bytes=65_000))
"""
FULL = """
import resource, sys
from pathlib import Path
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    convert(sys.argv[1], Path(sys.argv[2]), Options(max_shard_bytes=50_000))
except UserError as error:
    print(error)
"""


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def killed(base_folder, tmp_path_factory) -> Path:
    """The folder that a run into `out` was killed in."""
    folder: Path = tmp_path_factory.mktemp("killed")
    assert python(KILLED, base_folder, folder / "out", "SIGKILL").returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of what the killed run left, and its resume folder as it was."""
    subprocess.run(["cp", "-a", f"{killed}/.", str(tmp_path)], check=True)
    return tmp_path


def resume_folder(folder: Path) -> Path:
    (found,) = folder.glob(".out.resume-*")
    return found


def test_a_killed_run_leaves_nothing_that_loads(left):
    assert not (left / "out").exists()
    finished = [file.name for file in resume_folder(left).iterdir() if file.suffix == ".safetensors"]
    assert len(finished) == 3 and (resume_folder(left) / JOURNAL).is_file()


def test_the_same_command_goes_on(base_folder, left):
    inodes = {file.name: file.stat().st_ino for file in resume_folder(left).glob("*.safetensors")}
    report = convert(base_folder, left / "out", FIVE)
    assert report.resumed_shards == 3
    assert {name: (left / "out" / name).stat().st_ino for name in inodes} == inodes, "not written again"
    assert hashes(left / "out") == hashes(base_folder)
    assert [path.name for path in left.iterdir()] == ["out"]
    assert not {JOURNAL, LOCK} & {file.name for file in (left / "out").iterdir()}


@pytest.mark.parametrize("damage", ["one byte", "cut", "gone", "journal", "hash"])
def test_a_shard_that_is_not_what_it_was_is_written_again(base_folder, left, damage):
    folder = resume_folder(left)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if damage == "one byte":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-10])
    elif damage == "gone":
        shard.unlink()
    elif damage == "journal":
        (folder / JOURNAL).write_text("{")
    else:
        edit_json(folder / JOURNAL, lambda shards: shards[shard.name].update(dict.fromkeys(shards[shard.name], "0")))
    report = convert(base_folder, left / "out", FIVE)
    assert report.resumed_shards == (0 if damage == "journal" else 2)
    assert hashes(left / "out") == hashes(base_folder)


@pytest.mark.parametrize("other", ["options", "source"])
def test_another_source_or_option_starts_afresh(base_folder, base_copy, left, other):
    if other == "options":
        report = convert(base_folder, left / "out", Options(max_shard_bytes=65_000, dtype="float32"))
    else:
        report = convert(base_copy, left / "out", FIVE)  # the same bytes in other files: not worth the doubt
    assert report.resumed_shards == 0 and not list(left.glob(".out*"))


def test_a_source_that_changed_starts_afresh(base_copy, tmp_path):
    assert python(KILLED, base_copy, tmp_path / "out", "SIGKILL").returncode == -signal.SIGKILL
    shard = sorted(base_copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert convert(base_copy, tmp_path / "out", FIVE).resumed_shards == 0
    assert hashes(tmp_path / "out") == hashes(base_copy)


def test_two_runs_into_one_output(base_folder, left):
    with (resume_folder(left) / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in (FIVE, Options()):
            with pytest.raises(UserError, match="another run is writing it"):
                convert(base_folder, left / "out", options)
    assert convert(base_folder, left / "out", FIVE).resumed_shards == 3


def test_ctrl_c_says_what_is_kept(base_folder, tmp_path):
    done = python(KILLED, base_folder, tmp_path / "out", "SIGINT")
    assert done.returncode != 0 and "3 finished shards are kept" in done.stderr
    assert convert(base_folder, tmp_path / "out", FIVE).resumed_shards == 3


def test_a_full_disk_is_one_line(base_folder, tmp_path):
    done = python(FULL, base_folder, tmp_path / "out")
    assert "disk full or file too large" in done.stdout and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.partial-*"))


def test_a_users_error_keeps_nothing(tmp_path):
    with pytest.raises(UserError, match="no"), resumable(tmp_path / "out", "ab" * 32, Store) as store:
        assert store.folder.is_dir()
        raise UserError("no", "no")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_hashing_beside_writing(tmp_path, pool):
    """Every piece once, in order, whatever the threads do."""
    pieces = [bytes([n]) * (1 << 16) for n in range(50)]
    with (tmp_path / "file").open("wb") as handle:
        hashing = HashingFile(handle, pool)
        for piece in pieces:
            hashing.write(memoryview(piece))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert hashing.digest == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_copying_from_file_to_file(base_folder, tmp_path, monkeypatch, pool):
    """The same bytes and hash however little the system writes at once; between two writes, where a wrong offset would
    show."""
    info = max(open_checkpoint(base_folder).tensors.values(), key=lambda info: info.nbytes)
    whole, calls = os.pwrite, []

    def some(target: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        return whole(target, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", some)
    monkeypatch.setattr(store, "PIECE", 1000)
    with (tmp_path / "file").open("wb") as handle:
        hashing = HashingFile(handle, pool)
        hashing.write(b"before")
        hashing.copy(info)
        hashing.write(b"after")
    assert hashing.digest == hashlib.sha256(b"before" + b"".join(raw_chunks(info)) + b"after").hexdigest()
    assert (tmp_path / "file").read_bytes() == b"before" + b"".join(raw_chunks(info)) + b"after"
    assert len(calls) > info.nbytes // 1000 and max(calls) <= 1000


def test_a_source_that_ends_early(base_folder, tmp_path, pool):
    info = next(iter(open_checkpoint(base_folder).tensors.values()))
    (tmp_path / "short").write_bytes(info.file.read_bytes()[: info.end - 3])
    handle = (tmp_path / "file").open("wb")
    with handle, pytest.raises(UserError, match="ends inside tensor"):
        hashing = HashingFile(handle, pool)
        hashing.copy(replace(info, file=tmp_path / "short"))
        assert hashing.digest
