"""A Qwen (1) of our own: checkpoints as its tools save them, and its forward pass from the public description.

No release of transformers has this architecture; the published code comes with the checkpoints. The forward pass is
written from the technical report (arXiv 2309.16609): pre-norm RMSNorm, RoPE by halves, biases on q, k and v only, and
an MLP of w1(x) * silu(w2(x)).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, silu

from tests.tiny import write_shards

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "bf16": False, "fp16": False, "fp32": False,
    "hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4, "kv_channels": 16,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 32768, "seq_length": 256,
    "no_bias": True, "onnx_safe": None, "rotary_emb_base": 20000, "rotary_pct": 1.0, "scale_attn_weights": True,
    "softmax_in_fp32": False, "use_cache": True, "use_cache_kernel": False, "use_cache_quantization": False,
    "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "tie_word_embeddings": False,
    "transformers_version": "4.32.0", "vocab_size": 384,
}  # fmt: skip
FIRST_RELEASE = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions",
}  # fmt: skip
"""Keys that the first release spelled in another way."""
State = dict[str, torch.Tensor]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape, in the order of Qwen (1)'s own files."""
    hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
    width = config["kv_channels"] * config["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        rows = {
            "ln_1.weight": (hidden,), "attn.c_attn.weight": (3 * width, hidden), "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (hidden, width), "ln_2.weight": (hidden,), "mlp.w1.weight": (inner, hidden),
            "mlp.w2.weight": (inner, hidden), "mlp.c_proj.weight": (hidden, inner),
        }  # fmt: skip
        found |= {f"transformer.h.{layer}.{name}": shape for name, shape in rows.items()}
    return found | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def random_state(config: dict[str, Any], seed: int = 0) -> State:
    """fp32 weights whose biases and norms matter; k biases are large."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            noise[shape[0] // 3 : 2 * shape[0] // 3] *= 3
        elif ".ln_" in name:
            noise = 1 + 0.2 * noise
        elif "wte" not in name:
            noise = noise * shape[-1] ** -0.5
        state[name] = noise
    return state


def write_qwen1(path: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 2, **changes: Any) -> Path:
    """A folder at `path` without tokenizer; a change to None removes a key of config.json."""
    path.mkdir(parents=True)
    whole = CONFIG | changes
    config = {key: value for key, value in whole.items() if value is not None or key == "onnx_safe"}
    (path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.to(dtype) for name, tensor in random_state(CONFIG | config).items()}
    write_shards(path, state, shards)
    return path


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """x: (B, T, H, D); each half of a head turned with the other by position * base^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = 1.0 / base ** (torch.arange(0, half).float() / half)
    angle = torch.arange(x.shape[1]).float()[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


@torch.no_grad()
def forward(state: State, config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) in fp32 of tokens (B, T), at most `seq_length` of them, where nothing is scaled."""
    assert tokens.shape[1] <= config["seq_length"]
    state = {name: tensor.float() for name, tensor in state.items()}
    heads, width, eps = config["num_attention_heads"], config["kv_channels"], config["layer_norm_epsilon"]
    base, length = config["rotary_emb_base"], tokens.shape[1]
    future = torch.full((length, length), float("-inf")).triu(1)
    x = state["transformer.wte.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        own = {n.removeprefix(f"transformer.h.{layer}."): t for n, t in state.items() if f".h.{layer}." in n}
        fused = linear(norm(x, own["ln_1.weight"], eps), own["attn.c_attn.weight"], own["attn.c_attn.bias"])
        q, k, v = (part.unflatten(-1, (heads, width)) for part in fused.chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, base), rotate(k, base)) / width**0.5 + future
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
        x = x + linear(mixed, own["attn.c_proj.weight"])
        y = norm(x, own["ln_2.weight"], eps)
        x = x + linear(
            linear(y, own["mlp.w1.weight"]) * silu(linear(y, own["mlp.w2.weight"])), own["mlp.c_proj.weight"]
        )
    return linear(norm(x, state["transformer.ln_f.weight"], eps), state["lm_head.weight"])


def write_tiktoken(file: Path, tokenizer_json: Path, ordinary: int | None = None) -> dict[bytes, int]:
    """The ordinary tokens of a byte-level BPE tokenizer.json as a .tiktoken file; returns token -> rank."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    count = len(vocabulary) if ordinary is None else ordinary
    ranks = {bytes(byte_of[c] for c in text): rank for text, rank in vocabulary.items() if rank < count}
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    file.write_bytes(b"".join(lines))
    return ranks
