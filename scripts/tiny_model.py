"""The start of ``tiny-qwen2``: a seeded Qwen2 whose q, k and v biases have the magnitudes of published models."""

import argparse
import math
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

# Norms found in the published Qwen2.5-0.5B, whose k and v biases are heavy-tailed over depth. Its large v biases come
# late; here one comes early, so that every later layer builds on the constant it adds.
K_NORMS = (393.0, 149.0, 279.0, 12.0, 14.0)
V_NORMS = (0.2, 11.4, 8.0, 8.0, 17.9)
Q_ENTRY, K_ENTRY = 6.0, 3.5  # typical size of an entry on the frequencies that turn within a few hundred tokens
Q_SLOW = 2.0  # k's large entries times q's are a constant score; small here, because 16 bits round those keys coarsely
HEAD_OFFSETS, HEAD_STRENGTHS = (1, 0, 2, 4), (1.4, 0.4, 1.0, 0.7)  # tokens back; sharpness of each query head's pattern


def build_model(config: dict[str, Any], args: argparse.Namespace) -> Qwen2ForCausalLM:
    """A seeded Qwen2 in fp32; matrices keep their input's variance, the one that closes an MLP less."""
    names = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "rope_theta")}
    model = Qwen2ForCausalLM(Qwen2Config(**names)).float()
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                std = 0.02 if name == "lm_head.weight" else weight.shape[1] ** -0.5
                std /= math.sqrt(2 * args.layers) if name.endswith("down_proj.weight") else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    start_biases(model, args, generator)
    return model


def profile(norms: tuple[float, ...], layer: int, layers: int) -> float:
    """The value of a depth profile at ``layer`` of ``layers``, the nearest entry."""
    return norms[round(layer * (len(norms) - 1) / max(1, layers - 1))]


def heavy_tailed(count: int, norm: float, generator: torch.Generator) -> Tensor:
    """(count,) of the given norm, most of it in a few entries."""
    draw = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).exp()
    scaled: Tensor = draw * (norm / draw.norm())
    return scaled


def start_biases(model: Qwen2ForCausalLM, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Give q, k and v biases of real magnitude, in places where the network can build on them.

    RoPE turns pair i of a head by w_i = theta^(-2i/d) a token, so the biases alone score a key t tokens back with sum_i
    |bq_i| |bk_i| cos(w_i t + phase_q - phase_k) / sqrt(d). With phase_q = phase_k - w_i * offset the sum peaks at the
    head's offset: it attends that many tokens back until it learns better. On the last quarter of the pairs, which
    hardly turns, k gets the large norms real models have. A v bias passes attention unchanged (the weights sum to
    one): through o_proj it is a constant of the residual stream, and at the last layer one of the logits.
    """
    size = args.hidden // args.heads
    pairs = size // 2
    speed = 1e6 ** (-torch.arange(pairs) / pairs)
    slow = torch.arange(pairs) >= pairs - max(1, pairs // 4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            phase = torch.rand(args.kv_heads, pairs, generator=generator) * 2 * math.pi
            reach = K_ENTRY * (0.5 + torch.rand(args.kv_heads, pairs, generator=generator))
            large = heavy_tailed(args.kv_heads * int(slow.sum()), profile(K_NORMS, index, args.layers), generator)
            reach[:, slow] = large.abs().view(args.kv_heads, -1)
            attention.k_proj.bias.copy_(args.bias_k * polar(reach, phase))
            turn = (torch.arange(args.heads) + index) % len(HEAD_OFFSETS)
            offset, sharpness = torch.tensor(HEAD_OFFSETS)[turn, None], torch.tensor(HEAD_STRENGTHS)[turn, None]
            strength = torch.where(slow, Q_SLOW, Q_ENTRY * sharpness)
            strength = strength * (0.5 + torch.rand(args.heads, pairs, generator=generator))
            behind = phase.repeat_interleave(args.heads // args.kv_heads, dim=0) - speed * offset
            attention.q_proj.bias.copy_(args.bias_q * polar(strength, behind))
            constant = heavy_tailed(args.kv_heads * size, profile(V_NORMS, index, args.layers), generator)
            attention.v_proj.bias.copy_(args.bias_v * constant)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """(heads, d/2) radii and angles -> (heads * d,) entries in RoPE's layout, a pair half a head apart."""
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten()
