"""The three products of LoRA under dropout, on tensor cores, with the masks as bits and no dropped copy of x in memory.

With m_p = keep_p / (1 - p) for adapter p (its bits as `dropout.keep_bits` draws them), x: (N, K), A_p: (r_p, K):

    forward      t_p  = (x . m_p) A_p^T                (N, r_p)      `masked_product`
    for A        dA_p = dt_p^T (x . m_p)               (r_p, K)      `masked_grad_a`
    for x        sum_p m_p . (dt_p A_p)                (N, K)        `masked_grad_x`

bits: (P, N, ceil(K/8)) uint8; A and dA as (R, K), t and dt as (N, R), R = sum r_p, adapter after adapter. bf16, fp16 or
fp32; A and dt are rounded to the dtype of x (`out`) where theirs differs. Accumulation is in fp32, the factor 1/(1-p)
is applied to the sum, and there is one rounding at the end. Nothing is atomic: the same inputs give the same bits.

Cost: 2 N K R operations each. x is read (`out` written) once for all adapters whose padded ranks (16, 32, 64 ...; from
64 on in the forward in 16 bit) add up to 256 or less (fp32: 64), and P/8 bytes an element of masks beside its 2;
PyTorch would write and read a dropped copy of x for each of them, 8 P bytes an element. Where the rows (or columns)
give too few programs for the GPU, the contraction is cut into S parts, as many as the shape says, whose fp32 sums are
added in a fixed order by a second launch. Those S N R (S R K) numbers are written and read once more, 8 bytes each, and
are memory while the op runs: `masked_product` on N tokens of K = 4096 and three adapters of rank 64 takes 6.3 MB for N
= 512, 1024 and 2048, 12.6 MB for 4096 and 8192, none from 8449 on.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685) with dropout on the adapter's input, as PEFT has it.
"""

from __future__ import annotations

import math

import torch
import triton

from qwen2tool.kernels.backend import require, require_float, runs_triton
from qwen2tool.kernels.dropout import unpack_bits
from qwen2tool.kernels.masked_kernels import (
    Slot,
    add_parts_kernel,
    batches_of,
    grad_a_kernel,
    grad_x_kernel,
    product_kernel,
    slots_of,
)

PROCESSORS = 132
"""Multiprocessors of an H100 or H200: what a contraction is cut for, whatever GPU it runs on."""
MOST_PARTS = 32
"""Of a row's sums in `masked_product`; the second launch adds them 8 at a time."""


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _kept(x: torch.Tensor, bits: torch.Tensor, p: float) -> torch.Tensor:
    """(P, N, K): x . m_p."""
    return _wide(x) * unpack_bits(bits, x.shape[-1]) / (1 - p)


def masked_product_reference(
    x: torch.Tensor, bits: torch.Tensor, a: torch.Tensor, ranks: tuple[int, ...], p: float
) -> torch.Tensor:
    """The definition of `masked_product`, in fp32 (float64 for float64); differentiable."""
    parts = zip(_kept(x, bits, p), torch.split(_wide(a.to(x.dtype)), list(ranks)), strict=True)
    return torch.cat([kept @ part.T for kept, part in parts], dim=1).to(x.dtype)


def masked_grad_a_reference(
    dt: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float
) -> torch.Tensor:
    """The definition of `masked_grad_a`: fp32 (float64 for float64)."""
    parts = zip(_kept(x, bits, p), torch.split(_wide(dt.to(x.dtype)), list(ranks), dim=1), strict=True)
    return torch.cat([part.T @ kept for kept, part in parts])


def masked_grad_x_reference(
    dt: torch.Tensor, a: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float
) -> torch.Tensor:
    """The definition of `masked_grad_x`: (N, K), fp32 (float64 for float64)."""
    products = [
        d @ part
        for d, part in zip(torch.split(_wide(dt), list(ranks), dim=1), torch.split(_wide(a), list(ranks)), strict=True)
    ]
    return (torch.stack(products) * unpack_bits(bits, a.shape[1])).sum(0) / (1 - p)


def _limit(dtype: torch.dtype) -> int:
    """Padded ranks to a launch. 256 columns of sums are 128 registers a thread; fp32 runs on plain FMA units, whose
    operands sit in registers as well."""
    return 64 if dtype == torch.float32 else 256


def _least(dtype: torch.dtype) -> int:
    """What `masked_product` pads ranks to: they are the height of its tensor-core instructions."""
    return 16 if dtype == torch.float32 else 64


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """64 rows are the height of one warpgroup's tensor-core instruction, 64 columns of 16 bit a 128-byte line."""
    return {"BN": 32, "BK": 32} if dtype == torch.float32 else {"BN": 64, "BK": 64}


