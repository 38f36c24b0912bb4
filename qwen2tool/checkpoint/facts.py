"""What headers and config say of a checkpoint, section by section, as `report` serialises it.

Each function makes one section of `Report.to_json()`; the keys are documented in docs/inspect-schema.md. No tensor
data is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.config_faults import config_faults, other_class
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Config, effective_rope, expected_tensors, rope_disagreement
from qwen2tool.checkpoint.header import read_header
from qwen2tool.checkpoint.inventory import QKV, Inventory
from qwen2tool.checkpoint.names import find_renamed
from qwen2tool.errors import UserError

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BUFFER = "rotary_emb.inv_freq"
EVIDENCE = (
    (re.compile(r"\.quant_state\.bitsandbytes__(\w+)$"), "bitsandbytes {}"),
    (re.compile(r"\.SCB$"), "bitsandbytes int8"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$"), "packed integers (GPTQ or AWQ)"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


def geometry_section(checkpoint: Checkpoint) -> dict[str, Any]:
    shape = checkpoint.geometry
    return {
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "group_size": shape.num_attention_heads // shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "dtype": shape.dtype,
        "attention_bias": shape.attention_bias,
    }


def config_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """What of config.json is no number of the geometry and still decides what a reader makes of the tensors."""
    config = checkpoint.config
    return {
        "hidden_act": config.get("hidden_act", "silu"),
        "faults": list(config_faults(config, checkpoint.geometry.num_hidden_layers)),
        "other_class": other_class(config),
    }


def parameters_section(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters as the architecture counts them: a packed weight by its real size, a tied head not at all."""
    shape = checkpoint.geometry
    if shape.quantization is not None:
        sizes = {name: prod(dims) for name, dims in expected_tensors(shape).items()}
    else:
        sizes = {name: info.numel for name, info in checkpoint.tensors.items() if not name.endswith(BUFFER)}
    if shape.tie_word_embeddings:
        sizes.pop("lm_head.weight", None)
    total = sum(sizes.values())
    return {"total": total, "without_embedding": total - sum(sizes.get(name, 0) for name in VOCABULARY_TABLES)}


def tensors_section(checkpoint: Checkpoint, found: Inventory) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "numbers": 0})
        entry["tensors"] += 1
        entry["numbers"] += info.numel
    return {
        "count": len(checkpoint.tensors),
        "has_layers": any(name.startswith("model.layers.") for name in checkpoint.tensors),
        "dtypes": dict(sorted(dtypes.items())),
        "missing": list(found.missing),
        "extra": list(found.extra),
        "renamed": find_renamed(found.missing, found.extra),
        "misshapen": {n: {"found": list(f), "expected": list(e)} for n, (f, e) in found.misshapen.items()},
    }


def files_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """`open_checkpoint` has held every shard against the index both ways; what is left is its own sum."""
    counts = dict.fromkeys(checkpoint.shards, 0)
    for info in checkpoint.tensors.values():
        counts[info.file] += 1
    local = checkpoint.format == "safetensors" and checkpoint.commit is None
    shards = [
        {
            "name": shard.name,
            "bytes": checkpoint.size_of(shard),
            "tensors": count,
            "metadata": read_header(shard).metadata if local else None,
        }
        for shard, count in counts.items()
    ]
    declared = checkpoint.index.get("metadata") if checkpoint.index else None
    return {
        "format": checkpoint.format,
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "index": "none" if checkpoint.index is None else "consistent",
        "declared_bytes": declared.get("total_size") if isinstance(declared, dict) else None,
        "tensor_bytes": checkpoint.nbytes,
        "leftovers": [_leftover(checkpoint, path) for path in checkpoint.leftovers],
        "adapter": (checkpoint.folder / "adapter_config.json").is_file() if checkpoint.commit is None else None,
        "commit": checkpoint.commit,
        "unread": dict(checkpoint.unread),
        "assumed": list(checkpoint.assumed),
    }


