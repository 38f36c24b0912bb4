"""What the files beside the weights say: tokenizer, chat template, when generation stops; section by section.

Keys are documented in docs/inspect-schema.md. A GGUF file carries all of it in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.checkpoint.tokens import Vocabulary, read_vocabulary

TURN_ENDS, TEXT_ENDS = "<|im_end|>", "<|endoftext|>"
"""ChatML's end of a turn, where an instruct model stops, and where a base model stops."""
GENERATION = "generation_config.json"
UNUSED_TOKEN = 5
"""tokenizer.ggml.token_type of a row that pads the vocabulary."""


def side_sections(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sections `tokenizer`, `chat_template` and `generation`."""
    vocabulary, template = _from_gguf(checkpoint) if checkpoint.format == "gguf" else _from_folder(checkpoint)
    return {
        "tokenizer": _tokenizer_section(checkpoint, vocabulary),
        "chat_template": template,
        "generation": _generation_section(checkpoint, vocabulary),
    }


def _from_folder(checkpoint: Checkpoint) -> tuple[Vocabulary | None, str | None]:
    return read_vocabulary(checkpoint.folder), chat_template(checkpoint.folder)


def _from_gguf(checkpoint: Checkpoint) -> tuple[Vocabulary | None, str | None]:
    from qwen2tool.checkpoint.gguf_header import GgufArray, read_gguf_header

    metadata = read_gguf_header(checkpoint.path).metadata
    template = "tokenizer.chat_template"
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, GgufArray) or not tokens.count:
        return None, template if template in metadata else None
    ids = {str(token): index for index, token in enumerate(tokens.values())}
    kinds = types.values() if isinstance(types, GgufArray) else []
    unused = {index for index, kind in enumerate(kinds) if kind == UNUSED_TOKEN}
    used = [index for index in range(tokens.count) if index not in unused]
    rows = used[-1] + 1 if used else 0
    vocabulary = Vocabulary(file=checkpoint.path.name, count=len(used), rows=rows, ids=ids)
    return vocabulary, template if template in metadata else None


def chat_template(folder: Path) -> str | None:
    """The file that holds the chat template."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            return name
    settings = folder / "tokenizer_config.json"
    return settings.name if settings.is_file() and read_json(settings).get("chat_template") else None


def _tokenizer_section(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> dict[str, Any] | None:
    if vocabulary is None:
        return None
    table = checkpoint.tensors.get("model.embed_tokens.weight")
    rows = table.shape[0] if table and table.shape else checkpoint.geometry.vocab_size
    return {
        "file": vocabulary.file,
        "count": vocabulary.count,
        "rows_needed": vocabulary.rows,
        "vocabulary_rows": rows,
        "padded_rows": max(0, rows - vocabulary.rows),
    }


def _generation_section(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """`stops_at` holds the ids where generation stops; those of generation_config.json come before config.json's."""
    file = checkpoint.folder / GENERATION
    settings = read_json(file) if checkpoint.format != "gguf" and file.is_file() else None
    ids = _ids(settings, "eos_token_id") or _ids(checkpoint.config, "eos_token_id")
    names = {} if vocabulary is None else {index: token for token, index in vocabulary.ids.items()}
    turn_end = None if vocabulary is None else vocabulary.ids.get(TURN_ENDS)
    return {
        "file": settings is not None,
        "stops_at": [{"id": index, "token": names.get(index)} for index in ids],
        "config_stops_at": _ids(checkpoint.config, "eos_token_id"),
        "end_of_turn_id": turn_end,
        "kind": _kind(ids, names, turn_end),
    }


def _ids(settings: Any, key: str) -> list[int]:
    value = settings.get(key) if settings else None
    return [index for index in (value if isinstance(value, list) else [value]) if type(index) is int]


def _kind(ids: list[int], names: dict[int, str], turn_end: int | None) -> str | None:
    if turn_end is not None and turn_end in ids:
        return "instruct"
    return "base" if TEXT_ENDS in (names.get(index) for index in ids) else None
