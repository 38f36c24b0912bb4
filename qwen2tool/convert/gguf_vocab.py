"""A byte-level BPE tokenizer as GGUF keeps it, and how it is read from a GGUF file.

GGUF has one list of tokens (a row of the embedding each), a type for each (ordinary, control, user-defined, unused),
one list of merges, a name for the rule that splits text before the merges (`tokenizer.ggml.pre`), and a few ids. Names
and numbers: the public GGUF specification. The splitting rule must be one that llama.cpp knows: with another, text is
split in other places and the model reads other ids, without a word.

GGUF does not say whether text is normalised, and llama.cpp never does; nor flags of added tokens. That is kept as JSON
under keys of ours, without vocabulary and merges (`SKELETON`, a few kB), and comes back if it still fits the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.gguf_file import shortest
from qwen2tool.checkpoint.gguf_header import STRING, GgufArray, Value, read_gguf_header
from qwen2tool.errors import UserError

SKELETON = "qwen2tool.tokenizer"
TOKENIZER_CONFIG = "qwen2tool.tokenizer_config"
GENERATION_CONFIG = "qwen2tool.generation_config"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's own rule; every digit is a token of its own."""
QWEN2_RULES = ("qwen2", "deepseek-r1-qwen")
"""Names under which llama.cpp knows that rule."""
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "temp": "temperature", "penalty_repeat": "repetition_penalty"}
"""`general.sampling.` key -> generation_config.json's."""
REMEDY = "Get the file again, or give the tokenizer files from the original model"


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`; 2 and 6, unknown and byte, are SentencePiece's."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


KINDS = frozenset(int(kind) for kind in Kind)


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """`tokens[id]` is what an id stands for: ordinary ones in the byte-level alphabet, added ones as they are written.

    `merges` are pairs, best first. `ids` are those of "bos", "eos" and "padding" where there are any. `templates` maps
    "default" and other names to chat templates. `sidecar` holds JSON texts under keys of ours.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    pre: str
    ids: dict[str, int]
    add_bos: bool
    templates: dict[str, str]
    sidecar: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, int | float] = field(default_factory=dict)


def tokenizer_of_gguf(checkpoint: Checkpoint) -> GgufTokenizer:
    """The tokenizer in the (first part of the) GGUF file of `checkpoint`.

    Raises:
        UserError: there is none, it is no byte-level BPE, its rule for splitting is unknown, or its lists disagree.
    """
    file = checkpoint.shards[0]
    metadata = read_gguf_header(file).metadata
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(f"{file}: its tokenizer is {ascii(model)[:40]}, not byte-level BPE ('gpt2')", REMEDY)
    tokens, kinds = _texts(file, metadata, "tokens"), _numbers(file, metadata, "token_type")
    if not len(tokens) == len(kinds) == checkpoint.geometry.vocab_size:
        raise UserError(
            f"{file}: {len(tokens)} tokens and {len(kinds)} types for {checkpoint.geometry.vocab_size} rows", REMEDY
        )
    odd = set(kinds) - KINDS
    if odd:
        raise UserError(f"{file}: holds a token of type {min(odd)}, which no byte-level BPE has", REMEDY)
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    known = {role: value for role, value in ids.items() if type(value) is int and 0 <= value < len(tokens)}
    return GgufTokenizer(
        tokens=tokens,
        kinds=kinds,
        merges=[_pair(file, merge) for merge in _texts(file, metadata, "merges")],
        pre=_rule(file, metadata),
        ids=known,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        templates=_templates(metadata),
        sidecar={k: v for k, v in metadata.items() if k.startswith("qwen2tool.") and isinstance(v, str)},
        sampling=_sampling(metadata),
    )


def _array(file: Path, metadata: Mapping[str, Value], key: str) -> GgufArray:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, GgufArray):
        raise UserError(f"{file}: holds no list tokenizer.ggml.{key}", REMEDY)
    return value


def _texts(file: Path, metadata: Mapping[str, Value], key: str) -> list[str]:
    array = _array(file, metadata, key)
    if array.kind != STRING:
        raise UserError(f"{file}: tokenizer.ggml.{key} is no list of texts", REMEDY)
    return [str(text) for text in array.values()]


def _numbers(file: Path, metadata: Mapping[str, Value], key: str) -> list[int]:
    array = _array(file, metadata, key)
    values = array.values() if array.kind != STRING else [""]
    if not all(type(value) is int for value in values):
        raise UserError(f"{file}: tokenizer.ggml.{key} is no list of whole numbers", REMEDY)
    return [int(value) for value in values]


def _pair(file: Path, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise UserError(f"{file}: merge {ascii(merge)[:40]} is no pair of tokens", REMEDY)
    return left, right


def _rule(file: Path, metadata: Mapping[str, Value]) -> str:
    """The name of the rule; files of a Qwen2 that are older than the key have Qwen2's."""
    value = metadata.get("tokenizer.ggml.pre")
    if value is None and metadata.get("general.architecture") == "qwen2":
        return "qwen2"
    if value in QWEN2_RULES or value == "gpt-2":
        return str(value)
    raise UserError(f"{file}: tokenizer.ggml.pre is {ascii(value)[:40]}, a rule that no Qwen2 tokenizer has", REMEDY)


def _templates(metadata: Mapping[str, Value]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {key[len(prefix) :].lstrip(".") or "default": v for key, v in metadata.items() if key.startswith(prefix)}
    return {name: text for name, text in found.items() if isinstance(text, str) and name != "s"}


def _sampling(metadata: Mapping[str, Value]) -> dict[str, int | float]:
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in SAMPLING.items()}
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {key: shortest(value) if isinstance(value, float) else value for key, value in numbers.items()}