def _leftover(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """What a file that nothing points to holds: `repeated` of its `tensors` are in the checkpoint already."""
    tensors = repeated = None
    if path.suffix == ".safetensors" and path.is_file():
        try:
            names = read_header(path).tensors.keys()
        except UserError:  # no part of the checkpoint, so its damage is nobody's
            names = None
        if names is not None:
            tensors, repeated = len(names), len(names & checkpoint.tensors.keys())
    return {"name": path.name, "tensors": tensors, "repeated": repeated}


def rope_section(checkpoint: Checkpoint) -> dict[str, Any]:
    shape, config = checkpoint.geometry, checkpoint.config
    disagreement = rope_disagreement(config)  # refuses what is no object, before it is looked into
    spelled = {"rope_theta": config, "rope_parameters": config.get("rope_parameters") or {}}
    return {
        "theta": shape.rope_theta,
        "scaling": shape.rope_scaling,
        "spelled_in": [key for key, where in spelled.items() if where.get("rope_theta") is not None],
        "readers": rope_by_reader(config),
        "disagreement": disagreement,
    }


def rope_by_reader(config: Config) -> dict[str, dict[str, Any]]:
    """RoPE as each kind of reader takes it from `config`.

    transformers 5 reads `rope_parameters`, and the older keys; transformers 4 only `rope_theta` and `rope_scaling`;
    older readers (transformers before 4.43, converters of that time) of `rope_scaling` only one whose kind is spelled
    `type`. Where a reader finds no theta it takes 10000.
    """
    scaling = {key: value for key, value in (config.get("rope_scaling") or {}).items() if key != "rope_theta"}
    old = {"rope_theta": config.get("rope_theta"), "rope_scaling": scaling}
    by_type = {key: value for key, value in scaling.items() if key != "rope_type"} if scaling.get("type") else {}
    configs = {"transformers 5": config, "transformers 4": old, "older": old | {"rope_scaling": by_type}}
    found = {reader: effective_rope(what) for reader, what in configs.items()}
    return {reader: {"theta": theta, "scaling": how} for reader, (theta, how) in found.items()}


def sliding_section(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
        "sliding_window": config.get("sliding_window"),
        "max_window_layers": config.get("max_window_layers"),
        "layer_types": isinstance(config.get("layer_types"), list),
        "layers": list(checkpoint.geometry.sliding_layers),
    }


def head_section(checkpoint: Checkpoint) -> dict[str, Any]:
    present = {"lm_head.weight", "lm_head.qweight"} & checkpoint.tensors.keys()
    return {"tied": checkpoint.geometry.tie_word_embeddings, "lm_head": "present" if present else "absent"}


def quantization_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """`evidence` counts tensors by the format that stores such parts."""
    evidence: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        for pattern, kind in EVIDENCE:
            match = pattern.search(name)
            if match:
                evidence[kind.format(*match.groups())] += 1
        if info.dtype.startswith("F8"):
            evidence["fp8"] += 1
        elif checkpoint.format == "gguf" and info.dtype not in PLAIN_DTYPES:
            evidence[f"GGUF {info.dtype}"] += 1
    return {"config": checkpoint.geometry.quantization, "evidence": dict(evidence)}


def biases_section(checkpoint: Checkpoint, found: Inventory) -> dict[str, Any]:
    """`layers` holds every layer; `present` and `dtypes` count q, k and v, `extra` names what no Qwen2 has.

    `read`, `stats`, `zero` and `not_finite` are filled in by `report` where the numbers can be read.
    """
    layers = checkpoint.geometry.num_hidden_layers
    there = [
        (layer, p)
        for layer, states in found.biases.items()
        for p in QKV
        if layer < layers and states.get(p) == "present"
    ]
    dtypes = Counter(checkpoint.tensors[f"model.layers.{layer}.self_attn.{p}_proj.bias"].dtype for layer, p in there)
    extra = [
        f"{layer}.{p}" for layer, states in found.biases.items() for p, state in states.items() if state == "extra"
    ]
    return {
        "expected": 3 * layers,
        "present": len(there),
        "missing": 3 * layers - len(there),
        "extra": extra,
        "dtypes": dict(sorted(dtypes.items())),
        "layers": {str(layer): states for layer, states in found.biases.items()},
        "read": False,
        "stats": None,
        "zero": [],
        "not_finite": [],
    }
