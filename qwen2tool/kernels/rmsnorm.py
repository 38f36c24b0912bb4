"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

With rstd = 1 / sqrt(mean(x^2) + eps), n = x rstd and g = w dy, for each row of H numbers:

    y = w n        dx = rstd (g - n mean(g n))        dw = sum over rows of dy n

x, dy, residual gradient: (N, H), any row stride; w: (H,); rstd: (N,) fp32 is all that the forward keeps besides x.
bf16, fp16 or fp32 in and out, fp32 inside. transformers' Qwen2RMSNorm rounds n to x's dtype before it multiplies by w;
the reference does too, the kernel rounds once, at the end.

Cost, in passes over an (N, H) tensor: forward 1 read and 1 write, 2 with a copy of x; backward 2 reads (3 with a
residual gradient, whose sum then needs no launch of its own) and 1 write; dw, wanted only where the norm is trained, 2
reads more. In 16 bit at N = 8192, H = 4096 that is 134 MB forward and 201 MB (268 MB) backward: 45 and 67 (90) us at
3 TB/s; the arithmetic is free.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from qwen2tool.kernels.backend import require, require_float, runs_triton


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in fp32 or fp64: x (N, H), weight (H,) -> y (N, H), rounded as by Qwen2RMSNorm, and rstd (N,)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return weight * (wide * rstd[:, None]).to(x.dtype), rstd


