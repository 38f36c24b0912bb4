"""A report for reading: what the checkpoint is, its biases by layer where that says something, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.inventory import QKV
from qwen2tool.console import format_bytes, format_number, format_ranges, print_table, say

if TYPE_CHECKING:
    from qwen2tool.checkpoint.report import Report

Sections = dict[str, Any]


def print_report(report: Report) -> None:
    """Prints `report`; the verdict, findings and notes come last, where a terminal ends."""
    sections = report.sections
    print_table("", ("checkpoint", str(report.path)), _facts(sections), numeric_from=2)
    if sections["biases"]["missing"] and sections["biases"]["present"]:
        say("")
        print_table("q/k/v biases", ("layers", *QKV), _state_rows(sections["biases"]["layers"]))
    if sections["values"] is not None:
        _print_values(sections["values"])
    say("")
    for finding in report.findings:
        say(f"WRONG: {finding}")
    for note in report.notes:
        say(f"note: {note}")
    say(f"verdict: {report.verdict}")


def _facts(sections: Sections) -> Iterator[tuple[str, str]]:
    shape, parameters, rope = sections["geometry"], sections["parameters"], sections["rope"]
    yield (
        "architecture",
        f"{shape['model_type']}, {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
        + (f"intermediate {shape['intermediate_size']}, vocabulary {shape['vocab_size']}"),
    )
    yield "parameters", f"{parameters['total']:,}, {parameters['without_embedding']:,} without embedding and head"
    yield "attention", _attention(shape)
    yield "q/k/v biases", _biases(sections["biases"])
    yield "RoPE", f"theta {rope['theta']:,.0f}, " + (f"scaling {rope['scaling']}" if rope["scaling"] else "no scaling")
    yield "sliding window", _sliding(sections["sliding"], shape["num_hidden_layers"])
    yield "head", _head(sections["head"])
    yield "norm epsilon", f"{shape['rms_norm_eps']:g}"
    yield "positions", f"{shape['max_position_embeddings']:,}"
    dtypes = sections["tensors"]["dtypes"]
    yield "tensors", ", ".join(f"{entry['tensors']} of {name}" for name, entry in dtypes.items())
    yield "files", _files(sections["files"])
    yield "quantisation", _quantization(sections["quantization"])
    yield "tokenizer", _tokenizer(sections["tokenizer"])
    yield "chat template", sections["chat_template"] or "none"
    yield "generation_config.json", "present" if sections["generation_config"] else "none"


def _attention(shape: Sections) -> str:
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    kind = "every head its own" if heads == kv else f"groups of {shape['group_size']}"
    return f"{heads} heads of {shape['head_dim']}, {kv} key/value heads ({kind})"


def _biases(biases: Sections) -> str:
    text = f"{biases['present']} of {biases['expected']} present"
    return text + (f", {len(biases['extra'])} elsewhere" if biases["extra"] else "")


def _sliding(sliding: Sections, layers: int) -> str:
    count = len(sliding["layers"])
    if not count:
        return "no layer slides"
    return (
        f"{count} of {layers} layers slide over {sliding['sliding_window']} tokens: {format_ranges(sliding['layers'])}"
    )


def _head(head: Sections) -> str:
    if not head["tied"]:
        return f"its own, {head['lm_head']}"
    return "tied to the embedding" if head["lm_head"] == "absent" else f"tied; lm_head.weight is {head['lm_head']}"


def _files(files: Sections) -> str:
    count = len(files["shards"])
    shards = "1 file" if count == 1 else f"{count} shards"
    index = "" if files["index"] == "none" else ", index consistent"
    left = f", {len(files['leftovers'])} leftover" if files["leftovers"] else ""
    return f"{format_bytes(files['bytes'])} in {shards}{index}{left}"


def _quantization(quantization: Sections) -> str:
    evidence = ", ".join(f"{count} parts of {kind}" for kind, count in quantization["evidence"].items())
    config = quantization["config"]
    if config is None:
        return evidence or "none"
    return f"{config.get('quant_method', 'unnamed method')} by config.json, {evidence or 'no packed tensor'}"


def _tokenizer(tokens: Sections | None) -> str:
    if tokens is None:
        return "none"
    rows = f"highest id {tokens['rows_needed'] - 1:,}, {tokens['vocabulary_rows']:,} rows"
    return f"{tokens['count']:,} tokens ({tokens['file']}), {rows}"


def _state_rows(layers: dict[str, dict[str, str]]) -> Iterator[tuple[str, ...]]:
    """Layers whose biases are in the same state share a row."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, states in layers.items():
        groups.setdefault(tuple(states.get(p, "missing") for p in QKV), []).append(int(layer))
    for states_of, members in sorted(groups.items(), key=lambda group: group[1]):
        yield format_ranges(members), *states_of


def _print_values(values: Sections) -> None:
    say("")
    rows = ((layer, *(_size(row.get(p)) for p in QKV)) for layer, row in values["biases"].items())
    print_table("biases: L2 norm (largest magnitude)", ("layer", *QKV), rows)
    say("")
    matrices = values["matrices"]
    shown = [{"name": f"all {matrices['count']} together"} | matrices, *matrices["worst"]]
    print_table(
        "matrices: those with NaN or Inf, then the largest magnitudes",
        ("name", "L2 norm", "largest", "zeros", "NaN", "Inf"),
        ((m["name"], m["l2"], m["max_abs"], f"{m['zero_fraction']:.2%}", m["nan"], m["inf"]) for m in shown),
    )


def _size(stats: Sections | None) -> str:
    if stats is None:
        return "missing"
    text = f"{format_number(stats['l2'])} ({format_number(stats['max_abs'])})"
    broken = [f"{stats[kind]} {label}" for kind, label in (("nan", "NaN"), ("inf", "Inf")) if stats[kind]]
    if stats["zero_fraction"] > 0.5:
        broken.append(f"{stats['zero_fraction']:.0%} zeros")
    return ", ".join([text, *broken])
