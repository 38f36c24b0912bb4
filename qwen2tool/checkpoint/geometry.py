"""config.json as a geometry: the numbers that fix every tensor's shape, and which tensors a whole checkpoint has.

Two generations of spellings are in use: transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`,
transformers 5 writes `rope_parameters` and `dtype`, and each misreads the other's file in silence (4.46 takes theta
10000 for a missing `rope_theta`). So both are read here, and a disagreement is kept for the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.header import refuse_dead_link, refuse_other_downloads
from qwen2tool.errors import UserError

Config = dict[str, Any]
LLAMA_THETA = 10000.0
"""What readers assume where a config names no RoPE base."""
MOST = 1 << 31
MOST_LAYERS = 10_000
"""Beyond any model; a larger number is a damaged file, and counting up to it would never end."""
MOST_NUMBER = 1e300
"""JSON holds whole numbers that no float does."""
AGAIN = "Repair the file or copy it again"
FULL_CONFIG = "Copy config.json again from where the checkpoint came from"
QWEN1_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
    "kv_channels": "head_dim",
    "attn_pdrop": "attention_dropout",
    "attn_dropout_prob": "attention_dropout",
}
"""Qwen (1)'s spelling, first release and later ones, to Qwen2's."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A decoder's shape. `sliding_layers` are the layers that really slide, whatever the raw flags say."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None
    sliding_layers: tuple[int, ...]
    dtype: str | None
    quantization: dict[str, Any] | None


def read_config(folder: Path) -> Config:
    """config.json of `folder`.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    refuse_dead_link(file)
    if not file.is_file():
        raise UserError(f"{folder}: not a checkpoint (no config.json)", "Name the folder that holds config.json")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is unreadable, or no object.
    """
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error)[:80] if text.rstrip().endswith(("}", "]")) else "it ends early" if text else "it is empty"
        raise UserError(f"{file}: not valid JSON ({why})", AGAIN) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{file}: holds {'an' if kind == 'int' else 'a'} {kind}, not an object", AGAIN)
    return value


def read_text(file: Path) -> str:
    """The UTF-8 text in `file`.

    Raises:
        UserError: it is no such text, or not the file itself.
    """
    data = file.read_bytes()
    refuse_other_downloads(file, data[:16])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})", AGAIN) from None


