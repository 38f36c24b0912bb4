"""The model card: what the Hub must know as YAML, then what a reader must know before loading it.

Only facts that were read from the files are written. A card that somebody wrote is used as it is, unless the Hub would
reject it; the empty template that PEFT and transformers write beside every save is nobody's card and is replaced.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from qwen2tool.checkpoint.adapter import Adapter
from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import Geometry, expected_tensors
from qwen2tool.console import format_number
from qwen2tool.errors import UserError
from qwen2tool.hub.origin import front_matter, is_local, without_paths
from qwen2tool.hub.values import BiasNorms

TEMPLATE_MARKS = ("# Model Card for Model ID", "[More Information Needed]")
MAX_VALUE = 200
"""Characters of one value of a sidecar on the card; whole records are in the file itself."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of a folder's past: `base` is a Hub id, `sidecars` maps a file name to its record."""

    base: str | None
    license: str | None
    sidecars: Mapping[str, Mapping[str, Any]]


def is_template(text: str) -> bool:
    """Whether a README.md is the unfilled form that PEFT and transformers write."""
    return all(mark in text for mark in TEMPLATE_MARKS)


def check_card(text: str, source: Path) -> bool:
    """Passes a written card that the Hub can take; returns whether it has front matter.

    Raises:
        UserError: its YAML is broken, or names a base model or data set by a local path, which the Hub rejects.
    """
    fields = front_matter(text, str(source))
    for key in ("base_model", "datasets"):
        values = fields.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if is_local(str(value)):
                raise UserError(
                    f"{source}: {key} is {value}, a local path, which the Hub rejects",
                    f"Write its Hub id (owner/name), or remove the {key} line",
                )
    return bool(fields)


def model_card(repo_id: str, checkpoint: Checkpoint, norms: Mapping[str, BiasNorms], origin: Origin) -> str:
    """The card of a whole checkpoint whose biases have been counted and measured."""
    shape = checkpoint.geometry
    parameters = sum(prod(size) for size in expected_tensors(shape).values())
    present, total = sum(n.count for n in norms.values()), 3 * shape.num_hidden_layers
    lines = [
        _header(origin, "transformers", "finetune", ["qwen2", "qwen2tool"]),
        f"# {repo_id.partition('/')[2]}",
        f"A Qwen2-architecture causal language model of {parameters:,} parameters, stored as "
        f"{_dtypes(info.dtype for info in checkpoint.tensors.values())}.",
        _table(("geometry", "value"), _geometry_rows(shape)),
        "## Biases",
        f"{present} of {total} q/k/v biases present. Whatever loads or converts this model must keep them: "
        "a Qwen2 without its biases answers gibberish.",
        _table(
            ("bias", "layers", "smallest norm", "largest norm"),
            [(p, n.count, format_number(n.smallest), format_number(n.largest)) for p, n in norms.items()],
        ),
        *_history(origin),
        "## Use",
        _model_snippet(repo_id),
        *_license_lines(origin),
    ]
    return "\n\n".join(lines) + "\n"


def adapter_card(repo_id: str, adapter: Adapter, origin: Origin) -> str:
    """The card of a LoRA adapter."""
    pairs = adapter.pairs.values()
    parameters = sum(pair.a.numel + pair.b.numel for pair in pairs)
    targets = sorted({pair.module.rpartition(".")[2] for pair in pairs})
    rows = [
        ("rank", _range(pair.rank for pair in pairs)),
        ("scaling (s in W + s B A)", _range(pair.scaling for pair in pairs)),
        ("adapted modules", len(adapter.pairs)),
        ("targets", ", ".join(targets)),
    ]
    base = f"`{origin.base}`" if origin.base else "its base model"
    lines = [
        _header(origin, "peft", "adapter", ["qwen2", "qwen2tool", "lora"]),
        f"# {repo_id.partition('/')[2]}",
        f"A LoRA adapter of {parameters:,} parameters for {base}, stored as "
        f"{_dtypes(info.dtype for pair in pairs for info in (pair.a, pair.b))}. The base's q/k/v biases are untouched.",
        _table(("adapter", "value"), rows),
        *_history(origin),
        "## Use",
        _adapter_snippet(repo_id, origin.base),
        *_license_lines(origin),
    ]
    return "\n\n".join(lines) + "\n"


def _header(origin: Origin, library: str, relation: str, tags: list[str]) -> str:
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origin.base:
        fields |= {"base_model": origin.base, "base_model_relation": relation}
    if origin.license:
        fields["license"] = origin.license
    return f"---\n{yaml.safe_dump(fields | {'tags': tags}, sort_keys=False)}---"


def _geometry_rows(shape: Geometry) -> list[tuple[str, object]]:
    rope = f"{shape.rope_theta:,.0f}"
    if shape.rope_scaling:
        rope += f", {shape.rope_scaling['rope_type']} scaling"
    return [
        ("layers", shape.num_hidden_layers),
        ("hidden size", shape.hidden_size),
        ("MLP size", shape.intermediate_size),
        ("attention heads", shape.num_attention_heads),
        ("key/value heads", shape.num_key_value_heads),
        ("head dimension", shape.head_dim),
        ("vocabulary", shape.vocab_size),
        ("positions", shape.max_position_embeddings),
        ("RoPE base", rope),
        ("sliding layers", len(shape.sliding_layers)),
        ("tied embeddings", "yes" if shape.tie_word_embeddings else "no"),
        ("quantisation", (shape.quantization or {}).get("quant_method", "none")),
    ]


def _table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def _dtypes(dtypes: Iterable[str]) -> str:
    counts = Counter(dtypes).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{dtype} ({count} tensors)" for dtype, count in counts)


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    ends = [format_number(value) for value in found[:: max(1, len(found) - 1)]]
    return " to ".join(ends)


def _history(origin: Origin) -> list[str]:
    """One list a sidecar, as it stands there, less the folders of local paths."""
    lines = []
    for name, record in origin.sidecars.items():
        items = [f"- {key}: `{_short(value)}`" for key, value in record.items()]
        lines += [f"## How it was made (`{name}`)", "\n".join(items) or "The record is empty."]
    return lines


def _short(value: Any) -> str:
    clean = without_paths(value)
    text = clean if isinstance(clean, str) else json.dumps(clean, ensure_ascii=False)
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _license_lines(origin: Origin) -> list[str]:
    return [] if origin.license else ["## Licence", "licence: that of the base model"]


def _model_snippet(repo_id: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}", dtype="auto")
```"""


def _adapter_snippet(repo_id: str, base: str | None) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base or "the base model that it was trained on"}", dtype="auto")
model = PeftModel.from_pretrained(base, "{repo_id}")
```"""
