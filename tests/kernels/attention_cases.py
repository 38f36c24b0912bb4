"""Packed sequences, random states, and what other implementations make of them: for the tests of attention."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from qwen2tool.kernels.attention import Sequences

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
LAYOUTS = [[9], [5, 1, 11], [1, 3, 1], [0, 7, 0, 4, 0, 0], [6, 6, 6]]  # plain, ragged, one token, empty, equal


def ragged(lengths, device="cpu"):
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return Sequences(offsets, max([1, *lengths]))


def uniform(batch, length, device="cpu"):
    return ragged([length] * batch, device)._replace(uniform=(batch, length))


def states(tokens, heads=4, kv_heads=2, width=16, seed=0, dtype=torch.float64, device="cpu"):
    """q, k, v and an incoming gradient; q and k are views into wider rows, as the engine's are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator, dtype=torch.float64)
    rows = rows.to(device, dtype).view(tokens, heads + 2 * kv_heads, width)
    grad = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64).to(device, dtype)
    return *(x.detach().requires_grad_() for x in rows.split([heads, kv_heads, kv_heads], dim=1)), grad


def sequence_by_sequence(function, q, k, v, lengths):
    """`function` of each sequence alone: (1, heads, T, D) -> (1, hq, T, D); results joined to (N, hq, D)."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    outs = [function(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts if len(part[0])]
    return torch.cat(outs)


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def eager(q, k, v):
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    return eager_attention_forward(module, q, k, v, mask, q.shape[3] ** -0.5)[0].transpose(1, 2)


def with_gradients(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)
