"""4-bit and 8-bit weights as bitsandbytes stores them: their numbers, and how numbers become them.

A weight is cut, flattened, into blocks of `blocksize`; weight i of block b is

    w_i = code[nibble_i] * scale_b            code: the 16 values of NF4 or FP4; the high nibble is the earlier weight
    scale_b = absmax_b                        plain: one fp32 a block
    scale_b = code2[absmax_b] * absmax2_c + offset      double: one byte a block, one fp32 for 256 blocks

with each product and sum rounded to fp32 once and w rounded to its dtype once; int8 is w = q * row_max / 127. Reading
is plain torch here: bitsandbytes 0.50's AVX-512 code takes scales of other blocks where rows are no whole blocks (a
hidden size of 896 in blocks of 256), and trusts every length. Otherwise the result is bitsandbytes' own, bit for bit.
Quantising calls bitsandbytes, block by block: which of two codes a weight between them gets is its to say.

Cost: on one core about 1 GB/s of 16-bit numbers read, 0.07 GB/s quantised; memory of the result, plus 40 MB.
Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), appendix E; the format as bitsandbytes 0.50 stores it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
CHUNK = 1 << 20
"""Weights worked on at once: a whole number of blocks of every size."""
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
OFFSET_TEXT = 24
"""Characters that the longest fp32 takes in JSON."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight of `shape` is packed: what stands in its quant_state.

    `dtype` (torch's name) is that of the numbers; `double` says that the scales are quantised too.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    double: bool
    nested_blocksize: int = NESTED_BLOCK

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        return -(-self.blocks // self.nested_blocksize)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def state(self, offset: float | None) -> bytes:
        """The JSON of the quant_state, in bitsandbytes' keys and order.

        With double quantisation it holds the offset, which is known only when the weight has been read, while
        safetensors wants all lengths first: blanks behind it make its length the same for every offset.
        """
        fields = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if not self.double:
            return json.dumps(fields).encode()
        nested = {"nested_blocksize": self.nested_blocksize, "nested_dtype": "float32", "nested_offset": offset}
        blanks = OFFSET_TEXT - len(json.dumps(offset))
        return (json.dumps(fields | nested) + " " * blanks).encode()


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed weight: `nibbles` (bytes,) uint8, `absmax` (blocks,), and for double quantisation the scales' own."""

    packing: Packing
    nibbles: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: float | None = None

    def scales(self) -> torch.Tensor:
        """(blocks,) fp32: the product rounded, then the sum."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax.float()
        times = min(self.packing.nested_blocksize, self.packing.blocks)
        outer = self.nested_absmax.repeat_interleave(times)[: self.packing.blocks]
        return self.nested_code[self.absmax.int()].mul_(outer).add_(torch.tensor(self.offset))


def code_of(quant_type: str) -> torch.Tensor:
    """The 16 values of a 4-bit type, fp32."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32)


def dequantise(packed: Packed) -> torch.Tensor:
    """The numbers of a packed weight, in its own shape and dtype."""
    packing, scales = packed.packing, packed.scales()
    code, blocksize = code_of(packing.quant_type), packing.blocksize
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # byte -> its two values
    out = torch.empty(packing.blocks * blocksize, dtype=packing.torch_dtype)
    for first, last in _chunks(packing.numel):
        nibbles = packed.nibbles[first // 2 : (last + 1) // 2]
        values = torch.zeros(-(-nibbles.numel() * 2 // blocksize) * blocksize)
        values[: nibbles.numel() * 2] = pairs.index_select(0, nibbles.int()).view(-1)
        blocks = slice(first // blocksize, first // blocksize + values.numel() // blocksize)
        rows = values.view(-1, blocksize).mul_(scales[blocks, None])
        out[first : first + values.numel()].view(-1, blocksize).copy_(rows)
    return out[: packing.numel].view(packing.shape).contiguous()


def dequantise_rows(weight: torch.Tensor, row_max: torch.Tensor) -> torch.Tensor:
    """LLM.int8(): (O, K) fp32 of int8 `weight` and the fp32 maximum (O,) of each row."""
    return weight.float().mul_(row_max.float()[:, None]).mul_(1 / 127)


def quantise(weight: torch.Tensor, packing: Packing) -> Packed:
    """`weight` (16- or 32-bit, CPU) packed as bitsandbytes' CPU kernels pack it.

    Blocks do not know of each other, so they are quantised a chunk at a time: bitsandbytes takes six fp32 copies.
    """
    import bitsandbytes.functional as bnb

    flat = weight.reshape(-1)
    nibbles = torch.empty((packing.numel + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(packing.blocks, dtype=torch.float32)
    for first, last in _chunks(packing.numel):
        part, state = bnb.quantize_4bit(flat[first:last], blocksize=packing.blocksize, quant_type=packing.quant_type)
        nibbles[first // 2 : (last + 1) // 2] = part.view(-1)
        start = first // packing.blocksize
        absmax[start : start + state.absmax.numel()] = state.absmax
    if not packing.double:
        return Packed(packing=packing, nibbles=nibbles, absmax=absmax)
    offset = absmax.mean()
    scales, nested = bnb.quantize_blockwise(absmax - offset, blocksize=packing.nested_blocksize)
    return Packed(
        packing=packing,
        nibbles=nibbles,
        absmax=scales,
        nested_absmax=nested.absmax,
        nested_code=nested.code,
        offset=offset.item(),
    )


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, CHUNK):
        yield first, min(first + CHUNK, count)


def as_bytes(text: bytes) -> torch.Tensor:
    """(len,) uint8, as safetensors holds a text."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def parts_of(packing: Packing) -> Sequence[tuple[str, str, tuple[int, ...]]]:
    """(suffix after the weight's name, dtype, shape) of each stored tensor, the packed weight first."""
    state = f".quant_state.bitsandbytes__{packing.quant_type}"
    plain = [
        ("", "U8", ((packing.numel + 1) // 2, 1)),
        (".absmax", "U8" if packing.double else "F32", (packing.blocks,)),
        (".quant_map", "F32", (16,)),
    ]
    nested = [(".nested_absmax", "F32", (packing.nested_blocks,)), (".nested_quant_map", "F32", (256,))]
    text = (state, "U8", (len(packing.state(0.0 if packing.double else None)),))
    return [*plain, *(nested if packing.double else []), text]


def stored(packed: Packed) -> dict[str, torch.Tensor]:
    """Suffix -> tensor, as `parts_of` announces them."""
    packing = packed.packing
    tensors = {"": packed.nibbles.view(-1, 1), ".absmax": packed.absmax, ".quant_map": code_of(packing.quant_type)}
    if packed.nested_absmax is not None and packed.nested_code is not None:
        tensors |= {".nested_absmax": packed.nested_absmax, ".nested_quant_map": packed.nested_code}
    return tensors | {f".quant_state.bitsandbytes__{packing.quant_type}": as_bytes(packing.state(packed.offset))}
