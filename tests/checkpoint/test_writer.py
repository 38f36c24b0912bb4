"""What we write, safetensors reads; and a folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen2ForCausalLM

from qwen2tool.checkpoint.folder import INDEX_NAME, open_checkpoint
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.raw import copy_tensor
from qwen2tool.checkpoint.reader import DTYPE_NAME, TORCH_DTYPE, read_tensor, write_tensor
from qwen2tool.checkpoint.writer import (
    Slot,
    atomic_folder,
    copy_side_files,
    plan_shards,
    require_free,
    write_index,
    write_json,
    write_safetensors,
)
from qwen2tool.errors import UserError
from tests.checkpoint.files import bytes_of
from tests.checkpoint.test_reader import sample


def write(file, tensors, **options) -> None:
    slots = [Slot(name=name, dtype=DTYPE_NAME[t.dtype], shape=tuple(t.shape)) for name, t in tensors.items()]
    write_safetensors(file, slots, lambda slot, handle: write_tensor(tensors[slot.name], handle), **options)


@pytest.mark.parametrize("name", TORCH_DTYPE)
def test_written_by_us_read_by_safetensors(name, tmp_path):
    dtype = TORCH_DTYPE[name]
    tensors = {"matrix": sample(dtype, 5, 4), "vector": sample(dtype, 3), "empty": sample(dtype, 0, 2)}
    write(tmp_path / "f", tensors, metadata={"key": "ä"})
    with safe_open(tmp_path / "f", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "key": "ä"} and set(theirs.keys()) == set(tensors)
        for key, tensor in tensors.items():
            found = theirs.get_tensor(key)
            assert (found.dtype, found.shape, bytes_of(found)) == (tensor.dtype, tensor.shape, bytes_of(tensor))


def test_dtypes_mixed_in_any_order(tmp_path):
    """Odd sizes before wide dtypes: data need not be aligned for safetensors."""
    tensors = {
        "bytes": sample(torch.uint8, 3), "halves": sample(torch.bfloat16, 5), "wide": torch.randn(3),
        "scalar": torch.tensor(2.5, dtype=torch.float64), "ünïcode": torch.arange(3),
    }  # fmt: skip
    write(tmp_path / "f", tensors)
    with safe_open(tmp_path / "f", "pt") as theirs:
        assert all(bytes_of(theirs.get_tensor(name)) == bytes_of(tensor) for name, tensor in tensors.items())
    infos = read_header(tmp_path / "f").tensors
    assert list(infos) == list(tensors) and infos["bytes"].start % 8 == 0
    assert all(bytes_of(read_tensor(infos[name])) == bytes_of(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("bytes_written", [b"", b"123", b"12345"])
def test_slot_that_is_not_filled_exactly(bytes_written, tmp_path):
    slot = Slot(name="x", dtype="U8", shape=(4,))
    with pytest.raises(AssertionError, match=f"x: wrote {len(bytes_written)} bytes of 4"):
        write_safetensors(tmp_path / "f", [slot], lambda slot, handle: handle.write(bytes_written))


def test_shards_hold_what_fits_in_order():
    slots = [Slot(name=str(i), dtype="U8", shape=(size,)) for i, size in enumerate((4, 4, 3, 20, 1))]
    shards = plan_shards(slots, 8)
    assert [[slot.nbytes for slot in group] for group in shards.values()] == [[4, 4], [3], [20], [1]]
    assert list(shards) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert list(plan_shards(slots, 32)) == ["model.safetensors"]


@pytest.mark.parametrize("max_bytes", [1, 20_000, 10**9])
def test_resharded_folder_is_the_same_model(max_bytes, base_folder, tmp_path):
    base = open_checkpoint(base_folder)
    slots = [Slot(name=info.name, dtype=info.dtype, shape=info.shape) for info in base.tensors.values()]
    with atomic_folder(tmp_path / "out") as folder:
        shards = plan_shards(slots, max_bytes)
        for name, group in shards.items():
            write_safetensors(folder / name, group, lambda slot, handle: copy_tensor(base.tensors[slot.name], handle))
        if len(shards) > 1:
            write_index(folder, shards)
        write_json(folder / "config.json", base.config)
        assert len(copy_side_files(base.path, folder)) == 3
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    truth = Qwen2ForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).state_dict()
    assert loaded.keys() == truth.keys() and all(loaded[name].equal(truth[name]) for name in truth)


def test_index(tmp_path):
    shards = {"a": [Slot(name="y", dtype="F32", shape=(2, 3))], "b": [Slot(name="x", dtype="BF16", shape=(5,))]}
    write_index(tmp_path, shards, {"total_size": 1, "kept": True})
    assert (tmp_path / INDEX_NAME).read_text() == (
        '{\n  "metadata": {\n    "total_size": 34,\n    "kept": true\n  },\n'
        '  "weight_map": {\n    "x": "b",\n    "y": "a"\n  }\n}\n'
    )


def test_side_files(base_folder, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "merges.txt").write_bytes(b"\xff\r\n")
    (tmp_path / "source" / "optimizer.pt").write_bytes(b"no")
    assert copy_side_files(tmp_path / "source", tmp_path) == ["merges.txt"]
    assert (tmp_path / "merges.txt").read_bytes() == b"\xff\r\n" and not (tmp_path / "optimizer.pt").exists()


def test_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists() and folder.parent == tmp_path and folder.name.startswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
def test_failure_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_full_disk_is_a_sentence(error, tmp_path):
    with (
        pytest.raises(UserError, match="out: disk full or file too large while writing"),
        atomic_folder(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_safetensors_stay_what_they_are(tmp_path):
    with pytest.raises(SafetensorError), atomic_folder(tmp_path / "out"):
        raise SafetensorError("I/O error: Permission denied (os error 13)")


def old_output(target: Path) -> Path:
    """A folder that may be replaced: an adapter's, by its config."""
    target.mkdir()
    (target / "adapter_config.json").write_text("old")
    return target


