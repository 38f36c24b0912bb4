"""Qwen (1)'s vocabulary as tokenizer.json: the same ids as tiktoken's rule gives, on text of many scripts.

The truth is that rule written down: merge the pair of neighbours whose join has the lowest rank, the leftmost first.
"""

from __future__ import annotations

import base64
import json
import os
import unicodedata
from pathlib import Path

import pytest
import regex
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen2tool
from qwen2tool.checkpoint.folder import open_checkpoint
from qwen2tool.convert.qwen1_tokenizer import (
    SPECIAL,
    SPLIT,
    byte_alphabet,
    merges_of,
    read_ranks,
    side_files_of_qwen1,
    tokenizer_json,
)
from qwen2tool.convert.run import convert
from qwen2tool.errors import UserError
from tests.checkpoint.edits import load_state
from tests.convert.qwen1_model import CONFIG, forward, write_qwen1, write_tiktoken

BUNDLED = Path(qwen2tool.__file__).parent / "assets" / "tiny-qwen2" / "tokenizer.json"
ORDINARY = 3040
TEXTS = (
    "The model answers; the user's reading it, and THEY'LL see 12,345.67 (or 1e-5)!",
    "def add(a: int, b: int) -> int:\n    return a + b  # sum\n\n\nprint(add(1, 2))\r\n\t\tx",
    "你好\uff0c世界\uff01这是一个测试。 混合 English 与中文 123",
    "مرحبا بالعالم، هذا اختبار ١٢٣",
    "שלום עולם नमस्ते दुनिया こんにちは 안녕하세요 Привет",
    "👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 👍🏽 emoji",
    "cafe\u0301 e\u0301 \u212b \ufb01 \u1112\u1161\u11ab",
    "  leading, trailing   \n \n\u00a0\u3000\u200b\ufeff\x00\x7f" + " " * 40,
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|><|extra_0|>x<|extra_204|>",
    "",
)


def by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joins = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Special tokens first, then Qwen's splitting rule, then merges by rank."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    ids: list[int] = []
    for part in regex.split(r"(<\|(?:endoftext|im_start|im_end|extra_\d+)\|>)", unicodedata.normalize("NFC", text)):
        if part in special:
            ids.append(special[part])
            continue
        for piece in regex.findall(SPLIT, part):
            whole = piece.encode()
            ids += [ranks[whole]] if whole in ranks else by_rank(whole, ranks)
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen (1) with the bundled model's vocabulary, as a chat model."""
    path = write_qwen1(tmp_path_factory.mktemp("qwen1") / "qwen1", vocab_size=3328)
    write_tiktoken(path / "qwen.tiktoken", BUNDLED, ORDINARY)
    settings = {
        "chat_format": "chatml", "eos_token_id": 151643, "max_window_size": 6144, "top_p": 0.8, "do_sample": True
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    convert(folder, folder.parent / "qwen2")
    return folder.parent / "qwen2"


def test_ids_are_tiktokens(folder: Path, converted: Path) -> None:
    ranks = read_ranks(folder / "qwen.tiktoken")
    bare, whole = Tokenizer.from_file(str(converted / "tokenizer.json")), AutoTokenizer.from_pretrained(converted)
    for text in TEXTS:
        truth = tiktoken_ids(text, ranks)
        assert bare.encode(text, add_special_tokens=False).ids == truth
        assert whole(text)["input_ids"] == truth
        assert whole.decode(truth) == unicodedata.normalize("NFC", text)
    assert len(whole) == ORDINARY + 208


def test_a_changed_rank_changes_ids(folder: Path, tmp_path: Path) -> None:
    """The comparison above, with two ordinary tokens exchanged."""
    ranks = read_ranks(folder / "qwen.tiktoken")
    swapped = {**ranks, b" the": ranks[b" a"], b" a": ranks[b" the"]}
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_json(ranks, tmp_path)))
    bare = Tokenizer.from_file(str(tmp_path / "t.json"))
    assert bare.encode(TEXTS[0]).ids == tiktoken_ids(TEXTS[0], ranks) != tiktoken_ids(TEXTS[0], swapped)


def test_the_merges_are_those_the_vocabulary_was_made_with(folder: Path) -> None:
    written = json.loads(BUNDLED.read_text())["model"]["merges"]
    found = tokenizer_json(read_ranks(folder / "qwen.tiktoken"), folder)["model"]["merges"]
    assert [merge.split(" ") for merge in found] == written


