"""Dequantisation of bitsandbytes' 4-bit weights in one launch, bit for bit what bitsandbytes gives.

A weight (O, K) is cut, flattened, into blocks of `blocksize` weights; weight i of block b is

    w_i = code[nibble_i] * scale_b                        code: the 16 values of NF4 or FP4, fp32
    scale_b = absmax_b                                    plain: one fp32 a block
    scale_b = code2[absmax_b] * absmax2_c + offset        double: one byte a block, one fp32 for each nested block c

with each product and sum rounded to fp32 once, and w rounded to the output dtype once. The sum of the last line must
not be contracted into a fused multiply-add: bitsandbytes rounds the product first. The high nibble of a byte is the
earlier weight. Blocks run over the flat tensor, so a row may end inside one.

bitsandbytes launches three kernels (absmax, offset, weights) and returns a tensor of its own; here it is one, written
straight into rows of any stride, such as the first K columns of a (O, K + r) buffer that goes on as [W | B]. Weights
that stand one below the other there (q, k and v, or gate and up) come in one launch: a launch begins and ends with
multiprocessors idle. An H200 unpacks one gate of a 7B (113 MB) at 81 % of the rate of a 2 GB copy, gate and up at 87 %;
a copy of as many bytes reaches 80 and 89 %.

Cost: 0.5 bytes read a weight (and 1/blocksize for the scale) and 2 written for 16-bit outputs, so 2.5 bytes where a
copy of the result moves 4. An H200 can issue 18 instructions a weight in that time (132 multiprocessors, 1.755 GHz,
4.2 TB/s). The sm_90 code has 8.9 for contiguous 16-bit outputs and 10.9 to 11.1 for strided rows (12.1 and up to 15.9
for fp32, which has time for 32); 4.5 of them take the nibble out, look it up, multiply and round.

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3 and the format as bitsandbytes 0.50 stores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qwen2tool.kernels.backend import FLOATS, require, runs_triton

SEGMENT = 64
"""Weights that share one scale load: every block size but 32 is a multiple of it."""
SIZE = 4096
"""Weights to a program of 128 threads: 16 bytes read and four stores of 16 bytes (bf16) a thread. At 32 registers a
thread, 16 such programs fill a multiprocessor of Hopper."""
MOST = 3
"""Weights to a launch: q, k and v."""


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


# `units` and the like are never compiled in: 1 would become a constant, which has no type.
@triton.jit(do_not_specialize=["second", "third", "units", "inverse"])  # type: ignore[untyped-decorator]
def _dequantise_kernel(
    packed: tl.tensor,  # uint8, or int32 where WORDS
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    code: tl.tensor,
    packed_2: tl.tensor,  # the same of the weight behind it
    absmax_2: tl.tensor,
    nested_absmax_2: tl.tensor,
    nested_code_2: tl.tensor,
    offset_2: tl.tensor,
    code_2: tl.tensor,
    packed_3: tl.tensor,
    absmax_3: tl.tensor,
    nested_absmax_3: tl.tensor,
    nested_code_3: tl.tensor,
    offset_3: tl.tensor,
    code_3: tl.tensor,
    second: tl.tensor,  # the first program of the second weight
    third: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,  # numbers in all of them
    gap: tl.tensor,  # elements between two rows of out, in units of UNIT
    units: tl.tensor,  # pieces of CUT weights to a row
    inverse: tl.tensor,  # 2**30 / units, rounded up; not read where LONG
    WEIGHTS: tl.constexpr,
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
    own = tl.program_id(0)
    if WEIGHTS > 2 and own >= third:
        packed, absmax, code = packed_3, absmax_3, code_3
        nested_absmax, nested_code, offset = nested_absmax_3, nested_code_3, offset_3
        own -= third
    elif WEIGHTS > 1 and own >= second:
        packed, absmax, code = packed_2, absmax_2, code_2
        nested_absmax, nested_code, offset = nested_absmax_2, nested_code_2, offset_2
        own -= second
    # Bases in 64 bits once a program, the rest in 32: a thread then adds its own offset to few addresses.
    first = tl.program_id(0).to(tl.int64) * size
    start = own.to(tl.int64) * size
    left = tl.minimum(count - first, size).to(tl.int32)
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
    target = out + first + here
    if not FLAT:
        # Weight i of row r lands at i + r * gap. Each piece of CUT weights lies in one row.
        unit = (tl.program_id(0) * pieces).to(tl.uint32)
        row = unit // units.to(tl.uint32)
        local = (unit - row * units.to(tl.uint32)).to(tl.int32) + tl.arange(0, pieces)
        # local // units: 0 or 1 in long rows, else by the inverse, exact where local * units < 2**30.
        down = (local >= units).to(tl.int64) if LONG else (local.to(tl.int64) * inverse) >> 30
        target += row.to(tl.int64) * (gap * UNIT) + down[:, None] * (gap * UNIT)
    tl.store(target, tl.reshape(weight, (pieces, CUT)).to(out.dtype.element_ty), mask=inside)


def _operands(q: Quantised, words: bool) -> tuple[torch.Tensor, ...]:
    """The kernel's tensors of one weight; those that plain scales have not are not read."""
    packed = q.packed.view(torch.int32) if words else q.packed
    if q.nested_absmax is None or q.nested_code is None or q.offset is None:
        return packed, q.absmax, q.absmax, q.absmax, q.absmax, q.code
    return packed, q.absmax, q.nested_absmax, q.nested_code, q.offset, q.code


