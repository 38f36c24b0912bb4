"""The parts of a tokenizer.json that every byte-level BPE of Qwen has in common."""

from __future__ import annotations

from typing import Any

BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""The model, but for its vocab and merges."""
BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def split_by(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that cuts text where `pattern` matches, and then into bytes."""
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [rule, BYTES]}
