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
copy of the result moves 4. Arithmetic is 15 instructions a weight, where an H100 can issue about 25 in that time.

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
        packed=weight.data.reshape(-1).view(torch.uint8),
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


@triton.jit  # type: ignore[untyped-decorator]
def _segment_scales(
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    block: tl.tensor,
    inside: tl.tensor,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
) -> tl.tensor:
    """The fp32 scale of each segment; compiled without fused multiply-add."""
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // OUTER, mask=inside, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32), mask=inside, other=0.0) * outer + tl.load(offset)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_kernel(
    packed: tl.tensor,  # uint8, or int32 where WORDS
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    code: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,  # weights
    words: tl.tensor,  # 32-bit words of packed
    columns: tl.tensor,  # weights to a row of out
    stride: tl.tensor,  # of a row of out, in units of UNIT elements
    UNIT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    OUTER: tl.constexpr,  # blocks to a nested block
    WORDS: tl.constexpr,  # packed is read by 32-bit words
    WHOLE: tl.constexpr,  # no segment runs over the end of a row
    SEG: tl.constexpr,
    SEGS: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * (SEGS * SEG)
    begin = start + tl.arange(0, SEGS) * SEG
    scale = _segment_scales(
        absmax, nested_absmax, nested_code, offset, begin // BLOCKSIZE, begin < count, NESTED, OUTER
    )
    within = tl.arange(0, SEGS * SEG)
    inside = start + within < count
    if WORDS:
        # Byte order in a word is little-endian and the high nibble comes first: weight j sits at bit 4 * (j ^ 1).
        word = start // 8 + tl.arange(0, SEGS * SEG // 8)
        bits = tl.load(packed + word, mask=word < words, other=0)
        shift = (tl.arange(0, 8) ^ 1) * 4
        nibble = tl.reshape((bits[:, None] >> shift[None, :]) & 15, (SEGS * SEG,))
    else:
        byte = tl.load(packed + (start + within) // 2, mask=inside, other=0).to(tl.int32)
        nibble = (byte >> (4 - 4 * (within % 2))) & 15
    # The code is one line of L1: a load there is one instruction, where a tree of selects is fifteen at half rate.
    weight = tl.load(code + nibble) * tl.reshape(tl.broadcast_to(scale[:, None], (SEGS, SEG)), (SEGS * SEG,))
    row = start // columns
    # One division a segment where a segment lies in one row. Subtraction, not %: the compiler then still sees that
    # neighbours stay neighbours, and stores 16 bytes at a time.
    cut: tl.constexpr = SEG if WHOLE else 1
    local = (start - row * columns).to(tl.int32) + within // cut * cut
    down = local // columns
    target = (row + down) * (stride * UNIT) + (local - down * columns + within % cut)
    tl.store(out + target, weight.to(out.dtype.element_ty), mask=inside)


def _launch(q: Quantised, out: torch.Tensor) -> None:
    count = q.shape[0] * q.shape[1]
    # A contiguous output is one long row, in which no segment can be cut.
    columns = count if out.is_contiguous() and count < 2**30 else q.shape[1]
    stride = columns if columns == count else out.stride(0)
    # Triton itself tells multiples of 16 only from others, and would store single elements into rows of K + 8.
    unit = math.gcd(16, stride)
    seg = min(SEGMENT, q.blocksize)
    words = count % SEGMENT == 0 and q.packed.data_ptr() % 4 == 0
    # 4096 weights to 128 threads: 16 bytes read and four stores of 16 bytes (bf16) a thread, 2,048 programs in flight.
    segs = max(1, 4096 // seg)
    nested = q.nested_absmax is not None
    _dequantise_kernel[(triton.cdiv(count, seg * segs),)](
        q.packed.view(torch.int32) if words else q.packed,
        q.absmax,
        q.nested_absmax if nested else q.absmax,
        q.nested_code if nested else q.absmax,
        q.offset if nested else q.absmax,
        q.code,
        out,
        count,
        count // 8,
        columns,
        stride // unit,
        UNIT=unit,
        NESTED=nested,
        BLOCKSIZE=q.blocksize,
        OUTER=q.nested_blocksize,
        WORDS=words,
        WHOLE=columns % seg == 0 or columns == count,
        SEG=seg,
        SEGS=segs,
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
