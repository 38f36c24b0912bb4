"""The bytes of a tensor as they lie in its file, never as numbers: without torch, which takes a second to import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.errors import UserError

CHUNK_BYTES = 1 << 24
PLACES, PLACE_BYTES = 100, 4096


def raw_chunks(info: TensorInfo, limit: int | None = None) -> Iterator[bytes]:
    """The bytes of a tensor as they lie in the file, in pieces of 16 MB; only the first `limit` bytes where given."""
    left = info.nbytes if limit is None else min(limit, info.nbytes)
    with info.file.open("rb") as handle:
        handle.seek(info.start)
        while left:
            piece = handle.read(min(left, CHUNK_BYTES))
            if not piece:
                raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")
            left -= len(piece)
            yield piece


def differ_somewhere(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors differ in shape, dtype or any of a hundred places, the first and the last bytes among them.

    What was trained or rounded apart differs nearly everywhere, and shows in a millisecond; that two are equal, only
    reading them whole would show.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    last = max(0, one.nbytes - PLACE_BYTES)
    with one.file.open("rb") as mine, other.file.open("rb") as theirs:
        for place in range(PLACES):
            offset = last * place // (PLACES - 1)
            mine.seek(one.start + offset)
            theirs.seek(other.start + offset)
            size = min(PLACE_BYTES, one.nbytes - offset)
            if mine.read(size) != theirs.read(size):
                return True
    return False


def copy_tensor(info: TensorInfo, handle: BinaryIO) -> None:
    """The bytes of `info` to `handle`, never through a tensor."""
    for piece in raw_chunks(info):
        handle.write(piece)
