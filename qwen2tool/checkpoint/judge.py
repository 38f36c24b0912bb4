"""From the sections of a report to its verdict, its findings and its notes.

Works on the same plain values that `Report.to_json()` gives away, so that every sentence can be traced to a number a
reader sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen2tool.console import format_bytes

Sections = dict[str, Any]
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`verdict` is one of the five of `report`; a finding makes the checkpoint wrong for somebody, a note does not."""

    verdict: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def judge(sections: Sections) -> Judgement:
    """The verdict on `sections`, with what is wrong and what is merely worth knowing."""
    verdict = _verdict(sections)
    if verdict.startswith("not qwen2"):
        return Judgement(verdict=verdict, findings=(), notes=())
    findings = [*_bias_findings(sections), *_tensor_findings(sections), *_config_findings(sections)]
    notes = [*_layout_notes(sections), *_config_notes(sections), *_file_notes(sections)]
    if sections["values"] is not None:
        findings += _value_findings(sections)
        notes += _value_notes(sections["values"])
    return Judgement(verdict=verdict, findings=tuple(findings), notes=tuple(notes))


def _verdict(sections: Sections) -> str:
    kind, biases = sections["geometry"]["model_type"], sections["biases"]
    if kind not in ("qwen2", "llama"):
        return f"not qwen2 (model_type is {kind!r})"
    if not sections["tensors"]["has_layers"]:
        return f"not qwen2 (model_type is {kind!r}, but no tensor is named model.layers.*)"
    if kind == "llama":
        return "llama layout with qwen2 biases" if biases["present"] else "llama layout without biases"
    return "qwen2 with missing biases" if biases["missing"] else "qwen2"


def _bias_findings(sections: Sections) -> Iterator[str]:
    biases, llama = sections["biases"], sections["geometry"]["model_type"] == "llama"
    if biases["missing"] and (biases["present"] or not llama):
        layer, projection = next(
            (layer, p) for layer, states in biases["layers"].items() for p, s in states.items() if s == "missing"
        )
        yield (
            f"{biases['missing']} of {biases['expected']} q/k/v biases are missing, the first is "
            f"model.layers.{layer}.self_attn.{projection}_proj.bias: readers fill them with zeros and go on"
        )
    if llama and biases["present"] and not sections["geometry"]["attention_bias"]:
        yield (
            f"attention_bias is not set in config.json: a Llama reader drops the {biases['present']} q/k/v biases "
            "that are in the files"
        )


def _tensor_findings(sections: Sections) -> Iterator[str]:
    tensors = sections["tensors"]
    missing = [name for name in tensors["missing"] if not name.endswith(".bias")]
    extra = [name for name in tensors["extra"] if not _explained(name, sections)]
    if missing:
        yield f"{_count(missing, 'tensor')} missing, the first is {missing[0]}"
    if tensors["misshapen"]:
        name, shapes = next(iter(tensors["misshapen"].items()))
        yield (
            f"{_count(tensors['misshapen'], 'tensor')} of another shape than config.json says, the first is {name}: "
            f"it has {shapes['found']}, config.json asks for {shapes['expected']}"
        )
    if extra:
        yield f"{_count(extra, 'tensor')} that no such model has, the first is {extra[0]}"


def _explained(name: str, sections: Sections) -> bool:
    """Extra tensors that the verdict or a note speaks of: a Llama's biases, the zero biases of GPTQ writers."""
    return name.endswith("_proj.bias") and (
        sections["geometry"]["model_type"] == "llama" or bool(sections["quantization"]["evidence"])
    )


def _count(things: Any, noun: str) -> str:
    return f"1 {noun} is" if len(things) == 1 else f"{len(things)} {noun}s are"


def _config_findings(sections: Sections) -> Iterator[str]:
    shape, rope, tokens = sections["geometry"], sections["rope"], sections["tokenizer"]
    if shape["num_attention_heads"] % shape["num_key_value_heads"]:
        yield (
            f"{shape['num_attention_heads']} attention heads cannot share {shape['num_key_value_heads']} "
            "key/value heads evenly"
        )
    if rope["disagreement"] and len(rope["spelled_in"]) == 2:
        yield rope["disagreement"]
    if tokens and tokens["rows_needed"] > tokens["vocabulary_rows"]:
        yield (
            f"the tokenizer's highest id is {tokens['rows_needed'] - 1}, but the embedding has only "
            f"{tokens['vocabulary_rows']} rows"
        )
    quantization = sections["quantization"]
    if quantization["config"] is not None and not quantization["evidence"]:
        yield "config.json has a quantization_config, but no tensor is stored packed"
    if quantization["config"] is None and quantization["evidence"]:
        yield f"tensors are stored packed ({', '.join(quantization['evidence'])}), but config.json does not say so"