def rms_norm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, residual_grad: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients as the module docstring has them: dx (N, H) and dweight (H,), both unrounded."""
    normed, scaled = _wide(x) * rstd[:, None], _wide(dy) * _wide(weight)
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if residual_grad is not None:
        dx = dx + _wide(residual_grad)
    return dx, (_wide(dy) * normed).sum(0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    copy_ptr: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    copy_stride: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    COPY: tl.constexpr,
) -> None:
    """One row a program. A row of at most BLOCK numbers stays in registers, a longer one is read twice."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + tl.multiple_of(row * x_stride, ALIGN)
    y_row = y_ptr + tl.multiple_of(row * y_stride, ALIGN)
    copy_row = copy_ptr + tl.multiple_of(row * copy_stride, ALIGN)
    columns = tl.arange(0, BLOCK)
    if BLOCK >= H:
        inside = columns < H
        # Both loads are under way before the reduction waits for the first.
        x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
        rstd = tl.rsqrt(tl.sum(x * x) / H + eps)
        tl.store(y_row + columns, (x * rstd) * weight.to(tl.float32), mask=inside)
        if COPY:
            tl.store(copy_row + columns, x, mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            x = tl.load(x_row + start + columns, mask=start + columns < H, other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares) / H + eps)
        for start in range(0, H, BLOCK):
            inside = start + columns < H
            x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_row + start + columns, (x * rstd) * weight, mask=inside)
            if COPY:
                tl.store(copy_row + start + columns, x, mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit  # type: ignore[untyped-decorator]
def _load_row(
    dy_row: tl.tensor, x_row: tl.tensor, weight_ptr: tl.tensor, rstd: tl.tensor, columns: tl.tensor, H: tl.constexpr
) -> tl.tensor:
    """g = w dy and n = x rstd, fp32, 0 past the row's end."""
    inside = columns < H
    x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return dy * weight, x * rstd


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    dx_stride: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    """dx of one row a program. An element of the residual is read before its place in dx is written: they may alias."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + tl.multiple_of(row * x_stride, ALIGN)
    dy_row = dy_ptr + tl.multiple_of(row * dy_stride, ALIGN)
    dx_row = dx_ptr + tl.multiple_of(row * dx_stride, ALIGN)
    residual_row = residual_ptr + tl.multiple_of(row * residual_stride, ALIGN)
    rstd = tl.load(rstd_ptr + row)
    columns = tl.arange(0, BLOCK)
    if BLOCK >= H:
        scaled, normed = _load_row(dy_row, x_row, weight_ptr, rstd, columns, H)
        if RESIDUAL:
            residual = tl.load(residual_row + columns, mask=columns < H, other=0.0)
        dx = rstd * (scaled - normed * (tl.sum(scaled * normed) / H))
        if RESIDUAL:
            dx += residual.to(tl.float32)
        tl.store(dx_row + columns, dx, mask=columns < H)
    else:
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            scaled, normed = _load_row(dy_row, x_row, weight_ptr, rstd, start + columns, H)
            products += scaled * normed
        mean = tl.sum(products) / H
        for start in range(0, H, BLOCK):
            scaled, normed = _load_row(dy_row, x_row, weight_ptr, rstd, start + columns, H)
            dx = rstd * (scaled - normed * mean)
            if RESIDUAL:
                dx += tl.load(residual_row + start + columns, mask=start + columns < H, other=0.0).to(tl.float32)
            tl.store(dx_row + start + columns, dx, mask=start + columns < H)


@triton.jit  # type: ignore[untyped-decorator]
def _weight_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    N: tl.tensor,
    rows_each: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """Row p of the partial sums (P, H) fp32, for COLUMNS columns: sum of dy n over rows p rows_each to the next."""
    part = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = part * rows_each
    last = tl.minimum(first + rows_each, N)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < last)[:, None] & (columns < H)[None, :]
        x_rows, dy_rows = rows * x_stride, rows * dy_stride
        x_rows, dy_rows = tl.multiple_of(x_rows, [ALIGN]), tl.multiple_of(dy_rows, [ALIGN])
        x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)
        total += dy * (x * rstd[:, None])
    tl.store(partial_ptr + part * H + columns, tl.sum(total, axis=0), mask=columns < H)


def _row_block(hidden: int) -> tuple[int, int]:
    """(numbers of a row held at once, warps).

    16 numbers a thread are two 16-byte accesses in 16 bit, and few enough for three or more programs a multiprocessor
    in the backward. 8192, the hidden size of the largest Qwen2, is where that takes 16 warps.
    """
    block = min(triton.next_power_of_2(hidden), 8192)
    return block, max(1, block // 512)


def _align(*strides: int) -> int:
    """A power of two up to 16 that divides all row strides: what lets the compiler use 16-byte accesses.

    Triton itself sees only divisibility by 16; a row of hidden + rank numbers at rank 8 is divisible by 8, which is
    16 bytes in 16 bit.
    """
    return gcd(16, *strides)


def _launch_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, rstd: torch.Tensor, copy: torch.Tensor | None
) -> None:
    (rows, hidden), (block, warps) = x.shape, _row_block(x.shape[1])
    target = y if copy is None else copy
    strides = x.stride(0), y.stride(0), target.stride(0)
    _forward_kernel[(rows,)](
        *(x, weight, y, rstd, target, *strides, eps),
        H=hidden,
        BLOCK=block,
        ALIGN=_align(*strides),
        COPY=copy is not None,
        num_warps=warps,
    )


def _launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual_grad: torch.Tensor | None,
    dx: torch.Tensor,
) -> None:
    (rows, hidden), (block, warps) = x.shape, _row_block(x.shape[1])
    residual = dx if residual_grad is None else residual_grad
    strides = dy.stride(0), x.stride(0), residual.stride(0), dx.stride(0)
    _backward_kernel[(rows,)](
        *(dy, x, weight, rstd, residual, dx, *strides),
        H=hidden,
        BLOCK=block,
        ALIGN=_align(*strides),
        RESIDUAL=residual_grad is not None,
        num_warps=warps,
    )


def _launch_weight(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """dweight (H,) fp32. The number of parts depends on the shape alone, so the order of the sums never changes."""
    (rows, hidden), columns = x.shape, 128
    strips = triton.cdiv(hidden, columns)
    # About 1024 programs of four warps: eight for each of an H100's 132 multiprocessors, at 64 rows or more.
    parts = max(1, min(1024 // strips, triton.cdiv(rows, 64)))
    rows_each = triton.cdiv(rows, parts)
    parts = triton.cdiv(rows, rows_each)
    partial = torch.empty((parts, hidden), dtype=torch.float32, device=x.device)
    strides = dy.stride(0), x.stride(0)
    _weight_kernel[(strips, parts)](
        *(dy, x, rstd, partial, *strides, rows, rows_each),
        H=hidden,
        ROWS=16,
        COLUMNS=columns,
        ALIGN=_align(*strides),
        num_warps=4,
    )
    return partial.sum(0)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, **like_x: torch.Tensor | None) -> None:
    require(x.dim() == 2 and x.shape[1] > 0, op, f"x has shape {tuple(x.shape)}; it must be (N, H) with H > 0")
    hidden = x.shape[1]
    require(weight.shape == (hidden,), op, f"weight has shape {tuple(weight.shape)}; x needs ({hidden},)")
    for name, tensor in like_x.items():
        if tensor is not None:
            require(tensor.shape == x.shape, op, f"{name} has shape {tuple(tensor.shape)}, x {tuple(x.shape)}")


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises rows: x (N, H), weight (H,) -> y (N, H), rstd (N,) fp32; no autograd.

    y lies in `out` where given, which may have any row stride and float dtype (default: x's). `copy` (N, H), of x's
    dtype, receives x besides: what a residual is added to, for a write instead of a read and a write later.

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    _check("rms_norm_forward", x, weight, out=out, copy=copy)
    require(copy is None or copy.dtype == x.dtype, "rms_norm_forward", "copy has another dtype than x")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not runs_triton(x):
        normed, rstd = rms_norm_reference(x, weight, eps)
        if copy is not None:
            copy.copy_(x)
        return y.copy_(normed), rstd
    require_float("rms_norm_forward", x=x, weight=weight, out=y, copy=copy)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _launch_forward(x, weight, eps, y, rstd, copy)
    return y, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    residual_grad: torch.Tensor | None = None,
    need_weight: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `rms_norm_forward`: dx (N, H) in x's dtype, dweight (H,) fp32 if `need_weight`, else None.

    dy, x, residual_grad: (N, H); weight: (H,); rstd: (N,) fp32 from the forward. `residual_grad`, the gradient that
    reaches x past the norm, is added to dx in fp32 before the one rounding. dx lies in `out` where given; that may be
    `residual_grad` itself. dweight is summed in a fixed order: the same bits every time.

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    _check("rms_norm_backward", x, weight, dy=dy, residual_grad=residual_grad, out=out)
    require(rstd.shape == x.shape[:1], "rms_norm_backward", f"rstd has shape {tuple(rstd.shape)}, x {tuple(x.shape)}")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not runs_triton(x):
        grads = rms_norm_backward_reference(dy, x, weight, rstd, residual_grad)
        return dx.copy_(grads[0]), grads[1] if need_weight else None
    require_float("rms_norm_backward", dy=dy, x=x, weight=weight, rstd=rstd, residual_grad=residual_grad, out=dx)
    if not x.shape[0]:
        return dx, torch.zeros(x.shape[1], dtype=torch.float32, device=x.device) if need_weight else None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        dweight = _launch_weight(dy, x, rstd) if need_weight else None  # before dx, which may overwrite dy
        _launch_backward(dy, x, weight, rstd, residual_grad, dx)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, room: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.room = room
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # autograd may pass an expanded gradient
        dx, dweight = rms_norm_backward(dy, x, weight, rstd, need_weight=ctx.needs_input_grad[1], out=ctx.room(x))
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    room: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
) -> torch.Tensor:
    """Differentiable RMSNorm: x (..., H), weight (H,) -> y (..., H) in x's dtype. Keeps x and rstd for the backward.

    `room` makes the (N, H) that the gradient of x is written to, of any row stride, from the x (N, H) it is given.

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    require(x.dim() > 0, "rms_norm", "x is a scalar; it must be (..., H)")
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _RMSNorm.apply(rows, weight, eps, room)  # type: ignore[no-untyped-call]
    return y.view(x.shape)
