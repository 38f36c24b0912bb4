"""What is worth knowing about a checkpoint and wrong for nobody: one sentence a note, from the sections of a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen2tool.checkpoint.biases import bias_name
from qwen2tool.checkpoint.side_files import GENERATION, TEMPLATES, TOKENIZERS, TURN_ENDS
from qwen2tool.console import format_bytes, format_number

Sections = dict[str, Any]
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def notes(sections: Sections) -> Iterator[str]:
    yield from _layout_notes(sections)
    yield from _rope_notes(sections)
    yield from _config_notes(sections)
    yield from _text_notes(sections)
    yield from _file_notes(sections)
    if sections["values"] is not None:
        yield from _value_notes(sections["values"])


def count(things: Any, noun: str) -> str:
    return f"1 {noun} is" if len(things) == 1 else f"{len(things)} {noun}s are"


def extra_stats(biases: Sections) -> Iterator[tuple[str, Sections]]:
    """(name, statistics) of the biases beside q, k and v, where they were read."""
    for layer, row in (biases["stats"] or {}).items():
        for projection, stats in row.items():
            if f"{layer}.{projection}" in biases["extra"]:
                yield bias_name(int(layer), projection), stats


def _layout_notes(sections: Sections) -> Iterator[str]:
    head, biases = sections["head"], sections["biases"]
    if (biases["missing"] and not sections["tensors"]["renamed"]) or biases["zero"]:
        yield "lost biases come back from the original: qwen2tool convert THIS OUT --biases-from ORIGINAL"
    llama = sections["geometry"]["model_type"] == "llama"
    if head["tied"] and head["lm_head"] in ("present", "equal"):
        yield "the head is tied, and lm_head.weight is stored all the same" + (
            ", equal to the embedding" if head["lm_head"] == "equal" else " (--values says whether it is a copy)"
        )
    if biases["extra"] and llama:
        yield from _llama_notes(biases)
    elif biases["extra"] and sections["quantization"]["evidence"]:
        many, first = len(biases["extra"]), biases["extra"][0]
        yield f"{many} biases beside q, k and v ({first} first): GPTQ writers add zeros there"
    missing = [name for name in sections["tensors"]["missing"] if name.endswith("o_proj.bias")]
    if missing:
        yield f"{len(missing)} o_proj biases, which attention_bias promises, are not stored: readers take zeros"
    if llama and biases["present"] and not biases["missing"] and not biases["extra"]:
        yield "this can be converted back to Qwen2 without loss (`qwen2tool convert`)"


def _llama_notes(biases: Sections) -> Iterator[str]:
    """Qwen2 has no slot for what Llama's `attention_bias` adds on o_proj: only zeros there can be left out."""
    many, first = len(biases["extra"]), biases["extra"][0]
    if not biases["read"]:
        yield f"{many} biases that no Qwen2 has ({first} first): only zeros there can be converted back"
        return
    trained = [name for name, stats in extra_stats(biases) if stats["max_abs"] or stats["nan"] or stats["inf"]]
    if trained:
        yield (
            f"{len(trained)} of {many} biases that no Qwen2 has are not zero ({trained[0]} first): they were trained "
            "as a Llama's, and there is no way back to Qwen2 that keeps them"
        )
    else:
        yield (
            f"{many} biases that no Qwen2 has ({first} first) are all zero: this can be converted back to Qwen2 "
            "without loss (`qwen2tool convert`)"
        )


def _rope_notes(sections: Sections) -> Iterator[str]:
    rope = sections["rope"]
    if rope["disagreement"] and len(rope["spelled_in"]) == 1:
        yield rope["disagreement"]
    if not rope["spelled_in"]:
        yield f"config.json names no rope_theta: readers take {rope['theta']:g}"
    readers = rope["readers"]
    if readers["transformers 4"]["scaling"] and not readers["older"]["scaling"]:
        yield "rope_scaling has no `type` beside `rope_type`: readers of before mid-2024 will not scale"


