"""Several frozen linears over one input, each with its bias and LoRA: q, k, v | o | gate, up | down.

    y_p = x W_p^T + b_p + sum_j s_j (drop_j(x) A_j^T) B_j^T            (Hu et al. 2021, arXiv 2106.09685, as PEFT)

x: (N, K), W_p: (O_p, K) frozen in 16 or 32 bit or NF4/FP4, A_j: (r_j, K), B_j: (O_p, r_j); y: (N, O), O = sum O_p.

*Extended* form: with T_j = drop_j(x) A_j^T standing behind x, [x | T], and s_j B_j behind the rows of W_p, one product
with K + R columns does base, LoRA and all projections at once; the backward is one product with [dy | dy s B] and
[W; A]; both operands live in one scratch (`group.Weights`). It is exact (one accumulation, so one rounding instead of
two) and reads x and y once. *Separate* form: W_p is used where it lies, LoRA and products are added in fp32 and rounded
from that, y and a group's dx alike, which costs 24 N O bytes more in the forward; it wins for a third as many tokens as
columns, or fewer, over a 16-bit base.

Under dropout the backward writes LoRA's part of dx first, rounded by itself, and the product is accumulated on it: in
fp32 on a CPU, while cuBLAS on an H200 was seen to round a 16-bit product before it adds it, so that of LoRA's part what
lies below half a unit of dx's rounding is lost there.

Adapters of any rank >= 1; R is their sum rounded up to a multiple of 8, the pad being zeros. Products accumulate in
fp32; gradients of A and B leave in fp32 without a rounding to 16 bit in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from qwen2tool.kernels.backend import blank, require
from qwen2tool.kernels.dropout import keep_bits
from qwen2tool.kernels.group import Group, Projection, Weights, assemble, plain_weight, prefers_extended
from qwen2tool.kernels.masked import masked_grad_a, masked_grad_x, masked_product
from qwen2tool.kernels.rows import copy_rows


def reference(x: torch.Tensor, group: Group, masks: list[torch.Tensor] | None = None) -> torch.Tensor:
    """The definition, in x's dtype and plain PyTorch: (N, K) -> (N, O); `masks` hold keep/(1-p), (N, K), an adapter."""
    outputs, index = [], 0
    for projection in group.projections:
        weight = plain_weight(projection.weight, x.dtype)
        y = torch.nn.functional.linear(x, weight, None if projection.bias is None else projection.bias.to(x.dtype))
        for adapter in projection.adapters:
            dropped = x if masks is None else x * masks[index].to(x.dtype)
            y = y + (dropped @ adapter.a.to(x.dtype).T) @ adapter.b.to(x.dtype).T * adapter.scale
            index += 1
        outputs.append(y)
    return torch.cat(outputs, -1)


def draw_bits(group: Group, tokens: int, seed: torch.Tensor | None) -> torch.Tensor | None:
    """The keep bits (P, N, K/8) of every adapter for this seed, None without dropout."""
    if seed is None or not group.dropout or not group.adapters:
        return None
    masks = len(group.adapters)
    return keep_bits(seed, group.stream, group.dropout, tokens, group.columns, masks, device=seed.device)


