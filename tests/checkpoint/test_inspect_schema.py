"""docs/inspect-schema.md against reports of every kind: no key without a line, no line without a key, types as said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2tool.checkpoint.report import inspect_checkpoint
from qwen2tool.checkpoint.side_by_side import to_json
from tests.checkpoint.edits import drop, edit_config, put, rewrite
from tests.tiny import write_tiny

SCHEMA = Path(__file__).parents[2] / "docs" / "inspect-schema.md"
ROW = re.compile(r"\| `([^`]+)` \| ([a-z ]+) \|")
TYPES = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "object": dict, "null": type(None)}
K1 = "model.layers.1.self_attn.k_proj.bias"


def documented(heading: str) -> dict[str, str]:
    """path -> type of one part of the document."""
    part = SCHEMA.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return dict(ROW.findall(part))


@cache
def pattern(path: str) -> re.Pattern[str]:
    """A placeholder stands for one key, which may hold dots: names of tensors do."""
    return re.compile(re.sub(r"\\{\w+\\}", "(.+)", re.escape(path)))


def leaves(value: Any, opaque: set[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that is no further object or list; empty ones are leaves, what is `any` is not entered."""
    if any(pattern(known).fullmatch(path) for known in opaque):
        yield path, value
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, opaque, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from leaves(inner, opaque, f"{path}[]")
    else:
        yield path, value


def is_typed(value: Any, kind: str) -> bool:
    """Booleans are integers in Python, and must not pass for them here."""
    names = kind.split(" or ")
    if "any" in names:
        return True
    if isinstance(value, bool):
        return "boolean" in names
    return isinstance(value, tuple(t for name in names for t in _types(name)))


def _types(name: str) -> tuple[type, ...]:
    kind = TYPES[name]
    return kind if isinstance(kind, tuple) else (kind,)


def check(reports: list[dict[str, Any]], schema: dict[str, str]) -> tuple[set[str], set[str]]:
    """(paths without a line or of another type, lines that nothing matched)."""
    opaque = {path for path, kind in schema.items() if kind.split(" or ")[0] == "any"}
    wrong, seen = set(), set()
    for report in reports:
        for path, value in leaves(report, opaque):
            if value in ({}, []):
                inside = [known for known in schema if pattern(known).match(path)]
                wrong |= set() if inside or any(known.startswith(path) for known in schema) else {path}
                continue
            exact = [known for known in schema if pattern(known).fullmatch(path)]
            fitting = [known for known in exact if is_typed(value, schema[known])]
            seen |= set(fitting)
            wrong |= set() if fitting else {path}
            for known in schema:  # an object that has lines of its own
                if re.match(pattern(known).pattern + r"(\.|\[)", path):
                    seen.add(known)
    return wrong, set(schema) - seen


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[Any]:
    """Reports in which, together, every documented key has a value."""
    root = tmp_path_factory.mktemp("schema")
    whole, damaged, packed = (write_tiny(root / name, tie_word_embeddings=name == "whole") for name in
                              ("whole", "damaged", "packed"))  # fmt: skip
    drop(damaged, K1)
    put(damaged, "stray", torch.ones(2))
    put(damaged, "model.layers.0.self_attn.o_proj.bias", torch.ones(64))
    put(damaged, "model.layers.2.self_attn.k_proj.bias", torch.full((32,), 70000.0))
    put(damaged, "model.layers.0.self_attn.v_proj.bias", torch.zeros(32))
    put(damaged, "model.layers.0.mlp.up_proj.weight", torch.zeros(100, 64))
    put(damaged, "model.norm.weight", torch.full((63,), float("nan")))
    put(damaged, "model.layers.2.self_attn.v_proj.bias", torch.full((32,), float("inf")))
    (damaged / "consolidated.safetensors").write_bytes(b"")
    (damaged / "generation_config.json").write_bytes(b"")
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    slides = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": None}
    edit_config(damaged, rope_theta=1e6, rope_parameters=rope, **slides)
    packed_name = "model.layers.0.mlp.up_proj"
    rewrite(packed, lambda state: state.pop(f"{packed_name}.weight"))
    rewrite(packed, lambda state: state.update({"model.language_model.norm.weight": state.pop("model.norm.weight")}))
    put(packed, f"{packed_name}.qweight", torch.ones(4, 4, dtype=torch.int32))
    edit_config(packed, quantization_config={"quant_method": "gptq"}, dtype="half a float")
    edit_config(packed, architectures=["LlamaForCausalLM"])
    return [inspect_checkpoint(folder, values=True) for folder in (whole, damaged, packed)]


def test_every_key_has_a_line_and_every_line_a_key(reports):
    found = [json.loads(json.dumps(report.to_json())) for report in reports]
    found[0]["files"]["unread"] = {"tokenizer.json": "as on the Hub"}
    found[0]["files"]["assumed"] = ["as of a file without config.json"]
    assert check(found, documented("A checkpoint")) == (set(), set())


def test_a_comparison(reports):
    found = json.loads(json.dumps(to_json(reports)))
    assert found["kind"] == "comparison" and len(found["reports"]) == 3
    assert check([found], documented("Several checkpoints")) == (set(), set())


def test_the_check_has_teeth(reports):
    schema = documented("A checkpoint")
    found = reports[0].to_json()
    assert check([found | {"surprise": 1}], schema)[0] == {"surprise"}
    assert check([found | {"exit_code": "0"}], schema)[0] == {"exit_code"}
    assert check([found | {"exit_code": True}], schema)[0] == {"exit_code"}
    assert "gone" in check([found], schema | {"gone": "string"})[1]
    found["biases"]["stats"]["0"]["k"]["median"] = 0.1
    assert check([found], schema)[0] == {"biases.stats.0.k.median"}