def _launch(weights: Sequence[Quantised], out: torch.Tensor) -> None:
    columns, q = out.shape[1], weights[0]
    count = out.shape[0] * columns
    seg = min(SEGMENT, q.blocksize)
    flat = out.is_contiguous()
    gap = 0 if flat else out.stride(0) - columns
    # Triton itself tells multiples of 16 only from others, and would store single elements into rows of K + 8.
    unit = math.gcd(16, gap)
    cut = seg if flat else math.gcd(seg, columns)
    units = 1 if flat else columns // cut
    words = count % SEGMENT == 0 and all(weight.packed.data_ptr() % 4 == 0 for weight in weights)
    begins = list(accumulate((weight.shape[0] * columns // SIZE for weight in weights), initial=0))
    filled = [*weights, q, q][:MOST]  # what is not there is not read
    _dequantise_kernel[(triton.cdiv(count, SIZE),)](
        *(operand for weight in filled for operand in _operands(weight, words)),
        begins[1],
        begins[min(2, len(weights))],
        out,
        count,
        gap // unit,
        units,
        triton.cdiv(2**30, units),
        WEIGHTS=len(weights),
        UNIT=unit,
        NESTED=q.nested_absmax is not None,
        BLOCKSIZE=q.blocksize,
        OUTER=q.nested_blocksize,
        WORDS=words,
        FLAT=flat,
        CUT=cut,
        LONG=columns >= SIZE,
        SEG=seg,
        SEGS=SIZE // seg,
        num_warps=4,
        enable_fp_fusion=False,  # code2 * absmax2 + offset is two roundings
    )


def _in_one_launch(weights: Sequence[Quantised]) -> bool:
    """Whether the kernel takes `weights` at once: of one format, each but the last ending where a program does."""
    formats = {(q.blocksize, q.nested_blocksize, q.nested_absmax is None) for q in weights}
    whole = all(q.shape[0] * q.shape[1] % SIZE == 0 for q in weights[:-1])
    return len(weights) <= MOST and len(formats) == 1 and whole


def dequantise(
    q: Quantised | Sequence[Quantised], dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Writes the weight into `out`, or into a new tensor, and returns it.

    Args:
        q: the weight, from `from_bnb`, or several (O_p, K), of which each goes below the one before.
        dtype: bf16, fp16 or fp32.
        out: (O, K) of `dtype`, O the sum of O_p; its rows may be any distance apart.

    Raises:
        ValueError: if `dtype` is not a float dtype of the kernels, or `out` or the weights do not fit.
    """
    weights = [q] if isinstance(q, Quantised) else list(q)
    require(dtype in FLOATS, "dequantise", f"dtype is {dtype}; the kernel writes bf16, fp16 and fp32")
    columns = {weight.shape[1] for weight in weights}
    require(len(columns) == 1, "dequantise", f"weights of {sorted(columns)} columns have no rows in common")
    shape = (sum(weight.shape[0] for weight in weights), *columns)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weights[0].packed.device)
    require(out.shape == shape, "dequantise", f"out is {tuple(out.shape)}; the weight is {shape}")
    require(out.dtype == dtype, "dequantise", f"out is {out.dtype}, not {dtype}")
    contiguous_rows = out.stride(1) == 1 or out.shape[1] <= 1
    require(contiguous_rows, "dequantise", f"out has strides {out.stride()}; its last dimension must be contiguous")
    together = runs_triton(weights[0].packed) and _in_one_launch(weights)
    row = 0
    for some in [weights] if together else [[weight] for weight in weights]:
        rows = sum(weight.shape[0] for weight in some)
        target = out[row : row + rows]
        row += rows
        if not runs_triton(some[0].packed):
            target.copy_(dequantise_reference(some[0], dtype))
        elif target.numel():
            _launch(some, target)
    return out
