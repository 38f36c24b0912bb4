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

from qwen2tool.checkpoint.geometry import read_json, read_text
from qwen2tool.checkpoint.tolerate import Damaged, is_there, tolerate
from qwen2tool.errors import UserError

VOCABULARY = re.compile(r'"vocab"\s*:\s*(?=[{\[])')
ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
ID = re.compile("[0-9]{1,18}")
REMEDY = "Copy the tokenizer files again from where the checkpoint came from"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`count` tokens, added ones included (what `len(tokenizer)` says); their ids need `rows` rows of the embedding."""

    file: str
    count: int
    rows: int
    ids: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)


def read_vocabulary(folder: Path, damaged: Damaged | None = None) -> Vocabulary | None:
    """The vocabulary of the tokenizer in `folder`, or None where there is no tokenizer.json and no vocab.json.

    With `damaged`, a file that cannot be read is noted there: None where its ids are missed, else those of the others.

    Raises:
        UserError: a tokenizer file is damaged or holds no ids, and `damaged` is None.
    """
    whole, plain, added = (folder / name for name in ("tokenizer.json", "vocab.json", "added_tokens.json"))
    later = tolerate(_from_tokenizer_config, folder / "tokenizer_config.json", damaged)
    if is_there(whole):
        file, parts = whole, [tolerate(_from_tokenizer_json, whole, damaged)]
    elif is_there(plain):
        file, parts = plain, [tolerate(_from_vocab_json, plain, damaged), tolerate(_from_added, added, damaged)]
    else:
        return None
    ids: dict[str, int] = {}
    for part in parts:
        if part is None:
            return None
        ids |= part
    ids |= later or {}
    return Vocabulary(file=file.name, count=len(ids), rows=max(ids.values()) + 1, ids=ids)


def _from_vocab_json(file: Path) -> dict[str, int]:
    return _ids(file, read_json(file))


def _from_added(file: Path) -> dict[str, int]:
    return _ids(file, read_json(file), least=0) if file.is_file() else {}


def _ids(file: Path, found: dict[str, Any], least: int = 1) -> dict[str, int]:
    if len(found) < least or not all(type(index) is int and index >= 0 for index in found.values()):
        raise UserError(f"{file}: holds no vocabulary of token ids", REMEDY)
    return found


def _from_tokenizer_json(file: Path) -> dict[str, int]:
    text = read_text(file)
    if not text.rstrip().endswith("}"):
        why = "ends early" if text.lstrip().startswith("{") else "no JSON object" if text else "empty"
        raise UserError(f"{file}: {why}", REMEDY)
    vocabulary, added = _value_after(VOCABULARY, text, file), _value_after(ADDED, text, file)
    if not vocabulary:
        raise UserError(f"{file}: holds no vocabulary", REMEDY)
    if isinstance(vocabulary, Mapping):
        ids = dict(vocabulary)
    else:  # Unigram lists [token, score] pairs; the id is the position
        ids = {str(entry): index for index, entry in enumerate(vocabulary)}
    return _ids(file, ids | {str(entry["content"]): entry["id"] for entry in _records(added)})


def _value_after(key: re.Pattern[str], text: str, file: Path) -> Any:
    found = key.search(text)
    if found is None:
        return []
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({str(error)[:80]})", REMEDY) from None


def _from_tokenizer_config(file: Path) -> dict[str, int]:
    decoder = read_json(file).get("added_tokens_decoder") if file.is_file() else None
    if decoder is None:
        return {}
    if not isinstance(decoder, dict):
        raise UserError(f"{file}: added_tokens_decoder is no object", REMEDY)
    return {
        str(entry["content"]): int(index)
        for index, entry in decoder.items()
        if ID.fullmatch(index) and isinstance(entry, dict) and "content" in entry
    }


def _records(entries: Iterable[Any]) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict) and {"id", "content"} <= entry.keys()]
