"""Triton kernels of the products under dropout; `masked` has their definitions, launches and what they cost.

A launch takes *slots*: each is one tensor-core product with its own mask and rows of A. The table of slots is a
constant of the kernel, so that loops over it unroll and every slot has sums of its own shape; a model has as many
tables as it has kinds of groups (q k v | o | gate up | down).

Strides come in units of UNIT elements, the largest power of two up to 16 that divides them all: Triton itself tells
multiples of 16 only, and rows of K + 8 would be read one element at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

Slot = tuple[int, int, int, int]
"""Mask, first row of A, rows of A, the same padded to a power of two."""


def slots_of(ranks: tuple[int, ...], limit: int, least: int = 16) -> list[Slot]:
    """The adapters, those of a rank above `limit` in pieces that share a mask; ranks are padded to `least` or more."""
    slots: list[Slot] = []
    first = 0
    for mask, rank in enumerate(ranks):
        for start in range(0, rank, limit):
            width = min(limit, rank - start)
            slots.append((mask, first + start, width, max(least, triton.next_power_of_2(width))))
        first += rank
    return slots


def batches_of(ranks: tuple[int, ...], limit: int, least: int = 16) -> list[tuple[Slot, ...]]:
    """The slots of each launch: as many as keep their padded ranks within `limit`, which is what registers hold."""
    batches: list[tuple[Slot, ...]] = []
    for slot in slots_of(ranks, limit, least):
        if batches and sum(other[3] for other in batches[-1]) + slot[3] <= limit:
            batches[-1] = (*batches[-1], slot)
        else:
            batches.append((slot,))
    return batches


@triton.jit  # type: ignore[untyped-decorator]
def _zeros(M: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    return tl.zeros((M, N), tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _with(sums: tl.tensor, last: tl.tensor) -> tl.tensor:
    return sums + (last,)  # noqa: RUF005  (Triton has no starred tuples)


@triton.jit  # type: ignore[untyped-decorator]
def _keep_tile(
    bits: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    first: tl.tensor,
    row_bytes: tl.tensor,
    plane: tl.tensor,
    SLOTS: tl.constexpr,
    AT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """(BN, BK) bool: a byte is loaded once and unfolded to the eight columns that lie beside each other in a thread."""
    byte = first // 8 + tl.arange(0, BK // 8)
    mask = tl.full((), SLOTS[AT][0], tl.int64) * plane
    inside = live[:, None] & (byte < row_bytes)[None, :]
    packed = tl.load(bits + mask + row[:, None] * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
    return tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (BN, BK)) != 0


@triton.jit  # type: ignore[untyped-decorator]
def _rank_rows(
    a: tl.tensor, column: tl.tensor, columns: tl.tensor, stride: tl.tensor, SLOTS: tl.constexpr, AT: tl.constexpr
) -> tl.tensor:
    """(padded rank, BK) of A; rows past the slot's rank are zero."""
    rank = tl.arange(0, SLOTS[AT][3])
    inside = (rank < SLOTS[AT][2])[:, None] & (column < columns)[None, :]
    return tl.load(a + (SLOTS[AT][1] + rank).to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _rank_columns(
    t: tl.tensor, row: tl.tensor, live: tl.tensor, stride: tl.tensor, SLOTS: tl.constexpr, AT: tl.constexpr
) -> tl.tensor:
    """(BN, padded rank) of dt; columns past the slot's rank are zero."""
    rank = tl.arange(0, SLOTS[AT][3])
    inside = live[:, None] & (rank < SLOTS[AT][2])[None, :]
    return tl.load(t + row[:, None] * stride + (SLOTS[AT][1] + rank)[None, :], mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store_columns(
    acc: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    stride: tl.tensor,
    SLOTS: tl.constexpr,
    AT: tl.constexpr,
) -> None:
    rank = tl.arange(0, SLOTS[AT][3])
    inside = live[:, None] & (rank < SLOTS[AT][2])[None, :]
    target = out + row[:, None] * stride + (SLOTS[AT][1] + rank)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(
    x: tl.tensor,
    bits: tl.tensor,
    a: tl.tensor,
    out: tl.tensor,  # (N, R), or (parts, N, R) fp32
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    row_bytes: tl.tensor,
    plane: tl.tensor,  # bytes to a mask
    a_stride: tl.tensor,
    out_stride: tl.tensor,
    part_stride: tl.tensor,
    span: tl.tensor,  # blocks of BK columns to a part
    scale: tl.tensor,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """The sums are t^T = A (x . m)^T: as the right operand the masked tile goes through shared memory, and the tensor
    cores walk all of BK by themselves. As the left one it would lie in registers, and each 16 columns wait for those
    before. All masks are applied before the first product, with one barrier between.

    `first` is a multiple of BK that the compiler can see, so that a row's bytes of the masks are fetched ahead in words
    of 4, as x and A are; what it takes for 2 bytes is loaded when it is needed.
    """
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < rows
    begin = tl.program_id(1).to(tl.int64) * span
    sums = ()
    for i in tl.static_range(len(SLOTS)):
        sums = _with(sums, _zeros(SLOTS[i][3], BN))
    for step in range(0, span):
        first = (begin + step) * BK
        column = first + tl.arange(0, BK)
        inside = live[:, None] & (column < columns)[None, :]
        tile = tl.load(x + row[:, None] * (x_stride * UNIT) + column[None, :], mask=inside, other=0.0)
        kept = ()
        for i in tl.static_range(len(SLOTS)):
            keep = _keep_tile(bits, row, live, first, row_bytes, plane, SLOTS, i, BN, BK)
            kept = _with(kept, tl.where(keep, tile, 0.0))
        added = ()
        for i in tl.static_range(len(SLOTS)):
            part_of_a = _rank_rows(a, column, columns, a_stride * UNIT, SLOTS, i)
            added = _with(added, tl.dot(part_of_a, tl.trans(kept[i]), sums[i], input_precision="ieee"))
        sums = added
    part = out + tl.program_id(1).to(tl.int64) * part_stride
    for i in tl.static_range(len(SLOTS)):
        _store_columns(tl.trans(sums[i]) * scale, part, row, live, out_stride * UNIT, SLOTS, i)


@triton.jit  # type: ignore[untyped-decorator]
def _grad_a_step(acc: tl.tensor, tile: tl.tensor, keep: tl.tensor, columns_of_dt: tl.tensor) -> tl.tensor:
    """acc (BK, padded rank): with the ranks last, 16 of them are enough for a full-height tensor-core instruction."""
    kept = tl.where(keep, tile, 0.0)
    return tl.dot(tl.trans(kept), columns_of_dt.to(tile.dtype), acc, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _store_rows(
    acc: tl.tensor, out: tl.tensor, column: tl.tensor, columns: tl.tensor, SLOTS: tl.constexpr, AT: tl.constexpr
) -> None:
    rank = tl.arange(0, SLOTS[AT][3])
    inside = (rank < SLOTS[AT][2])[:, None] & (column < columns)[None, :]
    tl.store(out + (SLOTS[AT][1] + rank).to(tl.int64)[:, None] * columns + column[None, :], tl.trans(acc), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def grad_a_kernel(
    dt: tl.tensor,
    x: tl.tensor,
    bits: tl.tensor,
    out: tl.tensor,  # (parts, R, K) fp32
    rows: tl.tensor,
    columns: tl.tensor,
    dt_stride: tl.tensor,
    x_stride: tl.tensor,
    row_bytes: tl.tensor,
    plane: tl.tensor,
    part_stride: tl.tensor,
    span: tl.tensor,  # rows to a part
    scale: tl.tensor,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * BK
    column = first + tl.arange(0, BK)
    begin = tl.program_id(1).to(tl.int64) * span
    sums = ()
    for i in tl.static_range(len(SLOTS)):
        sums = _with(sums, _zeros(BK, SLOTS[i][3]))
    for step in range(0, span, BN):
        row = begin + step + tl.arange(0, BN)
        live = row < rows
        inside = live[:, None] & (column < columns)[None, :]
        tile = tl.load(x + row[:, None] * (x_stride * UNIT) + column[None, :], mask=inside, other=0.0)
        added = ()
        for i in tl.static_range(len(SLOTS)):
            keep = _keep_tile(bits, row, live, first, row_bytes, plane, SLOTS, i, BN, BK)
            part_of_dt = _rank_columns(dt, row, live, dt_stride * UNIT, SLOTS, i)
            added = _with(added, _grad_a_step(sums[i], tile, keep, part_of_dt))
        sums = added
    part = out + tl.program_id(1).to(tl.int64) * part_stride
    for i in tl.static_range(len(SLOTS)):
        _store_rows(sums[i] * scale, part, column, columns, SLOTS, i)


@triton.jit  # type: ignore[untyped-decorator]
def grad_x_kernel(
    out: tl.tensor,
    dt: tl.tensor,
    a: tl.tensor,
    bits: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    dt_stride: tl.tensor,
    a_stride: tl.tensor,
    row_bytes: tl.tensor,
    plane: tl.tensor,
    scale: tl.tensor,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < rows
    first = tl.program_id(1).to(tl.int64) * BK
    column = first + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for i in tl.static_range(len(SLOTS)):
        left = _rank_columns(dt, row, live, dt_stride * UNIT, SLOTS, i).to(out.dtype.element_ty)
        right = _rank_rows(a, column, columns, a_stride * UNIT, SLOTS, i).to(out.dtype.element_ty)
        keep = _keep_tile(bits, row, live, first, row_bytes, plane, SLOTS, i, BN, BK)
        total += tl.where(keep, tl.dot(left, right, input_precision="ieee"), 0.0)
    target = out + row[:, None] * (out_stride * UNIT) + column[None, :]
    inside = live[:, None] & (column < columns)[None, :]
    tl.store(target, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def add_parts_kernel(
    parts: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    part_stride: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """out (rows, columns) = the sum of `count` parts, first to last; AHEAD of them are on their way at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    source = parts + row[:, None] * columns + column[None, :]
    for first in range(0, count, AHEAD):
        for i in tl.static_range(AHEAD):
            total += tl.load(source, mask=inside & (first + i < count), other=0.0)
            source += part_stride
    tl.store(out + row[:, None] * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=inside)
