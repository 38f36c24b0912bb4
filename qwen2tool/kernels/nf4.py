"""Dequantisation of bitsandbytes' 4-bit weights in one launch, bit for bit what bitsandbytes gives.

A weight (O, K) is cut, flattened, into blocks of `blocksize` weights; weight i of block b is

    w_i = code[nibble_i] * scale_b                        code: the 16 values of NF4 or FP4, fp32
    scale_b = absmax_b                                    plain: one fp32 a block
    scale_b = code2[absmax_b] * absmax2_c + offset        double: one byte a block, one fp32 for each nested block c

with each product and sum rounded to fp32 once, and w rounded to the output dtype once. The sum of the last line must
not be contracted into a fused multiply-add: bitsandbytes rounds the product first. The high nibble of a byte is the
earlier weight. Blocks run over the flat tensor, so a row may end inside one.

bitsandbytes launches three kernels (absmax, offset, weights) and returns a tensor of its own; here it is one, written
straight into rows of any stride, such as the first K columns of a (O, K + r) buffer that goes on as [W | B].

Cost: 0.5 bytes read a weight (and 1/blocksize for the scale) and 2 written for 16-bit outputs, so 2.5 bytes where a
copy of the result moves 4. An H200 can issue 18 instructions a weight in that time (132 multiprocessors, 1.755 GHz,
4.2 TB/s). The sm_90 code has 8.9 for contiguous 16-bit outputs and 10.9 to 11.1 for strided rows (12.1 and up to 15.9
for fp32, which has time for 32); 4.5 of them take the nibble out, look it up, multiply and round.

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3 and the format as bitsandbytes 0.50 stores it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qwen2tool.kernels.backend import FLOATS, require, runs_triton

SEGMENT = 64
"""Weights that share one scale load: every block size but 32 is a multiple of it."""


class Quantised(NamedTuple):
    """A 4-bit weight as plain tensors; the field order is the kernel's."""

    packed: torch.Tensor
    """(ceil(O*K / 2),) uint8, two weights a byte, the earlier one in the high nibble."""
    absmax: torch.Tensor
    """(ceil(O*K / blocksize),) fp32, or uint8 where the scales are quantised too."""
    code: torch.Tensor
    """(16,) fp32, the value of each nibble."""
    blocksize: int
    nested_absmax: torch.Tensor | None
    """(ceil(blocks / nested_blocksize),) fp32, None for plain scales."""
    nested_code: torch.Tensor | None
    """(256,) fp32, the value of each byte of `absmax`."""
    nested_blocksize: int
    offset: torch.Tensor | None
    """() fp32, added to every scale."""
    shape: tuple[int, int]
    """(O, K)."""
    dtype: torch.dtype
    """What bitsandbytes dequantises to when not told otherwise."""


def from_bnb(weight: Any) -> Quantised:
    """The tensors inside a `bitsandbytes.nn.Params4bit` (NF4 or FP4, plain or double quantised), not copied.

    Raises:
        ValueError: if the weight is not quantised, or holds a layout that only bitsandbytes' CPU product reads.
    """
    state = getattr(weight, "quant_state", None)
    require(state is not None, "from_bnb", "weight has no quant_state: it is not quantised to 4 bits yet")
    assert state is not None
    repacked = getattr(state, "packing_format_for_cpu", False)
    require(
        not repacked, "from_bnb", "weight is repacked for bitsandbytes' CPU product; move it to another device first"
    )
    rows, columns = state.shape
    nested = state.state2
    require(nested is None or nested.dtype == torch.float32, "from_bnb", "nested scales are not fp32")
    return Quantised(
        packed=weight.detach().reshape(-1).view(torch.uint8),  # not `.data`, which forgets that it was written to
        absmax=state.absmax if nested is not None else state.absmax.float(),
        code=state.code.float(),
        blocksize=state.blocksize,
        nested_absmax=nested.absmax if nested is not None else None,
        nested_code=nested.code if nested is not None else None,
        nested_blocksize=nested.blocksize if nested is not None else 1,
        offset=state.offset if nested is not None else None,
        shape=(rows, columns),
        dtype=state.dtype,
    )


def scales(q: Quantised) -> torch.Tensor:
    """The fp32 scale of each block, (blocks,): the product rounded, then the sum."""
    if q.nested_absmax is None or q.nested_code is None or q.offset is None:
        return q.absmax
    outer = q.nested_absmax.repeat_interleave(q.nested_blocksize)[: q.absmax.numel()]
    return q.nested_code[q.absmax.long()] * outer + q.offset


