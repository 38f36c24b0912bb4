"""Writing a checkpoint so that a killed or failed run leaves nothing that loads.

A folder is filled under a hidden name beside its target, synced, and renamed into place: the target either is not
there or is complete. safetensors puts all offsets first, so a shard is written from a plan of names, dtypes and shapes.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from qwen2tool.checkpoint.folder import INDEX_NAME
from qwen2tool.checkpoint.header import ITEM_BYTES
from qwen2tool.errors import UserError

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
"""What belongs to a checkpoint beside weights and config.json, copied byte for byte."""
OUTPUT_MARKS = (
    ("adapter_config.json",),
    ("settings.yaml", "inputs.json"),
    ("trainer_state.json",),
    ("sft-train.jsonl", "dpo-train.jsonl"),
)
"""Files by which an adapter, a run of `train`, a trainer's checkpoint and a demo are known."""
SHOWN = 3
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor to be written: `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def require_free(target: Path, overwrite: bool) -> None:
    """Passes where `target` may be written.

    `overwrite` lets go of what can be made again, and of nothing else: an empty folder, or one that this tool or a
    trainer wrote (a checkpoint, an adapter, a training run, a demo).

    Raises:
        UserError: it exists and `overwrite` is off, it is a file or a link, it holds something else, or the folder
            above it is missing.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: is no folder that could be replaced", "Choose another output")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: already exists", "Choose another output, or pass --overwrite")
    if target.exists():
        _require_replaceable(target)
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.absolute().parent}: no such folder to write into", "Create it first")


def require_apart(target: Path, *sources: Path) -> None:
    """Passes where replacing `target` deletes none of `sources`, nor the folder one stands in, nor a home folder.

    Raises:
        UserError: `--overwrite` replaces a whole folder, and this one holds something that is needed.
    """
    if not target.exists():
        return
    for kept in (*sources, Path.cwd(), Path.home()):
        if target.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise UserError(f"{target}: replacing it would delete {kept.resolve()}", "Choose another output")


def _require_replaceable(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    if names and not _is_output(folder):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"{folder}: holds {', '.join(names[:SHOWN])}{more}, and is no checkpoint, adapter, training run or demo, "
            "which is all that --overwrite replaces",
            "Choose another output, or empty that folder yourself",
        )


def _is_output(folder: Path) -> bool:
    """Whether a folder holds what a tool for models writes, by files that other folders do not have."""
    if _names_a_model(folder / "config.json") or any(folder.glob("checkpoint-*/trainer_state.json")):
        return True
    return any(all((folder / name).is_file() for name in names) for names in OUTPUT_MARKS)


def _names_a_model(config: Path) -> bool:
    """Many programs have a config.json; that of a model says which kind."""
    try:
        value = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "model_type" in value


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill; it takes the name `target` when the block ends well, and is removed when it does not.

    Raises:
        UserError: the target exists (without `overwrite`), or the disk is full; see `require_free`.
    """
    _sweep(target.absolute())
    require_free(target, overwrite)
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _swap(partial, target)
    except Exception as error:
        number = _system_error(error)
        if number in FULL_DISK:
            raise UserError(
                f"{target}: disk full or file too large while writing ({os.strerror(number)})",
                "Free some space, or choose an output on another disk",
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _system_error(error: Exception) -> int:
    """The number of the system's error, 0 for another; safetensors' own writer has it in its text only."""
    if isinstance(error, OSError):
        return error.errno or 0
    text = RUST_OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(text[1]) if text else 0


def _sweep(target: Path) -> None:
    """Removes what killed runs left behind for the same target.

    An old target that stepped aside for a run that was killed before it could take its place gets its name back.
    """
    for stale in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
        pid, _, role = stale.name.rpartition(".partial-")[2].partition("-")
        if pid.isdigit() and Path(f"/proc/{pid}").exists():
            continue
        if role == "old" and not target.exists():
            stale.rename(target)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`; an old target steps aside first, since a folder cannot replace a full one."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_name(f"{partial.name}-old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def write_safetensors(
    file: Path,
    slots: Sequence[Slot],
    write: Callable[[Slot, BinaryIO], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file: `write` is called once a slot, in order, and must write exactly its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for slot in slots:
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [begin, begin + slot.nbytes],
        }
        begin += slot.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts on 8 bytes, so that readers may map it
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for slot in slots:
            before = handle.tell()
            write(slot, handle)
            if handle.tell() - before != slot.nbytes:
                raise AssertionError(f"{slot.name}: wrote {handle.tell() - before} bytes of {slot.nbytes}")


def plan_shards(slots: Sequence[Slot], max_bytes: int) -> dict[str, list[Slot]]:
    """File name -> slots, in order, at most `max_bytes` of data a file (a larger tensor gets one of its own)."""
    groups: list[list[Slot]] = [[]]
    for slot in slots:
        if groups[-1] and sum(s.nbytes for s in groups[-1]) + slot.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(slot)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Slot]], metadata: Mapping[str, Any] | None = None) -> None:
    """The index of a sharded checkpoint (https://huggingface.co/docs/safetensors; total_size counts data bytes).

    `metadata` holds further keys for its metadata, as the index that is being rewritten may have.
    """
    total = sum(slot.nbytes for slots in shards.values() for slot in slots)
    weight_map = {slot.name: file for file, slots in shards.items() for slot in slots}
    facts = {**(metadata or {}), "total_size": total}
    write_json(folder / INDEX_NAME, {"metadata": facts, "weight_map": dict(sorted(weight_map.items()))})


def write_json(file: Path, value: Any) -> None:
    """`value` as indented UTF-8 JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, chat template, generation_config and licence byte for byte; returns the names it found."""
    found = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
