"""Qwen (1) as a Qwen2: the same computation under other names, up to the length it was trained for.

| Qwen (1)                         | Qwen2                                  |
| -------------------------------- | -------------------------------------- |
| transformer.wte, .ln_f, lm_head  | model.embed_tokens, model.norm, lm_head |
| transformer.h.N.ln_1, .ln_2      | input_layernorm, post_attention_layernorm |
| .attn.c_attn.{weight,bias}       | q_proj, k_proj, v_proj: its three thirds |
| .attn.c_proj                     | o_proj                                 |
| .mlp.w1, .mlp.w2, .mlp.c_proj    | up_proj, gate_proj, down_proj: w1(x) * silu(w2(x)) |

A third of a row-major matrix is a range of its bytes, so nothing is computed: every tensor of the view lies in a file.
What has no counterpart begins beyond `seq_length`: there Qwen (1) raises the base of its RoPE (`use_dynamic_ntk`) and
stretches its queries by log(position)/log(seq_length) (`use_logn_attn`). A Qwen2 does neither, so the converted model
says that it ends at `seq_length`, where both are exactly off.

Source: the model card and config.json of the published Qwen-7B; Qwen technical report (arXiv 2309.16609), section 2.3.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import (
    QWEN1_KEYS,
    Config,
    expected_tensors,
    geometry,
    of_qwen1,
    with_both_spellings,
)
from qwen2tool.checkpoint.header import TensorInfo
from qwen2tool.checkpoint.view import View
from qwen2tool.errors import UserError

TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
THIRDS = ("q", "k", "v")
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_bias|logn_tensor))$")
"""Tables that follow from config.json, which early savers stored."""
USUAL: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "rotary_pct": (1, 1.0),
    "scale_attn_weights": (True,),
    "pos_emb": ("rotary",),
    "apply_residual_connection_post_layernorm": (False,),
    "use_cache_quantization": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (),
    "rope_parameters": (),
    "layer_types": (),
}
"""The only values with which the table above is the whole truth; null is one as well."""
DROPPED = (
    *QWEN1_KEYS, "auto_map", "bf16", "fp16", "fp32", "use_flash_attn", "use_dynamic_ntk", "use_logn_attn",
    "use_cache_kernel", "softmax_in_fp32", "emb_dropout_prob", "embd_pdrop", "resid_pdrop", "onnx_safe", "n_inner",
    "n_positions", "tokenizer_class", "tokenizer_type", "params_dtype", "bias_dropout_fusion",
    "ffn_inter_padding_size", *USUAL,
)  # fmt: skip
"""Keys of Qwen (1) that say nothing to a Qwen2; the code that `auto_map` names must not be run for one."""
FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def view_of_qwen1(checkpoint: Checkpoint, max_length: int | None = None) -> View:
    """The Qwen2 that a Qwen (1) checkpoint is; every tensor is stored, a third of `c_attn` as its range of bytes.

    The view holds what the files hold: what is missing or left over is for the inventory to say.

    Args:
        max_length: the positions that the converted model shall claim, where not those it was trained for.

    Raises:
        UserError: quantised, an option that Qwen2 does not have, or a length at which the two differ.
    """
    _require_plain(checkpoint)
    config = checkpoint.config
    trained, beyond = of_qwen1(config)["max_position_embeddings"], _beyond(config)
    if max_length is not None and max_length > trained and beyond:
        raise UserError(
            f"{checkpoint.path}: beyond {trained} positions it {beyond}, which no Qwen2 does",
            f"Convert it for {trained} positions, the length it was trained for",
        )
    converted = to_qwen2_config(config, _stored_dtype(checkpoint))
    if max_length is not None:
        converted["max_position_embeddings"] = max_length
    return View(
        origin=checkpoint,
        config=converted,
        geometry=geometry(converted),
        tensors=_tensors(checkpoint),
        kind="Qwen 1",
        lossy=f"exact up to {trained} positions; beyond, the original {beyond}, which no Qwen2 does" if beyond else "",
    )


def to_qwen2_config(config: Config, dtype: str | None = None) -> Config:
    """config.json of the Qwen2 that a Qwen (1) with `config` is, both spellings in place; unknown keys stay.

    `dtype` (torch's name) is that of the files, for a config that names none.
    """
    kept = {key: value for key, value in of_qwen1(config).items() if key not in DROPPED}
    if kept["head_dim"] * kept["num_attention_heads"] == kept["hidden_size"]:
        del kept["head_dim"]  # what every reader assumes
    flagged = next((name for flag, name in FLAGS.items() if config.get(flag) is True), dtype)
    named = config.get("dtype") or config.get("torch_dtype") or flagged
    edited = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **kept,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }
    return with_both_spellings({**edited, "dtype": named} if named else edited)


def _require_plain(checkpoint: Checkpoint) -> None:
    config, path, file = checkpoint.config, checkpoint.path, checkpoint.folder / "config.json"
    packed = next((name for name in checkpoint.tensors if name.endswith((".qweight", ".SCB", ".absmax"))), None)
    if checkpoint.geometry.quantization is not None or packed:
        method = ascii((checkpoint.geometry.quantization or {}).get("quant_method", packed))[:60]
        raise UserError(f"{path}: a Qwen (1) quantised ({method})", "Convert the 16-bit checkpoint it was made from")
    for key, usual in USUAL.items():
        if config.get(key) is not None and config[key] not in usual:
            raise UserError(
                f"{file}: says {key}: {ascii(config[key])[:40]}, for which Qwen2 has no counterpart",
                "Use the original Qwen (1) tools for this model",
            )
    for key in ("seq_length", "layer_norm_epsilon"):
        if config.get(key) is None:
            raise UserError(f"{file}: has no {key}", "Copy config.json again from the original model")
    if (config.get("ffn_hidden_size") or config["intermediate_size"]) % 2:
        raise UserError(f"{file}: intermediate_size is odd, but gate and up share it", "Copy config.json again")


def _beyond(config: Config) -> str:
    """What Qwen (1) does beyond its trained length, in words; "" for nothing."""
    does = []
    if config.get("use_dynamic_ntk"):
        does.append("raises its RoPE base (use_dynamic_ntk)")
    if config.get("use_logn_attn"):
        does.append("stretches its queries (use_logn_attn)")
    return " and ".join(does)


def _stored_dtype(checkpoint: Checkpoint) -> str | None:
    table = checkpoint.tensors.get(TOP["model.embed_tokens.weight"])
    return FLOATS.get(table.dtype) if table else None


def _tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    stored = {name: info for name, info in checkpoint.tensors.items() if not BUFFERS.search(name)}
    found: dict[str, TensorInfo] = {}
    for name in (*expected_tensors(checkpoint.geometry), "lm_head.weight"):
        source, third = source_of(name)
        if source in stored and name not in found:
            found[name] = _named(stored[source], name, third)
    used = {source_of(name)[0] for name in found}
    return found | {name: info for name, info in stored.items() if name not in used}


def source_of(name: str) -> tuple[str, int | None]:
    """Where Qwen2's `name` is in a Qwen (1): (stored name, which third of it or None)."""
    if name in TOP:
        return TOP[name], None
    _, _, layer, rest = name.split(".", 3)
    if rest in LAYER:
        return f"transformer.h.{layer}.{LAYER[rest]}", None
    projection, kind = rest.removeprefix("self_attn.").split("_proj.")
    return f"transformer.h.{layer}.attn.c_attn.{kind}", THIRDS.index(projection)


def _named(info: TensorInfo, name: str, third: int | None) -> TensorInfo:
    if third is None:
        return replace(info, name=name)
    if not info.shape or info.shape[0] % 3:
        raise UserError(f"{info.file}: {info.name} of shape {list(info.shape)} has no three thirds", "Copy it again")
    size = info.nbytes // 3
    start = info.start + third * size
    shape = (info.shape[0] // 3, *info.shape[1:])
    return replace(info, name=name, shape=shape, start=start, end=start + size)
