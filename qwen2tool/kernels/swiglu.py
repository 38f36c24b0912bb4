"""SwiGLU: h = silu(gate) * up, silu(g) = g sigmoid(g) (Shazeer 2020, arXiv 2002.05202, without its linears).

With s = sigmoid(gate):

    h = gate s up        d_gate = dh up s (1 + gate (1 - s))        d_up = dh gate s

gate_up: (N, 2I), gate in the first I columns and up in the last I, as one product of both projections leaves them;
h, dh: (N, I); any row stride. bf16, fp16 or fp32 in and out, fp32 inside, one rounding (plain PyTorch rounds silu(gate)
first). Nothing but gate_up is kept for the backward, which can write h again on its way: a recompute for 2 N I bytes.

Cost, in passes over an (N, I) tensor: forward 2 reads and 1 write; backward 3 reads and 2 writes, 3 with h. In 16 bit
at N = 8192, I = 11008 that is 541 MB forward and 902 MB (1082 MB) backward: 180 and 301 (361) us at 3 TB/s.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from qwen2tool.kernels.backend import require, require_float, runs_triton


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition, in fp32 (fp64 for fp64) and rounded once to gate's dtype: gate, up (..., I) -> h (..., I)."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_backward_reference(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients as the module docstring has them, unrounded: d_gate, d_up (N, I)."""
    dh, gate, up = _wide(dh), _wide(gate), _wide(up)
    sigmoid = torch.sigmoid(gate)
    return dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@triton.jit  # type: ignore[untyped-decorator]