def test_replacing(tmp_path):
    target = old_output(tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        require_free(target, overwrite=False)
    with pytest.raises(ValueError, match="x"), atomic_folder(target, overwrite=True):
        raise ValueError("x")
    assert (target / "adapter_config.json").read_text() == "old"
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (target / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"model_type": "qwen2"}', "thesis.txt": ""},
        {"adapter_config.json": "{}"},
        {"settings.yaml": "", "inputs.json": "{}"},
        {"trainer_state.json": "{}"},
        {"checkpoint-30/trainer_state.json": "{}"},
        {"sft-train.jsonl": "", "dpo-train.jsonl": ""},
    ],
    ids=["empty", "checkpoint", "adapter", "run", "saved state", "runs of a trainer", "demo"],
)
def test_what_can_be_made_again_may_be_replaced(tmp_path, files):
    write_files(tmp_path / "out", files)
    require_free(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="already exists"):
        require_free(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"thesis.txt": ""}, r"thesis\.txt"),
        ({"config.json": '{"editor": "vi"}'}, r"config\.json"),
        ({"config.json": '"model_type"'}, r"config\.json"),
        ({"config.json": "{"}, r"config\.json"),
        ({"settings.yaml": "", "b": "", "a": "", "c": "", "d": ""}, r"a, b, c and 2 more"),
        ({"sft-train.jsonl": ""}, r"sft-train\.jsonl"),
        ({"checkpoint-30/notes.txt": ""}, "checkpoint-30"),
        ({"model/config.json": '{"model_type": "qwen2"}'}, "model"),
    ],
)
def test_no_other_folder_is_replaced(tmp_path, files, named):
    """`--overwrite` on a mistyped name must not cost anybody's work."""
    write_files(tmp_path / "out", files)
    with pytest.raises(UserError, match=rf"out: holds {named}, and is no checkpoint, adapter, training run or demo"):
        require_free(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="is no checkpoint"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert all((tmp_path / "out" / name).read_text() == text for name, text in files.items())


def write_files(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_file_or_link_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(UserError, match="is no folder that could be replaced"):
            require_free(tmp_path / name, overwrite=True)


def test_parent_must_exist(tmp_path):
    with pytest.raises(UserError, match="no such folder to write into"):
        require_free(tmp_path / "a" / "b", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("name", ["out", "[brackets]", "with space"])
def test_leavings_of_killed_runs_are_swept(name, tmp_path):
    dead, mine = tmp_path / f".{name}.partial-{dead_process()}", tmp_path / f".{name}.partial-{os.getppid()}"
    other = tmp_path / f".{name}-2.partial-{dead_process()}"
    for folder in (dead, mine, other):
        folder.mkdir()
        (folder / "shard").write_text("half")
    with atomic_folder(tmp_path / name):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name, mine.name, other.name}  # the living keep theirs


KILLED_WHILE_SWAPPING = """
import os, signal, sys
from pathlib import Path
from qwen2tool.checkpoint.writer import atomic_folder

rename = Path.rename

def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename_and_die
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "new").write_text("new")
"""


def test_killed_between_the_two_renames(tmp_path):
    """The target is away for that moment; the next run gives the old one its name back before it does anything."""
    target = old_output(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SWAPPING, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    with pytest.raises(UserError, match="already exists"), atomic_folder(target):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "adapter_config.json"], "not asked to replace it"
    with pytest.raises(ValueError, match="x"), atomic_folder(target, overwrite=True):
        raise ValueError("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "adapter_config.json"]


def test_swap_that_fails_puts_the_old_back(tmp_path, monkeypatch):
    target = old_output(tmp_path / "out")
    rename = type(target).rename

    def refuse(self, other):
        if other == target and self.name.endswith(str(os.getpid())):
            raise OSError(errno.EACCES, "denied")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", refuse)
    with pytest.raises(OSError, match="denied"), atomic_folder(target, overwrite=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "adapter_config.json"]
