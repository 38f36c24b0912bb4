"""What the files beside the weights say: tokenizer, chat template, when generation stops; section by section.

Keys are documented in docs/inspect-schema.md. A GGUF file carries all of it in its metadata. One that is damaged is
noted and hides nothing: whoever asks whether the weights are whole gets an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import read_json, read_text
from qwen2tool.checkpoint.templates import check_template, check_templates
from qwen2tool.checkpoint.tokens import Vocabulary, read_vocabulary
from qwen2tool.checkpoint.tolerate import Damaged, is_there, tolerate
from qwen2tool.errors import UserError

TURN_ENDS, TEXT_ENDS = "<|im_end|>", "<|endoftext|>"
"""ChatML's end of a turn, where an instruct model stops, and where a base model stops."""
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
REMEDY = "Copy the file again from where the checkpoint came from"
GGUF_TOKENS, GGUF_TYPES, GGUF_TEMPLATE = (
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template"
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "vocab.json", "added_tokens.json", GGUF_TOKENS)
TEMPLATES = ("chat_template.jinja", "chat_template.json", SETTINGS, GGUF_TEMPLATE)
"""Where either may stand."""
UNUSED_TOKEN = 5
"""tokenizer.ggml.token_type of a row that pads the vocabulary."""


def side_sections(checkpoint: Checkpoint, damaged: Damaged) -> dict[str, Any]:
    """The sections `tokenizer`, `chat_template` and `generation`; what cannot be read goes into `damaged`."""
    found = _from_gguf if checkpoint.format == "gguf" else _from_folder
    vocabulary, template = found(checkpoint, damaged)
    return {
        "tokenizer": _tokenizer_section(checkpoint, vocabulary),
        "chat_template": template,
        "generation": _generation_section(checkpoint, vocabulary, damaged),
    }


def damaged_side_files(checkpoint: Checkpoint) -> Damaged:
    """What is wrong with the files beside the weights, in a folder."""
    damaged: Damaged = {}
    side_sections(checkpoint, damaged)
    return damaged


def _from_folder(checkpoint: Checkpoint, damaged: Damaged) -> tuple[Vocabulary | None, str | None]:
    return read_vocabulary(checkpoint.folder, damaged), _chat_template(checkpoint.folder, damaged)


def _from_gguf(checkpoint: Checkpoint, damaged: Damaged) -> tuple[Vocabulary | None, str | None]:
    from qwen2tool.checkpoint.gguf_header import read_gguf_header

    metadata = read_gguf_header(checkpoint.path).metadata
    template = None
    if GGUF_TEMPLATE in metadata:
        tolerate(lambda file: check_template(file, metadata[GGUF_TEMPLATE]), checkpoint.path, damaged, GGUF_TEMPLATE)
        template = None if GGUF_TEMPLATE in damaged else GGUF_TEMPLATE
    if GGUF_TOKENS not in metadata:
        return None, template
    return tolerate(lambda file: _gguf_vocabulary(file, metadata), checkpoint.path, damaged, GGUF_TOKENS), template


def _gguf_vocabulary(file: Path, metadata: dict[str, Any]) -> Vocabulary | None:
    """The tokens but those that pad the vocabulary.

    Raises:
        UserError: a list that is none, that holds something else, or of another length.
    """
    from qwen2tool.checkpoint.gguf_header import STRING, GgufArray

    tokens, types = metadata[GGUF_TOKENS], metadata.get(GGUF_TYPES)
    if not isinstance(tokens, GgufArray) or tokens.kind != STRING:
        raise UserError(f"{file}: no list of texts", REMEDY)
    if types is not None and not (isinstance(types, GgufArray) and types.count == tokens.count):
        raise UserError(f"{file}: {tokens.count} tokens, but {GGUF_TYPES} is no list of as many types", REMEDY)
    ids = {str(token): index for index, token in enumerate(tokens.values())}
    kinds = [] if types is None else types.values()
    unused = {index for index, kind in enumerate(kinds) if kind == UNUSED_TOKEN}
    used = [index for index in range(tokens.count) if index not in unused]
    return Vocabulary(file=file.name, count=len(used), rows=used[-1] + 1 if used else 0, ids=ids)


def _chat_template(folder: Path, damaged: Damaged) -> str | None:
    """The file that holds the chat template, found as transformers does: one of its own before the tokenizer's."""
    for name, read in (
        ("chat_template.jinja", lambda file: check_template(file, read_text(file))),
        ("chat_template.json", _template_of_json),
        (SETTINGS, _template_of_json),
    ):
        if is_there(folder / name) and name not in damaged:
            found = tolerate(read, folder / name, damaged)
            if found or found is None:
                return name if found else None
    return None


def _template_of_json(file: Path) -> bool:
    return check_templates(file, read_json(file).get("chat_template"))


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


def _generation_section(checkpoint: Checkpoint, vocabulary: Vocabulary | None, damaged: Damaged) -> dict[str, Any]:
    """`stops_at` holds the ids where generation stops; those of generation_config.json come before config.json's."""
    file, settings = checkpoint.folder / GENERATION, None
    if checkpoint.format != "gguf" and is_there(file):
        settings = tolerate(_generation_settings, file, damaged)
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


def _generation_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    stops = settings.get("eos_token_id")
    if stops is not None and not all(type(index) is int for index in (stops if isinstance(stops, list) else [stops])):
        raise UserError(f"{file}: eos_token_id is {ascii(stops)[:40]}, neither an id nor a list of ids", REMEDY)
    return settings


def _ids(settings: Any, key: str) -> list[int]:
    value = settings.get(key) if settings else None
    return [index for index in (value if isinstance(value, list) else [value]) if type(index) is int]


def _kind(ids: list[int], names: dict[int, str], turn_end: int | None) -> str | None:
    if turn_end is not None and turn_end in ids:
        return "instruct"
    return "base" if TEXT_ENDS in (names.get(index) for index in ids) else None