def _config_notes(sections: Sections) -> Iterator[str]:
    tokens, sliding = sections["tokenizer"], sections["sliding"]
    if sliding["sliding_window"] is not None and not sliding["layers"]:
        layers = sections["geometry"]["num_hidden_layers"]
        reason = (
            "use_sliding_window is false"
            if not sliding["use_sliding_window"]
            else "layer_types lets no layer slide (readers that do not know it go by max_window_layers)"
            if sliding["layer_types"]
            else f"max_window_layers {sliding['max_window_layers']} leaves no layer of {layers} to slide"
        )
        yield f"sliding_window {sliding['sliding_window']} is set but unused: {reason}"
    if sections["config"]["hidden_act"] != "silu":
        yield f"hidden_act is {ascii(sections['config']['hidden_act'])[:40]}; every published Qwen2 has silu"
    if tokens and tokens["padded_rows"]:
        yield (
            f"the vocabulary is padded: {tokens['padded_rows']} of {tokens['vocabulary_rows']} rows belong to no "
            "token; leave them, and do not resize to len(tokenizer)"
        )
    declared = DTYPE_NAMES.get(str(sections["geometry"]["dtype"]))
    stored = sections["tensors"]["dtypes"]
    if declared and declared not in stored and not sections["quantization"]["evidence"]:
        yield f"config.json says {sections['geometry']['dtype']}, the tensors are {', '.join(stored)}"


def _text_notes(sections: Sections) -> Iterator[str]:
    unread, generation = sections["files"]["unread"], sections["generation"]
    if not sections["biases"]["read"]:
        yield "the biases' numbers were not read, so zero biases and the attention hazard would not be seen"
    for name, reason in unread.items():
        yield f"{name} was not read: {reason}"
    damaged = sections["files"]["damaged"]
    if sections["tokenizer"] is None and not any(name in unread | damaged for name in TOKENIZERS):
        yield "there is no tokenizer"
    elif sections["chat_template"] is None and not any(name in damaged for name in TEMPLATES):
        yield "there is no chat template"
    if not generation["file"] and GENERATION not in damaged and sections["files"]["format"] != "gguf":
        yield "there is no generation_config.json"
    stops = {stop["id"] for stop in generation["stops_at"]}
    if sections["chat_template"] and generation["end_of_turn_id"] not in stops | {None}:
        yield (
            f"there is a chat template, but generation does not stop at {TURN_ENDS} ({generation['end_of_turn_id']}), "
            "as is usual for a base model: a chat would run on"
        )
    config = generation["config_stops_at"]
    if config and stops and not stops & set(config):
        yield (
            f"config.json stops at {', '.join(map(str, config))}, generation_config.json at "
            f"{', '.join(map(str, sorted(stops)))}: readers of either will disagree"
        )


def _file_notes(sections: Sections) -> Iterator[str]:
    files = sections["files"]
    yield from files["assumed"]
    for left in files["leftovers"]:
        yield f"{left['name']} is not part of the checkpoint: nothing points to it" + _held(left)
    if files["declared_bytes"] not in (None, files["tensor_bytes"]):
        yield (
            f"the index declares {_bytes(files['declared_bytes'])}, the tensors take "
            f"{format_bytes(files['tensor_bytes'])}"
        )
    bare = [
        shard["name"]
        for shard in files["shards"]
        if shard["metadata"] is not None and "format" not in shard["metadata"]
    ]
    if bare:
        yield f"{bare[0]} does not say `format: pt` in its header, without which older transformers refuse it"


def _held(left: Sections) -> str:
    many, again = left["tensors"], left["repeated"]
    if not many:
        return ""
    if again == many:
        return f"; it holds {many} of the tensors a second time, and can go"
    if again:
        return f"; it holds {again} of the tensors a second time, and {many - again} others"
    return f"; it holds {many} tensors under other names"


def _bytes(declared: Any) -> str:
    whole = isinstance(declared, int | float) and not isinstance(declared, bool)
    return format_bytes(declared) if whole else ascii(declared)[:40]


def _value_notes(values: Sections) -> Iterator[str]:
    beyond = values["beyond_fp16"]
    if beyond:
        yield (
            f"{count(beyond, 'tensor')} beyond fp16's range of 65504, the first is {beyond[0]}: in fp16 they become Inf"
        )
    elif values["matrices"]["max_abs"] > 65504 / 8:
        yield f"the largest weight is {format_number(values['matrices']['max_abs'])}; fp16 ends at 65504"
    for dtype, number in values["not_read"].items():
        yield f"{number} tensors of {dtype} were not read: their numbers are packed"
