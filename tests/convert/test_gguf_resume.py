"""A GGUF that was killed in the middle is gone on with; one of other inputs, or damaged since, never is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from qwen2tool.convert import gguf_store, to_gguf
from qwen2tool.convert.gguf_store import JOURNAL
from qwen2tool.convert.run import Options, convert
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_json

BF16, F32 = (Options(to="gguf", gguf_type=kind) for kind in ("bf16", "f32"))
DONE = 24
KILLED = """
import os, signal, sys
from pathlib import Path
from qwen2tool.convert import gguf_store
from qwen2tool.convert.run import Options, convert

write, calls = gguf_store.write_data, []

def write_half_and_die(planned, handle):
    calls.append(planned)
    if len(calls) == 26:  # the 25th is written, and not entered yet
        handle.write(bytes(planned.nbytes // 2))
        os.kill(os.getpid(), signal.SIGKILL)
    write(planned, handle)

gguf_store.write_data = write_half_and_die
convert(sys.argv[1], Path(sys.argv[2]), Options(to="gguf", gguf_type="bf16"))
"""


def killed_run(source: Path, out: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def killed(base_folder, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("killed")
    killed_run(base_folder, folder / "m.gguf")
    return folder


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of what the killed run left."""
    return Path(shutil.copytree(killed, tmp_path / "left"))


@pytest.fixture(scope="module")
def whole(base_folder, tmp_path_factory) -> bytes:
    """What an uninterrupted run writes."""
    file = tmp_path_factory.mktemp("whole") / "m.gguf"
    convert(base_folder, file, BF16)
    return bytes(file.read_bytes())


def working(folder: Path) -> Path:
    (found,) = folder.glob(".m.gguf.resume-*")
    return found


def test_a_killed_run_leaves_nothing_that_loads(left):
    assert [path.name for path in left.iterdir()] == [working(left).name]
    assert sorted(file.name for file in working(left).iterdir()) == [JOURNAL, ".lock", "m.gguf.unfinished"]
    assert len((working(left) / JOURNAL).read_text().splitlines()) == DONE


def test_the_same_command_goes_on(base_folder, left, whole, monkeypatch):
    inode = (working(left) / "m.gguf.unfinished").stat().st_ino
    written, write = [], gguf_store.write_data
    monkeypatch.setattr(gguf_store, "write_data", lambda planned, handle: written.append(write(planned, handle)))
    report = convert(base_folder, left / "m.gguf", BF16)
    assert report.resumed_tensors == DONE and len(written) == 39 - DONE
    assert (left / "m.gguf").stat().st_ino == inode and (left / "m.gguf").read_bytes() == whole
    assert sorted(path.name for path in left.iterdir()) == ["m.gguf", "m.qwen2tool-convert.json"]
    assert convert(base_folder, left / "m.gguf", BF16, overwrite=True).resumed_tensors == 0, "nothing was left over"


@pytest.mark.parametrize("other", ["type", "files", "one byte", "tokenizer"])
def test_other_inputs_start_anew(base_copy, tmp_path, other):
    """The negative control of the test above: what the first run wrote would be in the bytes of the second."""
    out = tmp_path / "out"
    out.mkdir()
    killed_run(base_copy, out / "m.gguf")
    source = base_copy
    if other == "files":  # the same bytes in other files: not worth the doubt
        source = Path(shutil.copytree(base_copy, tmp_path / "again"))
    elif other == "one byte":
        shard = sorted(base_copy.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif other == "tokenizer":
        edit_json(base_copy / "tokenizer_config.json", lambda settings: settings.update(chat_template="{{ 1 }}"))
    options = F32 if other == "type" else BF16
    assert convert(source, out / "m.gguf", options).resumed_tensors == 0
    (tmp_path / "fresh").mkdir()
    convert(source, tmp_path / "fresh" / "m.gguf", options)
    assert (out / "m.gguf").read_bytes() == (tmp_path / "fresh" / "m.gguf").read_bytes()
    assert not list(out.glob(".m.gguf*"))


@pytest.mark.parametrize(
    ("damage", "kept"), [("tensor 9", 9), ("cut", 4), ("header", 0), ("journal", 6), ("half a line", DONE - 1)]
)
def test_what_is_not_as_it_was_is_written_again(base_folder, left, whole, damage, kept):
    file, journal = working(left) / "m.gguf.unfinished", working(left) / JOURNAL
    data, lines = bytearray(file.read_bytes()), journal.read_text().splitlines()
    (left / "whole.gguf").write_bytes(whole)
    offsets = [int(tensor.data_offset) for tensor in gguf.GGUFReader(left / "whole.gguf").tensors]
    if damage == "tensor 9":
        data[offsets[9] + 1] ^= 1
    elif damage == "cut":
        del data[offsets[4] + 1 :]
    elif damage == "header":
        data[100] ^= 1
    elif damage == "journal":
        lines[6] = lines[7]
    else:
        lines[-1] = lines[-1][:40]
    file.write_bytes(data)
    journal.write_text("\n".join(lines))
    assert convert(base_folder, left / "m.gguf", BF16).resumed_tensors == kept
    assert (left / "m.gguf").read_bytes() == whole


def test_a_run_that_dies_after_the_last_tensor(base_folder, tmp_path, whole, monkeypatch, capsys):
    """The file takes its name when it is proved, and the old one stays until then."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "m.gguf").write_text("mine")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(to_gguf, "measure_rounding", dies)
        convert(base_folder, tmp_path / "m.gguf", BF16, overwrite=True)
    assert "39 finished tensors are kept" in capsys.readouterr().err
    assert (tmp_path / "m.gguf").read_text() == "mine" and not list(tmp_path.glob("*.json"))
    assert convert(base_folder, tmp_path / "m.gguf", BF16, overwrite=True).resumed_tensors == 39
    assert (tmp_path / "m.gguf").read_bytes() == whole


def test_a_file_that_fails_its_proof_is_not_kept(base_folder, tmp_path, monkeypatch):
    def wrong(*_: object) -> None:
        raise UserError("not what it claims to be", "no")

    monkeypatch.setattr(to_gguf, "measure_rounding", wrong)
    with pytest.raises(UserError, match="not what it claims"):
        convert(base_folder, tmp_path / "m.gguf", BF16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_written(base_folder, tmp_path, whole, monkeypatch, capsys):
    write, calls = gguf_store.write_data, []

    def full(planned: Any, handle: Any) -> None:
        calls.append(planned)
        if len(calls) == 11:
            raise OSError(28, os.strerror(28))
        write(planned, handle)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="disk full"):
        patched.setattr(gguf_store, "write_data", full)
        convert(base_folder, tmp_path / "m.gguf", BF16)
    assert "9 finished tensors are kept" in capsys.readouterr().err and not (tmp_path / "m.gguf").exists()
    assert convert(base_folder, tmp_path / "m.gguf", BF16).resumed_tensors == 9
    assert (tmp_path / "m.gguf").read_bytes() == whole
