"""Tensor data on demand: one tensor in memory at a time, or raw bytes from file to file.

Peak memory of everything built on this is its largest tensor, not its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import torch

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.errors import UserError

TORCH_DTYPE = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
CHUNK_BYTES = 1 << 24


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor at `info` on the CPU, in its own dtype and shape, in memory of its own.

    Raises:
        UserError: a dtype that torch does not have, or a file that ends early.
    """
    if info.dtype not in TORCH_DTYPE:
        raise UserError(
            f"{info.file}: tensor {info.name} has dtype {info.dtype}, which torch cannot hold",
            "Convert it to F32, F16 or BF16",
        )
    if info.numel == 0:
        return torch.empty(info.shape, dtype=TORCH_DTYPE[info.dtype])
    data = bytearray(info.nbytes)
    with info.file.open("rb") as handle:
        handle.seek(info.start)
        if handle.readinto(data) != info.nbytes:
            raise UserError(f"{info.file}: ends inside tensor {info.name}", "Copy the file again: it is damaged")
    return torch.frombuffer(data, dtype=TORCH_DTYPE[info.dtype]).view(info.shape)


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


def write_tensor(tensor: torch.Tensor, handle: BinaryIO) -> None:
    """The bytes of `tensor` (any device and strides) as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    if flat.numel():
        handle.write(flat.view(torch.uint8).numpy().data)


def copy_tensor(info: TensorInfo, handle: BinaryIO) -> None:
    """The bytes of `info` to `handle`, never through a tensor."""
    for piece in raw_chunks(info):
        handle.write(piece)
