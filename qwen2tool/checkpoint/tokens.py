"""How many ids a tokenizer can emit, read from its files without building it.

A tokenizer.json of 11 MB takes 0.15 s to parse, two thirds of it merges, which say nothing about ids. So only its
vocabulary and its added tokens are parsed, where they stand in the text: a key in quotes cannot occur inside a JSON
string, whose quotes are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.errors import UserError

VOCABULARY = re.compile(r'"vocab"\s*:\s*(?=[{\[])')
ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
REMEDY = "Copy the tokenizer files again from where the checkpoint came from"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`count` tokens, added ones included (what `len(tokenizer)` says); their ids need `rows` rows of the embedding."""

    file: str
    count: int
    rows: int
    ids: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of the tokenizer in `folder`, or None where there is no tokenizer.json and no vocab.json.

    Raises:
        UserError: a tokenizer file is damaged or holds no ids.
    """
    whole, plain = folder / "tokenizer.json", folder / "vocab.json"
    if whole.is_file():
        ids = _from_tokenizer_json(whole)
    elif plain.is_file():
        ids = {str(token): index for token, index in read_json(plain).items()}
        if (folder / "added_tokens.json").is_file():
            ids |= read_json(folder / "added_tokens.json")
    else:
        return None
    ids |= _from_tokenizer_config(folder / "tokenizer_config.json")
    file = whole if whole.is_file() else plain
    if not ids or not all(type(index) is int and index >= 0 for index in ids.values()):
        raise UserError(f"{file}: holds no vocabulary of token ids", REMEDY)
    return Vocabulary(file=file.name, count=len(ids), rows=max(ids.values()) + 1, ids=ids)


def _from_tokenizer_json(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})", REMEDY) from None
    if not text.rstrip().endswith("}"):
        raise UserError(f"{file}: ends early", REMEDY)
    vocabulary, added = _value_after(VOCABULARY, text, file), _value_after(ADDED, text, file)
    if isinstance(vocabulary, Mapping):
        ids = dict(vocabulary)
    else:  # Unigram lists [token, score] pairs; the id is the position
        ids = {str(entry): index for index, entry in enumerate(vocabulary)}
    return ids | {str(entry["content"]): entry["id"] for entry in _records(added)}


def _value_after(key: re.Pattern[str], text: str, file: Path) -> Any:
    found = key.search(text)
    if found is None:
        return []
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({str(error)[:80]})", REMEDY) from None


def _from_tokenizer_config(file: Path) -> dict[str, Any]:
    decoder = read_json(file).get("added_tokens_decoder") if file.is_file() else None
    if not isinstance(decoder, dict):
        return {}
    return {
        str(entry["content"]): int(index)
        for index, entry in decoder.items()
        if index.isdigit() and isinstance(entry, dict) and "content" in entry
    }


def _records(entries: Iterable[Any]) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict) and {"id", "content"} <= entry.keys()]
