"""The cases of benchmarks/kernels.py that hold matrix products or random bits; conventions as in kernel_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import LORAS, Call, Case, Sizes, randn, sets_for, several


def dequantise(s: Sizes, *, projections: int) -> Case:
    """A gate projection in NF4 with double quantisation, or gate and up, in one launch; a copy of as many bytes."""
    import bitsandbytes as bnb

    from qwen2tool.kernels import nf4

    count = projections * s.intermediate * s.hidden
    nbytes = count * (2 + 0.5 + 1 / 64 + 4 / (64 * 256))
    sets = sets_for(nbytes)
    weights = [[quantised(s, s.intermediate, s.hidden) for _ in range(projections)] for _ in range(sets)]
    ours = [[nf4.from_bnb(weight) for weight in together] for together in weights]

    def others(i: int) -> object:
        return [bnb.functional.dequantize_4bit(weight.data, weight.quant_state) for weight in weights[i]]

    def copy() -> Call:
        halves = [torch.randint(0, 255, (round(nbytes / 2),), dtype=torch.uint8, device=s.device) for _ in range(sets)]
        return lambda i: halves[i].clone()

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: nf4.dequantise(ours[i], torch.bfloat16),
        "torch": lambda: lambda i: [nf4.dequantise_reference(weight, torch.bfloat16) for weight in ours[i]],
        "bitsandbytes": lambda: others,
        "a copy": copy,
    }
    return Case(shape=f"{projections} x {s.intermediate} x {s.hidden}", runs=runs, sets=sets, bytes=nbytes)


def quantised(s: Sizes, rows: int, columns: int) -> Any:
    """A random bitsandbytes weight, (rows, columns)."""
    import bitsandbytes as bnb

    weight = randn(s, rows, columns, scale=columns**-0.5)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip


def head(s: Sizes) -> Case:
    """Head and loss, forward and backward to the hidden states; the head is frozen."""
    from qwen2tool.kernels.head import token_log_probs

    hidden = [x.requires_grad_() for x in several(s, 2, s.rows, s.hidden)]
    weight = randn(s, s.vocab, s.hidden, scale=2 * s.hidden**-0.5)
    targets = torch.randint(0, s.vocab, (s.rows,), device=s.device)

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        return lambda i: torch.autograd.grad(loss(hidden[i]), hidden[i])

    def liger() -> Call:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return gradient(lambda x: loss(weight, x, targets))

    def products(i: int) -> object:
        with torch.no_grad():
            return (hidden[i] @ weight.T) @ weight

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: gradient(lambda x: -token_log_probs(x, weight, targets).mean()),
        "torch": lambda: gradient(lambda x: F.cross_entropy(F.linear(x, weight).float(), targets)),
        "liger": liger,
        "products": lambda: products,
    }
    return Case(shape=f"{s.rows} x {s.hidden} x {s.vocab}", runs=runs, flops=4.0 * s.rows * s.hidden * s.vocab)


def lengths(s: Sizes, ragged: bool) -> list[int]:
    """Tokens of each sequence that the rows hold; ragged: in the ratio 1 : 2 : 3 : 4 : 6."""
    if not ragged:
        return [s.length] * (s.rows // s.length)
    parts = [s.rows * share // 16 for share in (1, 2, 3, 4)]
    return [*parts, s.rows - sum(parts)]


def attention(s: Sizes, ragged: bool, backward: bool) -> Case:
    from qwen2tool.kernels.attention import Sequences, attend

    each = lengths(s, ragged)
    offsets = torch.tensor([0, *each], device=s.device).cumsum(0).to(torch.int32)
    sequences = Sequences(offsets, max(each), None if ragged else (len(each), s.length))
    sets = sets_for(4.0 * s.rows * s.qk)
    leaves = [
        [randn(s, s.rows, heads, s.head_dim).requires_grad_(backward) for heads in (s.heads, s.kv_heads, s.kv_heads)]
        for _ in range(sets)
    ]
    grad = randn(s, s.rows, s.heads, s.head_dim)

    def gradient(function: Callable[..., torch.Tensor]) -> Call:
        if not backward:
            return lambda i: function(*leaves[i])
        return lambda i: torch.autograd.grad(function(*leaves[i]), leaves[i], grad)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """scaled_dot_product_attention as torch picks it, batched or one sequence at a time."""
        parts = zip(*(torch.split(x, each) for x in (q, k, v)), strict=True) if ragged else [(q, k, v)]
        batch = 1 if ragged else len(each)
        gqa = s.heads != s.kv_heads
        found = []
        for part in parts:
            heads = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in part)
            y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=gqa)
            found.append(y.transpose(1, 2).reshape(-1, *q.shape[1:]))
        return torch.cat(found)

    runs = {"ours": lambda: gradient(lambda *x: attend(*x, sequences)), "torch": lambda: gradient(eager)}
    forward = 2.0 * sum(n * n for n in each) * s.heads * s.head_dim
    shape = f"{'ragged, 5 sequences' if ragged else f'{len(each)} x {s.length}'}, {s.heads} x {s.head_dim}"
    return Case(shape=shape, runs=runs, sets=sets, flops=forward * (3.5 if backward else 1))


class Masked:
    """What the three products of q's, k's and v's LoRA under dropout share; masks as bits and as PEFT has them."""

    def __init__(self, s: Sizes) -> None:
        from qwen2tool.kernels.dropout import keep_bits, unpack_bits

        self.p, self.ranks = s.dropout, (s.rank,) * LORAS
        self.total = sum(self.ranks)
        bits = LORAS * s.rows * s.hidden / 8
        dense, thin = 2.0 * s.rows * s.hidden, 2.0 * s.rows * self.total
        self.product_bytes = dense + thin + bits + 2.0 * self.total * s.hidden
        self.grad_a_bytes = dense + thin + bits + 4.0 * self.total * s.hidden
        self.grad_x_bytes = dense + thin + bits + 2.0 * self.total * s.hidden
        self.flops = 2.0 * s.rows * s.hidden * self.total
        self.shape = f"{s.rows} x {s.hidden} x {'+'.join(map(str, self.ranks))}"
        self.sets = sets_for(self.product_bytes)
        self.a = randn(s, self.total, s.hidden, scale=s.hidden**-0.5)
        self.x, self.dx = (several(s, self.sets, s.rows, s.hidden) for _ in range(2))
        self.dt = several(s, self.sets, s.rows, self.total)
        seeds = [torch.tensor(i, device=s.device) for i in range(self.sets)]
        self.bits = [keep_bits(seed, 0, self.p, s.rows, s.hidden, LORAS, device=s.device) for seed in seeds]
        self.kept = [list(unpack_bits(bits, s.hidden)) for bits in self.bits]

    def split(self, tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        return tensor.split(list(self.ranks), dim)


def keep_bits(s: Sizes) -> Case:
    from qwen2tool.kernels import dropout

    seed = torch.tensor(1, device=s.device)
    shape = (LORAS, s.rows, s.hidden)
    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: dropout.keep_bits(seed, i, s.dropout, s.rows, s.hidden, LORAS, device=s.device),
        "torch": lambda: lambda i: torch.rand(shape, device=s.device) >= s.dropout,
    }
    nbytes = LORAS * s.rows * s.hidden / 8
    return Case(shape=" x ".join(map(str, shape)), runs=runs, sets=sets_for(nbytes), bytes=nbytes)


