"""One decoder layer as one autograd node: forward and backward written out from the kernels.

    n1 = norm(x)              [q k v] = group(n1)           q, k += bias, RoPE, k -= centre (fp32, one rounding)
    h = x + group_o(attend(q, k, v))
    n2 = norm(h)              [g u] = group(n2)             y = h + group_down(silu(g) u)

Generic checkpointing runs all of it twice; here the backward recomputes what was not kept, and never `down_proj`, whose
output nothing needs: 22 % of the recomputation at the 7B geometry. LoRA's A and B and the norms are inputs of the node,
so hooks of DDP and `torch.autograd.grad` see their gradients. Attention is a small autograd graph inside, so no private
operator of torch is used.

Precision: the biases of q and k are added in fp32 behind the product, and keys are centred there; residuals are added
in the product's fp32 accumulator, before its one rounding; gradients of A and B keep the fp32 accumulator. The residual
stream x may be fp32 above 16-bit products. Legend: N tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from qwen2tool.kernels.attention import attend
from qwen2tool.kernels.group import Group, prefers_extended
from qwen2tool.kernels.lora import Rows, new_rows, project_back, rows_of
from qwen2tool.kernels.rmsnorm import rms_norm_backward, rms_norm_forward
from qwen2tool.kernels.rope import rope_backward, rope_forward
from qwen2tool.kernels.rows import copy_rows
from qwen2tool.kernels.swiglu import swiglu_backward, swiglu_forward
from qwen2tool.routing.examine import LayerSpec
from qwen2tool.routing.host import HostStore, Ticket
from qwen2tool.routing.operands import Call, Operands, prepare, with_room

Keep = Literal["input", "mlp", "attention", "all"]
"""What a layer keeps for its backward beside x: nothing; gate and up; q, k, v, attention's output and h; all four."""


class Place(NamedTuple):
    """Where what a layer keeps waits: x, and gate and up, on the device or in `host`."""

    host: HostStore
    x: bool = False
    gate_up: bool = False


class _Attention(NamedTuple):
    """Attention as a graph: leaves q, k, v and its output (N, heads, head_dim)."""

    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    output: torch.Tensor


class _Tails(NamedTuple):
    """T = drop(x) A^T of each group, (N, R): small (a ninth of x at rank 64), and dear to make again under dropout."""

    qkv: torch.Tensor | None = None
    o: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None


class _Kept(NamedTuple):
    """What the forward leaves for the backward beside an x that stays on the device; tickets stand for `host`'s."""

    tails: _Tails | None = None
    attention: _Attention | None = None
    h: torch.Tensor | None = None
    gate_up: Rows | Ticket | None = None
    x: Ticket | None = None
    host: HostStore | None = None


def _keep(
    spec: LayerSpec,
    keep: Keep,
    place: Place | None,
    x: torch.Tensor,
    tails: _Tails,
    attention: _Attention,
    h: torch.Tensor,
    gate_up: Rows,
) -> _Kept:
    ticket: Ticket | None = None
    mlp: Rows | Ticket | None = None
    if keep in ("mlp", "all"):
        mlp = gate_up
    if place is not None and place.x:
        ticket = place.host.put(spec.index, "x", x)
    if place is not None and place.gate_up:
        mlp = place.host.put(spec.index, "gate_up", gate_up.plain if gate_up.whole is None else gate_up.whole)
    whole = keep in ("attention", "all")
    host = place.host if place is not None else None
    if host is not None:
        host.let_go(spec.index)
    return _Kept(tails, attention if whole else None, h if whole else None, mlp, ticket, host)


def _kept_gate_up(kept: _Kept, spec: LayerSpec) -> Rows | None:
    if not isinstance(kept.gate_up, Ticket):
        return kept.gate_up
    assert kept.host is not None
    buffer, group = kept.host.take(kept.gate_up), spec.gate_up
    if buffer.shape[1] == group.rows:
        return rows_of(buffer, group.width)
    return Rows(buffer[:, : group.rows], buffer[:, group.rows :], buffer)