HALVES = (torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """x with T behind it, or dy with dy s B behind it: both as views of one buffer (extended form) or apart.

    Attributes:
        plain: (N, K) or (N, O). tail: (N, R). whole: (N, K + R) or (N, O + R), None where they lie apart.
    """

    plain: torch.Tensor
    tail: torch.Tensor
    whole: torch.Tensor | None = None


def new_rows(tokens: int, columns: int, width: int, weights: Weights) -> Rows:
    """Rows to be filled, in the form of `weights`."""
    if weights.matrix is None or not width:
        plain = blank(weights.a, tokens, columns)
        return Rows(plain, blank(plain, tokens, width))
    whole = blank(weights.a, tokens, columns + width)
    return Rows(whole[:, :columns], whole[:, columns:], whole)


def rows_of(plain: torch.Tensor, width: int, tail: torch.Tensor | None = None) -> Rows:
    """Rows around a tensor that is there already, and around its tail where that is too."""
    return Rows(plain, blank(plain, plain.shape[0], width) if tail is None else tail)


def gradient_rows(dy: torch.Tensor, group: Group, weights: Weights, bits: torch.Tensor | None) -> Rows:
    """dy (N, O), in the dtype of `weights`, as the rows of the backward.

    Where that is one product over [dy | dy s B], copying dy to rows with room is cheaper than adding LoRA's part to dx
    afterwards; where it is not (dropout, weights used where they lie), dy serves as it is.
    """
    if weights.matrix is None or bits is not None:
        return rows_of(dy, group.width)
    rows = new_rows(dy.shape[0], group.rows, group.width, weights)
    copy_rows(dy, rows.plain)
    return rows


def low_rank(x: Rows, group: Group, weights: Weights, bits: torch.Tensor | None = None) -> None:
    """T = drop(x) A^T into x.tail."""
    if bits is None:
        if group.width:
            torch.mm(x.plain, weights.a.T, out=x.tail)
        return
    used = sum(group.ranks)
    masked_product(x.plain, bits, weights.a[:used], group.ranks, group.dropout, out=x.tail[:, :used])
    x.tail[:, used:].zero_()


def group_forward(
    x: Rows,
    group: Group,
    weights: Weights,
    bits: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    known: bool = False,
) -> torch.Tensor:
    """y (N, O); T is left in x.tail.

    Args:
        x: in the dtype of `weights`.
        weights: of `assemble`.
        bits: of `draw_bits`.
        residual: (N, O) added before the rounding, in x's dtype or fp32 (then y is fp32).
        out: (N, O) of any row stride to write y to; may be `residual`.
        known: T is in x.tail already.
    """
    require(x.plain.shape[1] == group.columns, "lora", f"x has {x.plain.shape[1]} columns, not {group.columns}")
    if not known:
        low_rank(x, group, weights, bits)
    y = out
    if y is None:
        y = torch.empty_like(residual) if residual is not None else x.plain.new_empty(x.plain.shape[0], group.rows)
    if residual is not None and residual is not y:
        y.copy_(residual)
    accumulate = residual is not None
    if x.whole is not None and weights.matrix is not None:
        _product(y, x.whole, weights.matrix[: group.rows], _bias(group.projections, x.plain), accumulate)
        return y
    # Rounded once: LoRA's part may be far below the rounding of y. Added to what is rounded already, it would be lost.
    once = bool(group.width) and y.dtype in HALVES
    for projections, span, base in _bases(group, weights, x.plain.dtype):
        total = y[:, span]
        if once:
            total = total.float() if accumulate else torch.zeros_like(total, dtype=torch.float32)
        _product(total, x.plain, base, _bias(projections, x.plain), accumulate or once)
        for (_, rows, columns), scaled in zip(group.blocks(), weights.scaled_b, strict=True):
            if span.start <= rows.start < span.stop:
                _accumulate(total[:, rows.start - span.start : rows.stop - span.start], x.tail[:, columns], scaled.T)
        if once:
            y[:, span].copy_(total)
    return y


def _bases(
    group: Group, weights: Weights, dtype: torch.dtype
) -> Iterator[tuple[tuple[Projection, ...], slice, torch.Tensor]]:
    """The frozen weights (O_p, K) with their projections and rows of O: at once where they stand together."""
    if weights.matrix is not None:
        yield group.projections, slice(0, group.rows), weights.matrix[: group.rows, : group.columns]
        return
    row = 0
    for projection, out in zip(group.projections, group.outs, strict=True):
        yield (projection,), slice(row, row + out), plain_weight(projection.weight, dtype).detach()
        row += out


def _bias(projections: tuple[Projection, ...], x: torch.Tensor) -> torch.Tensor | None:
    """(O,) in x's dtype, zeros for a projection without, None if none has one."""
    if all(projection.bias is None for projection in projections):
        return None
    parts = [
        x.new_zeros(projection.weight.shape[0]) if projection.bias is None else projection.bias.detach().to(x.dtype)
        for projection in projections
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, accumulate: bool
) -> None:
    """y (+)= x weight^T + bias."""
    if accumulate and bias is not None:  # rounded once
        total = y.to(torch.promote_types(y.dtype, torch.float32)) + bias
        _accumulate(total, x, weight.T)
        y.copy_(total)
    elif accumulate:
        _accumulate(y, x, weight.T)
    elif bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _accumulate(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """y += a b; y may be fp32 above 16-bit operands."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    elif y.is_cuda:
        torch.addmm(y, a, b, out_dtype=y.dtype, out=y)
    else:
        y += a.to(y.dtype) @ b.to(y.dtype)


def product32(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale a b with the fp32 accumulator kept: the result is not rounded to 16 bit."""
    if a.dtype in HALVES:
        if not a.is_cuda:
            return a.float() @ b.float() * scale
        nothing = torch.empty((), dtype=torch.float32, device=a.device)  # not read, as beta is 0
        return torch.addmm(nothing, a, b, out_dtype=torch.float32, beta=0, alpha=scale)
    return a @ b * scale


def group_backward(
    dy: Rows, group: Group, weights: Weights, bits: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dx (N, K); dy s B is left in dy.tail, from which `adapter_grads` makes the gradients of A and B.

    Args:
        weights, bits: those of the forward.
        out: (N, K) to write dx to.
    """
    project_back(dy, group, weights)
    dx = dy.plain.new_empty(dy.plain.shape[0], group.columns) if out is None else out
    if dy.whole is not None and weights.matrix is not None and bits is None:
        torch.mm(dy.whole, weights.matrix[:, : group.columns], out=dx)
        return dx
    # LoRA's part first: it may be far below the rounding of dx. Added to what is rounded already, it would be lost.
    used = sum(group.ranks)
    if bits is not None:
        masked_grad_x(dy.tail[:, :used], weights.a[:used], bits, group.ranks, group.dropout, out=dx)
    elif used:
        torch.mm(dy.tail, weights.a, out=dx)
    total, written = dx, used > 0
    if weights.matrix is None and len(group.projections) > 1 and dx.dtype in HALVES:
        total = dx.float() if written else torch.zeros_like(dx, dtype=torch.float32)
        written = True
    for _, span, base in _bases(group, weights, dy.plain.dtype):
        if written:
            _accumulate(total, dy.plain[:, span], base)
        else:
            torch.mm(dy.plain[:, span], base, out=total)
        written = True
    return dx if total is dx else dx.copy_(total)


def project_back(dy: Rows, group: Group, weights: Weights) -> None:
    """dy s B into dy.tail: all that the gradient of A needs, also where nothing needs dx."""
    for (_, span, columns), scaled in zip(group.blocks(), weights.scaled_b, strict=True):
        torch.mm(dy.plain[:, span], scaled, out=dy.tail[:, columns])
    dy.tail[:, sum(group.ranks) :].zero_()


def adapter_grads(dy: Rows, x: Rows, group: Group, bits: torch.Tensor | None = None) -> list[torch.Tensor]:
    """dA_1, dB_1, dA_2, ... in fp32: dA = (dy s B)^T drop(x), dB = s dy^T T; both tails must be filled."""
    used = sum(group.ranks)
    if not used:
        return []
    if bits is None:
        grad_a = product32(dy.tail[:, :used].T, x.plain)
    else:
        grad_a = masked_grad_a(dy.tail[:, :used], x.plain, bits, group.ranks, group.dropout)
    blocks = group.blocks()
    grad_b = [product32(dy.plain[:, span].T, x.tail[:, columns], adapter.scale) for adapter, span, columns in blocks]
    return [grad for (_, _, columns), b in zip(blocks, grad_b, strict=True) for grad in (grad_a[columns], b)]


class _LoraGroup(torch.autograd.Function):
    """x, group, seed, *(A, B of every adapter) -> y; the frozen weights and biases get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, seed: torch.Tensor | None, *parameters: torch.Tensor) -> Any:
        del parameters  # they are the group's own tensors; autograd sees them through the argument list
        ctx.group, ctx.extended = group, prefers_extended(group, x.shape[0])
        weights = assemble(group, x.dtype, extended=ctx.extended)
        bits = draw_bits(group, x.shape[0], seed)
        rows = new_rows(x.shape[0], group.columns, group.width, weights)
        rows.plain.copy_(x)
        y = group_forward(rows, group, weights, bits)
        ctx.save_for_backward(x, rows.tail, bits)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, t, bits = ctx.saved_tensors
        group: Group = ctx.group
        weights = assemble(group, dy.dtype, extended=ctx.extended)
        rows = gradient_rows(dy, group, weights, bits)
        dx = group_backward(rows, group, weights, bits)
        grads = adapter_grads(rows, Rows(x, t), group, bits)
        return dx, None, None, *(g.to(p.dtype) for g, p in zip(grads, group.parameters, strict=True))


def lora_group(x: torch.Tensor, group: Group, seed: torch.Tensor | None = None) -> torch.Tensor:
    """All projections of `group` side by side: (N, K) -> (N, O), differentiable in x and in every A and B.

    Args:
        x: bf16, fp16 or fp32, any row stride.
        seed: () int64 on x's device; with it and a dropout above 0, masks are drawn (and replayed in the backward).

    Raises:
        ValueError: x does not fit the group.
    """
    require(x.dim() == 2 and x.shape[1] == group.columns, "lora", f"x is {tuple(x.shape)}, not (N, {group.columns})")
    result: torch.Tensor = _LoraGroup.apply(x, group, seed, *group.parameters)  # type: ignore[no-untyped-call]
    return result
