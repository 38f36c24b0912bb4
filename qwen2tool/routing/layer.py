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

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from qwen2tool.kernels.attention import Sequences, attend
from qwen2tool.kernels.group import Group, Weights, assemble, prefers_extended
from qwen2tool.kernels.lora import (
    Rows,
    adapter_grads,
    draw_bits,
    group_backward,
    group_forward,
    low_rank,
    new_rows,
    project_back,
    rows_of,
)
from qwen2tool.kernels.nf4 import Quantised
from qwen2tool.kernels.rmsnorm import rms_norm_backward, rms_norm_forward
from qwen2tool.kernels.rope import rope_backward, rope_forward
from qwen2tool.kernels.rows import copy_rows
from qwen2tool.kernels.swiglu import swiglu_backward, swiglu_forward
from qwen2tool.routing.examine import LayerSpec
from qwen2tool.routing.host import HostStore, Ticket

Keep = Literal["input", "mlp", "attention", "all"]
"""What a layer keeps for its backward beside x: nothing; gate and up; q, k, v, attention's output and h; all four."""


class Place(NamedTuple):
    """Where what a layer keeps waits: x, and gate and up, on the device or in `host`."""

    host: HostStore
    x: bool = False
    gate_up: bool = False


@dataclass(frozen=True)
class Call:
    """What all layers of one pass share.

    Attributes:
        sequences: where attention may look.
        cos, sin: (N, head_dim / 2) fp32, one row a token.
        dtype: of products; x itself may be fp32.
        seed: () int64 on the device, or None where no dropout is on.
        frugal: unpack weights again rather than hold them from the recomputation to the backward.
    """

    sequences: Sequences
    cos: torch.Tensor
    sin: torch.Tensor
    dtype: torch.dtype
    seed: torch.Tensor | None = None
    frugal: bool = False


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
    return _Kept(tails, attention if whole else None, h if whole else None, mlp, ticket, host)


def _kept_gate_up(kept: _Kept, spec: LayerSpec) -> Rows | None:
    if not isinstance(kept.gate_up, Ticket):
        return kept.gate_up
    assert kept.host is not None
    buffer, group = kept.host.take(kept.gate_up), spec.gate_up
    if buffer.shape[1] == group.rows:
        return rows_of(buffer, group.width)
    return Rows(buffer[:, : group.rows], buffer[:, group.rows :], buffer)


class _Operands:
    """A group with its weights, its masks, its input rows, and whether T stands in the rows already."""

    def __init__(self, group: Group, tokens: int, call: Call, *, extended: bool, known: bool) -> None:
        self.group, self.known, self._call, self._extended = group, known, call, extended
        self.bits = draw_bits(group, tokens, call.seed)
        self._weights: Weights | None = None
        self.rows: Rows

    @property
    def weights(self) -> Weights:
        if self._weights is None:
            self._weights = assemble(self.group, self._call.dtype, extended=self._extended)
        return self._weights

    def pause(self) -> None:
        """Called where the weights are not needed for a while."""
        if self._call.frugal:
            self._weights = None

    def fill_tail(self) -> None:
        if not self.known:
            low_rank(self.rows, self.group, self.weights, self.bits)

    def forward(self, **options: Any) -> torch.Tensor:
        return group_forward(self.rows, self.group, self.weights, self.bits, known=self.known, **options)

    def backward(self, dy: Rows) -> torch.Tensor:
        return group_backward(dy, self.group, self.weights, self.bits)

    def grads(self, dy: Rows) -> list[torch.Tensor]:
        return adapter_grads(dy, self.rows, self.group, self.bits)


def _prepare(group: Group, tokens: int, call: Call, tail: torch.Tensor | None) -> _Operands:
    """Operands with uninitialised rows for the input; T as it was, where it was kept."""
    operands = _Operands(group, tokens, call, extended=prefers_extended(group, tokens), known=tail is not None)
    operands.rows = new_rows(tokens, group.columns, group.width, operands.weights)
    if tail is not None:
        operands.rows.tail.copy_(tail)
    return operands


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: Group,
    call: Call,
    tail: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> tuple[_Operands, torch.Tensor]:
    """norm(x) as the input of `group`, and the norm's reciprocal deviation (N,); x itself into `copy`."""
    operands = _prepare(group, x.shape[0], call, tail)
    _, rstd = rms_norm_forward(x, weight, eps, out=operands.rows.plain, copy=copy)
    return operands, rstd


def _attention(operands: _Operands, spec: LayerSpec, call: Call, centre: torch.Tensor | None) -> _Attention:
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


def _o_operands(attention: _Attention, spec: LayerSpec, call: Call, tail: torch.Tensor | None = None) -> _Operands:
    """Attention's output lies where attention put it, so o_proj has the separate form."""
    group, rows = spec.o, attention.output.detach().flatten(1)
    quantised = isinstance(group.projections[0].weight, Quantised)
    operands = _Operands(group, rows.shape[0], call, extended=quantised, known=tail is not None)
    operands.rows = rows_of(rows, group.width, tail)
    return operands


