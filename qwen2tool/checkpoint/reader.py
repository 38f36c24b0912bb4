"""Tensor data on demand: one tensor in memory at a time, or raw bytes from file to file.

Peak memory of everything built on this is its largest tensor, not its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import BinaryIO

import torch

from qwen2tool.checkpoint.header import ITEM_BYTES, TensorInfo
from qwen2tool.errors import UserError

TORCH_DTYPE = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
COMPARED_BYTES = 1 << 20
MIN_ROWS = 64


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


def row_slices(shape: tuple[int, ...], max_elements: int) -> list[slice]:
    """A matrix's rows as consecutive blocks of about equal height and at most `max_elements` numbers each.

    No block has fewer than `MIN_ROWS` rows, whatever its size: BLAS sums in another order for a handful of rows, and
    the product of a block would no longer be the block of the product. A tensor of another rank is one block.
    """
    if len(shape) != 2 or 0 in shape:
        return [slice(None)]
    height, width = shape
    count = max(1, min(-(-height * width // max_elements), height // MIN_ROWS))
    return [slice(height * block // count, height * (block + 1) // count) for block in range(count)]


def row_blocks(info: TensorInfo, max_elements: int) -> Iterator[tuple[slice, TensorInfo]]:
    """`row_slices` of a stored matrix with a `TensorInfo` of just those rows, to be worked on one after the other."""
    for rows in row_slices(info.shape, max_elements):
        yield rows, rows_of(info, rows)


def rows_of(info: TensorInfo, rows: slice) -> TensorInfo:
    """Just those rows of a stored tensor."""
    if rows == slice(None):
        return info
    row_bytes = prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
    shape = (rows.stop - rows.start, *info.shape[1:])
    return replace(info, shape=shape, start=info.start + rows.start * row_bytes, end=info.start + rows.stop * row_bytes)


def same_data(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of a file are equal byte for byte, in dtype and shape too.

    Reads up to the first difference, the two files at the same time, in pieces that stay in a core's cache. A file that
    ends inside its tensor equals nothing: whoever reads the tensor then complains about it.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left = one.nbytes
    here, there = bytearray(min(COMPARED_BYTES, left)), bytearray(min(COMPARED_BYTES, left))
    with (
        one.file.open("rb", buffering=0) as mine,
        other.file.open("rb", buffering=0) as theirs,
        ThreadPoolExecutor(1) as beside,
    ):
        mine.seek(one.start)
        theirs.seek(other.start)
        while left:
            if left < len(here):
                here, there = bytearray(left), bytearray(left)
            reading = beside.submit(theirs.readinto, there)
            if mine.readinto(here) != len(here) or reading.result() != len(here) or here != there:
                return False
            left -= len(here)
    return True


def write_tensor(tensor: torch.Tensor, handle: BinaryIO) -> None:
    """The bytes of `tensor` (any device and strides) as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    if flat.numel():
        handle.write(flat.view(torch.uint8).numpy().data)