def _tail(operands: Operands, call: Call) -> torch.Tensor | None:
    """T to be kept: a copy, as it stands behind x in one buffer, which would live on with it."""
    return operands.rows.tail.clone() if call.tails else None


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: Group,
    call: Call,
    tail: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> tuple[Operands, torch.Tensor]:
    """norm(x) as the input of `group`, and the norm's reciprocal deviation (N,); x itself into `copy`."""
    operands = prepare(group, x.shape[0], call, tail)
    _, rstd = rms_norm_forward(x, weight, eps, out=operands.rows.plain, copy=copy)
    return operands, rstd


def _attention(operands: Operands, spec: LayerSpec, call: Call, centre: torch.Tensor | None) -> _Attention:
    """q, k, v from the norm's output, then attention with the graph that its backward needs."""
    qkv = operands.forward()
    d, geometry = spec.head_dim, {"heads": spec.heads, "kv_heads": spec.kv_heads}
    qk = qkv[:, : (spec.heads + spec.kv_heads) * d]
    rope_forward(qk, _qk_bias(spec), call.cos, call.sin, centre, **geometry, out=qk)
    parts = torch.split(qkv, [spec.heads * d, spec.kv_heads * d, spec.kv_heads * d], 1)
    shapes = (spec.heads, d), (spec.kv_heads, d), (spec.kv_heads, d)
    views = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))  # type: ignore[no-untyped-call]
    q, k, v = (view.detach().requires_grad_() for view in views)
    with torch.enable_grad():
        return _Attention((q, k, v), attend(q, k, v, call.sequences))


def _qk_bias(spec: LayerSpec) -> torch.Tensor | None:
    """(heads + kv_heads) * head_dim, None where neither has one."""
    if spec.q_bias is None or spec.k_bias is None:
        return None
    return torch.cat([spec.q_bias.detach(), spec.k_bias.detach()])


def _o_operands(attention: _Attention, spec: LayerSpec, call: Call, tail: torch.Tensor | None = None) -> Operands:
    """For the backward: attention's output as it lies."""
    group, rows = spec.o, attention.output.detach().flatten(1)
    extended = prefers_extended(group, rows.shape[0])
    operands = Operands(group, rows.shape[0], call, extended=extended, known=tail is not None)
    operands.rows = rows_of(rows, group.width, tail)
    return operands


def _add_o(
    attention: _Attention, spec: LayerSpec, call: Call, h: torch.Tensor, tail: torch.Tensor | None = None
) -> Operands:
    """h += o_proj(attention's output), rounded once.

    In the extended form that output is copied to rows with room for T. This takes as long as LoRA's part would, added
    to h by a product of its own, in which all that is below h's rounding would be lost: the first steps of a training.
    """
    operands = _o_operands(attention, spec, call, tail)
    if operands.weights.matrix is not None and spec.o.width:
        rows = operands.rows
        operands.rows = new_rows(len(rows.plain), spec.o.columns, spec.o.width, operands.weights)
        copy_rows(rows.plain, operands.rows.plain)
        if tail is not None:
            operands.rows.tail.copy_(tail)
    operands.forward(residual=h, out=h)
    return operands


def _gate_up(operands: Operands, spec: LayerSpec) -> Rows:
    """[gate | up], with room behind it for what the backward appends to its gradient."""
    group = spec.gate_up
    room = new_rows(operands.rows.plain.shape[0], group.rows, group.width, operands.weights)
    operands.forward(out=room.plain)
    return room


