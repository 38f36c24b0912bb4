"""The header of a GGUF file, checked against the file it describes; no torch, no tensor data.

Layout (the public GGUF specification, versions 2 and 3, little-endian): magic, version, number of tensors, number of
metadata entries; the entries (name, type, value); a line a tensor (name, dimensions innermost first, type, offset);
then the data, each tensor on a multiple of `general.alignment`, in blocks that quantise 32 or 256 numbers of a row.

The `gguf` package's own reader makes two arrays of numpy for every element of every list: 5 s and 300 MB for a
vocabulary of 151,936, and a traceback or endless loop on a damaged count. Here the file is mapped, each length is
compared with what is left of the file before it is used, and a list is stepped over, to be decoded when asked for.
That takes 0.1 s for the same file. The sizes of the block types are that package's.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qwen2tool.checkpoint.header import DAMAGED, MAX_HEADER_BYTES, TensorInfo, refuse_other_downloads
from qwen2tool.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type code of a metadata value -> its struct format."""
STRING, ARRAY = 8, 9
ALIGNMENT = 32
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 1 << 16, 1 << 18, 1 << 22
"""Beyond any model; a larger number is a damaged file, and walking up to it would take minutes."""
MOST_NAME = 1 << 16
MOST_ALIGNMENT = 1 << 24
LEAST_KEY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that an entry takes at least."""


@dataclass(frozen=True, kw_only=True)
class GgufArray:
    """A list in the metadata that was stepped over: `count` elements of type `kind`, bytes [start, end) of `file`."""

    file: Path
    key: str
    kind: int
    count: int
    start: int
    end: int

    def values(self) -> list[str] | list[int] | list[float]:
        """The elements, decoded.

        Raises:
            UserError: the file ends early, or a string is no UTF-8.
        """
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            data = handle.read(self.end - self.start)
        if len(data) != self.end - self.start:
            raise UserError(f"{self.file}: ends inside {self.key}", DAMAGED)
        if self.kind != STRING:
            return list(struct.unpack(f"<{self.count}{SCALARS[self.kind]}", data))
        try:
            return _strings(data, self.count)
        except (UnicodeDecodeError, struct.error):
            raise UserError(f"{self.file}: {self.key} holds text that is no UTF-8", DAMAGED) from None


Value = int | float | str | GgufArray
"""A bool is an int here, as in Python."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """One file: its metadata, and its tensors in the order of their data.

    A `TensorInfo` here has GGUF's name for the tensor, the name of its block type ("Q4_K") as dtype, and its shape
    row-major, as torch counts: (out_features, in_features) for a linear.
    """

    file: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    damaged: dict[str, str]
    """Keys whose text is none, and are not in `metadata`: why, and what to do."""


def read_gguf_header(file: Path) -> GgufHeader:
    """Reads and checks the header of `file`.

    Raises:
        UserError: no GGUF, a version or byte order that is not read, or a header that the file does not bear out.
    """
    with _mapped(file) as data:
        refuse_other_downloads(file, data[:16])
        cursor = _Cursor(file, data)
        if cursor.take(4) != MAGIC:
            raise UserError(f"{file}: no GGUF file (it does not begin with GGUF)", DAMAGED)
        _check_version(file, cursor.number("I"))
        tensor_count = cursor.count(LEAST_TENSOR, MOST_TENSORS, "tensors", "Q")
        key_count = cursor.count(LEAST_KEY, MOST_KEYS, "metadata entries", "Q")
        metadata: dict[str, Value] = {}
        damaged: dict[str, str] = {}
        for _ in range(key_count):
            key = cursor.text(MOST_NAME, "a metadata key")
            if key in metadata or key in damaged:
                raise UserError(f"{file}: metadata key {ascii(key)[:80]} is there twice", DAMAGED)
            try:
                metadata[key] = _value(cursor, key)
            except UnicodeDecodeError as error:  # its length is known, so what follows can be read all the same
                damaged[key] = f"not UTF-8 text (byte {error.start}); get the file again: it is damaged"
        alignment = _alignment(file, metadata)
        entries = [_entry(cursor) for _ in range(tensor_count)]
        start = _padded(cursor.position, alignment)
        infos = [_placed(file, *entry, data_start=start) for entry in entries]
    _check_layout(file, infos, start, alignment)
    tensors = {info.name: info for info in sorted(infos, key=lambda info: info.start)}
    if len(tensors) != len(infos):
        raise UserError(f"{file}: holds two tensors of one name", DAMAGED)
    return GgufHeader(file=file, metadata=metadata, tensors=tensors, damaged=damaged)


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as handle:
        try:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError):  # an empty file, or a folder
            raise UserError(f"{file}: no GGUF file (it is empty)", DAMAGED) from None
        with data:
            yield data


class _Cursor:
    """A position in a mapped file that never passes its end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position, self.size = file, data, 0, len(data)

    def take(self, count: int) -> bytes:
        self.require(count)
        self.position += count
        return self.data[self.position - count : self.position]

    def require(self, count: int) -> None:
        if count > self.size - self.position:
            raise UserError(f"{self.file}: ends inside its header, which claims {count} bytes more", DAMAGED)

    def number(self, code: str) -> int:
        layout = struct.Struct(f"<{code}")
        return int(layout.unpack(self.take(layout.size))[0])

    def count(self, least: int, most: int, what: str, code: str) -> int:
        """A number of things of at least `least` bytes each, all of which the rest of the file has room for."""
        value = self.number(code)
        if value > most or value * least > self.size - self.position:
            raise UserError(f"{self.file}: claims {value} {what} in a file of {self.size} bytes", DAMAGED)
        return value

    def text(self, most: int, what: str) -> str:
        """Of a name, which has to be text."""
        try:
            return self.value(most, what)
        except UnicodeDecodeError:
            raise UserError(f"{self.file}: {what} is no UTF-8 text", DAMAGED) from None

    def value(self, most: int, what: str) -> str:
        """Of a metadata entry; where it is no text (UnicodeDecodeError), the position is behind it all the same."""
        length = self.number("Q")
        if length > most:
            raise UserError(f"{self.file}: {what} claims {length} bytes", DAMAGED)
        return self.take(length).decode("utf-8")