def masked_product(s: Sizes) -> Case:
    from qwen2tool.kernels import masked

    m = Masked(s)

    def eager(i: int) -> object:
        return [F.dropout(m.x[i], m.p) @ a.T for a in m.split(m.a, 0)]

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: masked.masked_product(m.x[i], m.bits[i], m.a, m.ranks, m.p),
        "torch": lambda: eager,
        "products": lambda: lambda i: m.x[i] @ m.a.T,
    }
    return Case(shape=m.shape, runs=runs, sets=m.sets, bytes=m.product_bytes, flops=m.flops)


def masked_grad_a(s: Sizes) -> Case:
    """torch has the dropped copies of x from its forward, three times the memory."""
    from qwen2tool.kernels import masked

    m = Masked(s)
    dropped = [[x * mask / (1 - m.p) for mask in masks] for x, masks in zip(m.x, m.kept, strict=True)]

    def eager(i: int) -> object:
        return [dt.T @ x for dt, x in zip(m.split(m.dt[i], 1), dropped[i], strict=True)]

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: masked.masked_grad_a(m.dt[i], m.x[i], m.bits[i], m.ranks, m.p),
        "torch": lambda: eager,
        "products": lambda: lambda i: m.dt[i].T @ m.x[i],
    }
    return Case(shape=m.shape, runs=runs, sets=m.sets, bytes=m.grad_a_bytes, flops=m.flops)