def _tile(N: tl.tensor, INTERMEDIATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """This program's rows (ROWS, 1) int64, columns (1, COLUMNS) and which of the tile lie inside (N, I)."""
    program = tl.program_id(0).to(tl.int64)
    strips: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    rows = (program // strips) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % strips).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < N) & (columns < INTERMEDIATE)


@triton.jit  # type: ignore[untyped-decorator]
def _offsets(rows: tl.tensor, columns: tl.tensor, stride: tl.tensor, ALIGN: tl.constexpr) -> tl.tensor:
    """(ROWS, COLUMNS) offsets, with the compiler told that ALIGN divides the stride: that gives 16-byte accesses."""
    return tl.multiple_of(rows * stride, [ALIGN, ALIGN]) + columns


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    h_ptr: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    h_stride: tl.tensor,
    N: tl.tensor,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """One tile of h a program."""
    rows, columns, inside = _tile(N, INTERMEDIATE, ROWS, COLUMNS)
    gate_at = _offsets(rows, columns, gate_stride, ALIGN)
    up_at = _offsets(rows, columns, up_stride, ALIGN)
    h_at = _offsets(rows, columns, h_stride, ALIGN)
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0)
    up = tl.load(up_ptr + up_at, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    tl.store(h_ptr + h_at, gate * tl.sigmoid(gate) * up.to(tl.float32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    dh_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    h_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    dh_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    h_stride: tl.tensor,
    d_gate_stride: tl.tensor,
    d_up_stride: tl.tensor,
    N: tl.tensor,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    WRITE_H: tl.constexpr,
) -> None:
    """One tile of d_gate and d_up (and h) a program; all its loads come before its stores, so outputs may be inputs."""
    rows, columns, inside = _tile(N, INTERMEDIATE, ROWS, COLUMNS)
    dh_at = _offsets(rows, columns, dh_stride, ALIGN)
    gate_at = _offsets(rows, columns, gate_stride, ALIGN)
    up_at = _offsets(rows, columns, up_stride, ALIGN)
    h_at = _offsets(rows, columns, h_stride, ALIGN)
    d_gate_at = _offsets(rows, columns, d_gate_stride, ALIGN)
    d_up_at = _offsets(rows, columns, d_up_stride, ALIGN)
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0)
    up = tl.load(up_ptr + up_at, mask=inside, other=0.0)
    dh = tl.load(dh_ptr + dh_at, mask=inside, other=0.0)
    gate, up, dh = gate.to(tl.float32), up.to(tl.float32), dh.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if WRITE_H:
        tl.store(h_ptr + h_at, silu * up, mask=inside)
    tl.store(d_gate_ptr + d_gate_at, dh * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(d_up_ptr + d_up_at, dh * silu, mask=inside)


def _tile_shape(intermediate: int, numbers: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile of `numbers`: as wide as 1024, since 2 KB in a row is what DRAM likes.

    Tiles in the row-major order of their programs walk through memory as a copy does; wide ones also leave few
    programs with a ragged edge (11008 = 10.75 x 1024).
    """
    columns = min(triton.next_power_of_2(intermediate), 1024)
    return max(1, numbers // columns), columns


def _launch_forward(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> None:
    n, intermediate = gate.shape
    rows, columns = _tile_shape(intermediate, 4096)  # 16 numbers a thread: four 16-byte loads under way in 16 bit
    strides = gate.stride(0), up.stride(0), h.stride(0)
    grid = (triton.cdiv(n, rows) * triton.cdiv(intermediate, columns),)
    _forward_kernel[grid](
        *(gate, up, h, *strides, n),
        INTERMEDIATE=intermediate,
        ROWS=rows,
        COLUMNS=columns,
        ALIGN=gcd(16, *strides),  # Triton sees divisibility by 16 alone; 8 already gives 16-byte accesses in 16 bit
        num_warps=8,
    )


def _launch_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h: torch.Tensor | None,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
) -> None:
    n, intermediate = gate.shape
    rows, columns = _tile_shape(intermediate, 2048)  # 8 numbers a thread of up to six tensors: half the registers
    h_at = d_gate if h is None else h
    strides = tuple(tensor.stride(0) for tensor in (dh, gate, up, h_at, d_gate, d_up))
    grid = (triton.cdiv(n, rows) * triton.cdiv(intermediate, columns),)
    _backward_kernel[grid](
        *(dh, gate, up, h_at, d_gate, d_up, *strides, n),
        INTERMEDIATE=intermediate,
        ROWS=rows,
        COLUMNS=columns,
        ALIGN=gcd(16, *strides),
        WRITE_H=h is not None,
        num_warps=8,
    )


def _check(op: str, gate: torch.Tensor, **like_gate: torch.Tensor | None) -> None:
    require(gate.dim() == 2 and gate.shape[1] > 0, op, f"gate has shape {tuple(gate.shape)}; it must be (N, I)")
    for name, tensor in like_gate.items():
        if tensor is not None:
            require(tensor.shape == gate.shape, op, f"{name} has shape {tuple(tensor.shape)}, gate {tuple(gate.shape)}")


def _halves(op: str, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(tensor.shape)
    require(len(shape) == 2 and shape[1] % 2 == 0, op, f"{name} has shape {shape}; it must be (N, 2I), [gate | up]")
    half = shape[1] // 2
    return tensor[:, :half], tensor[:, half:]


def _forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    _check("swiglu_forward", gate, up=up, out=out)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if not runs_triton(gate):
        return h.copy_(swiglu_reference(gate, up))
    require_float("swiglu_forward", gate=gate, up=up, out=h)
    if gate.shape[0]:
        with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _launch_forward(gate, up, h)
    return h


def _backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    h_out: torch.Tensor | None,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
) -> None:
    _check("swiglu_backward", gate, dh=dh, up=up, h_out=h_out, d_gate=d_gate, d_up=d_up)
    if not runs_triton(gate):
        h, grads = swiglu_reference(gate, up), swiglu_backward_reference(dh, gate, up)
        d_gate.copy_(grads[0])
        d_up.copy_(grads[1])
        if h_out is not None:
            h_out.copy_(h)
        return
    require_float("swiglu_backward", dh=dh, gate=gate, up=up, h_out=h_out, d_gate=d_gate, d_up=d_up)
    if gate.shape[0]:
        with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _launch_backward(dh, gate, up, h_out, d_gate, d_up)


def swiglu_forward(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """h (N, I) = silu(gate) * up of gate_up (N, 2I) [gate | up]; no autograd.

    h lies in `out` where given, which may have any row stride and float dtype (default: gate_up's).

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    return _forward(*_halves("swiglu_forward", "gate_up", gate_up), out)


def swiglu_backward(
    dh: torch.Tensor, gate_up: torch.Tensor, *, h_out: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `swiglu_forward`: dh (N, I), gate_up (N, 2I) -> d_gate_up (N, 2I), in gate_up's dtype.

    h (N, I) is written again into `h_out` where given, which may be `dh` itself. d_gate_up lies in `out` where given;
    that may be `gate_up` itself.

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    halves = _halves("swiglu_backward", "gate_up", gate_up), _halves("swiglu_backward", "out", d_gate_up)
    _backward(dh, *halves[0], h_out, *halves[1])
    return d_gate_up


def _contiguous_last(grad: torch.Tensor) -> torch.Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()  # autograd may pass an expanded gradient


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _backward(_contiguous_last(dh), gate, up, None, d_gate, d_up)
        return d_gate, d_up


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(_contiguous_last(dh), gate_up)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Differentiable SwiGLU: gate, up (..., I) -> h (..., I); or one tensor (..., 2I), [gate | up] -> h (..., I).

    The one-tensor form also returns its gradient as one tensor, without the two copies that slicing would cost.

    Raises:
        ValueError: a shape, dtype or stride the op does not take.
    """
    require(gate.dim() > 0, "swiglu", "gate is a scalar; it must be (..., I)")
    rows = gate.reshape(-1, gate.shape[-1])
    if up is None:
        h: torch.Tensor = _FusedSwiGLU.apply(rows)  # type: ignore[no-untyped-call]
    else:
        h = _SwiGLU.apply(rows, up.reshape(-1, up.shape[-1]))  # type: ignore[no-untyped-call]
    return h.view(*gate.shape[:-1], h.shape[-1])
