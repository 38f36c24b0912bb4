"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, its metadata as a config.json.

GGUF keeps a model in one file: geometry and tokenizer as metadata, weights in blocks of 4 to 32 bits, biases and norms
in F32. Names follow one table. The config is rebuilt from the metadata; numbers that GGUF holds in fp32 come back as
the shortest decimal that is that fp32 number (1e-06, not 9.999999974752427e-07). What GGUF has no word for comes back
from the config.json that `convert` left inside (`STORED_CONFIG`), if that still describes the same function.

Two architectures hold a Qwen2: "qwen2", and "llama" for a llamafied one, whose q and k rows llama.cpp reorders (weights
and biases), so that its RoPE can turn neighbouring pairs. Here they are as they are stored: `convert.gguf_read` puts
them back.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Config, Geometry, geometry, with_both_spellings
from qwen2tool.checkpoint.gguf_header import GgufArray, GgufHeader, Value, read_gguf_header
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.errors import UserError

STORED_CONFIG = "qwen2tool.config"
"""Metadata key of the config.json that a file of ours was made from, as JSON."""
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NOT_STORED = ("auto_map", "quantization_config")
YARN_EXTRAS = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Settings of llama.cpp's YaRN that transformers' has no word for -> the value that changes nothing."""
NOT_THIS = "Use a GGUF file of a Qwen1.5, Qwen2, Qwen2.5, QwQ or CodeQwen model"
FULL_METADATA = "Get the file again, or make it again from its model: this key is needed"


def open_gguf(path: str | Path) -> Checkpoint:
    """The checkpoint in a GGUF file, or in all parts of a split one (any part may be named); no torch, no data.

    Names are Hugging Face's; a tensor that the table does not know keeps its own. Shapes are row-major. `config` has
    model_type "qwen2" or "llama" (as `general.architecture` says).

    Raises:
        UserError: no GGUF or a damaged one, a part that is missing, another architecture, or metadata that lacks a
            number or disagrees with the tensors.
    """
    headers = read_parts(Path(path))
    metadata = headers[0].metadata
    tensors: dict[str, TensorInfo] = {}
    for info in (info for header in headers for info in header.tensors.values()):
        name = huggingface_name(info.name)
        if name in tensors:
            raise UserError(f"{info.file}: holds {ascii(name)[:80]} twice", "Get the file again: it is damaged")
        tensors[name] = replace(info, name=name)
    config = config_of(headers[0].file, metadata, tensors)
    return Checkpoint(
        path=headers[0].file,
        config=config,
        geometry=geometry(config),
        tensors=tensors,
        shards=tuple(header.file for header in headers),
        leftovers=(),
        format="gguf",
        damaged=headers[0].damaged,
    )


def read_parts(path: Path) -> list[GgufHeader]:
    """The headers of all parts of the file that `path` is (a part of), in order.

    Raises:
        UserError: a part is missing, belongs to another file, or does not say which part it is.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder", "Name the .gguf file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file", "Check the path")
    name = PART.fullmatch(path.name)
    first = read_gguf_header(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return [first]
    if name is None or int(name[3]) != count:
        raise UserError(
            f"{path}: is one of {ascii(count)[:20]} parts, which its name does not say",
            "Give all parts their names: NAME-00001-of-0000N.gguf and so on, in one folder",
        )
    headers = [first if i == int(name[2]) else _part(path, name, i) for i in range(1, int(name[3]) + 1)]
    for number, header in enumerate(headers):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        if said != (number, count):
            raise UserError(
                f"{header.file}: says it is part {ascii(said[0])[:20]} of {ascii(said[1])[:20]} (counted from 0)",
                "Get all parts of one and the same upload",
            )
    total, found = headers[0].metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise UserError(
            f"{path}: the parts hold {found} tensors, not the {ascii(total)[:20]} that they were split from",
            "Get all parts of one and the same upload",
        )
    return headers


def _part(path: Path, name: re.Match[str], number: int) -> GgufHeader:
    file = path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf")
    if not file.is_file():
        raise UserError(f"{path}: part {file.name} is not there", f"Put {file.name} into {path.parent}")
    return read_gguf_header(file)


def huggingface_name(name: str) -> str:
    """The name that a tensor of a GGUF file has in a Hugging Face folder; an unknown one as it is."""
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}"
    return TOP_NAMES.get(name, name)