def masked_grad_x(s: Sizes) -> Case:
    from qwen2tool.kernels import masked

    m = Masked(s)
    dx, dt = m.dx, m.dt

    def eager(i: int) -> object:
        pieces = zip(m.split(dt[i], 1), m.split(m.a, 0), m.kept[i], strict=True)
        return sum((d @ a) * mask / (1 - m.p) for d, a, mask in pieces)

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda i: masked.masked_grad_x(dt[i], m.a, m.bits[i], m.ranks, m.p, out=dx[i]),
        "torch": lambda: eager,
        "products": lambda: lambda i: dt[i] @ m.a,
    }
    return Case(shape=m.shape, runs=runs, sets=m.sets, bytes=m.grad_x_bytes, flops=m.flops)


def lora_qkv(s: Sizes, backward: bool) -> Case:
    """q, k and v over NF4 weights with biases and LoRA, without dropout; the other is bitsandbytes' product and PEFT's.

    `products` is one product with weights that are there already in 16 bit, without LoRA.
    """
    import bitsandbytes as bnb

    from qwen2tool.kernels import nf4
    from qwen2tool.kernels.group import Adapter, Group, Projection
    from qwen2tool.kernels.lora import lora_group

    outs = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)
    weights = [quantised(s, out, s.hidden) for out in outs]
    biases = [randn(s, out) for out in outs]
    adapters = [(torch.randn(s.rank, s.hidden, device=s.device), torch.randn(o, s.rank, device=s.device)) for o in outs]
    parameters = [tensor.requires_grad_() for pair in adapters for tensor in pair]
    group = Group(
        tuple(
            Projection(nf4.from_bnb(weight), bias, (Adapter(a, b, 0.25),))
            for weight, bias, (a, b) in zip(weights, biases, adapters, strict=True)
        )
    )
    xs, total = [x.requires_grad_() for x in several(s, 2, s.rows, s.hidden)], sum(outs)
    grad, dense = randn(s, s.rows, total), randn(s, total, s.hidden)

    def peft(x: torch.Tensor) -> torch.Tensor:
        found = []
        for weight, bias, (a, b) in zip(weights, biases, adapters, strict=True):
            y = bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state, bias=bias)
            found.append(y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * 0.25)
        return torch.cat(found, 1)

    def call(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        if not backward:
            return lambda i: function(xs[i]).detach()
        return lambda i: torch.autograd.grad(function(xs[i]), [xs[i], *parameters], grad)

    def products(i: int) -> object:
        with torch.no_grad():
            y = xs[i] @ dense.T
            return (y, grad @ dense) if backward else y

    runs: dict[str, Callable[[], Call]] = {
        "ours": lambda: call(lambda x: lora_group(x, group)),
        "bitsandbytes": lambda: call(peft),
        "products": lambda: products,
    }
    lora = sum(s.rank * (s.hidden + out) for out in outs)
    flops = 2.0 * s.rows * (s.hidden * total * (2 if backward else 1) + lora * (3 if backward else 1))
    return Case(shape=f"{s.rows} x {s.hidden} x {total}, r {s.rank}", runs=runs, flops=flops)