def _check_version(file: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if version == 1:
        raise UserError(f"{file}: GGUF version 1, which no current tool reads", "Make the file again from its model")
    if version and version & 0xFFFF == 0:
        raise UserError(f"{file}: a big-endian GGUF file", "Make it again for little-endian machines")
    raise UserError(f"{file}: GGUF version {version}, read here are 2 and 3", "Update qwen2tool, or get the file again")


def _value(cursor: _Cursor, key: str) -> Value:
    what = f"metadata {ascii(key)[:80]}"
    kind = cursor.number("I")
    if kind == STRING:
        return cursor.value(MAX_HEADER_BYTES, what)
    if kind == ARRAY:
        return _array(cursor, key, what)
    if kind not in SCALARS:
        raise UserError(f"{cursor.file}: {what} has type {kind}, which GGUF does not define", DAMAGED)
    layout = struct.Struct(f"<{SCALARS[kind]}")
    value: int | float = layout.unpack(cursor.take(layout.size))[0]
    return value


def _array(cursor: _Cursor, key: str, what: str) -> GgufArray:
    kind = cursor.number("I")
    if kind not in SCALARS and kind != STRING:
        raise UserError(f"{cursor.file}: {what} is a list of type {kind}, which is not read here", DAMAGED)
    least = 8 if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")
    count = cursor.count(least, MOST_ITEMS, f"elements of {what}", "Q")
    start = cursor.position
    if kind == STRING:
        cursor.position = _after_strings(cursor, count, what)
    else:
        cursor.position += count * least
    return GgufArray(file=cursor.file, key=key, kind=kind, count=count, start=start, end=cursor.position)


def _after_strings(cursor: _Cursor, count: int, what: str) -> int:
    """Where `count` strings end."""
    read, data, position, last = struct.Struct("<Q").unpack_from, cursor.data, cursor.position, cursor.size - 8
    for _ in range(count):
        if position > last:
            position = cursor.size + 1
            break
        position += 8 + read(data, position)[0]
    if position > cursor.size:
        raise UserError(f"{cursor.file}: ends inside {what}", DAMAGED)
    return position


def _strings(data: bytes, count: int) -> list[str]:
    read, position, found = struct.Struct("<Q").unpack_from, 0, []
    for _ in range(count):
        end = position + 8 + read(data, position)[0]
        found.append(data[position + 8 : end].decode("utf-8"))
        position = end
    return found


def _alignment(file: Path, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 1 <= value <= MOST_ALIGNMENT or value & (value - 1):
        raise UserError(f"{file}: general.alignment is {ascii(value)[:40]}, not a power of two", DAMAGED)
    return value


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, row-major shape, type code, offset) of a tensor."""
    name = cursor.text(MOST_NAME, "a tensor's name")
    rank = cursor.number("I")
    if not 1 <= rank <= 4:
        raise UserError(f"{cursor.file}: tensor {ascii(name)[:80]} claims {rank} dimensions", DAMAGED)
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _placed(file: Path, name: str, shape: tuple[int, ...], code: int, offset: int, *, data_start: int) -> TensorInfo:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    what = f"{file}: tensor {ascii(name)[:80]}"
    try:
        kind = GGMLQuantizationType(code)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UserError(
            f"{what} has type {code}, which the installed gguf package does not know",
            "Update the gguf package (pip install -U gguf); if that does not help, the file is damaged",
        ) from None
    if not all(0 < size < 2**63 for size in shape) or prod(shape) >= 2**63 or shape[-1] % block:
        raise UserError(f"{what} claims shape {list(shape)} in blocks of {block}", DAMAGED)
    start = data_start + offset
    return TensorInfo(
        name=name, dtype=kind.name, shape=shape, file=file, start=start, end=start + prod(shape) // block * block_bytes
    )


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, alignment: int) -> None:
    """Tensors follow each other, each on the next multiple of the alignment, and the last ends where the file does."""
    size, expected = file.stat().st_size, data_start
    for info in sorted(infos, key=lambda info: info.start):
        if info.start != expected:
            raise UserError(f"{file}: data of tensor {ascii(info.name)[:80]} overlaps or leaves a gap", DAMAGED)
        if info.end > size:
            raise UserError(
                f"{file}: truncated: {size} bytes, but tensor {ascii(info.name)[:80]} ends at {info.end}", DAMAGED
            )
        expected = _padded(info.end, alignment)
    if size > expected:
        raise UserError(f"{file}: {size - expected} bytes after the last tensor that the header does not know", DAMAGED)
