"""The header of a safetensors file, checked against the file it describes; no torch, no tensor data.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length N, N bytes of JSON that map a
tensor name to dtype, shape and [begin, end) in the data that follows, and optionally "__metadata__". A reader that
trusts this JSON reads garbage from a truncated download, so lengths, offsets and file size must add up here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qwen2tool.errors import UserError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own reader; a larger length is a corrupt file, not a large model."""

COPY_THE_FILE = "Copy the file itself here: links into a download cache lead nowhere on another machine"
DAMAGED = "Download or copy the file again: it is damaged"
NOT_WEIGHTS = {
    b"version ": ("a Git LFS pointer, not the file itself", "Fetch the files: git lfs pull, or hf download"),
    b"<!doctyp": ("a web page, not a model file", "Download the file itself, not the page that shows it"),
    b"<html": ("a web page, not a model file", "Download the file itself, not the page that shows it"),
}
"""What is found under a model file's name instead, by its first bytes in lower case: what it is, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte positions in `file`; `dtype` is safetensors' name (BF16, F32)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """All tensors of one file, in the order of their data, and its "__metadata__"."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Reads and checks the header of `file`.

    Raises:
        UserError: the file is shorter than it says, or its header is no valid safetensors header.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = header_length(file, handle.read(8), size)
        text = handle.read(length)
    return parse_header(file, text, 8 + length, size)


def header_length(file: Path, first: bytes, size: int) -> int:
    """Bytes of JSON that follow the `first` eight of a file of `size` bytes.

    Raises:
        UserError: more than the file has, or than any header is.
    """
    length = int.from_bytes(first, "little")
    refuse_other_downloads(file, first)
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise UserError(f"{file}: no safetensors header (it claims {length} bytes in a file of {size})", DAMAGED)
    return length


def refuse_dead_link(file: Path) -> None:
    """A snapshot of the Hub's cache is links; copied as it is, it looks whole in a listing and holds nothing."""
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file}: a link to a file that is not there", COPY_THE_FILE)


def refuse_other_downloads(file: Path, first: bytes) -> None:
    """Names what a careless download leaves under the name of a model file, by the `first` bytes of it.

    Raises:
        UserError: a pointer of Git LFS, or a web page.
    """
    for start, (what, remedy) in NOT_WEIGHTS.items():
        if first.lower().startswith(start):
            raise UserError(f"{file}: {what}", remedy)


def parse_header(file: Path, text: bytes, data_start: int, size: int) -> Header:
    """The header whose JSON is `text`, of a file of `size` bytes (here or elsewhere) whose data begin at `data_start`.

    Raises:
        UserError: `text` is no valid safetensors header, or it does not describe a file of that size.
    """
    entries = _parse(file, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: __metadata__ in the header is no object", DAMAGED)
    infos = sorted((_entry(file, name, entry, data_start) for name, entry in entries.items()), key=_position)
    _check_layout(file, infos, data_start, size)
    return Header(tensors={info.name: info for info in infos}, metadata={str(k): str(v) for k, v in metadata.items()})


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: corrupt safetensors header (not JSON: {str(error)[:80]})", DAMAGED) from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: corrupt safetensors header (a {type(entries).__name__}, not an object)", DAMAGED)
    return entries


def _position(info: TensorInfo) -> tuple[int, int]:
    """Where data lies, an empty tensor before the one that starts at the same byte."""
    return info.start, info.end


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def is_text(name: str) -> bool:
    """JSON can spell half a character, which no output could show, or a line break or an escape sequence.

    Printed, these could write a line of a report that is none of ours.
    """
    return name.isprintable()


def _entry(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    valid = isinstance(entry, dict) and _is_counts(entry.get("shape")) and _is_counts(entry.get("data_offsets"))
    valid = valid and len(entry["data_offsets"]) == 2 and isinstance(entry.get("dtype"), str) and is_text(name)
    if not valid:
        raise UserError(f"{file}: corrupt header entry for tensor {name!r}: {ascii(entry)[:80]}", DAMAGED)
    if entry["dtype"] not in ITEM_BYTES:
        raise UserError(
            f"{file}: tensor {name!r} has dtype {entry['dtype'][:20]!r}, which is not read here",
            "Use a checkpoint in F32, F16 or BF16",
        )
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if end - begin != prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise UserError(
            f"{file}: tensor {name!r} claims shape {list(shape)} of {entry['dtype']} but {end - begin} bytes", DAMAGED
        )
    return TensorInfo(
        name=name, dtype=entry["dtype"], shape=shape, file=file, start=data_start + begin, end=data_start + end
    )


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    """Data must be gapless and end where the file ends: the format demands it, and it is what finds truncation."""
    expected = data_start
    for info in infos:
        if info.start != expected:
            raise UserError(f"{file}: data of tensor {info.name!r} overlaps or leaves a gap", DAMAGED)
        expected = info.end
    if expected > size:
        last = next(info.name for info in infos if info.end > size)
        raise UserError(f"{file}: truncated: {size} bytes of {expected}, tensor {last!r} is cut", DAMAGED)
    if expected < size:
        raise UserError(f"{file}: {size - expected} bytes after the last tensor that the header does not know", DAMAGED)
