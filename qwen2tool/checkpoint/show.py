"""A report for reading: its biases first, what the checkpoint is, its biases by layer, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen2tool.checkpoint.biases import bias_name
from qwen2tool.checkpoint.inventory import QKV
from qwen2tool.checkpoint.side_files import GENERATION, TEMPLATES, TOKENIZERS
from qwen2tool.console import format_bytes, format_number, format_ranges, print_table, say

if TYPE_CHECKING:
    from qwen2tool.checkpoint.report import Report

Sections = dict[str, Any]
WORST = 8


def print_report(report: Report) -> None:
    """Prints `report`; the state of the biases comes first, verdict, findings and notes last, where a terminal ends."""
    sections = report.sections
    say(f"biases {report.judgement.state}: {report.headline}")
    if report.findings:
        say(f"{len(report.findings)} finding{'s' * (len(report.findings) > 1)}, the first: {report.findings[0]}")
    say("")
    print_table("", ("checkpoint", str(report.path)), _facts(sections), numeric_from=2)
    if _worth_a_table(sections["biases"]):
        say("")
        print_table("q/k/v biases", ("layers", *QKV), _state_rows(sections["biases"]))
    if sections["values"] is not None:
        _print_values(sections)
    _print_hazard(sections["hazard"])
    _print_memory(sections["memory"])
    say("")
    for finding in report.findings:
        say(f"WRONG: {finding}")
    if report.hazard:
        say(f"careful: {report.hazard}")
    for note in report.notes:
        say(f"note: {note}")
    wrong = f", with {len(report.findings)} finding{'s' * (len(report.findings) > 1)}" if report.findings else ""
    say(f"verdict: {report.verdict}{wrong}")


def _facts(sections: Sections) -> Iterator[tuple[str, str]]:
    shape, parameters = sections["geometry"], sections["parameters"]
    yield (
        "architecture",
        f"{shape['model_type']}, {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
        + (f"intermediate {shape['intermediate_size']}, vocabulary {shape['vocab_size']}"),
    )
    yield "parameters", f"{parameters['total']:,}, {parameters['without_embedding']:,} without embedding and head"
    yield "attention", _attention(shape)
    yield "q/k/v biases", _biases(sections["biases"])
    yield "RoPE", _rope(sections["rope"])
    yield "sliding window", _sliding(sections["sliding"], shape["num_hidden_layers"])
    yield "head", _head(sections["head"])
    yield "norm epsilon", f"{shape['rms_norm_eps']:g}"
    yield "positions", f"{shape['max_position_embeddings']:,}"
    dtypes = sections["tensors"]["dtypes"]
    yield "tensors", ", ".join(f"{entry['tensors']} of {name}" for name, entry in dtypes.items())
    yield "files", _files(sections["files"])
    yield "quantisation", _quantization(sections["quantization"])
    files = sections["files"]
    absent = dict.fromkeys(files["damaged"], "damaged") | dict.fromkeys(files["unread"], "not read")
    yield "tokenizer", _tokenizer(sections["tokenizer"]) or _first(absent, TOKENIZERS)
    yield "chat template", sections["chat_template"] or _first(absent, TEMPLATES)
    yield "generation", _generation(sections["generation"], files)


def _attention(shape: Sections) -> str:
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    kind = "every head its own" if heads == kv else f"groups of {shape['group_size']}"
    return f"{heads} heads of {shape['head_dim']}, {kv} key/value heads ({kind})"


def _biases(biases: Sections) -> str:
    text = f"{biases['present']} of {biases['expected']} present"
    if biases["dtypes"]:
        text += f" ({', '.join(biases['dtypes'])})"
    if biases["zero"]:
        text += f", {len(biases['zero'])} all zero"
    for p in QKV:
        sizes = [row[p]["l2"] for row in (biases["stats"] or {}).values() if p in row]
        text += f", {p} {format_number(min(sizes))} to {format_number(max(sizes))}" if sizes else ""
    return text + (f", {len(biases['extra'])} elsewhere" if biases["extra"] else "")


def _rope(rope: Sections) -> str:
    """One line where every reader takes the same RoPE, else each reader's own."""
    readers: dict[str, list[str]] = {}
    for reader, found in rope["readers"].items():
        how = f"theta {found['theta']:,.0f}, " + (f"scaling {found['scaling']}" if found["scaling"] else "no scaling")
        readers.setdefault(how, []).append(f"{reader} readers" if reader == "older" else reader)
    if len(readers) == 1:
        return f"{next(iter(readers))} (for every reader)"
    return "; ".join(f"{', '.join(names)}: {how}" for how, names in readers.items())


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
    shards = f"1 {files['format']} file" if count == 1 else f"{count} {files['format']} shards"
    index = "" if files["index"] == "none" else ", index consistent"
    left = f", {len(files['leftovers'])} leftover" if files["leftovers"] else ""
    hub = f", on the Hub at {files['commit'][:12]} (headers only)" if files["commit"] else ""
    return f"{format_bytes(files['bytes'])} in {shards}{index}{left}{hub}"