def test_the_byte_alphabet_is_that_of_tokenizers() -> None:
    assert sorted(byte_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()[ord(" ")] == "Ġ" and byte_alphabet()[ord("\n")] == "Ċ" and byte_alphabet()[0xAD] == "Ń"


def test_the_converted_model_is_a_qwen2_that_stops(folder: Path, converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokens = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    truth = forward(load_state(folder), {**CONFIG, "vocab_size": 3328}, tokens)
    with torch.no_grad():
        assert ((model(tokens).logits - truth).abs().max() / truth.std()).item() < 2e-5
    end, stop = ORDINARY, ORDINARY + 2
    assert model.generation_config.eos_token_id == [stop, end] and model.generation_config.pad_token_id == end
    assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_end|>", end, 256)
    assert json.loads((converted / "generation_config.json").read_text()) == {
        "pad_token_id": end, "eos_token_id": [stop, end], "top_p": 0.8, "do_sample": True
    }  # fmt: skip


def test_the_template_is_chatml(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be short."}, turns[0]]
    assert tokenizer.apply_chat_template(own, tokenize=False).startswith("<|im_start|>system\nBe short.<|im_end|>\n")


def test_a_base_model_ends_at_the_end_of_text(tmp_path: Path) -> None:
    path = write_qwen1(tmp_path / "base", vocab_size=3328)
    write_tiktoken(path / "qwen.tiktoken", BUNDLED, ORDINARY)
    files = {name: json.loads(contents) for name, contents in side_files_of_qwen1(open_checkpoint(path)).items()}
    assert files["generation_config.json"] == {"pad_token_id": ORDINARY, "eos_token_id": ORDINARY}
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"
    added = {entry["content"]: entry["id"] for entry in files["tokenizer.json"]["added_tokens"]}
    assert added == {name: ORDINARY + i for i, name in enumerate(SPECIAL)} and len(added) == 208


def test_a_folder_without_vocabulary_is_converted_without_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert side_files_of_qwen1(open_checkpoint(write_qwen1(tmp_path / "bare"))) == {}
    assert "no qwen.tiktoken" in capsys.readouterr().err.replace("\n", " ")


def test_more_tokens_than_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    path = write_qwen1(tmp_path / "small", vocab_size=3247)
    (path / "qwen.tiktoken").write_bytes((folder / "qwen.tiktoken").read_bytes())
    with pytest.raises(UserError, match="3248 tokens with the special ones, but the embedding has 3247 rows"):
        side_files_of_qwen1(open_checkpoint(path))


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTES = b"".join(line(bytes([byte]), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (BYTES + b"!!! 256\n", "line 257 is no token and rank"),
        (BYTES + line(b"ab", 256)[:-4] + b"x\n", "line 257"),
        (BYTES + b"YWI= -1\n", "line 257"),
        (BYTES + line(b"a" * 257, 256), "line 257"),
        (BYTES + line(b"ab", 257), "do not have the ranks from 0 on"),
        (BYTES + line(b"ab", 255), "do not have the ranks from 0 on"),
        (BYTES.replace(line(b"A", 65), line(b"ab", 65)), "1 bytes are no tokens, the first is 0x41"),
        (b"", "256 bytes are no tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_ranks(tmp_path / "qwen.tiktoken")


def test_a_file_beyond_any_vocabulary_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "qwen.tiktoken").open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(UserError, match="are no vocabulary"):
        read_ranks(tmp_path / "qwen.tiktoken")


def test_a_token_that_no_merge_makes_is_refused(tmp_path: Path) -> None:
    ranks: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    assert merges_of(ranks | {b"ab": 256, b"abc": 257}, tmp_path) == [(b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(UserError, match=r"token 256 .*abc.* is no merge of earlier ones"):
        merges_of(ranks | {b"abc": 256, b"ab": 257}, tmp_path)


@pytest.mark.long
def test_the_published_vocabulary_gives_the_published_merges(tmp_path: Path) -> None:
    """151,643 tokens, which Qwen (1) and Qwen2 share: written as a .tiktoken file and read back."""
    if "QWEN2TOOL_REAL_MODEL" not in os.environ:
        pytest.skip("QWEN2TOOL_REAL_MODEL names no published checkpoint")
    file = Path(os.environ["QWEN2TOOL_REAL_MODEL"]) / "tokenizer.json"
    write_tiktoken(tmp_path / "qwen.tiktoken", file, 151643)
    ranks = read_ranks(tmp_path / "qwen.tiktoken")
    ours = tokenizer_json(ranks, tmp_path)
    merges = json.loads(file.read_text(encoding="utf-8"))["model"]["merges"]
    assert [merge.split(" ") for merge in ours["model"]["merges"]] == [list(m) for m in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(ours))
    bare, published = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_file(str(file))
    for text in TEXTS:
        assert bare.encode(text).ids == tiktoken_ids(text, ranks)
        if "<|extra" not in text:
            assert bare.encode(text).ids == published.encode(unicodedata.normalize("NFC", text)).ids
    assert bare.token_to_id("<|extra_0|>") == 151646 and bare.token_to_id("<|extra_204|>") == 151850
