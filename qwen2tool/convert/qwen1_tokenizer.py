"""The files beside a Qwen (1), rebuilt for a Qwen2: tokenizer, chat template, generation settings.

Qwen (1) keeps its vocabulary as `qwen.tiktoken`: a line a token, base64 and rank. tiktoken merges whatever pair of
neighbours makes the token of lowest rank; tokenizer.json lists the pairs instead. The pair of a token is what its bytes
have come to when every merge of a lower rank is done: two parts, or the token could never be made. For the published
vocabulary that gives the merge list of the published Qwen2 tokenizer, entry by entry.

The splitting rule and NFC are Qwen2's too. The special tokens are not: 208 of them follow the ordinary ones, and
<|extra_0|> to <|extra_204|> have the ids that Qwen2 gives to others from 151646 on. A tokenizer of Qwen2 in place of
this one reads text alike and those tokens wrongly.

Cost: 2 s for 151,643 tokens.
Source: https://github.com/openai/tiktoken; the tokenization note of https://github.com/QwenLM/Qwen.
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen2tool.checkpoint.folder import Checkpoint
from qwen2tool.checkpoint.geometry import read_json
from qwen2tool.console import remark
from qwen2tool.convert.byte_level import BPE, BYTES, split_by
from qwen2tool.errors import UserError

FILE = "qwen.tiktoken"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
OWN_SETTINGS = ("chat_format", "max_window_size", "max_context_size", "stop_words_type")
"""What only Qwen (1)'s own generation code reads."""
MOST_BYTES, MOST_TOKEN_BYTES = 16 << 20, 256
"""Six times the published file, twice its longest token."""
COPY_AGAIN = f"Copy {FILE} again from the original model"
Ranks = dict[bytes, int]


def side_files_of_qwen1(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name -> contents: tokenizer.json, tokenizer_config.json with the ChatML template, generation_config.json.

    Without a qwen.tiktoken in the folder there is no tokenizer to rebuild, and stderr says so.

    Raises:
        UserError: qwen.tiktoken is damaged, or has more tokens than the embedding has rows.
    """
    file = checkpoint.folder / FILE
    if not file.is_file():
        remark(f"{checkpoint.folder}: no {FILE}, so the output has no tokenizer")
        return {}
    ranks = read_ranks(file)
    rows, count = checkpoint.geometry.vocab_size, len(ranks) + len(SPECIAL)
    if count > rows:
        raise UserError(f"{file}: {count} tokens with the special ones, but the embedding has {rows} rows", COPY_AGAIN)
    stored = checkpoint.folder / "generation_config.json"
    generation = read_json(stored) if stored.is_file() else {}
    chat = generation.get("chat_format") == "chatml"
    values = {
        "tokenizer.json": tokenizer_json(ranks, file),
        "tokenizer_config.json": _settings(len(ranks), chat, checkpoint.geometry.max_position_embeddings),
        "generation_config.json": _generation(generation, len(ranks), chat),
    }
    return {
        name: (json.dumps(value, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2) + "\n").encode()
        for name, value in values.items()
    }


def write_side_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Writes `side_files_of_qwen1` into `folder`; returns their names."""
    files = side_files_of_qwen1(checkpoint)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return list(files)


def read_ranks(file: Path) -> Ranks:
    """Token -> rank of a .tiktoken file.

    Raises:
        UserError: a line that is no base64 and rank, a rank that is missing or twice there, a byte that is no token.
    """
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file}: {file.stat().st_size} bytes are no vocabulary", COPY_AGAIN)
    ranks: Ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            token, rank = _entry(file, number, line)
            ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{file}: its {len(ranks)} tokens do not have the ranks from 0 on, one each", COPY_AGAIN)
    lost = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lost:
        raise UserError(f"{file}: {len(lost)} bytes are no tokens, the first is 0x{lost[0]:02x}", COPY_AGAIN)
    return ranks


def _entry(file: Path, number: int, line: bytes) -> tuple[bytes, int]:
    token, _, rank = line.strip().partition(b" ")
    try:
        decoded = base64.b64decode(token, validate=True)
    except binascii.Error:
        decoded = b""
    if not decoded or len(decoded) > MOST_TOKEN_BYTES or not rank.isdigit() or len(rank) > 9:
        raise UserError(f"{file}: line {number} is no token and rank: {ascii(line)[:60]}", COPY_AGAIN)
    return decoded, int(rank)


def merges_of(ranks: Ranks, file: Path) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte is made of, by rank.

    Raises:
        UserError: a token that no merges of lower rank lead to: nothing that merges pairs could make it.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = _parts_below(token, ranks)
        if len(parts) != 2:
            raise UserError(
                f"{file}: token {ranks[token]} ({ascii(token)[:40]}) is no merge of earlier ones", COPY_AGAIN
            )
        merges.append((parts[0], parts[1]))
    return merges


def _parts_below(token: bytes, ranks: Ranks) -> list[bytes]:
    """What the bytes of `token` have come to when every merge of a lower rank is done, lowest first, left to right."""
    limit, parts = ranks[token], [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (ranks.get(left + right, limit) for left, right in pairwise(parts))
        rank, place = min((rank, place) for place, rank in enumerate(pairs))
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in tokenizer.json: itself where it is printable and no blank."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def tokenizer_json(ranks: Ranks, file: Path) -> dict[str, Any]:
    """The contents of tokenizer.json for a vocabulary; `file` is named in errors."""
    alphabet = byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(ranks) + i, "content": name, **_FLAGS} for i, name in enumerate(SPECIAL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": split_by(SPLIT),
        "post_processor": BYTES,
        "decoder": BYTES,
        "model": {
            **BPE,
            "vocab": {text(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            "merges": [f"{text(left)} {text(right)}" for left, right in merges_of(ranks, file)],
        },
    }


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _settings(first_special: int, chat: bool, length: int) -> dict[str, Any]:
    """tokenizer_config.json; the template stands in it, where both generations of readers look."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(first_special + i): {"content": name, **_FLAGS} for i, name in enumerate(SPECIAL)},
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END if chat else END_OF_TEXT,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _generation(stored: dict[str, Any], first_special: int, chat: bool) -> dict[str, Any]:
    """generation_config.json; a chat model stops at the end of a turn, which Qwen (1)'s own code saw to."""
    kept = {key: value for key, value in stored.items() if key not in OWN_SETTINGS}
    ends = {"pad_token_id": first_special, "eos_token_id": first_special}
    both = {"eos_token_id": [first_special + SPECIAL.index(TURN_END), first_special]} if chat else {}
    return {**ends, **kept, **both}