def _gate_up(operands: _Operands, spec: LayerSpec) -> Rows:
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
        h = torch.empty_like(x)  # x, to which o_proj then adds
        qkv, _ = _norm(x, spec.norm1, spec.eps, spec.qkv, call, copy=h)
        attention = _attention(qkv, spec, call, centre)
        tails = [qkv.rows.tail.clone()]  # behind x in one buffer, which would live on with it
        del qkv  # as those below: unpacked weights, and rows that the backward makes again
        o = _o_operands(attention, spec, call)
        o.forward(residual=h, out=h)
        tails.append(o.rows.tail)
        del o
        y = h if keep in ("input", "mlp") else torch.empty_like(h)
        operands, _ = _norm(h, spec.norm2, spec.eps, spec.gate_up, call, copy=None if y is h else y)
        gate_up = _gate_up(operands, spec)
        tails.append(operands.rows.tail.clone())
        del operands
        down = _prepare(spec.down, h.shape[0], call, None)
        swiglu_forward(gate_up.plain, out=down.rows.plain)
        down.forward(residual=y, out=y)
        tails.append(down.rows.tail.clone())
        ctx.spec, ctx.call, ctx.centre = spec, call, centre
        ctx.kept = _Kept()
        if any(ctx.needs_input_grad):
            ctx.kept = _keep(spec, keep, place, x, _Tails(*tails), attention, h, gate_up)
        ctx.save_for_backward(x if ctx.kept.x is None else None, *parameters)  # an in-place change is then refused
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        spec, call, kept = ctx.spec, ctx.call, ctx.kept
        tails = kept.tails or _Tails()
        if kept.host is not None:
            kept.host.fetch_below(spec.index)
        saved = ctx.saved_tensors[0]
        x = saved if kept.x is None else kept.host.take(kept.x)
        dy = dy.contiguous()
        ctx.kept = _Kept(x=kept.x, host=kept.host)  # other buffers are overwritten below; a second backward recomputes
        need_dx, (need_norm1, need_norm2) = ctx.needs_input_grad[0], ctx.needs_input_grad[-2:]
        attention, h = kept.attention, kept.h
        again = torch.empty_like(x) if h is None else None
        operands, rstd1 = _norm(x, spec.norm1, spec.eps, spec.qkv, call, tails.qkv, again)
        if attention is None:
            attention = _attention(operands, spec, call, ctx.centre)
            h = _o_operands(attention, spec, call, tails.o).forward(residual=again, out=again)
        operands.fill_tail()
        operands.pause()
        gate_up, kept = _kept_gate_up(kept, spec), kept._replace(gate_up=None)
        dh, mlp_grads, d_norm2 = _mlp_backward(dy, h, gate_up, tails, spec, call, need_norm2)
        del gate_up  # attention's gradients take its place
        d_qkv, o_grads = _attention_backward(dh.to(call.dtype), attention, operands, tails, spec, call)
        dx, d_norm1 = None, None
        if need_dx or need_norm1:
            dn = operands.backward(d_qkv)
            dx, d_norm1 = rms_norm_backward(dn, x, spec.norm1, rstd1, residual_grad=dh, need_weight=need_norm1, out=dh)
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
    h: torch.Tensor,
    gate_up: Rows | None,
    tails: _Tails,
    spec: LayerSpec,
    call: Call,
    need_norm: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """(dh, gradients of the adapters of gate, up and down, gradient of the norm's weight)."""
    operands, rstd = _norm(h, spec.norm2, spec.eps, spec.gate_up, call, tails.gate_up)
    if gate_up is None:
        gate_up = _gate_up(operands, spec)
    operands.fill_tail()
    operands.pause()
    d_gate_up, down_grads = _down_backward(dy.to(call.dtype), gate_up, tails, spec, call)
    dn = operands.backward(d_gate_up)
    grads = operands.grads(d_gate_up)
    dh, d_norm = rms_norm_backward(dn, h, spec.norm2, rstd, residual_grad=dy, need_weight=need_norm)
    return dh, [*grads, *down_grads], d_norm


def _down_backward(
    dy: torch.Tensor, gate_up: Rows, tails: _Tails, spec: LayerSpec, call: Call
) -> tuple[Rows, list[torch.Tensor]]:
    """(d[gate | up], written over gate_up; gradients of down's adapters)."""
    group, tail, tokens = spec.down, tails.down, dy.shape[0]
    operands = _Operands(group, tokens, call, extended=prefers_extended(group, tokens), known=tail is not None)
    d_rows = new_rows(tokens, group.rows, group.width, operands.weights)
    copy_rows(dy, d_rows.plain)  # cheaper than adding LoRA's part to the wider gradient of silu(gate) up
    inner = operands.backward(d_rows)  # its gradient first, and then silu(gate) up itself: here memory is at its peak
    swiglu_backward(inner, gate_up.plain, h_out=inner, out=gate_up.plain)
    operands.rows = rows_of(inner, group.width, tail)
    operands.fill_tail()
    return gate_up, operands.grads(d_rows)


def _attention_backward(
    dh: torch.Tensor, attention: _Attention, qkv: _Operands, tails: _Tails, spec: LayerSpec, call: Call
) -> tuple[Rows, list[torch.Tensor]]:
    """(d[q | k | v] before bias and RoPE, gradients of o's adapters)."""
    operands = _o_operands(attention, spec, call, tails.o)
    operands.fill_tail()
    d_rows = rows_of(dh, spec.o.width)
    d_output = operands.backward(d_rows)
    grads = operands.grads(d_rows)
    dq, dk, dv = torch.autograd.grad(attention.output, attention.leaves, d_output.view_as(attention.output))
    d_qkv = new_rows(dh.shape[0], spec.qkv.rows, spec.qkv.width, qkv.weights)
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
