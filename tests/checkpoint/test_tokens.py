"""Counts of tokens and ids against what transformers and tokenizers make of the same files."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from qwen2tool.checkpoint.tokens import read_vocabulary
from qwen2tool.errors import UserError
from tests.checkpoint.edits import edit_json


def test_a_tokenizer_json(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    found = read_vocabulary(base_folder)
    assert (found.file, found.count, found.rows) == (
        "tokenizer.json", len(tokenizer), max(tokenizer.get_vocab().values()) + 1
    )  # fmt: skip


def test_tokens_that_look_like_keys(base_copy):
    """A token named vocab, and one whose text is JSON, stand before and inside what is searched for."""
    before = read_vocabulary(base_copy)
    added = {"id": 300, "content": '"vocab": {"a": 999}', "special": False}

    def change(value):
        value["added_tokens"].append(added)
        value["model"]["vocab"] |= {"vocab": 301, "added_tokens": 302}

    edit_json(base_copy / "tokenizer.json", change)
    found = read_vocabulary(base_copy)
    assert (found.count, found.rows) == (before.count + 3, 303)


def test_gaps_count_as_rows_but_not_as_tokens(base_copy):
    before = read_vocabulary(base_copy)
    edit_json(base_copy / "tokenizer.json", lambda t: t["added_tokens"].append({"id": 380, "content": "<|far|>"}))
    found = read_vocabulary(base_copy)
    assert (found.count, found.rows) == (before.count + 1, 381)


def test_a_unigram_list(tmp_path):
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    found = read_vocabulary(tmp_path)
    assert (found.count, found.rows) == (3, 3)


def test_vocab_json_with_added_tokens(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    assert read_vocabulary(tmp_path).rows == 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2}))
    decoder = {"2": {"content": "<|im_end|>"}, "7": {"content": "<|later|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    found = read_vocabulary(tmp_path)
    assert (found.file, found.count, found.rows) == ("vocab.json", 4, 8)


def test_no_tokenizer(tmp_path):
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize("text", ['{"model": {"vocab": {"a": 0', '{"model": {"vocab": {"a": "x"}}}', "{}"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path)