def _quantization(quantization: Sections) -> str:
    evidence = ", ".join(f"{count} parts of {kind}" for kind, count in quantization["evidence"].items())
    config = quantization["config"]
    if config is None:
        return evidence or "none"
    return f"{config.get('quant_method', 'unnamed method')} by config.json, {evidence or 'no packed tensor'}"


def _first(absent: dict[str, str], names: tuple[str, ...]) -> str:
    """Why the first of `names` that is there tells nothing, or that there is none of them."""
    return next((f"{absent[name]} ({name})" for name in names if name in absent), "none")


def _tokenizer(tokens: Sections | None) -> str:
    if tokens is None:
        return ""
    rows = f"highest id {tokens['rows_needed'] - 1:,}, {tokens['vocabulary_rows']:,} rows"
    return f"{tokens['count']:,} tokens ({tokens['file']}), {rows}"


def _generation(generation: Sections, files: Sections) -> str:
    stops = ", ".join(
        str(stop["id"]) if stop["token"] is None else f"{stop['token']} ({stop['id']})"
        for stop in generation["stops_at"]
    )
    kind = {"instruct": ", as instruct models do", "base": ", as base models do", None: ""}[generation["kind"]]
    without = f"; {GENERATION} is damaged" if GENERATION in files["damaged"] else f"; no {GENERATION}"
    return (f"stops at {stops}{kind}" if stops else "no end token") + (
        "" if generation["file"] or files["format"] == "gguf" else without
    )


def _worth_a_table(biases: Sections) -> bool:
    damaged = biases["missing"] or biases["zero"] or biases["not_finite"]
    return bool(damaged and biases["present"] and len(biases["zero"]) < biases["expected"])


def _state_rows(biases: Sections) -> Iterator[tuple[str, ...]]:
    """Layers whose biases are in the same state share a row."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, states in biases["layers"].items():
        row = tuple(_state(biases, int(layer), p, states.get(p, "missing")) for p in QKV)
        groups.setdefault(row, []).append(int(layer))
    for states_of, members in sorted(groups.items(), key=lambda group: group[1]):
        yield format_ranges(members), *states_of


def _state(biases: Sections, layer: int, projection: str, state: str) -> str:
    name = bias_name(layer, projection)
    return "all zero" if name in biases["zero"] else "NaN or Inf" if name in biases["not_finite"] else state


def _print_values(sections: Sections) -> None:
    say("")
    rows = ((layer, *(_size(row.get(p)) for p in QKV)) for layer, row in sections["biases"]["stats"].items())
    print_table("biases: L2 norm (largest magnitude)", ("layer", *QKV), rows)
    say("")
    matrices = sections["values"]["matrices"]
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


def _print_hazard(hazard: Sections | None) -> None:
    """The layers that stock attention cannot bear, the largest k bias first."""
    if hazard is None or not hazard["worst"]:
        return
    say("")
    rows = [(layer, hazard["layers"][str(layer)]) for layer in hazard["worst"][:WORST]]
    print_table(
        f"attention hazard: what q and k biases alone do within {hazard['positions']:,} positions",
        ("layer", "k norm of a head", "centred", "scores from", "to", "dQ error, order", "eager bf16 step"),
        (
            (layer, f"{it['k_norm']:.0f}", f"{it['k_norm_centred']:.1f}", f"{it['lowest_score']:.0f}",
             f"{it['highest_score']:.0f}", f"{it['dq_error']:.1%}", it["eager_step"])
            for layer, it in rows
        ),
    )  # fmt: skip
    if len(hazard["worst"]) > WORST:
        say(f"and {len(hazard['worst']) - WORST} more layers")


def _print_memory(memory: Sections) -> None:
    say("")
    train, serve = memory["train"], memory["serve"]
    rows = [
        (f"train {name} (rank {memory['rank']}, {memory['sequences']} x {memory['length']} tokens)",
         *(format_bytes(it[part]) for part in ("weights", "adapter", "activations", "total")))
        for name, it in (("LoRA", train["lora"]), ("QLoRA", train["qlora"]))
    ]  # fmt: skip
    serving = serve["weights_16_bit"] + serve["kv_cache_1000_tokens"]
    cache = format_bytes(serve["kv_cache_1000_tokens"])
    rows.append(
        ("serve 1,000 tokens in 16 bit", format_bytes(serve["weights_16_bit"]), "", cache, format_bytes(serving))
    )
    columns = ("GPU memory, estimated", "weights", "adapter, AdamW", "activations or cache", "together")
    print_table("", columns, rows)