def geometry(config: Config) -> Geometry:
    """The geometry that `config` describes, with transformers' defaults for absent optional keys.

    Raises:
        UserError: a key that fixes a shape is missing or no positive integer, a flag is no flag.
    """
    if config.get("model_type") == "qwen":
        config = of_qwen1(config)
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    layers = _positive(config, "num_hidden_layers", most=MOST_LAYERS)
    theta, scaling = effective_rope(config)
    return Geometry(
        model_type=str(config.get("model_type")),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_positive(config, "num_key_value_heads", heads),
        head_dim=_positive(config, "head_dim", max(1, hidden // heads)),
        vocab_size=_positive(config, "vocab_size"),
        max_position_embeddings=_positive(config, "max_position_embeddings", 32768),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=config.get("model_type") in ("qwen", "qwen2") or _flag(config, "attention_bias"),
        sliding_window=config.get("sliding_window"),
        sliding_layers=sliding_layers(config, layers),
        dtype=_dtype(config),
        quantization=_section(config, "quantization_config") if "quantization_config" in config else None,
    )


def of_qwen1(config: Config) -> Config:
    """The config of a Qwen (1) with its geometry in Qwen2's keys; all other keys stay.

    It counts gate and up projection as one `intermediate_size`, has as many key as query heads of `kv_channels` (128
    where it says nothing), and is trained for `seq_length` positions, whatever `max_position_embeddings` promises.
    """
    edited = {**config, "kv_channels": 128 if config.get("kv_channels") is None else config["kv_channels"]}
    for old, new in QWEN1_KEYS.items():
        if edited.get(old) is not None:
            edited[new] = edited.pop(old)
    if type(edited.get("intermediate_size")) is int:
        edited["intermediate_size"] //= 2
    edited["num_key_value_heads"] = edited.get("num_attention_heads")
    return edited


def _positive(config: Config, key: str, default: int | None = None, most: int = MOST) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"config.json: {key} is {ascii(value)[:40]}, not a whole number from 1 to {most}", FULL_CONFIG)
    return value


def _flag(config: Config, key: str) -> bool:
    """A flag that is off where it is absent; the string "false" is true to one reader and an error to the next."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {ascii(value)[:40]}, not true or false", FULL_CONFIG)
    return bool(value)


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_NUMBER:
        raise UserError(f"config.json: {key} is {ascii(value)[:40]}, not a positive number", FULL_CONFIG)
    return float(value)


def _section(config: Config, key: str) -> dict[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {key} is {ascii(value)[:40]}, not an object", FULL_CONFIG)
    return value


def _dtype(config: Config) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    if value is not None and not isinstance(value, str):
        raise UserError(f"config.json: dtype is {ascii(value)[:40]}, not a name", FULL_CONFIG)
    return value


def effective_rope(config: Config) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and scaling as transformers 5 takes them: a `rope_scaling` that is set replaces `rope_parameters`.

    Raises:
        UserError: one of the keys is of another type.
    """
    scaling = _section(config, "rope_scaling") or _section(config, "rope_parameters") or {}
    theta = _number(scaling, "rope_theta", _number(config, "rope_theta", LLAMA_THETA))
    return theta, _scaling(scaling)


def _scaling(section: dict[str, Any]) -> dict[str, Any] | None:
    """What scales the RoPE in a section of either spelling; None for the plain RoPE."""
    kind = section.get("rope_type") or section.get("type") or "default"
    extra = {key: value for key, value in section.items() if key not in ("rope_theta", "rope_type", "type")}
    return {"rope_type": kind, **extra} if kind != "default" else None


def rope_disagreement(config: Config) -> str | None:
    """A sentence where readers of the two generations would take different RoPE bases or scalings, else None."""
    section, scaling = _section(config, "rope_parameters") or {}, _section(config, "rope_scaling") or {}
    if section.get("rope_theta") is not None:
        new = _number(section, "rope_theta", LLAMA_THETA)
        if config.get("rope_theta") is None:
            return f"rope_theta stands only in rope_parameters ({new:g}): transformers 4 will read {LLAMA_THETA:g}"
        old = _number(config, "rope_theta", LLAMA_THETA)
        if new != old:
            return f"rope_theta is {old:g} but rope_parameters says {new:g}: readers will disagree"
    if section and scaling and _scaling(section) != _scaling(scaling):
        return "rope_scaling and rope_parameters scale differently: readers will disagree"
    if _scaling(section) and not scaling:
        return "scaling stands only in rope_parameters: transformers 4 will not scale"
    return None


def sliding_layers(config: Config, layers: int) -> tuple[int, ...]:
    """Layers that attend through a window: `layer_types` where given, else transformers' i >= max_window_layers."""
    types = config.get("layer_types")
    if isinstance(types, list):
        return tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if not _flag(config, "use_sliding_window") or config.get("sliding_window", 4096) is None:
        return ()
    first = config.get("max_window_layers", 28)
    if type(first) is not int:
        raise UserError(f"config.json: max_window_layers is {ascii(first)[:40]}, not a whole number", FULL_CONFIG)
    return tuple(range(max(0, first), layers))


def expected_tensors(shape: Geometry) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a whole Qwen2 (or attention-biased Llama) checkpoint holds.

    Linear weights are (out_features, in_features). A tied head is no tensor of its own. Names and biases:
    transformers' Qwen2ForCausalLM; Llama's `attention_bias` adds one on o_proj as well.
    """
    hidden, inter = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if shape.attention_bias:
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{prefix}self_attn.o_proj.weight"] = (hidden, q)
        if shape.attention_bias and shape.model_type == "llama":
            tensors[f"{prefix}self_attn.o_proj.bias"] = (hidden,)
        tensors[f"{prefix}mlp.gate_proj.weight"] = (inter, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = (inter, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = (hidden, inter)
        tensors[f"{prefix}input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


def with_both_spellings(config: Config) -> Config:
    """A copy of `config` that readers of either generation take the same way; unknown keys stay as they are."""
    edited = dict(config)
    theta, scaling = effective_rope(config)
    edited["rope_theta"] = theta
    edited["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    if scaling:
        edited["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    elif edited.get("rope_scaling"):
        edited["rope_scaling"] = None  # says "default", which no reader needs and which hides rope_parameters
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        edited["dtype"] = edited["torch_dtype"] = dtype
    return edited