def config_of(file: Path, metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> Config:
    """config.json in both generations' spellings, rebuilt from `metadata` (keys: the public GGUF specification).

    Raises:
        UserError: another architecture, a missing or nonsensical number, or a feature that Qwen2 does not have.
    """
    facts = _Facts(file, metadata)
    layers, heads, hidden = (
        facts.whole("block_count"),
        facts.whole("attention.head_count"),
        facts.whole("embedding_length"),
    )
    head_dim = facts.whole("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.whole(key, head_dim) != head_dim:
            raise UserError(f"{file}: {facts.name(key)} is not the head size {head_dim}", NOT_THIS)
    if facts.get("expert_count"):
        raise UserError(f"{file}: a mixture of experts, not a Qwen2", NOT_THIS)
    config: Config = {
        "architectures": [ARCHITECTURES[facts.architecture]],
        "model_type": facts.architecture,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": facts.whole("feed_forward_length"),
        "max_position_embeddings": facts.whole("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": facts.whole("attention.head_count_kv", heads),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": facts.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": _dtype(tensors),
        "use_cache": True,
        "vocab_size": _vocabulary_rows(file, metadata, tensors),
    }
    config |= _layout_keys(facts.architecture, layers, tensors) | _token_ids(metadata)
    if head_dim * heads != hidden:
        config["head_dim"] = head_dim
    scaling = _rope_scaling(facts, config["max_position_embeddings"])
    if scaling:
        config["rope_scaling"] = scaling
    return _with_stored(with_both_spellings(config), metadata)


class _Facts:
    """Metadata of one architecture, by keys without its prefix, each checked for its type."""

    def __init__(self, file: Path, metadata: dict[str, Value]) -> None:
        name = metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise UserError(
                f"{file}: general.architecture is {ascii(name)[:40]}, neither 'qwen2' nor a llamafied one's 'llama'",
                NOT_THIS,
            )
        self.file, self.metadata, self.architecture = file, metadata, name

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str) -> Value | None:
        return self.metadata.get(self.name(key))

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise UserError(f"{self.file}: {self.name(key)} is {_shown(value)}, not a positive number", FULL_METADATA)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise UserError(f"{self.file}: {self.name(key)} is {_shown(value)}, not a positive number", FULL_METADATA)
        return shortest(value)


def _shown(value: Value | None) -> str:
    if isinstance(value, GgufArray):
        return f"a list of {value.count}"
    return "missing" if value is None else ascii(value)[:40]


def shortest(value: float) -> float:
    """The number with the fewest decimals that fp32 rounds to `value`."""
    import numpy as np

    return float(str(np.float32(value)))


def _layout_keys(architecture: str, layers: int, tensors: dict[str, TensorInfo]) -> Config:
    if architecture == "llama":
        return {"attention_bias": any(name.endswith("_proj.bias") for name in tensors), "mlp_bias": False}
    return {"max_window_layers": layers, "sliding_window": None, "use_sliding_window": False}


def _token_ids(metadata: dict[str, Value]) -> Config:
    ids = {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    return {key: value for key, value in ids.items() if type(value) is int}


def _vocabulary_rows(file: Path, metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> int:
    table, tokens = tensors.get("model.embed_tokens.weight"), metadata.get("tokenizer.ggml.tokens")
    if table is not None:
        return table.shape[0]
    if isinstance(tokens, GgufArray):
        return tokens.count
    raise UserError(f"{file}: holds no token_embd.weight and no tokens", "Get the file again, it holds no model")


def _dtype(tensors: dict[str, TensorInfo]) -> str:
    """The dtype of all matrices where it is one that torch has; block types dequantise to fp32."""
    kinds = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    return DTYPES.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _rope_scaling(facts: _Facts, context: int) -> dict[str, Any] | None:
    """Linear or YaRN; llama.cpp's defaults for beta and attention factor are transformers'."""
    kind = facts.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{facts.file}: {facts.name('rope.scaling.type')} is {_shown(kind)}, which Qwen2 does not have", NOT_THIS
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": facts.real("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    for key, neutral in YARN_EXTRAS.items():
        if facts.get(f"rope.scaling.{key}") not in (None, neutral):
            raise UserError(
                f"{facts.file}: {facts.name(f'rope.scaling.{key}')} is set, which no Qwen2 config can say", NOT_THIS
            )
    scaling["original_max_position_embeddings"] = facts.whole("rope.scaling.original_context_length", context)
    for key in ("beta_fast", "beta_slow"):
        if facts.get(f"rope.scaling.yarn_{key}") is not None:
            scaling[key] = facts.real(f"rope.scaling.yarn_{key}")
    return scaling


def _with_stored(config: Config, metadata: dict[str, Value]) -> Config:
    """The config that the file was made from, where it describes what the metadata describe; else `config`."""
    try:
        stored = json.loads(str(metadata.get(STORED_CONFIG)))
        same = isinstance(stored, dict) and _function(geometry(stored)) == _function(geometry(config))
    except (ValueError, TypeError, RecursionError, UserError):
        return config
    if not same:
        return config
    dtypes = {key: config["torch_dtype"] for key in ("dtype", "torch_dtype") if key in stored}
    return {key: value for key, value in stored.items() if key not in NOT_STORED} | dtypes


def _function(shape: Geometry) -> tuple[Any, ...]:
    """What decides the numbers that a model gives, floats as GGUF holds them."""
    whole = replace(shape, rms_norm_eps=0, rope_theta=0, rope_scaling=None, sliding_window=None, dtype=None)
    scaling = shape.rope_scaling
    if scaling and scaling["rope_type"] == "yarn":
        defaults = {"original_max_position_embeddings": shape.max_position_embeddings, "beta_fast": 32, "beta_slow": 1}
        scaling = defaults | scaling
    floats = {key: shortest(value) if isinstance(value, float) else value for key, value in (scaling or {}).items()}
    return whole, shortest(shape.rms_norm_eps), shortest(shape.rope_theta), floats
