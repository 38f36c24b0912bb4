"""Bias, rotary positions and key centring of q and k in one pass: q' = R(q + b_q), k' = R(k + b_k) - c.

R rotates the pair (x1, x2), entry i of the first and of the second half of a head, by the token's angle of pair i:
x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin (the half-split RoPE of transformers' `apply_rotary_pos_emb`; Su et al.
2021, arXiv 2104.09864). Its gradient is the rotation by the opposite angle.

c is one vector a kv head. Softmax does not see a constant added to all keys of a head, so attention on k' - c is the
same function with the same gradients. In 16 bit it is a better one: dQ = dS K, the rows of dS sum to zero only before
they are rounded, and what the rounding leaves is multiplied by whatever all keys share. Qwen2's k biases have norms in
the hundreds, nearly all in RoPE's slowest pairs, so that R_p b hardly depends on the position p: `key_centre` makes c
from the bias alone. Biases are added and c is subtracted in fp32, before the one rounding.

Shapes: N tokens, D head_dim, hq query heads, hk kv heads; a row is [q heads | k heads], W = (hq + hk) D wide.
Dtypes: rows bf16, fp16 or fp32, arithmetic fp32 (float64 rows: float64); cos, sin and c fp32.
Cost per token: 2 W elements moved and 4 D bytes of cos and sin. 8192 tokens of Qwen2-7B in bf16: 138 MB, 46 us
at 3 TB/s. Biases and c stay in registers or L2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen2tool.kernels import backend

# Best is the sequence's own length, but no run has just one. On the k biases of Qwen2.5-0.5B (24 layers, 2 heads) what
# is left after subtracting c (rms over positions) is at worst so many times what the length's own mean leaves, at
# 512 / 2048 / 32768 tokens: 256 positions 1.17 / 1.43 / 1.80, 1024: 1.25 / 1.15 / 1.77, 8192: 2.57 / 1.65 / 1.50.
CENTRE_POSITIONS = 1024

# Up to here one token a program: an H100 holds about 800 at a time (80 registers a thread, 4 warps). From here on four
# tokens a program fill it too, and share the biases in registers.
SHARE_FROM = 4096


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """R x; x: (N, heads, D), cos and sin: (N, D/2)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (N, 1, D/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_reference(
    qk: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    centre: torch.Tensor | None,
    *,
    heads: int,
    kv_heads: int,
) -> torch.Tensor:
    """The definition of `rope_forward`, in fp32 (float64 for float64 rows) with one rounding; differentiable."""
    x = qk.to(_wide(qk.dtype))
    if bias is not None:
        x = x + bias.to(x.dtype)
    width = qk.shape[1] // (heads + kv_heads)
    y = _rotated(x.view(-1, heads + kv_heads, width), cos, sin).flatten(1)
    if centre is not None:
        y = y - torch.nn.functional.pad(centre.to(y.dtype), (heads * width, 0))
    return y.to(qk.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _rope_kernel(
    qk: tl.tensor,
    qk_stride: tl.tensor,
    bias: tl.tensor,
    cos: tl.tensor,
    cos_stride: tl.tensor,
    sin: tl.tensor,
    sin_stride: tl.tensor,
    centre: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    rows: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Rotates ROWS tokens a program, all heads of a token as one tile of first halves and one of second halves."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS + KV_HEADS) & (pair < HALF)
    first = head * (2 * HALF) + pair
    second = first + HALF
    if HAS_BIAS:
        bias_first = tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)
        bias_second = tl.load(bias + second, mask=inside, other=0.0).to(tl.float32)
    if HAS_CENTRE:
        key = inside & (head >= HEADS)
        centre_first = tl.load(centre + first - HEADS * 2 * HALF, mask=key, other=0.0)
        centre_second = tl.load(centre + second - HEADS * 2 * HALF, mask=key, other=0.0)
    for step in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        exists = row < rows
        live = inside & exists
        angle = exists & (pair < HALF)
        c = tl.load(cos + row * cos_stride + pair, mask=angle, other=0.0)
        s = tl.load(sin + row * sin_stride + pair, mask=angle, other=0.0)
        x1 = tl.load(qk + row * qk_stride + first, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(qk + row * qk_stride + second, mask=live, other=0.0).to(tl.float32)
        if INVERSE:
            s = -s
        if HAS_BIAS:
            x1 += bias_first
            x2 += bias_second
        y1 = x1 * c - x2 * s
        y2 = x2 * c + x1 * s
        if HAS_CENTRE:
            y1 -= centre_first
            y2 -= centre_second
        tl.store(out + row * out_stride + first, y1.to(out.dtype.element_ty), mask=live)
        tl.store(out + row * out_stride + second, y2.to(out.dtype.element_ty), mask=live)


def _launch(
    qk: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    centre: torch.Tensor | None,
    out: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    inverse: bool,
) -> None:
    rows, half = qk.shape[0], qk.shape[1] // (2 * (heads + kv_heads))
    block_heads, block_half = triton.next_power_of_2(heads + kv_heads), triton.next_power_of_2(half)
    per_program = 4 if rows >= SHARE_FROM else 1
    # 16 elements a thread and tile are two 16-byte loads of bf16; fewer warps than elements to go round also means that
    # no two hold the same element, so writing over the input is safe.
    warps = min(max(block_heads * block_half // 512, 1), 8)
    with torch.cuda.device_of(qk):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _rope_kernel[(triton.cdiv(rows, per_program),)](
            qk,
            qk.stride(0),
            qk if bias is None else bias,
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            qk if centre is None else centre,
            out,
            out.stride(0),
            rows,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=half,
            HAS_BIAS=bias is not None,
            HAS_CENTRE=centre is not None,
            INVERSE=inverse,
            ROWS=per_program,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            num_warps=warps,
        )


def _check_rows(op: str, qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> int:
    """The head_dim of rows of `heads` heads (query and kv)."""
    backend.require(qk.dim() == 2, op, f"qk has shape {tuple(qk.shape)}; it must be (N, (hq + hk) * D)")
    width = qk.shape[1] // heads
    backend.require(
        width > 0 and width % 2 == 0 and width * heads == qk.shape[1],
        op,
        f"rows of {qk.shape[1]} are not {heads} heads of an even head_dim",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        expected = (qk.shape[0], width // 2)
        backend.require(table.shape == expected, op, f"{name} has shape {tuple(table.shape)}; it must be {expected}")
    return width


def _check_vector(op: str, name: str, vector: torch.Tensor | None, width: int) -> None:
    if vector is not None:
        backend.require(vector.shape == (width,), op, f"{name} has shape {tuple(vector.shape)}; it must be ({width},)")


def _check_kernel(
    op: str, qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, **vectors: torch.Tensor | None
) -> None:
    backend.require_float(op, qk=qk, cos=cos, sin=sin, out=out, **vectors)
    for name, table in (("cos", cos), ("sin", sin), ("centre", vectors.get("centre"))):
        if table is not None:
            backend.require(table.dtype == torch.float32, op, f"{name} is {table.dtype}; it must be float32")


def _output(op: str, qk: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    backend.require(out.shape == qk.shape, op, f"out has shape {tuple(out.shape)}; qk has {tuple(qk.shape)}")
    return out


def _rotate(
    op: str,
    qk: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    centre: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    inverse: bool = False,
) -> torch.Tensor:
    """`rope_forward`, or with `inverse` the rotation by the opposite angle: checks, then reference or kernel."""
    width = _check_rows(op, qk, cos, sin, heads + kv_heads)
    _check_vector(op, "bias", bias, qk.shape[1])
    _check_vector(op, "centre", centre, kv_heads * width)
    out = _output(op, qk, out)
    if not backend.runs_triton(qk):
        with torch.no_grad():
            sin = -sin if inverse else sin
            return out.copy_(rope_reference(qk, bias, cos, sin, centre, heads=heads, kv_heads=kv_heads))
    _check_kernel(op, qk, cos, sin, out, bias=bias, centre=centre)
    if qk.shape[0]:
        _launch(qk, bias, cos, sin, centre, out, heads=heads, kv_heads=kv_heads, inverse=inverse)
    return out


def rope_forward(
    qk: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    centre: torch.Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q' = R(q + b_q), k' = R(k + b_k) - c; no autograd.

    Args:
        qk: (N, (hq + hk) D) products without bias, [q heads | k heads]; any row stride.
        bias: ((hq + hk) D,) in the same order, any float dtype, or None.
        cos, sin: (N, D/2) fp32, of each token's position; any row stride.
        centre: (hk D,) fp32 from `key_centre`, or None.
        heads, kv_heads: hq and hk.
        out: where to write, any row stride and float dtype; `qk` itself to overwrite it. Default: a new tensor.

    Returns:
        (N, (hq + hk) D), in `out`'s dtype, by default `qk`'s.

    Raises:
        ValueError: naming the argument whose shape, dtype or strides do not fit.
    """
    return _rotate("rope_forward", qk, bias, cos, sin, centre, out, heads=heads, kv_heads=kv_heads)


def rope_backward(
    dqk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `rope_forward` in its products: the rotation by the opposite angle; no autograd.

    Args:
        dqk: (N, (hq + hk) D) gradient of the rotated rows; any row stride.
        cos, sin: as in the forward.
        heads, kv_heads: hq and hk.
        out: where to write; `dqk` itself to overwrite it. Default: a new tensor.

    Returns:
        (N, (hq + hk) D). The bias gradient is its sum over tokens; the centre is a constant and has none.

    Raises:
        ValueError: naming the argument whose shape, dtype or strides do not fit.
    """
    return _rotate("rope_backward", dqk, None, cos, sin, None, out, heads=heads, kv_heads=kv_heads, inverse=True)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: torch.Tensor,
        bias: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        centre: torch.Tensor | None,
        heads: int,
        kv_heads: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.kv_heads = heads, kv_heads
        ctx.bias_dtype = None if bias is None else bias.dtype
        return rope_forward(qk, bias, cos, sin, centre, heads=heads, kv_heads=kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Autograd may hand over an expanded scalar (of `.sum()`), whose last stride is 0.
        dqk = rope_backward(grads[0].contiguous(), cos, sin, heads=ctx.heads, kv_heads=ctx.kv_heads)
        dbias = dqk.sum(0, dtype=_wide(dqk.dtype)).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return dqk, dbias, None, None, None, None, None


def rope(
    qk: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    centre: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
) -> torch.Tensor:
    """`rope_forward`, differentiable in `qk` and `bias`; cos, sin and the centre are constants.

    The bias gradient is the column sum, in fp32, of dqk as rounded to its dtype.
    """
    result: torch.Tensor = _Rope.apply(qk, bias, cos, sin, centre, heads, kv_heads)  # type: ignore[no-untyped-call]
    return result


def key_centre(
    bias_k: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    kv_heads: int,
    positions: int = CENTRE_POSITIONS,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The mean of R_p b_k over the positions p = 0 .. positions - 1: what all keys of a head share.

    Args:
        bias_k: (hk D,), any float dtype.
        inv_freq: (D/2,) radians a position of each pair.
        kv_heads: hk.
        positions: how many positions the mean covers; any value gives the same attention.
        scaling: what the model multiplies cos and sin by (transformers' attention_scaling).

    Returns:
        (hk D,) fp32, computed in float64.

    Raises:
        ValueError: if `bias_k` is not `kv_heads` heads of twice `inv_freq`'s length.
    """
    _check_vector("key_centre", "bias_k", bias_k, 2 * kv_heads * inv_freq.shape[-1])
    angles = torch.arange(positions, device=bias_k.device, dtype=torch.float64)[:, None] * inv_freq.double()
    cos, sin = angles.cos().mean(0, keepdim=True) * scaling, angles.sin().mean(0, keepdim=True) * scaling  # (1, D/2)
    return _rotated(bias_k.detach().double().view(1, kv_heads, -1), cos, sin).flatten().float()