class _FusedLayer(torch.autograd.Function):
    """x (N, H), spec, call, centre, keep, place, *spec.parameters -> y (N, H)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        spec: LayerSpec,
        call: Call,
        centre: torch.Tensor | None,
        keep: Keep,
        place: Place | None,
        *parameters: torch.Tensor,
    ) -> Any:
        ctx.spec, ctx.call, ctx.centre = spec, call, centre
        spec = call.at_work(spec, spec.index + 1)
        h = torch.empty_like(x)  # x, to which o_proj then adds
        qkv, _ = _norm(x, spec.norm1, spec.eps, spec.qkv, call, copy=h)
        attention = _attention(qkv, spec, call, centre)
        tails = [_tail(qkv, call)]
        del qkv  # as those below: unpacked weights, and rows that the backward makes again
        tails.append(_tail(_add_o(attention, spec, call, h), call))
        y = h if keep in ("input", "mlp") else torch.empty_like(h)
        operands, _ = _norm(h, spec.norm2, spec.eps, spec.gate_up, call, copy=None if y is h else y)
        gate_up = _gate_up(operands, spec)
        tails.append(_tail(operands, call))
        del operands
        down = prepare(spec.down, h.shape[0], call, None)
        swiglu_forward(gate_up.plain, out=down.rows.plain)
        down.forward(residual=y, out=y)
        tails.append(_tail(down, call))
        ctx.kept = _Kept()
        if any(ctx.needs_input_grad):
            ctx.kept = _keep(spec, keep, place, x, _Tails(*tails), attention, h, gate_up)
        ctx.save_for_backward(x if ctx.kept.x is None else None, *parameters)  # an in-place change is then refused
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        with torch.autocast(dy.device.type, enabled=False):  # of a caller who leaves the backward inside
            return _layer_backward(ctx, dy)


def _layer_backward(ctx: Any, dy: torch.Tensor) -> Any:
    call, kept = ctx.call, ctx.kept
    goes_on = ctx.needs_input_grad[0] and ctx.spec.index > 0
    spec = call.at_work(ctx.spec, ctx.spec.index - 1 if goes_on else None)
    tails = kept.tails or _Tails()
    if kept.host is not None and goes_on:
        kept.host.fetch_below(spec.index)
    saved = ctx.saved_tensors[0]
    x = saved if kept.x is None else kept.host.take(kept.x)
    own = call.handed.take(dy, spec.index)
    # Other buffers are overwritten below: a second backward recomputes all that is not on the host.
    on_host = kept.gate_up if isinstance(kept.gate_up, Ticket) else None
    ctx.kept = _Kept(x=kept.x, gate_up=on_host, host=kept.host)
    need_dx, (need_norm1, need_norm2) = ctx.needs_input_grad[0], ctx.needs_input_grad[-2:]
    attention, h = kept.attention, kept.h
    again = torch.empty_like(x) if attention is None else None
    operands, rstd1 = _norm(x, spec.norm1, spec.eps, spec.qkv, call, tails.qkv, again)
    if again is not None:
        attention, h = _attention(operands, spec, call, ctx.centre), again
        _add_o(attention, spec, call, h, tails.o)
    operands.fill_tail()
    operands.pause()
    gate_up, kept = _kept_gate_up(kept, spec), kept._replace(gate_up=None)
    dh, mlp_grads, d_norm2 = _mlp_backward(dy, own, h, gate_up, tails, spec, call, need_norm2)
    del gate_up  # attention's gradients take its place
    d_qkv, o_grads = _attention_backward(dh, attention, operands, tails, spec, call)
    dx, d_norm1 = None, None
    if need_dx or need_norm1:
        dn = operands.backward(d_qkv)
        _, d_norm1 = rms_norm_backward(
            dn, x, spec.norm1, rstd1, residual_grad=dh.plain, need_weight=need_norm1, out=dh.plain
        )
        dx = call.handed.give(dh, spec.index)
    else:
        project_back(d_qkv, spec.qkv, operands.weights)
    grads = [*operands.grads(d_qkv), *o_grads, *mlp_grads, d_norm1, d_norm2]
    typed = [
        grad.to(parameter.dtype) if need and grad is not None else None
        for grad, parameter, need in zip(grads, spec.parameters, ctx.needs_input_grad[6:], strict=True)
    ]
    return dx, None, None, None, None, None, *typed


def _mlp_backward(
    dy: torch.Tensor,
    own: Rows | None,
    h: torch.Tensor,
    gate_up: Rows | None,
    tails: _Tails,
    spec: LayerSpec,
    call: Call,
    need_norm: bool,
) -> tuple[Rows, list[torch.Tensor], torch.Tensor | None]:
    """(dh with room for o's columns, gradients of the adapters of gate, up and down, gradient of the norm's weight).

    `own` is dy where it is ours to overwrite, and dh then takes its place.
    """
    operands, rstd = _norm(h, spec.norm2, spec.eps, spec.gate_up, call, tails.gate_up)
    if gate_up is None:
        gate_up = _gate_up(operands, spec)
    operands.fill_tail()
    operands.pause()
    dy = dy if own is not None else dy.contiguous()  # autograd may pass an expanded gradient
    d_gate_up, down_grads = _down_backward(dy, own, gate_up, tails, spec, call)
    dn = operands.backward(d_gate_up)
    grads = operands.grads(d_gate_up)
    dh = own if own is not None and own.tail.shape[1] == spec.o.width else with_room(h, spec.o.width)
    _, d_norm = rms_norm_backward(dn, h, spec.norm2, rstd, residual_grad=dy, need_weight=need_norm, out=dh.plain)
    return dh, [*grads, *down_grads], d_norm


def _down_backward(
    dy: torch.Tensor, own: Rows | None, gate_up: Rows, tails: _Tails, spec: LayerSpec, call: Call
) -> tuple[Rows, list[torch.Tensor]]:
    """(d[gate | up], written over gate_up; gradients of down's adapters)."""
    group, tail, tokens = spec.down, tails.down, dy.shape[0]
    operands = Operands(group, tokens, call, extended=prefers_extended(group, tokens), known=tail is not None)
    d_rows = operands.gradient(dy, own)
    inner = operands.backward(d_rows)  # its gradient first, and then silu(gate) up itself: here memory is at its peak
    swiglu_backward(inner, gate_up.plain, h_out=inner, out=gate_up.plain)
    operands.rows = rows_of(inner, group.width, tail)
    operands.fill_tail()
    return gate_up, operands.grads(d_rows)


def _attention_backward(
    dh: Rows, attention: _Attention, qkv: Operands, tails: _Tails, spec: LayerSpec, call: Call
) -> tuple[Rows, list[torch.Tensor]]:
    """(d[q | k | v] before bias and RoPE, gradients of o's adapters)."""
    operands = _o_operands(attention, spec, call, tails.o)
    operands.fill_tail()
    d_rows = operands.gradient(dh.plain, dh)
    d_output = operands.backward(d_rows)
    grads = operands.grads(d_rows)
    dq, dk, dv = torch.autograd.grad(attention.output, attention.leaves, d_output.view_as(attention.output))
    d_qkv = new_rows(dh.plain.shape[0], spec.qkv.rows, spec.qkv.width, qkv.weights)
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    d_q, d_k, d_v = torch.split(d_qkv.plain, [queries, keys, keys], 1)
    rope_backward(dq.flatten(1).contiguous(), call.cos, call.sin, heads=spec.heads, kv_heads=0, out=d_q)
    rope_backward(dk.flatten(1).contiguous(), call.cos, call.sin, heads=0, kv_heads=spec.kv_heads, out=d_k)
    copy_rows(dv.flatten(1).contiguous(), d_v)
    return d_qkv, grads


def fused_layer(
    x: torch.Tensor,
    spec: LayerSpec,
    call: Call,
    *,
    centre: torch.Tensor | None = None,
    keep: Keep = "input",
    place: Place | None = None,
) -> torch.Tensor:
    """One decoder layer: (N, H) -> (N, H), differentiable in x, in every A and B and in both norms.

    Args:
        x: in call.dtype or fp32; y has x's dtype.
        spec: what the layer holds (`examine.examine_layer`).
        call: what all layers of the pass share.
        centre: (kv_heads * head_dim,) fp32 subtracted from the keys (`kernels.rope.key_centre`), a constant.
        keep: what to keep for the backward; the rest is recomputed.
        place: where it waits, None: on the device.
    """
    with torch.autocast(x.device.type, enabled=False):
        result: torch.Tensor = _FusedLayer.apply(x, spec, call, centre, keep, place, *spec.parameters)  # type: ignore[no-untyped-call]
    return result
