"""Qwen2 as Llama says it, and back: one table of keys, its inverse, and one bias that has to be zero.

Llama's attention takes one switch, `attention_bias`, for q, k, v and o; Qwen2 always has the first three and never the
last. So a Qwen2 is a Llama with `attention_bias: true` and an `o_proj.bias` of zeros, bit for bit the same function
(fp32, fp16 and bf16, plain RoPE and YaRN). Without the switch every reader drops the biases in silence, and without the
explicit zeros engines other than transformers may leave that bias uninitialised. Llama has no window: a layer that
slides cannot be said. What it cannot say and does not need (the inert window's settings) is kept in config.json under
`KEPT`, with everything else that the way there changed, so that the way back is exact.

The way back is open while `o_proj.bias` is zero: full fine-tuning in Llama's layout trains it, and Qwen2 has no place
for it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from qwen2tool.checkpoint.biases import BIAS_DTYPES, read_vector
from qwen2tool.checkpoint.geometry import Config, geometry, with_both_spellings
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import AnyTensor, View, read
from qwen2tool.errors import EXIT_FINDING, UserError

KEPT = "qwen2tool_from_qwen2"
"""Key of config.json in Llama's layout: {"removed": keys and values that went, "added": keys that came}."""
LLAMA_KEYS: Config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "mlp_bias": False,
}
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")
OUTPUT_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.o_proj\.bias")
MLP_BIAS = re.compile(r"model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj\.bias")


def is_zero(bias: AnyTensor) -> bool:
    """Whether a bias holds nothing but zeros; a stored one is read without torch, which takes a second to import."""
    if isinstance(bias, TensorInfo) and bias.dtype in BIAS_DTYPES:
        return not read_vector(bias).any()
    return not bool(read(bias).any())


def output_bias_name(layer: int) -> str:
    """The bias that Llama's layout has and Qwen2's has not."""
    return f"model.layers.{layer}.self_attn.o_proj.bias"


def to_llama_config(config: Config) -> Config:
    """The config of a Qwen2 in Llama's words; `KEPT` holds what brings the original back.

    Raises:
        UserError: a layer slides.
    """
    shape = geometry(config)
    if shape.sliding_layers:
        raise UserError(
            f"config.json: {len(shape.sliding_layers)} layers slide (the first is layer {shape.sliding_layers[0]}), "
            "and Llama has no sliding window",
            "Keep this model in Qwen2's layout",
        )
    changes = LLAMA_KEYS | {"head_dim": shape.head_dim}
    removed = {key: config[key] for key in (*changes, *WINDOW_KEYS) if key in config}
    kept = {key: value for key, value in config.items() if key not in WINDOW_KEYS}
    added = sorted(key for key in changes if key not in config)
    return kept | changes | {KEPT: {"removed": removed, "added": added}}


def to_qwen2_config(config: Config) -> Config:
    """The inverse of `to_llama_config`; for a config that another tool llamafied, the Qwen2 that it must have been."""
    record = config.get(KEPT)
    if record is None:
        layers = geometry(config).num_hidden_layers
        kept = {key: value for key, value in config.items() if key not in LLAMA_ONLY + WINDOW_KEYS}
        named = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        return kept | named | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    removed, added = _record(record)
    kept = {key: value for key, value in config.items() if key != KEPT and key not in added}
    return kept | removed


def _record(record: Any) -> tuple[Config, list[str]]:
    sides = (record.get("removed"), record.get("added")) if isinstance(record, dict) else (None, None)
    allowed = {*LLAMA_KEYS, *WINDOW_KEYS, "head_dim"}
    match sides:
        case dict() as removed, list() as added if {*removed, *map(str, added)} <= allowed:
            if removed.get("model_type") == "qwen2":
                return removed, added
    raise UserError(
        f"config.json: {KEPT} is not what a conversion to Llama's layout wrote",
        "Restore config.json, or remove that key to have the Qwen2 fields rebuilt from the rest of it",
    )


def qwen2_of_llama(view: View) -> View:
    """The Qwen2 in a view whose tensors and config are Llama's; missing q/k/v biases stay missing.

    Raises:
        UserError: a bias that Qwen2 has no place for: one of the MLP, or an `o_proj.bias` that is not zero.
    """
    tensors: dict[str, AnyTensor] = {}
    for name, tensor in view.tensors.items():
        if MLP_BIAS.fullmatch(name):
            raise UserError(
                f"{view.path}: holds {name}, and a Qwen2 has no bias in its MLP",
                "Keep this model in Llama's layout",
                EXIT_FINDING,
            )
        if not OUTPUT_BIAS.fullmatch(name):
            tensors[name] = tensor
        elif not is_zero(tensor):
            raise UserError(
                f"{view.path}: {name} is not zero: it was trained, and Qwen2 has no place for it",
                "Keep this model in Llama's layout",
                EXIT_FINDING,
            )
    config = with_both_spellings(to_qwen2_config(view.config))
    kind = "Llama layout" if view.config.get("attention_bias") else "Llama layout, attention_bias off"
    return replace(view, config=config, geometry=geometry(config), tensors=tensors, kind=_joined(kind, view.kind))


def _joined(kind: str, stored: str) -> str:
    return kind if stored in ("", "qwen2", "llama") else f"{kind}, {stored}"
