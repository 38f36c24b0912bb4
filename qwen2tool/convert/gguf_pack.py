"""The bytes of one tensor in a GGUF file: copied, cast, or rounded to Q8_0, a few rows at a time.

Q8_0 is llama.cpp's reference rounding, bit for bit what the `gguf` package computes, at three times its speed: a block
of 32 numbers x is one scale d = max|x| / 127, stored in fp16, and round(x / d) as int8, halves away from zero, where
1 / d is taken of the fp32 scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, BinaryIO

from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, read_blocks
from qwen2tool.convert.store import HashingFile, copy_stored
from qwen2tool.errors import UserError

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 18
"""Numbers that are converted at a time: 1 MB of fp32, which stays in the cache of a core."""
Q8_BLOCK, Q8_BYTES = 32, 34
LARGEST_FP16 = 65504.0
BELOW_HALF = 0.5 - 2**-25
"""The largest fp32 number below a half: adding it and cutting off rounds halves away from zero, and 0.49999997 to 0."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One tensor to be written: under GGUF's name, as block type `kind` ("F32", "Q8_0")."""

    name: str
    kind: str
    tensor: AnyTensor

    @property
    def nbytes(self) -> int:
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return prod(self.tensor.shape) // block * block_bytes


def write_data(planned: Planned, handle: BinaryIO | HashingFile) -> None:
    """The bytes of one tensor, converted a few rows at a time."""
    tensor = planned.tensor
    if isinstance(tensor, TensorInfo) and tensor.dtype == planned.kind:
        copy_stored(tensor, handle)
        return
    for rows in read_blocks(tensor, BLOCK_ELEMENTS):
        _write_rows(planned, rows, handle)


def _write_rows(planned: Planned, rows: torch.Tensor, handle: BinaryIO | HashingFile) -> None:
    import torch

    if planned.kind == "Q8_0":
        packed = _q8_0(planned, rows.float())
    else:
        if planned.kind == "F16" and rows.dtype != torch.float16:
            _require_fp16(planned, rows)
        packed = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[planned.kind])
    handle.write(packed.contiguous().view(-1).view(torch.uint8).numpy().data)


def _require_fp16(planned: Planned, rows: torch.Tensor) -> None:
    """fp16 rounds everything from 65520 up to infinity."""
    largest = float(rows.abs().max())
    if largest >= LARGEST_FP16 + 16:
        raise UserError(
            f"{planned.tensor.name}: holds {largest:g}, which fp16 (largest number {LARGEST_FP16:g}) cannot hold",
            "Write bf16, q8_0 or f32 instead",
        )


def _q8_0(planned: Planned, rows: torch.Tensor) -> torch.Tensor:
    """fp32 rows as blocks of 34 bytes, uint8."""
    largest = float(rows.abs().max())
    if not largest < LARGEST_FP16 * 127:
        raise UserError(
            f"{planned.tensor.name}: holds {largest:g}, for which Q8_0 has no scale",
            "Write bf16 or f32 instead; a checkpoint with NaN or infinity is damaged",
        )
    return pack_q8_0(rows)


def pack_q8_0(rows: torch.Tensor) -> torch.Tensor:
    """fp32 (..., 32 n) -> uint8 (blocks, 34): the fp16 scale of each 32 numbers, then their int8."""
    import torch

    blocks = rows.reshape(-1, Q8_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).div_(127)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    if not bool(inverse.isfinite().all()):  # a scale below 2^-128: what infinity is as int8, the package decides
        return _packed_by_gguf(blocks)
    scaled = blocks * inverse
    scaled += torch.copysign(torch.tensor(BELOW_HALF), scaled)
    packed = torch.empty(len(blocks), Q8_BYTES, dtype=torch.uint8)
    packed[:, :2] = scales.half().view(torch.uint8)
    packed[:, 2:] = scaled.to(torch.int8).view(torch.uint8)
    return packed


def _packed_by_gguf(blocks: torch.Tensor) -> torch.Tensor:
    import gguf
    import numpy as np
    import torch

    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.quantize(blocks.numpy(), gguf.GGMLQuantizationType.Q8_0))


def unpack_q8_0(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 34 n), blocks of an fp16 scale and 32 int8 -> fp32 (blocks, 32): their products."""
    import torch

    blocks = packed.reshape(-1, Q8_BYTES)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].view(torch.int8).float().mul_(scales)
