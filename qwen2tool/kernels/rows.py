"""Moves of rows between buffers of different row strides, and adapters into a group's operands, in one launch each.

`copy_rows`: out[n] = x[n] for (N, K) of any row strides, 4 N K bytes in 16 bit. torch's own strided copy reaches half
of the bandwidth here. `fill_adapters`: A below each other as (R, K), and s B as the blocks of (O, R), zeros elsewhere;
cast from the adapters' dtype with one rounding, s B included. Done with copies that is 4 launches an adapter of 3 us
each: 6 ms of a step that takes 100.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen2tool.kernels.backend import require, runs_triton

MOST_ADAPTERS = 3
"""Adapters that one launch takes; q, k and v have three."""
BLOCK = 1024
"""Columns of A to a program."""


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(
    x: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    columns: tl.tensor,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    source = tl.multiple_of(row * x_stride, ALIGN)
    target = tl.multiple_of(row * out_stride, ALIGN)
    tl.store(out + target + column, tl.load(x + source + column, mask=inside, other=0.0), mask=inside)


def copy_rows(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copies x (N, K) into `out` (N, K) of the same dtype; by torch where a last dimension is not contiguous. Returns
    `out`."""
    require(x.shape == out.shape and x.dtype == out.dtype, "copy_rows", f"{tuple(x.shape)} into {tuple(out.shape)}")
    if not runs_triton(x) or not x.numel() or x.stride(1) != 1 or out.stride(1) != 1:
        return out.copy_(x)
    align = next(a for a in (16, 8, 4, 2, 1) if x.stride(0) % a == 0 and out.stride(0) % a == 0)
    grid = (x.shape[0], triton.cdiv(x.shape[1], 4096))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _copy_kernel[grid](x, out, x.stride(0), out.stride(0), x.shape[1], ALIGN=align, BLOCK=4096, num_warps=8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _a_rows(
    value: tl.tensor, a: tl.tensor, row: tl.tensor, first: tl.constexpr, rank: tl.constexpr, column: tl.tensor,
    columns: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Adds row `row - first` of one A where it has one."""
    mine = (row >= first) & (row < first + rank)
    offset = (row - first).to(tl.int64) * columns
    return value + tl.load(a + offset + column, mask=mine & (column < columns), other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _b_block(
    value: tl.tensor, b: tl.tensor, scale: tl.tensor, row: tl.tensor, top: tl.tensor, bottom: tl.tensor,
    column: tl.tensor, first: tl.constexpr, rank: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds s B of one adapter inside its rows (top to bottom) and columns."""
    mine = (row >= top) & (row < bottom) & (column >= first) & (column < first + rank)
    offset = (row - top).to(tl.int64) * rank + (column - first)
    return value + scale * tl.load(b + offset, mask=mine, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _fill_kernel(
    a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, a_out: tl.tensor, a_stride: tl.tensor, a_columns: tl.tensor,
    pieces: tl.tensor, a_programs: tl.tensor,
    b0: tl.tensor, b1: tl.tensor, b2: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor,
    top0: tl.tensor, bottom0: tl.tensor, top1: tl.tensor, bottom1: tl.tensor, top2: tl.tensor, bottom2: tl.tensor,
    b_out: tl.tensor, b_stride: tl.tensor, rows: tl.tensor,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The first programs write A, a piece of a row each; the others s B, some rows each."""
    program = tl.program_id(0)
    if program < a_programs:
        row = program // pieces
        column = program % pieces * BLOCK + tl.arange(0, BLOCK)
        value = _a_rows(tl.zeros((BLOCK,), tl.float32), a0, row, 0, R0, column, a_columns)
        if R1:
            value = _a_rows(value, a1, row, R0, R1, column, a_columns)
        if R2:
            value = _a_rows(value, a2, row, R0 + R1, R2, column, a_columns)
        target = a_out + row.to(tl.int64) * a_stride + column
        tl.store(target, value.to(a_out.dtype.element_ty), mask=column < a_columns)
    else:
        own = (program - a_programs) * ROWS + tl.arange(0, ROWS)[:, None]
        place = tl.arange(0, COLUMNS)[None]
        block = _b_block(tl.zeros((ROWS, COLUMNS), tl.float32), b0, s0, own, top0, bottom0, place, 0, R0)
        if R1:
            block = _b_block(block, b1, s1, own, top1, bottom1, place, R0, R1)
        if R2:
            block = _b_block(block, b2, s2, own, top2, bottom2, place, R0 + R1, R2)
        inside = (own < rows) & (place < WIDTH)
        tl.store(b_out + own.to(tl.int64) * b_stride + place, block.to(b_out.dtype.element_ty), mask=inside)


def fill_adapters(
    a: torch.Tensor, scaled_b: torch.Tensor | None, adapters: list[tuple[torch.Tensor, torch.Tensor, float, slice]]
) -> None:
    """Writes adapters (A (r, K), B (O_p, r), s, rows of O) into `a` (R, K) and, if given, `scaled_b` (O, R).

    Columns of R follow the order of the adapters; pad rows of `a` and all of `scaled_b` outside the blocks are zero.
    """
    fits = 0 < len(adapters) <= MOST_ADAPTERS and all(t.is_contiguous() for x, y, _, _ in adapters for t in (x, y))
    if fits and runs_triton(a):
        _launch(a, scaled_b, adapters)
        return
    if scaled_b is not None:
        scaled_b.zero_()
    column = 0
    for matrix, b, scale, rows in adapters:
        end = column + matrix.shape[0]
        a[column:end].copy_(matrix)
        if scaled_b is not None:
            scaled_b[rows, column:end].copy_(scaled(b, scale))
        column = end
    a[column:].zero_()


def scaled(b: torch.Tensor, scale: float) -> torch.Tensor:
    """s B, not rounded to 16 bit."""
    return b.to(torch.promote_types(b.dtype, torch.float32)) * scale


def _launch(
    a: torch.Tensor, scaled_b: torch.Tensor | None, adapters: list[tuple[torch.Tensor, torch.Tensor, float, slice]]
) -> None:
    padded: list[Any] = [*adapters, *[adapters[0]] * (MOST_ADAPTERS - len(adapters))]
    ranks = {f"R{j}": padded[j][0].shape[0] if j < len(adapters) else 0 for j in range(MOST_ADAPTERS)}
    # Without s B no program is left for it.
    target = a if scaled_b is None else scaled_b
    rows, width = (0, 1) if scaled_b is None else scaled_b.shape
    spans = [edge for p in padded for edge in (p[3].start, p[3].stop)]
    columns = triton.next_power_of_2(width)
    per_program = max(2048 // columns, 1)
    pieces = triton.cdiv(a.shape[1], BLOCK)
    a_programs = a.shape[0] * pieces
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        _fill_kernel[(a_programs + triton.cdiv(rows, per_program),)](
            *(p[0] for p in padded),
            a,
            a.stride(0),
            a.shape[1],
            pieces,
            a_programs,
            *(p[1] for p in padded),
            *(float(p[2]) for p in padded),
            *spans,
            target,
            target.stride(0),
            rows,
            **ranks,
            BLOCK=BLOCK,
            WIDTH=width,
            ROWS=per_program,
            COLUMNS=columns,
        )