def _value_findings(sections: Sections) -> Iterator[str]:
    values, biases = sections["values"], sections["biases"]
    for_zero, broken = values["zero_biases"], values["not_finite"]
    if broken:
        yield f"{_count(broken, 'tensor')} not finite (NaN or Inf), the first is {broken[0]}"
    if for_zero and len(for_zero) == biases["present"]:
        yield (
            "all q/k/v biases are zero in every layer: they were re-initialised, as a reader does that does not find "
            "them; go back to the original checkpoint"
        )
    elif for_zero:
        yield f"{len(for_zero)} of {biases['present']} q/k/v biases are all zero, the first is {for_zero[0]}"
    if values["zero_weights"]:
        yield f"{_count(values['zero_weights'], 'weight')} all zero, the first is {values['zero_weights'][0]}"
    if sections["head"]["lm_head"] == "different":
        yield "the head is tied, but lm_head.weight differs from the embedding: readers drop one of them"


def _layout_notes(sections: Sections) -> Iterator[str]:
    head, extra = sections["head"], sections["biases"]["extra"]
    if head["tied"] and head["lm_head"] in ("present", "equal"):
        yield "the head is tied, and lm_head.weight is stored all the same" + (
            ", equal to the embedding" if head["lm_head"] == "equal" else " (--values says whether it is a copy)"
        )
    if extra and sections["quantization"]["evidence"]:
        yield f"{len(extra)} biases beside q, k and v ({extra[0]} first): GPTQ writers add zeros there"
    elif extra and sections["geometry"]["model_type"] == "llama":
        yield f"{len(extra)} biases that no Qwen2 has ({extra[0]} first): only zeros there can be converted back"
    missing = [name for name in sections["tensors"]["missing"] if name.endswith("o_proj.bias")]
    if missing:
        yield f"{len(missing)} o_proj biases, which attention_bias promises, are not stored: readers take zeros"


def _config_notes(sections: Sections) -> Iterator[str]:
    rope, tokens, sliding = sections["rope"], sections["tokenizer"], sections["sliding"]
    if rope["disagreement"] and len(rope["spelled_in"]) == 1:
        yield rope["disagreement"]
    if not rope["spelled_in"]:
        yield f"config.json names no rope_theta: readers take {rope['theta']:g}"
    if sliding["sliding_window"] is not None and not sliding["layers"]:
        reason = (
            f"max_window_layers {sliding['max_window_layers']} leaves no layer to slide"
            if sliding["use_sliding_window"]
            else "use_sliding_window is false"
        )
        yield f"sliding_window {sliding['sliding_window']} is set but unused: {reason}"
    if tokens and tokens["rows_needed"] < tokens["vocabulary_rows"]:
        rest = tokens["vocabulary_rows"] - tokens["rows_needed"]
        yield f"the vocabulary is padded: {rest} of {tokens['vocabulary_rows']} rows belong to no token"
    declared = DTYPE_NAMES.get(str(sections["geometry"]["dtype"]))
    stored = sections["tensors"]["dtypes"]
    if declared and declared not in stored:
        yield f"config.json says {sections['geometry']['dtype']}, the tensors are {', '.join(stored)}"


def _file_notes(sections: Sections) -> Iterator[str]:
    files = sections["files"]
    for name in files["leftovers"]:
        yield f"{name} is not part of the checkpoint: nothing points to it"
    if files["declared_bytes"] not in (None, files["tensor_bytes"]):
        yield (
            f"the index declares {format_bytes(files['declared_bytes'])}, the tensors take "
            f"{format_bytes(files['tensor_bytes'])}"
        )
    if sections["tokenizer"] is None:
        yield "there is no tokenizer"
    elif sections["chat_template"] is None:
        yield "there is no chat template"
    if not sections["generation_config"]:
        yield "there is no generation_config.json"


def _value_notes(values: dict[str, Any]) -> Iterator[str]:
    beyond = values["beyond_fp16"]
    if beyond:
        yield f"{_count(beyond, 'tensor')} beyond fp16's range of 65504, the first is {beyond[0]}"
