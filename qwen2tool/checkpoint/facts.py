"""What headers, config and tokenizer files say of a checkpoint, section by section, as `report` serialises it.

Each function makes one section of `Report.to_json()`, whose keys are documented there. No tensor data is read.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import INDEX_NAME, Checkpoint
from qwen2tool.checkpoint.geometry import expected_tensors, read_json, rope_disagreement
from qwen2tool.checkpoint.inventory import QKV, Inventory
from qwen2tool.checkpoint.tokens import read_vocabulary

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BUFFER = "rotary_emb.inv_freq"
EVIDENCE = (
    (re.compile(r"\.quant_state\.bitsandbytes__(\w+)$"), "bitsandbytes {}"),
    (re.compile(r"\.SCB$"), "bitsandbytes int8"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$"), "packed integers (GPTQ or AWQ)"),
)


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
        "missing": [*found.missing, *lost_when_packing(checkpoint)],
        "extra": list(found.extra),
        "misshapen": {n: {"found": list(f), "expected": list(e)} for n, (f, e) in found.misshapen.items()},
    }


def lost_when_packing(checkpoint: Checkpoint) -> list[str]:
    """Weights of a quantised checkpoint that are there neither plain nor packed (`take_inventory` exempts both)."""
    if checkpoint.geometry.quantization is None:
        return []
    weights = [name for name in expected_tensors(checkpoint.geometry) if name.endswith("_proj.weight")]
    there = checkpoint.tensors
    return [name for name in weights if name not in there and f"{name.removesuffix('weight')}qweight" not in there]


def files_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """`open_checkpoint` has held every shard against the index both ways; what is left is its own sum."""
    counts = dict.fromkeys(checkpoint.shards, 0)
    for info in checkpoint.tensors.values():
        counts[info.file] += 1
    shards = [{"name": s.name, "bytes": s.stat().st_size, "tensors": n} for s, n in counts.items()]
    index = checkpoint.path / INDEX_NAME
    metadata = read_json(index).get("metadata") if index.is_file() else None
    return {
        "bytes": sum(shard.stat().st_size for shard in checkpoint.shards),
        "shards": shards,
        "index": "consistent" if index.is_file() else "none",
        "declared_bytes": metadata.get("total_size") if isinstance(metadata, dict) else None,
        "tensor_bytes": checkpoint.nbytes,
        "leftovers": [path.name for path in checkpoint.leftovers],
    }


def rope_section(checkpoint: Checkpoint) -> dict[str, Any]:
    shape, config = checkpoint.geometry, checkpoint.config
    spelled = {"rope_theta": config, "rope_parameters": config.get("rope_parameters") or {}}
    return {
        "theta": shape.rope_theta,
        "scaling": shape.rope_scaling,
        "spelled_in": [key for key, where in spelled.items() if where.get("rope_theta") is not None],
        "disagreement": rope_disagreement(checkpoint.config),
    }


def sliding_section(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
        "sliding_window": config.get("sliding_window"),
        "max_window_layers": config.get("max_window_layers"),
        "layers": list(checkpoint.geometry.sliding_layers),
    }


def head_section(checkpoint: Checkpoint) -> dict[str, Any]:
    present = "lm_head.weight" in checkpoint.tensors
    return {"tied": checkpoint.geometry.tie_word_embeddings, "lm_head": "present" if present else "absent"}


def quantization_section(checkpoint: Checkpoint) -> dict[str, Any]:
    """`evidence` counts tensors by the format that stores such parts."""
    evidence: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        for pattern, kind in EVIDENCE:
            match = pattern.search(name)
            if match:
                key = kind.format(*match.groups())
                evidence[key] = evidence.get(key, 0) + 1
        if info.dtype.startswith("F8"):
            evidence["fp8"] = evidence.get("fp8", 0) + 1
    return {"config": checkpoint.geometry.quantization, "evidence": evidence}


def tokenizer_section(checkpoint: Checkpoint) -> dict[str, Any] | None:
    vocabulary = read_vocabulary(checkpoint.path)
    if vocabulary is None:
        return None
    table = checkpoint.tensors.get("model.embed_tokens.weight")
    return {
        "file": vocabulary.file,
        "count": vocabulary.count,
        "rows_needed": vocabulary.rows,
        "vocabulary_rows": table.shape[0] if table and table.shape else checkpoint.geometry.vocab_size,
    }


def chat_template(folder: Path) -> str | None:
    """The file that holds the chat template."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            return name
    settings = folder / "tokenizer_config.json"
    return settings.name if settings.is_file() and read_json(settings).get("chat_template") else None


def biases_section(checkpoint: Checkpoint, found: Inventory) -> dict[str, Any]:
    """`layers` holds every layer; `present` counts q, k and v only, `extra` names the biases that no Qwen2 has."""
    layers = checkpoint.geometry.num_hidden_layers
    present = sum(states.get(p) == "present" for layer, states in found.biases.items() if layer < layers for p in QKV)
    extra = [
        f"{layer}.{p}" for layer, states in found.biases.items() for p, state in states.items() if state == "extra"
    ]
    return {
        "expected": 3 * layers,
        "present": present,
        "missing": 3 * layers - present,
        "extra": extra,
        "layers": {str(layer): states for layer, states in found.biases.items()},
    }