def dequantise_reference(q: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """(O, K) in `dtype`, in plain PyTorch: the definition of the op."""
    count = q.shape[0] * q.shape[1]
    nibbles = torch.stack([q.packed >> 4, q.packed & 15], dim=1).reshape(-1)[:count]
    scale = scales(q).repeat_interleave(q.blocksize)[:count]
    return (q.code[nibbles.long()] * scale).view(q.shape).to(dtype)


# `units` is never compiled in: 1 would become a constant, which has no type.
@triton.jit(do_not_specialize=["units", "inverse"])  # type: ignore[untyped-decorator]
def _dequantise_kernel(
    packed: tl.tensor,  # uint8, or int32 where WORDS
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    code: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,  # weights
    gap: tl.tensor,  # elements between two rows of out, in units of UNIT
    units: tl.tensor,  # pieces of CUT weights to a row
    inverse: tl.tensor,  # 2**30 / units, rounded up; not read where LONG
    UNIT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    OUTER: tl.constexpr,  # blocks to a nested block
    WORDS: tl.constexpr,  # packed is read by 32-bit words
    FLAT: tl.constexpr,  # out is contiguous
    CUT: tl.constexpr,  # rows end at multiples of it only; divides SEG
    LONG: tl.constexpr,  # a row holds as many weights as a program writes, or more
    SEG: tl.constexpr,
    SEGS: tl.constexpr,
) -> None:
    size: tl.constexpr = SEG * SEGS
    pieces: tl.constexpr = size // CUT
    # Bases in 64 bits once a program, the rest in 32: a thread then adds its own offset to few addresses.
    start = tl.program_id(0).to(tl.int64) * size
    left = tl.minimum(count - start, size).to(tl.int32)
    here = tl.arange(0, pieces)[:, None] * CUT + tl.arange(0, CUT)[None, :]
    inside = here < left
    # All loads that wait for nothing come before the first that does.
    at = tl.arange(0, SEGS) * SEG
    held = at < left
    block = start // BLOCKSIZE
    scale = tl.load(absmax + block + at // BLOCKSIZE, mask=held)
    if NESTED:
        shift = tl.load(offset)
        if BLOCKSIZE * OUTER % size == 0:
            outer = tl.load(nested_absmax + block // OUTER)
        else:
            outer = tl.load(nested_absmax + (block + at // BLOCKSIZE) // OUTER, mask=held)
    table = tl.load(code + tl.arange(0, 16))
    if WORDS:
        # Byte order in a word is little-endian and the high nibble comes first: weight j sits at bit 4 * (j ^ 1).
        # The bound is whole segments, as then the compiler sees that 16 bytes are inside together.
        word = tl.arange(0, size // 8)
        bits = tl.load(packed + start // 8 + word, mask=word < left // SEG * (SEG // 8))
        nibble = tl.reshape((bits[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15, (size,))
    else:
        byte = tl.load(packed + start // 2 + here // 2, mask=inside).to(tl.int32)
        nibble = tl.reshape((byte >> (4 - 4 * (here % 2))) & 15, (size,))
    if NESTED:
        scale = tl.load(nested_code + scale.to(tl.int32), mask=held) * outer + shift
    # The gather reads shared memory: an address of 32 bits, and 16 values in 16 banks.
    weight = tl.reshape(tl.gather(table, nibble, 0), (SEGS, SEG)) * scale[:, None]
    target = out + start + here
    if not FLAT:
        # Weight i of row r lands at i + r * gap. Each piece of CUT weights lies in one row.
        unit = (tl.program_id(0) * pieces).to(tl.uint32)
        row = unit // units.to(tl.uint32)
        local = (unit - row * units.to(tl.uint32)).to(tl.int32) + tl.arange(0, pieces)
        # local // units: 0 or 1 in long rows, else by the inverse, exact where local * units < 2**30.
        down = (local >= units).to(tl.int64) if LONG else (local.to(tl.int64) * inverse) >> 30
        target += row.to(tl.int64) * (gap * UNIT) + down[:, None] * (gap * UNIT)
    tl.store(target, tl.reshape(weight, (pieces, CUT)).to(out.dtype.element_ty), mask=inside)


def _launch(q: Quantised, out: torch.Tensor) -> None:
    rows, columns = q.shape
    count = rows * columns
    seg = min(SEGMENT, q.blocksize)
    # 4096 weights to 128 threads: 16 bytes read and four stores of 16 bytes (bf16) a thread. At 32 registers a thread,
    # 16 such programs fill a multiprocessor of Hopper.
    size = max(seg, 4096)
    flat = out.is_contiguous()
    gap = 0 if flat else out.stride(0) - columns
    # Triton itself tells multiples of 16 only from others, and would store single elements into rows of K + 8.
    unit = math.gcd(16, gap)
    cut = seg if flat else math.gcd(seg, columns)
    units = 1 if flat else columns // cut
    words = count % SEGMENT == 0 and q.packed.data_ptr() % 4 == 0
    nested = q.nested_absmax is not None
    _dequantise_kernel[(triton.cdiv(count, size),)](
        q.packed.view(torch.int32) if words else q.packed,
        q.absmax,
        q.nested_absmax if nested else q.absmax,
        q.nested_code if nested else q.absmax,
        q.offset if nested else q.absmax,
        q.code,
        out,
        count,
        gap // unit,
        units,
        triton.cdiv(2**30, units),
        UNIT=unit,
        NESTED=nested,
        BLOCKSIZE=q.blocksize,
        OUTER=q.nested_blocksize,
        WORDS=words,
        FLAT=flat,
        CUT=cut,
        LONG=columns >= size,
        SEG=seg,
        SEGS=size // seg,
        num_warps=4,
        enable_fp_fusion=False,  # code2 * absmax2 + offset is two roundings
    )


def dequantise(q: Quantised, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Writes the weight into `out`, or into a new tensor, and returns it.

    Args:
        q: the weight, from `from_bnb`.
        dtype: bf16, fp16 or fp32.
        out: (O, K) of `dtype`; its rows may be any distance apart.

    Raises:
        ValueError: if `dtype` is not a float dtype of the kernels, or `out` does not fit.
    """
    require(dtype in FLOATS, "dequantise", f"dtype is {dtype}; the kernel writes bf16, fp16 and fp32")
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    require(out.shape == q.shape, "dequantise", f"out is {tuple(out.shape)}; the weight is {q.shape}")
    require(out.dtype == dtype, "dequantise", f"out is {out.dtype}, not {dtype}")
    contiguous_rows = out.stride(1) == 1 or out.shape[1] <= 1
    require(contiguous_rows, "dequantise", f"out has strides {out.stride()}; its last dimension must be contiguous")
    if not runs_triton(q.packed):
        out.copy_(dequantise_reference(q, dtype))
    elif out.numel():
        _launch(q, out)
    return out