def _product_tile(dtype: torch.dtype, rows: int, columns: int) -> dict[str, int]:
    """The tile of `masked_product`, with its warps.

    Each block of rows reads all of A again: with 64 rows and three adapters of rank 64 that is 3 bytes of A to one of
    x, more than the L2 can give where all multiprocessors ask. 128 rows halve it. With few rows or columns they would
    cost more than that, as twice the parts.
    """
    if dtype == torch.float32:
        return {"BN": 32, "BK": 32, "num_warps": 4}
    tall = rows >= 4096 and columns >= 2048
    return {"BN": 128, "BK": 64, "num_warps": 8} if tall else {"BN": 64, "BK": 64, "num_warps": 4}


def _parts(programs: int, length: int, block: int, fill: int, most: int) -> tuple[int, int]:
    """How many parts a contraction over `length` is cut into, and how many blocks each has: at most `most` parts, of at
    least 4 blocks, in no more than `fill` programs. A function of the shape alone, so that a pass done again has the
    same bits, on another GPU of the same kind too."""
    blocks = triton.cdiv(length, block)
    wanted = max(1, min(most, fill // max(1, programs), length // (4 * block)))
    span = max(1, triton.cdiv(blocks, wanted))
    return max(1, triton.cdiv(blocks, span)), span


def _product_parts(rows: int, columns: int, tile: dict[str, int], batches: list[tuple[Slot, ...]]) -> tuple[int, int]:
    """`_parts` of `masked_product`: two programs a multiprocessor with up to 64 columns of sums each, else one."""
    widest = max(sum(slot[3] for slot in slots) for slots in batches)
    fill = PROCESSORS * (2 if widest <= 64 else 1)
    return _parts(triton.cdiv(rows, tile["BN"]), columns, tile["BK"], fill, MOST_PARTS)


def _parts_of(out: torch.Tensor, parts: int) -> torch.Tensor:
    """(S, rows, columns) for the sums of S parts of a contraction: `out` itself where there is one part, else fp32."""
    return out[None] if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)


def _add_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """out (rows, columns) of any row stride = `_parts_of` it summed over S; nothing to do where they are the same."""
    if parts.shape[0] == 1:
        return
    count, rows, columns = parts.shape
    block = min(512, triton.next_power_of_2(columns))
    height = 512 // block
    add_parts_kernel[(triton.cdiv(rows, height), triton.cdiv(columns, block))](
        parts,
        out,
        rows,
        columns,
        out.stride(0),
        parts.stride(0),
        count,
        ROWS=height,
        BLOCK=block,
        AHEAD=8,
        num_warps=4,
    )


def _launch_product(
    x: torch.Tensor, bits: torch.Tensor, a: torch.Tensor, ranks: tuple[int, ...], p: float, out: torch.Tensor
) -> None:
    rows, columns = x.shape
    a = a.to(x.dtype)  # by itself: a tile rounded in the kernel would reach the tensor cores through registers
    tile = _product_tile(x.dtype, rows, columns)
    batches = batches_of(ranks, _limit(x.dtype), _least(x.dtype))
    parts, span = _product_parts(rows, columns, tile, batches)
    target = _parts_of(out, parts)
    unit = math.gcd(16, x.stride(0), a.stride(0), target.stride(-2))
    for slots in batches:
        product_kernel[(triton.cdiv(rows, tile["BN"]), parts)](
            x,
            bits,
            a,
            target,
            rows,
            columns,
            x.stride(0) // unit,
            bits.shape[2],
            bits.stride(0),
            a.stride(0) // unit,
            target.stride(-2) // unit,
            target.stride(0),
            span,
            1 / (1 - p),
            UNIT=unit,
            SLOTS=slots,
            num_stages=3,
            **tile,
        )
    _add_parts(target, out)


def _launch_grad_a(
    dt: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float, out: torch.Tensor
) -> None:
    rows, columns = x.shape
    tile = _tile(x.dtype)
    blocks = triton.cdiv(columns, tile["BK"])
    parts, span = _parts(blocks, rows, tile["BN"], 2 * PROCESSORS, 8)
    target = _parts_of(out, parts)
    unit = math.gcd(16, dt.stride(0), x.stride(0))
    for slots in batches_of(ranks, _limit(x.dtype)):
        grad_a_kernel[(blocks, parts)](
            dt,
            x,
            bits,
            target,
            rows,
            columns,
            dt.stride(0) // unit,
            x.stride(0) // unit,
            bits.shape[2],
            bits.stride(0),
            target.stride(0),
            span * tile["BN"],
            1 / (1 - p),
            UNIT=unit,
            SLOTS=slots,
            num_warps=4,
            num_stages=3,
            **tile,
        )
    _add_parts(target, out)


def _check(op: str, bits: torch.Tensor, rows: int, columns: int, ranks: tuple[int, ...], p: float) -> int:
    """Refuses masks that do not fit; returns R."""
    shape = (len(ranks), rows, -(-columns // 8))
    fits = bits.dtype == torch.uint8 and bits.shape == shape and bits.is_contiguous()
    require(fits, op, f"bits is {bits.dtype} {tuple(bits.shape)}; it must be contiguous uint8 {shape}")
    require(all(rank >= 1 for rank in ranks), op, f"ranks are {ranks}; each must be at least 1")
    require(0 <= p < 1, op, f"p is {p}; it must be at least 0 and below 1")
    return sum(ranks)


def _check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> None:
    require(tensor.shape == shape, op, f"{name} is {tuple(tensor.shape)}; it must be {shape}")


def masked_product(
    x: torch.Tensor,
    bits: torch.Tensor,
    a: torch.Tensor,
    ranks: tuple[int, ...],
    p: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """t_p = (x . m_p) A_p^T for every adapter, side by side.

    Args:
        x: (N, K), any row stride.
        bits: (P, N, ceil(K/8)) of `keep_bits`.
        a: (R, K), any row stride: A_1, A_2, ... below each other.
        ranks: r_p, P of them, each at least 1.
        p: the probability with which `bits` were drawn.
        out: (N, R) of any float dtype and row stride to write to.

    Returns:
        (N, R), in x's dtype unless `out` has another.

    Raises:
        ValueError: if an argument does not fit the others.
    """
    total = _check("masked_product", bits, x.shape[0], x.shape[1], ranks, p)
    _check_shape("masked_product", "a", a, (total, x.shape[1]))
    out = x.new_empty(x.shape[0], total) if out is None else out
    _check_shape("masked_product", "out", out, (x.shape[0], total))
    if not runs_triton(x):
        return out.copy_(masked_product_reference(x, bits, a, ranks, p))
    require_float("masked_product", x=x, a=a, out=out)
    if out.numel():
        _launch_product(x, bits, a, ranks, p, out)
    return out


def masked_grad_a(
    dt: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float
) -> torch.Tensor:
    """dA_p = dt_p^T (x . m_p) for every adapter, below each other.

    Args:
        dt: (N, R), any row stride: the gradient of `masked_product`'s result.
        x, bits, ranks, p: those of the forward.

    Returns:
        (R, K) fp32 (float64 for float64).

    Raises:
        ValueError: if an argument does not fit the others.
    """
    total = _check("masked_grad_a", bits, x.shape[0], x.shape[1], ranks, p)
    _check_shape("masked_grad_a", "dt", dt, (x.shape[0], total))
    if not runs_triton(x):
        return masked_grad_a_reference(dt, x, bits, ranks, p)
    require_float("masked_grad_a", dt=dt, x=x)
    out = torch.empty(total, x.shape[1], dtype=torch.float32, device=x.device)
    if out.numel():
        _launch_grad_a(dt, x, bits, ranks, p, out)
    return out


def masked_grad_x(
    dt: torch.Tensor, a: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float, *, out: torch.Tensor
) -> torch.Tensor:
    """out = sum_p m_p . (dt_p A_p), summed in fp32 and rounded once: LoRA's part of the gradient of x.

    Args:
        dt: (N, R), any row stride: the gradient of `masked_product`'s result.
        a, bits, ranks, p: those of the forward.
        out: (N, K), any row stride.

    Returns:
        out.

    Raises:
        ValueError: if an argument does not fit the others.
    """
    total = _check("masked_grad_x", bits, out.shape[0], out.shape[1], ranks, p)
    _check_shape("masked_grad_x", "dt", dt, (out.shape[0], total))
    _check_shape("masked_grad_x", "a", a, (total, out.shape[1]))
    if not runs_triton(out):
        return out.copy_(masked_grad_x_reference(dt.to(out.dtype), a.to(out.dtype), bits, ranks, p))
    require_float("masked_grad_x", out=out, dt=dt, a=a)
    if out.numel():
        _launch_grad_x(dt, a, bits, ranks, p, out)
    return out


def _launch_grad_x(
    dt: torch.Tensor, a: torch.Tensor, bits: torch.Tensor, ranks: tuple[int, ...], p: float, out: torch.Tensor
) -> None:
    rows, columns = out.shape
    tile = _tile(out.dtype)
    unit = math.gcd(16, out.stride(0), dt.stride(0), a.stride(0))
    grad_x_kernel[(triton.cdiv(rows, tile["BN"]), triton.cdiv(columns, tile["BK"]))](
        out,
        dt,
        a,
        bits,
        rows,
        columns,
        out.stride(0) // unit,
        dt.stride(0) // unit,
        a.stride(0) // unit,
        bits.shape[2],
        bits.stride(0),
        1 / (1 - p),
        UNIT=unit,
        SLOTS=tuple(slots_of(ranks, _limit(out.dtype))),
        num_warps=4,
        **tile,
    )
