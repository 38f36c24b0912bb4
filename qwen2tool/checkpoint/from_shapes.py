"""A config for weights that come without one: what shapes fix is derived, what they cannot fix is assumed aloud.

Rows and columns give layers, hidden and intermediate size, vocabulary and the rows of q and of k and v. They do not
give the size of a head: 28 heads of 128 and 56 of 64 have the same weights. Nor do they give RoPE or the epsilon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd
from pathlib import Path

from qwen2tool.checkpoint.geometry import MOST_LAYERS, Config
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.errors import UserError

LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
NEEDS_CONFIG = "Put the model's config.json beside it"
THETA, EPSILON, POSITIONS = 1e6, 1e-6, 32768
"""What Qwen2 and Qwen2.5 publish."""
SMALL_HIDDEN = 1024
"""Up to this hidden size (the 0.5B models) heads are of 64, above it of 128."""


def config_from_shapes(file: Path, tensors: Mapping[str, TensorInfo]) -> tuple[Config, tuple[str, ...]]:
    """(config, sentences on what it assumes) of the Qwen2 or Llama layout that `tensors` are.

    Raises:
        UserError: a tensor that fixes a size is missing or packed.
    """
    layers = [int(match[1]) for match in map(LAYER.match, tensors) if match]
    if not layers or max(layers) >= MOST_LAYERS:
        raise UserError(f"{file}: no config.json beside it, and no tensor named model.layers.*", NEEDS_CONFIG)
    layer = f"model.layers.{min(layers)}."
    vocabulary, hidden = _matrix(file, tensors, "model.embed_tokens.weight")
    q_rows = _matrix(file, tensors, f"{layer}self_attn.q_proj.weight")[0]
    kv_rows = _matrix(file, tensors, f"{layer}self_attn.k_proj.weight")[0]
    head = _head_dim(hidden, q_rows, kv_rows)
    kind = _model_type(tensors, layer)
    config: Config = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": _matrix(file, tensors, f"{layer}mlp.gate_proj.weight")[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": q_rows // head,
        "num_key_value_heads": kv_rows // head,
        "head_dim": head,
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if kind == "llama":
        config["attention_bias"] = True
    return config, _sentences(config, any(name.endswith("q_proj.bias") for name in tensors))


def _matrix(file: Path, tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, int]:
    info = tensors.get(name)
    if info is None:
        raise UserError(f"{file}: no config.json beside it, and no {name} to take a size from", NEEDS_CONFIG)
    if len(info.shape) != 2 or info.dtype in ("U8", "I8", "I32") or 0 in info.shape:
        raise UserError(f"{file}: no config.json beside it, and {name} is packed or no matrix", NEEDS_CONFIG)
    return info.shape[0], info.shape[1]


def _head_dim(hidden: int, q_rows: int, kv_rows: int) -> int:
    """The published one where it divides both, else the largest power of two below it that does."""
    usual = 64 if hidden <= SMALL_HIDDEN else 128
    return gcd(usual, q_rows, kv_rows)


def _model_type(tensors: Mapping[str, TensorInfo], layer: str) -> str:
    if f"{layer}self_attn.q_norm.weight" in tensors:
        return "qwen3"
    return "llama" if f"{layer}self_attn.o_proj.bias" in tensors else "qwen2"


def _sentences(config: Config, biases: bool) -> tuple[str, ...]:
    tied = "a tied head, since there is no lm_head.weight" if config["tie_word_embeddings"] else "a head of its own"
    sentences = [
        "there is no config.json: sizes are derived from the tensors' shapes",
        f"the size of a head cannot be derived: {config['head_dim']} is assumed, which makes "
        f"{config['num_attention_heads']} heads and {config['num_key_value_heads']} key/value heads",
        f"assumed as Qwen2 and Qwen2.5 publish them: RoPE theta {THETA:,.0f}, norm epsilon {EPSILON:g}, "
        f"{POSITIONS:,} positions, no sliding window; and {tied}",
    ]
    if config["model_type"] == "qwen2" and not biases:
        sentences.append("without biases and config.json a Qwen2 that lost them looks like a Llama: Qwen2 is assumed")
    return tuple(sentences)
