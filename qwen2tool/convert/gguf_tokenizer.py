"""The files beside the weights, rebuilt from a GGUF file: tokenizer, chat template, generation settings.

A reader of GGUF knows the splitting rule by name; tokenizer.json writes it out. Ordinary tokens become the vocabulary,
control and user-defined ones added tokens, and unused rows (the padding of the embedding) no tokens at all, as in the
published folders. Text is normalised to NFC, as every Qwen2 tokenizer does and GGUF cannot say. What `gguf_write` kept
of the original files comes back instead, if reading it again gives the same lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.convert.byte_level import BPE, BYTES, split_by
from qwen2tool.convert.gguf_vocab import (
    GENERATION_CONFIG,
    QWEN2_SPLIT,
    REMEDY,
    SKELETON,
    TOKENIZER_CONFIG,
    GgufTokenizer,
    Kind,
    tokenizer_of_gguf,
)
from qwen2tool.convert.gguf_vocab_json import MALFORMED, Json, lists_of_json
from qwen2tool.errors import UserError

ADDED = (Kind.CONTROL, Kind.USER_DEFINED)
END_OF_TEXT = "<|endoftext|>"


def side_files_of_gguf(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name -> contents: tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja.

    The chat template also stands in tokenizer_config.json, where transformers 4 looks for it.

    Raises:
        UserError: the file holds no byte-level BPE tokenizer, or one whose lists disagree.
    """
    return side_files_of(tokenizer_of_gguf(checkpoint), checkpoint.path, checkpoint.geometry.max_position_embeddings)


def side_files_of(tokenizer: GgufTokenizer, file: Path, context: int) -> dict[str, bytes]:
    """The same for a tokenizer that has been read from `file`, of a model for `context` positions."""
    files = {
        "tokenizer.json": json.dumps(_tokenizer(file, tokenizer), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_settings(tokenizer, context), indent=2, ensure_ascii=False) + "\n",
    }
    generation = _generation(tokenizer)
    if generation:
        files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    if "default" in tokenizer.templates:
        files["chat_template.jinja"] = tokenizer.templates["default"]
    return {name: text.encode("utf-8") for name, text in files.items()}


def _tokenizer(file: Path, tokenizer: GgufTokenizer) -> Json:
    """The contents of tokenizer.json."""
    vocabulary = _vocabulary(file, tokenizer)
    model = {"vocab": vocabulary, "merges": [list(merge) for merge in tokenizer.merges]}
    stored = _stored(tokenizer, SKELETON)
    try:
        whole = stored | {"model": stored["model"] | model}
        found = lists_of_json(file, whole, len(tokenizer.tokens))
        if all(_same(key, value, getattr(tokenizer, key)) for key, value in found.items()):
            return whole
    except (UserError, *MALFORMED):
        pass
    return _skeleton(tokenizer) | {"model": BPE | model}


def _same(key: str, found: Any, wanted: Any) -> bool:
    """Equal, but for names of unused rows."""
    if key != "tokens":
        return bool(found == wanted)
    return all(a == b or (a.startswith("[PAD") and b.startswith("[PAD")) for a, b in zip(found, wanted, strict=True))


def _vocabulary(file: Path, tokenizer: GgufTokenizer) -> dict[str, int]:
    """Token -> id. Added tokens are in it only where their ids would not come out of counting on from the others."""
    ordinary = [index for index, kind in enumerate(tokenizer.kinds) if kind == Kind.NORMAL]
    added = [index for index, kind in enumerate(tokenizer.kinds) if kind in ADDED]
    if ordinary + added != list(range(len(ordinary) + len(added))):
        ordinary = sorted(ordinary + added)
    vocabulary = {tokenizer.tokens[index]: index for index in ordinary}
    names = {tokenizer.tokens[index] for index in (*ordinary, *added)}
    if len(vocabulary) != len(ordinary) or len(names) != len({*ordinary, *added}):
        raise UserError(f"{file}: two ids have one token", REMEDY)
    for left, right in tokenizer.merges:
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise UserError(f"{file}: merges {ascii(left)[:40]} and {ascii(right)[:40]}, which are no tokens", REMEDY)
    return vocabulary


def _skeleton(tokenizer: GgufTokenizer) -> Json:
    """tokenizer.json without its model, as published with Qwen2."""
    own = tokenizer.pre == "gpt-2"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokenizer.tokens[index], **flags, "special": kind == Kind.CONTROL}
            for index, kind in enumerate(tokenizer.kinds)
            if kind in ADDED
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": BYTES | {"use_regex": True} if own else split_by(QWEN2_SPLIT),
        "post_processor": _with_bos(tokenizer) if tokenizer.add_bos and "bos" in tokenizer.ids else BYTES,
        "decoder": BYTES,
    }


def _with_bos(tokenizer: GgufTokenizer) -> Json:
    """A post-processor that puts the first token in front of each text."""
    index = tokenizer.ids["bos"]
    token = tokenizer.tokens[index]

    def part(sequence: str, number: int) -> list[Json]:
        return [
            {"SpecialToken": {"id": token, "type_id": number}},
            {"Sequence": {"id": sequence, "type_id": number}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _stored(tokenizer: GgufTokenizer, key: str) -> Json:
    """A JSON object under a key of ours, or an empty one."""
    try:
        value = json.loads(tokenizer.sidecar.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings(tokenizer: GgufTokenizer, context: int) -> Json:
    """The contents of tokenizer_config.json."""
    named = {role: tokenizer.tokens[index] for role, index in tokenizer.ids.items()}
    own = _stored(tokenizer, TOKENIZER_CONFIG)
    own.pop("auto_map", None)
    if not own or own.get("eos_token") != named.get("eos"):
        own = {
            "add_bos_token": tokenizer.add_bos,
            "add_prefix_space": False,
            "bos_token": named.get("bos") if tokenizer.add_bos else None,
            "clean_up_tokenization_spaces": False,
            "eos_token": named.get("eos"),
            "errors": "replace",
            "model_max_length": context,
            "pad_token": named.get("padding"),
            "split_special_tokens": False,
            "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.pre == "gpt-2" else "Qwen2Tokenizer",
            "unk_token": None,
        }
    templates = tokenizer.templates
    if set(templates) == {"default"}:
        own["chat_template"] = templates["default"]
    elif templates:
        own["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return own


def _generation(tokenizer: GgufTokenizer) -> Json:
    """The contents of generation_config.json: where to stop, and how the file says to sample."""
    ids = tokenizer.ids
    own = _stored(tokenizer, GENERATION_CONFIG)
    stops = own.get("eos_token_id")
    if own and (stops[0] if isinstance(stops, list) and stops else stops) == ids.get("eos"):
        return own
    found: Json = {f"{key}_token_id": ids[role] for role, key in (("bos", "bos"), ("padding", "pad")) if role in ids}
    if "eos" in ids:
        end = tokenizer.tokens.index(END_OF_TEXT) if END_OF_TEXT in tokenizer.tokens else ids["eos"]
        # A chat model's turn ends with its own token, a text with this one; llama.cpp stops at both.
        found["eos_token_id"] = ids["eos"] if end == ids["eos"] else [ids["eos"], end]
    return found | ({"do_sample": True, **tokenizer.sampling} if tokenizer.sampling else {})
