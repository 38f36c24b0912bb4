"""tokenizer.json <-> GGUF's lists, and what of it llama.cpp would read differently, which is refused.

llama.cpp splits text by a rule that it knows by name, merges, and looks for added tokens as they are written. A
tokenizer that strips spaces around added tokens, normalises otherwise than NFC, or splits by a rule of its own would
give it other ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.geometry import Config, read_json, read_text
from qwen2tool.checkpoint.templates import check_templates
from qwen2tool.convert.gguf_vocab import (
    GENERATION_CONFIG,
    QWEN2_SPLIT,
    REMEDY,
    SAMPLING,
    SKELETON,
    TOKENIZER_CONFIG,
    GgufTokenizer,
    Kind,
)
from qwen2tool.errors import UserError

Json = dict[str, Any]
NEUTRAL = {
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
"""Fields of a BPE model -> the values under which it merges bytes as llama.cpp does."""
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration)
"""What comes out of JSON that is shaped otherwise than tokenizer.json."""
STRIPPING = ("single_word", "lstrip", "rstrip")


def tokenizer_of_folder(folder: Path, config: Config) -> GgufTokenizer:
    """The tokenizer of a Hugging Face folder; rows of the embedding that no token has are filled up as unused.

    Raises:
        UserError: no tokenizer.json, more ids than rows, or a tokenizer that llama.cpp would read differently.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no tokenizer.json", "Put the tokenizer files of the model beside its weights")
    whole = read_json(file)
    settings, generation = (_optional(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))
    try:
        lists = lists_of_json(file, whole, int(config["vocab_size"]))
        templates = _templates(folder, settings)
    except MALFORMED:
        raise UserError(f"{file}: not what the tokenizers library writes", REMEDY) from None
    skeleton = whole | {"model": {k: v for k, v in whole["model"].items() if k not in ("vocab", "merges")}}
    sidecar = {
        SKELETON: skeleton,
        TOKENIZER_CONFIG: {key: value for key, value in settings.items() if key != "chat_template"},
        GENERATION_CONFIG: generation,
    }
    numbers = {key: generation.get(key) for key in SAMPLING.values()}
    return GgufTokenizer(
        **lists,
        ids=_ids(lists["tokens"], config, settings, generation),
        templates=templates,
        sidecar={key: json.dumps(value, ensure_ascii=False) for key, value in sidecar.items() if value},
        sampling={k: v for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)},
    )


def lists_of_json(file: Path, whole: Json, rows: int) -> dict[str, Any]:
    """`tokens`, `kinds`, `merges`, `pre` and `add_bos` of a `GgufTokenizer`, from the contents of tokenizer.json.

    Raises:
        UserError: more ids than `rows`, or a tokenizer that llama.cpp would read differently.
    """
    model: Any = whole.get("model")
    added = whole.get("added_tokens") or []
    _require_plain(file, model, added, whole.get("normalizer"))
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [int(Kind.UNUSED)] * rows
    named = [(index, token, Kind.NORMAL) for token, index in model["vocab"].items()]
    named += [(t["id"], t["content"], Kind.CONTROL if t.get("special") else Kind.USER_DEFINED) for t in added]
    for index, token, kind in named:
        if type(index) is not int or not 0 <= index < rows:
            raise UserError(
                f"{file}: token {ascii(token)[:40]} has id {index}, but the embedding has {rows} rows", REMEDY
            )
        tokens[index], kinds[index] = token, int(kind)
    return {
        "tokens": tokens,
        "kinds": kinds,
        "merges": [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]],
        "pre": _rule(file, whole.get("pre_tokenizer")),
        "add_bos": _adds_bos(file, whole.get("post_processor")),
    }


def _require_plain(file: Path, model: Any, added: list[Any], normalizer: Any) -> None:
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UserError(f"{file}: no BPE tokenizer", "Use the tokenizer of a Qwen2 model")
    for key, neutral in NEUTRAL.items():
        if model.get(key) not in neutral:
            raise UserError(f"{file}: its BPE has {key} {ascii(model[key])[:40]}, which GGUF cannot say", REMEDY)
    for token in added:
        odd = [flag for flag in STRIPPING if token.get(flag)]
        if odd:
            raise UserError(
                f"{file}: added token {ascii(token['content'])[:40]} has {odd[0]}, which GGUF cannot say",
                f"Set {odd[0]} to false if the model was not trained with it",
            )
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    for step in filter(None, steps):
        if step["type"] != "NFC":
            raise UserError(f"{file}: normalises text by {step['type']}, which llama.cpp would not do", REMEDY)


def _rule(file: Path, splitter: Any) -> str:
    """The name that llama.cpp has for the way a tokenizer splits text before it merges."""
    steps: list[Any] = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter]
    kinds = [step and step["type"] for step in steps]
    spaced = any(step.get("add_prefix_space") for step in steps if step)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not spaced:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and not spaced:
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if plain and steps[0]["pattern"] == {"Regex": QWEN2_SPLIT}:
            return "qwen2"
    raise UserError(f"{file}: splits text by a rule that is neither Qwen2's nor GPT-2's", REMEDY)


def _adds_bos(file: Path, processor: Any) -> bool:
    """Whether each text gets a token in front; any other addition is refused."""
    steps = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    adding = False
    for step in filter(None, steps):
        if step["type"] == "ByteLevel":
            continue
        pieces = [next(iter(piece)) for piece in step.get("single", ["other"])]
        if step["type"] != "TemplateProcessing" or pieces not in (["Sequence"], ["SpecialToken", "Sequence"]):
            raise UserError(f"{file}: adds tokens to a text in a way that GGUF cannot say", REMEDY)
        adding |= len(pieces) == 2
    return adding


def _optional(file: Path) -> Json:
    return read_json(file) if file.is_file() else {}


def _templates(folder: Path, settings: Json) -> dict[str, str]:
    """Chat templates by name; the file wins over tokenizer_config.json, as in transformers."""
    stored = settings.get("chat_template")
    named = stored if isinstance(stored, list) else [{"name": "default", "template": stored}] if stored else []
    check_templates(folder / "tokenizer_config.json", named)
    found = {str(entry["name"]): str(entry["template"]) for entry in named}
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        found["default"] = read_text(alone)
    return found


def _ids(tokens: list[str], config: Config, settings: Json, generation: Json) -> dict[str, int]:
    """What generation stops at comes first, then what the tokenizer names, then config.json."""
    of = {token: index for index, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        for value in (generation.get(f"{key}_token_id"), of.get(str(token)), config.get(f"{key}_token_id")):
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int and 0 <= first < len(tokens):
                found[role] = first
                break
    return found
